"""What the PyTorch hook does when something happens: a forward pass, an optimizer step, the end of a step."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from smdbg.hooks.guard import quiet
from smdbg.hooks.torch_model import Parameter, feature_axis, parameters_of, tensors_in, unwrapped
from smdbg.hooks.torch_saving import GRADIENT, STATE, TRAINING, UPDATE, WEIGHT, OpenParts, Saving
from smdbg.hooks.torch_taps import difference, gradient_norm, recomputes, version
from smdbg.store.format import TensorInfo

log = logging.getLogger("smdbg")

FOREIGN = -1  # in the place of an optimizer's number, for one that holds no parameter of a registered model
_UNSEEN = "forward pass of a registered module"


@dataclass
class _Update:
    """An optimizer step under way: the optimizer's id, our parameters, and copies of what is about to change.

    `witness` and `count`: a parameter and how often it had been changed, which tells a closure's later trials.
    """

    optimizer: int
    ours: dict[int, Parameter] = field(default_factory=dict)
    before: dict[str, torch.Tensor] = field(default_factory=dict)
    unsaved: list[tuple[Parameter, int, torch.Tensor]] = field(default_factory=list)
    witness: weakref.ref[torch.Tensor] | None = None
    count: int = 0


class Events(Saving):
    """The hook's ears: methods that taps call. None of them raises, returns anything, or touches a gradient graph."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Start before anything has happened; the arguments are those of the neutral hook."""
        self._order_handles: list[Any] = []
        self._updating: list[_Update] = []
        self._optimizers: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._foreign: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._explicit = False  # the user set the mode
        super().__init__(*args, **kwargs)

    # --- forward passes ---

    @quiet(None)
    def _on_root(self, module: nn.Module, args: Any) -> None:
        if not self._updating:  # a closure's forward passes belong to the step that is under way
            if not self._explicit:
                self._follow(module)
            if self._is_over():
                self._close_step()
        self._open_step()
        self._open.forwards += 1
        if not self._optimizers and not self._updating and self._mode in TRAINING:
            self._keep_initial(module)

    def _is_over(self) -> bool:
        """Tell whether the next forward pass begins a new step: the open one has had its update, or its evaluation."""
        if self._mode in self._manual:
            return False
        return bool(self._open.stepped) if self._mode in TRAINING else self._open.forwards > 0

    def _follow(self, module: nn.Module) -> None:
        mode = "train" if unwrapped(module).training else "eval"
        if mode != self._mode:
            self._close_step()
            self._mode = mode

    def _keep_initial(self, module: nn.Module) -> None:
        """Copy the weights while no optimizer is known: if none ever steps, this is the only moment to see them."""
        due = self._due_kinds(WEIGHT)
        if due:
            prefix = next((prefix for ref, prefix in self._roots if ref() is module), "")
            for parameter in parameters_of([(module, prefix)]).values():
                wanted = self._homes_of(parameter)[WEIGHT] in due and self._writes(parameter.tensor)
                if wanted and parameter.name not in self._open.initial:
                    self._open.initial[parameter.name] = parameter.tensor.detach().to("cpu", copy=True)

    @quiet(None)
    def _on_part(self, path: str, module: nn.Module, args: Any) -> None:
        self._orders.note(path)

    @quiet(None)
    def _on_input(self, name: str, path: str, home: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._take_values("input", name, path, home, module, (args, kwargs))

    @quiet(None)
    def _on_output(self, name: str, path: str, home: str, module: nn.Module, args: Any, output: Any) -> None:
        self._take_values("output", name, path, home, module, output)

    def _take_values(self, role: str, name: str, path: str, home: str, module: nn.Module, value: Any) -> None:
        """Save the tensors of an input or output now: the next module may change them in place."""
        if not self._due(home) or self._at_trial() or recomputes():
            return
        for tensor in tensors_in(value):
            number = self._open.calls.get((name, role), 0)
            self._open.calls[name, role] = number + 1
            info = TensorInfo(
                f"{name}_{role}_{number}",
                home,
                role=role,
                module=path,
                module_class=type(module).__name__,
                forward_order=self._orders.forward(path),
                feature_axis=feature_axis(module, tensor.ndim),
            )
            self._save(info, tensor.detach())

    @quiet(None)
    def _on_loss(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        for number, tensor in enumerate(tensors_in(output)):
            own = f"{name}_output_{number}"
            self._take_loss(own, tensor, self._home(own, "losses"))

    def _take_loss(self, name: str, value: Any, home: str) -> None:
        if not self._due(home) or self._at_trial() or recomputes():
            return
        info = self._infos.get(name)
        if info is None:
            info = self._infos[name] = TensorInfo(name, home, dtype="float64", role=self._plan(home).role)
        if not isinstance(value, torch.Tensor):
            if isinstance(value, int | float | complex):
                self._record(info, _plain(value))
            else:
                self._save(info, value)
        elif value.numel() == 1:
            self._record(info, _plain(value.detach().item()))
        else:
            self._save(info, value.detach())

    def _at_trial(self) -> bool:
        """Tell whether a closure looks at weights that the optimizer only tries: they are not those of this step."""
        if not self._updating or self._updating[0].witness is None:
            return False
        return version(self._updating[0].witness()) != self._updating[0].count

    # --- optimizer steps ---

    @quiet(None)
    def _before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._counts(optimizer):
            return
        known = [update.optimizer for update in self._updating]
        if id(optimizer) in known:  # its last step ended in an exception
            del self._updating[known.index(id(optimizer)) :]
        update = _Update(id(optimizer))
        self._updating.append(update)
        if len(self._updating) > 1:  # an optimizer that uses another one: the outer one counts
            return
        number = self._optimizers[optimizer]
        if number in self._open.stepped and self._mode not in self._manual:
            if not self._open.forwards:
                self._warn_unseen()
            self._close_step()
        first = next((p for group in optimizer.param_groups for p in group["params"]), None)
        if first is not None:
            update.witness, update.count = weakref.ref(first), version(first)
        weights, updates = self._due_kinds(WEIGHT), self._due_kinds(UPDATE)
        if weights or updates:
            update.ours = self._parameters()
            for parameter, group in self._held(optimizer, update.ours):
                self._before_one(update, parameter, group, weights, updates)

    def _before_one(
        self, update: _Update, parameter: Parameter, group: int, weights: set[str], updates: set[str]
    ) -> None:
        homes, tensor = self._homes_of(parameter), parameter.tensor.detach()
        if not self._writes(tensor):
            return
        wanted = homes[WEIGHT] in weights and parameter.name not in self._open.weights
        changing = homes[UPDATE] in updates
        # With a closure the first forward pass is still to come; the catalogue is to know the order it will take.
        early = wanted and not self._orders.begun
        copy = tensor.clone() if changing or early else None
        if changing and copy is not None:
            update.before[parameter.name] = copy
        if homes[WEIGHT] in weights and not wanted:
            self._take_over(parameter, group)
        elif early and copy is not None:
            update.unsaved.append((parameter, group, copy))
        elif wanted:
            self._save_weight(parameter, group, copy)

    @quiet(None)
    def _after_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        known = [update.optimizer for update in self._updating]
        if id(optimizer) not in known:
            if not self._updating and self._open.forwards:
                # It holds nothing of ours, as when the model was replaced after the optimizer was made: the step is
                # over all the same, and shows weights that do not move.
                self._open.stepped.add(FOREIGN)
            return
        update = self._updating[known.index(id(optimizer))]
        del self._updating[known.index(id(optimizer)) :]
        if self._updating:
            return
        for parameter, group, copy in update.unsaved:
            self._save_weight(parameter, group, copy)
        number = self._optimizers[optimizer]
        self._open.stepped.add(number)
        if self._due("metrics"):
            self._take_metrics(optimizer, number)
        due = {kind: self._due_kinds(kind) for kind in (WEIGHT, GRADIENT, UPDATE, STATE)}
        if any(due.values()):
            ours = update.ours or self._parameters()
            for parameter, group in self._held(optimizer, ours):
                if self._writes(parameter.tensor):
                    self._after_one(optimizer, update, parameter, group, due)
            self._save_unheld(ours)

    def _after_one(
        self, optimizer: Optimizer, update: _Update, parameter: Parameter, group: int, due: dict[str, set[str]]
    ) -> None:
        homes, name = self._homes_of(parameter), parameter.name
        if homes[GRADIENT] in due[GRADIENT]:
            self._forget_gradient(name, homes[GRADIENT])
            self._save_gradient(parameter, group)
        if homes[UPDATE] in due[UPDATE] and name in update.before:
            value = difference(parameter.tensor.detach(), update.before.pop(name))
            self._save(self._info(UPDATE, parameter, group), value, owned=True)
        if homes[STATE] in due[STATE]:
            self._save_state(optimizer, parameter, homes[STATE])

    def _take_metrics(self, optimizer: Optimizer, number: int) -> None:
        own = f"optimizer{number or ''}"
        for index, group in enumerate(optimizer.param_groups):
            if "lr" in group:
                self._record(self._metric(f"{own}/lr/{index}", "lr"), float(group["lr"]))
        params = (p for group in optimizer.param_groups for p in group["params"])
        with torch.no_grad():
            norm = gradient_norm([p.grad for p in params if p.grad is not None])
        if norm is not None:
            self._record(self._metric(f"{own}/grad_norm", "metric"), norm)

    def _metric(self, name: str, role: str) -> TensorInfo:
        found = self._infos.get(name)
        if found is None:
            found = self._infos[name] = TensorInfo(name, "metrics", dtype="float64", role=role)
        return found

    def _counts(self, optimizer: Optimizer) -> bool:
        """Tell whether an optimizer holds parameters of registered models; it gets a number then."""
        if optimizer in self._optimizers:
            return True
        if optimizer in self._foreign:
            return False
        ours = self._parameters()
        if any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            self._optimizers[optimizer] = max(self._optimizers.values(), default=-1) + 1
            return True
        self._foreign.add(optimizer)
        return False

    def _warn_unseen(self) -> None:
        if _UNSEEN not in self._warned:
            self._warned.add(_UNSEEN)
            log.warning(
                "smdbg: an optimizer stepped twice and no registered module was called in between, so steps end at the "
                "optimizer: register the module that the training calls, after compiling it, or call hook.end_step()"
            )

    # --- the end of a step ---

    def _close_step(self) -> None:
        if self._now is not None:
            if self._mode in TRAINING and (self._open.forwards or self._open.stepped):
                self._complete_orders()
            self._save_rest()
        super()._close_step()
        self._open = OpenParts()

    def _complete_orders(self) -> None:
        self._orders.complete = True
        while self._order_handles:
            self._order_handles.pop().remove()


def _plain(value: Any) -> float | complex:
    return value if isinstance(value, complex) else float(value)
