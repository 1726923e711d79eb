"""How values of every dtype become elements of a Zarr array, and back.

Zarr knows neither bfloat16 nor float8; they are kept as unsigned integers of the same width, bit for bit, with the
true dtype in the catalogue. Text is kept as UTF-8 bytes with one more axis, zero-padded where lengths differ.
"""

from __future__ import annotations

import math
import typing
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smdbg.errors import DamagedData, MissingExtra

Array = NDArray[Any]

_NATIVE = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128".split()
)
_NAMES = {np.dtype(name): name for name in _NATIVE}  # dtype.name itself takes ten times as long
MOST_EMPTY = 1 << 20  # empty texts that take no bytes; a shape that says more is not believed
CASTS = ("float32", "float16", "bfloat16")  # what floats can be cast to for storing
_FLOAT_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_BLOCK = 1 << 15  # elements that are cast at a time: with what is computed of them they stay in the cache
_UNSIGNED = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


def encode(value: object) -> tuple[Array, str, tuple[int, ...]]:
    """Return (elements, dtype name, shape) of any array-like value.

    `elements` is the value in C order and little-endian, as a 1-d array of a Zarr data type; it may share memory with
    the value. `shape` is what is stored: for text it has one axis more, of bytes. Raises TypeError for what no array
    holds (objects, structures).
    """
    array = np.asarray(value)
    if array.dtype in _NAMES:
        return np.ascontiguousarray(array).reshape(-1), _NAMES[array.dtype], array.shape
    kind = array.dtype.kind
    if kind in "US" or array.dtype.name.startswith("StringDType"):
        return _encode_text(array)
    name = array.dtype.name
    if kind in "mM":
        dates = np.ascontiguousarray(array).reshape(-1).astype(array.dtype.newbyteorder("<"), copy=False)
        return dates.view("<i8"), array.dtype.str.lstrip("<>=|"), array.shape
    if name not in _NATIVE:
        # Those of ml_dtypes are of kind V for the most part, some of kind f.
        if array.dtype.type.__module__ != "ml_dtypes" or not _known(name):
            raise TypeError(f"a value of dtype {array.dtype} cannot be kept: numbers, booleans and text can")
        return np.ascontiguousarray(array).reshape(-1).view(_UNSIGNED[array.dtype.itemsize]), name, array.shape
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.astype(flat.dtype.newbyteorder("<"), copy=False), name, array.shape


def _encode_text(array: Array) -> tuple[Array, str, tuple[int, ...]]:
    name = "bytes" if array.dtype.kind == "S" else "str"
    texts = [t if isinstance(t, bytes) else str(t).encode("utf-8", "surrogatepass") for t in array.ravel().tolist()]
    width = max((len(t) for t in texts), default=0)
    if width == 0 and len(texts) > MOST_EMPTY:
        width = 1  # so that there is something stored that bears out their number
    joined = b"".join(t.ljust(width, b"\0") for t in texts)
    return np.frombuffer(joined, np.uint8), name, (*array.shape, width)


def zarr_dtype(name: str) -> str:
    """Return the Zarr data type that elements of a logical dtype are stored as. Raises ValueError if unknown."""
    if name in _NATIVE:
        return name
    if name in ("str", "bytes"):
        return "uint8"
    if name.startswith(("M8", "m8")) and _is_time(name):
        return "int64"
    if name == "bfloat16":
        return "uint16"
    if name.startswith(("float8_", "float6_", "float4_")) or name in ("int4", "uint4", "int2", "uint2"):
        return "uint8"
    raise ValueError(f"unknown dtype {name!r}")


def _is_time(name: str) -> bool:
    try:
        return np.dtype(name).kind in "mM"
    except (TypeError, ValueError, SyntaxError):
        return False


def _known(name: str) -> bool:
    try:
        return bool(zarr_dtype(name))
    except ValueError:
        return False


def decode(elements: Array, name: str, shape: tuple[int, ...]) -> Array:
    """Return stored elements as the value they were: the inverse of `encode`.

    bfloat16 and float8 come back in their own dtype where ml_dtypes is installed, else as float32 (exact). Raises
    DamagedData for a shape that the elements do not have.
    """
    try:
        return _decode(elements, name, shape)
    except ValueError as error:
        raise DamagedData(f"{elements.size} stored elements are no {name} of shape {list(shape)} ({error})") from error


def _decode(elements: Array, name: str, shape: tuple[int, ...]) -> Array:
    if name in ("str", "bytes"):
        return _decode_text(elements, name, shape)
    if name.startswith(("M8", "m8")):
        return elements.view(name).reshape(shape)
    if name in _NATIVE:
        return elements.reshape(shape)
    own = _own_dtype(name)
    if own is not None:
        return elements.view(own).reshape(shape)
    return as_float32(elements, name).reshape(shape)


