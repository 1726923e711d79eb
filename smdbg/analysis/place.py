"""Where in a training step a tensor comes to be: in the forward pass, with the loss, in the backward pass, after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from smdbg.analysis.course import GRADIENT_NORM
from smdbg.store.format import TensorInfo

FIRST, FORWARD, LOSS, BACKWARD, OPTIMIZER, UPDATE, WEIGHTS, UNKNOWN = range(8)

_BY_ROLE = {
    "input": FIRST,
    "label": FIRST,
    "mask": FIRST,
    "output": FORWARD,
    "prediction": FORWARD,
    "loss": LOSS,
    "metric": LOSS,
    "gradient": BACKWARD,
    "lr": OPTIMIZER,
    "update": UPDATE,
    "weight": WEIGHTS,
    "bias": WEIGHTS,
    "norm": WEIGHTS,
    "embedding": WEIGHTS,
}
_BY_COLLECTION = {
    "inputs": FIRST,
    "labels": FIRST,
    "outputs": FORWARD,
    "predictions": FORWARD,
    "losses": LOSS,
    "metrics": LOSS,
    "gradients": BACKWARD,
    "optimizer_state": OPTIMIZER,
    "updates": UPDATE,
    "weights": WEIGHTS,
    "biases": WEIGHTS,
}

Place = tuple[int, bool, int]  # phase; its order is unknown; its order within the phase


def phase(info: TensorInfo) -> int:
    """Return the part of a training step in which a tensor comes to be, FIRST to WEIGHTS, or UNKNOWN."""
    found = _BY_ROLE.get(info.role, _BY_COLLECTION.get(info.collection, UNKNOWN))
    if found == LOSS and is_gradient_norm(info):
        return OPTIMIZER
    # What goes into a module inside the network is part of the forward pass, not of the data.
    return FORWARD if found == FIRST and info.role == "input" and info.forward_order is not None else found


def is_gradient_norm(info: TensorInfo) -> bool:
    """Tell whether a tensor is the norm over all gradients, as the hooks record it."""
    return info.role == "metric" and info.name.rsplit("/", 1)[-1] == GRADIENT_NORM


def before_update(info: TensorInfo) -> bool:
    """Tell whether a row of this tensor shows what the step before it made: weights, unless saved after the update."""
    return phase(info) == WEIGHTS and info.moment != "after"


@dataclass(frozen=True)
class Places:
    """The order within a training step of the tensors of one catalogue, which is in order of first save.

    `position`: the place in the catalogue; `order`: what sorts a tensor by when, within a step, it comes to be.
    """

    catalogue: Mapping[str, TensorInfo]
    position: Mapping[str, int]
    order: Mapping[str, Place]

    def info(self, name: str) -> TensorInfo:
        """Return what the catalogue knows of a tensor; of a name that is none, nothing."""
        return self.catalogue.get(name) or TensorInfo(name, "")

    def of(self, name: str) -> Place:
        """Return the place of a tensor within a step; a name that is no tensor comes last."""
        return self.order.get(name, (UNKNOWN, True, 0))

    def within(self, *parts: int) -> list[str]:
        """Return the names of the tensors that come to be in some parts of the step, in order of first save."""
        return [name for name, place in self.order.items() if place[0] in parts]


def places_of(catalogue: Mapping[str, TensorInfo]) -> Places:
    """Return the order within a step of the tensors of a catalogue."""
    last: dict[str, int] = {}  # a module that has parts ends after the last of them, though it began before the first
    for path, order in {(info.module, info.forward_order) for info in catalogue.values() if _known_module(info)}:
        if order is not None:
            parts = path.split(".") if path else []
            for depth in range(len(parts) + 1):
                above = ".".join(parts[:depth])
                last[above] = max(last.get(above, order), order)
    position = {name: index for index, name in enumerate(catalogue)}
    return Places(catalogue, position, {name: _place(info, last) for name, info in catalogue.items()})


def _known_module(info: TensorInfo) -> bool:
    """Tell whether the catalogue says which module a tensor belongs to; the path of the outermost one is empty."""
    return bool(info.module or info.module_class)


def _place(info: TensorInfo, last: Mapping[str, int]) -> Place:
    """Return the place of a tensor within a step; `last`: where the last part of a module stands, by its path."""
    part = phase(info)
    order: int | None = None
    if part == FORWARD and info.forward_order is not None:
        begun = info.role == "input"
        end = last.get(info.module, info.forward_order) if _known_module(info) else info.forward_order
        order = 2 * (info.forward_order if begun else end) + (not begun)
    elif part == BACKWARD:
        # Without a recorded order the backward pass runs the forward one the other way round.
        reverse = None if info.forward_order is None else -info.forward_order
        order = info.backward_order if info.backward_order is not None else reverse
    elif part == LOSS:
        order = int(info.role == "metric" or info.collection == "metrics")  # metrics are made from what the loss is
    elif part == OPTIMIZER and is_gradient_norm(info):
        order = 0
    return part, order is None, order or 0
