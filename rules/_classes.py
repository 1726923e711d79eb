"""Labels and predictions as classes: which tensors belong together, and what each element is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from smdbg.analysis.view import View

Array = npt.NDArray[Any]
IGNORED = -100  # what losses leave out by convention


def paired(labels: Sequence[str], predictions: Sequence[str]) -> list[tuple[str, str]]:
    """Return each tensor of labels with the predictions that belong to it, in order; '' where there are none."""
    return [(name, predictions[i] if i < len(predictions) else "") for i, name in enumerate(labels)]


def together(view: View, labels: str, predictions: str, mode: str, worker: int) -> Iterator[tuple[int, Array, Array]]:
    """Yield (step, labels, predictions) where the values of both were kept."""
    steps = sorted(set(view.value_steps(labels, mode, worker)) & set(view.value_steps(predictions, mode, worker)))
    both = (view.values(name, mode, worker, steps) for name in (labels, predictions))
    for (step, value), (_, other) in zip(*both, strict=True):
        yield step, value, other


def as_classes(values: Array) -> Array | None:
    """Return classes as a flat array of whole numbers or text; None where the values are no classes."""
    flat = np.asarray(values).reshape(-1)
    if flat.dtype.kind in "iubUS":
        return flat.astype(np.int64) if flat.dtype.kind in "iub" else flat
    if flat.dtype.kind in "cmM":
        return None
    wide = flat.astype(np.float64)
    if not np.isfinite(wide).all() or (wide != np.rint(wide)).any() or (np.abs(wide) > 2**53).any():
        return None
    return wide.astype(np.int64)


def predicted(labels: Array, predictions: Array, argmax: bool) -> Array | None:
    """Return the predicted classes, one per label; None where the two do not fit each other.

    `argmax`: the largest along the axis that the labels lack. Else predictions of the labels' size are classes, or
    between 0 and 1 the probabilities of class 1.
    """
    given, wanted = np.asarray(predictions), np.asarray(labels)
    if argmax:
        axis = class_axis(wanted, given)
        return None if axis is None else np.asarray(given.astype(np.float64).argmax(axis=axis)).reshape(-1)
    if given.size != wanted.size:
        return None
    found = as_classes(given)
    if found is None and given.dtype.kind not in "USc" and ((given >= 0) & (given <= 1)).all():
        found = (given.reshape(-1) > 0.5).astype(np.int64)
    text = [part.dtype.kind in "US" for part in (wanted, given)]
    return found if text[0] == text[1] else None


def class_axis(labels: Array, predictions: Array) -> int | None:
    """Return the axis of scores that the labels lack: the last one, or axis 1; None where neither fits."""
    for axis in (-1, 1):
        if predictions.ndim > 1 and np.delete(predictions.shape, axis).prod() == labels.size:
            return axis
    return None
