"""What the rules on losses share: the series they judge, which of them is the main one, and sturdy figures of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from smdbg.analysis.course import TRAINING, Course, is_number
from smdbg.analysis.findings import Bools, Floats, Ints, Severity
from smdbg.analysis.rule import Rule
from smdbg.analysis.run_rule import Verdicts
from smdbg.analysis.view import View

DEVIATION = 1.4826  # of a normal distribution, from its median absolute deviation
MEDIAN_ERROR = 1.2533  # standard error of the median of normal numbers, in deviations / sqrt(n)


@dataclass(frozen=True)
class Loss:
    """A loss on one worker in one mode: steps int64[n], values float64[n], NaN where it is not finite.

    `main`: it is the one that is trained on, as far as one can tell.
    """

    name: str
    worker: int
    mode: str
    steps: Ints
    values: Floats
    main: bool
    course: Course

    @property
    def finite(self) -> Bools:
        """Tell which values are finite."""
        found: Bools = np.isfinite(self.values)
        return found

    def severity(self, found: Severity) -> Severity:
        """Return the severity of a finding: what one of several terms does may well be meant, and is only told."""
        return found if self.main else Severity.INFO


def training_mode(rule: Rule, present: Sequence[str]) -> list[str]:
    """Return the mode to judge: the rule's own choice, else train, else global. Evaluation alone shows no training."""
    return [mode for mode in ([rule.mode] if rule.mode else TRAINING) if mode in present][:1]


def losses_of(rule: Rule, view: View, names: Sequence[str]) -> list[Loss]:
    """Return the losses among the named tensors that have values, in the rule's mode, for each of its workers."""
    found: list[Loss] = []
    used = {mode for name in names for mode in view.modes_of(name)}
    modes = rule.modes([mode for mode in view.run.modes() if mode in used])[:1]
    for worker in view.run.workers():
        if rule.workers and worker not in rule.workers:
            continue
        course = view.course(worker)
        chosen = course.loss_name if course.loss_name in names else next(iter(names), "")
        for name in names:
            if name != chosen and not is_number(view.catalogue[name]):
                continue
            for mode in modes:
                steps, values = view.series(name, mode, worker)
                if len(steps):
                    found.append(Loss(name, worker, mode, steps, values, name == chosen, course))
    return found


def too_few(losses: Sequence[Loss], needed: int) -> Verdicts:
    """Return the answer where no loss has as many values as it takes."""
    seen = max((int(loss.finite.sum()) for loss in losses), default=0)
    return Verdicts(seen=seen, detail=f"saw {seen} of the {needed} losses it needs")


def spread_of(values: Floats) -> float:
    """Return the standard deviation as the median absolute deviation estimates it; 0 of nothing."""
    return DEVIATION * float(np.median(np.abs(values - np.median(values)))) if len(values) else 0.0


def noise_of(values: Floats) -> float:
    """Return the standard deviation from one value to the next, so that a slope does not count; 0 of fewer than 2."""
    return DEVIATION * float(np.median(np.abs(np.diff(values)))) / 2**0.5 if len(values) > 1 else 0.0


def error_between(first: Floats, second: Floats) -> float:
    """Return the standard error of the difference of two medians, by the larger spread of the two."""
    spread = max(spread_of(first), spread_of(second))
    return MEDIAN_ERROR * spread * float(np.hypot(1 / max(len(first), 1) ** 0.5, 1 / max(len(second), 1) ** 0.5))


def rolling_median(values: Floats, width: int) -> Floats:
    """Return float64[n - width + 1]: the median of each `width` values in a row; in bounded memory."""
    if len(values) < width:
        return np.zeros(0)
    windows = sliding_window_view(values, width)
    return np.concatenate([np.median(windows[at : at + 8192], axis=1) for at in range(0, len(windows), 8192)])


def blocks_of(values: Floats, width: int) -> Floats:
    """Return [blocks, width]: the values cut into blocks from the end, so that the last ones are all in."""
    count = len(values) // width
    return values[len(values) - count * width :].reshape(count, width)
