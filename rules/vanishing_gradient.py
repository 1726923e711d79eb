"""vanishing_gradient: gradients too small to learn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.rule import Block, Facts, Judgement, Kind, Needs, Rule, State, parameter, persistent


@dataclass(frozen=True, kw_only=True)
class VanishingGradient(Rule):
    """The mean absolute value of a gradient is almost zero.

    What it does
    ------------
    Fires when the mean of the absolute values of a gradient is below `threshold`. A gradient of which every element is
    exactly zero has another cause (a dead or detached layer) and is reported as all zero, not as vanishing.
    Gradients are found by their role in the catalogue, or by the collection `gradients`.

    Why it matters
    --------------
    A layer whose gradient vanishes does not learn. In deep networks it is the early layers that are cut off, while the
    loss may still fall a little, which hides it.

    Parameters
    ----------
    threshold (default 1e-7): fire when mean(abs(gradient)) is below it.
    repeats, within (saved steps, default 1 and 1): fire only when it is so at `repeats` of the last `within`.
    report_all_zero (true or false, default true): report gradients that are all zero.

    Example output
    --------------
    the mean absolute value of gradient/layer1.weight is 3.2e-09 at step 40, below 1e-07.

    How to fix
    ----------
    Use an activation that does not saturate, an initialisation that fits it, normalisation layers or residual
    connections; in half precision, use loss scaling.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule VanishingGradient.
    """

    name: ClassVar[str] = "vanishing_gradient"

    threshold: float = parameter(1e-7, minimum=0, help="fire when mean(abs(gradient)) is below it")
    repeats: int = parameter(1, unit="saved steps", minimum=1, help="fire when it is so this often")
    within: int = parameter(1, unit="saved steps", minimum=1, help="among this many last saved steps")
    report_all_zero: bool = parameter(True, help="report gradients of which every element is zero, as such")

    def needs(self) -> Needs:
        """Read the mean absolute value of gradients."""
        return Needs(("abs_mean",), roles=("gradient",), collections=("gradients",), minimum=self.within)

    def applicable(self) -> str | None:
        """Refuse a persistence that can never be reached."""
        return "repeats is larger than within, so it could never fire" if self.repeats > self.within else None

    def kinds(self) -> tuple[Kind, ...]:
        """Vanishing, and all zero."""
        return (
            Kind("abs_mean", self.threshold, "vanishing", lower_is_worse=True),
            Kind("abs_mean", 0.0, "all zero", lower_is_worse=True),
        )

    def evaluate(self, block: Block, state: State) -> tuple[Judgement, State]:
        """Judge wherever the gradient has a finite element."""
        mean = block.stat("abs_mean")
        zero = mean == 0
        violated = zero if self.report_all_zero else np.zeros_like(zero)
        violated = violated | ((mean < self.threshold) & ~zero)
        now = Judgement(block.present & ~np.isnan(mean), violated, mean, zero.astype(np.int64))
        return persistent(block, now, self.repeats, self.within, state)

    def message(self, facts: Facts) -> str:
        """Say how small, or that all is zero."""
        often = f" ({facts.violations} of {facts.judged} saved steps)" if facts.violations > 1 else ""
        if facts.kind.name == "all zero":
            return f"every element of {facts.tensor} is zero at step {facts.step}{often}: all zero, not vanishing."
        size = facts.first["abs_mean"]
        return (
            f"the mean absolute value of {facts.tensor} is {size:.3g} at step {facts.step}, "
            f"below {self.threshold:g}{often}."
        )

    def hint(self, facts: Facts) -> str:
        """Say where to look first."""
        if facts.kind.name == "all zero":
            return "Look for a dead activation, a detached or frozen layer, or a loss that does not depend on it."
        return "Look at the activations and the initialisation between this layer and the loss."
