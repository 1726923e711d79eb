"""weight_update_ratio: updates too large or too small for the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.carried import Rows, with_earlier
from smdbg.analysis.rule import (
    NO_STEP,
    Block,
    Facts,
    Floats,
    Ints,
    Judgement,
    Kind,
    Needs,
    Rule,
    Sample,
    State,
    parameter,
)
from smdbg.stats_extra import as_float64

ACCURACY = 1e-5  # relative, of a norm as it is kept
WEIGHT, UPDATE = "l2", "update.l2"


@dataclass(frozen=True, kw_only=True)
class WeightUpdateRatio(Rule):
    """The update of a weight is too large or too small for it.

    What it does
    ------------
    At each saved step it divides the size of the change since an earlier saved step by the size of the weight there:
    l2(now - earlier) / (l2(earlier) + epsilon). It fires when the ratio is above `large_threshold` or below
    `small_threshold`. The earlier step is the last one saved before, or with `num_steps` the newest one at least that
    many steps back.

    The change is taken from the values where both were kept. Between two training steps in a row it is the update that
    the hook saved, whose size is known. Elsewhere it lies between the difference and the sum of the two sizes: that is
    a verdict only where both ends give the same one, and otherwise none is given.

    Why it matters
    --------------
    A weight that changes by many times its own size is thrown about; one that changes by next to nothing does not
    learn.

    Parameters
    ----------
    num_steps (steps, default none): compare with the newest saved step at least that many back; none: the one before.
    large_threshold (default 10): fire when the ratio is above it.
    small_threshold (default 1e-8): fire when the ratio is below it.
    epsilon (default 1e-9): added to the size of the earlier weight.

    Example output
    --------------
    layer1.weight changed by 41.2 times its size between step 20 and step 30, above 10.

    How to fix
    ----------
    Too large: lower the learning rate, warm up, or clip the gradients. Too small: check that the optimizer holds the
    weight and that its gradient is not zero, or raise the learning rate.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule WeightUpdateRatio.
    """

    name: ClassVar[str] = "weight_update_ratio"

    num_steps: int | None = parameter(None, unit="steps", minimum=1, help="compare with a step at least that far back")
    large_threshold: float = parameter(10.0, minimum=0, help="fire when the ratio is above it")
    small_threshold: float = parameter(1e-8, minimum=0, help="fire when the ratio is below it")
    epsilon: float = parameter(1e-9, minimum=0, help="added to the size of the earlier weight")

    def needs(self) -> Needs:
        """Read the sizes of weights and of their updates, and the values where they were kept."""
        return Needs(
            (WEIGHT, UPDATE, "nan", "posinf", "neginf"),
            values=True,
            history=self.num_steps or 1,
            roles=("weight",),
            collections=("weights",),
            minimum=2,
        )

    def kinds(self) -> tuple[Kind, ...]:
        """Too large and too small, as it is and at least or at most."""
        large = Kind("update_ratio", self.large_threshold, "above")
        small = Kind("update_ratio", self.small_threshold, "below", lower_is_worse=True)
        at_least = Kind("update_ratio_at_least", self.large_threshold, "above, at least")
        at_most = Kind("update_ratio_at_most", self.small_threshold, "below, at most", lower_is_worse=True)
        return large, small, at_least, at_most

    def measure(self, sample: Sample) -> Floats | None:
        """Return (step, size of the change since then, size there) of each earlier value, flattened."""
        found: list[float] = []
        now = as_float64(sample.value) if sample.value.dtype.kind != "c" else sample.value
        for step, value in sample.earlier:
            if value.shape == sample.value.shape:
                then = as_float64(value) if value.dtype.kind != "c" else value
                with np.errstate(over="ignore", invalid="ignore"):
                    found += [step, float(np.linalg.norm((now - then).ravel())), float(np.linalg.norm(then.ravel()))]
        return np.array(found, np.float64) if found else None

    def evaluate(self, block: Block, state: State) -> tuple[Judgement, State]:
        """Compare each row with the one that it is to be compared with, carried in the state if need be."""
        keep = 1 + (self.num_steps or 0)
        rows = with_earlier(block, (WEIGHT, UPDATE), keep, state)
        then = self._earlier(rows)
        low, high = self._bounds(rows, then)
        above, below = low > self.large_threshold, high < self.small_threshold
        inside = (low >= self.small_threshold) & (high <= self.large_threshold)
        judged, worst = block.present & (above | below | inside), np.where(below, high, low)
        kind = below + 2 * (low != high)
        before = rows.steps_at(then)
        notes = {}
        for column in np.flatnonzero((judged & (above | below)).any(axis=0)).tolist():
            row = int((judged & (above | below))[:, column].argmax())
            notes[row, column] = f"{worst[row, column]:.3g}"
        since = np.broadcast_to(block.steps[:, None], judged.shape)
        judgement = Judgement(judged, above | below, worst, kind.astype(np.int64), since, before, notes)
        return judgement, rows.state(keep)

    def message(self, facts: Facts) -> str:
        """Say by how much it changed, between which steps."""
        side, _, bound = facts.kind.name.partition(", ")
        ratio = f"{bound} {facts.note}" if bound else facts.note
        often = f" ({facts.violations} of {facts.judged} saved steps)" if facts.violations > 1 else ""
        how = ", by its norms, since neither values nor updates were kept" if bound else ""
        return (
            f"{facts.tensor} changed by {ratio} times its size between the saved steps {facts.before} and {facts.step}"
            f"{how}: {side} {facts.kind.threshold:g}{often}."
        )

    def hint(self, facts: Facts) -> str:
        """Say what to try."""
        if facts.kind.name.startswith("above"):
            return "Lower the learning rate, warm up, or clip the gradients."
        return "Check that the optimizer holds it and that its gradient is not zero, or raise the learning rate."

    def _earlier(self, rows: Rows) -> Ints:
        """Return the index of the row that each row is compared with, NO_STEP for none."""
        own = np.broadcast_to(rows.own, rows.block.present.shape)
        if self.num_steps is None:
            return rows.before(own)
        found = np.full(own.shape, NO_STEP, np.int64)
        for column in range(own.shape[1]):
            present = rows.present_rows(column)
            at = np.searchsorted(rows.steps[present, column], rows.block.steps - self.num_steps, side="right") - 1
            found[at >= 0, column] = present[at[at >= 0]]
        return found

    def _bounds(self, rows: Rows, then: Ints) -> tuple[Floats, Floats]:
        """Return the smallest and the largest that the ratio can be, alike where it is known; NaN where not finite."""
        block = rows.block
        columns = np.broadcast_to(np.arange(then.shape[1]), then.shape)
        now, size = block.stat(WEIGHT), rows.stat(WEIGHT, then, columns)
        finite = (block.stat("nan") + block.stat("posinf") + block.stat("neginf")) == 0
        scale = size + self.epsilon
        with np.errstate(divide="ignore", invalid="ignore"):
            low = np.where(finite, np.maximum(np.abs(now - size) - ACCURACY * (now + size), 0) / scale, np.nan)
            high = np.where(finite, (1 + ACCURACY) * (now + size) / scale, np.nan)
            # A row holds the weights before its update, so that the update that led here is the earlier row's.
            after = np.array([info.moment == "after" for info in block.infos], np.bool_)
            update = np.where(after, block.stat(UPDATE), rows.stat(UPDATE, then, columns)) / scale
        in_a_row = block.mode_steps[:, None] == rows.steps_at(then, rows.mode_steps) + 1
        whole = finite & in_a_row & (then != NO_STEP) & ~np.isnan(update)
        low[whole] = high[whole] = update[whole]
        for (step, column), measured in block.measures.items():
            row = int(np.searchsorted(block.steps, step))
            if row < len(block.steps) and block.steps[row] == step and then[row, column] != NO_STEP:
                for earlier, change, length in measured.reshape(-1, 3):
                    if int(earlier) == rows.steps[then[row, column], column]:
                        low[row, column] = high[row, column] = change / (length + self.epsilon)
        return low, high
