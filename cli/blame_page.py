"""What `smdbg blame` shows: the producer with its evidence, then all that it reached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smdbg.analysis.blame import Chain, Link
from smdbg.analysis.evidence import Input, Scale, inputs_of, scale_before, size_note
from smdbg.analysis.place import before_update
from smdbg.analysis.view import View
from smdbg.analysis.whereabouts import Whereabouts, whereabouts
from smdbg.cli.cause_text import Story, blame_words, inspect_words, open_order, show_commands, tell
from smdbg.cli.output import Column, Record, console, counted, data, facts, line, number, table
from smdbg.errors import SmdbgError

if TYPE_CHECKING:
    from smdbg.analysis.findings import Finding
    from smdbg.analysis.report import Report

ROWS = 20  # links that a table shows
STYLES = {"producer": "bold red", "first cause": "bold red", "before": "yellow"}
FIELDS = (
    "order verdict tensor role rule worker mode step onset made after after_worker undecided nan posinf neginf count "
    "before_step abs_max l2 growth value_step positions pattern inputs message"
).split()


@dataclass(frozen=True)
class Page:
    """What to show of a chain: all, the way back from one tensor, or what concerns one worker."""

    view: View
    chain: Chain
    options: tuple[str, ...] = ()
    tensor: str | None = None
    worker: int | None = None

    def links(self) -> list[Link]:
        """Return the links to show, in causal order."""
        mine = [link for link in self.chain.links if self.worker in (None, link.sick.worker)]
        if self.tensor is None:
            return mine
        own = next((link for link in mine if link.sick.name == self.tensor), None)
        return [] if own is None else self.chain.back_from(own)

    def remarks(self) -> list[str]:
        """Return what there is to say where no link is left, and of what the saved steps leave open."""
        if self.links():
            return [text for text in [self.cannot_tell()] if text]
        whose = "" if self.worker is None else f" on worker {self.worker}"
        what = self.tensor or "everything"
        return [f"{what} was finite at every saved step{whose}; `smdbg blame` without options shows what was not."]

    def cannot_tell(self) -> str:
        """Say what the saved steps leave open about the first producer, '' if nothing."""
        chain = self.chain
        if chain.first is None or chain.window is None:
            return ""
        concerned = [link.sick for link in (chain.first, *chain.undecided)]
        wide = [
            (one.info.collection, chain.clock.apart(one.worker, one.onset), one.onset[0] is None) for one in concerned
        ]
        return open_order(wide, chain.window, len(chain.undecided), ("tensor", "tensors"))

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield all that is known of each link, by the names of FIELDS; full values are read for it."""
        order = {id(link): number for number, link in enumerate(self.chain.links, 1)}
        for link in self.links():
            yield self._record(link, order[id(link)])

    def _record(self, link: Link, order: int) -> dict[str, Any]:
        one, after = link.sick, link.after
        scale = scale_before(self.view, one)
        where, trouble = self.whereabouts(link)
        return {
            "order": order,
            "verdict": link.verdict,
            "tensor": one.name,
            "role": one.info.role,
            "rule": "",
            "worker": one.worker,
            "mode": one.mode,
            "step": one.onset[1],
            "onset": list(one.onset),
            "made": list(one.interval),
            "after": None if after is None else after.name,
            "after_worker": None if after is None else after.worker,
            "undecided": link.undecided,
            "nan": one.nan,
            "posinf": one.posinf,
            "neginf": one.neginf,
            "count": one.count,
            "before_step": scale.steps[-1] if scale.steps else None,
            "abs_max": scale.abs_max[-1] if scale.steps else None,
            "l2": scale.l2[-1] if scale.steps else None,
            "growth": scale.growth,
            "value_step": None if where is None else where.step,
            "positions": None if where is None else [list(place) for place in where.positions],
            "pattern": trouble if where is None else where.pattern,
            "inputs": [
                {"tensor": i.name, "step": i.step, "abs_max": i.abs_max, "finite": not i.bad}
                for i in inputs_of(self.view, one, self.chain.places)
            ],
            "message": "",
        }

    def whereabouts(self, link: Link) -> tuple[Whereabouts | None, str]:
        """Return where in the tensor the bad elements are, or what kept it from being found out."""
        one = link.sick
        try:
            return whereabouts(self.view.run.tensor(one.name), one.mode, one.worker, one.onset[1]), ""
        except SmdbgError as error:
            return None, str(error)


