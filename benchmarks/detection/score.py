"""Scores judged cases: what was detected, by its right name, in its layer, how near its onset; and false alarms."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.detection.judge import EARLY, Record

RANKS = {"info": 0, "warning": 1, "error": 2}
Z = 1.959964  # of the normal distribution, for 95 %


@dataclass(frozen=True)
class Hit:
    """What one view of a faulty case led to. None: the question does not arise."""

    detected: bool
    right: bool
    rules: tuple[str, ...]
    layer: bool | None = None
    first_layer: bool | None = None
    steps_off: int | None = None
    saved_off: int | None = None


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    hits: int
    of: int

    def __str__(self) -> str:
        """Say it as a count of a count, and in per cent."""
        return f"{self.hits}/{self.of}" if self.of else "-"

    @property
    def percent(self) -> str:
        """Return it in per cent, '-' of none."""
        return f"{100 * self.hits / self.of:.1f} %" if self.of else "-"

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % Wilson interval."""
        return wilson(self.hits, self.of)


def wilson(hits: int, of: int, z: float = Z) -> tuple[float, float]:
    """Return the Wilson interval of a share, (0, 1) of nothing."""
    if not of:
        return 0.0, 1.0
    p, d = hits / of, 1 + z * z / of
    centre = (p + z * z / (2 * of)) / d
    spread = z / d * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    return max(centre - spread, 0.0), min(centre + spread, 1.0)


def share(found: Iterable[bool | None]) -> Share:
    """Return how many of those that are not None are true."""
    asked = [one for one in found if one is not None]
    return Share(sum(asked), len(asked))


def level_of(record: Record, view: str) -> str:
    """Return the highest severity that a view of a case led to, '' for none."""
    found = {one["severity"] for one in record[view]["findings"]}
    return max(found, key=RANKS.__getitem__, default="")


def hit(verdict: Mapping[str, Any], record: Record, view: str) -> Hit:
    """Score one view of a faulty case.

    An error counts, or a warning where the right rule of this fault is a warning by its definition; right are the
    rules that the case expects. The layer is right when such a finding names a tensor of it, in its place or its text.
    """
    least = RANKS[verdict["level"]]
    serious = [one for one in record[view]["findings"] if RANKS[one["severity"]] >= least]
    right = [one for one in serious if one["kind"] in verdict["expected"]]
    rules = tuple(dict.fromkeys(one["rule"] for one in serious))
    if not right:
        return Hit(bool(serious), False, rules, *([False] * 2 if verdict["layers"] else [None] * 2))
    named = [names_layer(one, verdict["layers"]) for one in right]
    fault, onset = verdict["first_faulty_step"], right[0]["onset"]
    return Hit(
        True,
        True,
        rules,
        any(named) if verdict["layers"] else None,
        named[0] if verdict["layers"] else None,
        onset - fault,
        bisect_left(record["saved"], onset) - bisect_left(record["saved"], fault),
    )


def names_layer(finding: Record, layers: Sequence[str]) -> bool:
    """Tell whether a finding's tensor belongs to one of these modules, or its text names one of their tensors."""
    for layer in layers:
        if finding["module"] == layer or finding["module"].startswith(layer + "."):
            return True
        own = rf"(?<![\w.]){re.escape(layer)}(?:\.[A-Za-z_]\w*|_(?:in|out)put_\d+)"
        if re.search(own, f"{finding['tensor'].rpartition('/')[2]} {finding['message']}"):
            return True
    return False


def acts_early(verdict: Mapping[str, Any]) -> bool:
    """Tell whether a fault acts within the first fifth of the run."""
    return bool(verdict["first_faulty_step"] < int(verdict["steps"] * EARLY))


def near(hits: Iterable[Hit], saved: int = 2) -> Share:
    """Return how many onsets lie within so many saved steps of the first faulty one."""
    return share(None if one.saved_off is None else abs(one.saved_off) <= saved for one in hits)


def median_off(hits: Iterable[Hit]) -> tuple[float, float] | None:
    """Return the median distance of the onset, in steps and in saved steps, None of none."""
    found = [(abs(one.steps_off), abs(one.saved_off or 0)) for one in hits if one.steps_off is not None]
    return (_median([a for a, _ in found]), _median([b for _, b in found])) if found else None


def _median(values: Sequence[int]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
