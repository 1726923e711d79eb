"""loss_spike: a loss that jumps far above all that came before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from smdbg.analysis.findings import Floats
from smdbg.analysis.losses import Loss, losses_of, rolling_median, spread_of, too_few, training_mode
from smdbg.analysis.rule import Facts, Kind, Needs, Severity, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.view import View

LEAST = 32  # losses before one that can be judged
LASTING = 3  # losses whose median must be high, too: one bad batch of a model that is well is no spike
BEYOND = 2.0  # times as far above the median as the highest loss of the window
SHARE = 0.1  # of the fall so far: smaller jumps do not matter
HUGE = 10.0  # times the highest loss of the whole run so far: then one loss is enough


@dataclass(frozen=True, kw_only=True)
class LossSpike(RunRule):
    """The loss jumps far above the losses before it.

    What it does
    ------------
    Compares each loss of the training with the `window` losses before it (at least 32). It fires when the loss is more
    than `deviations` robust standard deviations and `ratio` times above their median, and twice as far above it as the
    highest of them; when the median of this loss and the two after it is so high too; and when the jump is more than a
    tenth of what the loss had fallen since the start. One loss is enough if it is ten times higher than any before.

    A spike from which the loss comes back within `recover` losses is a warning, one that stays or ends in NaN an error;
    one that is over within `brief` losses is only told: trainings at a good learning rate have some and end well. Of
    several losses, those that are but terms of the one trained on are only told of.

    Why it matters
    --------------
    A spike is where a bad batch, a learning rate at its limit or a hardware fault first shows. What was learned may be
    lost even when the loss comes back, and the next one may not.

    Parameters
    ----------
    deviations (default 6): so many robust standard deviations above the median.
    ratio (default 1.5): and so many times the median (where losses can be 0 or below, this does not count).
    window (losses, default 64): the losses before, to compare with.
    recover (losses, default 50): a spike that lasts longer is an error.
    brief (losses, default 20): a spike that is over so soon is only told.

    Example output
    --------------
    loss jumps to 14.2 at step 160, from a median of 0.151 (at most 0.243) over the 64 losses before; after 23 losses it
    was back.

    How to fix
    ----------
    Look at the batch of that step and the one before it. Clip the gradients, lower the learning rate, or skip the
    batch; with Adam a smaller beta2 or a larger epsilon often helps.

    References
    ----------
    Chowdhery et al., PaLM (2022), section 5.1, on loss spikes; Molybog et al., A Theory on Adam Instability (2023).
    """

    name: ClassVar[str] = "loss_spike"

    deviations: float = parameter(6.0, minimum=0, help="so many robust standard deviations above the median")
    ratio: float = parameter(1.5, minimum=1, help="and so many times the median")
    window: int = parameter(64, unit="losses", minimum=LEAST, help="the losses before, to compare with")
    recover: int = parameter(50, unit="losses", minimum=1, help="a spike that lasts longer is an error")
    brief: int = parameter(20, unit="losses", minimum=0, help="a spike that is over so soon is only told")

    def needs(self) -> Needs:
        """Read losses."""
        return Needs(("count", "mean"), roles=("loss",), collections=("losses",), minimum=LEAST + LASTING)

    def kinds(self) -> tuple[Kind, ...]:
        """The distance from the median, in robust standard deviations."""
        return (Kind("deviations", self.deviations),)

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge the training only."""
        return training_mode(self, present)

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each loss of each worker."""
        losses = losses_of(self, view, names)
        long = [loss for loss in losses if loss.finite.sum() >= self.needs().minimum]
        if not long:
            return too_few(losses, self.needs().minimum)
        found = [trouble for loss in long if (trouble := self._one(loss)) is not None]
        return Verdicts(
            troubles=found, judged=[loss.name for loss in long], steps=max(len(loss.steps) for loss in long)
        )

    def _one(self, loss: Loss) -> Trouble | None:
        """Judge one loss: the spikes of the finite values; other rules tell of those that are not."""
        rows = np.flatnonzero(loss.finite)
        values, steps = loss.values[rows], loss.steps[rows]
        spikes: list[tuple[int, int | None]] = []  # (index, index at which it was over; None: it was not)
        worst, notes = 0.0, []
        for index in self._candidates(values):
            if spikes and (spikes[-1][1] is None or index < (spikes[-1][1] or 0)):
                continue
            before = values[max(index - self.window, 0) : index]
            median, spread = float(np.median(before)), max(spread_of(before), 1e-12)
            far = (float(values[index]) - median) / spread
            if not self._jumps(values, index, before, median, far):
                continue
            medians = rolling_median(values[index:], LASTING)
            back = np.flatnonzero(medians <= max(float(before.max()), self.ratio * median))
            spikes.append((index, index + int(back[0]) if len(back) else None))
            worst = max(worst, far)
            notes.append(
                f"{values[index]:.4g} at step {steps[index]}, from a median of {median:.4g} (at most "
                f"{before.max():.4g}) over the {len(before)} losses before"
            )
        if not spikes:
            return None
        lasts = [(len(values) if over is None else over) - index for index, over in spikes]
        first, over = spikes[0]
        end = f"after {lasts[0]} losses it was back" if over is not None else f"it is not back {lasts[0]} losses later"
        return Trouble(
            tensor=loss.name,
            worker=loss.worker,
            mode=loss.mode,
            step=int(steps[first]),
            last_step=int(steps[-1 if spikes[-1][1] is None else spikes[-1][0]]),
            violations=sum(lasts),
            judged=len(values) - LEAST,
            worst=worst,
            before=int(steps[first - 1]),
            note=f"{notes[0]}; {end}" + (f"; {len(spikes)} spikes in all" if len(spikes) > 1 else ""),
            severity=loss.severity(self._severity(loss, lasts, spikes[-1][1] is None)),
        )

    def _severity(self, loss: Loss, lasts: Sequence[int], open_end: bool) -> Severity:
        """Return how bad spikes of these lengths are; `open_end`: the last finite losses belong to one."""
        if max(lasts) > self.recover or (open_end and not loss.finite[-1]):
            return self.severity
        cap = Severity.WARNING if open_end or max(lasts) > self.brief else Severity.INFO
        return min(self.severity, cap, key=lambda one: one.rank)

    def _candidates(self, values: Floats) -> list[int]:
        """Return the indices of losses that are above all of the window before them."""
        padded = np.concatenate([np.full(self.window - LEAST, -np.inf), values])
        highest = sliding_window_view(padded, self.window).max(axis=1)[: len(values) - LEAST]
        found: list[int] = (np.flatnonzero(values[LEAST:] > highest[: len(values) - LEAST]) + LEAST).tolist()
        return found

    def _jumps(self, values: Floats, index: int, before: Floats, median: float, far: float) -> bool:
        """Tell whether a loss stands out, and is no single bad batch."""
        highest, fall = float(before.max()), float(np.median(values[:5])) - median
        bar = max(median + BEYOND * (highest - median), median + SHARE * fall)
        if values[: index + 1].min() > 0:
            bar = max(bar, self.ratio * median)
        if far <= self.deviations or values[index] <= bar:
            return False
        lasting = float(np.median(values[index : index + LASTING]))
        reach = float(np.abs(values[:index]).max())
        return (len(values) - index >= LASTING and lasting > bar) or float(values[index]) > HUGE * reach

    def message(self, facts: Facts) -> str:
        """Say how far it jumped, and whether it came back."""
        return f"{facts.tensor} jumps to {facts.note}."

    def hint(self, facts: Facts) -> str:
        """Say what to try."""
        return "Look at the batch of that step and the one before; clip the gradients or lower the learning rate."
