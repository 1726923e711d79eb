"""initial_weights: weights that no training can start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.course import Course
from smdbg.analysis.rule import Bools, Facts, Floats, Kind, Needs, Severity, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.table import Table
from smdbg.analysis.training import fan_in, hurts, milder, places, training_mode
from smdbg.analysis.view import View
from smdbg.store.format import TensorInfo

STATISTICS = ("count", "std", "mean", "abs_max", "gradient.abs_max")
ZERO, CONSTANT, SMALL, LARGE = range(4)
SPREAD = 1e-6  # a deviation below this share of the mean is none
MOST = " It is so with most weights."
BEGINNING, ENOUGH = 5, 3  # saved steps at whose gradients it looks, and how many of them it takes


@dataclass(frozen=True, kw_only=True)
class InitialWeights(RunRule):
    """The first weights are zero, constant, far too small or far too large.

    What it does
    ------------
    Looks at the weights with two axes or more (no embeddings, norms or biases) as they were before the first training
    step. It fires where all elements are the same, or where their standard deviation times the square root of the
    number of inputs lies outside `smallest` to `largest`: usual initialisations have about 1. A weight of zeros is
    right for the output of a residual block, an adapter or a last layer: so zero counts only where the weight gets no
    gradient at any of the first five saved steps (where gradients were not saved, where it stays zero), or where all
    weights are zero. Runs that were resumed, or in which some parameters do not
    require gradients (fine-tuning), are not judged, nor those whose first weights were not saved. It is an error when
    the loss does not fall, rises or is not finite, or is not known, and also when most weights are zero, constant or
    too large; else a warning.

    Why it matters
    --------------
    With zeros or constants all units of a layer compute and learn the same: the layer has a width of one. With too
    small weights nothing passes forward and no gradient backward; with too large ones units saturate and gradients
    explode.

    Parameters
    ----------
    smallest (default 0.05): fire when std * sqrt(fan_in) is below it.
    largest (default 20): fire when std * sqrt(fan_in) is above it.

    Example output
    --------------
    all 4096 elements of layer1.weight are 0.05 before the first step (step 0): its units can only learn the same.

    How to fix
    ----------
    Use the default initialisation of the framework, or He (ReLU) and Glorot (tanh); leave zero to biases and to
    outputs that are added to something else.

    References
    ----------
    Glorot, Bengio: Understanding the difficulty of training deep feedforward neural networks, AISTATS 2010. He et al.:
    Delving deep into rectifiers, ICCV 2015.
    """

    name: ClassVar[str] = "initial_weights"

    smallest: float = parameter(0.05, minimum=0, help="fire when std * sqrt(fan_in) is below it")
    largest: float = parameter(20.0, minimum=0, help="fire when std * sqrt(fan_in) is above it")

    def needs(self) -> Needs:
        """Read the first weights, and the first gradients."""
        return Needs(STATISTICS, roles=("weight",), modes=("train", "global"))

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge training steps."""
        return training_mode(self, present)

    def select(self, catalogue: Mapping[str, TensorInfo]) -> list[str]:
        """Take weights with two axes or more that are seen before their update."""
        infos = {name: catalogue[name] for name in super().select(catalogue) if len(catalogue[name].shape) >= 2}
        # One unit alone cannot be like another one.
        return [name for name, info in infos.items() if min(info.shape[:2]) > 1 and info.moment != "after"]

    def kinds(self) -> tuple[Kind, ...]:
        """Zero, constant, too small, too large."""
        return (
            Kind("abs_max", 0.0, "zero", lower_is_worse=True),
            Kind("std", 0.0, "constant", lower_is_worse=True),
            Kind("std_sqrt_fan_in", self.smallest, "too small", lower_is_worse=True),
            Kind("std_sqrt_fan_in", self.largest, "too large"),
        )

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge the first saved weights of each worker."""
        frozen = [n for n, info in view.catalogue.items() if info.requires_grad is False and info.role == "weight"]
        if frozen:
            return Verdicts(not_applicable=f"the run tunes a part of a model: {frozen[0]} requires no gradients")
        if any(attempt.attempt > 0 for worker in view.run.workers() for attempt in view.run.attempts(worker)):
            return Verdicts(not_applicable="the run was resumed")
        troubles, judged, detail = [], dict[str, None](), ""
        for worker, mode in places(self, view):
            log = view.log(worker)
            trained = log.step[log.mode == mode]
            table = view.table(names, STATISTICS, mode, worker)
            if not len(table.steps):
                continue
            if table.steps[0] != trained[0] or table.mode_steps[0] != 0:
                detail = f"the first weights saved are those of step {table.steps[0]}, after training had begun"
                continue
            found = self._found(table)
            judged.update({table.infos[column].name: None for column in np.flatnonzero(table.present[0])})
            counts = [list(found.values()).count(kind) for kind in range(4)]
            most = [kind != SMALL and count > 1 and 2 * count >= len(table.infos) for kind, count in enumerate(counts)]
            troubles += [self._trouble(table, column, kind, most[kind]) for column, kind in found.items()]
        return Verdicts(
            troubles=troubles, judged=list(judged), steps=int(bool(judged)), seen=int(bool(detail)), detail=detail
        )

    def grade(self, facts: Facts, course: Course) -> Severity:
        """What the training copes with is a warning."""
        hurt = course.learned is not True or hurts(course, facts.step)
        return self.severity if hurt or facts.note.endswith(MOST) else milder(self.severity)

    def message(self, facts: Facts) -> str:
        """Say what the weights are."""
        return facts.note

    def hint(self, facts: Facts) -> str:
        """Say what to use."""
        return "Use the framework's default initialisation, or He's for ReLU and Glorot's for tanh and sigmoid."

    def _found(self, table: Table) -> dict[int, int]:
        """Return the kind of fault by column."""
        first = {name: matrix[0] for name, matrix in table.statistics.items()}
        scale = first["std"] * np.sqrt([fan_in(info) for info in table.infos])
        with np.errstate(all="ignore"):
            alike = (first["std"] <= SPREAD * np.abs(first["mean"])) & (first["count"] > 1)
            zero = first["abs_max"] == 0
            every = zero.sum() > 1 and bool(zero[table.present[0]].all())
            wrong = [zero & (every | _idle(table)), alike & ~zero]
            wrong += [(scale < self.smallest) & ~alike & ~zero, scale > self.largest]
        return {int(column): kind for kind in (LARGE, SMALL, CONSTANT, ZERO) for column in np.flatnonzero(wrong[kind])}

    def _trouble(self, table: Table, column: int, kind: int, most: bool) -> Trouble:
        info, step = table.infos[column], int(table.steps[0])
        first = {name: float(matrix[0, column]) for name, matrix in table.statistics.items()}
        scale = first["std"] * fan_in(info) ** 0.5
        if kind in (ZERO, CONSTANT):
            does = "get no gradient" if kind == ZERO else "can only learn the same"
            note = (
                f"all {first['count']:.0f} elements of {info.name} are {first['mean']:.3g} before the first step (step "
                f"{step}): its units {does}."
            )
        else:
            limit = f"below {self.smallest:g}" if kind == SMALL else f"above {self.largest:g}"
            note = (
                f"the elements of {info.name} have a standard deviation of {first['std']:.3g} before the first step "
                f"(step {step}); times the root of its {fan_in(info)} inputs that is {scale:.3g}, {limit}."
            )
        return Trouble(
            tensor=info.name,
            worker=table.worker,
            mode=table.mode,
            step=step,
            last_step=step,
            violations=1,
            judged=1,
            worst={ZERO: 0.0, CONSTANT: first["std"]}.get(kind, scale),
            kind=kind,
            note=note + (MOST if most else ""),
        )


def _idle(table: Table) -> Bools:
    """Tell which weights get no gradient at the beginning, or stay zero where gradients were not saved."""
    gradient: Floats = table.statistics["gradient.abs_max"][:BEGINNING]
    weight: Floats = table.statistics["abs_max"][:BEGINNING]
    seen = np.where(np.isnan(gradient).all(axis=0), weight, gradient)
    known = ~np.isnan(seen)
    idle: Bools = (known.sum(axis=0) >= ENOUGH) & ~(seen > 0).any(axis=0)
    return idle
