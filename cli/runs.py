"""`smdbg runs`: the runs of a folder, or the description of one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from smdbg.cli.options import shared
from smdbg.cli.output import (
    Column,
    Format,
    Record,
    counted,
    data,
    dump,
    facts,
    field,
    line,
    listing,
    number,
    size,
    talk,
)
from smdbg.cli.root import Session
from smdbg.cli.target import ROOT
from smdbg.errors import NotARun, RunNotFound, SmdbgError

if TYPE_CHECKING:
    from smdbg.analysis.run import Run

THREADS = 16  # runs opened at once: the time goes into waiting for the store


@click.command("runs", short_help="List the runs of a folder, or describe one.")
@click.argument("url", metavar="[ROOT|RUN]", required=False)
@shared()
def command(session: Session, form: Format, url: str | None) -> None:
    """List the runs of a folder, or describe one.

    \b
    Examples:
      smdbg runs                       the runs under ./runs
      smdbg runs s3://bucket/runs      the runs under a prefix
      smdbg runs runs/mine             one run, described

    A list gives: name, url, status, created, age (seconds), framework, workers, steps, last_step, hyperparameters,
    verdict. The status is running, completed, lost (no sign of life for a minute) or failed with its reason; the
    verdict is the last that `smdbg check --save` left in the run.
    """
    from smdbg.analysis.run import list_runs, open_run
    from smdbg.config import load_config

    options = load_config().storage_options
    where = url or session.run or ROOT
    try:
        run = open_run(where, storage_options=options)
    except (RunNotFound, NotARun) as error:
        found = list_runs(where, storage_options=options)
        if not found and (url or session.run):
            if isinstance(error, NotARun):
                raise NotARun(f"{where}: it is no run, and there is none in it. `smdbg demo` writes two.") from None
            raise RunNotFound(f"{where}: there is nothing. Give a folder of runs, a run, or a URL of one.") from None
        records = _read(found, options)
        listing(records, _columns(any(record["verdict"] for record in records)), form)
        if not records:
            talk(f"No runs under ./{ROOT}. `smdbg demo` writes two to look at.", session.quiet)
        return
    _describe(run, form)


def _read(urls: list[str], options: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the records of the runs, oldest first; one that cannot be read says so as its status."""
    from smdbg.analysis.run import open_run

    def read(url: str) -> tuple[float, dict[str, Any]]:
        try:
            run = open_run(url, storage_options=options)
            return run.created, brief(run)
        except SmdbgError as error:
            return 0.0, _record(url, f"unreadable: {error}")

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(read, urls))
    return [record for _, record in sorted(found, key=lambda pair: pair[0])]


def brief(run: Run) -> dict[str, Any]:
    """Return the record of one run for a list."""
    steps = run.steps()
    return _record(
        run.url,
        run.status,
        created=_iso(run.created),
        age=round(max(0.0, time.time() - run.created), 1),
        framework=run.framework,
        workers=len(run.workers()),
        steps=len(steps),
        last_step=int(steps[-1]) if len(steps) else None,
        hyperparameters=run.hyperparameters,
        verdict=_verdict(run),
    )


def _verdict(run: Run) -> dict[str, Any] | None:
    """Return the last verdict that was left in a run."""
    from smdbg.analysis.verdict_store import last_verdict

    found = last_verdict(run.url, run.storage_options)
    if found is None:
        return None
    age = None if found.unreadable else round(max(0.0, time.time() - found.time), 1)
    time_text = None if found.unreadable else _iso(found.time)
    return {**vars(found), "time": time_text, "age": age, "status": None if found.unreadable else found.status}


def _record(url: str, status: str, **known: Any) -> dict[str, Any]:
    """Return a record with all its fields, None where nothing is known."""
    keys = ("created", "age", "framework", "workers", "steps", "last_step", "hyperparameters", "verdict")
    empty = dict.fromkeys(keys)
    return {"name": url.rstrip("/").rsplit("/", 1)[-1], "url": url, "status": status} | empty | known


