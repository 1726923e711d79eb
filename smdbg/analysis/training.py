"""What rules on trained parameters share: the mode they judge, the scale of a weight, the rate of its group."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from smdbg.analysis.course import Course
from smdbg.analysis.findings import Floats, Severity
from smdbg.analysis.rule import Rule
from smdbg.analysis.table import Table
from smdbg.analysis.view import View
from smdbg.store.format import TensorInfo

__all__ = ["fan_in", "hurts", "least_size", "milder", "places", "rates", "tables", "training_mode"]

CHUNK = 8192  # values whose medians are taken at a time
STANDS = 0.98  # a loss above this share of its first ones has not begun to fall
TRAINING = ("train", "global")


def training_mode(rule: Rule, present: Sequence[str]) -> list[str]:
    """Return the one mode in which parameters are trained: the rule's own choice, else train, else global."""
    return [mode for mode in ([rule.mode] if rule.mode else TRAINING) if mode in present][:1]


def places(rule: Rule, view: View) -> list[tuple[int, str]]:
    """Return the (worker, mode) that a rule on trained parameters judges."""
    modes = rule.modes(view.run.modes())
    workers = [worker for worker in view.run.workers() if not rule.workers or worker in rule.workers]
    return [(worker, mode) for worker in workers for mode in modes]


def fan_in(info: TensorInfo) -> int:
    """Return how many inputs each unit of a weight has: all its axes but the first; 1 for fewer than two axes."""
    return max(math.prod(info.shape[1:]), 1) if len(info.shape) > 1 else 1


def least_size(infos: Sequence[TensorInfo]) -> Floats:
    """Return float64[tensors]: the l2 of weights with a root mean square of 1 / sqrt(fan_in), the usual one."""
    return np.array([math.sqrt(math.prod(info.shape) / fan_in(info)) for info in infos])


def tables(rule: Rule, view: View, names: Sequence[str], statistics: Sequence[str]) -> Iterator[Table]:
    """Yield what a rule on trained parameters judges, one table for each worker that saved any of it."""
    for worker, mode in places(rule, view):
        table = view.table(names, statistics, mode, worker)
        if len(table.steps):
            yield table


def rates(view: View, table: Table) -> tuple[Floats, Floats]:
    """Return the learning rate of each tensor's group at each row, and its peak over the run: NaN where not known.

    float64[rows, tensors], not to be changed, and float64[tensors]. Hooks record rates as `<optimizer>/lr/<group>`.
    Where several optimizers have a group of that number, it is the smallest of their rates.
    """
    groups = sorted({info.optimizer_group for info in table.infos if info.optimizer_group is not None})
    at_rows = np.full((len(table.steps), len(groups) + 1), np.nan)  # the last column: no group
    peaks = np.full(len(groups) + 1, np.nan)
    for name, info in view.catalogue.items():
        number = name.rsplit("/", 1)[-1]
        if info.role != "lr" or not number.isdecimal() or int(number) not in groups:
            continue
        steps, values = view.series(name, table.mode, table.worker)
        if len(steps):
            group = groups.index(int(number))
            at = np.searchsorted(steps, table.steps, side="right") - 1
            known = np.where(at >= 0, values[np.maximum(at, 0)], np.nan)
            at_rows[:, group] = np.fmin(at_rows[:, group], known)
            peaks[group] = np.fmin(peaks[group], np.fmax.reduce(values))
    place = {group: index for index, group in enumerate(groups)}
    columns = np.array([place.get(i.optimizer_group, len(groups)) for i in table.infos], np.int64)  # type: ignore[arg-type]
    if (columns == columns[:1]).all():
        return np.broadcast_to(at_rows[:, columns[:1]], table.present.shape), peaks[columns]
    return at_rows[:, columns], peaks[columns]


def milder(severity: Severity, other: Severity = Severity.WARNING) -> Severity:
    """Return the less serious of two severities: what a rule finds less bad never stands above the user's choice."""
    return min(severity, other, key=lambda one: one.rank)


def hurts(course: Course, since: int) -> bool:
    """Tell whether a training suffered after a step: the loss rises, or stands where it began, or is not finite."""
    if course.non_finite is not None and course.non_finite >= since:
        return True
    stands = course.learned is False and not course.level(start=since) < STANDS * course.start_level
    return stands or course.rises_after(since)


def earlier_medians(values: Floats, window: int) -> Floats:
    """Return for each of a series the median of the finite ones among the `window` values before it, NaN for none."""
    padded = np.concatenate([np.full(window, np.nan), np.where(np.isfinite(values), values, np.nan)])
    found = np.full(len(values), np.nan)
    for start in range(0, len(values), CHUNK):
        part = padded[start : start + CHUNK + window - 1][: len(values) - start + window - 1]
        ordered = np.sort(np.lib.stride_tricks.sliding_window_view(part, window), axis=1)  # NaN comes last
        known = np.sum(~np.isnan(ordered), axis=1)
        rows = np.arange(len(ordered))
        low, high = ordered[rows, np.maximum(known - 1, 0) // 2], ordered[rows, np.minimum(known // 2, window - 1)]
        found[start : start + CHUNK] = (low + high) / 2
    return found
