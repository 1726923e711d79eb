"""dead_layer: a whole layer that gets no gradient at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.course import Course
from smdbg.analysis.rule import Block, Bools, Facts, Judgement, Kind, Needs, Rule, Severity, State, parameter
from smdbg.analysis.streaks import in_a_row, often
from smdbg.analysis.training import training_mode
from smdbg.store.format import TensorInfo

BROKEN = ("nan", "posinf", "neginf")


@dataclass(frozen=True, kw_only=True)
class DeadLayer(Rule):
    """The gradient of a whole layer is exactly zero, step after step.

    What it does
    ------------
    Looks at the gradients of each module together and fires when every element of all of them is exactly zero at
    `repeats` saved training steps in a row. The finding stands at the module's weight. A bias that still gets a
    gradient shows that the layer is alive and only its input is zero. Gradients of embeddings are not judged, nor those
    of experts: most get none in most steps. Where the gradients of all layers are zero and the loss has fallen, the
    training has nothing left to learn, and the finding is an info.

    Why it matters
    --------------
    The usual cause is a ReLU layer whose units are all negative for every input: nothing passes it in either
    direction, and neither it nor the layers before it will ever learn again. Weights that all start at zero do the
    same. The loss may still fall, by what the layers behind it make of a constant.

    Parameters
    ----------
    repeats (saved steps, default 5): fire when it is so at this many saved steps in a row.
    sparse (list of texts, default Embedding, Expert, MoE): leave out modules whose class has one of these in its name.

    Example output
    --------------
    every gradient of layer1 is exactly zero (gradient/layer1.weight) at 5 saved steps up to step 40, since step 0
    (17 of 17 saved steps).

    How to fix
    ----------
    The layer that is executed last among those found is the one to look at. Lower the learning rate or clip the
    gradients if it died at a jump of the loss; initialise the weights at random and the biases near zero; use an
    activation with a slope on both sides (leaky ReLU, GELU).

    References
    ----------
    Lu, Shin, Su, Karniadakis: Dying ReLU and initialization, 2019. Zhang et al.: AutoTrainer, ICSE 2021.
    """

    name: ClassVar[str] = "dead_layer"

    repeats: int = parameter(5, unit="saved steps", minimum=1, help="fire when it is so this often in a row")
    sparse: tuple[str, ...] = parameter(
        ("Embedding", "Expert", "MoE"), help="leave out modules whose class has one of these in its name"
    )

    def needs(self) -> Needs:
        """Read the largest absolute gradient, and whether all are finite."""
        return Needs(("abs_max", *BROKEN), roles=("gradient",), modes=("train", "global"), minimum=self.repeats)

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge training steps."""
        return training_mode(self, present)

    def select(self, catalogue: Mapping[str, TensorInfo]) -> list[str]:
        """Leave out what is sparse by nature."""
        return [name for name in super().select(catalogue) if not self._sparse(catalogue[name], catalogue)]

    def kinds(self) -> tuple[Kind, ...]:
        """The largest absolute gradient is zero."""
        return (Kind("abs_max", 0.0, lower_is_worse=True),)

    def evaluate(self, block: Block, state: State) -> tuple[Judgement, State]:
        """Judge the first tensor of each module by all that the module has."""
        largest = block.stat("abs_max")
        judged = sum(block.stat(name) for name in BROKEN) == 0
        judged &= ~np.isnan(largest)
        bad = largest == 0
        everything: Bools = np.asarray(bad.any(axis=1) & (bad | ~judged).all(axis=1))
        _join(block.infos, judged, bad)
        enough, violated, since, before, state = in_a_row(block.steps, block.names, judged, bad, self.repeats, state)
        notes = {
            (int(violated[:, column].argmax()), int(column)): "all"
            for column in np.flatnonzero(violated.any(axis=0))
            if everything[violated[:, column].argmax()]
        }
        return Judgement(enough, violated, largest, None, since, before, notes), state

    def grade(self, facts: Facts, course: Course) -> Severity:
        """Where nothing at all has a gradient and the loss has fallen before, there is nothing left to learn."""
        done = course.level(start=facts.since) < 0.1 * course.start_level
        return Severity.INFO if facts.note and done else self.severity

    def message(self, facts: Facts) -> str:
        """Say which module, and since when."""
        what = f"every gradient of {facts.info.module}" if facts.info.module else "every element of the gradient"
        return (
            f"{what} is exactly zero ({facts.tensor}) at {self.repeats} saved steps in a row up to step {facts.step}, "
            f"since step {facts.since} ({often(facts)})."
        )

    def hint(self, facts: Facts) -> str:
        """Say where to look first."""
        return (
            "Of the layers found, look at the one executed last: units that never activate, weights that all start at "
            "zero, or a learning rate that threw it there."
        )

    def _sparse(self, info: TensorInfo, catalogue: Mapping[str, TensorInfo]) -> bool:
        role = catalogue[info.of].role if info.of in catalogue else ""
        return role == "embedding" or any(part in info.module_class for part in self.sparse)


def _join(infos: Sequence[TensorInfo], judged: Bools, bad: Bools) -> None:
    """Judge each module at its first weight, in place: bad where all its gradients there are zero."""
    modules: dict[str, list[int]] = {}
    for column, info in enumerate(infos):
        if info.module:
            modules.setdefault(info.module, []).append(column)
    ordered = [sorted(columns, key=lambda column: -len(infos[column].shape)) for columns in modules.values()]
    hit = set(np.flatnonzero(bad.any(axis=0)).tolist())
    for columns in ordered:
        if columns[0] in hit:
            bad[:, columns[0]] = (bad[:, columns] | ~judged[:, columns]).all(axis=1)
    judged[:, [column for columns in ordered for column in columns[1:]]] = False
