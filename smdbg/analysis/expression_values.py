"""Gives expressions their values, from series that a source has.

The rules, which docs/expressions.md tells in full:

- A series has a value at the steps at which it was saved, and only there; functions that need earlier steps have none
  until there are enough.
- Arithmetic and comparisons of two series hold at the steps that both have. `and` and `or` hold at the steps of any.
- NaN goes through every function but isnan and isfinite. A comparison with NaN, or with what is not there, is neither
  true nor false: it is NaN too; `and`, `or`, `any` and `all` are what they are whatever it were, else NaN.
- A function over no steps at all is *missing*; so is all arithmetic with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Protocol

import numpy as np

from smdbg.analysis.expression_nodes import (
    Arithmetic,
    Comparison,
    Literal,
    Logic,
    Name,
    Node,
    Not,
    Other,
    Over,
    Plain,
    Rolling,
    Shifted,
    Statistic,
    Steps,
    Value,
    is_truth,
)
from smdbg.analysis.findings import Floats, Ints
from smdbg.errors import SmdbgError

AT_ONCE = 1 << 20  # numbers of rolling windows that are taken together


@dataclass(frozen=True)
class Series:
    """One number a step: steps int64[n], ascending, values float64[n]; truths are 0, 1 and NaN."""

    steps: Ints
    values: Floats

    def at(self, step: int) -> float:
        """Return the value at a step, NaN where there is none."""
        found = self.values[self.steps == step]
        return float(found[0]) if len(found) else float("nan")


@dataclass(frozen=True)
class Number:
    """One number; `missing`: there were no steps to take it from."""

    value: float
    missing: bool = False


class Source(Protocol):
    """Where series come from."""

    def value(self, name: Name) -> Series:
        """Return the value of a tensor that is a single number."""

    def statistic(self, statistic: str, name: Name) -> Series:
        """Return a statistic of one tensor, or of several merged."""

    def other(self) -> Source:
        """Return the same of the reference run."""


def _divide(a: Any, b: Any) -> Any:
    """Divide; zero has one sign, so that x / 0 is an infinity with the sign of x."""
    return np.divide(a, b + 0.0)


def _power(a: Any, b: Any) -> Any:
    """Raise to a power; NaN for a root of a negative number, -inf included, where NumPy's answers differ."""
    return np.where((a < 0) & (b != np.floor(b)), np.nan, np.power(a + 0.0, b))


_PLAIN: dict[str, Callable[..., Any]] = {
    "abs": np.abs, "log": np.log, "log10": np.log10, "sqrt": np.sqrt, "exp": np.exp, "isnan": np.isnan,
    "isfinite": np.isfinite, "min": lambda *parts: reduce(np.minimum, parts),
    "max": lambda *parts: reduce(np.maximum, parts),
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "+": np.add, "-": np.subtract, "*": np.multiply, "/": _divide, "**": _power,
}  # fmt: skip
_COMPARE: dict[str, Callable[..., Any]] = {
    "<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal, "==": np.equal, "!=": np.not_equal,
}  # fmt: skip
_OVER: dict[str, Callable[..., Any]] = {
    "median": np.median, "mean": np.mean, "min": np.min, "max": np.max, "std": np.std, "sum": np.sum,
}  # fmt: skip


@dataclass
class Evaluation:
    """Values of the parts of one expression, each worked out once; `used` has the steps that functions went over."""

    source: Source
    used: list[Ints] = field(default_factory=list)
    _known: dict[Node, Series | Number] = field(default_factory=dict)
    _other: Evaluation | None = None

    def of(self, node: Node) -> Series | Number:
        """Return the value of a node."""
        if node not in self._known:
            with np.errstate(all="ignore"):
                self._known[node] = self._of(node)
        return self._known[node]

    def series(self, node: Node) -> Series:
        """Return the value of a node that is a series."""
        found = self.of(node)
        if not isinstance(found, Series):
            raise SmdbgError("An expression gave a number where it must give a series.")
        return found

    def _of(self, node: Node) -> Series | Number:
        match node:
            case Literal():
                return Number(node.value)
            case Value():
                return self.source.value(node.name)
            case Statistic():
                return self.source.statistic(node.statistic, node.name)
            case Steps():
                return _part(self.series(node.of), node.start, node.stop)
            case Arithmetic():
                return _stepwise(_ARITHMETIC[node.operator], [self.of(node.left), self.of(node.right)])
            case Comparison():
                function = _COMPARE[node.operator]
                return _stepwise(lambda a, b: _known(function(a, b), a, b), [self.of(node.left), self.of(node.right)])
            case Plain():
                return _stepwise(_PLAIN[node.function], [self.of(part) for part in node.parts])
            case Not():
                return _stepwise(lambda truth: 1 - truth, [self.of(node.of)])
            case Logic():
                return _logic(node.operator, [self.of(part) for part in node.parts])
            case Over():
                series = self.series(node.of)
                self.used.append(series.steps)
                if node.function == "count":
                    return Number(float((series.values == 1).sum() if is_truth(node.of) else len(series.steps)))
                return _over(node.function, series.values, node.share)
            case Rolling():
                return _rolling(node.function, self.series(node.of), node.window)
            case Shifted():
                return _shifted(node.function, self.series(node.of))
            case Other():
                self._other = self._other or Evaluation(self.source.other())
                return self._other.of(node.of)


