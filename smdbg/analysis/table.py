"""The statistics that one rule sees: rows are saved steps, columns its tensors, on one worker and in one mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from smdbg.analysis.findings import Bools, Floats, Ints
from smdbg.analysis.rule import Block
from smdbg.analysis.run import Run, StatsMatrix, StepTable
from smdbg.store.format import TensorInfo

PRESENCE = "count"  # the statistic that every saved tensor has


@dataclass
class Matrices:
    """The statistics of one worker and mode, each (collection, statistic) read once and kept."""

    run: Run
    worker: int
    mode: str

    def __post_init__(self) -> None:
        """Read the log; nothing else is read yet."""
        self.log: StepTable = self.run.step_table(self.worker)
        self._kept: dict[tuple[str, str], StatsMatrix] = {}

    def get(self, collection: str, statistic: str) -> StatsMatrix:
        """Return the matrix of one statistic over all tensors of a collection."""
        key = (collection, statistic)
        if key not in self._kept:
            self._kept[key] = self.run.stats(statistic, collection=collection, mode=self.mode, worker=self.worker)
        return self._kept[key]


@dataclass(frozen=True)
class Table:
    """All rows of some tensors on one worker in one mode: steps int64[rows], the rest [rows, tensors]."""

    run: Run
    worker: int
    mode: str
    infos: tuple[TensorInfo, ...]
    steps: Ints
    mode_steps: Ints
    attempts: Ints
    present: Bools
    statistics: Mapping[str, Floats]

    def blocks(self, starts: Sequence[int], look_back: int, values: bool) -> Iterator[Block]:
        """Cut the table into blocks that begin at the rows `starts`, each with up to `look_back` earlier rows."""
        names = tuple(info.name for info in self.infos)
        for start, end in pairwise([*starts, len(self.steps)]):
            part = slice(max(start - look_back, 0), end)
            yield Block(
                worker=self.worker,
                mode=self.mode,
                names=names,
                infos=self.infos,
                steps=self.steps[part],
                mode_steps=self.mode_steps[part],
                present=self.present[part],
                first=start - part.start,
                statistics={name: matrix[part] for name, matrix in self.statistics.items()},
                read=self._read if values else None,
            )

    def at(self, row: int, column: int) -> dict[str, float]:
        """Return the statistics of one tensor at one row."""
        return {name: float(matrix[row, column]) for name, matrix in self.statistics.items()}

    def row_before(self, row: int, column: int) -> int | None:
        """Return the newest row before `row` at which the tensor is present, None when there is none."""
        earlier = np.flatnonzero(self.present[:row, column])
        return int(earlier[-1]) if len(earlier) else None

    def _read(self, name: str, step: int) -> object:
        return self.run.tensor(name).value(step, worker=self.worker)


def read_table(
    matrices: Matrices, infos: Sequence[TensorInfo], statistics: Sequence[str], start: int, end: int | None
) -> Table:
    """Return the table of these tensors from step `start` up to, not including, `end`.

    Its rows are the steps at which any of the tensors is present; NaN and False stand where one is not.
    """
    homes: dict[str, list[int]] = {}
    for index, info in enumerate(infos):
        homes.setdefault(info.collection, []).append(index)
    parts = [_Part.of(matrices, home, columns, infos) for home, columns in homes.items()]
    steps = np.unique(np.concatenate([np.zeros(0, np.int64), *(part.steps_present() for part in parts)]))
    steps = steps[(steps >= start) & ((end is None) | (steps < (end or 0)))]
    present = np.zeros((len(steps), len(infos)), np.bool_)
    tables = {name: np.full(present.shape, np.nan) for name in statistics}
    for part in parts:
        part.place(part.base.present, steps, present)
        for name, table in tables.items():
            part.place(matrices.get(part.collection, name).matrix, steps, table)
    rows = np.searchsorted(matrices.log.step, steps)
    return Table(
        run=matrices.run,
        worker=matrices.worker,
        mode=matrices.mode,
        infos=tuple(infos),
        steps=steps,
        mode_steps=matrices.log.mode_step[rows],
        attempts=matrices.log.attempt[rows],
        present=present,
        statistics=tables,
    )


@dataclass(frozen=True)
class _Part:
    """The share of a table that comes from one collection: columns `source` of its matrices go to `target`."""

    collection: str
    base: StatsMatrix
    source: Ints
    target: Ints

    @classmethod
    def of(cls, matrices: Matrices, collection: str, columns: Sequence[int], infos: Sequence[TensorInfo]) -> _Part:
        """Find the columns of these tensors in the matrices of their collection; one not there yet is left out."""
        base = matrices.get(collection, PRESENCE)
        place = {name: index for index, name in enumerate(base.names)}
        known = [index for index in columns if infos[index].name in place]
        source = np.array([place[infos[index].name] for index in known], np.int64)
        return cls(collection, base, source, np.array(known, np.int64))

    def steps_present(self) -> Ints:
        """Return the steps at which any of the tensors is present."""
        return np.asarray(self.base.steps[self.base.present[:, self.source].any(axis=1)], np.int64)

    def place(self, matrix: Bools | Floats, steps: Ints, table: Bools | Floats) -> None:
        """Copy the columns of `matrix` into `table`, whose rows are `steps`."""
        rows = np.flatnonzero(np.isin(self.base.steps, steps))
        into = np.searchsorted(steps, self.base.steps[rows])
        table[into[:, None], self.target] = matrix[rows[:, None], self.source]
