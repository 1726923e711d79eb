"""Reads full values for the rules that want them: each value once, in bounded memory, on several threads.

A rule's `measure` makes a few numbers of each value; what it then makes of those it does in `evaluate` or `judge`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy.typing as npt

from smdbg.analysis.findings import Floats
from smdbg.analysis.rule import Rule, Sample
from smdbg.analysis.view import View
from smdbg.errors import SmdbgError

Wanted = tuple[Rule, Sequence[str], Sequence[tuple[int, str]], View]
Readers = list[tuple[Rule, View]]


def measure_all(
    pool: ThreadPoolExecutor, view: View, wanted: Sequence[Wanted], more: Callable[[int, str], None]
) -> Iterator[tuple[Rule, str]]:
    """Let every rule measure the values it selects and keep the results in the view; yield (rule, what it raised).

    `wanted`: rule, names of its tensors, (worker, mode) it judges, and its bounded view. `more(total, text)` is called
    as tensors are done.
    """
    tasks: dict[tuple[int, str, str], Readers] = {}
    for rule, names, parts, bounded in wanted:
        for worker, mode in parts:
            for name in names:
                if view.readable(name, worker):
                    tasks.setdefault((worker, mode, name), []).append((rule, bounded))
    futures = [pool.submit(_measure, view, *key, readers) for key, readers in tasks.items()]
    for (_, _, name), future in zip(tasks, futures, strict=True):
        yield from future.result()
        more(len(tasks), name)


def _measure(view: View, worker: int, mode: str, name: str, readers: Readers) -> list[tuple[Rule, str]]:
    """Go through the values of one tensor for all rules that want them; return what rules raised."""
    info = view.catalogue[name]
    depth = max(rule.needs().history for rule, _ in readers)
    earlier: deque[tuple[int, npt.NDArray[Any]]] = deque(maxlen=depth)
    found: list[dict[int, Floats]] = [{} for _ in readers]
    raised: dict[int, str] = {}
    start, end = _bounds([bounded for _, bounded in readers])
    for step, value in view.between(start, end).values(name, mode, worker):
        value.flags.writeable = False  # the rules share it
        past = tuple(earlier)
        for index, (rule, bounded) in enumerate(readers):
            if index in raised or step < bounded.start or (bounded.end is not None and step >= bounded.end):
                continue
            mine = [one for one in past if one[0] >= bounded.start]
            history = rule.needs().history
            try:
                measured = rule.measure(Sample(info, step, value, tuple(mine[-history:] if history else ())))
            except (Exception, SystemExit) as error:
                raised[index] = str(error) if isinstance(error, SmdbgError) else f"{type(error).__name__}: {error}"
                continue
            if measured is not None:
                found[index][step] = measured
        earlier.append((step, value))
    for (rule, _), measures in zip(readers, found, strict=True):
        view.keep_measures(rule.label, name, mode, worker, measures)
    return [(readers[index][0], text) for index, text in raised.items()]


def _bounds(views: Sequence[View]) -> tuple[int, int | None]:
    ends = [view.end for view in views]
    open_end = None in ends
    return min(view.start for view in views), None if open_end else max(end for end in ends if end is not None)
