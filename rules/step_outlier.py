"""step_outlier: steps that take much longer than the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.rule import Facts, Kind, Needs, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.training import places
from smdbg.analysis.view import View

FIRST = 100  # steps that are not judged: they hold caches, compilation and the like
SECOND = 1e9  # ns


@dataclass(frozen=True, kw_only=True)
class StepOutlier(RunRule):
    """Many steps take much longer than the others.

    What it does
    ------------
    Reads from the commit log how long each train step took, less the time inside the hook, and fires once more than
    `n_outliers` of them took longer than the mean plus `stddev` standard deviations, over the first 100 steps and all
    later ones. The first 100 steps themselves are not reported.

    Why it matters
    --------------
    In a job of many workers the slowest one sets the pace: a few slow steps on each slow all of them, all the time.

    Parameters
    ----------
    stddev (standard deviations, default 3): how far above the mean a step is an outlier.
    n_outliers (steps, default 10): this many are tolerated.

    Example output
    --------------
    step time: 37 of 1,000 train steps of worker 1 took more than 0.52 s (mean 0.2 s), the longest of them 3.1 s; more
    than 10 since step 640.

    How to fix
    ----------
    See what the slow steps share: their distance (checkpoints, evaluation, garbage collection, log writing), the worker
    (a shared or throttled machine) or the data (long sequences, slow storage).

    References
    ----------
    Amazon SageMaker Debugger, built-in rule StepOutlier.
    """

    name: ClassVar[str] = "step_outlier"

    stddev: float = parameter(3.0, unit="standard deviations", minimum=0, help="how far above the mean an outlier is")
    n_outliers: int = parameter(10, unit="steps", minimum=0, help="this many are tolerated")

    def needs(self) -> Needs:
        """Read the commit log alone."""
        return Needs(tensors=False, minimum=FIRST + 1)

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge the training."""
        wanted = [self.mode] if self.mode else ["train", "global"]
        return [mode for mode in wanted if mode in present][:1]

    def kinds(self) -> tuple[Kind, ...]:
        """Seconds of a step."""
        return (Kind("seconds"),)

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each worker's log."""
        troubles: list[Trouble] = []
        judged = seen = 0
        for worker, mode in places(self, view):
            log = view.log(worker)
            rows = np.flatnonzero(view.inside(log.step) & (log.mode == mode))
            seconds = (log.duration_ns[rows] - log.hook_ns[rows]) / SECOND
            seen, judged = max(seen, len(rows)), max(judged, len(rows) - FIRST)
            if len(rows) <= FIRST:
                continue
            limit = float(seconds.mean() + self.stddev * seconds.std())
            outliers = np.flatnonzero(seconds > limit)
            over = outliers[self.n_outliers :]
            over = over[over >= FIRST]
            if len(over):
                steps = log.step[rows]
                troubles.append(
                    Trouble(
                        tensor="step time",
                        worker=worker,
                        mode=mode,
                        step=int(steps[over[0]]),
                        last_step=int(steps[over[-1]]),
                        violations=len(over),
                        judged=len(rows) - FIRST,
                        worst=float(seconds[over].max()),
                        since=int(steps[outliers[0]]),
                        before=int(steps[outliers[0] - 1]) if outliers[0] else None,
                        note=(
                            f"{len(outliers):,} of {len(rows):,} {mode} steps of worker {worker} took more than"
                            f" {limit:.3g} s (mean {seconds.mean():.3g} s), the longest of them"
                            f" {seconds[outliers].max():.3g} s; more than {self.n_outliers} since step"
                            f" {steps[over[0]]}"
                        ),
                    )
                )
        return Verdicts(troubles=troubles, steps=max(judged, 0), seen=seen)

    def message(self, facts: Facts) -> str:
        """Say how many, and how long."""
        return f"{facts.tensor}: {facts.note}."

    def hint(self, facts: Facts) -> str:
        """Say where to look first."""
        return "See what the slow steps share: their distance, their worker or their data."
