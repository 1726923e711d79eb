"""saturated_activation: units driven into the flat part of their activation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.course import Course
from smdbg.analysis.findings import Facts, Floats, Kind, Severity
from smdbg.analysis.idle_units import (
    Pool,
    Working,
    along,
    bounds_of_share,
    judge_layer,
    sizes,
    trouble_with,
    why_not,
)
from smdbg.analysis.rule import Needs, Sample, parameter
from smdbg.analysis.run_rule import RunRule, Verdicts
from smdbg.analysis.training import milder, places, training_mode
from smdbg.analysis.view import View
from smdbg.select import matcher
from smdbg.stats_extra import as_float64
from smdbg.store.format import TensorInfo

FUNCTIONS = ("sigmoid", "tanh")
EDGE = 1e-6  # outputs closer to the end of their range than this cannot be told from it in single precision


@dataclass(frozen=True, kw_only=True)
class SaturatedActivation(RunRule):
    """Too many units of a tanh or sigmoid layer are saturated.

    What it does
    ------------
    A unit is an index along `axis` of a layer's input, and saturated when the input lies between the thresholds of its
    function in less than `threshold_inactivity` per cent of its observations: over the batch and all other axes. Fires
    when more than `threshold_layer` per cent of a layer's units are saturated. Full values tell exactly; where none
    were kept, the range, mean and spread of each unit (per-feature statistics) give bounds on that share, and a layer
    that the bounds leave open is not judged.

    As it stands, each saved step is judged by itself and layers are found by name. With `module_classes` they are
    found by the class of their module, by their outputs where those were saved; the last layer is left out, for a
    classifier that is sure of itself is saturated. With `derivative` a unit is judged by its output: it is saturated
    when the derivative of the function, on average, is below that share of its largest, which mean and spread tell
    exactly. With `steps` and `observations` a unit is judged over the last saved training steps together.

    Why it matters
    --------------
    In its flat part the derivative of an activation is next to zero, and with it the gradient of everything before.

    Parameters
    ----------
    tensor_regex (default .*tanh.*input|.*sigmoid.*input): names of the inputs to judge.
    threshold_tanh_min, threshold_tanh_max (default -9.4999 and 9.4999): between them a tanh is not saturated.
    threshold_sigmoid_min, threshold_sigmoid_max (default -23 and 16.99999): between them a sigmoid is not saturated.
    threshold_inactivity (%, default 1): a unit inside less often is saturated; 0: one that is never inside.
    threshold_layer (%, default 50): fire when a larger share of the units is saturated.
    axis (default 1): axis of the units; none: the feature axis that the catalogue gives.
    module_classes (default none): judge modules of these classes, Tanh and Sigmoid, instead of by name.
    derivative (%, default none): judge outputs by their mean derivative, in per cent of its largest, and not by time.
    steps (saved steps, default 1): judge a unit over at least so many together; above 1 only those of the training.
    observations (default 0): and over at least so many observations of each unit.
    cautious (true or false, default false): a finding is a warning, unless the run did not learn or the layer was
    saturated from the first saved steps on.

    Example output
    --------------
    40 of 64 units of tanh_input_0 are saturated at step 40 (between -9.4999 and 9.4999 in less than 1 % of 3,200
    observations each).

    How to fix
    ----------
    Scale the inputs, lower the learning rate, look at the initialisation of the layer before, or put a normalisation
    layer in front.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule SaturatedActivation.
    """

    name: ClassVar[str] = "saturated_activation"

    tensor_regex: str = parameter(".*tanh.*input|.*sigmoid.*input", help="names of the inputs to judge")
    threshold_tanh_min: float = parameter(-9.4999, help="a tanh is not saturated above it")
    threshold_tanh_max: float = parameter(9.4999, help="a tanh is not saturated below it")
    threshold_sigmoid_min: float = parameter(-23.0, help="a sigmoid is not saturated above it")
    threshold_sigmoid_max: float = parameter(16.99999, help="a sigmoid is not saturated below it")
    threshold_inactivity: float = parameter(
        1.0, unit="%", minimum=0, maximum=100, help="a unit inside less often is saturated; 0: one that is never inside"
    )
    threshold_layer: float = parameter(
        50.0, unit="%", minimum=0, maximum=100, help="fire when a larger share of the units is saturated"
    )
    axis: int | None = parameter(1, help="axis of the units; none: the feature axis of the catalogue")
    module_classes: tuple[str, ...] = parameter((), help="judge modules of these classes, instead of by name")
    derivative: float | None = parameter(
        None, unit="%", minimum=0, maximum=100, help="judge outputs by their mean derivative, as a share of its largest"
    )
    steps: int = parameter(1, unit="saved steps", minimum=1, help="judge a unit over at least so many together")
    observations: int = parameter(0, minimum=0, help="and over at least so many observations of each unit")
    cautious: bool = parameter(False, help="a warning, unless the run did not learn or it was so from the start")

    def needs(self) -> Needs:
        """Read the size of the layers, and values where they were kept."""
        return Needs(("count",), values=True, minimum=self.steps)

    def applicable(self) -> str | None:
        """Refuse intervals that hold nothing."""
        empty = [name for name in FUNCTIONS if self._interval(name)[0] >= self._interval(name)[1]]
        return f"threshold_{empty[0]}_min is not below threshold_{empty[0]}_max" if empty else None

    def picks(self, info: TensorInfo) -> bool:
        """Pick inputs by name, or inputs and outputs by the class of their module."""
        if self.module_classes:
            return info.role in ("input", "output") and info.module_class in self.module_classes
        return matcher(f"re:{self.tensor_regex}")(info.name)

    def select(self, catalogue: Mapping[str, TensorInfo]) -> list[str]:
        """Return the tensors to judge; by class, of a module with both the outputs alone, and not the last module."""
        chosen = super().select(catalogue)
        if not self.module_classes or self.include or self.collections or self.roles:
            return chosen
        judged = {catalogue[name].module for name in chosen if catalogue[name].role == "output"}
        last = max((info.forward_order for info in catalogue.values() if info.forward_order is not None), default=None)
        infos = [info for name in chosen if (info := catalogue[name]).forward_order != last or last is None]
        return [info.name for info in infos if info.role == "output" or info.module not in judged]

    def looked_for(self) -> str:
        """Return in words which tensors the rule looks for."""
        if self.include or self.collections or self.roles:
            return super().looked_for()
        classes = f"inputs or outputs of {' or '.join(self.module_classes)} modules"
        return classes if self.module_classes else f"names like {self.tensor_regex}"

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge the training only, where steps are pooled."""
        return super().modes(present) if self.steps == 1 else training_mode(self, present)

    def kinds(self) -> tuple[Kind, ...]:
        """Saturated, and ever more so."""
        share = self.threshold_layer / 100
        return Kind("saturated_share", share, "saturated"), Kind("saturated_share", share, "ever more saturated")

    def measure(self, sample: Sample) -> Floats | None:
        """Return how far each unit was at work, float64[units]: share of its values inside, or mean derivative."""
        info, value = sample.info, sample.value
        axis = info.feature_axis if self.axis is None else self.axis
        interval = self._inside(info)
        if interval is None or axis is None or not -value.ndim <= axis < value.ndim or value.dtype.kind in "USO":
            return None
        numbers = np.moveaxis(as_float64(value), axis, 0).reshape(value.shape[axis], -1)
        if not numbers.size or not np.isfinite(numbers).all():  # what is not finite is another rule's
            return None
        if self._by_derivative(info):
            return mean_derivative(self._function(info), numbers.mean(axis=1), numbers.std(axis=1))
        share: Floats = ((numbers > interval[0]) & (numbers < interval[1])).mean(axis=1)
        return share

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each layer on each worker and in each mode."""
        pool, troubles, judged, steps, seen = Pool(self.steps, self.observations), [], [], 0, 0
        loose = unknown = 0
        for name in names:
            interval = self._inside(view.catalogue[name])
            if interval is None:
                unknown += 1
                continue
            for worker, mode in places(self, view):
                series = list(self._series(view, name, mode, worker, interval))
                seen = max(seen, len(series))
                layer = judge_layer(series, self._at_work(view.catalogue[name]), self.threshold_layer / 100, pool)
                loose += len(series) > 0 and not len(layer.steps)
                if len(layer.steps):
                    judged.append(name)
                    steps = max(steps, len(layer.steps))
                trouble = trouble_with(layer, name, worker, mode, pool, self._note(view.catalogue[name], interval))
                troubles += [trouble] if trouble is not None else []
        detail = why_not(pool, self.axis, seen) if not judged else ""
        if unknown == len(names):
            detail = "it cannot tell whether these layers are tanh or sigmoid"
        elif loose and not detail:
            detail = f"of {loose} layers values were not kept, and per-feature statistics leave it open"
        return Verdicts(troubles=troubles, judged=judged, steps=steps, seen=seen, detail=detail)

    def grade(self, facts: Facts, course: Course) -> Severity:
        """Return the severity given; if cautious, an error only where the run did not learn, or it began so."""
        mild = self.cautious and course.learned is not False and facts.before is not None
        return milder(self.severity) if mild else self.severity

    def message(self, facts: Facts) -> str:
        """Say how many units of how many."""
        units, _, how = facts.note.partition("|")
        often = f"; {facts.violations} of {facts.judged} times" if facts.violations > 1 else ""
        return f"{units} of {facts.tensor} are saturated at step {facts.step} ({how}{often})."

    def hint(self, facts: Facts) -> str:
        """Say what to try."""
        return "Scale the inputs, lower the learning rate, or put a normalisation layer in front."

    def _interval(self, function: str) -> tuple[float, float]:
        """Return between what inputs a function is not saturated."""
        if function == "tanh":
            return self.threshold_tanh_min, self.threshold_tanh_max
        return self.threshold_sigmoid_min, self.threshold_sigmoid_max

    def _function(self, info: TensorInfo) -> str:
        """Return the function of a layer, by the class of its module, else by its name; empty if it cannot be told."""
        if info.module_class:  # a hard tanh or the logarithm of a sigmoid is another function
            return info.module_class.lower() if info.module_class.lower() in FUNCTIONS else ""
        return ([""] + [name for name in FUNCTIONS if name in info.name.lower()])[-1]

    def _inside(self, info: TensorInfo) -> tuple[float, float] | None:
        """Return between what values a tensor is not saturated; None where that cannot be told."""
        function = self._function(info)
        if not function:
            return None
        low, high = self._interval(function)
        if info.role != "output":
            return low, high
        bottom, middle, scale = (-1.0, 0.0, 1.0) if function == "tanh" else (0.0, 0.5, 0.5)
        ends = middle + scale * np.tanh(np.array([low, high]) * scale)
        told = ends[0] > bottom + EDGE and ends[1] < 1 - EDGE
        return (float(ends[0]), float(ends[1])) if told or self.derivative is not None else None

    def _by_derivative(self, info: TensorInfo) -> bool:
        """Tell whether a tensor is judged by the mean derivative of its units."""
        return self.derivative is not None and info.role == "output"

    def _at_work(self, info: TensorInfo) -> float:
        """Return below what a unit is saturated."""
        return (self.derivative if self._by_derivative(info) else self.threshold_inactivity) / 100  # type: ignore[operator]

    def _note(self, info: TensorInfo, interval: tuple[float, float]) -> str:
        """Return what the message says of a layer, to be filled in with figures."""
        if self._by_derivative(info):
            how = f"mean derivative below {self.derivative:g} % of its largest over {{seen}} observations each"
        else:
            rarely = f"in less than {self.threshold_inactivity:g} %" if self.threshold_inactivity else "in none"
            how = f"between {interval[0]:g} and {interval[1]:g} {rarely} of {{seen}} observations each"
        return f"{{idle}} of {{units}} units|{how}"

    def _series(
        self, view: View, name: str, mode: str, worker: int, interval: tuple[float, float]
    ) -> Iterator[Working]:
        """Return how often each unit was inside at each saved step: by its values, else bounds by its statistics."""
        counts = sizes(view, name, mode, worker)
        exact = view.measured(self.label, name, mode, worker)
        tables = dict(view.features(name, mode, worker)) if along(self.axis, view.catalogue[name]) else {}
        for step in sorted({*exact, *tables}):
            if step in exact:
                yield Working(step, exact[step], exact[step], counts[step] / len(exact[step]))
            elif len(tables[step]) and np.isfinite(tables[step]).all():
                info, seen = view.catalogue[name], counts[step] / len(tables[step])
                if self._by_derivative(info):
                    mean = mean_derivative(self._function(info), *tables[step][:, 1:3].astype(np.float64).T)
                    yield Working(step, mean, mean, seen)
                else:
                    yield Working(step, *bounds_of_share(tables[step], *interval, seen), seen)


def mean_derivative(function: str, mean: Floats, std: Floats) -> Floats:
    """Return the mean derivative of a function over a unit's values, as a share of its largest, from its outputs.

    That of tanh is 1 - y ** 2, that of the sigmoid y * (1 - y), a quarter at most: both follow from mean and spread.
    """
    square = mean**2 + std**2
    found: Floats = np.maximum(1 - square if function == "tanh" else 4 * (mean - square), 0.0)
    return found