def _describe(run: Run, form: Format) -> None:
    """Print everything about one run."""
    record = brief(run) | {
        "run_id": run.run_id,
        "world_size": run.world_size,
        "versions": run.versions,
        "argv": run.argv,
        "git_commit": run.git_commit,
        "seed": run.seed,
        "attempts": [_attempt(facts) for rank in run.workers() for facts in run.attempts(rank)],
        "collections": [_collection(run, name) for name in run.collections()],
    }
    match form:
        case Format.JSONL:
            data(dump(record))
        case Format.TSV:
            for key, value in record.items():
                data(f"{key}\t{field(value)}")
        case _:
            _page(record)


def _attempt(worker: Any) -> dict[str, Any]:
    """Return the record of one life of a worker."""
    keys = ("rank", "attempt", "status", "first_step", "last_step", "dropped_steps", "dropped_rows", "switched_off")
    return {key: getattr(worker, key) for key in keys} | {"mesh": dict(worker.mesh)}


def _collection(run: Run, name: str) -> dict[str, Any]:
    """Return what was saved of one collection."""
    tensors = [run.tensor(tensor) for tensor in run.tensors(collection=name)]
    steps = {int(step) for tensor in tensors for step in tensor.steps()}
    return {
        "name": name,
        "tensors": len(tensors),
        "steps": len(steps),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "pruned": max((_iso(tensor.pruned) for tensor in tensors if tensor.pruned is not None), default=None),
    }


def _page(record: Record) -> None:
    """Print the description of a run for people."""
    facts(
        [
            ("run", record["url"]),
            ("id", record["run_id"]),
            ("status", record["status"]),
            ("created", f"{record['created']}, {_ago(record['age'])} ago"),
            ("steps", _steps(record)),
            ("framework", record["framework"]),
            ("versions", _pairs(record["versions"], " ")),
            ("command", " ".join(record["argv"])),
            ("git commit", record["git_commit"]),
            ("seed", "" if record["seed"] is None else str(record["seed"])),
            ("verdict", _verdict_text(record["verdict"], explained=True)),
        ]
    )
    if record["hyperparameters"]:
        data("")
        line("hyperparameters", "bold")
        facts([(str(key), _value(value) or "-") for key, value in record["hyperparameters"].items()])
    data("")
    listing(record["attempts"], _attempt_columns(record["attempts"]), Format.TABLE)
    if record["collections"]:
        data("")
        listing(record["collections"], _collection_columns(record["collections"]), Format.TABLE)


def _steps(record: Record) -> str:
    """Return `200 steps, the last is 199`."""
    last = "" if record["last_step"] is None else f", the last is {record['last_step']}"
    return counted(record["steps"], "step") + last


def _iso(created: float) -> str:
    """Return a unix time as 2026-01-31T12:00:00Z."""
    return datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _ago(seconds: float | None) -> str:
    """Return an age for people: 12 s, 5 min, 3 h, 2 d."""
    if seconds is None:
        return "-"
    for limit, unit in ((120, 1), (7200, 60), (172_800, 3600)):
        if seconds < limit:
            return f"{seconds // unit:.0f} {({1: 's', 60: 'min', 3600: 'h'})[unit]}"
    return f"{seconds // 86_400:.0f} d"