def _part(series: Series, start: int | None, stop: int | None) -> Series:
    """Return the steps of a series within two bounds; a negative one counts its steps from the last."""
    steps = series.steps
    if not len(steps):
        return series
    low, high = (
        bound if bound is None or bound >= 0 else int(steps[max(bound, -len(steps))]) for bound in (start, stop)
    )
    inside = np.ones(len(steps), bool)
    inside &= (steps >= low) if low is not None else True
    inside &= (steps < high) if high is not None else True
    return Series(steps[inside], series.values[inside])


def _known(truth: Any, *sides: Any) -> Any:
    """Return a comparison as 0 and 1, and as NaN where a side is NaN."""
    unknown = reduce(np.logical_or, [np.isnan(side) for side in sides])
    return np.where(unknown, np.nan, truth)


def _stepwise(function: Callable[..., Any], parts: Sequence[Series | Number]) -> Series | Number:
    """Apply a function at the steps that all series have; numbers are the same at every step."""
    series = [part for part in parts if isinstance(part, Series)]
    missing = any(part.missing for part in parts if isinstance(part, Number))
    if not series:
        values = [np.float64(part.value) for part in parts if isinstance(part, Number)]
        return Number(float("nan") if missing else float(function(*values)), missing)
    steps = series[0].steps[:0] if missing else reduce(_shared, [one.steps for one in series])
    arrays = [_at(part, steps) if isinstance(part, Series) else part.value for part in parts]
    return Series(steps, np.broadcast_to(np.asarray(function(*arrays), np.float64), steps.shape))


def _shared(left: Ints, right: Ints) -> Ints:
    return left if np.array_equal(left, right) else np.intersect1d(left, right, assume_unique=True)


def _at(series: Series, steps: Ints) -> Floats:
    """Return the values of a series at steps that it has."""
    return series.values if len(steps) == len(series.steps) else series.values[np.searchsorted(series.steps, steps)]


def _logic(operator: str, parts: Sequence[Series | Number]) -> Series | Number:
    """Join truths at the steps that any has; a truth that is not there, or missing, is not known."""
    settles = 0.0 if operator == "and" else 1.0
    series = [part for part in parts if isinstance(part, Series)]
    steps = reduce(np.union1d, [one.steps for one in series]) if series else np.zeros(1, np.int64)
    table = np.full((len(parts), len(steps)), np.nan)
    for row, part in zip(table, parts, strict=True):
        if isinstance(part, Series):
            row[np.searchsorted(steps, part.steps)] = part.values
        else:
            row[:] = part.value
    joined = np.where(np.isnan(table).any(axis=0), np.nan, 1 - settles)
    joined[(table == settles).any(axis=0)] = settles
    if series:
        return Series(steps, joined)
    missing = any(part.missing for part in parts if isinstance(part, Number))
    return Number(float(joined[0]), missing and bool(np.isnan(joined[0])))


def _over(function: str, values: Floats, share: float) -> Number:
    """Return a function over all steps."""
    if not len(values):
        return Number(float("nan"), missing=True)
    if function in ("any", "all"):
        return Number(_settled(values, 1.0 if function == "any" else 0.0))
    if function in ("first", "last"):
        return Number(float(values[0 if function == "first" else -1]))
    if function == "quantile":
        return Number(_quantile(values, share))
    return Number(float(_OVER[function](values)))


def _quantile(values: Floats, share: float) -> float:
    """Return a quantile by linear interpolation; NumPy's answers differ where there are infinities."""
    if np.isnan(values).any() or np.isfinite(values).all():
        return float(np.quantile(values, share))
    ordered, at = np.sort(values), share * (len(values) - 1)
    low, high = ordered[int(at)], ordered[min(int(at) + 1, len(values) - 1)]
    part = at - int(at)
    return float(low if part == 0 or low == high else low * (1 - part) + high * part)


def _settled(truths: Floats, settles: float) -> float:
    """Return `settles` if any truth is that; else NaN if any is not known."""
    if (truths == settles).any():
        return settles
    return float("nan") if np.isnan(truths).any() else 1 - settles


def _rolling(function: str, series: Series, window: int) -> Series:
    """Return a function over the `window` steps before each; the first `window` steps have no value."""
    steps, values = series.steps[window:], series.values
    found = np.empty(len(steps))
    several = max(AT_ONCE // window, 1)
    for start in range(0, len(steps), several):
        end = min(start + several, len(steps))
        windows = np.lib.stride_tricks.sliding_window_view(values[start : end + window - 1], window)
        found[start:end] = _OVER[function](windows, axis=1)
    return Series(steps, found)


def _shifted(function: str, series: Series) -> Series:
    """Return a series against its step before, or its finite steps."""
    steps, values = series.steps, series.values
    if function == "finite":
        finite = np.isfinite(values)
        return Series(steps[finite], values[finite])
    now, before = values[1:], values[:-1]
    if function == "prev":
        return Series(steps[1:], before)
    return Series(steps[1:], now - before if function == "diff" else _divide(now, before))
