"""Saving the parameters of PyTorch models: where each belongs, what the catalogue says of it, what is yet to save."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from smdbg.hooks import base
from smdbg.hooks.torch_model import Orders, Parameter, is_bias, parameters_of, role_of
from smdbg.select import matcher
from smdbg.store.format import TensorInfo

WEIGHT, GRADIENT, UPDATE, STATE = "weight", "gradient", "update", "state"
TRAINING = ("train", "global")


@dataclass
class OpenParts:
    """What of the models the open step has seen and saved. Names are those of parameters.

    `stepped`: numbers of the optimizers that stepped; `weights`: saved; `gradients`: saved though no optimizer took
    them yet; `complete`: nothing is left for its close; `calls`: (module, input or output) -> tensors so far;
    `initial`: copies of the weights before the first forward pass, while no optimizer is known.
    """

    stepped: set[int] = field(default_factory=set)
    forwards: int = 0
    weights: set[str] = field(default_factory=set)
    gradients: set[str] = field(default_factory=set)
    complete: bool = False
    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    initial: dict[str, torch.Tensor] = field(default_factory=dict)


class Saving(base.Hook):
    """What is known of the registered models, and the saving of their parameters into the open step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Start without models; the arguments are those of the neutral hook."""
        self._roots: list[tuple[weakref.ref[nn.Module], str]] = []
        self._orders = Orders()
        self._open = OpenParts()
        self._owners: dict[str, weakref.ref[Optimizer]] = {}  # parameter -> optimizer that stepped with it
        self._homes: dict[str, dict[str, str]] = {}  # parameter -> kind -> collection
        self._kinds: dict[str, set[str]] = {}  # kind -> collections
        self._infos: dict[str, TensorInfo] = {}
        self._manual: set[str] = set()  # modes in which the user ends the steps
        self._writes_replicated = True
        super().__init__(*args, **kwargs)
        self._patterns = [(matcher(pattern), own.name) for own in self._own.values() for pattern in own.include]

    def _alive(self) -> list[tuple[nn.Module, str]]:
        return [(module, prefix) for ref, prefix in self._roots if (module := ref()) is not None]

    def _parameters(self) -> dict[int, Parameter]:
        """Return id -> parameter of the registered models, as they are now."""
        return parameters_of(self._alive())

    def _held(self, optimizer: Optimizer, ours: dict[int, Parameter]) -> list[tuple[Parameter, int]]:
        """Return those of our parameters that an optimizer holds, with their groups."""
        out = []
        for index, group in enumerate(optimizer.param_groups):
            for tensor in group["params"]:
                parameter = ours.get(id(tensor))
                if parameter is not None:
                    self._owners[parameter.name] = weakref.ref(optimizer)
                    out.append((parameter, index))
        return out

    def _writes(self, tensor: torch.Tensor) -> bool:
        """Tell whether this worker writes a parameter: one writes what all have, each what is sharded."""
        return self._writes_replicated or hasattr(tensor, "to_local")

    def _home(self, name: str, default: str) -> str:
        """Return a name's collection: the user's patterns come first."""
        found = self._named.get(name)
        if found is None:
            found = next((home for matches, home in self._patterns if matches(name)), default)
            self._named[name] = found
        return found

    def _homes_of(self, parameter: Parameter) -> dict[str, str]:
        found = self._homes.get(parameter.name)
        if found is None:
            name = parameter.name
            found = {
                WEIGHT: self._home(name, "biases" if is_bias(name) else "weights"),
                GRADIENT: self._home(f"gradient/{name}", "gradients"),
                UPDATE: self._home(f"update/{name}", "updates"),
                STATE: self._home(f"opt/{name}/", "optimizer_state"),
            }
            self._homes[name] = found
            for kind, home in found.items():
                self._kinds.setdefault(kind, set()).add(home)
        return found

    def _due_kinds(self, kind: str) -> set[str]:
        """Return the collections with tensors of a kind that are due in this step."""
        if not self._kinds:
            for parameter in self._parameters().values():
                self._homes_of(parameter)
        return {home for home in self._kinds.get(kind, ()) if self._due(home)}

    def _info(self, kind: str, parameter: Parameter, group: int | None) -> TensorInfo:
        name = parameter.name if kind == WEIGHT else f"{kind}/{parameter.name}"
        found = self._infos.get(name)
        if found is None:
            tensor = parameter.tensor
            found = self._infos[name] = TensorInfo(
                name,
                self._homes_of(parameter)[kind],
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                role=role_of(parameter) if kind == WEIGHT else kind,
                of="" if kind == WEIGHT else parameter.name,
                module=parameter.path,
                module_class=type(parameter.module).__name__,
                forward_order=self._orders.forward(parameter.path),
                backward_order=self._orders.backward(parameter.path) if kind == GRADIENT else None,
                requires_grad=tensor.requires_grad,
                optimizer_group=group,
                aliases=tuple(parameter.aliases) if kind == WEIGHT else (),
            )
        return found

    def _save_weight(self, parameter: Parameter, group: int | None, copy: torch.Tensor | None = None) -> None:
        """Save a weight: as before the first forward pass if that was kept, else the copy given, else as it is now."""
        self._open.weights.add(parameter.name)
        copy = self._open.initial.pop(parameter.name, copy)
        value = parameter.tensor.detach() if copy is None else copy
        self._save(self._info(WEIGHT, parameter, group), value, owned=copy is not None)

    def _save_gradient(self, parameter: Parameter, group: int | None) -> None:
        if parameter.tensor.grad is not None:
            self._save(self._info(GRADIENT, parameter, group), parameter.tensor.grad.detach())

    def _take_over(self, parameter: Parameter, group: int) -> None:
        """Tell the catalogue who holds a weight that was saved in this step when nobody seemed to hold it."""
        saved = self._row(self._homes_of(parameter)[WEIGHT]).items
        item = saved.get(parameter.name)
        if item is not None and item.info.optimizer_group is None:
            info = self._infos[parameter.name] = replace(item.info, optimizer_group=group)
            saved[parameter.name] = item._replace(info=info)

    def _forget_gradient(self, name: str, home: str) -> None:
        """Take back a gradient that was saved in this step when nobody seemed to hold its parameter."""
        if name in self._open.gradients:
            self._open.gradients.discard(name)
            self._row(home).items.pop(f"gradient/{name}", None)
            self._infos.pop(f"gradient/{name}", None)
            self._catalogued.pop((home, f"gradient/{name}"), None)

    def _save_state(self, optimizer: Optimizer, parameter: Parameter, home: str) -> None:
        state = optimizer.state.get(parameter.tensor)
        for key, value in (state or {}).items():
            if isinstance(value, torch.Tensor):
                info = TensorInfo(f"opt/{parameter.name}/{key}", home, of=parameter.name, module=parameter.path)
                self._save(info, value.detach())

    def _save_unheld(self, ours: dict[int, Parameter]) -> None:
        """Save what no optimizer that ever stepped holds. One that steps later in this step takes over."""
        if self._open.complete:
            return
        waiting = False
        for parameter in self._written(ours):
            owner = self._owners.get(parameter.name)
            if owner is not None and owner() is not None:
                waiting = waiting or parameter.name not in self._open.weights
            else:
                self._save_one(parameter, with_gradient=True)
        self._open.complete = not waiting

    def _save_rest(self) -> None:
        """Save what is left when a step closes: weights of all models, gradients that no optimizer consumes."""
        step = self._open
        if step.complete or not (step.forwards or step.stepped or self._mode in self._manual):
            return
        training = self._mode in TRAINING
        if self._due_kinds(WEIGHT) or (training and self._due_kinds(GRADIENT)):
            for parameter in self._written(self._parameters()):
                owner = self._owners.get(parameter.name)
                self._save_one(parameter, with_gradient=training and (owner is None or owner() is None))

    def _written(self, ours: dict[int, Parameter]) -> Iterator[Parameter]:
        return (p for p in ours.values() if self._writes(p.tensor))

    def _save_one(self, parameter: Parameter, with_gradient: bool) -> None:
        name, homes = parameter.name, self._homes_of(parameter)
        if name not in self._open.weights and self._due(homes[WEIGHT]):
            self._save_weight(parameter, None)
        if with_gradient and name not in self._open.gradients and self._due(homes[GRADIENT]):
            self._open.gradients.add(name)
            self._save_gradient(parameter, None)
