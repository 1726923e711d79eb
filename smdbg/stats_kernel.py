"""The kernel of the statistics that are kept by default: one pass over blocks that stay in the processor's cache.

What it costs is memory traffic between the caches, so a block is converted to float64 once, and sums are dot products.
Dot products are many short ones in one call: BLAS would spread a long one over threads and take cores from the
training. NumPy releases the interpreter's lock in all of these calls.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .stats_extra import BLOCK, Array, Floats, as_float64

_DOT = 1024  # elements of one dot product; far below the length from which BLAS starts threads
_ONES = np.ones((_DOT, 1))
_ONES32 = np.ones((_DOT, 1), np.float32)
_ONES.flags.writeable = _ONES32.flags.writeable = False
CANCELLED = 1e-6  # below this share of the mean square, a variance from the mean square has lost too many digits
TINY, HUGE = 1e-140, 1e140  # the largest absolute value lies between them, or squares overflow or vanish
NARROW_SIZE = 1 << 14  # float32 elements from which on what cannot cancel is summed as float32
_NARROW_CANCELLED, _NARROW_TINY, _NARROW_HUGE = 0.1, 1e-12, 1e15


@dataclass(frozen=True)
class Passes:
    """Which passes over the elements are to be made."""

    sums: bool
    squares: bool
    absolute: bool
    zeros: bool


def without_finite(counts: dict[str, float]) -> dict[str, float]:
    """Return the statistics of an array without a finite element, with `counts` put in."""
    nothing = math.nan
    blank = {"min": nothing, "max": nothing, "mean": nothing, "std": nothing, "abs_max": nothing, "abs_mean": nothing}
    return {"nan": 0.0, "posinf": 0.0, "neginf": 0.0, "zeros": 0.0, "l1": 0.0, "l2": 0.0, **blank, **counts}


def cheap(blocks: Iterable[Array], size: int, passes: Passes) -> dict[str, float]:
    """Return the statistics of stats.DEFAULT as far as `passes` has them; the others are left at their start values.

    `blocks` are native 1-d arrays of numbers, of at most BLOCK elements each and `size` together.
    """
    nan = posinf = neginf = zeros = n = 0
    low, high = math.inf, -math.inf
    mean = std = l2 = abs_mean = 0.0
    numbers = passes.sums or passes.squares or passes.absolute
    buffer = None
    for block in blocks:
        direct = block.dtype.char in "fd"  # float32 and float64 are scanned where they lie
        if buffer is None and (numbers or not direct):
            buffer = np.empty(min(size, BLOCK))
        x = block if direct or buffer is None else as_float64(block, buffer[: block.size])
        least, most = float(np.minimum.reduce(x)), float(np.maximum.reduce(x))
        if not (math.isfinite(least) and math.isfinite(most)):  # NaN passes through both
            nan += int(np.count_nonzero(np.isnan(x)))
            posinf += int(np.count_nonzero(x == np.inf))
            neginf += int(np.count_nonzero(x == -np.inf))
            x = x[np.isfinite(x)]
            if not x.size:
                continue
            least, most = float(np.minimum.reduce(x)), float(np.maximum.reduce(x))
        low, high = min(low, least), max(high, most)
        k = x.size
        if passes.zeros and least <= 0 <= most:
            zeros += int(np.count_nonzero(x == 0))
        n += k
        if not numbers or buffer is None:
            continue
        m, s, q, a = moments(x, least, most, buffer[:k], passes.squares, passes.absolute)
        if n == k:
            mean, std, l2, abs_mean = m, s, q, a
            continue
        # Shares of the whole, not sums: sums of huge values overflow. Chan et al. for the deviation.
        new, old = k / n, (n - k) / n
        if passes.squares:
            l2 = math.hypot(l2, q)
            gap = math.sqrt(new * old)
            std = math.hypot(std * math.sqrt(old), s * math.sqrt(new), m * gap - mean * gap)
        mean = mean * old + m * new
        abs_mean = abs_mean * old + a * new
    counts = {"count": float(size), "nan": float(nan), "posinf": float(posinf), "neginf": float(neginf)}
    if not n:
        return without_finite(counts)
    if low == high:
        std = 0.0
    return {
        **counts, "min": low, "max": high, "mean": min(max(mean, low), high), "std": std, "l2": l2,
        "abs_max": max(-low, high), "zeros": float(zeros), "l1": abs_mean * n, "abs_mean": abs_mean,
    }  # fmt: skip


def total(values: Array) -> float:
    """Return the sum of 1-d float64 values; of float32 ones that are not negative, to about 1e-7 relative."""
    if values.size < _DOT:
        return float(np.add.reduce(values, dtype=np.float64))
    # A dot product with ones, which stay in the innermost cache, is nearly twice as fast as a sum.
    ones = _ONES if values.dtype == np.float64 else _ONES32
    whole = values.size // _DOT * _DOT
    result = math.fsum(np.matmul(values[:whole].reshape(-1, 1, _DOT), ones).ravel().tolist())
    return result if whole == values.size else result + total(values[whole:])


def square_sum(values: Array) -> float:
    """Return the sum of squares of 1-d float64 values; of float32 ones, to about 1e-7 relative."""
    if values.size < _DOT:
        return float(np.dot(values, values))
    whole = values.size // _DOT * _DOT
    flat = values[:whole]
    result = math.fsum(np.matmul(flat.reshape(-1, 1, _DOT), flat.reshape(-1, _DOT, 1)).ravel().tolist())
    return result if whole == values.size else result + square_sum(values[whole:])


def moments(
    x: Array, low: float, high: float, buffer: Floats, squares: bool, absolute: bool
) -> tuple[float, float, float, float]:
    """Return (mean, std, l2, abs_mean) of finite `x` between low and high; may overwrite `buffer` (x may lie in it)."""
    k, top = x.size, max(-low, high)
    if low == high:
        return low, 0.0, top * math.sqrt(k), top
    if k >= NARROW_SIZE and x.dtype == np.float32 and _NARROW_TINY < top < _NARROW_HUGE:
        return _narrow_moments(x, low, high, buffer, squares, absolute)
    if x.dtype != np.float64:
        np.copyto(buffer, x)
        x = buffer
    exponent = 0
    if not TINY < top < HUGE:  # take a power of two as the unit
        exponent = math.frexp(top)[1]
        x = np.ldexp(x, -exponent, out=buffer)
    mean = total(x) / k
    std = l2 = 0.0
    absolute_mean = abs(mean)
    if squares:
        std, l2 = _deviation(x, mean, square_sum(x))
    if absolute and low < 0 < high:
        absolute_mean = total(np.abs(x, out=buffer)) / k
    if exponent:
        mean, std, l2, absolute_mean = np.ldexp([mean, std, l2, absolute_mean], exponent).tolist()
    return mean, std, l2, absolute_mean


def _deviation(x: Floats, mean: float, square: float) -> tuple[float, float]:
    """Return (std, l2) of `x`, given its mean and its sum of squares."""
    mean_square = square / x.size
    variance = mean_square - mean * mean
    if variance < CANCELLED * mean_square:  # take the deviations themselves
        away = x - mean
        variance = square_sum(away) / x.size - (total(away) / x.size) ** 2
    return math.sqrt(max(variance, 0.0)), math.sqrt(square)


def _narrow_moments(
    x: Array, low: float, high: float, buffer: Floats, squares: bool, absolute: bool
) -> tuple[float, float, float, float]:
    """Return what `moments` does, of float32 `x` whose squares neither overflow nor vanish, to about 1e-7 relative.

    Sums of what is not negative lose nothing to cancellation, and float32 takes half the memory traffic. The plain sum
    may cancel, so it is taken of float64.
    """
    np.copyto(buffer, x)
    mean = total(buffer) / x.size
    std = l2 = 0.0
    if squares:
        mean_square = square_sum(x) / x.size
        variance = mean_square - mean * mean
        if variance < _NARROW_CANCELLED * mean_square:
            std, l2 = _deviation(buffer, mean, square_sum(buffer))
        else:
            std, l2 = math.sqrt(variance), math.sqrt(mean_square * x.size)
    if absolute and low < 0 < high:
        return mean, std, l2, total(np.abs(x, out=buffer.view(np.float32)[: x.size])) / x.size
    return mean, std, l2, abs(mean)
