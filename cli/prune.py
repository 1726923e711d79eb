"""`smdbg prune`: delete full values, collections or whole runs that are no longer needed."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from smdbg.cli.options import shared, words
from smdbg.cli.output import Column, Format, Record, counted, listing, number, size, talk
from smdbg.cli.root import Session
from smdbg.errors import BadSelection, NotARun, RunNotFound, SmdbgError

if TYPE_CHECKING:
    from smdbg.store.backend import Backend
    from smdbg.store.prune import Choice

_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@click.command("prune", short_help="Delete values, collections or old runs; a dry run without --yes.")
@click.argument("url", metavar="[RUN|ROOT]", required=False)
@click.option("--older-than", metavar="AGE", help="Runs with no commit for so long: 12h, 30d, 8w.")
@click.option("--collection", "collections", multiple=True, metavar="NAME,…", help="Of these collections.")
@click.option("--steps", metavar="A:B:C", help="Values of these steps go.")
@click.option("--keep-steps", metavar="A:B:C", help="Values of all other steps go.")
@click.option("--values", is_flag=True, help="Full values go, statistics stay; the default within a run.")
@click.option("--all", "whole", is_flag=True, help="The collections go, statistics and all.")
@click.option("--yes", is_flag=True, help="Delete. Without it, nothing is changed.")
@shared()
def command(
    session: Session,
    form: Format,
    url: str | None,
    older_than: str | None,
    collections: tuple[str, ...],
    steps: str | None,
    keep_steps: str | None,
    values: bool,
    whole: bool,
    yes: bool,
) -> None:
    """Delete values, collections or old runs; a dry run without --yes.

    \b
    Examples:
      smdbg prune runs --older-than 30d             which runs would go
      smdbg prune runs --older-than 30d --yes       delete them
      smdbg prune runs/mine --collection gradients  full values of the gradients; statistics stay
      smdbg prune runs/mine --keep-steps ::1000     full values of all steps but each thousandth
      smdbg prune runs/mine --collection gradients --all
      smdbg prune runs --older-than 30d --values    full values in old runs

    --older-than alone deletes whole runs below ROOT, or RUN itself; with any of the others it prunes within them. Runs
    that are being written are never touched. It may be interrupted at any moment: what is left is a whole run or none,
    and the same command finishes the work. Values of single numbers (losses, metrics) only go with --all.

    tsv and jsonl give: run, collection (empty: the whole run), what (values, all or left behind; run, half deleted or
    half copied), steps, objects (deleted), shared (objects that stay, since they hold values of kept steps too), bytes
    (of the objects deleted), deleted (false: it was only shown).
    """
    from smdbg.config import load_config
    from smdbg.select import parse_steps
    from smdbg.store.prune import Choice

    where = url or session.run
    if not where:
        raise click.UsageError("Say which run, or folder of runs: nothing is guessed where things are deleted.")
    if steps and keep_steps:
        raise click.UsageError("--steps and --keep-steps exclude each other.")
    if whole and (values or steps or keep_steps):
        raise click.UsageError("--all takes out whole collections: leave --values, --steps and --keep-steps out.")
    if whole and not words(collections):
        raise click.UsageError("--all needs --collection. To delete whole runs, give --older-than alone.")
    inside = bool(words(collections) or steps or keep_steps or values)
    if not inside and older_than is None:
        raise click.UsageError("Say what is to go: --older-than, --collection, --steps, --keep-steps or --values.")
    named = steps or keep_steps
    choice = Choice(tuple(words(collections)), parse_steps(named) if named else None, bool(keep_steps), whole)
    before = None if older_than is None else time.time() - _age(older_than)
    options = load_config().storage_options
    done = _Done()
    try:
        if before is None:
            from smdbg.store.backend import open_backend

            told = f"{where} is whole and can be read; what was to go may still be there. The same command goes on."
            _within(open_backend(where, options), where, choice, yes, told, done)
        else:
            _old(session, where, options, before, choice if inside else None, yes, done)
    except KeyboardInterrupt:
        if yes:
            talk(_interrupted(done), session.quiet)
        raise
    listing(done.records, _columns(done.records), form)
    _say(done, yes, session.quiet)
    if done.error:
        raise done.error


@dataclass
class _Done:
    """What went or would go. `running`: runs left out; `error`: what every run was refused with that was old enough.

    `state`: what to say where somebody interrupts it now, '' while no run is being changed.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    state: str = ""
    running: int = 0
    error: SmdbgError | None = None


def _age(text: str) -> float:
    """Return an age in seconds."""
    found = _AGE.fullmatch(text.strip())
    if found is None:
        raise click.UsageError(f"--older-than: {text!r} is no age: give a number and s, m, h, d or w, such as 30d.")
    return float(found[1]) * _SECONDS[found[2]]


