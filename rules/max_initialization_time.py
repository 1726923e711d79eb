"""max_initialization_time: a training that takes long to begin."""

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
class MaxInitializationTime(RunRule):
    """The first step came late.

    What it does
    ------------
    Fires when the first step of a worker ended more than `threshold` seconds after the run was created, or when a
    worker of a running run has had none for that long. Of a worker whose first steps were repeated by a later attempt
    it cannot tell.

    Why it matters
    --------------
    What happens before the first step (downloads, caches, compilation, waiting for other workers) is paid for at each
    start of a training.

    Parameters
    ----------
    threshold (s, default 1200): fire when the first step came later.

    Example output
    --------------
    first step: step 0 of worker 0 ended 1,904 s after the run was created.

    How to fix
    ----------
    Time the parts of the start: reading and preprocessing data, loading weights, compiling, waiting for workers. Cache
    what does not change.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule MaxInitializationTime.
    """

    name: ClassVar[str] = "max_initialization_time"

    threshold: float = parameter(1200.0, unit="s", minimum=0, help="fire when the first step came later")

    def needs(self) -> Needs:
        """Read the commit log alone."""
        return Needs(tensors=False)

    def kinds(self) -> tuple[Kind, ...]:
        """Seconds until the first step."""
        return (Kind("seconds", self.threshold),)

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each worker's first step."""
        troubles: list[Trouble] = []
        judged = repeated = 0
        modes = self.modes(view.run.modes())
        for worker in [w for w in view.run.workers() if not self.workers or w in self.workers]:
            log, attempts = view.log(worker), view.run.attempts(worker)
            rows = np.flatnonzero(np.isin(log.mode, list(modes)))
            first = int(rows[log.end_time_ns[rows].argmin()]) if len(rows) else -1
            if first >= 0 and log.attempt[first] != attempts[0].attempt:
                repeated += 1
                continue
            running = view.run.status == "running" and attempts[-1].status == "running"
            until = log.end_time_ns[first] / SECOND if first >= 0 else time.time() if running else None
            if until is None:
                continue
            judged += first >= 0
            took = float(until) - view.run.created
            if took > self.threshold:
                step, mode = (int(log.step[first]), str(log.mode[first])) if first >= 0 else (None, "global")
                troubles.append(self._trouble(worker, took, step, mode))
        detail = f"the first steps of {repeated} workers were repeated by a later attempt" if repeated else ""
        return Verdicts(troubles=troubles, steps=int(judged > 0), detail=detail)

    def message(self, facts: Facts) -> str:
        """Say how late."""
        return f"{facts.tensor}: {facts.note}."

    def hint(self, facts: Facts) -> str:
        """Say where to look first."""
        return "Time the parts of the start: reading data, loading weights, compiling, waiting for other workers."

    def _trouble(self, worker: int, took: float, step: int | None, mode: str) -> Trouble:
        seconds = f"{took:,.0f} s" if took >= 10 else f"{took:.3g} s"
        note = f"step {step} of worker {worker} ended {seconds} after the run was created"
        if step is None:
            note = f"worker {worker} has not ended step 0 yet, {seconds} after the run was created"
        return Trouble(
            tensor="first step",
            worker=worker,
            mode=mode,
            step=step or 0,
            last_step=step or 0,
            violations=1,
            judged=1,
            worst=took,
            note=note,
        )
