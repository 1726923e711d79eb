"""stalled_training: long times without a new step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.rule import Facts, Kind, Needs, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.view import View

SECOND = 1e9  # ns


@dataclass(frozen=True, kw_only=True)
class StalledTraining(RunRule):
    """There was no new step for a long time.

    What it does
    ------------
    Reads the commit log of each worker and fires where `threshold` seconds or more lie between two steps. Of a worker
    that is still running it also takes the time since its last step, or since the run was created. The time between two
    attempts (a run that was resumed) does not count. With `mode`, steps of other modes do not count either.

    Why it matters
    --------------
    A training that waits for data, for another worker or for a lock costs as much as one that learns.

    Parameters
    ----------
    threshold (s, default 1800): fire when there was no new step for this long.

    Example output
    --------------
    time between steps: 2,410 s went by without a new step on worker 0, before step 412 (1 of 911 times).

    How to fix
    ----------
    Look at what the workers did meanwhile (py-spy dump): a data loader that hangs, a collective operation that one
    worker never entered, a full disk, evaluation or checkpoints that take too long.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule StalledTrainingRule.
    """

    name: ClassVar[str] = "stalled_training"

    threshold: float = parameter(1800.0, unit="s", minimum=0, help="fire when there was no new step for this long")

    def needs(self) -> Needs:
        """Read the commit log alone."""
        return Needs(tensors=False, minimum=2)

    def kinds(self) -> tuple[Kind, ...]:
        """Seconds without a step."""
        return (Kind("seconds", self.threshold),)

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each worker's log."""
        modes = self.modes(view.run.modes())
        waiting = view.run.status == "running" and self.end_step is None
        troubles: list[Trouble] = []
        gaps = seen = 0
        for worker in [w for w in view.run.workers() if not self.workers or w in self.workers]:
            trouble, count, rows = self._of_worker(view, worker, modes, waiting)
            troubles += [trouble] if trouble is not None else []
            gaps, seen = max(gaps, count), max(seen, rows)
        return Verdicts(troubles=troubles, steps=gaps, seen=seen)

    def message(self, facts: Facts) -> str:
        """Say how long, and where."""
        return f"{facts.tensor}: {facts.note}"

    def hint(self, facts: Facts) -> str:
        """Say where to look first."""
        return "Look at what the workers did meanwhile: a data loader or collective operation that hangs, a full disk."

    def _of_worker(
        self, view: View, worker: int, modes: Sequence[str], waiting: bool
    ) -> tuple[Trouble | None, int, int]:
        """Return what is wrong with one worker, and how many times were judged, of how many steps."""
        log = view.log(worker)
        rows = np.flatnonzero(view.inside(log.step) & np.isin(log.mode, list(modes)))
        ends, steps = log.end_time_ns[rows] / SECOND, log.step[rows]
        within = np.flatnonzero(np.diff(log.attempt[rows]) == 0) + 1
        gaps = (ends[within] - ends[within - 1]).tolist()
        after, before = steps[within].tolist(), steps[within - 1].tolist()
        last = int(steps[-1]) if len(steps) else 0
        if waiting and view.run.attempts(worker)[-1].status == "running":
            gaps.append(time.time() - (ends[-1] if len(ends) else view.run.created))
            after.append(last + 1)
            before.append(last)
        bad = [index for index, gap in enumerate(gaps) if gap >= self.threshold]
        if not bad:
            return None, len(gaps), len(rows)
        first = bad[0]
        step = min(after[first], last)  # one that is waited for is not in the log
        length = f"{gaps[first]:,.0f} s" if gaps[first] >= 10 else f"{gaps[first]:.3g} s"
        where = f"before step {step}" if step == after[first] else f"since step {step}, and it goes on"
        trouble = Trouble(
            tensor="time between steps",
            worker=worker,
            mode=str(log.mode[log.step == step][0]) if len(rows) else "global",
            step=step,
            last_step=min(after[bad[-1]], last),
            violations=len(bad),
            judged=len(gaps),
            worst=float(max(gaps)),
            since=after[first],
            before=before[first] if len(rows) else None,
            note=f"{length} went by without a new step on worker {worker}, {where} ({len(bad)} of {len(gaps)} times).",
        )
        return trouble, len(gaps), len(rows)
