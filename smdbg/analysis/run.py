"""Reading a run: open_run, Run and Tensor. Steps are global step numbers, counted over all modes from 0."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smdbg.analysis.concurrency import requests_at_a_time
from smdbg.analysis.matrix import statistic_matrices, tensor_statistics
from smdbg.analysis.tensor import Tensor, listing
from smdbg.errors import BadSelection, DamagedData, TensorNotFound, near
from smdbg.select import select
from smdbg.store.backend import open_backend
from smdbg.store.format import FLAG_DROPPED, LOG_COLUMNS, MODES, Entry, TensorInfo
from smdbg.store.reader import Attempt, StoredRun

Steps = NDArray[np.int64]

__all__ = ["Run", "StatsMatrix", "StepTable", "Tensor", "WorkerFacts", "list_runs", "open_run"]


class StatsMatrix(NamedTuple):
    """One statistic of many tensors: `matrix` [steps, tensors] float64, NaN where `present` is False."""

    steps: Steps
    names: list[str]
    matrix: NDArray[np.float64]
    present: NDArray[np.bool_]


@dataclass(frozen=True)
class StepTable:
    """The commit log of one worker: arrays of equal length, in step order. Times are unix ns and ns."""

    step: Steps
    mode: NDArray[np.str_]
    mode_step: Steps
    end_time_ns: Steps
    duration_ns: Steps
    hook_ns: Steps
    flags: Steps
    attempt: Steps


@dataclass(frozen=True)
class WorkerFacts:
    """One attempt of a worker. `last_commit`: unix seconds by the store's clock (0 where it was not asked for).

    `dropped_steps`: those that lost something; `unlogged_steps`: of them, those that are not in the log at all.
    """

    rank: int
    attempt: int
    status: str
    dropped_steps: int
    dropped_rows: int
    switched_off: bool
    mesh: Mapping[str, Any]
    unlogged_steps: int
    first_step: int | None
    last_step: int | None
    last_commit: float


def open_run(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    attempt: str | int = "latest",
    concurrency: int | None = None,
) -> Run:
    """Open a run for reading.

    `attempt`: 'latest' shows of a resumed worker what no later attempt repeated, 'all' everything, a number that
    attempt alone. `concurrency`: requests at a time; None: the variable SMDBG_CONCURRENCY, else 8. Raises RunNotFound,
    NotARun, NewerFormat, DamagedData, AccessRefused, StoreError; BadSelection or BadConfig for what was asked.
    """
    if attempt not in ("latest", "all") and not (isinstance(attempt, int) and attempt >= 0):
        raise BadSelection(f"attempt must be 'latest', 'all' or a number from 0, not {attempt!r}")
    backend = open_backend(url, storage_options, requests_at_a_time(concurrency))
    return Run(StoredRun(backend, attempt), dict(storage_options or {}))


def list_runs(root: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Return the URLs of the runs directly below a folder or URL, by name."""
    backend = open_backend(root, storage_options, requests_at_a_time(None))
    folders = [item.name for item in backend.list("") if item.folder]

    def holds_run(name: str) -> bool:
        return any(item.name == "zarr.json" for item in backend.list(name))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(holds_run, folders))
    base = os.fspath(root).rstrip("/")
    return [f"{base}/{name}" for name, is_run in zip(folders, found, strict=True) if is_run]


