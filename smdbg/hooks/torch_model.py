"""What a PyTorch model says of its tensors: names, roles, aliases, order of execution, feature axes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

# Wrappers and the attribute under which each holds the module it wraps: neither is part of a tensor's name. They are
# told by their class, since a module of the user's may well be called `module`.
_WRAPPERS = {
    "DistributedDataParallel": ("torch.nn.parallel.distributed", "module"),
    "DataParallel": ("torch.nn.parallel.data_parallel", "module"),
    "OptimizedModule": ("torch._dynamo.eval_frame", "_orig_mod"),
    "FullyShardedDataParallel": ("torch.distributed.fsdp.fully_sharded_data_parallel", "_fsdp_wrapped_module"),
    "CheckpointWrapper": ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "_checkpoint_wrapped_module"),
}
_NORM = re.compile(r"(?<!Weight)(?<!Spectral)Norm(\dd)?$")
_LAST_AXIS = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.MultiheadAttention, nn.RNNBase)


def _wrapped_part(module: nn.Module) -> str:
    """Return the attribute that holds the wrapped module, '' if the module is not a wrapper."""
    for base in type(module).__mro__:
        home, part = _WRAPPERS.get(base.__name__, ("", ""))
        if home == base.__module__:
            return part
    return ""


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers (data parallel, compiled, ...)."""
    while part := _wrapped_part(module):
        module = getattr(module, part)
    return module


def is_compiled(module: nn.Module) -> bool:
    """Tell whether the forward pass of a module runs compiled, so that hooks on its parts do not run."""
    while True:
        part = _wrapped_part(module)
        if part == "_orig_mod" or getattr(module, "_compiled_call_impl", None) is not None:
            return True
        if not part:
            return False
        module = getattr(module, part)


def joined(path: str, leaf: str) -> str:
    """Return a name within a path; a prefix may bring its own separator."""
    return f"{path}{leaf}" if not path or path.endswith((".", "/")) else f"{path}.{leaf}"


def modules_of(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of a model and its parts, outer before inner; shared ones once for each path."""
    seen: dict[str, tuple[str, str]] = {}
    for raw, module in root.named_modules(remove_duplicate=False):
        part = _wrapped_part(module)
        above, _, leaf = raw.rpartition(".")
        if not raw:
            path = prefix
        else:
            path, wrapped = seen[above]
            path = path if leaf == wrapped else joined(path, leaf)
        seen[raw] = path, part
        if not part:
            yield path, module


@dataclass(slots=True)
class Parameter:
    """A parameter as it is now. `path` and `module`: its owner's; `aliases`: its further names, if it is tied."""

    name: str
    tensor: torch.Tensor
    path: str
    module: nn.Module
    aliases: list[str] = field(default_factory=list)


def parameters_of(roots: list[tuple[nn.Module, str]]) -> dict[int, Parameter]:
    """Return id -> parameter of all models, given with their prefixes; those not yet initialised are left out."""
    found: dict[int, Parameter] = {}
    for root, prefix in roots:
        for path, module in modules_of(root, prefix):
            for leaf, tensor in module._parameters.items():
                if tensor is None or nn.parameter.is_lazy(tensor):
                    continue
                name = joined(path, leaf)
                known = found.get(id(tensor))
                if known is None:
                    found[id(tensor)] = Parameter(name, tensor, path, module)
                elif name != known.name and name not in known.aliases:
                    known.aliases.append(name)
    return found


def role_of(parameter: Parameter) -> str:
    """Return the role of a parameter: norm and embedding by its module's class, else bias or weight by its name."""
    module = parameter.module
    by_class = isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm)
    if by_class or _NORM.search(type(module).__name__):
        return "norm"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding"
    return "bias" if is_bias(parameter.name) else "weight"


def is_bias(name: str) -> bool:
    """Tell whether a parameter is a bias by its name: `bias`, `in_proj_bias`, `bias_ih_l0`."""
    leaf = re.split(r"[./]", name)[-1]
    return leaf.endswith("bias") or leaf.startswith("bias")


def feature_axis(module: nn.Module, ndim: int) -> int | None:
    """Return the axis of the features of a module's input or output; None where there are none to tell apart."""
    if ndim < 2:
        return None
    return ndim - 1 if isinstance(module, _LAST_AXIS) else 1


def has_values(module: nn.Module) -> bool:
    """Tell whether a module's inputs and outputs are worth a look: it has no parts, or parameters of its own."""
    return next(module.children(), None) is None or any(p is not None for p in module._parameters.values())


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in what a module was given or returned: tuples, lists, mappings and dataclasses of them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)
    elif hasattr(value, "items") and hasattr(value, "values"):
        for part in value.values():
            yield from tensors_in(part)
    elif hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name, None))


class Orders:
    """The order in which modules were first used, by path. Complete once the first training step is over."""

    def __init__(self) -> None:
        """Start before the first forward pass."""
        self.complete = False
        self._first: dict[str, int] = {}

    @property
    def begun(self) -> bool:
        """Tell whether there is, or will never be, anything to know."""
        return self.complete or bool(self._first)

    def note(self, path: str) -> None:
        """Take note that a module begins its forward pass."""
        if not self.complete:
            self._first.setdefault(path, len(self._first))

    def forward(self, path: str) -> int | None:
        """Return a module's place in the forward pass, from 0; None when it was not used."""
        return self._first.get(path)

    def backward(self, path: str) -> int | None:
        """Return a module's place in the backward pass, taken to be the forward pass turned round."""
        at = self._first.get(path)
        return None if at is None else len(self._first) - 1 - at
