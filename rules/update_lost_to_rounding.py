"""update_lost_to_rounding: updates in half precision that are too small to change the weights."""

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
from smdbg.analysis.training import milder, rates, tables, training_mode
from smdbg.analysis.view import View
from smdbg.store.format import TensorInfo

HALF = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
STATISTICS = ("count", "zeros", "gradient.zeros", "gradient.abs_max")


@dataclass(frozen=True, kw_only=True)
class UpdateLostToRounding(RunRule):
    """Most elements of a weight in half precision do not move under their update.

    What it does
    ------------
    Looks at weights and embeddings that are kept in bfloat16, float16 or float8 and that an optimizer changes in place.
    It counts the elements that have a gradient and no update, and fires when their share is above `threshold` at
    `repeats` saved training steps in a row, while the learning rate is above `decayed` of its peak: at the end of a
    schedule updates get lost that do not matter any more. Where the optimizer keeps a copy in float32 (it is then saved
    as `master` in the optimizer's state), nothing is lost and nothing is judged. It is an error when the loss
    has not fallen, or is not known; else a warning.

    Why it matters
    --------------
    A bfloat16 number has 8 bits of precision: of a weight near 0.02 it cannot tell apart steps below 0.00004. With the
    usual step sizes most updates round to nothing, and the training stands still though every gradient is right.

    Parameters
    ----------
    threshold (%, default 90): fire when more than this share of the elements with a gradient does not move.
    repeats (saved steps, default 5): fire when it is so at this many saved steps in a row.
    decayed (default 0.1): do not judge while the learning rate is below this share of its peak.

    Example output
    --------------
    of the elements of update/layer1.weight that have a gradient 96.4 % are zero in bfloat16 at step 40, since step 0
    (17 of 17 saved steps).

    How to fix
    ----------
    Keep the weights in float32 and compute in half precision (autocast), let the optimizer keep a float32 copy, or use
    stochastic rounding.

    References
    ----------
    Zamirai et al.: Revisiting bfloat16 training, 2020. Micikevicius et al.: Mixed precision training, ICLR 2018.
    """

    name: ClassVar[str] = "update_lost_to_rounding"

    threshold: float = parameter(90.0, unit="%", minimum=0, maximum=100, help="fire when more than this share is lost")
    repeats: int = parameter(5, unit="saved steps", minimum=1, help="fire when it is so this often in a row")
    decayed: float = parameter(0.1, minimum=0, maximum=1, help="do not judge below this share of the peak rate")

    def needs(self) -> Needs:
        """Read the zeros of updates and gradients."""
        return Needs(STATISTICS, roles=("update",), modes=("train", "global"), minimum=self.repeats)

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge training steps."""
        return training_mode(self, present)

    def select(self, catalogue: Mapping[str, TensorInfo]) -> list[str]:
        """Take updates of weights in half precision that have no copy in full precision."""
        copied = {i.of for n, i in catalogue.items() if i.collection == "optimizer_state" and "master" in n}
        return [name for name in super().select(catalogue) if _in_half(catalogue[name], catalogue, copied)]

    def looked_for(self) -> str:
        """Say that the weights must be in half precision."""
        return f"updates of weights in {', '.join(HALF)}"

    def kinds(self) -> tuple[Kind, ...]:
        """The share of elements with a gradient that do not move."""
        return (Kind("lost_share", self.threshold / 100),)

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge the saved training steps of each worker."""
        return verdicts(self, (self._judged(view, one) for one in tables(self, view, names, STATISTICS)))

    def grade(self, facts: Facts, course: Course) -> Severity:
        """Where the loss has fallen, enough gets through."""
        return milder(self.severity) if course.learned else self.severity

    def message(self, facts: Facts) -> str:
        """Say how many are lost."""
        return (
            f"of the elements of {facts.tensor} that have a gradient {facts.note} at step {facts.step}, since step "
            f"{facts.since} ({often(facts)})."
        )

    def hint(self, facts: Facts) -> str:
        """Say what to keep in full precision."""
        return "Keep the weights in float32 and compute with autocast, or let the optimizer keep a float32 copy."

    def _judged(self, view: View, table: Table) -> tuple[Table, Judgement]:
        stat = table.statistics
        rate, _ = rates(view, table)
        known = np.where(np.isnan(rate), 0, rate)
        with np.errstate(all="ignore"):
            moving = stat["count"] - stat["gradient.zeros"]
            lost = (stat["zeros"] - stat["gradient.zeros"]) / np.where(moving > 0, moving, np.nan)
            high = np.isnan(rate) | ((rate > 0) & (rate >= self.decayed * np.maximum.accumulate(known, axis=0)))
        judged = ~np.isnan(lost) & (stat["gradient.abs_max"] > 0) & high
        names = [info.name for info in table.infos]
        bad = lost > self.threshold / 100
        enough, violated, since, before, _ = in_a_row(table.steps, names, judged, bad, self.repeats, {})
        notes = {}
        for column in np.flatnonzero(violated.any(axis=0)).tolist():
            row = int(violated[:, column].argmax())
            notes[row, column] = f"{lost[row, column]:.1%} are zero in {table.infos[column].dtype}".replace("%", " %")
        return table, Judgement(enough, violated, lost, None, since, before, notes)


def _in_half(info: TensorInfo, catalogue: Mapping[str, TensorInfo], copied: set[str]) -> bool:
    owner = catalogue.get(info.of, info)
    return owner.dtype in HALF and info.of not in copied and owner.role in ("weight", "embedding", "update", "")
