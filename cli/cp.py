"""`smdbg cp`: copy a run between a folder and S3, or any two places."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import click

from smdbg.cli.options import shared
from smdbg.cli.output import Format, counted, data, dump, field, line, size, talk
from smdbg.cli.root import Session
from smdbg.errors import BadSelection

SECONDS = 0.1  # between two reports of progress


@click.command("cp", short_help="Copy a run, between a folder and S3 or any two places.")
@click.argument("source")
@click.argument("target")
@click.option("--allow-incomplete", is_flag=True, help="Also copy a run that is being written, as it stands.")
@shared(run=False)
def command(session: Session, form: Format, source: str, target: str, allow_incomplete: bool) -> None:
    """Copy a run, between a folder and S3 or any two places.

    \b
    Examples:
      smdbg cp s3://bucket/runs/mine runs/mine
      smdbg cp runs/mine s3://archive/2026/mine

    SOURCE is a run; TARGET is the copy itself, not a folder to put it into. A run that lacks anything is refused, with
    status 2. Objects are copied as they are, and their checksums verified on the way. It may be interrupted at any
    moment: no run is at TARGET before all of it is, and the same command goes on where it stopped. A different run at
    TARGET is left alone, with status 2.

    tsv and jsonl give: source, target, run_id, objects and bytes (sent), present (objects that were there already),
    left_out (objects in SOURCE that are not part of the run), seconds.
    """
    from smdbg.config import load_config
    from smdbg.store.backend import open_backend
    from smdbg.store.copy import copy_run

    if not source.strip() or not target.strip():
        raise click.UsageError("SOURCE and TARGET must both be named: one of them is empty.")
    options = load_config().storage_options
    _refuse_same(source, target)
    start = time.monotonic()
    shown = _Progress() if sys.stderr.isatty() and not session.quiet else None
    try:
        done = copy_run(
            open_backend(source, options), open_backend(target, options), incomplete=allow_incomplete, progress=shown
        )
    except KeyboardInterrupt:
        _clear(shown)
        talk(f"Interrupted. The same command goes on; until it has ended, there is no run at {target}.", session.quiet)
        raise
    finally:
        _clear(shown)
    record = {
        "source": source,
        "target": target,
        "run_id": done.run_id,
        "objects": done.objects,
        "bytes": done.size,
        "present": done.present,
        "left_out": done.left_out,
        "seconds": round(time.monotonic() - start, 2),
    }
    if done.left_out:
        talk(f"{counted(done.left_out, 'object')} in {source} that no run has; not copied.", session.quiet)
    match form:
        case Format.JSONL:
            data(dump(record))
        case Format.TSV:
            data("\t".join(field(value) for value in record.values()))
        case _:
            before = f"; {done.present:,} were there already" if done.present else ""
            line(f"{counted(done.objects, 'object')}, {size(done.size)}, copied in {record['seconds']} s{before}.")
            line(f"The run is at {target}.")


def _refuse_same(source: str, target: str) -> None:
    """Raise BadSelection where one place lies in the other."""
    here, there = (f"{_place(url)}/" for url in (source, target))
    if here.startswith(there) or there.startswith(here):
        raise BadSelection(f"{target} and {source} lie in each other: copy to a place of its own.")


def _place(url: str) -> str:
    path = url.removeprefix("file://")
    return url.rstrip("/") if "://" in path else os.path.realpath(os.path.expanduser(path))


def _clear(shown: Callable[..., None] | None) -> None:
    if isinstance(shown, _Progress):
        shown.clear()


class _Progress:
    """A line on stderr that is written anew, for a terminal."""

    def __init__(self) -> None:
        self._last = 0.0
        self._width = 0

    def __call__(self, objects: int, of_objects: int, done: int, of_bytes: int) -> None:
        """Show how far the copy is, now and then."""
        now = time.monotonic()
        if now - self._last >= SECONDS:
            self._last = now
            self._write(f"{objects:,} of {counted(of_objects, 'object')}, {size(done)} of {size(of_bytes)}")

    def clear(self) -> None:
        """Take the line away."""
        if self._width:
            self._write("")
            sys.stderr.write("\r")
            sys.stderr.flush()
            self._width = 0

    def _write(self, text: str) -> None:
        sys.stderr.write("\r" + text.ljust(self._width))
        sys.stderr.flush()
        self._width = len(text)
