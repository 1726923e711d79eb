"""`smdbg verify`: is everything of a run there, and whole?"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from smdbg.cli.exits import Exit
from smdbg.cli.options import shared, worker_option
from smdbg.cli.output import Column, Format, Record, counted, data, dump, line, listing, printable, size, talk
from smdbg.cli.root import Session
from smdbg.cli.target import target

if TYPE_CHECKING:
    from smdbg.store.verify_report import Damage, Orphan, Report

SHOWN = 20  # orphans in a table for people


@click.command("verify", short_help="Check every object of a run, and say what is damaged.")
@click.argument("url", metavar="[RUN]", required=False)
@click.option("--quick", is_flag=True, help="Full values are not read, only that they are there in full length.")
@click.option("--values", is_flag=True, help="Also hold full values against their statistics.")
@worker_option
@click.option("--repair", is_flag=True, help="Delete what no commit refers to, and nothing else.")
@click.option("--dry-run", is_flag=True, help="With --repair: only say what would be deleted.")
@click.option("--force", is_flag=True, help="With --repair: although workers are running; these are left alone.")
@shared()
def command(
    session: Session,
    form: Format,
    url: str | None,
    quick: bool,
    values: bool,
    worker: int | None,
    repair: bool,
    dry_run: bool,
    force: bool,
) -> Exit:
    """Check every object of a run, and say what is damaged.

    \b
    Examples:
      smdbg verify                              the newest run under ./runs
      smdbg verify s3://bucket/mine --quick     without reading full values
      smdbg verify runs/mine --format jsonl     for programs
      smdbg verify runs/mine --repair --dry-run

    Says which tensors, steps and workers each damaged object costs, and how much is still good. Objects that nothing
    refers to (orphans) are no damage: a writer that is running or was killed leaves them. Dropped steps are no damage.

    tsv gives: type (damage, orphan, deleted), object, what, worker, attempt, tensors, tensor_count,
    first_step, last_step, steps, values, bytes; jsonl also a last record of type summary. docs/verify.md tells more.

    Exit status: 0 clean, 1 damage found, 2 it could not be checked.
    """
    from smdbg.analysis.concurrency import requests_at_a_time
    from smdbg.config import load_config
    from smdbg.errors import BadConfig, BadSelection
    from smdbg.store.backend import open_backend
    from smdbg.store.verify import verify

    if (dry_run or force) and not repair:
        raise click.UsageError("--dry-run and --force go with --repair.")
    if quick and (values or repair):
        raise click.UsageError("--quick reads no values: it goes with neither --values nor --repair.")
    if url and session.run:
        raise click.UsageError("The run is named twice: give RUN or --run.")
    if url is not None and not url.strip():
        raise BadConfig("RUN is empty; a variable in the command may not be set. Give a folder or a URL.")
    where = target(session if url is None else replace(session, run=url))
    backend = open_backend(where, load_config().storage_options, requests_at_a_time(None))
    progress = _progress(session.quiet)
    ranks = () if worker is None else (worker,)
    report = verify(backend, quick=quick, ranks=ranks, progress=progress)
    if ranks and not report.workers:
        raise BadSelection(f"There is no worker {worker} in {where}.")
    compared = None
    if values:
        compared = _compare(backend, report, ranks, session.quiet)
    if progress:
        progress("")
    records = [_damage_record(one) for one in report.damage]
    deleted: list[dict[str, Any]] = []
    if repair:
        from smdbg.store import verify_repair

        gone = verify_repair.repairable(report, force)
        names = {one.object for one in gone}
        records += [_orphan_record(one, "orphan") for one in report.orphans if one.object not in names]
        removed = gone if dry_run else list(verify_repair.repair(backend, report, gone))
        deleted = [_orphan_record(one, "orphan" if dry_run else "deleted") for one in removed]
        records += deleted
    else:
        records += [_orphan_record(one, "orphan") for one in report.orphans]
    _show(report, records, form)
    _end(report, form, session.quiet, quick, compared, deleted if repair else None, dry_run)
    return Exit.VIOLATIONS if report.damage_count else Exit.CLEAN


def _compare(backend: Any, report: Report, ranks: tuple[int, ...], quiet: bool) -> int | None:
    from smdbg.errors import DamagedData, NewerFormat, NotARun, RunNotFound
    from smdbg.store.verify_values import verify_values

    try:
        return verify_values(backend, report, ranks)
    except (DamagedData, NotARun, RunNotFound, NewerFormat) as error:
        talk(f"values were not compared: {error}", quiet)
        return None


def _damage_record(one: Damage) -> dict[str, Any]:
    return {
        "type": "damage",
        "object": one.object,
        "what": one.what,
        "worker": one.worker[0] if one.worker else None,
        "attempt": one.worker[1] if one.worker else None,
        "tensors": list(one.tensors),
        "tensor_count": one.tensor_count,
        "first_step": one.first_step,
        "last_step": one.last_step,
        "steps": one.steps,
        "values": one.values,
        "bytes": None,
    }


def _orphan_record(one: Orphan, kind: str) -> dict[str, Any]:
    empty = dict.fromkeys(("tensors", "tensor_count", "first_step", "last_step", "steps", "values"))
    return {
        "type": kind,
        "object": one.object,
        "what": one.what,
        "worker": one.worker[0] if one.worker else None,
        "attempt": one.worker[1] if one.worker else None,
        **empty,
        "bytes": one.size,
    }


def _show(report: Report, records: list[dict[str, Any]], form: Format) -> None:
    if form is not Format.TABLE:
        listing(records, (), form)
        return
    damage = [record for record in records if record["type"] == "damage"]
    rest = [record for record in records if record["type"] != "damage"]
    several = len(report.workers) > 1
    listing(damage, [column for column in _DAMAGE if several or column.title != "worker"], form)
    if damage and rest:
        data("")
    listing(rest[:SHOWN], _ORPHANS, form)
    if len(rest) > SHOWN:
        data(f"… and {counted(len(rest) - SHOWN, 'more')[:-1]}; --format tsv lists all of them")


def _worker(record: Record) -> str:
    if record["worker"] is None:
        return "-"
    return f"{record['worker']}" + (f".{record['attempt']}" if record["attempt"] else "")


def _tensors(record: Record) -> str:
    names, count = record["tensors"], record["tensor_count"]
    return (", ".join(names[:3]) + (f" and {count - 3:,} more" if count > 3 else "")) or "-"


def _steps(record: Record) -> str:
    first, last = record["first_step"], record["last_step"]
    if first is None:
        return "-"
    return f"{first}" if first == last else f"{first} – {last}"


_DAMAGE = (
    Column("damaged object", lambda r: r["object"], fold=True),
    Column("what", lambda r: r["what"], fold=True, drop=3),
    Column("worker", _worker, justify="right", drop=2),
    Column("tensors", _tensors, fold=True, drop=4),
    Column("steps", _steps, justify="right", drop=1),
)
_ORPHANS = (
    Column("not referred to", lambda r: r["object"], fold=True),
    Column("what", lambda r: "deleted" if r["type"] == "deleted" else r["what"], fold=True),
    Column("bytes", lambda r: size(r["bytes"]), justify="right", drop=1),
)


def _end(
    report: Report,
    form: Format,
    quiet: bool,
    quick: bool,
    compared: int | None,
    deleted: list[dict[str, Any]] | None,
    dry_run: bool,
) -> None:
    """Say how much is good: on stdout for people and in jsonl, on stderr where a listing goes to a program."""
    if form is Format.JSONL:
        data(dump(_summary(report, quick, compared, deleted, dry_run)))
        return
    lines = [_verdict(report, quick)]
    if compared is not None:
        lines.append(f"{counted(compared, 'value')} compared with their statistics.")
    lines += [f"Not checked: {text}." for text in report.unchecked]
    left = report.orphan_count
    if deleted is not None:
        total, verb = sum(r["bytes"] for r in deleted), "would be deleted" if dry_run else "deleted"
        lines.append(f"{counted(len(deleted), 'object')} of {size(total)} {verb}; {left - len(deleted):,} left alone.")
    elif left:
        lines.append(
            f"{counted(left, 'object')} ({size(report.orphan_bytes)}) that nothing refers to: no damage. A writer that "
            "runs, or was killed, leaves such; --repair deletes those of a run that has ended."
        )
    if form is Format.TABLE and (report.damage_count or left):
        data("")
    for text in lines:
        if form is Format.TABLE:
            line(text)
        else:
            talk(text, quiet)


def _verdict(report: Report, quick: bool) -> str:
    held = f"{counted(report.objects, 'object')} ({size(report.bytes)})"
    extent = "full values not read, only their lengths checked" if quick else "every checksum checked"
    if not report.damage_count:
        kept = (
            "" if quick else f": {counted(report.values, 'full value')}, {counted(report.lines, 'line')} of statistics"
        )
        return f"Clean: {held}{kept}; {extent}."
    bad, total = len(report.damaged_objects), report.objects + report.missing
    held = f"{counted(total, 'object')} ({size(report.bytes)})"
    text = f"{bad:,} of {held} damaged{' or missing' if report.missing else ''}"
    if report.unfinished:
        text = f"This is {report.unfinished}. {text}"
    text += _lost(report, quick)
    unreadable = [key for key, state in report.workers.items() if not state.readable]
    if unreadable:
        names = ", ".join(f"{rank}.{attempt}" if attempt else f"{rank}" for rank, attempt in unreadable[:5])
        more = f" and {len(unreadable) - 5:,} more" if len(unreadable) > 5 else ""
        return f"{text}. Of worker {names}{more} the log or the metadata is damaged: what it lists beyond is lost."
    return f"{text}. The rest is good."


def _lost(report: Report, quick: bool) -> str:
    """Say how many values cannot be read, as far as it is known; without reading them only how many at most."""
    lost, of = report.values_lost, counted(report.values, "full value")
    if report.unknown:
        text = f"; of the {of} that could be counted, {lost:,} cannot be read" if report.values else ""
        text += (
            "; how many others are lost is not known"
            if report.values
            else "; how many full values are lost is not known"
        )
    elif lost or not quick:
        text = f"; {'up to ' if quick and lost else ''}{lost:,} of {of} cannot be read"
    else:
        text = ""
    if report.lines_lost:
        most = "up to " if report.unknown else ""
        text += f"; nor can {most}{counted(report.lines_lost, 'line')} of statistics, with what they tell of"
    return text


def _summary(
    report: Report, quick: bool, compared: int | None, deleted: list[dict[str, Any]] | None, dry_run: bool
) -> Mapping[str, Any]:
    return {
        "type": "summary",
        "url": report.url,
        "run_id": report.run_id,
        "clean": report.damage_count == 0,
        "quick": quick,
        "objects": report.objects,
        "bytes": report.bytes,
        "damage": report.damage_count,
        "damaged_objects": len(report.damaged_objects),
        "missing_objects": report.missing,
        "values": report.values,
        "values_lost": report.values_lost,
        "unknown": report.unknown,
        "statistics": report.lines,
        "statistics_lost": report.lines_lost,
        "values_compared": compared,
        "orphans": report.orphan_count,
        "orphan_bytes": report.orphan_bytes,
        "deleted": None if deleted is None or dry_run else len(deleted),
        "unchecked": report.unchecked,
        "unfinished": report.unfinished,
    }


def _progress(quiet: bool) -> Callable[[str], None] | None:
    """Return what shows how far the check is on stderr, None where that is no terminal that can erase a line."""
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return None

    def show(text: str) -> None:
        sys.stderr.write("\r\x1b[K" + printable(text)[:60])
        sys.stderr.flush()

    return show
