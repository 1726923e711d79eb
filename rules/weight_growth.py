"""weight_growth: weights that grow without end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.course import Course
from smdbg.analysis.rule import NO_STEP, Facts, Judgement, Kind, Needs, Severity, parameter
from smdbg.analysis.run_rule import RunRule, Verdicts
from smdbg.analysis.streaks import often, verdicts
from smdbg.analysis.table import Table
from smdbg.analysis.training import hurts, least_size, milder, tables, training_mode
from smdbg.analysis.view import View
from smdbg.store.format import TensorInfo

BEYOND = 100.0  # a weight that has grown so much is an error whatever the loss does


@dataclass(frozen=True, kw_only=True)
class WeightGrowth(RunRule):
    """A weight keeps doubling.

    What it does
    ------------
    Follows the l2 norm of every weight with two axes or more, relative to its first one (or to that of a weight with
    the usual spread of 1 / sqrt(fan_in), where it started below). It fires when the norm has doubled `doublings` times,
    the last time in no more than `slowing` times what the second took. A weight that grows steadily needs twice the
    time for each doubling and does not count; one that is multiplied by the same factor step after step does. It is an
    error when the loss rises or is not finite afterwards, when the run did not learn, or when the weight has grown a
    hundredfold; else a warning.

    Why it matters
    --------------
    Weights that grow in proportion to themselves overflow sooner or later, and long before that the network saturates.
    The causes are a weight decay with the wrong sign, a learning rate that is too high, or gradients that accumulate.

    Parameters
    ----------
    doublings (default 3): fire when the norm has doubled this often.
    slowing (default 1.5): the last doubling may take so much longer than the second.

    Example output
    --------------
    layer1.weight has grown to 8.1 times its first size by step 310, doubling every 90 steps, since step 40 (31 of
    61 saved steps).

    How to fix
    ----------
    Check the sign of the weight decay and the learning rate, and that gradients are set to zero between steps; clip
    the gradients.

    References
    ----------
    Ben Braiek, Khomh: TheDeepChecker, ACM TOSEM 2023 (growth of at least 2 per period).
    """

    name: ClassVar[str] = "weight_growth"

    doublings: int = parameter(3, minimum=3, help="fire when the norm has doubled this often")
    slowing: float = parameter(1.5, minimum=1, help="the last doubling may take so much longer than the second")

    def needs(self) -> Needs:
        """Read the norms of weights."""
        return Needs(("l2", "abs_max"), roles=("weight",), modes=("train", "global"), minimum=self.doublings + 1)

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge training steps."""
        return training_mode(self, present)

    def select(self, catalogue: Mapping[str, TensorInfo]) -> list[str]:
        """Take weights with two axes or more."""
        return [name for name in super().select(catalogue) if len(catalogue[name].shape) >= 2]

    def kinds(self) -> tuple[Kind, ...]:
        """The norm over the first one."""
        return (Kind("growth", 2.0**self.doublings),)

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Look at each weight from its first saved step to its last."""
        return verdicts(self, (self._judged(one) for one in tables(self, view, names, ("l2", "abs_max"))))

    def grade(self, facts: Facts, course: Course) -> Severity:
        """Growth is an error where the training suffers from it, or where it is beyond all measure."""
        return self.severity if hurts(course, facts.since) or facts.worst >= BEYOND else milder(self.severity)

    def message(self, facts: Facts) -> str:
        """Say how much it has grown, and how fast."""
        return (
            f"{facts.tensor} has grown to {facts.note} by step {facts.step}, since step {facts.since} "
            f"({often(facts)})."
        )

    def hint(self, facts: Facts) -> str:
        """Say what to check."""
        return (
            "Check the sign of the weight decay, the learning rate, and that gradients are set to zero between steps."
        )

    def _judged(self, table: Table) -> tuple[Table, Judgement]:
        size = np.where(table.statistics["abs_max"] >= 0, table.statistics["l2"], np.nan)
        known = ~np.isnan(size)
        first = size[known.argmax(axis=0), np.arange(size.shape[1])]
        usual = least_size(table.infos)
        with np.errstate(all="ignore"):
            growth = size / np.maximum(first, usual)
        judged = known.copy()
        judged[: self.doublings] = False  # so many saved steps it takes at least
        violated = np.zeros_like(judged)
        since, before = np.full(judged.shape, NO_STEP, np.int64), np.full(judged.shape, NO_STEP, np.int64)
        notes: dict[tuple[int, int], str] = {}
        interval = float(np.median(np.diff(table.steps))) if len(table.steps) > 1 else 0.0
        for column in np.flatnonzero((growth >= 2.0**self.doublings).any(axis=0)).tolist():
            own = growth[:, column]
            reached = [int((own >= 2.0**k).argmax()) for k in range(1, self.doublings + 1)]
            times = np.diff(table.steps[reached])
            if times[-1] > self.slowing * max(times[0], interval):
                continue
            row = reached[-1]
            # It began about one doubling before the first that came at this pace; the first of all counts from the
            # first size, which may be below the usual one.
            steady = len(times) - 1
            while steady and times[steady - 1] <= self.slowing * max(times[steady], interval):
                steady -= 1
            pace = times[steady:].mean()
            if not steady and first[column] > 0:
                pace *= np.log2(2 * max(usual[column] / first[column], 1))
            begun = int(np.searchsorted(table.steps, table.steps[reached[steady]] - pace, side="right"))
            begun = min(max(begun, int(known[:, column].argmax()) + 1), reached[steady])
            rows = np.arange(len(own)) >= row
            violated[:, column] = rows & (own >= 2.0**self.doublings)
            judged[:, column] |= violated[:, column]
            since[:, column], before[:, column] = table.steps[begun], table.steps[begun - 1]
            notes[row, column] = f"{own[row]:.3g} times its first size, doubling every {times.mean():.3g} steps,"
        return table, Judgement(judged, violated, growth, None, since, before, notes)
