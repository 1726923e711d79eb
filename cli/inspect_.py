"""`smdbg inspect`: one tensor, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from smdbg.cli.options import attempt_option, mode_option, shared, words, worker_option
from smdbg.cli.output import Format, listing, talk
from smdbg.cli.root import Session
from smdbg.cli.target import open_target
from smdbg.errors import BadSelection, TensorNotFound, near
from smdbg.select import matching, parse_index, parse_steps

if TYPE_CHECKING:
    from smdbg.analysis.run import Run, Tensor


@click.command("inspect", short_help="Show one tensor, step by step.")
@click.argument("name")
@click.option("--steps", metavar="A:B:C", help="Only these steps: 17, 0,10,20, 100:200:10 or -5: (the last five).")
@click.option("--values", is_flag=True, help="The values themselves, not their statistics.")
@click.option("--index", metavar="INDEX", help="Only this part of the values, as in NumPy: '0, :, ::2'.")
@click.option("--reduce", "reduces", multiple=True, metavar="NAME,…", help="Reduce the values: mean, l2, max, ….")
@click.option("--axis", type=int, metavar="N", help="Reduce along this axis alone.")
@click.option("--out", type=click.Path(dir_okay=False), metavar="FILE.npy", help="Write the values of all steps here.")
@worker_option
@mode_option
@attempt_option
@shared()
def command(
    session: Session,
    form: Format,
    name: str,
    steps: str | None,
    values: bool,
    index: str | None,
    reduces: tuple[str, ...],
    axis: int | None,
    out: str | None,
    worker: int | None,
    mode: str | None,
    attempt: str | int,
) -> None:
    """Show one tensor, step by step.

    \b
    Examples:
      smdbg inspect loss/loss:0
      smdbg inspect gradient/fc1.weight --steps 100:200:10
      smdbg inspect fc1.weight --values --index '0, :5' --steps -1
      smdbg inspect fc1.weight --reduce mean,l2 --axis 0
      smdbg inspect fc1.weight --out fc1.npy

    NAME is a name, or a pattern that matches one tensor. A table shows about twenty steps; --steps : shows all. tsv and
    jsonl give one record a step and worker: step, mode, mode_step, worker, attempt, and then the statistics that were
    kept, or `value` with --values or --index, or the reductions by name. With --attempt all a step that was repeated
    has a record of each attempt.
    """
    from smdbg.cli import inspect_page, series, values_file

    names = words(reduces)
    if axis is not None and not names:
        raise click.UsageError("--axis says along which axis to reduce: give --reduce too.")
    if out and len(names) > 1:
        raise click.UsageError("--out writes one array: give --reduce one name.")
    wanted_steps = parse_steps(steps) if steps is not None else None
    wanted_index = parse_index(index) if index is not None else None
    run = open_target(session, attempt)
    tensor = run.tensor(_named(run, name))
    request = series.Request(
        run,
        tensor,
        _workers(run, tensor, worker),
        mode,
        wanted_steps,
        wanted_index,
        tuple(names),
        axis,
        values,
        bins=form is not Format.TABLE,
        attempts=_attempts(run, tensor.name) if attempt == "all" else {},
    )
    if out:
        talk(values_file.write(out, request), session.quiet)
        return
    brief = form is Format.TABLE and wanted_steps is None
    found = series.read(request, shown=inspect_page.ROWS if brief else 0)
    for remark in found.remarks:
        talk(remark, session.quiet)
    if form is Format.TABLE:
        inspect_page.show(request, found)
    else:
        listing(found.records, (), form)


def _named(run: Run, name: str) -> str:
    """Return the one tensor that `name` stands for; raises TensorNotFound for none, BadSelection for several."""
    names = run.tensors()
    found = [other for other in names if other in matching(names, name)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise TensorNotFound(f"There is no tensor '{name}' in {run.url}.{near(name, names)} `smdbg ls` lists them.")
    shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    raise BadSelection(f"'{name}' matches {len(found)} tensors of {run.url}: {shown}. Name one of them.")


def _attempts(run: Run, name: str) -> dict[int, Tensor]:
    """Return the tensor as each attempt alone saved it; nothing where no worker was ever resumed."""
    from smdbg.analysis.run import open_run

    numbers = sorted({facts.attempt for facts in run.attempts()})
    if len(numbers) < 2:
        return {}
    runs = {number: open_run(run.url, storage_options=run.storage_options, attempt=number) for number in numbers}
    return {number: alone.tensor(name) for number, alone in runs.items() if name in alone.tensors()}


def _workers(run: Run, tensor: Tensor, worker: int | None) -> list[int]:
    """Return the workers to show; raises BadSelection for one that did not save the tensor."""
    known = tensor.workers()
    if worker is None:
        return known
    if worker not in known:
        raise BadSelection(
            f"Worker {worker} did not save '{tensor.name}' in {run.url}; saved by {', '.join(map(str, known))}."
        )
    return [worker]
