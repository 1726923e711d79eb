"""The default statistics of many small arrays at once: packed into one buffer, and computed by segment.

A call of NumPy costs about a microsecond, which is more than the work on a small array. So the arrays are put end to
end as float64, a block at a time, and each call treats all arrays of the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from .stats_extra import Array, Floats, is_numeric
from .stats_kernel import CANCELLED, HUGE, TINY, Passes

SMALL = 1 << 14  # elements; larger arrays are faster one by one
_FEW = 3  # so many arrays are faster one by one
_CAPACITY = 1 << 16  # elements of a block: many, for each call costs, but still in the cache
_CHARS = frozenset("?bBhHiIlLqQefd")


def packable(arrays: Sequence[Array]) -> list[int]:
    """Return which of `arrays` packed takes: those that are small, not empty, and of real numbers.

    None if these are few. bfloat16 and the like, whose dtypes have letters of their own, are among them.
    """
    small = [i for i, array in enumerate(arrays) if 0 < array.size <= SMALL and array.dtype.char in _CHARS]
    if len(small) < len(arrays):
        others = set(range(len(arrays))).difference(small)
        small += [i for i in others if 0 < arrays[i].size <= SMALL and _is_real(arrays[i].dtype)]
    return small if len(small) > _FEW else []


def _is_real(dtype: np.dtype[Any]) -> bool:
    return is_numeric(dtype) and dtype.kind != "c"


def packed(arrays: Sequence[Array], passes: Passes) -> Iterator[tuple[slice, dict[str, Floats]]]:
    """Yield the statistics of packable arrays as (which of them, float64 [so many] by name), in order.

    As those of stats_kernel.cheap: exact, or (what is not a count or an extreme) the same to about 1e-12.
    """
    sizes = np.fromiter(map(attrgetter("size"), arrays), np.int64, len(arrays))
    ends = np.cumsum(sizes)
    buffer = np.empty(min(int(ends[-1]), _CAPACITY) if len(arrays) else 0)
    start, before = 0, 0
    while start < len(arrays):
        stop = int(np.searchsorted(ends, before + _CAPACITY, side="right"))
        part = buffer[: ends[stop - 1] - before]
        flat = [array if array.ndim == 1 else array.reshape(-1) for array in arrays[start:stop]]
        np.concatenate(flat, out=part, casting="unsafe")  # axis=None would copy each array first
        yield slice(start, stop), _segments(part, sizes[start:stop], passes)
        start, before = stop, int(ends[stop - 1])


def _segments(x: Floats, sizes: npt.NDArray[np.int64], passes: Passes) -> dict[str, Floats]:
    """Return the statistics of the segments of `x`, none of them empty (reduceat would take a neighbour's element)."""
    starts = np.cumsum(sizes) - sizes
    n = count = sizes.astype(np.float64)
    nan = posinf = neginf = zeros = np.zeros_like(n)

    def number(hits: npt.NDArray[np.bool_]) -> Floats:
        return np.asarray(np.add.reduceat(hits, starts, dtype=np.float64)) if hits.any() else np.zeros_like(n)

    low, high = np.minimum.reduceat(x, starts), np.maximum.reduceat(x, starts)
    if passes.zeros and not ((low > 0) | (high < 0)).all():
        zeros = number(x == 0)
    finite = None
    if not (np.isfinite(low).all() and np.isfinite(high).all()):  # NaN passes through both
        finite = np.isfinite(x)
        nan, posinf, neginf = number(np.isnan(x)), number(x == np.inf), number(x == -np.inf)
        n = count - nan - posinf - neginf
        low = np.minimum.reduceat(np.where(finite, x, np.inf), starts)
        high = np.maximum.reduceat(np.where(finite, x, -np.inf), starts)
        x = np.where(finite, x, 0.0)
    none = n == 0
    top = np.maximum(-low, high)
    have = {
        "count": count, "nan": nan, "posinf": posinf, "neginf": neginf, "zeros": zeros,
        "min": np.where(none, np.nan, low), "max": np.where(none, np.nan, high), "abs_max": np.where(none, np.nan, top),
    }  # fmt: skip
    if not (passes.sums or passes.squares or passes.absolute):
        return have
    odd = (top > 0) & ~((top > TINY) & (top < HUGE)) & ~none
    exponent = np.where(odd, np.frexp(top)[1], 0)
    if odd.any():  # squares would overflow or vanish: take a power of two as the unit
        x = np.ldexp(x, np.repeat(-exponent, sizes))
    mean = np.add.reduceat(x, starts) / n
    std = l2 = absolute = np.zeros_like(n)
    if passes.squares:
        square = np.add.reduceat(x * x, starts)
        variance = square / n - mean * mean
        cancelled = (variance < CANCELLED * (square / n)) & (low < high)
        if cancelled.any():  # take the deviations themselves
            away = x - np.repeat(mean, sizes)
            if finite is not None:
                away[~finite] = 0.0
            better = np.add.reduceat(away * away, starts) / n - (np.add.reduceat(away, starts) / n) ** 2
            variance = np.where(cancelled, better, variance)
        std = np.where(low == high, 0.0, np.sqrt(np.maximum(variance, 0.0)))
        l2 = np.sqrt(square)
    if passes.absolute:
        absolute = np.add.reduceat(np.abs(x), starts) / n
    if odd.any():
        mean, std, l2, absolute = (np.ldexp(part, exponent) for part in (mean, std, l2, absolute))
    return have | {
        "mean": np.minimum(np.maximum(mean, low), high), "std": std, "l2": l2,
        "l1": np.where(none, 0.0, absolute * n), "abs_mean": absolute,
    }  # fmt: skip
