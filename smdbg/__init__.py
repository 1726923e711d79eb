"""smdbg: offline tensor forensics for training runs.

A training writes tensors through a thin hook; afterwards, on any machine, they are listed, sliced, reduced and
checked. The public names below are imported when they are first used, so that `import smdbg` itself is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smdbg import hooks as hooks
    from smdbg.analysis.rule import Finding, Outcome, Rule, Severity
    from smdbg.analysis.run import Run, Tensor, open_run
    from smdbg.analysis.step_rule import StepRule
    from smdbg.hooks.base import Hook
    from smdbg.hooks.config import CollectionConfig, ReductionConfig, SaveConfig

__version__ = "0.1.0"

__all__ = [
    "CollectionConfig",
    "Finding",
    "Hook",
    "Outcome",
    "ReductionConfig",
    "Rule",
    "Run",
    "SaveConfig",
    "Severity",
    "StepRule",
    "Tensor",
    "__version__",
    "open_run",
]

_HOMES = {
    "CollectionConfig": "smdbg.hooks.config",
    "Finding": "smdbg.analysis.rule",
    "Hook": "smdbg.hooks.base",
    "Outcome": "smdbg.analysis.rule",
    "ReductionConfig": "smdbg.hooks.config",
    "Rule": "smdbg.analysis.rule",
    "Run": "smdbg.analysis.run",
    "SaveConfig": "smdbg.hooks.config",
    "Severity": "smdbg.analysis.rule",
    "StepRule": "smdbg.analysis.step_rule",
    "Tensor": "smdbg.analysis.run",
    "open_run": "smdbg.analysis.run",
}

_PARTS = ("hooks",)  # packages that need no import of their own: smdbg.hooks.torch.Hook


def __getattr__(name: str) -> object:
    """Import a public name from its home, or a part of the package, at its first use."""
    home = _HOMES.get(name)
    if home is None and name not in _PARTS:
        raise AttributeError(f"module 'smdbg' has no attribute {name!r}")
    import importlib

    if home is None:
        return importlib.import_module(f"smdbg.{name}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the names of the module, with the public ones that are not imported yet."""
    return sorted({*globals(), *__all__, *_PARTS})
