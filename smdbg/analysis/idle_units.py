"""Units of a layer that are idle: how large their share is, by bounds on how often each was at work.

A unit is an index along the feature axis. How often it was at work (a ReLU active, a sigmoid not saturated) is known
exactly from full values, and of ReLUs from per-feature statistics; of others those give bounds. A verdict takes bounds
that both say the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from smdbg.analysis.findings import NO_STEP, Bools, Floats, Ints
from smdbg.analysis.run_rule import Trouble
from smdbg.analysis.view import View
from smdbg.store.format import TensorInfo

RISEN = 0.1  # share of a layer's units that fell idle after it was first found wanting: it gets worse


@dataclass(frozen=True)
class Working:
    """How often the units of a layer were at work at one saved step: bounds of the share, float64[units].

    observations: of each unit, to which the share refers.
    """

    step: int
    low: Floats
    high: Floats
    observations: float


@dataclass(frozen=True)
class Pool:
    """Over what a unit is judged: the last saved steps, at least `steps` of them with `observations` or more."""

    steps: int = 1
    observations: int = 0


@dataclass(frozen=True)
class Layer:
    """Verdicts on a layer, one for each saved step at which one was possible, in order of steps.

    share: of idle units (the least it can be, where only bounds are known); idle, units: how many of how many; begun:
    the first saved step of those that were pooled; seen: observations of each unit in them.
    """

    steps: Ints
    share: Floats
    violated: Bools
    idle: Ints
    units: Ints
    begun: Ints
    before: Ints
    seen: Floats


def judge_layer(series: Sequence[Working], at_work: float, threshold: float, pool: Pool) -> Layer:
    """Judge a layer by its series in order of steps; where its width changed, each width by itself.

    A unit is idle when it was at work in less than `at_work` (0 to 1) of its observations, 0: in none; the layer
    violates when more than `threshold` (0 to 1) of its units are idle.
    """
    parts = [
        _judged([one for one in series if len(one.low) == width], at_work, threshold, pool)
        for width in dict.fromkeys(len(one.low) for one in series)
        if width
    ]
    joined = [np.concatenate([getattr(part, name) for part in parts] or [np.zeros(0)]) for name in _FIELDS]
    order = np.argsort(joined[0], kind="stable")
    steps, share, violated, idle, units, begun, before, seen = (column[order] for column in joined)
    return Layer(steps, share, violated, idle, units, begun, before, seen)


_FIELDS = ("steps", "share", "violated", "idle", "units", "begun", "before", "seen")


def trouble_with(layer: Layer, name: str, worker: int, mode: str, pool: Pool, note: str) -> Trouble | None:
    """Return what is wrong with a layer: of kind 1 where ever more units fell idle, else 0; None if nothing is."""
    bad = np.flatnonzero(layer.violated)
    if not len(bad):
        return None
    first, last = bad[0], bad[-1]
    rising = last == len(layer.steps) - 1 and layer.share[last] >= layer.share[first] + RISEN
    before, since = layer.before[first], layer.begun[first]
    if pool.steps == 1 and first:
        before = layer.steps[first - 1]
    figures = {"idle": layer.idle[first], "units": layer.units[first], "seen": f"{layer.seen[first]:,.0f}"}
    return Trouble(
        tensor=name,
        worker=worker,
        mode=mode,
        step=int(layer.steps[first]),
        last_step=int(layer.steps[last]),
        violations=len(bad),
        judged=len(layer.steps),
        worst=float(layer.share[bad].max()),
        kind=int(rising),
        since=int(since),
        before=None if before == NO_STEP else int(before),
        note=note.format(**figures),
    )


def bounds_of_share(
    table: npt.NDArray[np.float32], low: float, high: float, observations: float
) -> tuple[Floats, Floats]:
    """Return the least and the largest share of each unit's values that can lie inside (low, high), float64[units].

    `table` has the per-feature statistics [units, 5] (active share, mean, std, min, max). The second moment about the
    middle of the interval gives bounds on both sides, by how far inside and outside the values can be.
    """
    _, mean, std, least, most = table.astype(np.float64).T
    middle, half = (low + high) / 2, (high - low) / 2
    moment = (mean - middle) ** 2 + std**2
    reach = np.maximum(most - middle, middle - least) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        inside_most = np.where(reach > half**2, (reach - moment) / (reach - half**2), 1.0)
    inside_least = np.clip(1 - moment / half**2, 0, 1)
    all_in, all_out = (least > low) & (most < high), (most <= low) | (least >= high)
    some_out = ~all_in & np.isfinite(least)
    inside_most = np.clip(np.where(some_out, np.minimum(inside_most, 1 - 1 / max(observations, 1)), inside_most), 0, 1)
    inside_most = np.maximum(inside_most, inside_least)  # which rounding may have turned round
    known = [all_in, all_out]
    return np.select(known, [1.0, 0.0], inside_least), np.select(known, [1.0, 0.0], inside_most)


def _judged(series: Sequence[Working], at_work: float, threshold: float, pool: Pool) -> Layer:
    """Judge saved steps of one width: each with as many before it as the pool needs."""
    steps = np.array([one.step for one in series], np.int64)
    weights = np.array([one.observations for one in series])
    seen = np.concatenate([[0.0], np.cumsum(weights)])
    ends = np.arange(1, len(series) + 1)
    # The newest start with enough observations and steps behind it.
    starts = np.searchsorted(seen, seen[ends] - pool.observations, side="right") - 1
    starts = np.where(seen[ends] >= pool.observations, np.minimum(starts, ends - pool.steps), NO_STEP)
    low, high = (
        np.concatenate([np.zeros((1, bound.shape[1])), np.cumsum(bound * weights[:, None], axis=0)])
        for bound in (np.stack([one.low for one in series]), np.stack([one.high for one in series]))
    )
    ends, starts = ends[starts >= 0], starts[starts >= 0]
    total = (seen[ends] - seen[starts])[:, None]
    ends, starts, total = ends[total[:, 0] > 0], starts[total[:, 0] > 0], total[total[:, 0] > 0]
    least, most = (low[ends] - low[starts]) / total, (high[ends] - high[starts]) / total
    idle = (most < at_work) if at_work > 0 else (high[ends] == high[starts])
    working = (least >= at_work) if at_work > 0 else (low[ends] > low[starts])
    width = idle.shape[1]
    violated = idle.sum(axis=1) > threshold * width
    decided = violated | (width - working.sum(axis=1) <= threshold * width)
    begun = np.where(starts > 0, steps[starts - 1], NO_STEP)
    return Layer(
        steps=steps[ends - 1][decided],
        share=idle.mean(axis=1)[decided],
        violated=violated[decided],
        idle=idle.sum(axis=1)[decided],
        units=np.full(int(decided.sum()), width),
        begun=steps[starts][decided],
        before=begun[decided],
        seen=total[:, 0][decided],
    )


def along(axis: int | None, info: TensorInfo) -> bool:
    """Tell whether an axis (None: whichever) is the one that a tensor's per-feature statistics run along."""
    return info.feature_axis is not None and axis in (None, info.feature_axis, info.feature_axis - len(info.shape))


def sizes(view: View, name: str, mode: str, worker: int) -> dict[int, float]:
    """Return how many elements a tensor had, by step."""
    steps, counts = view.series(name, mode, worker, "count")
    return dict(zip(steps.tolist(), counts.tolist(), strict=True))


def why_not(pool: Pool, axis: int | None, seen: int) -> str:
    """Return why no layer could be judged, of `seen` saved steps at which anything is known."""
    if not seen:
        where = "the feature axis" if axis is None else f"axis {axis}"
        return f"neither per-feature statistics along {where} nor values were kept"
    if seen < pool.steps:
        return f"saw {seen} of the {pool.steps} saved steps it needs"
    return f"each unit was observed less than {pool.observations} times" if pool.observations else ""