def show(page: Page) -> None:
    """Print the page for people."""
    links, several = page.links(), len(page.view.run.workers()) > 1
    first = links[0] if page.tensor is not None and links else page.chain.first
    if not links or first is None:
        for text in page.remarks():
            line(text)
        return
    line(_headline(page, first, several), "bold")
    _evidence(page, first)
    data("")
    shown = links[:ROWS]
    rows = [_row(page, link) for link in shown]
    table(rows, _columns(several))
    if len(links) > len(shown):
        line(f"… and {counted(len(links) - len(shown), 'tensor')} more; --format jsonl lists all", "dim")
    notes = ["(?): the saved steps cannot tell what was bad first."] if _any_open(shown) else []
    notes += [*([] if page.tensor else page.remarks()), *page.chain.remarks]
    if notes:
        data("")
    for text in notes:
        line(text)
    data("")
    line("To see it:")
    worker = first.sick.worker if several else None
    show_commands([inspect_words(first.sick.name, first.sick.onset, worker, page.options)])
    others = [link.sick.name for link in links if link.after is not None and link.sick.name != first.sick.name]
    if page.tensor is None and others:
        show_commands([blame_words(page.options, others[-1])])


def _any_open(links: Sequence[Link]) -> bool:
    return any(link.undecided for link in links)


def _headline(page: Page, first: Link, several: bool) -> str:
    """Return `First cause: w, nan at step 2 (train), made by the update of step 1`."""
    one = first.sick
    whose = f" of worker {one.worker}" if several else ""
    mode = "" if one.mode == "global" else f" ({one.mode})"
    far = ", as far as the saved steps tell" if first.undecided else ""
    title = "First cause" if page.tensor is None or first is page.chain.first else "It began with"
    return f"{title}: {one.name}{whose}, {_kinds(one)} at step {one.onset[1]}{mode}{_made(first)}{far}."


def _made(link: Link) -> str:
    """Say of a weight which update made it bad, and of others since when, where they were not saved at every step."""
    lo, hi = link.sick.interval
    if before_update(link.sick.info):
        if hi < 0:
            return "; it began that way"
        return f", made by the update of step {hi}" if hi - lo == 1 else f", made by an update after step {lo}"
    return "" if hi - lo == 1 else f", made bad after step {lo}" if lo >= 0 else ", the first time it was saved"


def _kinds(one: Any) -> str:
    """Return `nan`, `nan and +inf`."""
    words = [word for word, count in (("nan", one.nan), ("+inf", one.posinf), ("-inf", one.neginf)) if count]
    return " and ".join(words)


def _evidence(page: Page, link: Link) -> None:
    """Print what is known of the first producer."""
    one = link.sick
    scale = scale_before(page.view, one)
    inputs = inputs_of(page.view, one, page.chain.places)
    facts(
        [
            ("where", _where_text(page, link)),
            ("before", _scale_text(scale) if scale.steps else "it was never saved finite"),
            ("", _note(size_note(one.info, scale.abs_max[-1])) if scale.steps else ""),
            *(("made from" if number == 0 else " ", _input_text(item)) for number, item in enumerate(inputs)),
            ("made from", "" if inputs else "nothing of it was saved by then"),
        ]
    )


def _note(text: str) -> str:
    return f"near what it can hold: {text}" if text else ""


def _where_text(page: Page, link: Link) -> str:
    """Return `2 of 2 elements: all elements, first [0, 0], [1, 0]`."""
    one = link.sick
    bad = one.nan + one.posinf + one.neginf
    counts = f"{bad:,} of {one.count:,} elements"
    where, trouble = page.whereabouts(link)
    if where is None:
        return f"{counts}; {trouble or 'no full value was kept from then on'}"
    when = "" if where.step == one.onset[1] else f" at step {where.step}, the first whose value was kept"
    places = ", ".join(str(list(place)) for place in where.positions if place)
    more = ", …" if where.bad > len(where.positions) else ""
    return f"{counts}; {where.pattern}{when}" + (f": {places}{more}" if places else "")


def _scale_text(scale: Scale) -> str:
    """Return the size at the last clean saved steps."""
    pairs = zip(scale.steps, scale.abs_max, strict=True)
    course = ", ".join(f"{number(value, 3)} (step {step})" for step, value in pairs)
    growth = scale.growth
    grown = f"; × {growth:.3g} from one saved step to the next" if growth is not None else ""
    return f"abs_max {course}, l2 {number(scale.l2[-1], 3)}{grown}"