def _value(value: Any, limit: int = 40) -> str:
    """Return a hyperparameter for people, short: 1e+11 as 100000000000, a long text cut."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    text = value if isinstance(value, str) else field(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _pairs(mapping: Record | None, sign: str = "=") -> str:
    """Return `lr=0.01, scale=1`."""
    return ", ".join(f"{key}{sign}{_value(value)}" for key, value in (mapping or {}).items())


def _verdict_text(verdict: Record | None, explained: bool = False) -> str:
    """Return a verdict for people: `clean, 5 min ago`, `2 errors, 1 warning, 3 h ago`."""
    if verdict is None:
        return ""
    if verdict["unreadable"]:
        return "unreadable" + (f": {verdict['unreadable']}" if explained else "")
    counts = [counted(verdict[f"{word}s"], word) for word in ("error", "warning") if verdict[f"{word}s"]]
    counts += [f"{verdict['infos']} info"] if verdict["infos"] else []
    words = {0: "clean", 1: "violated", 2: "no verdict"}[verdict["status"]]
    text = ", ".join(counts) if counts and verdict["status"] == 1 else ", ".join([words, *counts])
    why = f" ({verdict['reason'].removeprefix('No verdict: ')})" if explained and verdict["reason"] else ""
    return f"{text}, {_ago(verdict['age'])} ago{why}"


def _verdict_style(record: Record) -> str:
    """Return the colour of a verdict; the word says it anyway."""
    status = (record["verdict"] or {}).get("status")
    return "" if status is None else {0: "green", 1: "red"}.get(status, "yellow")


def _columns(verdicts: bool) -> list[Column]:
    """Return the columns of the list of runs; that of verdicts where there are any."""
    last = Column("verdict", lambda r: _verdict_text(r["verdict"]) or "-", fold=True, style=_verdict_style)
    return [
        Column("run", lambda r: r["name"], fold=True),
        Column("status", lambda r: r["status"], fold=True, style=_status_style),
        *([last] if verdicts else []),
        Column("age", lambda r: _ago(r["age"]), justify="right"),
        Column("created", lambda r: r["created"] or "-", drop=5),
        Column("framework", lambda r: r["framework"] or "-", drop=3),
        Column("workers", lambda r: number(r["workers"]), justify="right", drop=4),
        Column("steps", lambda r: number(r["steps"]), justify="right"),
        Column("last step", lambda r: number(r["last_step"]), justify="right", drop=2),
        Column("hyperparameters", lambda r: _pairs(r["hyperparameters"]), fold=True, drop=1),
    ]


def _status_style(record: Record) -> str:
    """Return the colour of a status; the word says it anyway."""
    word = record["status"].split(":")[0]
    return {"completed": "green", "running": "cyan", "lost": "yellow"}.get(word, "red")


def _attempt_columns(attempts: list[dict[str, Any]]) -> list[Column]:
    """Return the columns of the workers of a run; what went missing only where something did."""
    columns = [
        Column("worker", lambda a: str(a["rank"]), justify="right"),
        Column("attempt", lambda a: str(a["attempt"]), justify="right"),
        Column("status", lambda a: a["status"], fold=True, style=_status_style),
        Column("first step", lambda a: number(a["first_step"]), justify="right", drop=1),
        Column("last step", lambda a: number(a["last_step"]), justify="right", drop=1),
    ]
    if any(attempt["dropped_steps"] or attempt["dropped_rows"] for attempt in attempts):
        columns.append(Column("dropped steps", lambda a: number(a["dropped_steps"]), justify="right"))
        columns.append(Column("dropped rows", lambda a: number(a["dropped_rows"]), justify="right"))
    if any(attempt["mesh"] for attempt in attempts):
        columns.append(Column("mesh", lambda a: _pairs(a["mesh"]), fold=True, drop=2))
    return columns


def _collection_columns(collections: list[dict[str, Any]]) -> list[Column]:
    """Return the columns of what was saved; when values were taken out only where some were."""
    columns = [
        Column("collection", lambda c: c["name"], fold=True),
        Column("tensors", lambda c: number(c["tensors"]), justify="right"),
        Column("steps", lambda c: number(c["steps"]), justify="right"),
        Column("bytes", lambda c: size(c["bytes"]), justify="right"),
    ]
    if any(collection["pruned"] for collection in collections):
        columns.append(Column("values pruned", lambda c: c["pruned"] or "-"))
    return columns
