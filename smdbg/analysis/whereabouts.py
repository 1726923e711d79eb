"""Which elements of a tensor are not finite: the first few positions, and the pattern that they make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from smdbg.analysis.tensor import Tensor

FEW = 5  # positions that are named
PART_BYTES = 32 << 20  # of a value that is read at a time


@dataclass(frozen=True)
class Whereabouts:
    """The elements that are not finite at one step: how many, the first few positions, and the pattern in words."""

    step: int
    bad: int
    positions: tuple[tuple[int, ...], ...]
    pattern: str


def whereabouts(tensor: Tensor, mode: str, worker: int, first_bad: int) -> Whereabouts | None:
    """Look at the first full value that was kept at or after the first bad step; None where none was kept.

    A large value is read in parts along its first axis. Raises DamagedData.
    """
    kept = tensor.value_steps(mode, worker)
    later = kept[kept >= first_bad]
    if not len(later):
        return None
    step = int(later[0])
    shape = tensor.shape_at(step, worker)
    per_axis = [np.zeros(size, np.int64) for size in shape]
    positions: list[tuple[int, ...]] = []
    for start, part in _parts(tensor, step, worker, shape):
        bad = _not_finite(part)
        for axis, counts in enumerate(per_axis):
            found = bad.sum(axis=tuple(other for other in range(bad.ndim) if other != axis), dtype=np.int64)
            counts[slice(start, start + len(found)) if axis == 0 else slice(None)] += found
        if len(positions) < FEW:
            flat = np.flatnonzero(bad)[: FEW - len(positions)]
            where = np.stack(np.unravel_index(flat, bad.shape), axis=-1) if shape else np.zeros((len(flat), 0), int)
            positions += [(row[0] + start, *row[1:]) if row else () for row in where.tolist()]
    total = int(per_axis[0].sum()) if shape else len(positions)
    return Whereabouts(step, total, tuple(positions), _pattern(shape, per_axis, total, tensor.info.feature_axis))


def _parts(tensor: Tensor, step: int, worker: int, shape: tuple[int, ...]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Yield (first index, values) of parts along the first axis."""
    size = int(np.prod(shape, dtype=np.int64)) * 8
    if not shape or size <= PART_BYTES:
        yield 0, tensor.value(step, worker)
        return
    rows = max(1, PART_BYTES * shape[0] // size)
    for start in range(0, shape[0], rows):
        yield start, tensor.value(step, worker, (slice(start, min(start + rows, shape[0])),))


def _not_finite(value: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which elements are NaN or infinite; nothing is in a dtype that has neither."""
    if value.dtype.kind == "V" or value.dtype.name.startswith(("bfloat16", "float8")):
        value = value.astype(np.float32)
    if value.dtype.kind not in "fc":
        return np.zeros(value.shape, np.bool_)
    return np.asarray(~np.isfinite(value), np.bool_)


def _pattern(shape: tuple[int, ...], per_axis: list[npt.NDArray[np.int64]], total: int, feature: int | None) -> str:
    """Return in words which part of the tensor is bad: all, whole rows or columns, one channel, or scattered."""
    size = int(np.prod(shape, dtype=np.int64))
    if not total:
        return "none at this step"
    if total == size:
        return "the number itself" if not shape else "all elements"
    if len(shape) < 2:
        return "one element" if total == 1 else "scattered"
    best = ""
    fewest = 0
    for axis, counts in enumerate(per_axis):
        hit = np.flatnonzero(counts)
        if len(hit) == shape[axis]:
            continue
        whole = bool((counts[hit] == size // shape[axis]).all())
        # Whole slices explain more than a bound on an index does; of either, that with the fewest.
        score = len(hit) + (0 if whole else size)
        if not best or score < fewest:
            best, fewest = _slices(axis, hit.tolist(), shape, whole, feature), score
    return best if best and (fewest < size or total > 1) else "one element" if total == 1 else "scattered"


def _slices(axis: int, hit: list[int], shape: tuple[int, ...], whole: bool, feature: int | None) -> str:
    """Return `whole row 5`, `whole columns 0, 1 and 2 more`, `within channel 3`."""
    word = "feature" if axis == feature else ("row", "column")[axis] if len(shape) == 2 else f"index of axis {axis}"
    if axis == feature and len(shape) > 2:
        word = "channel"
    if len(hit) > 1:
        word = word.replace("index", "indices") if word.startswith("index") else f"{word}s"
    if not whole and len(hit) > max(1, shape[axis] // 2):
        return "scattered"
    shown = ", ".join(map(str, hit[:FEW])) + (f" and {len(hit) - FEW} more" if len(hit) > FEW else "")
    return f"{'whole' if whole else 'within'} {word} {shown} (of {shape[axis]})"
