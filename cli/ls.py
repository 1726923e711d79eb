"""`smdbg ls`: the tensors of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from smdbg.cli.options import attempt_option, mode_option, shared, words
from smdbg.cli.output import Column, Format, Record, listing, number, shape, size, talk
from smdbg.cli.root import Session
from smdbg.cli.target import open_target
from smdbg.errors import BadSelection, near
from smdbg.select import select

if TYPE_CHECKING:
    from smdbg.analysis.run import Run


@click.command("ls", short_help="List the tensors of a run.")
@click.argument("patterns", metavar="[PATTERN]...", nargs=-1)
@click.option("--collection", "collections", multiple=True, metavar="NAME,…", help="Only tensors of these collections.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave these tensors out; may be repeated.")
@mode_option
@attempt_option
@shared()
def command(
    session: Session,
    form: Format,
    patterns: tuple[str, ...],
    collections: tuple[str, ...],
    exclude: tuple[str, ...],
    mode: str | None,
    attempt: str | int,
) -> None:
    """List the tensors of a run.

    \b
    Examples:
      smdbg ls
      smdbg --run s3://bucket/mine ls 'layer1.*' --exclude '*bias'
      smdbg ls 're:^gradient/.*weight$' --mode train
      smdbg ls --collection losses,metrics --format jsonl

    A PATTERN is a name, a glob, or a regular expression behind `re:`. tsv and jsonl give: name, collection, role,
    dtype, shape, steps, first_step, last_step, workers, bytes.
    """
    run = open_target(session, attempt)
    chosen = words(collections)
    _known(run, chosen)
    names = select(run.tensors(), patterns, exclude)
    if chosen:
        held = {name for collection in chosen for name in run.tensors(collection=collection)}
        names = [name for name in names if name in held]
    records = [describe(run, name, mode) for name in names]  # this reads the store: only for what may be listed
    records = [record for record in records if mode is None or record["steps"]]
    listing(records, _columns(records), form)
    if not records:
        talk(f"No tensor{' matches' if patterns or chosen or exclude or mode else ''} in {run.url}.", session.quiet)


def describe(run: Run, name: str, mode: str | None) -> dict[str, Any]:
    """Return the record of one tensor; steps are counted over all workers."""
    tensor = run.tensor(name)
    steps = tensor.steps(mode=mode)
    return {
        "name": name,
        "collection": tensor.collection,
        "role": tensor.role,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "steps": len(steps),
        "first_step": int(steps[0]) if len(steps) else None,
        "last_step": int(steps[-1]) if len(steps) else None,
        "workers": len(tensor.workers()),
        "bytes": tensor.nbytes,
    }


def _known(run: Run, collections: list[str]) -> None:
    """Raise BadSelection for a collection that the run does not have."""
    known = run.collections()
    for name in collections:
        if name not in known:
            raise BadSelection(
                f"There is no collection '{name}' in {run.url}; it has {', '.join(known) or 'none'}.{near(name, known)}"
            )


def _span(record: Record) -> str:
    """Return first and last step: `0 – 199`."""
    return f"{record['first_step']} – {record['last_step']}" if record["steps"] else "-"


def _columns(records: list[dict[str, Any]]) -> list[Column]:
    """Return the columns of the table; the workers only where there are several."""
    columns = [
        Column("name", lambda r: r["name"], fold=True),
        Column("collection", lambda r: r["collection"], drop=2),
        Column("role", lambda r: r["role"], drop=4),
        Column("dtype", lambda r: r["dtype"], drop=3),
        Column("shape", lambda r: shape(r["shape"]), drop=1),
        Column("steps", lambda r: number(r["steps"]), justify="right"),
        Column("first – last", _span, justify="right", drop=5),
        Column("workers", lambda r: number(r["workers"]), justify="right", drop=6),
        Column("bytes", lambda r: size(r["bytes"]), justify="right", drop=7),
    ]
    several = any(record["workers"] > 1 for record in records)
    return [column for column in columns if several or column.title != "workers"]
