"""Reductions as NumPy gives them for a whole tensor, from statistics that leave NaN and infinities out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

REDUCTIONS = ("min", "max", "mean", "std", "variance", "sum", "prod", "l1", "l2")

STATISTICS = ("count", "nan", "posinf", "neginf", "min", "max", "mean", "std", "l2", "abs_max", "l1", "abs_mean")
_OF_ABSOLUTE = {"max": "abs_max", "mean": "abs_mean", "l1": "l1", "l2": "l2"}


def from_statistics(name: str, absolute: bool, row: Mapping[str, float]) -> float | None:
    """Return a reduction from the statistics of a row, as NumPy gives it for the whole tensor; None if they lack it."""
    special = _of_special(name, absolute, row)
    if special is not None:
        return special
    count, finite = row["count"], row["count"] - row["nan"] - row["posinf"] - row["neginf"]
    if name == "prod" or (absolute and name not in ("sum", *_OF_ABSOLUTE)):
        return None
    if name == "sum":
        found = row["l1"] if absolute else row["mean"] * finite
    elif name == "variance":
        found = row["std"] ** 2
    else:
        found = row[_OF_ABSOLUTE[name] if absolute else name]
    if math.isnan(found):
        return math.nan if finite == 0 and count > 0 else None
    return found


def _of_special(name: str, absolute: bool, row: Mapping[str, float]) -> float | None:
    """Return a reduction that NaN or an infinity settles, None where it does not, or they were not counted."""
    nan, up, down = row["nan"], row["posinf"], row["neginf"]
    if absolute or name in ("l1", "l2"):
        up, down = up + down, 0.0
    if nan > 0:
        return math.nan
    if not up > 0 and not down > 0:
        return None
    if name in ("std", "variance"):
        return math.nan
    if name == "max":
        return math.inf if up > 0 else (-math.inf if down == row["count"] else None)
    if name == "min":
        return -math.inf if down > 0 else (math.inf if up == row["count"] else None)
    if name == "prod":
        return None  # the value knows whether there is a zero
    return math.nan if up > 0 and down > 0 else (math.inf if up > 0 else -math.inf)


def from_value(name: str, absolute: bool, value: npt.NDArray[Any]) -> float:
    """Return a reduction of a full value."""
    numbers = np.asarray(np.abs(value) if absolute or np.iscomplexobj(value) else value, np.float64).reshape(-1)
    if not numbers.size and name in ("min", "max", "mean", "std", "variance"):
        return math.nan
    with np.errstate(all="ignore"):
        if name in ("l1", "l2"):
            return float(np.linalg.norm(numbers, 1 if name == "l1" else 2))
        return float(getattr(np, {"variance": "var"}.get(name, name))(numbers))
