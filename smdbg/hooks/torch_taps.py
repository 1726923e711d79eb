"""How the PyTorch hook listens: callables that hold nothing alive, and that no saved or copied model drags along."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch


class Tap:
    """Calls a method of its owner with the given facts, as long as the owner lives; its answer is always None.

    A copied or pickled model gets an inert callable of the standard library in its place: so copies are not listened
    to, and a saved model can be loaded where smdbg is not installed.
    """

    def __init__(self, owner: object, method: str, *facts: Any) -> None:
        """Point at a method by its name."""
        self._owner = weakref.ref(owner)
        self._method = method
        self._facts = facts

    def __call__(self, *args: Any) -> None:
        """Pass on what PyTorch says. Traced by a compiler it does nothing, so that it breaks no graph."""
        if torch.compiler.is_compiling():
            return
        owner = self._owner()
        if owner is not None:
            getattr(owner, self._method)(*self._facts, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        """Stand in for it: a bound method that takes anything and returns None."""
        return getattr, (contextlib.nullcontext(), "__exit__")


def recomputes() -> bool:
    """Tell whether a forward pass runs inside a backward pass: activation checkpointing repeats the first one."""
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and current() != -1


def version(tensor: torch.Tensor | None) -> int:
    """Return how often a tensor was changed in place; -1 where nobody counts."""
    try:
        return -1 if tensor is None else int(tensor._version)
    except RuntimeError:
        return -1


def difference(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return after - before in their dtype; of float8, which cannot subtract, in float32."""
    if after.dtype.is_floating_point and after.dtype.itemsize == 1:
        return after.float() - before.float()
    return after - before


_ORDINARY = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
SMALLEST, LARGEST = 1e-15, 1e15  # outside, squares get lost or overflow in float32


def gradient_norm(gradients: Sequence[torch.Tensor]) -> float | None:
    """Return the l2 norm of all gradients together, None of none. No loss of small or huge ones."""
    plain = [_as_strided(g) for g in gradients if g.numel()]
    if not plain:
        return None
    norms = _norms(plain)
    total = math.hypot(*norms)
    if SMALLEST < total < LARGEST:
        return total
    # In float64, on the host: it happens once in a while, or when all is lost.
    return math.hypot(*(float(torch.linalg.vector_norm(g.detach().cpu().double())) for g in plain))


def _as_strided(gradient: torch.Tensor) -> torch.Tensor:
    """Return the elements as an ordinary real tensor of at least 16 bits: what this worker holds of it."""
    if type(gradient) is torch.Tensor and gradient.layout is torch.strided and gradient.dtype in _ORDINARY:
        return gradient
    if hasattr(gradient, "to_local"):
        gradient = gradient.to_local()
    if gradient.layout is not torch.strided:
        gradient = gradient.coalesce().values() if gradient.is_sparse else gradient.to_dense()
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient)
    return gradient.float() if gradient.dtype.itemsize == 1 else gradient


def _norms(gradients: Sequence[torch.Tensor]) -> list[float]:
    """Return the norm of each, with one transfer for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for gradient in gradients:
        groups.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    found: list[float] = []
    for (device, dtype), group in groups.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        norms = torch._foreach_norm(group, 2, dtype=wide)
        found += [n.item() for n in norms] if device.type == "cpu" else torch.stack(norms).tolist()
    return found
