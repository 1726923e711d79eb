"""loss_divergence: a loss that rises far above the lowest level it had, or is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.findings import Floats, Ints
from smdbg.analysis.losses import (
    Loss,
    blocks_of,
    error_between,
    losses_of,
    noise_of,
    rolling_median,
    too_few,
    training_mode,
)
from smdbg.analysis.rule import Facts, Kind, Needs, Severity, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.view import View

SHARE = 0.05  # of the losses: a window, if that is more than `window`
TWICE = 2  # windows at the end that must both stand high: one alone may come down again
DEVIATIONS = 6.0  # of the noise: a rise is more than this
GAINED = 0.25, 0.5  # of what the loss had fallen: so much lost again is a warning, so much an error
GRADUAL = 15  # losses: a rise that takes longer began where it left the lowest level
STANDARD_ERRORS = 1.5  # that a slow rise must show by
CLIMB = 0.2  # of the way up: before a jump, losses only hover
NOT_FINITE, RISE = 0, 1


@dataclass(frozen=True, kw_only=True)
class LossDivergence(RunRule):
    """The loss rises far above its lowest level and stays there, or becomes NaN or infinite.

    What it does
    ------------
    Cuts the losses of the training into windows of `window` values (or 5 % of them, if that is more) and fires when the
    medians of the last two windows are both at least `ratio` times that of the best one, six times the noise above it,
    and at least a quarter of what had been gained since the start is lost again. Where losses can be 0 or below, and no
    ratio means anything, the rise and the noise alone count. It also fires at the first loss that is not finite.

    A loss that at once jumps to `ratio` times its first value and stays there has diverged too.

    It is an error when half of the gain is lost, and a warning before. A loss that is not finite is an error unless the
    training went on with finite ones. Of several losses the one that is trained on is judged in full; that a term of it
    rises is only told, since it may well be meant to.

    Why it matters
    --------------
    A training that diverges does not come back: what follows is lost time, and the checkpoints of it are worthless.
    Where the rise begins is where to look, not at the NaN that it often ends in.

    Parameters
    ----------
    ratio (default 2): fire at this many times the lowest level, or more.
    window (losses, default 10): so many make up a window, at least.

    Example output
    --------------
    loss has diverged: its median is 2.31 over steps 370 to 409, 14.6 times the lowest (0.158 over steps 139 to 158); it
    rises from step 164 on.

    How to fix
    ----------
    Go back to a checkpoint before the rise. Lower the learning rate or its peak, warm up longer, clip the gradients,
    and look at the batch of the first bad step.

    References
    ----------
    Smith et al., Using DeepSpeed and Megatron to Train Megatron-Turing NLG 530B (2022), on divergence; Braiek and
    Khomh, TheDeepChecker (TOSEM 2023).
    """

    name: ClassVar[str] = "loss_divergence"

    ratio: float = parameter(2.0, minimum=1, help="fire at this many times the lowest level, or more")
    window: int = parameter(10, unit="losses", minimum=3, help="so many make up a window, at least")

    def needs(self) -> Needs:
        """Read losses; three windows, of which the last two must be bad."""
        least = (TWICE + 1) * self.window
        return Needs(("count", "mean"), roles=("loss",), collections=("losses",), minimum=least)

    def kinds(self) -> tuple[Kind, ...]:
        """A loss that is not finite, and one that is many times its lowest level."""
        return Kind("non_finite", 0.0, "not finite"), Kind("times_lowest", self.ratio, "rise")

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge the training only: of a rise in evaluation alone another rule tells."""
        return training_mode(self, present)

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each loss of each worker."""
        losses = losses_of(self, view, names)
        found = [(loss, self._one(loss)) for loss in losses]
        long = [loss for loss, trouble in found if trouble is not None or loss.finite.sum() >= self.needs().minimum]
        if not long:
            return too_few(losses, self.needs().minimum)
        return Verdicts(
            troubles=[trouble for _, trouble in found if trouble is not None],
            judged=[loss.name for loss in long],
            steps=max(len(loss.steps) for loss in long),
        )

    def _one(self, loss: Loss) -> Trouble | None:
        """Judge one loss: its rise, and the first value that is not finite."""
        bad = np.flatnonzero(~loss.finite)
        rise = self._rise(loss, np.flatnonzero(loss.finite[: bad[0]]) if len(bad) else np.arange(len(loss.steps)))
        return self._non_finite(loss, int(bad[0]), rise) if len(bad) else rise

    def _non_finite(self, loss: Loss, row: int, rise: Trouble | None) -> Trouble:
        """Return the trouble of a loss that is not finite from a row on, or there alone."""
        later = loss.finite[row + 1 :]
        recovered = len(later) >= self.window and bool(later[-self.window :].all())
        note = f"it is not finite at step {loss.steps[row]}, and at {int((~later).sum())} of {len(later)} later ones"
        if rise is not None:
            note += f"; before that {rise.note}"
        return Trouble(
            tensor=loss.name,
            worker=loss.worker,
            mode=loss.mode,
            step=int(loss.steps[row]),
            last_step=int(loss.steps[~loss.finite][-1]),
            violations=int((~loss.finite).sum()),
            judged=len(loss.steps),
            worst=float("nan"),
            kind=NOT_FINITE,
            since=rise.since if rise is not None else int(loss.steps[row]),
            before=rise.before if rise is not None else int(loss.steps[row - 1]) if row else None,
            note=note,
            severity=_at_most(self.severity, Severity.WARNING) if recovered else self.severity,
        )

    def _rise(self, loss: Loss, rows: Ints) -> Trouble | None:
        """Return the trouble of a loss that rose, None where it did not, or where there are too few values."""
        values = loss.values[rows]
        width = max(self.window, int(np.ceil(SHARE * len(values))))
        blocks = blocks_of(values, width)
        if len(blocks) < TWICE + 1:
            return None
        levels = np.median(blocks, axis=1)
        never = self._never_back(loss, values, loss.steps[rows])
        if never is not None:
            return never
        best, level = int(levels[:-TWICE].argmin()), float(levels[-TWICE:].min())
        low, start = float(levels[best]), max(float(np.median(values[:5])), float(levels[0]))
        noise = max(noise_of(blocks[best]), 1e-12)
        if level <= low + DEVIATIONS * noise:
            return None
        positive = bool((values > 0).all())
        if level < self.ratio * low if positive else level - low < abs(low) and start - low < noise:
            return None
        lost = (level - low) / (start - low) if start > low else np.inf
        if lost < GAINED[0]:
            return None
        bar = max(low + DEVIATIONS * noise, (1 + self.ratio) / 2 * low if positive else -np.inf)
        end = len(values) - len(blocks) * width + best * width
        first = _since(values, low, min(bar, level), end)
        steps = loss.steps[rows]
        times = f", {level / low:.3g} times the lowest" if positive else ", and the lowest was"
        note = (
            f"its median is {level:.4g} over steps {steps[-TWICE * width]} to {steps[-1]}{times} "
            f"({low:.4g} over steps {steps[end]} to {steps[end + width - 1]})"
        )
        return Trouble(
            tensor=loss.name,
            worker=loss.worker,
            mode=loss.mode,
            step=int(steps[first]),
            last_step=int(steps[-1]),
            violations=len(values) - first,
            judged=len(values),
            worst=level / low if positive else level,
            kind=RISE,
            since=int(steps[first]),
            before=int(steps[first - 1]) if first else None,
            note=f"{note}; it rises from step {steps[first]} on",
            severity=loss.severity(self.severity if lost >= GAINED[1] else _at_most(self.severity, Severity.WARNING)),
        )

    def _never_back(self, loss: Loss, values: Floats, steps: Ints) -> Trouble | None:
        """Return the trouble of a loss that jumped at once and never came near its first value again."""
        later, first = values[1:], float(values[0])
        level = float(np.median(later))
        if first <= 0 or np.quantile(later, 0.1) < self.ratio * first or level - first < 2 * noise_of(later):
            return None
        return Trouble(
            tensor=loss.name,
            worker=loss.worker,
            mode=loss.mode,
            step=int(steps[1]),
            last_step=int(steps[-1]),
            violations=len(later),
            judged=len(values),
            worst=level / first,
            kind=RISE,
            since=int(steps[1]),
            before=int(steps[0]),
            note=(
                f"it was {first:.4g} at step {steps[0]} and never came near that again: the median from step "
                f"{steps[1]} to {steps[-1]} is {level:.4g}, {level / first:.3g} times as much"
            ),
            severity=loss.severity(self.severity),
        )

    def message(self, facts: Facts) -> str:
        """Say how far and since when."""
        return f"{facts.tensor} has diverged: {facts.note}."

    def hint(self, facts: Facts) -> str:
        """Say what to try."""
        return (
            "Go back to before the rise; lower the learning rate, warm up longer or clip the gradients, and look at "
            "the batch of the first bad step."
        )


def _at_most(severity: Severity, cap: Severity) -> Severity:
    return min(severity, cap, key=lambda one: one.rank)


def _since(values: Floats, low: float, bar: float, begin: int) -> int:
    """Return the index from which values, by the median of 5, stay above a bar: at the first one that is above.

    Where they climb there slowly from the low, it is the index at which they leave that.
    """
    medians = rolling_median(values, 5)[begin:]
    under = np.flatnonzero(medians <= bar)
    after = begin + (int(under[-1]) + 1 if len(under) else 0)
    above = np.flatnonzero(values[after:] > bar)
    first = after + (int(above[0]) if len(above) else 0)
    lowest = np.flatnonzero(medians[: first - begin] <= low)
    left = begin + (int(lowest[-1]) + 1 if len(lowest) else 0)
    way, quarter = values[left:first], (first - left) // 4
    if len(way) <= GRADUAL:
        return first
    climbed = float(np.median(way[-quarter:])) - float(np.median(way[:quarter]))
    sure = STANDARD_ERRORS * error_between(way[:quarter], way[-quarter:])
    return left if climbed > max(CLIMB * (bar - low), sure) else first
