"""The statistics that one rule sees: rows are saved steps, columns its tensors, on one worker and in one mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from smdbg.analysis.findings import Bools, Floats, Ints
from smdbg.analysis.rule import Block
from smdbg.store.format import TensorInfo

if TYPE_CHECKING:
    from smdbg.analysis.run import Run, StatsMatrix
    from smdbg.analysis.view import View

PRESENCE = "count"  # the statistic that every saved tensor has
PARAMETER = "parameter"


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

    def blocks(
        self, starts: Sequence[int], look_back: int, values: bool, measures: Mapping[tuple[int, int], Floats]
    ) -> Iterator[Block]:
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
                measures=measures,
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
    view: View, infos: Sequence[TensorInfo], statistics: Sequence[str], mode: str, worker: int
) -> Table:
    """Return the table of these tensors within the bounds of the view.

    Its rows are the steps at which any of the tensors is present; NaN and False stand where one is not. A statistic
    with a dot is that of the tensor that belongs to each of them: `gradient.l2`.
    """
    parts = _parts(view, infos, PRESENCE, mode, worker)
    steps = parts[0].steps_present() if len(parts) == 1 else _union([part.steps_present() for part in parts])
    steps = steps[view.inside(steps)]
    present = _placed(parts, "present", steps, len(infos), np.zeros)
    tables: dict[str, Floats] = {}
    for name in statistics:
        role, dot, own = name.partition(".")
        chosen = partners(view.catalogue, infos, role) if dot else list(infos)
        found = _parts(view, chosen, own if dot else name, mode, worker)
        tables[name] = _placed(found, "matrix", steps, len(infos), _nans)
    log = view.log(worker)
    rows = np.searchsorted(log.step, steps)
    return Table(
        run=view.run,
        worker=worker,
        mode=mode,
        infos=tuple(infos),
        steps=steps,
        mode_steps=log.mode_step[rows],
        attempts=log.attempt[rows],
        present=present,
        statistics=tables,
    )


def partners(
    catalogue: Mapping[str, TensorInfo], infos: Sequence[TensorInfo], role: str
) -> list[TensorInfo | None]:
    """Return, for each tensor, the one of the role (gradient, update, ...) that belongs to the same parameter.

    `parameter` is the parameter itself. None where there is no such tensor.
    """
    known = {(info.of, info.role): info for info in catalogue.values() if info.of}
    found: list[TensorInfo | None] = []
    for info in infos:
        parameter = info.of or info.name
        found.append(catalogue.get(parameter) if role == PARAMETER else known.get((parameter, role)))
    return found


def _union(steps: Sequence[Ints]) -> Ints:
    return np.unique(np.concatenate([np.zeros(0, np.int64), *steps]))


def _nans(shape: tuple[int, int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.full(shape, np.nan, dtype)


@dataclass(frozen=True)
class _Part:
    """The share of a table that comes from one collection: columns `source` of its matrix go to `target`."""

    base: StatsMatrix
    source: Ints
    target: Ints

    def steps_present(self) -> Ints:
        """Return the steps at which any of the tensors is present."""
        return np.asarray(self.base.steps[self.base.present[:, _slice(self.source)].any(axis=1)], np.int64)


def _parts(
    view: View, infos: Sequence[TensorInfo | None], statistic: str, mode: str, worker: int
) -> list[_Part]:
    """Find the columns of these tensors in the matrices of their collections; one not there yet is left out."""
    homes: dict[str, list[int]] = {}
    for index, info in enumerate(infos):
        if info is not None:
            homes.setdefault(info.collection, []).append(index)
    parts = []
    for home, columns in homes.items():
        base = view.matrix(home, statistic, mode, worker)
        place = {name: index for index, name in enumerate(base.names)}
        names = [(index, info.name) for index in columns if (info := infos[index]) is not None and info.name in place]
        source = np.array([place[name] for _, name in names], np.int64)
        parts.append(_Part(base, source, np.array([index for index, _ in names], np.int64)))
    return parts


def _placed(parts: Sequence[_Part], what: str, steps: Ints, width: int, empty: Any) -> npt.NDArray[Any]:
    """Return a table [steps, width] put together from the matrices (or the presence) of some collections."""
    dtype = np.bool_ if what == "present" else np.float64
    if len(parts) == 1 and np.array_equal(parts[0].target, np.arange(width)):
        matrix: npt.NDArray[Any] = getattr(parts[0].base, what)[:, _slice(parts[0].source)]
        if np.array_equal(parts[0].base.steps, steps):
            return matrix  # nothing to place: no copy
    table: npt.NDArray[Any] = empty((len(steps), width), dtype)
    for part in parts:
        matrix = getattr(part.base, what)[:, _slice(part.source)]
        if np.array_equal(part.base.steps, steps):
            table[:, _slice(part.target)] = matrix
            continue
        rows = np.flatnonzero(np.isin(part.base.steps, steps))
        into = np.searchsorted(steps, part.base.steps[rows])
        table[into[:, None], part.target] = matrix[rows]
    return table


def _slice(columns: Ints) -> Any:
    """Return a slice where the columns follow each other, so that nothing is copied; else the columns."""
    if len(columns) and (np.diff(columns) == 1).all():
        return slice(int(columns[0]), int(columns[-1]) + 1)
    return columns