class Run:
    """A run as its workers left it, or as it stands while they write (`refresh` looks again)."""

    def __init__(self, stored: StoredRun, storage_options: Mapping[str, Any] | None = None) -> None:
        """Wrap a stored run; use `open_run`."""
        self._stored = stored
        self._shown: dict[tuple[int, str, str | None], NDArray[np.int64]] = {}
        self._modes: dict[tuple[int, str, int], frozenset[int]] = {}
        self.storage_options = dict(storage_options or {})
        self._catalogue()

    def _catalogue(self) -> None:
        self._entries: dict[str, dict[tuple[int, int], Entry]] = {}
        for one in self._attempts():
            shown = {home: self._rows(one, home, None) for home in one.bits}
            for name, entry in one.entries.items():
                rows = shown[entry.info.collection]
                if rows.size and rows[-1] >= entry.since:  # the catalogue may be ahead of the log
                    self._entries.setdefault(name, {})[one.rank, one.attempt] = entry

    def _attempts(self) -> list[Attempt]:
        return [one for rank in self.workers() for one in self._stored.of_rank(rank)]

    def __repr__(self) -> str:
        """Say what run it is."""
        return f"Run({self.url!r}, {self.status}, {len(self._entries)} tensors)"

    # --- facts ---

    @property
    def url(self) -> str:
        """Where the run is."""
        return self._stored.backend.url

    @property
    def run_id(self) -> str:
        """The run's own id, made when it began."""
        return str(self._stored.root.get("run_id", ""))

    @property
    def created(self) -> float:
        """When the run began, unix seconds by the writer's clock."""
        return float(self._stored.root.get("created", 0.0))

    @property
    def status(self) -> str:
        """running, completed, lost, or 'failed: reason'."""
        return self._stored.status()

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What the training was started with."""
        return dict(self._stored.root.get("hyperparameters", {}))

    @property
    def framework(self) -> str:
        """The framework whose hook wrote the run, '' for the neutral one."""
        return str(self._stored.root.get("framework", ""))

    @property
    def versions(self) -> dict[str, str]:
        """Versions of Python and packages at the training."""
        return dict(self._stored.root.get("versions", {}))

    @property
    def argv(self) -> list[str]:
        """The command line of the training, secrets hidden."""
        return list(self._stored.root.get("argv", []))

    @property
    def git_commit(self) -> str:
        """The commit that was checked out at the training, '' if none."""
        return str(self._stored.root.get("git_commit", ""))

    @property
    def seed(self) -> int | None:
        """The seed, where a hyperparameter of that name was given."""
        found = self._stored.root.get("seed")
        return found if isinstance(found, int) else None

    @property
    def world_size(self) -> int:
        """How many processes the training had."""
        return int(self._stored.root.get("world_size", 1))

    @property
    def host(self) -> str:
        """The machine that began the run, '' where it was left out."""
        return str(self._stored.root.get("host", ""))

    @property
    def damaged(self) -> list[str]:
        """What cannot be read, a message for each worker and attempt; the rest of the run is there without it."""
        return [message for _, message in sorted(self._stored.damaged.items())]

    # --- what there is ---

    def workers(self) -> list[int]:
        """Return the ranks that have written and can be read; `damaged` tells of others."""
        return sorted({one.rank for one in self._stored.attempts})

    def attempts(self, worker: int | None = None) -> list[WorkerFacts]:
        """Return every attempt of a worker, or of all."""
        return [_facts(one) for one in self._stored.attempts if worker is None or one.rank == worker]

    def modes(self, tensor: str | None = None) -> list[str]:
        """Return the modes that have steps, or in which a tensor was saved: of global, train, eval, predict."""
        seen: set[int] = set()
        if tensor is None:
            for rank in self.workers():
                seen.update(np.unique(self._stored.log_rows(rank)[:, 1]).tolist())
        else:
            for rank, attempt in self._entries[self.tensor(tensor).name]:
                seen.update(self._modes_on(tensor, rank, attempt))
        return [mode for number, mode in enumerate(MODES) if number in seen]

    def _modes_on(self, name: str, rank: int, attempt: int) -> frozenset[int]:
        """Return the numbers of the modes in which an attempt saved a tensor; told by the catalogue where it can be."""
        one = next(one for one in self._stored.of_rank(rank) if one.attempt == attempt)
        entry = one.entries[name]
        at, home = one.rows_of(entry.info.collection), entry.info.collection
        rows = self._rows(one, home, None)
        if not entry.whole:
            count = tensor_statistics(self._stored, one, entry, rows, ())[1]
            return frozenset(one.log[at[rows[~np.isnan(count)]], 1].tolist())
        key = (id(one), home, entry.since)
        if key not in self._modes:
            self._modes[key] = frozenset(one.log[at[rows[rows >= entry.since]], 1].tolist())
        return self._modes[key]

    def collections(self) -> list[str]:
        """Return the collections that hold something, in order of first save."""
        return list(dict.fromkeys(e.info.collection for found in self._entries.values() for e in found.values()))

    def steps(self, mode: str | None = None, worker: int | None = None) -> Steps:
        """Return the steps at which anything was saved, ascending; over all workers unless one is named."""
        ranks = self.workers() if worker is None else [self._rank(worker)]
        parts = [np.zeros(0, np.int64)]
        for rank in ranks:
            log = self._stored.log_rows(rank)
            parts.append(log[(log[:, 6] != 0) & _mode_mask(log, mode), 0])
        return np.unique(np.concatenate(parts))

    def complete_steps(self, mode: str | None = None) -> Steps:
        """Return the steps that every writer which is not lost has committed, ascending, saved or not."""
        now = time.time()
        writers = set(self._stored.root["writers"]) | set(self.workers())
        begun = self.workers()
        parts = [
            np.unique(self._logged(rank, mode)) if rank in begun else np.zeros(0, np.int64)
            for rank in sorted(writers)
            if not self._stored.lost(rank, now)
        ]
        common = parts[0] if parts else np.zeros(0, np.int64)
        for part in parts[1:]:
            common = np.intersect1d(common, part, assume_unique=True)
        return common

    def _logged(self, rank: int, mode: str | None) -> Steps:
        log = self._stored.log_rows(rank)
        steps: Steps = log[_mode_mask(log, mode), 0]
        return steps

    def step_table(self, worker: int = 0) -> StepTable:
        """Return the commit log of a worker, all attempts that are shown."""
        rank = self._rank(worker)
        logs = [(one.attempt, one.log[self._stored.visible(one)]) for one in self._stored.of_rank(rank)]
        log = np.concatenate([part for _, part in logs]) if logs else np.zeros((0, len(LOG_COLUMNS)), np.int64)
        numbers = np.concatenate([np.full(len(part), n, np.int64) for n, part in logs]) if logs else log[:, 0]
        order = np.argsort(log[:, 0], kind="stable")
        log, numbers = log[order], numbers[order]
        modes = np.array(MODES)[np.clip(log[:, 1], 0, len(MODES) - 1)]
        return StepTable(log[:, 0], modes, log[:, 2], log[:, 3], log[:, 4], log[:, 5], log[:, 8], numbers)

    def tensors(
        self,
        pattern: str | Sequence[str] | None = None,
        collection: str | None = None,
        mode: str | None = None,
        step: int | None = None,
    ) -> list[str]:
        """Return names in order of first save: those that match a glob or `re:` pattern, and are present at all."""
        names = list(self._entries)
        if collection is not None:
            names = [n for n in names if any(e.info.collection == collection for e in self._entries[n].values())]
        if pattern is not None:
            names = select(names, [pattern] if isinstance(pattern, str) else pattern)
        if mode is not None or step is not None:
            names = [n for n in names if self._present(n, mode, step)]
        return names

    def _present(self, name: str, mode: str | None, step: int | None) -> bool:
        steps = self.tensor(name).steps(mode)
        return bool(steps.size) and (step is None or step in steps)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by its exact name. Raises TensorNotFound."""
        if name not in self._entries:
            guess = near(name, self._entries)
            raise TensorNotFound(f"{self.url}: no tensor {name!r}.{guess} `smdbg ls` lists them all")
        return Tensor(self, name)

    def _info(self, name: str) -> TensorInfo:
        return next(iter(self._entries[name].values())).info

    def _rank(self, worker: int) -> int:
        if worker not in self.workers():
            for (rank, _), message in self._stored.damaged.items():
                if rank == worker:
                    raise DamagedData(f"worker {worker} cannot be read: {message}; other workers can")
            raise BadSelection(f"{self.url}: no worker {worker}: workers are {listing(self.workers())}")
        return worker

    # --- statistics ---

    def stats(
        self,
        statistic: str,
        collection: str | None = None,
        mode: str | None = None,
        tensors: Iterable[str] | None = None,
        worker: int = 0,
    ) -> StatsMatrix:
        """Return one statistic, stored or derived, of many tensors at the steps where any of them is present."""
        return self.stats_of([statistic], collection, mode, tensors, worker)[statistic]

    def stats_of(
        self,
        statistics: Sequence[str],
        collection: str | None = None,
        mode: str | None = None,
        tensors: Iterable[str] | None = None,
        worker: int = 0,
    ) -> dict[str, StatsMatrix]:
        """Return several statistics at once, each as `stats` does; what they share is read once."""
        names = self.tensors(collection=collection) if tensors is None else [self.tensor(n).name for n in tensors]
        parts: list[tuple[Steps, list[int], dict[str, NDArray[np.float64]], NDArray[np.float64]]] = []
        for one in self._stored.of_rank(self._rank(worker)):
            homes: dict[str, list[int]] = {}
            for number, name in enumerate(names):
                if name in one.entries:
                    homes.setdefault(one.entries[name].info.collection, []).append(number)
            for home, numbers in homes.items():
                rows = self._rows(one, home, mode)
                entries = [one.entries[names[n]] for n in numbers]
                found, count = statistic_matrices(self._stored, one, entries, rows, statistics)
                parts.append((one.log[one.rows_of(home)[rows], 0], numbers, found, count))
        if len(parts) == 1 and len(parts[0][1]) == len(names) and (np.diff(parts[0][0]) > 0).all():
            steps, _, found, count = parts[0]
            present = ~np.isnan(count)
            kept = present.any(axis=1)
            if not kept.all():
                steps, present, found = steps[kept], present[kept], {n: m[kept] for n, m in found.items()}
            return {name: StatsMatrix(steps, names, matrix, present) for name, matrix in found.items()}
        every = [np.zeros(0, np.int64)] + [at[~np.isnan(count).all(axis=1)] for at, _, _, count in parts]
        steps = np.unique(np.concatenate(every))
        matrices = {name: np.full((steps.size, len(names)), np.nan) for name in statistics}
        present = np.zeros((steps.size, len(names)), bool)
        for at, numbers, found, count in parts:
            i, j = np.nonzero(~np.isnan(count))
            row, column = np.searchsorted(steps, at[i]), np.array(numbers)[j]
            for name, matrix in matrices.items():
                matrix[row, column] = found[name][i, j]
            present[row, column] = True
        return {name: StatsMatrix(steps, names, matrix, present) for name, matrix in matrices.items()}

    def _rows(self, one: Attempt, collection: str, mode: str | None) -> NDArray[np.int64]:
        """Return the rows of a collection that are shown and of that mode; the same for each tensor, so kept."""
        key = (id(one), collection, mode)
        if key not in self._shown:
            at = one.rows_of(collection)
            self._shown[key] = np.flatnonzero(self._stored.visible(one)[at] & _mode_mask(one.log[at], mode))
        return self._shown[key]

    def _series(
        self, wanted: Sequence[str], tensor: Tensor, mode: str | None, rank: int
    ) -> tuple[Steps, dict[str, NDArray[np.float64]]]:
        """Return (steps where the tensor is present, statistic -> its values there), over the attempts shown."""
        parts = [(steps, found) for _, steps, _, found in self._parts(wanted, tensor, mode, rank)]
        if len(parts) == 1 and (np.diff(parts[0][0]) > 0).all():
            return parts[0]
        steps = np.concatenate([np.zeros(0, np.int64), *(s for s, _ in parts)])
        order = np.argsort(steps, kind="stable")
        merged = {name: np.concatenate([np.zeros(0), *(found[name] for _, found in parts)])[order] for name in wanted}
        return steps[order], merged

    def _parts(
        self,
        wanted: Sequence[str],
        tensor: Tensor,
        mode: str | None,
        rank: int,
        only: Sequence[int] | None = None,
        kept: bool = False,
    ) -> list[tuple[Attempt, Steps, Steps, dict[str, NDArray[np.float64]]]]:
        """Return (attempt, steps, rows, statistics) where the tensor is present, an attempt each; nothing `wanted` is
        the cheapest, since of an ended worker the catalogue mostly tells where that is.

        `only` these steps, and only where full values were `kept`: of a long run little is then read.
        """
        out = []
        for one in self._stored.of_rank(rank):
            entry = one.entries.get(tensor.name)
            if entry is None:
                continue
            at = one.rows_of(entry.info.collection)
            rows = self._rows(one, entry.info.collection, mode)
            if only is not None:
                rows = rows[np.isin(one.log[at[rows], 0], only)]
            if kept:
                rows = rows[one.raw_at(entry.info.collection, at[rows])]
            found: dict[str, NDArray[np.float64]] = {}
            if entry.whole and not wanted:
                there = rows >= entry.since
            else:
                found, count = tensor_statistics(self._stored, one, entry, rows, wanted)
                there = ~np.isnan(count)
            out.append((one, one.log[at[rows[there]], 0], rows[there], {k: v[there] for k, v in found.items()}))
        return out

    def refresh(self) -> None:
        """Look again at a run that is being written: one conditional request a worker where nothing is new.

        Only whole steps are seen. What is damaged meanwhile shows in `damaged`; what was read before stays.
        """
        known = self._stored.attempts
        self._stored.refresh()
        self._shown.clear()
        self._modes.clear()
        if [id(one) for one in known] != [id(one) for one in self._stored.attempts]:
            self._catalogue()


