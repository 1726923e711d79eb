"""gradient_vanishing_depth: gradients that shrink from the last layer to the first until nothing is left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.course import Course
from smdbg.analysis.rule import Block, Facts, Judgement, Kind, Needs, Rule, Severity, State, parameter
from smdbg.analysis.streaks import in_a_row, often
from smdbg.analysis.training import milder, training_mode
from smdbg.store.format import TensorInfo

IDLE = 1e-6  # an update below this share of its weight moves nothing


@dataclass(frozen=True, kw_only=True)
class GradientVanishingDepth(Rule):
    """The gradients of early layers are tiny beside those of the last one.

    What it does
    ------------
    Compares the gradients of weights with two axes or more, as root mean squares (l2 / sqrt(elements)), in the order
    in which the layers are executed. A layer violates the rule where its gradient is below `ratio` times that of the
    last layer and below `threshold`, at `repeats` saved steps in a row. Embeddings, norms and biases are not judged;
    nor is a gradient that is exactly zero, which has other causes. It is an error where the training did not learn, or
    where its loss is not known; where it learned, it is a warning, or an error if these layers hardly move.

    Why it matters
    --------------
    Each saturated or badly scaled layer multiplies the gradient by a factor below one. After a dozen of them the first
    layers stay as they were initialised, and the network learns at best what its last layers make of random features.
    The absolute size alone tells little: a converged network has small gradients everywhere.

    Parameters
    ----------
    ratio (default 0.001): fire when the gradient is below this share of the last layer's.
    threshold (default 0.0001): and below this size.
    repeats (saved steps, default 5): at this many saved steps in a row.

    Example output
    --------------
    the gradient vanishes on its way to gradient/0.weight: 2.1e-12 at step 40, 4.4e-10 of that of gradient/24.weight,
    since step 0 (17 of 17 saved steps).

    How to fix
    ----------
    Use ReLU-like activations instead of sigmoid or tanh, an initialisation that keeps the variance (He, Glorot),
    normalisation layers, or residual connections.

    References
    ----------
    Glorot, Bengio: Understanding the difficulty of training deep feedforward neural networks, AISTATS 2010. Zhang et
    al.: AutoTrainer, ICSE 2021 (both thresholds).
    """

    name: ClassVar[str] = "gradient_vanishing_depth"

    ratio: float = parameter(1e-3, minimum=0, help="fire when the gradient is below this share of the last layer's")
    threshold: float = parameter(1e-4, minimum=0, help="and when its root mean square is below this")
    repeats: int = parameter(5, unit="saved steps", minimum=1, help="fire when it is so this often in a row")

    def needs(self) -> Needs:
        """Read the norms of gradients, and how far these layers move."""
        return Needs(
            ("l2", "abs_max", "update.l2", "parameter.l2"),
            roles=("gradient",),
            modes=("train", "global"),
            minimum=self.repeats,
        )

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge training steps."""
        return training_mode(self, present)

    def select(self, catalogue: Mapping[str, TensorInfo]) -> list[str]:
        """Take gradients of weights with two axes or more."""
        return [name for name in super().select(catalogue) if _is_weight(catalogue[name], catalogue)]

    def kinds(self) -> tuple[Kind, ...]:
        """The share of the last layer's gradient."""
        return (Kind("share_of_last", self.ratio, lower_is_worse=True),)

    def evaluate(self, block: Block, state: State) -> tuple[Judgement, State]:
        """Compare every layer with the last one at each row."""
        size = block.stat("l2") / np.sqrt([max(math.prod(info.shape), 1) for info in block.infos])
        size = np.where(block.stat("abs_max") > 0, size, np.nan)
        order = [(info.forward_order is not None, info.forward_order or 0, i) for i, info in enumerate(block.infos)]
        last = max(order)[2]
        with np.errstate(all="ignore"):
            share = size / size[:, last : last + 1]
        judged = ~np.isnan(share)
        judged[:, last] = False
        bad = (share < self.ratio) & (size < self.threshold)
        enough, violated, since, before, state = in_a_row(block.steps, block.names, judged, bad, self.repeats, state)
        notes = {}
        for column in np.flatnonzero(violated.any(axis=0)).tolist():
            row = int(violated[:, column].argmax())
            there = f"{size[row, column]:.2g} at step {block.steps[row]}"
            notes[row, column] = f"{there}, {share[row, column]:.2g} of that of {block.names[last]}"
        return Judgement(enough, violated, share, None, since, before, notes), state

    def grade(self, facts: Facts, course: Course) -> Severity:
        """Layers that do not learn are an error where the whole does not, or where they do not move."""
        moved = facts.first["update.l2"] / facts.first["parameter.l2"] if facts.first["parameter.l2"] > 0 else np.nan
        return milder(self.severity) if course.learned and not moved < IDLE else self.severity

    def message(self, facts: Facts) -> str:
        """Say how small, and beside what."""
        return (
            f"the gradient vanishes on its way to {facts.tensor}: {facts.note}, since step {facts.since} "
            f"({often(facts)})."
        )

    def hint(self, facts: Facts) -> str:
        """Say what to try."""
        return (
            "Use activations that do not saturate, an initialisation that keeps the variance, normalisation or "
            "residual connections between this layer and the loss."
        )


def _is_weight(info: TensorInfo, catalogue: Mapping[str, TensorInfo]) -> bool:
    owner = catalogue.get(info.of)
    role = owner.role if owner is not None else ""
    shape = owner.shape if owner is not None else info.shape
    return len(shape) >= 2 and role in ("", "weight")