def _input_text(item: Input) -> str:
    """Return `gradient/x: finite at step 1, abs_max 1.36e+23`."""
    state = "not finite" if item.bad else "finite"
    size = f", abs_max {number(item.abs_max, 3)}" if item.abs_max == item.abs_max else ""
    return f"{item.name}: {state} at step {item.step}{size}" + (f" ({item.note})" if item.note else "")


def _row(page: Page, link: Link) -> dict[str, Any]:
    """Return what the table needs of a link: no full value is read for it."""
    one, after = link.sick, link.after
    scale = scale_before(page.view, one)
    return {
        "tensor": one.name,
        "verdict": link.verdict + (" (?)" if link.after is None and link.undecided else ""),
        "worker": one.worker,
        "step": one.onset[1],
        "mode": one.mode,
        "bad": f"{one.nan + one.posinf + one.neginf:,} of {one.count:,} {_kinds(one)}",
        "before": f"{number(scale.abs_max[-1], 3)} (step {scale.steps[-1]})" if scale.steps else "-",
        "after": "" if after is None else after.name + (" (?)" if link.undecided else ""),
    }


def _columns(several: bool) -> list[Column]:
    """Return the columns of the links; the worker only in a run of several."""
    columns = [
        Column("tensor", lambda r: r["tensor"], fold=True),
        Column("what it is", lambda r: r["verdict"], style=lambda r: STYLES.get(r["verdict"].split()[0], "")),
        Column("step", lambda r: str(r["step"]), justify="right"),
        Column("mode", lambda r: r["mode"], drop=4),
        Column("bad", lambda r: r["bad"], drop=2),
        Column("abs_max before", lambda r: r["before"], justify="right", drop=1),
        Column("after", lambda r: r["after"], fold=True, drop=3),
    ]
    if several:
        columns.insert(1, Column("worker", lambda r: str(r["worker"]), justify="right"))
    return columns


# ---------------------------------------------------------------------------------------------------- findings


def of_findings(story: Story, tensor: str | None = None, worker: int | None = None) -> list[dict[str, Any]]:
    """Return the findings of a story as records of the same fields, those before the first cause first."""
    cause = story.cause
    if cause is None:
        return []
    parts = [
        *(("before", one) for one in cause.before),
        ("first cause", cause.first),
        *(("consequence", one) for one in cause.then),
        *(("besides", one) for one in cause.besides),
    ]
    records = []
    for order, (verdict, one) in enumerate(parts, 1):
        if worker not in (None, one.worker) or (tensor not in (None, one.tensor) and one is not cause.first):
            continue
        records.append(_of_finding(order, verdict, one, one in cause.undecided, story))
    return records


def _of_finding(order: int, verdict: str, one: Finding, undecided: bool, story: Story) -> dict[str, Any]:
    from smdbg.analysis.cause import interval
    from smdbg.store.format import TensorInfo

    info = story.catalogue.get(one.tensor, TensorInfo(one.tensor, ""))
    known = {
        "order": order,
        "verdict": verdict,
        "tensor": one.tensor,
        "role": info.role,
        "rule": one.rule,
        "worker": one.worker,
        "mode": one.mode,
        "step": one.onset[1],
        "onset": list(one.onset),
        "made": list(interval(one, info, story.clock)),
        "undecided": undecided,
        "message": one.message,
    }
    return {name: known.get(name) for name in FIELDS}


def nothing(report: Report) -> str:
    """Return what to say where there is nothing to blame."""
    found = "the default rules found nothing" if not report.findings else "no finding is left by the options"
    return f"Nothing to blame: all that was saved is finite, and {found} ({report.summary.text()})."


def show_findings(report: Report, story: Story, records: Sequence[Record]) -> None:
    """Print the findings in causal order for people."""
    if not records:
        line(nothing(report))
        return
    line("All that was saved is finite. What the default rules found, in causal order:")
    data("")
    columns = [
        Column("what it is", lambda r: r["verdict"], style=lambda r: STYLES.get(r["verdict"], "")),
        Column("rule", lambda r: r["rule"]),
        Column("tensor", lambda r: r["tensor"], fold=True),
        Column("step", lambda r: str(r["step"]), justify="right"),
    ]
    if story.several:
        columns.insert(3, Column("worker", lambda r: str(r["worker"]), justify="right", drop=1))
    if console().width >= 160:
        columns.append(Column("message", lambda r: r["message"], fold=True))
    table(records[:ROWS], columns)
    if len(records) > ROWS:
        line(f"… and {counted(len(records) - ROWS, 'finding')} more; --format jsonl lists all", "dim")
    data("")
    tell(story, blame=False)
