"""loss_plateau: a loss that stands where it began."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.findings import Floats, Ints
from smdbg.analysis.losses import Loss, error_between, losses_of, spread_of, too_few, training_mode
from smdbg.analysis.rule import Facts, Kind, Needs, Severity, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.symptoms import chance_of, symptom_of
from smdbg.analysis.view import View

MOST = 20  # losses at the start: some models learn all they can in a few dozen steps
START_SHARE, END_SHARE = 0.05, 0.25  # of the losses: those at the start, and those that tell where it stands
STANDARD_ERRORS = 3.0  # that a fall may be hidden by
SLACK = 0.15  # of the start: noise may hide no larger fall than this
BLUR = 0.2  # of the start: where noise could hide more, nobody can tell
COARSE = 0.25  # of the start, where it is compared with few losses
PARTS = 10  # of the run: in none of them it may have been much lower than at the start
ALONE = 1.5  # times as far above the level as any of the last: then a single first loss shows a fall
CHANCE_FROM = 0.25  # of the run: standing at chance from there on to its end is a plateau wherever it began


@dataclass(frozen=True, kw_only=True)
class LossPlateau(RunRule):
    """The loss stands still: it ends where it began.

    What it does
    ------------
    Compares the median of the last quarter of the losses with the median of the first quarter and with that of the
    first twentieth (20 at most), once there are `minimum` losses after the warm-up. It fires when the loss has fallen
    by less than `least` per cent, or by no more than three standard errors of noise (and these hide at most 15 %), and
    was at no time much lower. A loss that stands at that of guessing for the last three quarters of the run is a
    plateau wherever it began.

    It is an error with a second symptom: no weight changes, a gradient is zero throughout, the loss is that of guessing
    (ln C for C classes), or the model was freshly initialised (zeros, ones and evenly spread values, which no training
    leaves so). A model that had learned before may stand still because it cannot get better: that is no finding, unless
    its weights do not move or it guesses. Where nothing tells whether it had, and for losses of 0 and below, it is a
    warning. The loss that is trained on is judged alone; terms of it may stand still as they please.

    Why it matters
    --------------
    Such a run has cost its whole time and learned nothing: a learning rate far too low or too high, labels that do not
    belong to the inputs, an optimizer that holds other parameters, a network that passes nothing on.

    Parameters
    ----------
    minimum (losses, default 200): so many losses a verdict takes.
    least (%, default 1): a smaller fall is none.

    Example output
    --------------
    loss stands still from step 0 on: its median is 2.303 over the last 100 of 400 losses (steps 307 to 409) and was
    2.305 at the start; it is that of guessing among 10 classes (ln 10 = 2.303).

    How to fix
    ----------
    Overfit one small batch on purpose: if that fails too, the model or optimizer is at fault, else the data or the
    learning rate. Check that labels and inputs are in one order, that the optimizer holds the parameters of this model,
    and try learning rates ten times larger and smaller.

    References
    ----------
    Karpathy, A Recipe for Training Neural Networks (2019); Zhang et al., AutoTrainer (ICSE 2021).
    """

    name: ClassVar[str] = "loss_plateau"

    minimum: int = parameter(200, unit="losses", minimum=20, help="so many losses a verdict takes")
    least: float = parameter(1.0, unit="%", minimum=0, maximum=100, help="a smaller fall is none")

    def needs(self) -> Needs:
        """Read losses, and of parameters and gradients what shows that they stand still."""
        return Needs(("count", "mean"), roles=("loss",), collections=("losses",), minimum=self.minimum)

    def kinds(self) -> tuple[Kind, ...]:
        """The fall in per cent of the start."""
        return (Kind("fall_percent", self.least, lower_is_worse=True),)

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge the training only."""
        return training_mode(self, present)

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge the main loss of each worker."""
        losses = [loss for loss in losses_of(self, view, names) if loss.main]
        warming = [loss for loss in losses if loss.course.warming]
        ready = [loss for loss in losses if len(_after_warm_up(loss)[0]) >= self.minimum and not loss.course.warming]
        if not ready:
            if warming:
                return Verdicts(detail="the learning rate still rises, and a loss is judged once it is warmed up")
            return too_few(losses, self.minimum)
        troubles = [trouble for loss in ready if (trouble := self._one(view, loss)) is not None]
        return Verdicts(
            troubles=troubles,
            judged=[loss.name for loss in ready],
            steps=max(len(loss.steps) for loss in ready),
        )

    def _one(self, view: View, loss: Loss) -> Trouble | None:
        """Judge one loss."""
        rows, values = _after_warm_up(loss)
        whole = loss.values[loss.finite]
        found = standing(values, whole[: _first(len(whole))], self.least / 100) or _at_chance(view, values)
        if found is None:
            return None
        start, level, begin = found
        symptom = symptom_of(view, loss.mode, loss.worker, loss.course, level)
        if loss.course.fresh is False and (symptom is None or not symptom.of_any_model):
            return None
        certain = symptom is not None and level > 0
        steps = loss.steps[rows]
        tail = len(values) - int(END_SHARE * len(values))
        note = (
            f"its median is {level:.4g} over the last {len(values) - tail} of {len(values)} losses (steps "
            f"{steps[tail]} to {steps[-1]}) and was {start:.4g} at the start"
        )
        return Trouble(
            tensor=loss.name,
            worker=loss.worker,
            mode=loss.mode,
            step=int(steps[begin]),
            last_step=int(steps[-1]),
            violations=len(values) - begin,
            judged=len(values),
            worst=100 * (start - level) / abs(start) if start else 0.0,
            before=int(steps[begin - 1]) if begin else None,
            note=note if symptom is None else f"{note}; {symptom.text}",
            severity=self.severity if certain else min(self.severity, Severity.WARNING, key=lambda one: one.rank),
        )

    def message(self, facts: Facts) -> str:
        """Say where it stands, since when, and what else shows it."""
        return f"{facts.tensor} stands still from step {facts.step} on: {facts.note}."

    def hint(self, facts: Facts) -> str:
        """Say what to try."""
        return (
            "Overfit one small batch on purpose; check that the optimizer holds this model's parameters and that "
            "labels and inputs are in one order; try learning rates ten times larger and smaller."
        )


def _first(count: int) -> int:
    return min(max(int(START_SHARE * count), 5), MOST)


def _after_warm_up(loss: Loss) -> tuple[Ints, Floats]:
    """Return the rows and values of the finite losses from the first one on, but those of a long warm-up."""
    usable = loss.finite
    begin = loss.course.warm_from
    later = usable & (loss.steps >= begin) if begin is not None else usable
    # What was learned while the rate rose counts, where enough was left after it.
    rows = np.flatnonzero(usable if later.sum() * 2 >= usable.sum() else later)
    return rows, loss.values[rows]


def standing(values: Floats, first: Floats, least: float) -> tuple[float, float, int] | None:
    """Return (level at the start, level at the end, index from which it stands) of a loss that stands; else None.

    `first` are the very first losses. Any fall that shows through the noise counts, at whatever time.
    """
    quarter = values[: int(END_SHARE * len(values))]
    last = values[len(values) - len(quarter) :]
    level = float(np.median(last))
    noisy = STANDARD_ERRORS * spread_of(last)
    fell_at_once = float(np.median(first[:3])) - level > max(SLACK * abs(level), noisy)
    if fell_at_once or first[0] - level > ALONE * max(float(last.max()) - level, noisy):
        return None  # it fell within the first few losses
    if STANDARD_ERRORS * error_between(quarter, last) > BLUR * abs(float(np.median(quarter))):
        return None
    lowest = min(np.array_split(values, PARTS), key=lambda part: float(np.median(part)))
    for before, after, slack in ((quarter, last, SLACK), (first, last, COARSE), (first, lowest, COARSE)):
        was, fell = float(np.median(before)), float(np.median(before)) - float(np.median(after))
        noise = STANDARD_ERRORS * error_between(before, after)
        if fell > max(least * abs(was), min(noise, slack * abs(was))) or fell < -slack * abs(was):
            return None
    return float(np.median(first)), level, 0


def _at_chance(view: View, values: Floats) -> tuple[float, float, int] | None:
    """Return the same for a loss that stands at chance for the last three quarters of the run."""
    begin = int(CHANCE_FROM * len(values))
    if not all(chance_of(view, float(np.median(part))) for part in np.array_split(values[begin:], 6)):
        return None
    level = float(np.median(values[begin:]))
    learned = min(float(np.median(part)) for part in np.array_split(values[:begin], 5)) < (1 - SLACK) * level
    return float(np.median(values[: _first(len(values))])), level, begin if learned else 0
