"""similar_across_runs: the first step at which a tensor differs from the same one in another run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from smdbg.analysis.rule import Bools, Facts, Floats, Ints, Kind, Needs, parameter
from smdbg.analysis.run import open_run
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.view import View

COUNTS = ("count", "nan", "posinf", "neginf")
SIZES = ("min", "max", "mean", "std", "abs_max")
STATISTICS = (*COUNTS, *SIZES, "l2")


@dataclass(frozen=True, kw_only=True)
class SimilarAcrossRuns(RunRule):
    """A tensor differs from the one of the same name in another run.

    What it does
    ------------
    Compares each tensor with the one of the same name in the run `other_run`, at the steps, modes and workers that both
    have, and reports the first step at which they differ: where an element is further than `atol` + `rtol` * abs(other)
    from its counterpart. Full values are compared where both runs kept them, else the statistics, with tolerances that
    values which agree never break; the finding says which. The other run is opened with the storage options of this
    one.

    Why it matters
    --------------
    Two runs that should be the same, of two library versions, two machines or before and after a change, part at one
    tensor first. That is where to look.

    Parameters
    ----------
    other_run (default none): where the other run is, a folder or a URL; required.
    rtol (default 1e-5): tolerance relative to the other run.
    atol (default 1e-8): absolute tolerance.

    Example output
    --------------
    gradient/layer1.weight differs from the other run first at step 12, by up to 0.003 (full values compared).

    How to fix
    ----------
    Follow the first tensor that differs: an input means other data or another order of it, a weight at step 0 another
    seed, an output other code or kernels.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule SimilarAcrossRuns.
    """

    name: ClassVar[str] = "similar_across_runs"

    other_run: str | None = parameter(None, help="where the other run is, a folder or a URL; required")
    rtol: float = parameter(1e-5, minimum=0, help="tolerance relative to the other run")
    atol: float = parameter(1e-8, minimum=0, help="absolute tolerance")

    def needs(self) -> Needs:
        """Read statistics; values are read where both runs have them."""
        return Needs(STATISTICS)

    def applicable(self) -> str | None:
        """Ask for the other run."""
        return None if self.other_run else "it needs other_run: the folder or URL of the run to compare with"

    def kinds(self) -> tuple[Kind, ...]:
        """Of full values, and of statistics."""
        return Kind("largest_difference", None, "full values"), Kind("largest_difference", None, "statistics")

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Compare tensor by tensor."""
        run = open_run(self.other_run or "", storage_options=view.run.storage_options)
        theirs = View(run, {name: run.tensor(name).info for name in run.tensors()}, view.start, view.end)
        shared = [name for name in names if name in theirs.catalogue]
        if names and not shared:
            return Verdicts(not_applicable=f"{self.other_run} has no tensor of the same name")
        troubles: list[Trouble] = []
        judged: set[str] = set()
        steps = by_values = by_statistics = 0
        for worker in set(view.run.workers()) & set(run.workers()):
            if self.workers and worker not in self.workers:
                continue
            for mode in self.modes(view.run.modes()):
                compared = _Compared(self, view, theirs, shared, mode, worker)
                steps = max(steps, len(compared.steps))
                for column, name in enumerate(shared):
                    trouble = compared.tensor(column)
                    troubles += [trouble] if trouble is not None else []
                    judged.update([name] if compared.both[:, column].any() else [])
                by_values, by_statistics = by_values + compared.by_values, by_statistics + compared.by_statistics
        missing = len(names) - len(shared)
        parts = [f"{missing} of {len(names)} tensors are in this run only"] if missing else []
        if by_statistics:
            parts.append(f"{by_statistics} of {by_values + by_statistics} values compared by statistics alone")
        detail = "; ".join(parts) if steps else "the runs have no saved step in common"
        return Verdicts(troubles=troubles, judged=sorted(judged), steps=steps, detail=detail)

    def message(self, facts: Facts) -> str:
        """Say since when, and how far."""
        return (
            f"{facts.tensor} differs from the other run first at step {facts.step}{facts.note}"
            f" ({facts.kind.name} compared)."
        )

    def hint(self, facts: Facts) -> str:
        """Say what a first difference means."""
        return "Follow the first tensor that differs: inputs mean other data, weights at the start another seed."


