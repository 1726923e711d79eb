"""What shows, beside its loss, that a training does not learn: weights that stand still, gradients of zero, chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from smdbg.analysis.course import Course
from smdbg.analysis.view import View

PARAMETERS = ("weight", "bias", "norm", "embedding")
SAME = ("mean", "std", "min", "max", "l2")  # of a tensor that did not change
STILL = 1e-5  # of their size: weights that moved less over the whole run cannot have learnt
ZERO_SHARE = 0.8  # of its saved steps a gradient is zero
BELOW_CHANCE, ABOVE_CHANCE = 0.02, 0.05  # a model that jumps about guesses a little worse than one that stands still



@dataclass(frozen=True)
class Symptom:
    """A second symptom in words.

    `proves`: nothing can be learned while it lasts, however short the run is so far; `of_any_model`: it tells a fault
    also of a model that had learned before.
    """

    text: str
    proves: bool = False
    of_any_model: bool = False


def symptom_of(view: View, mode: str, worker: int, course: Course, level: float) -> Symptom | None:
    """Return the plainest symptom of not learning beside a loss that stands at `level`; None where nothing shows."""
    still = _still(view, mode, worker)
    if still:
        return Symptom(still, proves=True, of_any_model=True)
    zero = _zero_gradient(view, mode, worker)
    if zero:
        return Symptom(zero, proves=True)
    chance = chance_of(view, level)
    if chance:
        return Symptom(chance, of_any_model=True)
    if course.fresh:
        return Symptom("the model had just been initialised, so it had not learned anything before")
    return None


def chance_of(view: View, level: float) -> str:
    """Say which guess a cross-entropy at this level amounts to, '' for none.

    It is ln C for C classes; one output means two.
    """
    if level <= 0:
        return ""
    for classes in sorted(max(count, 2) for count in _outputs(view)):
        if -BELOW_CHANCE < level / math.log(classes) - 1 < ABOVE_CHANCE:
            return f"it is that of guessing among {classes} classes (ln {classes} = {math.log(classes):.4g})"
    return ""


def _outputs(view: View) -> set[int]:
    """Return how many outputs the model may have: the units of its last layer, or the rows of an embedding (tied)."""
    layers = [info for info in view.catalogue.values() if info.role in ("weight", "bias") and info.shape]
    known = [info.forward_order for info in layers if info.forward_order is not None]
    last = [info for info in layers if info.forward_order == max(known)] if known else layers[-1:]
    biases = {info.shape[0] for info in last if info.role == "bias"}
    # Without a bias one cannot tell which axis of a weight is which: frameworks differ.
    ends = {size for info in last if len(info.shape) > 1 for size in (info.shape[0], info.shape[-1])}
    tied = {info.shape[0] for info in view.catalogue.values() if info.role == "embedding" and info.shape}
    return (biases or ends) | tied


def _still(view: View, mode: str, worker: int) -> str:
    """Say that no parameter that can be trained moved to speak of between its first and last saved step."""
    names = [n for n, info in view.catalogue.items() if info.role in PARAMETERS and info.requires_grad is not False]
    for name in names:
        view.plan(view.catalogue[name].collection, SAME)
    table = view.table(names, SAME, mode, worker) if names else None
    if table is None or len(table.steps) < 2:
        return ""
    whole = np.stack([table.statistics[name] for name in SAME])
    both = table.present.all(axis=0)
    if not both.any():
        return ""
    first, last = whole[:, 0, both], whole[:, -1, both]
    size = np.maximum(np.abs(first).max(axis=0), np.abs(last).max(axis=0))
    if (np.abs(last - first) <= STILL * size).all():
        return f"no weight changed between steps {table.steps[0]} and {table.steps[-1]}"
    return ""


def _zero_gradient(view: View, mode: str, worker: int) -> str:
    """Name a weight whose gradient was exactly zero at nearly every saved step."""
    weights = {n for n, info in view.catalogue.items() if info.role == "weight"}
    names = [n for n, info in view.catalogue.items() if info.role == "gradient" and info.of in weights]
    table = view.table(names, ("abs_max", "nan"), mode, worker) if names else None
    if table is None or len(table.steps) < 5:
        return ""
    zero = (table.statistics["abs_max"] == 0) & (table.statistics["nan"] == 0) & table.present
    share = zero.sum(axis=0) / np.maximum(table.present.sum(axis=0), 1)
    if not (share >= ZERO_SHARE).any():
        return ""
    worst = int(share.argmax())
    return f"{names[worst]} was all zero at {zero[:, worst].sum()} of {table.present[:, worst].sum()} saved steps"
