"""Evidence for a link in a chain of blame: how large the tensor was before, what it was made from, which elements."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smdbg.analysis.blame import NOT_FINITE, Sick
from smdbg.analysis.place import (
    BACKWARD,
    FIRST,
    FORWARD,
    LOSS,
    OPTIMIZER,
    UPDATE,
    WEIGHTS,
    Place,
    Places,
    is_gradient_norm,
    phase,
)
from smdbg.analysis.view import View
from smdbg.store.format import TensorInfo

COURSE = 5  # clean saved steps that are told of
INPUTS = 8  # tensors that a bad one was made from, at most
LARGEST = {"float16": 65504.0, "float32": 3.4028235e38, "bfloat16": 3.3895314e38}
NEAR = 0.01  # of the largest number: the next step may well exceed it


@dataclass(frozen=True)
class Scale:
    """The finite size of a tensor at its last clean saved steps: `steps` ascending, with abs_max and l2 at each."""

    steps: tuple[int, ...] = ()
    abs_max: tuple[float, ...] = ()
    l2: tuple[float, ...] = ()

    @property
    def growth(self) -> float | None:
        """Return by which factor abs_max grew from saved step to saved step, None where that cannot be told."""
        known = [value for value in self.abs_max if np.isfinite(value) and value > 0]
        if len(known) < 2:
            return None
        return float((known[-1] / known[0]) ** (1 / (len(known) - 1)))


@dataclass(frozen=True)
class Input:
    """What a tensor was made from, as it was at the newest saved step that can have mattered; `bad`: not finite."""

    name: str
    step: int
    abs_max: float
    bad: bool
    note: str = ""


def scale_before(view: View, one: Sick) -> Scale:
    """Return the size of a tensor at its last saved steps before it went bad."""
    steps, abs_max = view.series(one.name, one.mode, one.worker, "abs_max")
    _, l2 = view.series(one.name, one.mode, one.worker, "l2")
    rows = np.flatnonzero(steps < one.onset[1])[-COURSE:] if one.onset[0] is not None else np.zeros(0, np.int64)
    return Scale(tuple(steps[rows].tolist()), tuple(abs_max[rows].tolist()), tuple(l2[rows].tolist()))


def inputs_of(view: View, one: Sick, places: Places) -> list[Input]:
    """Return what a tensor was made from, of what was saved, as it was when it was made bad."""
    found = []
    for name in depends_on(one.info, places):
        known = {statistic: view.series(name, one.mode, one.worker, statistic) for statistic in NOT_FINITE}
        steps, abs_max = view.series(name, one.mode, one.worker, "abs_max")
        rows = np.flatnonzero(steps <= one.interval[1])
        if not len(rows):
            continue
        row = int(rows[-1])
        bad = any(values[row] > 0 for _, values in known.values())
        size = float(abs_max[row])
        note = _note(places.info(name), one.info, size)
        found.append(Input(name, int(steps[row]), size, bool(bad), note))
    # Of many, what is bad and what is largest tells most.
    telling = sorted(found, key=lambda item: (not item.bad, -np.nan_to_num(item.abs_max)))[:INPUTS]
    return [item for item in found if item in telling]


def size_note(info: TensorInfo, size: float) -> str:
    """Return what is remarkable about the size of a tensor that went bad one saved step later."""
    largest = LARGEST.get(info.dtype)
    if largest is None or not np.isfinite(size) or size < NEAR * largest:
        return ""
    return f"the largest {info.dtype} is {largest:.3g}"


def _note(made_from: TensorInfo, made: TensorInfo, size: float) -> str:
    """Return what is remarkable about the size of what a tensor was made from."""
    late = phase(made) in (OPTIMIZER, UPDATE, WEIGHTS)
    largest = LARGEST.get(made_from.dtype, LARGEST["float32"])
    if late and phase(made_from) == BACKWARD and np.isfinite(size) and size > largest**0.5:
        return f"its square is more than {made_from.dtype or 'float32'} can hold"
    return size_note(made_from, size)


def depends_on(info: TensorInfo, places: Places) -> list[str]:
    """Return the names of the saved tensors that a tensor is made from, as far as roles and orders tell.

    A module's output from its inputs and weights, an input from the output before it, the loss from the last outputs,
    a gradient from the loss, the gradient before it and the module's inputs, an update from gradient and optimizer
    state, a weight from its update, or where none was saved from its gradient.
    """
    part = phase(info)
    if part == FORWARD:
        return _of_forward(info, places)
    if part == LOSS:
        return _last_of(places, FORWARD) or places.within(WEIGHTS)
    if part == BACKWARD:
        return [*places.within(LOSS)[:1], *_nearest(info, places), *_inputs_of_module(info, places)]
    if part == OPTIMIZER and is_gradient_norm(info):
        return places.within(BACKWARD)
    parameter = info.of or info.name
    own = {
        other: [name for name in places.within(other) if places.info(name).of == parameter]
        for other in (BACKWARD, OPTIMIZER, UPDATE)
    }
    if part == OPTIMIZER:
        return own[BACKWARD]
    if part == UPDATE:
        return own[BACKWARD] + own[OPTIMIZER]
    if part == WEIGHTS:
        return own[UPDATE] + own[BACKWARD] + ([] if own[UPDATE] else own[OPTIMIZER])
    return []


def _inputs_of_module(info: TensorInfo, places: Places) -> list[str]:
    """Return the inputs of the module that a tensor belongs to."""
    found = [places.info(name) for name in places.within(FIRST, FORWARD)] if info.module else []
    return [one.name for one in found if one.role == "input" and one.module == info.module]


def _last_of(places: Places, part: int) -> list[str]:
    """Return the tensors of a part of the step that come last in it."""
    names = places.within(part)
    last = max((places.of(name) for name in names), default=None)
    return [name for name in names if places.of(name) == last]


def _nearest(info: TensorInfo, places: Places) -> list[str]:
    """Return the tensors that come just before this one in its part of the step."""
    mine = places.of(info.name)
    before: dict[Place, list[str]] = {}
    for name in places.within(mine[0]):
        if places.of(name) < mine and places.of(name)[1] == mine[1]:
            before.setdefault(places.of(name), []).append(name)
    return before[max(before)] if before else []


def _of_forward(info: TensorInfo, places: Places) -> list[str]:
    """Return what an input or output in the network is made from."""
    if info.role == "input":
        return _nearest(info, places) or places.within(FIRST)
    inputs = _inputs_of_module(info, places)
    weights = [
        name
        for name in places.within(WEIGHTS)
        if info.module and f"{places.info(name).module}.".startswith(f"{info.module}.")
    ]
    return [*(inputs or _nearest(info, places) or places.within(FIRST)), *weights]