def _facts(one: Attempt) -> WorkerFacts:
    """Return what is known of an attempt. Drops are also counted from the log, which outlives a killed writer."""
    status = str(one.facts["status"])
    flagged = int(np.count_nonzero(one.log[:, LOG_COLUMNS.index("flags")] & FLAG_DROPPED))
    counted = int(one.facts.get("dropped_steps", 0))
    return WorkerFacts(
        rank=one.rank,
        attempt=one.attempt,
        status=status,
        dropped_steps=max(counted, flagged),
        unlogged_steps=max(0, counted - flagged),
        dropped_rows=int(one.facts.get("dropped_rows", 0)),
        switched_off="hook switched off" in status,
        mesh=dict(one.facts.get("mesh", {})),
        first_step=int(one.log[0, 0]) if len(one.log) else None,
        last_step=int(one.log[-1, 0]) if len(one.log) else None,
        last_commit=one.last_commit,
    )


def _mode_mask(log: NDArray[np.int64], mode: str | None) -> NDArray[np.bool_]:
    if mode is None:
        return np.ones(len(log), bool)
    if mode not in MODES:
        raise BadSelection(f"unknown mode {mode!r}: modes are {', '.join(MODES)}.{near(mode, MODES)}")
    found: NDArray[np.bool_] = log[:, 1] == MODES.index(mode)
    return found
