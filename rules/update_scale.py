"""update_scale: updates out of proportion to the weights they change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.course import Course
from smdbg.analysis.rule import Facts, Judgement, Kind, Needs, Severity, parameter
from smdbg.analysis.run_rule import RunRule, Verdicts
from smdbg.analysis.streaks import in_a_row, often, verdicts
from smdbg.analysis.table import Table
from smdbg.analysis.training import hurts, least_size, milder, rates, tables, training_mode
from smdbg.analysis.view import View
from smdbg.store.format import TensorInfo

STATISTICS = ("l2", "abs_max", "parameter.l2", "gradient.abs_max")


@dataclass(frozen=True, kw_only=True)
class UpdateScale(RunRule):
    """The update of a weight is far too large beside the weight, or next to nothing.

    What it does
    ------------
    Divides the l2 norm of each update by that of its weight, or of a weight with the usual spread of 1 / sqrt(fan_in)
    where it is smaller: so a weight that starts at zero does not alarm. Weights and embeddings are judged, at saved
    training steps. Too large: the ratio is above `large` at `repeats_large` saved steps in a row, once `skip` training
    steps are over. Too small: the ratio, divided by the learning rate over its peak, is below `small` at
    `repeats_small` saved steps in a row, and has been ever since the start, with a learning rate above zero and a
    gradient: so neither a warm-up nor a training that has converged alarms. Nothing is too small where the loss
    has fallen. Too large is an error when the loss rises, is not finite or never fell, else a warning; where the loss
    is not known, it is an error when the updates are larger than the weights.

    Why it matters
    --------------
    An update of about a thousandth of the weight is usual. With a tenth and more, each step forgets what the steps
    before had learned; with a millionth, nothing will ever happen. The ratio shows a wrong learning rate in the first
    saved steps, long before the loss does.

    Parameters
    ----------
    large (default 0.1): fire when the ratio is above it.
    small (default 1e-6): fire when the ratio, for the peak of the learning rate, is below it.
    repeats_large (saved steps, default 3): at this many saved steps in a row, for large.
    repeats_small (saved steps, default 5): at this many saved steps in a row, for small.
    skip (training steps, default 20): do not look for large ratios before this many.

    Example output
    --------------
    update/layer1.weight is 0.43 times its weight at step 40, above 0.1, at 3 saved steps in a row since step 20 (19 of
    19 saved steps).

    How to fix
    ----------
    Change the learning rate by the factor that the ratio is away from 0.001, for the layers in question or for all;
    clip the gradients, or scale the inputs, if it is the gradients that are large.

    References
    ----------
    Karpathy: CS231n notes, ratio of weights to updates. Ben Braiek, Khomh: TheDeepChecker, ACM TOSEM 2023.
    """

    name: ClassVar[str] = "update_scale"

    large: float = parameter(0.1, minimum=0, help="fire when the ratio is above it")
    small: float = parameter(1e-6, minimum=0, help="fire when the ratio, for the peak learning rate, is below it")
    repeats_large: int = parameter(3, unit="saved steps", minimum=1, help="at this many in a row, for large")
    repeats_small: int = parameter(5, unit="saved steps", minimum=1, help="at this many in a row, for small")
    skip: int = parameter(20, unit="training steps", minimum=0, help="do not look for large ratios before this many")

    def needs(self) -> Needs:
        """Read the norms of updates and weights."""
        return Needs(STATISTICS, roles=("update",), modes=("train", "global"), minimum=self.repeats_large)

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge training steps."""
        return training_mode(self, present)

    def select(self, catalogue: Mapping[str, TensorInfo]) -> list[str]:
        """Take updates of weights and embeddings."""
        return [name for name in super().select(catalogue) if _is_weight(catalogue[name], catalogue)]

    def kinds(self) -> tuple[Kind, ...]:
        """Too large, and too small."""
        return (
            Kind("update_ratio", self.large, "too large"),
            Kind("update_ratio", self.small, "too small", lower_is_worse=True),
        )

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge the saved training steps of each worker."""
        return verdicts(self, (self._judged(view, one) for one in tables(self, view, names, STATISTICS)))

    def grade(self, facts: Facts, course: Course) -> Severity:
        """Large updates are an error when they do harm."""
        if facts.kind.name == "too small":
            return self.severity
        harm = facts.worst > 1 if course.learned is None else hurts(course, facts.since)
        return self.severity if harm else milder(self.severity)

    def message(self, facts: Facts) -> str:
        """Say how large beside what."""
        small = facts.kind.name == "too small"
        side, repeats = ("below", self.repeats_small) if small else ("above", self.repeats_large)
        return (
            f"{facts.tensor} is {facts.note} at step {facts.step}, {side} {facts.kind.threshold:g}, at {repeats} saved "
            f"steps in a row since step {facts.since} ({often(facts)})."
        )

    def hint(self, facts: Facts) -> str:
        """Say what to change."""
        if facts.kind.name == "too small":
            return "Raise the learning rate: about 0.001 is usual for this ratio. In half precision, see the rounding."
        return "Lower the learning rate or clip the gradients: about 0.001 is usual for this ratio."

    def _judged(self, view: View, table: Table) -> tuple[Table, Judgement]:
        stat, names = table.statistics, [info.name for info in table.infos]
        with np.errstate(all="ignore"):
            ratio = stat["l2"] / np.fmax(stat["parameter.l2"], least_size(table.infos))
            ratio = np.where(stat["abs_max"] >= 0, ratio, np.nan)
        judged = ~np.isnan(ratio)
        counted = judged & (table.mode_steps >= self.skip)[:, None]
        enough, violated, since, before, _ = in_a_row(
            table.steps, names, counted, ratio > self.large, self.repeats_large, {}
        )
        kind, worst = np.zeros(ratio.shape, np.int64), ratio
        if not view.course(table.worker).learned:
            rate, peak = rates(view, table)
            with np.errstate(all="ignore"):
                at_peak = np.where(np.isnan(rate), ratio, ratio * (peak / rate))
            asked = judged & ~(rate == 0) & ((stat["gradient.abs_max"] > 0) | (ratio > 0))
            low = np.logical_and.accumulate((at_peak < self.small) | ~asked, axis=0)
            too, small, low_since, low_before, _ = in_a_row(table.steps, names, asked, low, self.repeats_small, {})
            kind[small] = 1
            since, before = np.where(small, low_since, since), np.where(small, low_before, before)
            enough, violated, worst = enough | too, violated | small, np.where(small, at_peak, ratio)
        notes = {}
        for column in np.flatnonzero(violated.any(axis=0)).tolist():
            row = int(violated[:, column].argmax())
            notes[row, column] = f"{ratio[row, column]:.2g} times its weight"
        return table, Judgement(enough, violated, worst, kind, since, before, notes)


def _is_weight(info: TensorInfo, catalogue: Mapping[str, TensorInfo]) -> bool:
    return info.of not in catalogue or catalogue[info.of].role in ("weight", "embedding", "")
