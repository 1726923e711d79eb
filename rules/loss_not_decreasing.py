"""loss_not_decreasing: a loss that stands still or rises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.course import is_number
from smdbg.analysis.findings import Floats, Ints, Severity
from smdbg.analysis.losses import Loss, error_between, losses_of, spread_of, too_few, training_mode
from smdbg.analysis.rule import Facts, Kind, Needs, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.symptoms import symptom_of
from smdbg.analysis.view import View
from smdbg.store.format import TensorInfo

STANDARD_ERRORS = 2.0
LOW_RATE = 0.1  # of its peak: a learning rate below it no longer lets a loss fall
NOISE = 3.0  # deviations that the first loss alone must lie above the others
LEAST = 10  # losses that make a window of a short run
DECREASE, INCREASE = 0, 1


@dataclass(frozen=True, kw_only=True)
class LossNotDecreasing(RunRule):
    """The loss does not decrease, or increases.

    What it does
    ------------
    Every `num_steps` steps it compares the loss with the newest one saved at least `num_steps` steps earlier, and fires
    when it has decreased by less than `diff_percent` or increased by more than `increase_threshold_percent` (both in
    per cent of the earlier loss). It judges scalars that are finite; in mode eval if losses were saved there, else in
    train, else in global.

    Single losses are noisy, and most healthy runs have pairs that do not decrease. With `window` above 1 the losses of
    the training (train, else global) are cut into adjacent windows of that many instead, or of fewer where the run has
    too few for `patience` pairs, down to 10. It fires when the median of a window is less than `diff_percent` below the
    one before it, or by less than two standard errors, `patience` times in a row up to the last, unless the loss has
    at any time fallen by `until_fallen` from where it started. It looks from where the learning rate is warmed up to
    where that falls below a tenth of its peak. A model that had learned before it was trained on may have nothing left
    to gain: then it fires only when no weight moves or the loss is that of guessing. It is of the severity given when
    no weight moves or a gradient is zero throughout, otherwise a warning at most: some trainings take long to begin.

    Why it matters
    --------------
    A loss that never falls is the plainest sign that nothing is learnt: a learning rate far off, labels that do not
    belong to the inputs, parameters the optimizer does not hold.

    Parameters
    ----------
    use_losses_collection (true or false, default true): judge the tensors of the collection `losses`; those that
    `include` or `collections` name are judged instead.
    num_steps (steps, default 10): compare with a loss at least that old, and as seldom.
    diff_percent (%, default 0.1): fire when the decrease is smaller.
    increase_threshold_percent (%, default 5): an increase above it is reported as such.
    window (points, default 1): compare medians of windows; 1 compares single losses.
    patience (windows, default 1): fire when it is so this often in a row.
    until_fallen (%, default none): be content once the loss has fallen by this share of its start.

    Example output
    --------------
    loss has not decreased: 0.3 at step 12 against 0.3 at step 0 (a decrease of 0 %, at least 0.1 % was expected).

    How to fix
    ----------
    Try learning rates ten times larger and smaller, overfit one batch on purpose, check that the optimizer holds the
    model's parameters and that labels and inputs are in the same order.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule LossNotDecreasing.
    """

    name: ClassVar[str] = "loss_not_decreasing"

    use_losses_collection: bool = parameter(True, help="judge the collection losses, if no tensors are named")
    num_steps: int = parameter(10, unit="steps", minimum=1, help="compare with a loss at least this old, and as seldom")
    diff_percent: float = parameter(0.1, unit="%", help="fire when the decrease is smaller")
    increase_threshold_percent: float = parameter(5.0, unit="%", minimum=0, help="report an increase above it as such")
    window: int = parameter(1, unit="points", minimum=1, help="compare medians of windows; 1 compares single losses")
    patience: int = parameter(1, unit="windows", minimum=1, help="fire when it is so this often in a row")
    until_fallen: float | None = parameter(None, unit="%", minimum=0, help="be content once it has fallen so much")

    def needs(self) -> Needs:
        """Read scalars of losses (the mean of one element is its value)."""
        points = 2 if self.window == 1 else min(self.window, LEAST) * (self.patience + 1)
        return Needs(("count", "mean"), roles=("loss",), collections=("losses",), minimum=points)

    def applicable(self) -> str | None:
        """Ask for tensors when the collection is not to be used."""
        named = self.use_losses_collection or self.include or self.collections or self.roles
        return None if named else "use_losses_collection is off and none of include, collections and roles is set"

    def picks(self, info: TensorInfo) -> bool:
        """Pick losses by role or collection."""
        return self.use_losses_collection and super().picks(info)

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge one mode only."""
        if self.window > 1:
            return training_mode(self, present)
        return [m for m in ([self.mode] if self.mode else ("eval", "train", "global")) if m in present][:1]

    def kinds(self) -> tuple[Kind, ...]:
        """A decrease that is too small, and an increase that is too large."""
        return (
            Kind("decrease_percent", self.diff_percent, "decrease", lower_is_worse=True),
            Kind("increase_percent", self.increase_threshold_percent, "increase"),
        )

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each loss of each worker, by single losses or by windows."""
        judge = self._points if self.window == 1 else self._windows
        losses = losses_of(self, view, [name for name in names if is_number(view.catalogue[name])])
        answers = [(loss, checks) for loss in losses if len(checks := judge(loss))]
        if not answers:
            seen = max((len(loss.steps) for loss in losses), default=0)
            # With enough of them, they are no scalars, too close together, or the rate forbids a verdict.
            return Verdicts(seen=seen) if self.window == 1 else too_few(losses, self.needs().minimum)
        found = [self._trouble(view, loss, checks) for loss, checks in answers]
        return Verdicts(
            troubles=[one for one in found if one is not None],
            judged=[loss.name for loss, _ in answers],
            steps=max(len(checks) for _, checks in answers),
        )

    def message(self, facts: Facts) -> str:
        """Say what was compared."""
        word = "increased" if facts.kind.name == "increase" else "not decreased"
        return f"{facts.tensor} has {word}: {facts.note}."

    def hint(self, facts: Facts) -> str:
        """Say what to try."""
        return "Try another learning rate, and check that the optimizer holds the parameters and the labels fit."

    def _points(self, loss: Loss) -> list[_Check]:
        """Compare single losses: every `num_steps` with the newest one that is at least as old."""
        rows = np.flatnonzero(loss.finite)
        steps, values = loss.steps[rows], loss.values[rows]
        checks: list[_Check] = []
        last = 0
        while len(steps) and (now := int(np.searchsorted(steps, steps[last] + self.num_steps))) < len(steps):
            then = int(np.searchsorted(steps, steps[now] - self.num_steps, side="right")) - 1
            drop = _percent(values[then], values[now])
            rising = -drop > self.increase_threshold_percent
            note = f"{values[now]:.4g} at step {steps[now]} against {values[then]:.4g} at step {steps[then]}"
            before = checks[-1].step if checks else None
            bad, at = rising or drop < self.diff_percent, int(steps[now])
            checks.append(_Check(at, bad, drop, rising, self._expected(note, drop), at, before))
            last = now
        return checks

    def _windows(self, loss: Loss) -> list[_Check]:
        """Compare each window with the one before it, from the `patience`-th pair on."""
        rows = _judged_rows(loss)
        steps, values = loss.steps[rows], loss.values[rows]
        width = max(min(self.window, len(values) // (self.patience + 1)), min(self.window, LEAST))
        count = len(values) // width
        if count <= self.patience or not loss.main:
            return []
        windows = values[: count * width].reshape(count, width)
        medians = np.median(windows, axis=1)
        fallen = self._has_fallen(loss.values[loss.finite], windows)
        checks: list[_Check] = []
        quiet = since = 0
        for index in range(1, count):
            then, now = float(medians[index - 1]), float(medians[index])
            drop = _percent(then, now)
            progress = fallen or (
                drop >= self.diff_percent
                and then - now >= STANDARD_ERRORS * error_between(windows[index - 1], windows[index])
            )
            since = index - 1 if not quiet else since
            quiet = 0 if progress else quiet + 1
            if index < self.patience:
                continue
            last = (index + 1) * width - 1
            note = (
                f"its median over steps {steps[index * width]} to {steps[last]} is {now:.4g}, and {then:.4g} over the "
                f"{width} points before"
            )
            before = int(steps[since * width - 1]) if since else None
            checks.append(
                _Check(
                    step=int(steps[last]),
                    bad=quiet >= self.patience,
                    drop=drop,
                    rising=-drop > self.increase_threshold_percent,
                    note=self._expected(note, drop),
                    since=int(steps[since * width]),
                    before=before,
                    level=now,
                )
            )
        return checks

    def _has_fallen(self, values: Floats, windows: Floats) -> bool:
        """Tell whether any window lies far below the start: the first five losses, or the very first beyond noise."""
        if self.until_fallen is None:
            return False
        lowest = windows[int(np.median(windows, axis=1).argmin())]
        level, first, start = float(np.median(lowest)), float(values[0]), float(np.median(values[:5]))
        share = self.until_fallen / 100
        fell = start - level >= share * abs(start)
        return fell or first - level >= max(share * abs(first), NOISE * spread_of(lowest))

    def _trouble(self, view: View, loss: Loss, checks: Sequence[_Check]) -> Trouble | None:
        """Fold the checks of one loss into what is wrong with it, None for nothing."""
        bad = [check for check in checks if check.bad]
        if not bad or (self.window > 1 and not checks[-1].bad):
            return None
        first, severity = bad[0], None
        note = first.note
        if self.window > 1:
            symptom = symptom_of(view, loss.mode, loss.worker, loss.course, first.level)
            if loss.course.fresh is False and (symptom is None or not symptom.of_any_model):
                return None
            certain = symptom is not None and symptom.proves
            severity = self.severity if certain else min(self.severity, Severity.WARNING, key=lambda one: one.rank)
            note = note if symptom is None else f"{note}; {symptom.text}"
        same = [check for check in bad if check.rising == first.rising]
        worst = max(-check.drop for check in same)
        return Trouble(
            tensor=loss.name,
            worker=loss.worker,
            mode=loss.mode,
            step=first.step,
            last_step=bad[-1].step,
            violations=len(bad),
            judged=len(checks),
            worst=worst if first.rising else -worst,
            kind=INCREASE if first.rising else DECREASE,
            since=first.since,
            before=first.before,
            note=note,
            severity=severity,
        )

    def _expected(self, note: str, drop: float) -> str:
        """Return the note with the change and what was expected."""
        if -drop > self.increase_threshold_percent:
            return f"{note} (an increase of {-drop:.3g} %, above {self.increase_threshold_percent:g} %)"
        word, size = ("a decrease", drop) if drop >= 0 else ("an increase", -drop)
        return f"{note} ({word} of {size:.3g} %, a decrease of at least {self.diff_percent:g} % was expected)"


@dataclass(frozen=True)
class _Check:
    """One comparison: the step at which it was made, the decrease in per cent, and where the standstill began."""

    step: int
    bad: bool
    drop: float
    rising: bool
    note: str
    since: int
    before: int | None
    level: float = 0.0


def _judged_rows(loss: Loss) -> Ints:
    """Return the rows of the finite losses while the learning rate is warmed up and not yet nearly 0."""
    usable = loss.finite
    begin, peak = loss.course.warm_from, loss.course.peak_lr
    if begin is not None:
        rate = loss.course.lr_at(loss.steps)
        usable = usable & (loss.steps >= begin) & ~(rate < LOW_RATE * peak)
    return np.flatnonzero(usable)


def _percent(then: float, now: float) -> float:
    """Return the decrease in per cent of the earlier value: negative for an increase, infinite from 0."""
    drop = float(then) - float(now)
    return 100 * drop / abs(float(then)) if then else float(np.copysign(np.inf, drop)) if drop else 0.0