def _old(
    session: Session,
    where: str,
    options: Mapping[str, Any],
    before: float,
    choice: Choice | None,
    yes: bool,
    done: _Done,
) -> None:
    """Delete, or prune within, the runs whose last commit was before a time; unix seconds."""
    from smdbg.store.delete import HALF_COPY, LEFT_BEHIND, RUNNING, delete_run, found_runs

    seen, pruned = 0, 0
    for found, backend in found_runs(where, options):
        seen += 1
        half = found.status == LEFT_BEHIND
        done.running += found.status == RUNNING
        if found.status == RUNNING or (found.changed > before and not half) or (choice and found.status == HALF_COPY):
            continue
        if choice is None or half:
            if yes:
                done.state = f"{found.url} is whole, or half deleted and no run any more. The same command goes on."
                delete_run(backend, found)
                done.state = ""
            what = found.status if found.status in (LEFT_BEHIND, HALF_COPY) else "run"
            done.records.append(_record(found.url, "", what, None, found.objects, 0, found.size, yes))
            continue
        told = (
            f"{found.url} is whole and can be read; what was to go may still be there. It was changed, and so is no "
            f"longer old: the same command with --older-than 0s and {found.url} goes on."
        )
        try:
            _within(backend, found.url, choice, yes, told, done)
            pruned += 1
        except SmdbgError as error:  # one run that lacks the collection must not keep the others from being pruned
            done.state = ""
            talk(f"{error} Left as it is.", session.quiet)
            done.error = error
    if not seen:
        raise RunNotFound(f"{where}: there is no run, and none in it. `smdbg runs` lists runs.")
    if done.error and pruned:
        done.error = None
    elif done.error:
        done.error = BadSelection(f"{where}: none of its runs could be pruned; the last: {done.error}")


def _interrupted(done: _Done) -> str:
    """Return in what state things are."""
    runs = len({record["run"] for record in done.records})
    finished = f" Done before that: {counted(runs, 'run')}." if runs else ""
    return f"Interrupted. {done.state or 'No run is half done. The same command goes on.'}{finished}"


def _within(backend: Backend, url: str, choice: Choice, yes: bool, told: str, done: _Done) -> None:
    """Prune within one run. `told`: what to say where that is interrupted."""
    from smdbg.store.prune import Prune

    try:
        plan = Prune(backend, choice)
    except (NotARun, RunNotFound) as error:
        raise BadSelection(f"{error}. For the runs in a folder, give --older-than, such as 0s.") from error
    done.state = told
    lines = plan.carry_out() if yes else plan.planned()
    done.state = ""
    done.records += [
        _record(url, one.collection, one.what, one.steps, one.objects, one.shared, one.size, yes) for one in lines
    ]


def _record(
    url: str, collection: str, what: str, steps: int | None, objects: int, shared: int, freed: int, yes: bool
) -> dict[str, Any]:
    return {
        "run": url,
        "collection": collection,
        "what": what,
        "steps": steps,
        "objects": objects,
        "shared": shared,
        "bytes": freed,
        "deleted": yes,
    }


def _columns(records: Sequence[Record]) -> list[Column]:
    columns = [
        Column("run", lambda r: r["run"], fold=True),
        Column("collection", lambda r: r["collection"] or "-", fold=True),
        Column("what", lambda r: r["what"]),
        Column("steps", lambda r: number(r["steps"]), justify="right"),
        Column("objects", lambda r: number(r["objects"]), justify="right"),
        Column("shared", lambda r: number(r["shared"]), justify="right", drop=1),
        Column("bytes", lambda r: size(r["bytes"]), justify="right"),
    ]
    left_out = set()
    if len({record["run"] for record in records}) < 2 and any(record["collection"] for record in records):
        left_out.add("run")
    if not any(record["collection"] for record in records):
        left_out |= {"collection", "steps"}
    if not any(record["shared"] for record in records):
        left_out.add("shared")
    return [column for column in columns if column.title not in left_out]


def _say(done: _Done, yes: bool, quiet: bool) -> None:
    """Say on stderr what it comes to."""
    objects, shared, freed = (sum(record[key] for record in done.records) for key in ("objects", "shared", "bytes"))
    stay = f"{counted(shared, 'object')} that {'hold' if shared != 1 else 'holds'} values of kept steps too"
    if not done.records:
        text = "There is nothing to prune." if done.error is None else ""
    elif not objects:
        why = f"all lie in {stay}" if shared else "there is no object of them"
        text = f"Nothing can be freed: {why}. --yes would only make the values unreadable, and cannot be undone."
        if yes:
            text = f"Nothing was freed: {why}. The values are no longer listed."
    else:
        rest = f" {stay} {'stay' if shared != 1 else 'stays'}." if shared else ""
        text = f"Nothing was changed. {size(freed)} would be freed; --yes does it, and cannot be undone.{rest}"
        if yes:
            text = f"Deleted {counted(objects, 'object')}; {size(freed)} freed.{rest}"
    if done.running:
        is_are = "is" if done.running == 1 else "are"
        text += f" {counted(done.running, 'run')} {is_are} still being written: left out."
    if text:
        talk(text.strip(), quiet)
