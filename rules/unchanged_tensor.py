"""unchanged_tensor: tensors that stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from smdbg.analysis.carried import Rows, with_earlier
from smdbg.analysis.rule import (
    NO_STEP,
    Block,
    Bools,
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
from smdbg.stats import ALWAYS, EXTRA
from smdbg.stats_extra import as_float64, is_numeric
from smdbg.store.format import TensorInfo

GUIDE = "l2"  # compared first: where it has changed the others need not be looked at
CONSTANT_ROLES = ("lr", "input", "label", "mask", "metric")
FIRST_PIECE, PIECE = 1 << 12, 1 << 18  # elements that are compared at once: most changes show in the first


@dataclass(frozen=True, kw_only=True)
class UnchangedTensor(Rule):
    """A tensor does not change any more.

    What it does
    ------------
    Fires at a saved step when the tensor there and at each of the `num_steps` - 1 saved steps before are all close:
    abs(earlier - now) <= atol + rtol * abs(now) for every element. Where both values were kept they are compared;
    where they were not, all kept statistics are, and the finding says so. Two tensors with like statistics may differ,
    for all that it is rare. What is constant by nature (learning rates, inputs, labels, masks, metrics,
    hyperparameters) is judged only when it is named.

    Why it matters
    --------------
    A weight that stays as it is does not learn; a loss or an output that does, in a training that goes on, means that
    nothing reaches it any more.

    Parameters
    ----------
    num_steps (saved steps, default 3): as many in a row have to be alike.
    rtol (default 1e-5): tolerance relative to the newest value.
    atol (default 1e-8): absolute tolerance.
    equal_nan (true or false, default false): take NaN for equal to NaN.

    Example output
    --------------
    layer1.weight has not changed over 3 saved steps, 20 to 40, by its values.

    How to fix
    ----------
    Check that the optimizer holds this parameter, that its gradient is neither zero nor missing, and that the learning
    rate is not zero.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule UnchangedTensor. numpy.allclose.
    """

    name: ClassVar[str] = "unchanged_tensor"

    num_steps: int = parameter(3, unit="saved steps", minimum=2, help="as many in a row have to be alike")
    rtol: float = parameter(1e-5, minimum=0, help="tolerance relative to the newest value")
    atol: float = parameter(1e-8, minimum=0, help="absolute tolerance")
    equal_nan: bool = parameter(False, help="take NaN for equal to NaN")

    def needs(self) -> Needs:
        """Read all statistics, and the values where they were kept."""
        return Needs(ALWAYS + EXTRA, values=True, history=self.num_steps - 1, minimum=self.num_steps)

    def picks(self, info: TensorInfo) -> bool:
        """Pick everything that is not constant by nature."""
        return info.role not in CONSTANT_ROLES and info.collection != "hyperparameters"

    def kinds(self) -> tuple[Kind, ...]:
        """By the values, and by the statistics."""
        return (
            Kind("largest_change", self.atol, "values", lower_is_worse=True),
            Kind("largest_change_of_a_statistic", self.atol, "statistics", lower_is_worse=True),
        )

    def measure(self, sample: Sample) -> Floats | None:
        """Return (step, largest change) of each earlier value, flattened; the change is NaN where one is too large."""
        found = [(float(step), self._change(value, sample.value)) for step, value in sample.earlier]
        return np.array(found, np.float64).reshape(-1) if found else None

    def evaluate(self, block: Block, state: State) -> tuple[Judgement, State]:
        """Compare each row with the ones before at which the tensor is present; they are carried in the state."""
        rows = with_earlier(block, self.needs().statistics, self.num_steps - 1, state)
        there = np.broadcast_to(rows.own, block.present.shape)
        lags = [there := rows.before(there) for _ in range(self.num_steps - 1)]
        found = [self._by_statistics(rows, lag) for lag in lags]
        known, change = np.stack([one[0] for one in found]), np.stack([one[1] for one in found])
        valued = self._by_values(rows, lags, known, change)
        judged = block.present & (lags[-1] != NO_STEP) & known.all(axis=0)
        with np.errstate(invalid="ignore"):
            largest = change.max(axis=0)  # NaN where any is not close
        second = rows.steps_at(lags[-2] if len(lags) > 1 else np.broadcast_to(rows.own, there.shape))
        kind = np.where(valued.all(axis=0), 0, 1)
        judgement = Judgement(judged, ~np.isnan(largest), largest, kind, second, rows.steps_at(lags[-1]))
        return judgement, rows.state(self.num_steps - 1)

    def message(self, facts: Facts) -> str:
        """Say since when, and by what it was told."""
        by = "its values" if facts.kind.name == "values" else "its statistics alone, since not all values were kept"
        often = f" ({facts.violations} of {facts.judged} comparisons)" if facts.violations > 1 else ""
        return (
            f"{facts.tensor} has not changed over {self.num_steps} saved steps, {facts.before} to {facts.step}, "
            f"by {by}{often}."
        )

    def hint(self, facts: Facts) -> str:
        """Say where to look first."""
        return (
            "Check that the optimizer holds it, that its gradient is not zero, and that the learning rate is not zero."
        )

    def _by_statistics(self, rows: Rows, lag: Ints) -> tuple[Bools, Floats]:
        """Compare each row with an earlier one; return whether that can be done, and the change, NaN if not close."""
        block = rows.block
        bad = block.stat("nan") + block.stat("posinf") + block.stat("neginf")
        known = (lag != NO_STEP) & (block.stat("count") > 0) & (~np.isnan(block.stat("mean")) | (bad > 0))
        change = np.full(lag.shape, np.nan)
        at = np.nonzero(known if self.equal_nan else known & (block.stat("nan") == 0))
        largest = np.zeros(len(at[0]))
        for name in (GUIDE, *(name for name in self.needs().statistics if name != GUIDE)):
            earlier, now = rows.stat(name, lag[at], at[1]), block.stat(name)[at]
            away, close = differences(earlier, now, self.rtol, self.atol, equal_nan=True)
            at, largest = (at[0][close], at[1][close]), np.fmax(largest, away)[close]
        change[at] = largest
        return known, change

    def _by_values(self, rows: Rows, lags: Sequence[Ints], known: Bools, change: Floats) -> Bools:
        """Put what the values say in place of the statistics; return where they do: bool[lags, rows, tensors]."""
        valued = np.zeros_like(known)
        block = rows.block
        for (step, column), measured in block.measures.items():
            row = int(np.searchsorted(block.steps, step))
            if row == len(block.steps) or block.steps[row] != step:
                continue
            changes = {int(earlier): away for earlier, away in measured.reshape(-1, 2)}
            for index, lag in enumerate(lags):
                then = int(rows.steps[lag[row, column], column]) if lag[row, column] != NO_STEP else NO_STEP
                if then in changes:
                    known[index, row, column] = valued[index, row, column] = True
                    change[index, row, column] = changes[then]
        return valued

    def _change(self, earlier: npt.NDArray[Any], now: npt.NDArray[Any]) -> float:
        """Return the largest absolute change of a value, NaN where one is too large."""
        if earlier.shape != now.shape:
            return float("nan")
        if not is_numeric(now.dtype):
            return 0.0 if np.array_equal(earlier, now) else float("nan")
        largest, edges = 0.0, [0, *range(FIRST_PIECE, now.size, PIECE), now.size]
        then, this = earlier.reshape(-1), now.reshape(-1)
        for start, end in pairwise(edges):
            old, new = _wide(then[start:end]), _wide(this[start:end])
            away, close = differences(old, new, self.rtol, self.atol, self.equal_nan)
            if not close.all():
                return float("nan")
            largest = max(largest, float(np.nanmax(away, initial=0.0)))
        return largest


def differences(
    earlier: npt.NDArray[Any], now: npt.NDArray[Any], rtol: float, atol: float, equal_nan: bool
) -> tuple[Floats, Bools]:
    """Return the absolute differences (0 where equal, NaN where either is), and where they are close."""
    with np.errstate(invalid="ignore", over="ignore"):
        away = np.where(earlier == now, 0.0, np.abs(earlier - now))
        close = (away <= atol + rtol * np.abs(now)) & (np.isfinite(now) | (away == 0))
    if equal_nan:
        close |= np.isnan(earlier) & np.isnan(now)
    return away, close


def _wide(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return numbers in double precision."""
    return values.astype(np.complex128) if values.dtype.kind == "c" else as_float64(values)
