"""The statistics: one definition each, computed from arrays, merged from parts, derived from stored ones.

The same names mean the same numbers everywhere: in the hook, in the store, in rules and in `--reduce`. STATISTICS is
the table. Rules that hold for all of them:

- `count` covers every element. NaN and infinities are counted (`nan`, `posinf`, `neginf`) and left out of all the rest.
- No finite element (empty arrays too): min, max, mean, std, abs_max, abs_mean and quantiles are NaN; norms, zeros and
  bin counts are 0.
- Complex numbers count by their modulus: NaN in a part is nan, else an infinite part is posinf. bool counts as 0 and 1,
  integers and long doubles as float64 (a long double or modulus beyond its range is an infinity).
- Strings, dates and records have a count (and a hash) and no finite element.
- Norms are of the flattened array; std is that of the population.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np

from .errors import BadSelection, near
from .stats_extra import (
    FEATURES,
    HISTOGRAM,
    QUANTILES,
    Array,
    Floats,
    as_array,
    as_float64,
    blocks,
    exponent_histogram_names,
    exponents,
    features,
    hash_bits,
    hash_of_pieces,
    histogram,
    is_numeric,
    overflow_share,
    quantiles,
    row_statistic,
    underflow_share,
)
from .stats_kernel import Passes, cheap, without_finite
from .stats_many import packable, packed

__all__ = [
    "ALWAYS", "DEFAULT", "DERIVED", "EXTRA", "FEATURES", "HASH", "HISTOGRAM", "QUANTILES", "STATISTICS", "STORED",
    "VALUES", "Statistic", "compute", "compute_many", "compute_pieces", "derive", "exponent_histogram_names",
    "features", "from_value", "hash_bits", "merge", "overflow_share", "reduce", "required", "scalar_stats",
    "underflow_share",
]  # fmt: skip


@dataclass(frozen=True)
class Statistic:
    """One statistic: `definition` and `unit` for people, `merge` tells how the numbers of two parts become one."""

    name: str
    definition: str
    unit: str
    merge: str
    group: str


ALWAYS = ("count", "nan", "posinf", "neginf", "min", "max", "mean", "std", "l2", "abs_max")
EXTRA = ("zeros", "l1", "abs_mean")
DEFAULT = ALWAYS + EXTRA
HASH = ("hash_hi", "hash_lo")
DERIVED = ("variance", "sum", "rms", "zero_share", "dynamic_range")
VALUES = ("median", "prod")  # need the values themselves

_SUM, _LEAST, _MOST = "sum", "smaller of the two", "larger of the two"
_ROOT = "root of the sum of squares"
_MEAN = "mean weighted by finite elements; needs count, nan, posinf, neginf"
_STD = "weighted, plus the distance of the means (Chan); needs mean, count, nan, posinf, neginf"
_HASH = "sum of the whole 64 bits modulo 2**64; needs both halves, and hash_bits with offset for the later part"
_NEVER = "cannot be merged"
_DERIVED = "derive again from the merged statistics"
_FINITE = ("count", "nan", "posinf", "neginf")


def _table() -> dict[str, Statistic]:
    v, n = "that of the values", "elements"
    shares = {name: int(name[1:]) for name in QUANTILES}
    rows = [
        ("count", "number of elements, NaN and infinities included", n, _SUM, "always"),
        ("nan", "number of NaN", n, _SUM, "always"),
        ("posinf", "number of +inf", n, _SUM, "always"),
        ("neginf", "number of -inf", n, _SUM, "always"),
        ("min", "smallest finite element", v, _LEAST, "always"),
        ("max", "largest finite element", v, _MOST, "always"),
        ("mean", "mean of the finite elements", v, _MEAN, "always"),
        ("std", "standard deviation of the finite elements (population: divided by n)", v, _STD, "always"),
        ("l2", "root of the sum of squares of the finite elements", v, _ROOT, "always"),
        ("abs_max", "largest absolute value of a finite element", v, _MOST, "always"),
        ("zeros", "number of elements equal to 0", n, _SUM, "extra"),
        ("l1", "sum of the absolute values of the finite elements", v, _SUM, "extra"),
        ("abs_mean", "mean of the absolute values of the finite elements", v, _MEAN, "extra"),
        ("hash_hi", "upper 32 bits of a position-mixed sum over the raw bits", "", _HASH, "hash"),
        ("hash_lo", "lower 32 bits of a position-mixed sum over the raw bits", "", _HASH, "hash"),
        *((q, f"{p} % of the finite elements lie below (linear interpolation)", v, _NEVER, "quantiles")
          for q, p in shares.items()),
        *((h, f"finite elements in bin {i} of {len(HISTOGRAM)} equal ones from min to max", n, _NEVER, "histogram")
          for i, h in enumerate(HISTOGRAM)),
        ("variance", "std squared", "that of the values, squared", _DERIVED, "derived"),
        ("sum", "sum of the finite elements: mean times their number", v, _DERIVED, "derived"),
        ("rms", "l2 divided by the root of the number of finite elements", v, _DERIVED, "derived"),
        ("zero_share", "zeros divided by count", "0..1", _DERIVED, "derived"),
        ("dynamic_range", "max minus min", v, _DERIVED, "derived"),
        ("median", "middle of the finite elements (mean of the middle two)", v, _NEVER, "values"),
        ("prod", "product of the finite elements (1 if there is none)", "", _NEVER, "values"),
        *((e, "finite elements with 2**{2} <= {0}x < twice that".format("-" * ("_neg_" in e), *e.rsplit("_", 1)),
           n, _SUM, "exponents") for e in exponent_histogram_names()),
    ]  # fmt: skip
    return {row[0]: Statistic(*row) for row in rows}


STATISTICS: Mapping[str, Statistic] = _table()
STORED = tuple(name for name, row in STATISTICS.items() if row.group not in ("derived", "values"))


def _look_up(name: str) -> Statistic:
    if name not in STATISTICS:
        known = [n for n, row in STATISTICS.items() if row.group not in ("exponents", "histogram")]
        hint = near(name, known) or " Known: " + ", ".join(known) + "."
        raise BadSelection(f"There is no statistic {name!r}.{hint}")
    return STATISTICS[name]


@lru_cache(maxsize=256)
def _wanted(names: tuple[str, ...]) -> tuple[Passes, frozenset[str]]:
    """Return which passes `names` need, and which of the costlier groups."""
    for name in names:
        if _look_up(name).group in ("derived", "values"):
            raise BadSelection(f"The statistic {name!r} is not stored. Ask for it when reading, from reduce or derive.")
    have = set(names)
    squares, absolute = bool(have & {"std", "l2"}), bool(have & {"l1", "abs_mean"})
    groups = frozenset(STATISTICS[name].group for name in names) - {"always", "extra"}
    return Passes(bool(have & {"mean", "std"}), squares, absolute, "zeros" in have), groups


def compute(array: Any, names: Sequence[str] = DEFAULT) -> Floats:
    """Return float64 [len(names)], the stored statistics of any array, in one blocked pass over memory.

    Only the passes that `names` needs are made. Counts, min and max are exact, the rest agrees with the plain formulas
    in float64 to 1e-5 relative and mostly far better, whatever the scale or the cancellation (mean 1000, std 0.01).
    Raises BadSelection for a name that is not stored and for arrays of Python objects.
    """
    return _stored([as_array(array)], tuple(names))


def compute_pieces(pieces: Sequence[Array], names: Sequence[str] = DEFAULT) -> Floats:
    """Return compute of the concatenation of 1-d arrays of one dtype, which is not made (but for quantiles).

    Pieces may lie anywhere in memory, aligned or not. No pieces at all count as an empty array. Raises BadSelection as
    compute does and for pieces of different dtypes.
    """
    arrays = [as_array(piece) for piece in pieces] or [np.zeros(0)]
    for array in arrays:
        if array.dtype != arrays[0].dtype:
            raise BadSelection(f"Pieces of one value must be of one dtype, not {arrays[0].dtype} and {array.dtype}.")
    return _stored(arrays, tuple(names))


def compute_many(arrays: Sequence[Array], names: Sequence[str] = DEFAULT) -> Floats:
    """Return float64 [len(arrays), len(names)]: compute of each, much faster where many of the arrays are small.

    Counts, min and max are equal to those of compute, the rest is equal to 1e-9 relative and mostly far better. Raises
    BadSelection as compute does.
    """
    names = tuple(names)
    passes, groups = _wanted(names)
    held = [array if type(array) is np.ndarray else as_array(array) for array in arrays]
    out = np.empty((len(held), len(names)))
    small = [] if groups or not names else packable(held)
    with np.errstate(all="ignore"):
        for part, have in packed([held[i] for i in small], passes):
            out[small[part]] = np.stack([have[name] for name in names], axis=1) + 0.0  # no -0.0, as in compute
    if len(small) < len(held):
        for i in set(range(len(held))).difference(small):
            out[i] = compute(held[i], names)
    return out


def _stored(pieces: Sequence[Array], names: tuple[str, ...]) -> Floats:
    passes, groups = _wanted(names)
    size = sum(piece.size for piece in pieces)
    with np.errstate(all="ignore"):
        if is_numeric(pieces[0].dtype):
            parts = blocks(pieces[0]) if len(pieces) == 1 else chain.from_iterable(map(blocks, pieces))
            have = cheap(parts, size, passes)
        else:
            have = without_finite({"count": float(size)})
        if groups:
            _costly(pieces, groups, have)
    return np.array([have[name] + 0.0 for name in names], dtype=np.float64)  # no -0.0: nobody wants to read that


def _costly(pieces: Sequence[Array], groups: frozenset[str], have: dict[str, float]) -> None:
    if "hash" in groups:
        have["hash_hi"], have["hash_lo"] = hash_of_pieces(pieces)
    if "quantiles" in groups:
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        found = quantiles(as_float64(whole).reshape(-1), [int(name[1:]) / 100 for name in QUANTILES])
        have.update(zip(QUANTILES, found.tolist(), strict=True))
    if "histogram" in groups:
        have.update(zip(HISTOGRAM, histogram(pieces, have["min"], have["max"]).tolist(), strict=True))
    if "exponents" in groups:
        have.update(exponents(pieces))


def merge(names: Sequence[str], a: Any, b: Any) -> Floats:
    """Return the statistics of two parts taken together; a, b and result are float64 [..., len(names)].

    A part that is absent (count NaN, hence all NaN) leaves the other as it is. mean and abs_mean need count, nan,
    posinf and neginf among `names`, std these and mean, each half of the hash the other; the rest stands alone.
    Raises BadSelection where a companion is missing and for what cannot be merged (quantiles and histograms depend on
    all values; derived ones are derived again).
    """
    names = tuple(names)
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    where = {name: i for i, name in reversed(list(enumerate(names)))}
    out = np.empty(np.broadcast_shapes(left.shape, right.shape))
    _check_companions(names)

    def pair(name: str) -> tuple[Floats, Floats]:
        return left[..., where[name]], right[..., where[name]]

    def both(name: str) -> Floats:
        p, q = pair(name)
        how = STATISTICS[name].merge
        joined: Floats = np.hypot(p, q) if how == _ROOT else p + q
        return np.where(np.isnan(p), q, np.where(np.isnan(q), p, joined))

    with np.errstate(all="ignore"):
        if set(_FINITE) <= set(names):
            counts = [pair(name) for name in _FINITE]
            na, nb = (np.nan_to_num(part[0] - part[1] - part[2] - part[3]) for part in zip(*counts, strict=True))
            n = np.maximum(na + nb, 1)
            wa, wb = na / n, nb / n
        for i, name in enumerate(names):
            how = STATISTICS[name].merge
            p, q = pair(name)
            if how in (_LEAST, _MOST):
                out[..., i] = np.fmin(p, q) if how == _LEAST else np.fmax(p, q)
            elif how == _MEAN:
                p, q = np.where(na == 0, 0.0, p), np.where(nb == 0, 0.0, q)
                out[..., i] = np.where(na + nb == 0, np.nan, np.where(p == q, p, p * wa + q * wb))
            elif how == _STD:
                ma, mb = pair("mean")
                gap = np.where(wa * wb == 0, 0.0, (mb - ma)) * np.sqrt(wa * wb)
                far = ~np.isfinite(gap)
                gap = np.where(far, mb * np.sqrt(wa * wb) - ma * np.sqrt(wa * wb), gap)
                p, q = np.where(na == 0, 0.0, p) * np.sqrt(wa), np.where(nb == 0, 0.0, q) * np.sqrt(wb)
                out[..., i] = np.where(na + nb == 0, np.nan, np.hypot(np.hypot(p, q), gap))
            elif how == _HASH:
                carry = np.where(both("hash_lo") >= 2.0**32, 1.0, 0.0) if name == "hash_hi" else 0.0
                out[..., i] = np.mod(both(name) + carry, 2.0**32)
            else:
                out[..., i] = both(name)
    return out


def _check_companions(names: tuple[str, ...]) -> None:
    companions = {_MEAN: _FINITE, _STD: (*_FINITE, "mean"), _HASH: HASH}
    for name in names:
        how = _look_up(name).merge
        if how in (_NEVER, _DERIVED):
            why = "it depends on all values at once" if how == _NEVER else "it is derived again from what was merged"
            raise BadSelection(f"The statistic {name!r} of two parts cannot be merged: {why}.")
        missing = [need for need in companions.get(how, ()) if need not in names]
        if missing:
            raise BadSelection(f"Merging {name!r} needs {', '.join(missing)} of both parts as well.")


_NEEDS = {
    "variance": ("std",),
    "sum": ("mean", *_FINITE),
    "rms": ("l2", *_FINITE),
    "zero_share": ("zeros", "count"),
    "dynamic_range": ("max", "min"),
}


def required(name: str) -> tuple[str, ...]:
    """Return the stored statistics that `derive(name, ...)` needs; BadSelection for median and prod (values only)."""
    if _look_up(name).group == "values":
        raise BadSelection(f"The statistic {name!r} cannot be had from stored statistics; it needs the values.")
    return _NEEDS.get(name, (name,))


def derive(name: str, have: Mapping[str, Any]) -> Floats:
    """Return a derived or stored statistic as float64 array from arrays of stored ones of equal shape.

    NaN where `count` is NaN (absent) if `have` holds count. sum is 0 and rms NaN where no element is finite; rms is
    infinite where l2 is too large for float64. Raises BadSelection for an unknown name (with near ones)
    and where `have` lacks one of required(name).
    """
    missing = [need for need in required(name) if need not in have]
    if missing:
        raise BadSelection(f"The statistic {name!r} needs {', '.join(missing)}, which was not kept here.")
    get = {need: np.asarray(have[need], dtype=np.float64) for need in required(name)}
    with np.errstate(all="ignore"):
        if name in ("sum", "rms"):
            n = get["count"] - get["nan"] - get["posinf"] - get["neginf"]
            result = np.where(np.isnan(get["mean"]), 0.0, get["mean"] * n) if name == "sum" else get["l2"] / np.sqrt(n)
        elif name == "variance":
            result = get["std"] ** 2
        elif name == "zero_share":
            result = get["zeros"] / get["count"]
        elif name == "dynamic_range":
            result = get["max"] - get["min"]
        else:
            result = get[name]
    if "count" in have:
        result = np.where(np.isnan(np.asarray(have["count"], dtype=np.float64)), np.nan, result)
    return np.asarray(result)


def from_value(name: str, value: Any) -> float:
    """Return one statistic (stored, derived, median or prod) of the whole array `value`."""
    return float(reduce(value, name))


def reduce(array: Any, name: str, axis: int | None = None) -> Floats:
    """Return any statistic of an array as float64: 0-d over all elements, or with `axis` taken away.

    Raises BadSelection for an unknown name or axis. Memory: up to about six float64 copies of the array.
    """
    array = as_array(array)
    group = _look_up(name).group
    if axis is None and group != "values":
        names = required(name)
        return derive(name, dict(zip(names, compute(array, names), strict=True)))
    if axis is None:
        array, axis = array.reshape(-1), 0
    if not -array.ndim <= axis < array.ndim:
        raise BadSelection(f"Axis {axis} is out of range for an array of {array.ndim} axes.")
    rows = np.moveaxis(array, axis, -1)
    if group == "quantiles":
        return quantiles(as_float64(rows), (int(name[1:]) / 100,))[..., 0]
    if group in ("hash", "histogram", "exponents"):
        out = np.empty(rows.shape[:-1])
        for at in np.ndindex(*out.shape):
            out[at] = compute(rows[at], (name,))[0]
        return out
    with np.errstate(all="ignore"):
        values = as_float64(rows)
        have = {need: row_statistic(need, values) for need in ((name,) if group == "values" else required(name))}
        if "nan" in have and not is_numeric(array.dtype):
            have["nan"] = np.zeros_like(have["nan"])
    if group == "values":
        return have[name]
    return derive(name, have)


def scalar_stats(names: Sequence[str], values: Any) -> Floats:
    """Return float64 [n, len(names)]: the stored statistics of n tensors of one element each, given as float64 [n].

    A NaN is an element that is NaN; absent ones are for the caller to blank. The hash is NaN: the value's dtype, whose
    bits it covers, is not known here.
    """
    names = tuple(names)
    _wanted(names)
    v = np.asarray(values, dtype=np.float64).reshape(-1)
    finite = np.isfinite(v)
    size, held = np.abs(v), np.where(finite, v, np.nan)
    special = {
        "count": np.ones_like(v), "nan": np.isnan(v), "posinf": v == np.inf, "neginf": v == -np.inf, "zeros": v == 0,
        "std": held * 0, "l1": np.where(finite, size, 0.0), "l2": np.where(finite, size, 0.0),
        "abs_max": np.abs(held), "abs_mean": np.abs(held), "histogram_00": finite,
    }  # fmt: skip
    out = np.zeros((v.size, len(names)))
    power = np.clip(np.frexp(np.where(finite, v, 0.0))[1] - 1, -150, 128)
    for i, name in enumerate(names):
        group = STATISTICS[name].group
        if name in special:
            out[:, i] = special[name]
        elif group == "exponents":
            sign = 1.0 if "_pos_" in name else -1.0
            out[:, i] = finite & (v * sign > 0) & (power == int(name.rsplit("_", 1)[1]))
        elif group != "histogram":
            out[:, i] = np.nan if group == "hash" else held
    return out
