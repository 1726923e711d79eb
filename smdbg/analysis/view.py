"""What rules see of a run: statistics, series and values, each read once however many rules ask for it.

A view may be asked from several threads. What it has read it keeps, within a bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import RLock
from typing import Any

import numpy as np
import numpy.typing as npt

from smdbg.analysis.course import Course, course_of
from smdbg.analysis.findings import Floats, Ints
from smdbg.analysis.run import Run, StatsMatrix, StepTable
from smdbg.analysis.table import PRESENCE, Table, read_table
from smdbg.store.format import TensorInfo

KEPT_BYTES = 320 << 20  # of matrices; those used longest ago are read again
FEATURE_BYTES = 64 << 20  # of per-feature statistics

Features = npt.NDArray[np.float32] | list[npt.NDArray[np.float32]]


@dataclass
class _Reads:
    """What has been read, shared by all views of a run."""

    lock: RLock = field(default_factory=RLock)
    logs: dict[int, StepTable] = field(default_factory=dict)
    courses: dict[tuple[int, int, int | None], Course] = field(default_factory=dict)
    matrices: dict[tuple[str, str, str, int], StatsMatrix] = field(default_factory=dict)
    kept_bytes: int = 0
    features: dict[tuple[str, str, int], tuple[Ints, Features]] = field(default_factory=dict)
    feature_bytes: int = 0
    modes: dict[str, list[str]] = field(default_factory=dict)
    planned: dict[str, set[str]] = field(default_factory=dict)
    measures: dict[tuple[str, str, str, int], dict[int, Floats]] = field(default_factory=dict)


@dataclass(frozen=True)
class View:
    """A run between two global steps, `end` not included; `catalogue` has the tensors that are there, by name."""

    run: Run
    catalogue: Mapping[str, TensorInfo]
    start: int = 0
    end: int | None = None
    _reads: _Reads = field(default_factory=_Reads)

    def between(self, start: int, end: int | None) -> View:
        """Return the same view with other bounds; what was read is shared."""
        return replace(self, start=start, end=end)

    def plan(self, collection: str, statistics: Sequence[str]) -> None:
        """Say which statistics of a collection will be asked for, so that they are read together."""
        self._reads.planned.setdefault(collection, {PRESENCE}).update(statistics)

    def log(self, worker: int = 0) -> StepTable:
        """Return the commit log of a worker, without bounds."""
        with self._reads.lock:
            if worker not in self._reads.logs:
                self._reads.logs[worker] = self.run.step_table(worker)
            return self._reads.logs[worker]

    def course(self, worker: int = 0) -> Course:
        """Return how the training went on a worker, within the bounds."""
        key = (worker, self.start, self.end)
        with self._reads.lock:
            if key not in self._reads.courses:
                self._reads.courses[key] = course_of(self, worker)
            return self._reads.courses[key]

    def matrix(self, collection: str, statistic: str, mode: str, worker: int = 0) -> StatsMatrix:
        """Return one statistic of all tensors of a collection, without bounds. It must not be changed."""
        reads, key = self._reads, (collection, statistic, mode, worker)
        with reads.lock:
            if key in reads.matrices:
                reads.matrices[key] = found = reads.matrices.pop(key)  # now the last one used
                return found
            planned = reads.planned.get(collection, {PRESENCE}) | {statistic}
            missing = sorted(name for name in planned if (collection, name, mode, worker) not in reads.matrices)
            for name, matrix in self.run.stats_of(missing, collection, mode, worker=worker).items():
                matrix.matrix.flags.writeable = matrix.present.flags.writeable = False  # rules share them
                reads.matrices[collection, name, mode, worker] = matrix
                reads.kept_bytes += matrix.matrix.nbytes
            found = reads.matrices[key]
            for old in list(reads.matrices):
                if reads.kept_bytes <= KEPT_BYTES or old[0] == collection and old[2:] == (mode, worker):
                    break
                reads.kept_bytes -= reads.matrices.pop(old).matrix.nbytes
            return found

    def table(self, names: Sequence[str], statistics: Sequence[str], mode: str, worker: int = 0) -> Table:
        """Return statistics of these tensors, [rows, tensors] each, at the steps where any of them is present.

        A statistic may be that of a tensor that belongs to the named one: `gradient.l2`, `parameter.l2`.
        """
        return read_table(self, [self.catalogue[name] for name in names], statistics, mode, worker)

    def series(self, name: str, mode: str, worker: int = 0, statistic: str = "mean") -> tuple[Ints, Floats]:
        """Return (steps, values) of one statistic of one tensor, where it is present; of a number, mean is its value.

        A number that is not finite is NaN here.
        """
        info = self.catalogue[name]
        found = self.matrix(info.collection, statistic, mode, worker)
        column = found.names.index(name) if name in found.names else None
        if column is None:
            return np.zeros(0, np.int64), np.zeros(0)
        rows = found.present[:, column] & self.inside(found.steps)
        return found.steps[rows], found.matrix[rows, column]

    def inside(self, steps: Ints) -> npt.NDArray[np.bool_]:
        """Tell which steps lie within the bounds."""
        found: npt.NDArray[np.bool_] = steps >= self.start
        return found if self.end is None else found & (steps < self.end)

    def features(self, name: str, mode: str, worker: int = 0) -> list[tuple[int, npt.NDArray[np.float32]]]:
        """Return (step, [features, 5]) where per-feature statistics were kept; columns as `smdbg.stats.FEATURES`."""
        tensor = self.run.tensor(name)
        if worker not in tensor.workers():
            return []
        reads, key = self._reads, (name, mode, worker)
        with reads.lock:
            if key not in reads.features:
                found = tensor.features(mode, worker)
                size = sum(table.nbytes for table in found[1])
                if reads.feature_bytes + size > FEATURE_BYTES:
                    reads.features.clear()
                    reads.feature_bytes = 0
                reads.features[key] = found
                reads.feature_bytes += size
            steps, tables = reads.features[key]
        inside = self.inside(steps)
        return [(int(step), table) for step, table, take in zip(steps, tables, inside, strict=True) if take]

    def value_steps(self, name: str, mode: str, worker: int = 0) -> list[int]:
        """Return the steps at which the full value of a tensor was kept."""
        tensor = self.run.tensor(name)
        if worker not in tensor.workers():
            return []
        with self._reads.lock:
            steps = tensor.value_steps(mode, worker)
        return [int(step) for step in steps[self.inside(steps)]]

    def values(
        self, name: str, mode: str, worker: int = 0, steps: Sequence[int] | None = None
    ) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Yield (step, value) where the full value was kept, in bounded memory."""
        wanted = self.value_steps(name, mode, worker) if steps is None else list(steps)
        if wanted:
            yield from self.run.tensor(name).each(wanted, mode, worker)

    def readable(self, name: str, worker: int) -> bool:
        """Tell whether a worker saved a tensor at all."""
        return worker in self.run.tensor(name).workers()

    def measured(self, label: str, name: str, mode: str, worker: int = 0) -> dict[int, Floats]:
        """Return what the `measure` of the rule called `label` made of each full value of a tensor, by step."""
        return self._reads.measures.get((label, name, mode, worker), {})

    def keep_measures(self, label: str, name: str, mode: str, worker: int, found: dict[int, Floats]) -> None:
        """Keep what a rule measured."""
        self._reads.measures[label, name, mode, worker] = found

    def modes_of(self, name: str) -> list[str]:
        """Return the modes in which a tensor was saved, on any worker, without bounds."""
        if name not in self._reads.modes:
            with self._reads.lock:
                self._reads.modes[name] = self.run.modes(name)
        return self._reads.modes[name]
