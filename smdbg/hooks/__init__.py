"""What runs inside the training process: a hook a framework, each imported when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smdbg.hooks import base as base
    from smdbg.hooks import config as config
    from smdbg.hooks import torch as torch

_MODULES = ("base", "config", "torch")


def __getattr__(name: str) -> object:
    """Import a hook's module at its first use. Raises ImportError where its framework is not installed."""
    if name not in _MODULES:
        raise AttributeError(f"module 'smdbg.hooks' has no attribute {name!r}")
    import importlib

    return importlib.import_module(f"smdbg.hooks.{name}")


def __dir__() -> list[str]:
    """Return the names of the module, with the hooks that are not imported yet."""
    return sorted({*globals(), *_MODULES})
