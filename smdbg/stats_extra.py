"""Kernels under smdbg.stats: reading any array in blocks, bit hash, quantiles, histograms, rows and features.

Nothing here knows the table of statistics. Every function takes whatever NumPy can hold: 0-d, empty, strided, Fortran
order, other byte order, integers, bool, complex, float16, long double, and the bfloat16 and float8 types of ml_dtypes
(which need no import here: NumPy casts them). Values count as float64; complex numbers count by their modulus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import BadSelection

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

BLOCK = 1 << 16  # elements; one float64 block is 512 KiB, so all passes over it stay in the L2 cache
QUANTILES = ("q01", "q05", "q25", "q50", "q75", "q95", "q99")
BINS = 64
HISTOGRAM = tuple(f"histogram_{i:02d}" for i in range(BINS))
FEATURES = ("active", "mean", "std", "min", "max")

LOWEST, HIGHEST = -150, 128  # binary exponents of the outermost buckets; float32 spans -149 to 127
# Binary exponent of the smallest subnormal and of the largest finite value.
NARROW = {"float16": (-24, 15), "bfloat16": (-133, 127), "float8_e4m3fn": (-9, 8), "float8_e5m2": (-16, 15)}

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # the increment and the two factors of splitmix64
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def as_array(value: Any) -> Array:
    """Return `value` as a NumPy array whose elements are plain bytes; BadSelection for Python objects."""
    array = np.asarray(value)
    if array.dtype.hasobject:
        if array.dtype.kind != "T":
            raise BadSelection("Statistics need numbers, and the array holds Python objects. Convert it first.")
        array = array.astype(str)
    return array


def is_numeric(dtype: np.dtype[Any]) -> bool:
    """Return whether elements of `dtype` are numbers (ml_dtypes included); strings, dates and records are not."""
    return dtype.kind in "biufc" or (dtype.kind == "V" and dtype.type is not np.void)


def blocks(array: Array, order: str = "K") -> Iterator[Array]:
    """Yield the elements as native 1-d blocks of at most BLOCK; a block is only valid until the next one.

    `order` "K" is whatever reads memory fastest, "C" is row by row. What is contiguous already is not copied.
    """
    flat = None
    plain = array.dtype.isnative and array.flags.aligned
    if array.flags.c_contiguous:
        flat = array.reshape(-1)
    elif order == "K" and array.flags.f_contiguous:
        flat = array.T.reshape(-1)
    elif array.size <= BLOCK:  # also because nditer of NumPy 1.26 may yield garbage for 0-d arrays
        flat = array.reshape(-1)
    if flat is not None:
        for start in range(0, flat.size, BLOCK):
            block = flat[start : start + BLOCK]
            yield block if plain else block.astype(array.dtype.newbyteorder("="))
        return
    flags: Any = ["external_loop", "buffered"]
    how: Any = [["readonly", "nbo", "aligned", "contig"]]
    yield from np.nditer(array, flags=flags, op_flags=how, order=order, buffersize=BLOCK)  # type: ignore[call-overload]


def as_float64(block: Array, out: Floats | None = None) -> Floats:
    """Return the elements as float64, complex ones as modulus, in `out` (same shape) where given.

    NaN in either part of a complex number gives NaN, an infinity otherwise gives +inf. Not numeric: all NaN.
    """
    result = np.empty(block.shape) if out is None else out
    if block.dtype.kind == "c":
        wide = block.astype(np.complex128)  # the modulus of a complex64 may overflow float32
        np.hypot(wide.real, wide.imag, out=result)
        result[np.isnan(wide.real) | np.isnan(wide.imag)] = np.nan  # hypot(inf, nan) is inf
    elif block.dtype.kind in "Vf" and block.dtype.itemsize == 1 and block.size > 256 and is_numeric(block.dtype):
        table = np.arange(256, dtype=np.uint8).view(block.dtype).astype(np.float64)  # five times faster than a cast
        np.take(table, block.view(np.uint8), out=result, mode="clip")
    elif is_numeric(block.dtype):
        np.copyto(result, block, casting="unsafe")
    else:
        result.fill(np.nan)
    return result


def _finite_blocks(pieces: Sequence[Array]) -> Iterator[Floats]:
    for block in chain.from_iterable(map(blocks, pieces)):
        values = as_float64(block)
        yield values[np.isfinite(values)]


def hash_bits(array: Any, offset: int = 0) -> tuple[float, float]:
    """Return the (hi, lo) 32-bit halves of a sum over all elements' bits, each mixed with its flat position.

    The position is that in C order, whatever the memory layout or byte order; `offset` is the position of the first
    element, for an array that is a part of a larger one. Each element of up to 8 bytes is one word, a wider one
    several; a word w at position p adds splitmix64(w + (p + 1) * golden), so that one changed bit always changes the
    sum. Both halves are exact in float64. The same values in another dtype have another hash.
    """
    return hash_of_pieces([as_array(array)], offset)


def hash_of_pieces(pieces: Sequence[Array], offset: int = 0) -> tuple[float, float]:
    """Return hash_bits of the concatenation of arrays of one dtype."""
    per = _words_per_element(pieces[0].dtype) if pieces else 1
    largest = max((piece.size for piece in pieces), default=0)
    steps = np.arange(min(largest, BLOCK) * per, dtype=np.uint64) * np.uint64(_GOLDEN)
    mixed, shifted = np.empty_like(steps), np.empty_like(steps)
    position, total = offset * per, 0
    for block in chain.from_iterable(blocks(piece, "C") for piece in pieces):
        words = _words(block, per)
        z, t = mixed[: words.size], shifted[: words.size]
        np.add(steps[: words.size], words, out=z)
        z += np.uint64((position + 1) * _GOLDEN & _WORD)
        for shift, factor in _MIX:
            np.right_shift(z, np.uint64(shift), out=t)
            np.bitwise_xor(z, t, out=z)
            np.multiply(z, np.uint64(factor), out=z)
        np.right_shift(z, np.uint64(31), out=t)
        np.bitwise_xor(z, t, out=z)
        total += int(np.add.reduce(z))
        position += words.size
    total &= _WORD
    return float(total >> 32), float(total & 0xFFFFFFFF)


def _words_per_element(dtype: np.dtype[Any]) -> int:
    return max(1, -(-dtype.itemsize // 8))


def _words(block: Array, per: int) -> Array:
    size = block.dtype.itemsize
    if size in (1, 2, 4, 8):
        return block.view(f"u{size}")
    if block.dtype.char in "gG":  # long double: its padding bytes are arbitrary, so split each into two float64
        wide = block.view(np.longdouble)
        with np.errstate(all="ignore"):
            high = wide.astype(np.float64)
            low = np.where(np.isfinite(high), wide - high, 0).astype(np.float64)
        return np.stack([high, low], axis=-1).reshape(-1).view(np.uint64)
    padded = np.zeros((block.size, per * 8), dtype=np.uint8)
    padded[:, :size] = np.ascontiguousarray(block).view(np.uint8).reshape(block.size, size)
    return padded.reshape(-1).view(np.uint64)


def quantiles(values: Floats, shares: Sequence[float]) -> Floats:
    """Return [..., len(shares)]: quantiles of the finite elements over the last axis, linear between neighbours.

    Shares are in 0..1. NaN where there is no finite element.
    """
    finite = np.isfinite(values)
    n = finite.sum(axis=-1, dtype=np.int64)[..., None]
    if not values.shape[-1]:
        return np.full((*values.shape[:-1], len(shares)), np.nan)
    ordered = np.sort(np.where(finite, values, np.inf), axis=-1)
    last = np.maximum(n - 1, 0)
    at = last * np.asarray(shares, dtype=np.float64)
    below = np.floor(at).astype(np.int64)
    ordered = np.where(np.isinf(ordered), 0.0, ordered)  # rows without a finite element
    a = np.take_along_axis(ordered, below, axis=-1)
    b = np.take_along_axis(ordered, np.minimum(below + 1, last), axis=-1)
    part = at - below
    # Weights rather than a + (b - a) * part, for b - a may overflow.
    return np.where(n == 0, np.nan, np.where(a == b, a, a * (1 - part) + b * part))


def histogram(pieces: Sequence[Array], low: float, high: float) -> Floats:
    """Return 64 counts in equal bins over [low, high], the finite minimum and maximum of all `pieces`.

    Where these are equal, all is in bin 0.
    """
    counts = np.zeros(BINS, dtype=np.int64)
    scale = 1.0 if np.isfinite(high - low) else 0.25
    width = high * scale - low * scale
    for values in _finite_blocks(pieces):
        if width > 0:
            values = np.minimum((values * scale - low * scale) / width * BINS, BINS - 1)
            counts += np.bincount(values.astype(np.intp), minlength=BINS)
        else:
            counts[0] += values.size
    return counts.astype(np.float64)


def exponent_histogram_names(dtype: Any = "float32") -> tuple[str, ...]:
    """Return the names of the exponent buckets that values of `dtype` (a dtype or its name) can fall into.

    `exponent_pos_E` counts elements x with 2**E <= x < 2**(E + 1), `exponent_neg_E` those with -x in that range; zero
    is in none (see zeros). float16, bfloat16 and float8 have a bucket for each of their exponents; all else has -150
    to 128, of which the outermost two also take what lies beyond.
    """
    low, high = NARROW.get(str(dtype), (LOWEST, HIGHEST))
    return tuple(f"exponent_{sign}_{e}" for sign in ("pos", "neg") for e in range(low, high + 1))


def exponents(pieces: Sequence[Array]) -> dict[str, float]:
    """Return the count of finite non-zero elements of all `pieces`, by exponent_histogram_names("float32")."""
    width = HIGHEST - LOWEST + 1
    counts = np.zeros(2 * width, dtype=np.int64)
    for values in _finite_blocks(pieces):
        values = values[values != 0]
        bucket = np.clip(np.frexp(values)[1] - 1, LOWEST, HIGHEST) - LOWEST
        counts += np.bincount(bucket + width * (values < 0), minlength=2 * width)
    return dict(zip(exponent_histogram_names(), counts.tolist(), strict=True))


def underflow_share(names: Sequence[str], counts: Any, dtype: Any) -> Floats:
    """Return the share (0..1) of non-zero finite elements below the smallest subnormal of `dtype`.

    `counts` is [..., len(names)], names as of compute; those that are no exponent bucket are passed over. `dtype` is
    float16, bfloat16, float8_e4m3fn or float8_e5m2. Exact to a power of two. 0 where nothing is non-zero.
    """
    return _share(names, counts, lambda e: e < _span(dtype)[0])


def overflow_share(names: Sequence[str], counts: Any, dtype: Any) -> Floats:
    """Return the share (0..1) of non-zero finite elements beyond the exponents of `dtype`; see underflow_share."""
    return _share(names, counts, lambda e: e > _span(dtype)[1])


def _span(dtype: Any) -> tuple[int, int]:
    if str(dtype) not in NARROW:
        raise BadSelection(f"Underflow and overflow shares are known for {', '.join(NARROW)}, not for {dtype}.")
    return NARROW[str(dtype)]


def _share(names: Sequence[str], counts: Any, beyond: Any) -> Floats:
    columns = [i for i, name in enumerate(names) if name.startswith("exponent_")]
    chosen = [i for i in columns if beyond(int(names[i].rsplit("_", 1)[1]))]
    table = np.asarray(counts, dtype=np.float64)
    whole = table[..., columns].sum(axis=-1)
    part = table[..., chosen].sum(axis=-1)
    return np.where(whole == 0, 0.0, part / np.where(whole == 0, 1.0, whole))


def product(values: Floats) -> Floats:
    """Return the product of the finite elements over the last axis, 1 if none; no partial product overflows."""
    mantissa, exponent = np.frexp(np.where(np.isfinite(values), values, 1.0))
    power = exponent.sum(axis=-1, dtype=np.int64)
    while mantissa.shape[-1] > 1:
        if mantissa.shape[-1] % 2:
            mantissa = np.concatenate([mantissa, np.ones((*mantissa.shape[:-1], 1))], axis=-1)
        mantissa, exponent = np.frexp(mantissa[..., ::2] * mantissa[..., 1::2])
        power = power + exponent.sum(axis=-1, dtype=np.int64)
    return np.asarray(np.ldexp(mantissa.prod(axis=-1), np.clip(power, -4000, 4000).astype(np.int32)))


def row_statistic(name: str, values: Floats) -> Floats:
    """Return one statistic of compute's default, median or prod, over the last axis of float64 `values`."""
    finite = np.isfinite(values)
    n = finite.sum(axis=-1, dtype=np.float64)
    clean = np.where(finite, values, 0.0)
    if name in ("count", "nan", "posinf", "neginf"):
        hit = {"count": None, "nan": np.isnan(values), "posinf": values == np.inf, "neginf": values == -np.inf}[name]
        return np.full(n.shape, float(values.shape[-1])) if hit is None else hit.sum(axis=-1, dtype=np.float64)
    if name == "zeros":
        return np.asarray((finite & (values == 0)).sum(axis=-1, dtype=np.float64))
    if name == "prod":
        return product(values)
    if name == "median":
        return quantiles(values, (0.5,))[..., 0]
    low = np.where(finite, values, np.inf).min(axis=-1, initial=np.inf)
    high = np.where(finite, values, -np.inf).max(axis=-1, initial=-np.inf)
    if name in ("min", "max", "abs_max"):
        return np.where(n == 0, np.nan, {"min": low, "max": high, "abs_max": np.maximum(-low, high)}[name])
    # In units of a power of two near the largest element, squares and sums neither overflow nor vanish.
    exponent = np.frexp(np.where(n == 0, 0.0, np.maximum(-low, high)))[1]
    clean = np.ldexp(clean, -exponent[..., None])
    n1 = np.maximum(n, 1)
    if name in ("l1", "abs_mean"):
        total = np.abs(clean).sum(axis=-1)
        return np.ldexp(total, exponent) if name == "l1" else np.where(n == 0, np.nan, np.ldexp(total / n1, exponent))
    if name == "l2":
        return np.asarray(np.ldexp(np.sqrt((clean * clean).sum(axis=-1)), exponent))
    mean = np.clip(clean.sum(axis=-1) / n1, np.ldexp(low, -exponent), np.ldexp(high, -exponent))
    if name == "std":
        away = np.where(finite, clean - mean[..., None], 0.0)
        variance = (away * away).sum(axis=-1) / n1 - (away.sum(axis=-1) / n1) ** 2
        return np.where(n == 0, np.nan, np.ldexp(np.sqrt(np.maximum(variance, 0.0)), exponent))
    return np.where(n == 0, np.nan, np.ldexp(mean, exponent))


