"""Causal order of findings: which came first, as far as the saved steps can tell.

A finding says that a tensor was clean at one saved step and bad at a later one; the trouble began in between. One
finding precedes another only if these intervals are disjoint. Where they overlap, the order within a training step
decides: inputs, forward in execution order, loss, backward in its order, optimizer state, updates, weights.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from smdbg.analysis.findings import Finding
from smdbg.store.format import TensorInfo

FIRST, FORWARD, LOSS, BACKWARD, OPTIMIZER, UPDATE, WEIGHTS, UNKNOWN = range(8)

_BY_ROLE = {
    "input": FIRST,
    "label": FIRST,
    "mask": FIRST,
    "output": FORWARD,
    "prediction": FORWARD,
    "loss": LOSS,
    "metric": LOSS,
    "gradient": BACKWARD,
    "lr": OPTIMIZER,
    "update": UPDATE,
    "weight": WEIGHTS,
    "bias": WEIGHTS,
    "norm": WEIGHTS,
    "embedding": WEIGHTS,
}
_BY_COLLECTION = {
    "inputs": FIRST,
    "labels": FIRST,
    "outputs": FORWARD,
    "predictions": FORWARD,
    "losses": LOSS,
    "metrics": LOSS,
    "gradients": BACKWARD,
    "optimizer_state": OPTIMIZER,
    "updates": UPDATE,
    "weights": WEIGHTS,
    "biases": WEIGHTS,
}


def phase(info: TensorInfo) -> int:
    """Return the part of a training step in which a tensor comes to be, FIRST to WEIGHTS, or UNKNOWN."""
    found = _BY_ROLE.get(info.role, _BY_COLLECTION.get(info.collection, UNKNOWN))
    # What goes into a module inside the network is part of the forward pass, not of the data.
    return FORWARD if found == FIRST and info.role == "input" and info.forward_order is not None else found


def interval(finding: Finding, info: TensorInfo) -> tuple[int, int]:
    """Return (lo, hi]: the trouble began after step lo and no later than in step hi.

    A row of step s holds the weights before the update of s, so they came to be in step s - 1;
    initial weights belong to step -1. Nothing but them can go wrong before step 0.
    """
    clean, bad = finding.onset
    shift = 1 if phase(info) == WEIGHTS and info.moment != "after" else 0
    lowest = -1 - shift
    return (lowest if clean is None else max(clean - shift, lowest)), bad - shift


def precedes(first: Finding, second: Finding, catalogue: Mapping[str, TensorInfo]) -> bool:
    """Tell whether the first finding's trouble certainly began in an earlier step than the second's."""
    return interval(first, _info(first, catalogue))[1] <= interval(second, _info(second, catalogue))[0]


def ordered(findings: Sequence[Finding], catalogue: Mapping[str, TensorInfo]) -> list[Finding]:
    """Return the findings by cause: none before one that precedes it, the rest by their place in a training step."""
    position = {name: index for index, name in enumerate(catalogue)}
    items = [(*interval(finding, _info(finding, catalogue)), finding) for finding in findings]
    keys = [_key(finding, catalogue, position) for finding in findings]
    waiting = sorted(range(len(items)), key=lambda index: (items[index][0], keys[index], index))
    by_end = sorted(range(len(items)), key=lambda index: items[index][1])
    ready: list[tuple[tuple[object, ...], int]] = []
    done: set[int] = set()
    result: list[Finding] = []
    oldest = released = 0
    while len(result) < len(items):
        while by_end[oldest] in done:
            oldest += 1
        # Whoever was still clean when the earliest of the rest had gone bad must wait for it.
        while released < len(waiting) and items[waiting[released]][0] < items[by_end[oldest]][1]:
            heapq.heappush(ready, (keys[waiting[released]], waiting[released]))
            released += 1
        index = heapq.heappop(ready)[1]
        done.add(index)
        result.append(items[index][2])
    return result


def undecided(findings: Sequence[Finding], catalogue: Mapping[str, TensorInfo]) -> list[Finding]:
    """Return those of the ordered findings, but the first, which the saved steps cannot tell to be later than it."""
    return [finding for finding in findings[1:] if not precedes(findings[0], finding, catalogue)]


def _info(finding: Finding, catalogue: Mapping[str, TensorInfo]) -> TensorInfo:
    return catalogue.get(finding.tensor, TensorInfo(finding.tensor, ""))


def _key(finding: Finding, catalogue: Mapping[str, TensorInfo], position: Mapping[str, int]) -> tuple[object, ...]:
    """Return the place within a training step, then what makes the order total."""
    info = _info(finding, catalogue)
    place = phase(info)
    order: int | None = None
    if place == FORWARD:
        order = None if info.forward_order is None else 2 * info.forward_order + (info.role != "input")
    elif place == BACKWARD:
        # Without a recorded order the backward pass runs the forward one the other way round.
        reverse = None if info.forward_order is None else -info.forward_order
        order = info.backward_order if info.backward_order is not None else reverse
    where = position.get(finding.tensor, len(position))
    return (
        place,
        order is None,
        order or 0,
        interval(finding, info)[1],
        where,
        -finding.severity.rank,
        finding.rule,
        finding.worker,
        finding.mode,
        finding.attempt,
    )