@dataclass
class _Compared:
    """Two runs on one worker in one mode: arrays [steps that both have, shared tensors]."""

    rule: SimilarAcrossRuns
    view: View
    theirs: View
    names: Sequence[str]
    mode: str
    worker: int
    by_values: int = 0
    by_statistics: int = 0
    steps: Ints = field(init=False)
    both: Bools = field(init=False)

    def __post_init__(self) -> None:
        """Read the statistics of both, and compare them."""
        mine, other = (view.table(self.names, STATISTICS, self.mode, self.worker) for view in (self.view, self.theirs))
        self.steps, here, there = np.intersect1d(mine.steps, other.steps, return_indices=True)
        self.both = mine.present[here] & other.present[there]
        a = {name: matrix[here] for name, matrix in mine.statistics.items()}
        b = {name: matrix[there] for name, matrix in other.statistics.items()}
        # Values that agree cannot break these: no statistic moves by more than the farthest element, l2 by their root.
        slack = self.rule.atol + self.rule.rtol * np.nan_to_num(b["abs_max"])
        apart = {name: np.abs(a[name] - b[name]) > slack for name in SIZES}
        finite = np.maximum(b["count"] - b["nan"] - b["posinf"] - b["neginf"], 0)
        apart["l2"] = np.abs(a["l2"] - b["l2"]) > self.rule.atol * np.sqrt(finite) + self.rule.rtol * b["l2"]
        apart |= {name: a[name] != b[name] for name in COUNTS}
        self._apart = np.logical_or.reduce(list(apart.values())) & self.both
        self._distance = np.fmax.reduce([np.abs(a[name] - b[name]) for name in SIZES])

    def tensor(self, column: int) -> Trouble | None:
        """Return how a tensor differs, None where it does not."""
        name = self.names[column]
        rows = np.flatnonzero(self.both[:, column])
        apart, distance = self._apart[rows, column], self._distance[rows, column]
        place = {int(step): row for row, step in enumerate(self.steps[rows])}
        kept = [set(v.value_steps(name, self.mode, self.worker)) for v in (self.view, self.theirs)] if len(rows) else []
        wanted = sorted(set.intersection(*kept) & place.keys()) if kept else []
        self.by_values, self.by_statistics = self.by_values + len(wanted), self.by_statistics + len(rows) - len(wanted)
        pair = (view.values(name, self.mode, self.worker, wanted) for view in (self.view, self.theirs))
        for (step, mine), (_, other) in zip(*pair, strict=True):
            apart[place[step]], distance[place[step]] = self._differ(mine, other)
        if not apart.any():
            return None
        bad = np.flatnonzero(apart)
        first, last = int(bad[0]), int(bad[-1])
        step = int(self.steps[rows[first]])
        how_far = distance[first]
        return Trouble(
            tensor=name,
            worker=self.worker,
            mode=self.mode,
            step=step,
            last_step=int(self.steps[rows[last]]),
            violations=len(bad),
            judged=len(rows),
            worst=float(np.fmax.reduce(distance[bad])),
            kind=0 if step in wanted else 1,
            before=int(self.steps[rows[first - 1]]) if first else None,
            note=f", by up to {how_far:.3g}" if np.isfinite(how_far) and how_far > 0 else ", in shape or in kind",
        )

    def _differ(self, mine: npt.NDArray[Any], other: npt.NDArray[Any]) -> tuple[bool, float]:
        """Tell whether two values differ, and the largest difference of finite elements (NaN where there is none)."""
        if mine.shape != other.shape:
            return True, np.nan
        if mine.dtype.kind in "USmM" or other.dtype.kind in "USmM":
            return not np.array_equal(mine, other), np.nan
        wide = np.dtype(np.complex128 if "c" in (mine.dtype.kind, other.dtype.kind) else np.float64)
        a: npt.NDArray[Any] = mine.astype(wide)
        b: npt.NDArray[Any] = other.astype(wide)
        if np.allclose(a, b, rtol=self.rule.rtol, atol=self.rule.atol, equal_nan=True):
            return False, 0.0
        with np.errstate(invalid="ignore"):
            gap: Floats = np.abs(a - b)
        return True, float(np.max(gap, where=np.isfinite(gap), initial=0.0))
