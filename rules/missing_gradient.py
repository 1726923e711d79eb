"""missing_gradient: parameters that are to learn and never get a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.course import Course
from smdbg.analysis.rule import Facts, Kind, Needs, Severity, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.training import milder, places, training_mode
from smdbg.analysis.view import View
from smdbg.store.format import TensorInfo


@dataclass(frozen=True, kw_only=True)
class MissingGradient(RunRule):
    """A parameter that is to learn never gets a gradient.

    What it does
    ------------
    Looks for parameters that require gradients and are held by an optimizer, and of which no gradient was ever saved
    in the first `steps` training steps or later, while others have one. It is an error when the parameter's module
    takes part in the forward pass: then something cuts it off from the loss. If the module is never executed, or if
    that is not known, it is a warning. A parameter without gradient that no optimizer holds either is taken for
    frozen on purpose; one with a gradient that no optimizer holds is the business of frozen_parameter.

    Why it matters
    --------------
    A detach(), a no_grad(), a conversion to NumPy or an argmax on the way to the loss cuts off all that lies before
    it. No error is raised, the optimizer passes over parameters without gradient, and the layers behind the cut still
    learn, so the loss falls.

    Parameters
    ----------
    steps (training steps, default 20): judge only runs with at least this many training steps.

    Example output
    --------------
    layer1.weight requires gradients and never had one, from step 0 to step 400, though its module layer1 is executed.

    How to fix
    ----------
    Follow the tensor from this module to the loss and look for detach, no_grad, .data, .item, .numpy, argmax or
    rounding. If the layer is meant to be frozen, say so with requires_grad_(False).

    References
    ----------
    PyTorch, automatic differentiation: detach and no_grad.
    """

    name: ClassVar[str] = "missing_gradient"

    steps: int = parameter(20, unit="training steps", minimum=1, help="judge runs with at least this many")

    def needs(self) -> Needs:
        """Read where parameters and gradients were saved."""
        return Needs(
            ("count",),
            roles=("weight", "bias", "norm", "embedding"),
            collections=("weights", "biases"),
            modes=("train", "global"),
            minimum=self.steps,
        )

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge training steps."""
        return training_mode(self, present)

    def select(self, catalogue: Mapping[str, TensorInfo]) -> list[str]:
        """Take parameters that are to learn."""
        return [name for name in super().select(catalogue) if catalogue[name].requires_grad is not False]

    def kinds(self) -> tuple[Kind, ...]:
        """The number of gradients."""
        return (Kind("gradients", 0.0, lower_is_worse=True),)

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Compare the catalogue's parameters with its gradients."""
        given = {info.of for info in view.catalogue.values() if info.role == "gradient"}
        if not given:
            return Verdicts(not_applicable="the run has no gradients")
        troubles, judged, most = [], dict[str, None](), 0
        for worker, mode in places(self, view):
            log = view.log(worker)
            trained = int(((log.mode == mode) & view.inside(log.step)).sum())
            most = max(most, trained)
            if trained < self.steps:
                continue
            table = view.table(names, (), mode, worker)
            for column in np.flatnonzero(table.present.any(axis=0)).tolist():
                info = table.infos[column]
                judged[info.name] = None
                if info.name not in given and info.requires_grad and info.optimizer_group is not None:
                    troubles.append(_trouble(info, worker, mode, table.steps[table.present[:, column]].tolist()))
        detail = "" if judged else f"saw {most} of the {self.steps} training steps it needs"
        return Verdicts(
            troubles=troubles, judged=list(judged), steps=most if judged else 0, seen=most, detail=detail
        )

    def grade(self, facts: Facts, course: Course) -> Severity:
        """What is not executed may be a part that this training does not use."""
        return self.severity if facts.note else milder(self.severity)

    def message(self, facts: Facts) -> str:
        """Say between which steps it had none, and whether it takes part."""
        part = f"though its module {facts.info.module} is executed" if facts.note else "and its module is not executed"
        return (
            f"{facts.tensor} requires gradients and never had one, from step {facts.step} to step {facts.last_step}, "
            f"{part}."
        )

    def hint(self, facts: Facts) -> str:
        """Say where to look first."""
        if facts.note:
            return "Look for a detach, no_grad, .data, .item or argmax between this module and the loss."
        return "If this parameter is not meant to learn, freeze it with requires_grad_(False); else call its module."


def _trouble(info: TensorInfo, worker: int, mode: str, steps: list[int]) -> Trouble:
    executed = info.forward_order is not None
    return Trouble(
        tensor=info.name,
        worker=worker,
        mode=mode,
        step=steps[0],
        last_step=steps[-1],
        violations=len(steps),
        judged=len(steps),
        worst=0.0,
        note="executed" if executed else "",
    )