def features(array: Any, axis: int) -> npt.NDArray[np.float32]:
    """Return float32 [features, 5]: FEATURES of each index of `axis` over all other axes, finite elements only.

    `active` is the share (0..1) of elements above zero. NaN where a feature has no finite element. Complex: modulus.
    Memory beyond the result is a few float64 copies of one block, or of one slice of the array where that is larger.
    """
    array = as_array(array)
    if not -array.ndim <= axis < array.ndim:
        raise BadSelection(f"Feature axis {axis} is out of range for an array of {array.ndim} axes.")
    moved = np.moveaxis(array, axis, 0)
    if moved.ndim == 1:
        moved = moved[:, None]
    wide, deep = moved.shape[:2]
    step = max(1, BLOCK // max(1, moved.size // max(1, deep)))
    n, active, shift = np.zeros(wide), np.zeros(wide), np.zeros(wide)
    total, square = np.zeros(wide), np.zeros(wide)
    low, high = np.full(wide, np.inf), np.full(wide, -np.inf)

    def parts() -> Iterator[tuple[Floats, npt.NDArray[np.bool_]]]:
        for start in range(0, deep if moved.size else 0, step):
            values = as_float64(moved[:, start : start + step]).reshape(wide, -1)
            yield values, np.isfinite(values)

    with np.errstate(all="ignore"):
        for values, finite in parts():
            n += finite.sum(axis=1)
            active += (values > 0).sum(axis=1) - (values == np.inf).sum(axis=1)
            total += np.where(finite, values, 0.0).sum(axis=1)
            low = np.minimum(low, np.where(finite, values, np.inf).min(axis=1))
            high = np.maximum(high, np.where(finite, values, -np.inf).max(axis=1))
        shift = np.clip(total / n, low, high)
        for values, finite in parts():
            away = np.where(finite, values - shift[:, None], 0.0)
            square += (away * away).sum(axis=1)
        columns = np.stack([active / n, shift, np.sqrt(square / n), low, high], axis=1)
        columns[n == 0] = np.nan
        return columns.astype(np.float32)
