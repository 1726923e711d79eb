"""frozen_parameter: parameters that get a gradient and are not moved by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.rule import Bools, Facts, Floats, Judgement, Kind, Needs, parameter
from smdbg.analysis.run_rule import RunRule, Verdicts
from smdbg.analysis.streaks import in_a_row, often, verdicts
from smdbg.analysis.table import Table
from smdbg.analysis.training import rates, tables, training_mode
from smdbg.analysis.view import View
from smdbg.store.format import TensorInfo

SAME = ("mean", "std", "min", "max", "l2")  # when none of these changes, to the last bit, the weight has not
STATISTICS = ("abs_max", *SAME, "gradient.abs_max", "update.abs_max")
SPACING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
ASSUMED = 1e-4  # the learning rate where none was recorded
VISIBLE = 100.0  # a step so many times the spacing of numbers cannot get lost in rounding


@dataclass(frozen=True, kw_only=True)
class FrozenParameter(RunRule):
    """A parameter has a gradient and does not move.

    What it does
    ------------
    Fires when the update of a parameter is exactly zero in every element while its gradient is not, at `repeats` saved
    training steps in a row at which the learning rate of its group is above zero. Of a parameter that no optimizer
    holds there is no update; then it has not moved when its statistics are the same, to the last bit, as at the saved
    step before. A step so small that rounding may have swallowed it is not judged; update_lost_to_rounding and
    update_scale look at those. Parameters without a gradient are not judged: those that do not require gradients
    are frozen on purpose.

    Why it matters
    --------------
    The optimizer holds other tensors than the model: it was made before the model was replaced, moved, wrapped or
    loaded, or was given only a part of the parameters. The loss stands still, or falls by what the other layers learn,
    which hides it.

    Parameters
    ----------
    repeats (saved steps, default 5): fire when it is so at this many saved steps in a row.

    Example output
    --------------
    layer1.weight does not move though its gradient is up to 0.031, at 5 saved steps in a row up to step 50, since step
    10: no optimizer holds it (19 of 19 saved steps).

    How to fix
    ----------
    Make the optimizer after the model is on its device and complete, from all the parameters that are to learn. If the
    parameter is meant to stay as it is, say so with requires_grad_(False): that also saves its gradient.

    References
    ----------
    Zhang et al.: AutoTrainer, ICSE 2021. Schoop, Huang, Hartmann: UMLAUT, CHI 2021.
    """

    name: ClassVar[str] = "frozen_parameter"

    repeats: int = parameter(5, unit="saved steps", minimum=1, help="fire when it is so this often in a row")

    def needs(self) -> Needs:
        """Read parameters, and the extremes of their gradients and updates."""
        return Needs(
            STATISTICS,
            roles=("weight", "bias", "norm", "embedding"),
            collections=("weights", "biases"),
            modes=("train", "global"),
            minimum=self.repeats,
        )

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge training steps."""
        return training_mode(self, present)

    def select(self, catalogue: Mapping[str, TensorInfo]) -> list[str]:
        """Take parameters that have a gradient, and not by some older backward pass alone."""
        moved = {info.of for info in catalogue.values() if info.role == "gradient"}
        chosen = super().select(catalogue)
        return [name for name in chosen if name in moved and catalogue[name].requires_grad is not False]

    def looked_for(self) -> str:
        """Say that the gradient must be there."""
        return "parameters with a saved gradient"

    def kinds(self) -> tuple[Kind, ...]:
        """The largest absolute update is zero."""
        return (Kind("update.abs_max", 0.0, lower_is_worse=True),)

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge the saved training steps of each worker."""
        return verdicts(self, (self._judged(view, one) for one in tables(self, view, names, STATISTICS)))

    def message(self, facts: Facts) -> str:
        """Say that it has a gradient, and since when it stands still."""
        held = facts.info.optimizer_group
        who = "no optimizer holds it" if held is None else f"it is in group {held} of its optimizer"
        return (
            f"{facts.tensor} does not move though its gradient is up to {facts.note}, at {self.repeats} saved steps in "
            f"a row up to step {facts.step}, since step {facts.since}: {who} ({often(facts)})."
        )

    def hint(self, facts: Facts) -> str:
        """Say where to look first."""
        return (
            "Give the optimizer the parameters of the model that is trained; if this one is to stay as it is, say so "
            "with requires_grad_(False)."
        )

    def _judged(self, view: View, table: Table) -> tuple[Table, Judgement]:
        stat = table.statistics
        rate, _ = rates(view, table)
        gradient, update = stat["gradient.abs_max"], stat["update.abs_max"]
        held = np.array([info.optimizer_group is not None for info in table.infos], bool)
        unknown = np.isnan(update)
        judged, still = (gradient > 0) & (rate != 0), update == 0
        if unknown.any():
            same, known = _unchanged(table)
            judged &= known | ~unknown
            still |= same & unknown
        if still.any():
            spacing = np.array([SPACING.get(info.dtype, SPACING["float32"]) for info in table.infos])
            usual = np.where(np.isnan(rate) & ~held, ASSUMED, rate)
            with np.errstate(all="ignore"):
                seen = usual * np.fmin(gradient, 1.0) > VISIBLE * spacing * stat["abs_max"]
            # Where an optimizer steps with it, its step may get lost.
            judged &= ~(still & (held | ~unknown) & ~seen)
        enough, violated, since, before, _ = in_a_row(
            table.steps, [info.name for info in table.infos], judged, still, self.repeats, {}
        )
        notes = {}
        for column in np.flatnonzero(violated.any(axis=0)).tolist():
            row = int(violated[:, column].argmax())
            notes[row, column] = f"{gradient[row, column]:.2g}"
        return table, Judgement(enough, violated, np.where(still, 0.0, update), None, since, before, notes)


def _unchanged(table: Table) -> tuple[Bools, Bools]:
    """Tell where a weight is the same as at the row before, and where that can be told, each bool[rows, tensors]."""
    same, known = np.zeros(table.present.shape, np.bool_), np.zeros(table.present.shape, np.bool_)
    values: Floats
    alike = np.ones((max(len(table.steps) - 1, 0), len(table.infos)), np.bool_)
    for name in SAME:
        values = table.statistics[name]
        alike &= values[1:] == values[:-1]
    known[1:] = table.present[1:] & table.present[:-1]
    same[1:] = alike
    return same, known
