"""`smdbg blame`: what made the first NaN or infinity, and whom it reached."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from smdbg.cli.options import attempt_option, shared, worker_option
from smdbg.cli.output import Format, listing, talk
from smdbg.cli.root import Session
from smdbg.cli.target import open_target
from smdbg.errors import BadSelection, TensorNotFound, near
from smdbg.select import matching

if TYPE_CHECKING:
    from smdbg.analysis.run import Run


@click.command("blame", short_help="Say what made the first NaN or infinity, and whom it reached.")
@click.option("--tensor", metavar="NAME", help="Only the chain back from this tensor: a name, or a pattern for one.")
@worker_option
@attempt_option
@shared()
def command(
    session: Session, form: Format, tensor: str | None, worker: int | None, attempt: str | int
) -> None:
    """Say what made the first NaN or infinity, and whom it reached.

    \b
    Examples:
      smdbg blame
      smdbg blame --tensor fc1.weight
      smdbg blame --worker 1 --format jsonl

    Every tensor that was ever not finite is listed in causal order. A producer went bad while nothing before it, in the
    order of a training step, was bad; a propagator names what was. Where everything is finite, the findings of pack
    default are listed in that order, and the first cause among them is named.

    tsv and jsonl give: order, verdict (producer, propagator; of findings first cause, before, consequence, besides),
    tensor, role, rule, worker, mode, step (the first bad one), onset, made (after one step, up to another), after,
    after_worker, undecided, nan, posinf, neginf, count, before_step, abs_max, l2, growth, value_step, positions,
    pattern, inputs, message. docs/blame.md tells what they mean.
    """
    from smdbg.analysis.blame import chain_of, view_of
    from smdbg.cli import blame_page
    from smdbg.cli.cause_text import options

    run = open_target(session, attempt)
    if worker is not None and worker not in run.workers():
        known = ", ".join(map(str, run.workers())) or "none"
        raise BadSelection(f"There is no worker {worker} in {run.url}; it has {known}.")
    name = None if tensor is None else _named(run, tensor)
    view = view_of(run)
    chain = chain_of(view)
    if not chain.links:
        _findings(session, form, run, name, worker, attempt)
        return
    page = blame_page.Page(view, chain, options(session, attempt), name, worker)
    if form is Format.TABLE:
        blame_page.show(page)
    else:
        listing(page.records(), (), form)
        for remark in (*chain.remarks, *page.remarks()):
            talk(remark, session.quiet)


def _named(run: Run, name: str) -> str:
    """Return the one tensor that `name` stands for; raises TensorNotFound for none, BadSelection for several."""
    names = run.tensors()
    found = [other for other in names if other in matching(names, name)]
    if not found:
        raise TensorNotFound(f"There is no tensor '{name}' in {run.url}.{near(name, names)} `smdbg ls` lists them.")
    if len(found) > 1:
        shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        raise BadSelection(f"'{name}' matches {len(found)} tensors of {run.url}: {shown}. Name one of them.")
    return found[0]


def _findings(
    session: Session, form: Format, run: Run, name: str | None, worker: int | None, attempt: str | int
) -> None:
    """Print the first cause among the findings of the pack `default`, since all that was saved is finite."""
    from smdbg.analysis.checker import check
    from smdbg.analysis.pack import load_pack
    from smdbg.cli import blame_page
    from smdbg.cli.cause_text import story_of

    report = check(run, load_pack("default").rules)
    story = story_of(report, run, session, attempt)
    records = blame_page.of_findings(story, name, worker)
    if form is Format.TABLE:
        blame_page.show_findings(report, story, records)
        return
    listing(records, (), form)
    if not records:
        talk(blame_page.nothing(report), session.quiet)
