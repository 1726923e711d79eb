"""When trouble began, in steps of the training, as narrowly as the commit log lets one say.

A finding knows the saved step at which a tensor was last clean and the one at which it was bad. In between may lie
steps at which it was not saved, and steps of another mode, in which it does not exist at all: a loss of the evaluation
cannot go wrong in a train step. The log lists every step, so the two can be told apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from smdbg.analysis.run import Run, StepTable

TRAINING = ("train", "global")
INITIAL = -1  # the step that made the initial weights
Interval = tuple[int, int]  # (after this step, no later than in this one]


@dataclass(frozen=True)
class Clock:
    """The commit logs by worker; without one, steps are all of one mode."""

    logs: Mapping[int, StepTable] = field(default_factory=dict)

    def interval(self, worker: int, mode: str, onset: tuple[int | None, int], shown_late: bool) -> Interval:
        """Return (lo, hi]: the trouble began after step lo and no later than in step hi.

        `onset` is (last clean step or None, first bad step). `shown_late`: rows show what the step before made.
        """
        clean, bad = onset
        if shown_late:
            return self._late(worker, mode, clean, bad)
        if self.apart(worker, onset) == 1:
            return bad - 1, bad
        if clean is None:
            return -1, bad
        return self._next(worker, clean + 1, (mode,), bad) - 1, bad

    def apart(self, worker: int, onset: tuple[int | None, int]) -> int:
        """Return how many steps of its mode the bad step is behind the clean one, or behind the beginning.

        1: no step of this mode lies in between. Without a log the steps are counted as they are.
        """
        clean, bad = onset
        last, first = self._row(worker, bad), None if clean is None else self._row(worker, clean)
        log = self.logs.get(worker)
        if log is None or last is None or (clean is not None and first is None):
            return bad - (-1 if clean is None else clean)
        here = int(log.mode_step[last])
        return here + 1 if first is None else here - int(log.mode_step[first])

    def _late(self, worker: int, mode: str, clean: int | None, bad: int) -> Interval:
        """Return the interval of steps whose update made a weight bad that was seen at `bad`."""
        if clean is None:
            first = self.apart(worker, (None, bad)) == 1
            return INITIAL - 1, INITIAL if first else max(self._previous(worker, bad - 1), INITIAL)
        if self.apart(worker, (clean, bad)) == 1 and mode in TRAINING:
            return clean - 1, clean
        lo = self._next(worker, clean, TRAINING, bad) - 1
        return lo, max(self._previous(worker, bad - 1), lo + 1)

    def _row(self, worker: int, step: int) -> int | None:
        """Return the row of the log at which a step stands, None when it does not."""
        log = self.logs.get(worker)
        if log is None:
            return None
        row = int(np.searchsorted(log.step, step))
        return row if row < len(log.step) and int(log.step[row]) == step else None

    def _next(self, worker: int, step: int, modes: tuple[str, ...], until: int) -> int:
        """Return the first step from `step` on that may be of one of the modes: one the log lacks may be of any."""
        while step < until and (row := self._row(worker, step)) is not None:
            if str(self.logs[worker].mode[row]) in modes:
                break
            step += 1
        return step

    def _previous(self, worker: int, step: int) -> int:
        """Return the last step up to `step` that may have been a training step."""
        while (row := self._row(worker, step)) is not None and str(self.logs[worker].mode[row]) not in TRAINING:
            step -= 1
        return step


def clock_of(run: Run) -> Clock:
    """Return the clock of a run."""
    return Clock({worker: run.step_table(worker) for worker in run.workers()})
