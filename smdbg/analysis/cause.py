"""Causal order of findings: which came first, as far as the saved steps can tell.

A finding says that a tensor was clean at one saved step and bad at a later one; the trouble began in between. One
finding precedes another only if these intervals are disjoint. Where they overlap, the order within a training step
decides: inputs, forward in execution order, loss, backward in its order, optimizer state, updates, weights.
docs/decisions/010-first-cause.md tells what is then called the first cause.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smdbg.analysis.clock import Clock
from smdbg.analysis.findings import Finding
from smdbg.analysis.kinship import OUTCOMES, may_lead_to, trouble
from smdbg.analysis.place import Place, Places, before_update, phase, places_of
from smdbg.store.format import TensorInfo

__all__ = ["FirstCause", "explain", "interval", "linear", "ordered", "phase", "precedes", "undecided", "unsettled"]

Catalogue = Mapping[str, TensorInfo]
Span = tuple[int, int, Place]  # after this step, up to this one, and the place within a step
NO_CLOCK = Clock()


@dataclass(frozen=True)
class FirstCause:
    """What came first, and how everything else stands to it; each part in causal order.

    `before`: less severe, earlier in the order, and may be what led to it. `then`: may have come of it. `besides`: has
    nothing to do with it, as far as smdbg knows. `undecided` are those of `before` and `then` that the saved steps
    cannot order against it: in truth they may be on the other side. `window` is (after step, up to step): had every
    step in it been saved, the order would be known.
    """

    first: Finding
    before: tuple[Finding, ...] = ()
    then: tuple[Finding, ...] = ()
    besides: tuple[Finding, ...] = ()
    undecided: tuple[Finding, ...] = ()
    window: tuple[int, int] | None = None

    def record(self) -> dict[str, object]:
        """Return what a summary says of it, as JSON-able data."""
        first = self.first
        return {
            "tensor": first.tensor,
            "rule": first.rule,
            "severity": first.severity.value,
            "step": first.onset[1],
            "worker": first.worker,
            "mode": first.mode,
            "consequences": len(self.then),
            "undecided": len(self.undecided),
        }


def interval(finding: Finding, info: TensorInfo, clock: Clock = NO_CLOCK) -> tuple[int, int]:
    """Return (lo, hi]: the trouble began after step lo and no later than in step hi.

    A row of step s holds the weights before the update of s, so they came to be in the training step before it;
    initial weights belong to step -1. Nothing but them can go wrong before step 0.
    """
    return clock.interval(finding.worker, finding.mode, finding.onset, before_update(info))


def precedes(first: Finding, second: Finding, catalogue: Catalogue, clock: Clock = NO_CLOCK) -> bool:
    """Tell whether the first finding's trouble certainly began in an earlier step than the second's."""
    return interval(first, _info(first, catalogue), clock)[1] <= interval(second, _info(second, catalogue), clock)[0]


def ordered(
    findings: Sequence[Finding],
    catalogue: Catalogue,
    clock: Clock = NO_CLOCK,
    rules: Mapping[str, str] | None = None,
) -> list[Finding]:
    """Return the findings by cause: none before one that precedes it, the rest by their place in a training step.

    `rules` gives the name of the rule behind that of an instance.
    """
    places = places_of(catalogue)
    intervals = [interval(finding, _info(finding, catalogue), clock) for finding in findings]
    keys = [_key(one, end, places, rules) for one, (_, end) in zip(findings, intervals, strict=True)]
    return [findings[index] for index in linear(intervals, keys)]


def linear(intervals: Sequence[tuple[int, int]], keys: Sequence[tuple[object, ...]]) -> list[int]:
    """Return the numbers of the items so that none stands before one whose interval ends where its own begins.

    Of those that may come next, the one with the least key does; keys need only be comparable.
    """
    waiting = sorted(range(len(keys)), key=lambda index: (intervals[index][0], keys[index], index))
    by_end = sorted(range(len(keys)), key=lambda index: intervals[index][1])
    ready: list[tuple[tuple[object, ...], int]] = []
    done: set[int] = set()
    result: list[int] = []
    oldest = released = 0
    while len(result) < len(keys):
        while by_end[oldest] in done:
            oldest += 1
        # Whoever was still clean when the earliest of the rest had gone bad must wait for it.
        while released < len(waiting) and intervals[waiting[released]][0] < intervals[by_end[oldest]][1]:
            heapq.heappush(ready, (keys[waiting[released]], waiting[released]))
            released += 1
        index = heapq.heappop(ready)[1]
        done.add(index)
        result.append(index)
    return result


def undecided(findings: Sequence[Finding], catalogue: Catalogue, clock: Clock = NO_CLOCK) -> list[Finding]:
    """Return those of the ordered findings, but the first, which the saved steps cannot tell to be later than it."""
    return [finding for finding in findings[1:] if not precedes(findings[0], finding, catalogue, clock)]


def explain(
    findings: Sequence[Finding],
    catalogue: Catalogue,
    clock: Clock = NO_CLOCK,
    rules: Mapping[str, str] | None = None,
) -> FirstCause | None:
    """Return the first cause and how the other findings stand to it; None without findings.

    It is the first, in causal order, of the most severe findings. Those that only say how the training went (no
    learning, slow) are passed over where there is another of this severity.
    """
    if not findings:
        return None
    inorder = ordered(findings, catalogue, clock, rules)
    sorts = {id(one): trouble(one, rules) for one in inorder}
    worst = max(one.severity.rank for one in inorder)
    severe = [one for one in inorder if one.severity.rank == worst]
    first = next((one for one in severe if sorts[id(one)] not in OUTCOMES), severe[0])
    outcome = sorts[id(first)] in OUTCOMES
    parts: dict[str, list[Finding]] = {"before": [], "then": [], "besides": []}
    seen = False
    for one in inorder:
        if one is first:
            seen = True
            continue
        # What says how the training went begins at no one moment: all that came up by its end may be behind it.
        early = one.onset[1] <= first.last_step if outcome else not seen
        if early and one.severity.rank < worst and may_lead_to(sorts[id(one)], sorts[id(first)]):
            parts["before"].append(one)
        elif may_lead_to(sorts[id(first)], sorts[id(one)]) and (
            sorts[id(one)] in OUTCOMES or not precedes(one, first, catalogue, clock)
        ):
            parts["then"].append(one)
        else:
            parts["besides"].append(one)
    related = [one for one in (*parts["before"], *parts["then"]) if sorts[id(one)] not in OUTCOMES]
    spans = _spans([first, *related], catalogue, clock)
    open_ones = [one for one in related if unsettled(spans[id(first)], spans[id(one)])]
    starts = [spans[id(one)][0] for one in (first, *open_ones)]
    return FirstCause(
        first=first,
        before=tuple(parts["before"]),
        then=tuple(parts["then"]),
        besides=tuple(parts["besides"]),
        undecided=tuple(open_ones),
        window=(min(starts), spans[id(first)][1]) if open_ones else None,
    )


def _spans(findings: Sequence[Finding], catalogue: Catalogue, clock: Clock) -> dict[int, Span]:
    """Return what is known of when each finding's trouble came to be, by the finding's id."""
    places = places_of(catalogue)
    return {
        id(one): (*interval(one, _info(one, catalogue), clock), places.of(one.tensor)) for one in findings
    }


def unsettled(one: Span, other: Span) -> bool:
    """Tell whether the saved steps leave open which of two things came to be first."""
    return _may_precede(one, other) and _may_precede(other, one)


def _may_precede(one: Span, other: Span) -> bool:
    """Tell whether one thing may have come to be before another: at an earlier step, or earlier in the same."""
    earliest, latest = one[0] + 1, other[1]
    return earliest < latest or (earliest == latest and one[2] < other[2])


def _info(finding: Finding, catalogue: Catalogue) -> TensorInfo:
    return catalogue.get(finding.tensor) or TensorInfo(finding.tensor, "")


def _key(finding: Finding, end: int, places: Places, rules: Mapping[str, str] | None) -> tuple[object, ...]:
    """Return the place within a training step, then how serious it is, then what makes the order total."""
    return (
        *places.of(finding.tensor),
        end,
        trouble(finding, rules),
        -finding.severity.rank,
        places.position.get(finding.tensor, len(places.position)),
        finding.tensor,
        finding.rule,
        finding.worker,
        finding.mode,
        finding.attempt,
    )
