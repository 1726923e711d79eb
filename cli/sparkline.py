"""A series of numbers as one line of blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

BLOCKS = "▁▂▃▄▅▆▇█"
NAN, POSITIVE, NEGATIVE = "×", "∞", "-"  # marks that no block looks like; `-` stands for minus infinity


class Sparkline(NamedTuple):
    """The line, and whether its heights are logarithmic."""

    text: str
    logarithmic: bool


def sparkline(values: Sequence[float], width: int = 60) -> Sparkline:
    """Return the series in at most `width` characters.

    Several values that share a character show the largest of them, and NaN or an infinity before any number; what came
    before the first of those keeps a character of its own. Positive values that span more than a factor of 1,000 are
    drawn on a logarithmic scale.
    """
    bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), 0)
    before = max(1, bad * width // len(values)) if 0 < bad and len(values) > width > 1 else 0
    cuts = [*_cuts(bad, before), *((bad + a, bad + b) for a, b in _cuts(len(values) - bad, width - before))]
    cells = [_worst(values[start:stop]) for start, stop in (cuts if before else _cuts(len(values), width))]
    finite = [value for value in cells if math.isfinite(value)]
    if not finite:
        return Sparkline("".join(_mark(value) for value in cells), False)
    low, high = min(finite), max(finite)
    logarithmic = low > 0 and high / low > 1000
    if logarithmic:
        low, high = math.log(low), math.log(high)
    text = []
    for value in cells:
        if not math.isfinite(value):
            text.append(_mark(value))
            continue
        height = math.log(value) if logarithmic else value
        # Halved before the subtraction, which could overflow; a constant series is drawn at the bottom.
        share = (height / 2 - low / 2) / (high / 2 - low / 2) if high > low else 0.0
        text.append(BLOCKS[min(int(share * len(BLOCKS)), len(BLOCKS) - 1)])
    return Sparkline("".join(text), logarithmic)


def _cuts(count: int, width: int) -> list[tuple[int, int]]:
    """Return (start, stop) of at most `width` parts that cover `count` values evenly."""
    parts = min(count, max(width, 1))
    return [(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


def _worst(values: Sequence[float]) -> float:
    """Return NaN if there is one, else an infinity if there is one, else the largest value."""
    odd = [value for value in values if not math.isfinite(value)]
    return next((value for value in odd if math.isnan(value)), odd[0]) if odd else max(values)


def _mark(value: float) -> str:
    """Return the mark of a value that is no finite number."""
    return NAN if math.isnan(value) else POSITIVE if value > 0 else NEGATIVE
