"""The hook for PyTorch: register a model, and its weights, gradients, updates and losses are saved as it trains.

    hook = smdbg.hooks.torch.Hook("runs/1")
    hook.register_module(model)
    hook.register_loss(criterion)           # or, for functional losses: hook.record("loss", loss)

Steps follow the training: a step closes at the first forward pass of a registered model after an optimizer stepped, at
a change between train and eval, or when `end_step()` is called. Whoever calls `end_step()` decides alone from then on
(in that mode): that is the exact way where several optimizers step in one iteration, as in a GAN. Call it once before
the loop to have it so from the first step on.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from smdbg.hooks.config import CollectionConfig, ModeConfig, ReductionConfig
from smdbg.hooks.guard import quiet
from smdbg.hooks.torch_events import Events
from smdbg.hooks.torch_model import has_values, is_compiled, modules_of, parameters_of, unwrapped
from smdbg.hooks.torch_saving import OpenParts
from smdbg.hooks.torch_taps import Tap

log = logging.getLogger("smdbg")


class Hook(Events):
    """Saves what a PyTorch training does. Arguments, promises and the other methods are those of `smdbg.Hook`.

    Weights are those that the step's forward pass used, gradients those that the optimizer consumed (clipped,
    unscaled, averaged), updates what the optimizer changed. Learning rates and the gradient norm are kept of every
    step. Only optimizers that hold parameters of registered models count; parameters that none of them holds are
    saved too. With workers='auto', replicated parameters are written by rank 0 alone.
    """

    framework = "pytorch"
    packages = ("torch",)

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        save_config: ModeConfig | None = None,
        reduction_config: ReductionConfig | None = None,
        collections: Sequence[str | CollectionConfig] | None = None,
        hyperparameters: Any = None,
        storage_options: Mapping[str, Any] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        workers: str = "auto",
        resume: bool = False,
        on_error: str = "raise",
        **further: Any,
    ) -> None:
        """Begin the run; see `smdbg.Hook`. Rank and world size come from torch.distributed where that is set up."""
        self._handles: list[Any] = []
        self._root_handles: dict[int, Any] = {}  # id of a model -> handle
        self._losses: list[weakref.ref[nn.Module]] = []
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank = torch.distributed.get_rank() if rank is None else rank
            world_size = torch.distributed.get_world_size() if world_size is None else world_size
        super().__init__(
            url, save_config, reduction_config, collections, hyperparameters, storage_options, rank, world_size,
            workers, resume, on_error, **further,
        )  # fmt: skip
        self._writes_replicated = workers != "auto" or self.rank == 0
        if self._active():
            self._handles.append(register_optimizer_step_pre_hook(Tap(self, "_before_update")))
            self._handles.append(register_optimizer_step_post_hook(Tap(self, "_after_update")))

    # --- set-up ---

    def register_module(self, module: nn.Module, prefix: str = "") -> None:
        """Watch a model. Register the one that the training calls, before or after it is wrapped.

        `prefix`: goes before all names, joined by a dot; needed where two models share names. Raises TypeError for
        what is not a module, ValueError for a module without parameters or with names that are taken.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"register_module takes a torch.nn.Module, not {type(module).__name__}")
        if next(module.parameters(), None) is None:
            raise ValueError(f"{type(module).__name__} has no parameters, so there is nothing to watch")
        new = {p.name: id(p.tensor) for p in parameters_of([(module, prefix)]).values()}
        known = {p.name: id(p.tensor) for p in parameters_of(self._alive()).values()}
        if new and set(new.values()) <= set(known.values()):
            log.warning("smdbg: %s is registered already; once is enough", type(module).__name__)
            return
        taken = [name for name, number in new.items() if known.get(name, number) != number]
        if taken:
            raise ValueError(f"another registered model has {taken[0]!r} too: give this one a prefix of its own")
        self._watch(module, prefix)

    @quiet(None)
    def _watch(self, module: nn.Module, prefix: str) -> None:
        parts: dict[int, tuple[str, nn.Module]] = {}
        for path, part in modules_of(module, prefix):
            parts.setdefault(id(part), (path, part))
        # A model whose part was registered before: only the outermost one tells where a step begins.
        for number in [n for n in self._root_handles if n in parts or n == id(module)]:
            self._root_handles.pop(number).remove()
        self._root_handles[id(module)] = module.register_forward_pre_hook(Tap(self, "_on_root"))
        if not self._roots and not self._explicit:
            self._follow(module)
        self._roots.append((weakref.ref(module), prefix))
        self._foreign.clear()
        if is_compiled(module):
            log.warning(
                "smdbg: %s is compiled, so its parts cannot be watched as they run: no inputs and outputs of modules, "
                "no order of execution. Everything else is saved.",
                type(unwrapped(module)).__name__,
            )
            return
        for path, part in parts.values():
            if has_values(part):
                self._listen(path or type(part).__name__, path, part)

    def _listen(self, name: str, path: str, part: nn.Module) -> None:
        """Attach to one module: for its order, and for inputs and outputs where they are asked for."""
        if not self._orders.complete:
            self._order_handles.append(part.register_forward_pre_hook(Tap(self, "_on_part", path)))
        inputs, outputs = self._home(f"{name}_input_0", "inputs"), self._home(f"{name}_output_0", "outputs")
        if self._wanted(inputs):
            tap = Tap(self, "_on_input", name, path, inputs)
            self._handles.append(part.register_forward_pre_hook(tap, with_kwargs=True))
        if self._wanted(outputs):
            self._handles.append(part.register_forward_hook(Tap(self, "_on_output", name, path, outputs)))

    def register_loss(self, loss: nn.Module) -> None:
        """Save what a loss module returns, as `<class>_output_0`. Raises TypeError for what is not a module."""
        if not isinstance(loss, nn.Module):
            raise TypeError(f"register_loss takes a module, not {type(loss).__name__}: for a value there is record()")
        self._watch_loss(loss)

    @quiet(None)
    def _watch_loss(self, loss: nn.Module) -> None:
        known = [found for ref in self._losses if (found := ref()) is not None]
        if any(found is loss for found in known):
            log.warning("smdbg: %s is registered already; once is enough", type(loss).__name__)
            return
        alike = sum(type(found).__name__ == type(loss).__name__ for found in known)
        name = type(loss).__name__ + (f"_{alike}" if alike else "")
        self._losses.append(weakref.ref(loss))
        self._handles.append(loss.register_forward_hook(Tap(self, "_on_loss", name)))

    # --- what the training says itself ---

    @quiet(None)
    def record(self, name: str, tensor: Any, collection: str = "losses") -> None:
        """Save a value of this step, such as a functional loss: a tensor or a number.

        A single number recorded several times in a step keeps mean, count and last.
        """
        self._take_loss(name, tensor, self._collection_of(name, collection))

    @quiet(None)
    def end_step(self) -> None:
        """Close the current step, if one is open. From the first call on, steps of this mode end only here."""
        self._manual.add(self._mode)
        self._close_step()

    @quiet(None)
    def set_mode(self, mode: str) -> None:
        """Set the mode of the steps to come; the models' `training` flag is not looked at any more."""
        super().set_mode(mode)
        self._explicit = True

    def state_dict(self) -> dict[str, Any]:
        """Return where the training is, to be kept in a checkpoint beside the model's and the optimizer's state.

        A step that has had its update, or its evaluation, is behind whoever resumes, though it is still open for what
        belongs to it. Where steps end by hand, the open one counts as done once `end_step()` was called.
        """
        state = super().state_dict()
        if self._now is not None and self._is_over():
            mode = self._now.mode
            state["step"] += 1
            state["mode_steps"] = {**state["mode_steps"], mode: state["mode_steps"][mode] + 1}
        return state

    # --- the end ---

    def _on_close(self) -> None:
        self._complete_orders()
        for handle in (*self._handles, *self._root_handles.values()):
            handle.remove()
        self._handles, self._root_handles = [], {}
        self._roots, self._losses, self._updating, self._open = [], [], [], OpenParts()
        self._owners.clear()