def _decode_text(elements: Array, name: str, shape: tuple[int, ...]) -> Array:
    *outer, width = shape
    raw = elements.tobytes()
    count = math.prod(outer)
    if count * width != len(raw) or (width == 0 and count > MOST_EMPTY):
        raise ValueError(f"{count} texts of {width} bytes")
    texts = [raw[i * width : (i + 1) * width] for i in range(count)]
    if outer:
        texts = [t.rstrip(b"\0") for t in texts]
    if name == "bytes":
        return np.array(texts, dtype=f"S{max(width, 1)}").reshape(outer)
    try:
        return np.array([t.decode("utf-8", "surrogatepass") for t in texts], dtype=str).reshape(outer)
    except UnicodeDecodeError as error:  # a ValueError, but not of the shape
        raise DamagedData(f"stored text is not UTF-8 ({error})") from error


def cast(elements: Array, name: str, target: str) -> tuple[Array, str]:
    """Return elements of the logical dtype `name` as the narrower float `target`, and the name of what they are.

    `target` is one of CASTS. Rounds to nearest, ties to even; NaN stays NaN, what is too large becomes infinite. Values
    that are no floats, and floats that are not wider than `target`, stay as they are and are not copied.
    """
    if _FLOAT_BYTES.get(name, 0) <= _FLOAT_BYTES[target]:
        return elements, name
    if target == "bfloat16":
        return _to_bfloat16(elements), target
    with np.errstate(all="ignore"):
        return elements.astype(target), target


def _to_bfloat16(elements: Array) -> NDArray[np.uint16]:
    """Return the bits of float32 or float64 elements, rounded to bfloat16: the upper half of a float32."""
    out = np.empty(elements.size, np.uint16)
    carry = np.empty(min(_BLOCK, elements.size), np.uint32)
    for start in range(0, elements.size, _BLOCK):
        block = elements[start : start + _BLOCK]
        single = block if block.dtype == np.float32 else _to_odd_float32(block)
        bits, sums = single.view(np.uint32), carry[: block.size]
        # Just less than half of the last place kept, and the rest of the half where that place is odd.
        np.right_shift(bits, np.uint32(16), out=sums)
        np.bitwise_and(sums, np.uint32(1), out=sums)
        np.add(sums, np.uint32(0x7FFF), out=sums)
        np.add(sums, bits, out=sums)
        np.right_shift(sums, np.uint32(16), out=sums)
        out[start : start + block.size] = sums
        nan = np.isnan(single)
        if nan.any():  # their bits would carry over into those of infinity, or of a number; the quiet bit stays
            out[start : start + block.size][nan] = (bits[nan] >> np.uint32(16)) | np.uint32(0x40)
    return out


def _to_odd_float32(block: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return float64 as float32, inexact ones as the neighbour with an odd last place.

    A number rounded twice to nearest may end on the wrong side of a tie; one that was first made odd does not.
    """
    with np.errstate(all="ignore"):
        single = block.astype(np.float32)
        back = single.astype(np.float64)
        bits = single.view(np.uint32)
        to_even = (back != block) & (bits & np.uint32(1) == 0) & ~np.isnan(block)
        if to_even.any():
            bits[to_even & (np.abs(back) < np.abs(block))] += np.uint32(1)
            bits[to_even & (np.abs(back) > np.abs(block))] -= np.uint32(1)
    return single


def as_float32(elements: Array, name: str) -> NDArray[np.float32]:
    """Return bfloat16 or float8 bits as float32, exactly, without any other package."""
    if name == "bfloat16":
        return (elements.astype(np.uint32) << np.uint32(16)).view(np.float32)
    table = _FLOAT8.get(name)
    if table is None:
        raise MissingExtra(
            f"values of dtype {name} need the package ml_dtypes to be read: pip install 'smdbg[dtypes]'"
        )
    return _float8_table(*table)[elements]


# name -> (exponent bits, mantissa bits, bias, has infinities, negative zero is the only NaN)
_FLOAT8 = {
    "float8_e5m2": (5, 2, 15, True, False),
    "float8_e4m3fn": (4, 3, 7, False, False),
    "float8_e5m2fnuz": (5, 2, 16, False, True),
    "float8_e4m3fnuz": (4, 3, 8, False, True),
    "float8_e4m3b11fnuz": (4, 3, 11, False, True),
}


@cache
def _float8_table(exponent: int, mantissa: int, bias: int, infinities: bool, unsigned_zero: bool) -> Array:
    """Return the 256 values of an 8-bit float (OCP 8-bit floating point specification, and its fnuz variants)."""
    bits = np.arange(256)
    sign = np.where(bits >> 7, -1.0, 1.0)
    power = (bits >> mantissa) & ((1 << exponent) - 1)
    part = bits & ((1 << mantissa) - 1)
    fraction = part / (1 << mantissa)
    size = np.where(power == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * np.exp2(power - bias))
    top = power == (1 << exponent) - 1
    if infinities:
        size = np.where(top, np.where(part == 0, np.inf, np.nan), size)
    elif unsigned_zero:
        size = np.where(bits == 0x80, np.nan, size)
    else:
        size = np.where(top & (part == (1 << mantissa) - 1), np.nan, size)
    return (sign * size).astype(np.float32)


def _own_dtype(name: str) -> np.dtype[Any] | None:
    try:
        import ml_dtypes
    except ImportError:
        return None
    return np.dtype(typing.cast(Any, getattr(ml_dtypes, name))) if hasattr(ml_dtypes, name) else None
