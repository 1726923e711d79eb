"""overtraining: a loss that has not had a new optimum for a while."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.course import is_number
from smdbg.analysis.rule import NO_STEP, Block, Facts, Judgement, Kind, Needs, Rule, State, parameter
from smdbg.rules._evaluations import VALIDATION, compiled


@dataclass(frozen=True, kw_only=True)
class Overtraining(Rule):
    """A loss has had no new optimum for a while.

    What it does
    ------------
    Keeps the lowest value of each loss that was at least `delta` below the one before, and fires once there has been
    no such optimum for `patience_train` saved steps in training, or for `patience_validation` in validation (mode eval,
    or a name such as `val_loss`). The finding says in which of the two. Losses that are not finite are passed over.

    Why it matters
    --------------
    Steps that improve nothing cost time, and may take the model from its optimum.

    Parameters
    ----------
    patience_train (saved steps, default 5): the same for training losses.
    patience_validation (saved steps, default 10): fire after as many validation losses without a new optimum.
    delta (default 0.01): an optimum must be lower than the last one by this much.
    validation_regex (default `^(val|valid|validation|eval|test)(_[0-9]+)?[-_/]`): names of validation losses, outside
    mode eval.

    Example output
    --------------
    loss in training has not had a new optimum for 5 saved steps at step 17; the last one was 0.25 at step 12.

    How to fix
    ----------
    Stop earlier, or lower the learning rate when a plateau is reached.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule Overtraining.
    """

    name: ClassVar[str] = "overtraining"

    patience_train: int = parameter(5, unit="saved steps", minimum=1, help="fire after as many training losses")
    patience_validation: int = parameter(10, unit="saved steps", minimum=1, help="fire after as many validation losses")
    delta: float = parameter(0.01, minimum=0, help="an optimum must be lower than the last one by this much")
    validation_regex: str = parameter(VALIDATION, help="names of validation losses, outside mode eval")

    def needs(self) -> Needs:
        """Read scalars of losses (the mean of one element is its value)."""
        least = min(self.patience_train, self.patience_validation)
        return Needs(("mean",), roles=("loss",), collections=("losses",), minimum=least + 1)

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge training and validation."""
        return [mode for mode in super().modes(present) if mode != "predict" or self.mode == mode]

    def kinds(self) -> tuple[Kind, ...]:
        """No new optimum in training, and in validation."""
        unit = "steps_since_optimum"
        return Kind(unit, self.patience_train, "training"), Kind(unit, self.patience_validation, "validation")

    def evaluate(self, block: Block, state: State) -> tuple[Judgement, State]:
        """Go through the points of each loss. Kept of each: [optimum, its step, steps since, the first of those]."""
        values, shape = block.stat("mean"), block.present.shape
        judged, violated = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
        worst, kind = np.full(shape, np.nan), np.zeros(shape, np.int64)
        since, before = np.full(shape, NO_STEP, np.int64), np.full(shape, NO_STEP, np.int64)
        notes: dict[tuple[int, int], str] = {}
        of_validation = compiled(self.validation_regex)
        later: State = {}
        for column, (name, info) in enumerate(zip(block.names, block.infos, strict=True)):
            validation = block.mode == "eval" or of_validation.search(name) is not None
            patience = self.patience_validation if validation else self.patience_train
            kind[:, column] = int(validation)
            best, at, quiet, start, seen = state.get(name, [np.inf, NO_STEP, 0, NO_STEP, 0])
            usable = block.present[:, column] & np.isfinite(values[:, column]) & is_number(info)
            for row in np.flatnonzero(usable).tolist():
                value, step = float(values[row, column]), int(block.steps[row])
                quiet, seen = quiet + 1, seen + 1
                start = step if quiet == 1 else start
                if seen == 1 or (value < best and best - value >= self.delta):
                    best, at, quiet = value, step, 0
                judged[row, column], worst[row, column] = seen > patience, quiet
                if quiet >= patience:
                    violated[row, column], since[row, column], before[row, column] = True, start, at
                    if quiet == patience:
                        notes[row, column] = f"{best:.4g} at step {at}"
            later[name] = [best, at, quiet, start, seen]
        return Judgement(judged, violated, worst, kind, since, before, notes), later

    def message(self, facts: Facts) -> str:
        """Say where the optimum was."""
        return (
            f"{facts.tensor} in {facts.kind.name} has not had a new optimum for {facts.kind.threshold:g} saved steps at"
            f" step {facts.step}; the last one was {facts.note}."
        )

    def hint(self, facts: Facts) -> str:
        """Say what to do."""
        return "Stop earlier and keep the weights of the optimum, or lower the learning rate on a plateau."
