"""tensor_variance: a variance out of bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.rule import Block, Facts, Judgement, Kind, Needs, Rule, State, parameter


@dataclass(frozen=True, kw_only=True)
class TensorVariance(Rule):
    """The variance of a tensor is above or below a bound.

    What it does
    ------------
    Fires when the population variance of a tensor (over its finite elements) is above `max_threshold` or below
    `min_threshold`. At least one of them has to be given. Weights and biases are judged unless `include`,
    `collections` or `roles` names something else.

    Why it matters
    --------------
    Weights that spread ever wider lead to exploding outputs; weights whose spread shrinks to nothing all do the same.

    Parameters
    ----------
    max_threshold (default none): fire when the variance is above it.
    min_threshold (default none): fire when the variance is below it.

    Example output
    --------------
    the variance of layer1.weight is 12.4 at step 40, above 10 (5 of 21 saved steps).

    How to fix
    ----------
    Above: lower the learning rate, add weight decay or a normalisation layer. Below: look at the initialisation, and
    use less weight decay.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule TensorVariance.
    """

    name: ClassVar[str] = "tensor_variance"

    max_threshold: float | None = parameter(None, minimum=0, help="fire when the variance is above it")
    min_threshold: float | None = parameter(None, minimum=0, help="fire when the variance is below it")

    def needs(self) -> Needs:
        """Read the standard deviation of weights and biases."""
        return Needs(("std",), roles=("weight", "bias"), collections=("weights", "biases"))

    def applicable(self) -> str | None:
        """Ask for a bound."""
        if self.max_threshold is None and self.min_threshold is None:
            return "it has no bound to judge by: set max_threshold, min_threshold or both"
        return None

    def kinds(self) -> tuple[Kind, ...]:
        """Above and below."""
        return (
            Kind("variance", self.max_threshold, "above"),
            Kind("variance", self.min_threshold, "below", lower_is_worse=True),
        )

    def evaluate(self, block: Block, state: State) -> tuple[Judgement, State]:
        """Judge wherever there is a finite element."""
        variance = block.stat("std") ** 2
        high, low = np.zeros(variance.shape, np.bool_), np.zeros(variance.shape, np.bool_)
        if self.max_threshold is not None:
            high = variance > self.max_threshold
        if self.min_threshold is not None:
            low = variance < self.min_threshold
        judged = block.present & ~np.isnan(variance)
        return Judgement(judged, high | low, variance, (low & ~high).astype(np.int64)), state

    def message(self, facts: Facts) -> str:
        """Say how large it is."""
        often = f" ({facts.violations} of {facts.judged} saved steps)" if facts.violations > 1 else ""
        return (
            f"the variance of {facts.tensor} is {facts.first['std'] ** 2:.3g} at step {facts.step}, "
            f"{facts.kind.name} {facts.kind.threshold:g}{often}."
        )

    def hint(self, facts: Facts) -> str:
        """Say where to look first."""
        if facts.kind.name == "above":
            return "Lower the learning rate, or add weight decay or a normalisation layer."
        return "Look at the initialisation of this layer, and at the weight decay."
