"""all_zero: tensors that hold zeros only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.rule import Block, Facts, Judgement, Kind, Needs, Rule, State, parameter, persistent


@dataclass(frozen=True, kw_only=True)
class AllZero(Rule):
    """A tensor is zero, wholly or for the most part.

    What it does
    ------------
    Fires when the share of elements that are exactly zero reaches `threshold`. It judges only what `include` or
    `collections` names: zeros are wrong in some tensors and right in others.

    Why it matters
    --------------
    A gradient that is zero in every element means a layer that is dead, frozen or cut off from the loss; an output
    that is zero, a layer that passes nothing on.

    Parameters
    ----------
    threshold (%, default 100): fire when at least this share of the elements is zero.
    repeats, within (saved steps, default 1 and 1): fire only when it is so at `repeats` of the last `within`.

    Example output
    --------------
    640 of 640 elements of gradient/layer1.weight are zero at step 40 (5 of 21 saved steps).

    How to fix
    ----------
    For gradients, look for units that never activate, a detach() or stop_gradient in the way, or a parameter that no
    longer takes part in the loss.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule AllZero.
    """

    name: ClassVar[str] = "all_zero"

    threshold: float = parameter(100.0, unit="%", minimum=0, maximum=100, help="fire at this share of zeros or more")
    repeats: int = parameter(1, unit="saved steps", minimum=1, help="fire when it is so this often")
    within: int = parameter(1, unit="saved steps", minimum=1, help="among this many last saved steps")

    def needs(self) -> Needs:
        """Read the number of zeros; the extremes tell where it was not kept."""
        return Needs(("count", "zeros", "nan", "posinf", "neginf", "abs_max"), minimum=self.within)

    def applicable(self) -> str | None:
        """Ask for tensors to judge."""
        if not self.include and not self.collections and not self.roles:
            return "it judges only what it is given: set include, collections or roles"
        return "repeats is larger than within, so it could never fire" if self.repeats > self.within else None

    def kinds(self) -> tuple[Kind, ...]:
        """The share of zeros."""
        return (Kind("zero_share", self.threshold / 100),)

    def evaluate(self, block: Block, state: State) -> tuple[Judgement, State]:
        """Judge tensors that have elements; without the number of zeros, all or not all can still be told."""
        count, zeros = block.stat("count"), block.stat("zeros")
        if self.threshold == 100:
            bad = block.stat("nan") + block.stat("posinf") + block.stat("neginf")
            every = np.where((block.stat("abs_max") == 0) & (bad == 0), count, 0)
            zeros = np.where(np.isnan(zeros), every, zeros)
        share = zeros / np.where(count > 0, count, np.nan)
        now = Judgement(block.present & ~np.isnan(share), share >= self.threshold / 100, share)
        return persistent(block, now, self.repeats, self.within, state)

    def message(self, facts: Facts) -> str:
        """Say how many of how many."""
        count, zeros = facts.first["count"], facts.first["zeros"]
        zeros = count if np.isnan(zeros) else zeros
        often = f" ({facts.violations} of {facts.judged} saved steps)" if facts.violations > 1 else ""
        return f"{zeros:.0f} of {count:.0f} elements of {facts.tensor} are zero at step {facts.step}{often}."

    def hint(self, facts: Facts) -> str:
        """Say where to look first."""
        return "Look for dead activations, a detached or frozen layer, or a tensor that is never filled."
