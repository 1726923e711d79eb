"""dead_relu: units that never activate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.course import Course
from smdbg.analysis.findings import Facts, Kind, Severity
from smdbg.analysis.idle_units import Pool, Working, along, judge_layer, sizes, trouble_with, why_not
from smdbg.analysis.rule import Needs, parameter
from smdbg.analysis.run_rule import RunRule, Verdicts
from smdbg.analysis.training import milder, places, training_mode
from smdbg.analysis.view import View
from smdbg.select import matcher
from smdbg.stats import features
from smdbg.store.format import TensorInfo


@dataclass(frozen=True, kw_only=True)
class DeadRelu(RunRule):
    """Too many units of a ReLU layer never activate.

    What it does
    ------------
    A unit is an index along `axis` of a layer's output, and dead when it is active (above 0) in less than
    `threshold_inactivity` per cent of its observations: over the batch and all other axes. Fires when more than
    `threshold_layer` per cent of a layer's units are dead. Per-feature statistics are used where they were kept (they
    say exactly how often a unit is active), else full values; a layer with neither is not judged.

    As it stands, each saved step is judged by itself and layers are found by name. With `module_classes` they are
    found by the class of their module, and with `steps` and `observations` a unit is judged over the last saved
    training steps together: a unit that is quiet in one batch is not dead.

    Why it matters
    --------------
    Where a ReLU is never active its gradient is zero, so that nothing brings it back. A layer that is dead for the
    most part has lost its capacity; one that is dead wholly cuts off all layers before it.

    Parameters
    ----------
    tensor_regex (default .*[rR]e[lL][uU].*output): names of the outputs to judge.
    threshold_inactivity (%, default 1): a unit active less often is dead; 0: one that is never active.
    threshold_layer (%, default 50): fire when a larger share of the units is dead.
    axis (default 1): axis of the units; none: the feature axis that the catalogue gives.
    module_classes (default none): judge the outputs of modules of these classes, instead of by name.
    steps (saved steps, default 1): judge a unit over at least so many together; above 1 only those of the training.
    observations (default 0): and over at least so many observations of each unit.
    error_layer (%, default none): a finding is a warning, unless a larger share is dead or ever more units die.

    Example output
    --------------
    60 of 64 units of relu1_output_0 are dead at step 40 (active in less than 1 % of 3,200 observations each).

    How to fix
    ----------
    Lower the learning rate, look at the biases and the initialisation of the layer before, or use an activation that
    leaks (LeakyReLU, GELU).

    References
    ----------
    Amazon SageMaker Debugger, built-in rule DeadRelu.
    """

    name: ClassVar[str] = "dead_relu"

    tensor_regex: str = parameter(".*[rR]e[lL][uU].*output", help="names of the outputs to judge")
    threshold_inactivity: float = parameter(
        1.0, unit="%", minimum=0, maximum=100, help="a unit active less often is dead; 0: one that is never active"
    )
    threshold_layer: float = parameter(
        50.0, unit="%", minimum=0, maximum=100, help="fire when a larger share of the units is dead"
    )
    axis: int | None = parameter(1, help="axis of the units; none: the feature axis of the catalogue")
    module_classes: tuple[str, ...] = parameter((), help="judge modules of these classes, instead of by name")
    steps: int = parameter(1, unit="saved steps", minimum=1, help="judge a unit over at least so many together")
    observations: int = parameter(0, minimum=0, help="and over at least so many observations of each unit")
    error_layer: float | None = parameter(
        None, unit="%", minimum=0, maximum=100, help="a warning, unless a larger share is dead or ever more units die"
    )

    def needs(self) -> Needs:
        """Read the size of the outputs; per-feature statistics and values are read as they are there."""
        return Needs(("count",), minimum=self.steps)

    def picks(self, info: TensorInfo) -> bool:
        """Pick outputs by the class of their module, or by name."""
        if self.module_classes:
            return info.role == "output" and info.module_class in self.module_classes
        return matcher(f"re:{self.tensor_regex}")(info.name)

    def looked_for(self) -> str:
        """Return in words which tensors the rule looks for."""
        if self.include or self.collections or self.roles:
            return super().looked_for()
        classes = f"outputs of {' or '.join(self.module_classes)} modules"
        return classes if self.module_classes else f"names like {self.tensor_regex}"

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge the training only, where steps are pooled."""
        return super().modes(present) if self.steps == 1 else training_mode(self, present)

    def kinds(self) -> tuple[Kind, ...]:
        """Dead, and ever more so."""
        share = self.threshold_layer / 100
        return Kind("dead_share", share, "dead"), Kind("dead_share", share, "ever more dead")

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each layer on each worker and in each mode."""
        pool, troubles, judged, steps, seen = Pool(self.steps, self.observations), [], [], 0, 0
        how_often = f"in less than {self.threshold_inactivity:g} % of" if self.threshold_inactivity else "at none of"
        for name in names:
            for worker, mode in places(self, view):
                series = list(self._series(view, name, mode, worker))
                seen = max(seen, len(series))
                layer = judge_layer(series, self.threshold_inactivity / 100, self.threshold_layer / 100, pool)
                if len(layer.steps):
                    judged.append(name)
                    steps = max(steps, len(layer.steps))
                note = f"{{idle}} of {{units}} units|active {how_often} {{seen}} observations each"
                trouble = trouble_with(layer, name, worker, mode, pool, note)
                troubles += [trouble] if trouble is not None else []
        detail = "" if judged else why_not(pool, self.axis, seen)
        return Verdicts(troubles=troubles, judged=judged, steps=steps, seen=seen, detail=detail)

    def grade(self, facts: Facts, course: Course) -> Severity:
        """Return the severity given; with `error_layer`, an error only where more is dead, or ever more."""
        if self.error_layer is None or facts.worst > self.error_layer / 100 or facts.kind.name == "ever more dead":
            return self.severity
        return milder(self.severity)

    def message(self, facts: Facts) -> str:
        """Say how many units of how many."""
        units, _, how = facts.note.partition("|")
        often = f"; {facts.violations} of {facts.judged} times" if facts.violations > 1 else ""
        more = f", and up to {100 * facts.worst:.0f} % of them later" if facts.kind.name == "ever more dead" else ""
        return f"{units} of {facts.tensor} are dead at step {facts.step} ({how}{often}){more}."

    def hint(self, facts: Facts) -> str:
        """Say what to try."""
        return "Lower the learning rate, look at the biases of the layer before, or use an activation that leaks."

    def _series(self, view: View, name: str, mode: str, worker: int) -> Iterator[Working]:
        """Return how often each unit was active at each saved step: from per-feature statistics, else from values."""
        info = view.catalogue[name]
        found = {}
        if along(self.axis, info):
            found = dict(view.features(name, mode, worker))
        axis = info.feature_axis if self.axis is None else self.axis
        missing = [step for step in view.value_steps(name, mode, worker) if step not in found]
        if axis is not None and missing:
            for step, value in view.values(name, mode, worker, missing):
                if -value.ndim <= axis < value.ndim and value.dtype.kind not in "USO":
                    found[step] = features(value, axis)
        counts = sizes(view, name, mode, worker)
        for step in sorted(found):
            active = found[step][:, 0].astype(np.float64)
            if len(active) and np.isfinite(active).all():  # what is not finite is another rule's
                yield Working(step, active, active, counts[step] / len(active))
