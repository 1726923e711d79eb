"""Measuring in interleaved rounds, and the lines that result: a figure, what it is compared with, ratio and goal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Cost:
    """What doing something once took, in seconds: by the clock, and of this process's processor time."""

    seconds: float
    processor: float


Action = Callable[[], Cost]  # does something once and returns what it took


@dataclass(frozen=True)
class Line:
    """One measured line: `ours` against `base`, with the ratio of each round (or of the one round there was).

    Without ratios it only tells a figure, or why there is none. `goal`: the ratio that is not to be exceeded
    (`at_least`: not to be fallen short of), None where there is none yet.
    """

    name: str
    ours: str
    base: str
    ratios: Sequence[float]
    goal: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def ratio(self) -> float:
        """The median ratio."""
        return median(self.ratios)

    @property
    def verdict(self) -> str:
        """One of 'met', 'missed' and '' (no goal)."""
        if self.goal is None or not self.ratios:
            return ""
        met = self.ratio >= self.goal if self.at_least else self.ratio <= self.goal
        return "met" if met else "missed"


def timed(action: Callable[[], object], processor: Callable[[], float] = time.process_time) -> Action:
    """Return an action that runs `action` whole. `processor`: the clock of processor time."""

    def run() -> Cost:
        start, used = time.perf_counter(), processor()
        action()
        return Cost(time.perf_counter() - start, processor() - used)

    return run


def interleaved(rounds: int, actions: Mapping[str, Action], warm_up: int = 1) -> dict[str, list[Cost]]:
    """Run every action once a round and return what they took by name, one a round.

    The order rotates from round to round, so that none always follows the same one. Rounds to warm up do not count.
    """
    names = list(actions)
    out: dict[str, list[Cost]] = {name: [] for name in names}
    for turn in range(-warm_up, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            cost = actions[name]()
            if turn >= 0:
                out[name].append(cost)
    return out


def compare(
    name: str, ours: Sequence[Cost], base: Sequence[Cost], goal: float | None = None, per: int = 1, note: str = ""
) -> Line:
    """Return the line of two series by the clock, measured in the same rounds; shown divided by `per`."""
    return _line(name, [cost.seconds for cost in ours], [cost.seconds for cost in base], goal, per, note)


def compare_processor(name: str, ours: Sequence[Cost], base: Sequence[Cost], per: int = 1, note: str = "") -> Line:
    """Return the line of processor time: other work on the machine disturbs it less than the clock."""
    return _line(name, [cost.processor for cost in ours], [cost.processor for cost in base], None, per, note)


def _line(name: str, ours: list[float], base: list[float], goal: float | None, per: int, note: str) -> Line:
    # Processor time comes in ticks on some systems; nothing takes less than a microsecond.
    ratios = [a / max(b, 1e-6) for a, b in zip(ours, base, strict=True)]
    return Line(name, milliseconds(ours, per), milliseconds(base, per), ratios, goal, note=note)


def milliseconds(seconds: Sequence[float], per: int = 1) -> str:
    """Return median, least and most of some seconds as text in milliseconds, each divided by `per`."""
    middle, least, most = (1000 * s / per for s in (median(seconds), min(seconds), max(seconds)))
    digits = 2 if middle < 10 else 1 if middle < 100 else 0
    return f"{middle:.{digits}f} ms ({least:.{digits}f} to {most:.{digits}f})"
