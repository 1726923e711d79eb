"""Reading a run: the catalogue, the committed rows, and ranged reads of what they hold.

Nothing is believed that the commit log does not list, and no size from metadata is acted on before it is checked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smdbg.errors import DamagedData, NewerFormat, NotARun, RunNotFound
from smdbg.store.backend import Backend, Missing, Range
from smdbg.store.checks import check_collections, check_places, check_root, check_spec, check_worker
from smdbg.store.chunks import cut, read_elements, read_rows
from smdbg.store.dtypes import decode
from smdbg.store.format import (
    END_TIME,
    FORMAT,
    LOG_COLUMNS,
    LOG_ROWS,
    ArraySpec,
    Entry,
    canonical,
    entry_from_json,
    log_spec,
    parse_worker,
    product,
    spec_from_json,
    worker_key,
)
from smdbg.store.shard import crc32c, intact

LOST_SECONDS = 60.0
LONGEST_LOG = 1 << 32  # steps; metadata that says more is not believed
FEW_CHUNKS = 16  # of a log; more are not asked for before they were seen in a listing
CACHE_BYTES = 256 << 20
SMALL_TABLE = 8 << 20

Log = NDArray[np.int64]
_SAVED, _RAW = LOG_COLUMNS.index("saved"), LOG_COLUMNS.index("raw")
_VERSION = LOG_COLUMNS.index("catalogue_version")


@dataclass
class Attempt:
    """One life of a worker: its catalogue, its arrays and its committed log.

    `until`: rows of steps from here on are superseded by a later attempt (None: none is).
    """

    rank: int
    attempt: int
    facts: Mapping[str, Any]
    entries: dict[str, Entry]
    specs: dict[str, ArraySpec]
    log: Log
    last_commit: float = 0.0
    until: int | None = None
    _rows: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The worker group's key."""
        return worker_key(self.rank, self.attempt)

    @cached_property
    def bits(self) -> dict[str, int]:
        """Collection -> its bit in the masks."""
        return {name: int(about["bit"]) for name, about in self.facts["collections"].items()}

    @cached_property
    def lasting(self) -> NDArray[np.bool_]:
        """Tell for each log row whether the worker did not go back to its step, or before it, later on."""
        out = np.ones(len(self.log), bool)
        step = self.log[:, 0]
        out[:-1] = step[:-1] < np.minimum.accumulate(step[::-1])[::-1][1:]
        return out

    def rows_of(self, collection: str) -> NDArray[np.int64]:
        """Return for each stored row of a collection the index of its log row: row r belongs to the r-th."""
        if collection not in self._rows:
            bit = self.bits.get(collection)
            saved = np.zeros(len(self.log), bool) if bit is None else (self.log[:, _SAVED] >> bit) & 1 == 1
            self._rows[collection] = np.flatnonzero(saved)
        return self._rows[collection]

    def raw_at(self, collection: str, log_index: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell for log rows whether full values of the collection were kept there."""
        kept: NDArray[np.bool_] = (self.log[log_index, _RAW] >> self.bits[collection]) & 1 == 1
        return kept


class StoredRun:
    """A run as it stands in the store."""

    def __init__(self, backend: Backend, attempt: str | int = "latest") -> None:
        """Read root, worker groups and logs. Raises RunNotFound, NotARun, NewerFormat, DamagedData, StoreError."""
        self.backend = backend
        self._which = attempt
        self._cache: dict[tuple[str, str], NDArray[Any]] = {}
        self.root = _read_root(backend)
        self.attempts: list[Attempt] = []
        self.refresh()

    def refresh(self) -> None:
        """Read anew what a running run may have added."""
        names = [item.name for item in self.backend.list("workers")]
        known = sorted(found for name in names if (found := parse_worker(name)) is not None)
        groups = _read_groups(self.backend, known)
        logs = _read_logs(self.backend, groups)
        self._cache.clear()
        attempts = []
        for key in known:
            if key in groups:
                log, seen = logs[key]
                attempts.append(_attempt(self.backend, key, groups[key], log, seen))
        self.attempts = attempts
        self._supersede()

    def _supersede(self) -> None:
        for one in self.attempts:
            later = [o for o in self.attempts if o.rank == one.rank and o.attempt > one.attempt and len(o.log)]
            one.until = min((int(o.log[:, 0].min()) for o in later), default=None)

    def of_rank(self, rank: int) -> list[Attempt]:
        """Return the attempts of a worker that are to be looked at, oldest first."""
        mine = [one for one in self.attempts if one.rank == rank]
        return [one for one in mine if one.attempt == self._which] if isinstance(self._which, int) else mine

    def visible(self, one: Attempt) -> NDArray[np.bool_]:
        """Tell for each log row of an attempt whether it is to be shown."""
        if self._which != "latest":
            return np.ones(len(one.log), bool)
        return one.lasting if one.until is None else one.lasting & (one.log[:, 0] < one.until)

    def log_rows(self, rank: int) -> Log:
        """Return the visible log rows of a worker over its attempts, in order."""
        parts = [one.log[self.visible(one)] for one in self.of_rank(rank)]
        return np.concatenate(parts) if parts else np.zeros((0, len(LOG_COLUMNS)), np.int64)

    # --- values ---

    def table(
        self,
        one: Attempt,
        path: str,
        rows: NDArray[np.int64],
        tensors: int | NDArray[np.int64],
        column: int | slice = slice(None),
    ) -> NDArray[Any]:
        """Return lines of a statistics, layout or feature array: [rows, last] of one tensor, [rows, tensors, last].

        `rows` ascend. With a `column`, that number of each line alone, without the last axis. A table of which much is
        wanted is read whole and kept, since the next question is about the same one. Raises DamagedData.
        """
        spec = _spec(one, path)
        if np.max(tensors, initial=0) >= spec.tail[0]:
            raise DamagedData(f"{one.base}: the catalogue places a tensor outside of {path}")
        first = spec.first_row // spec.shard[0] * spec.shard[0]  # no shard before it was ever written
        there = rows >= first
        wanted = rows[there]
        held = self._held_table(one, spec, first, rows.size)
        if held is not None:
            found = _of_rows(held, wanted - first)[:, tensors, column]
        elif wanted.size:
            found = read_rows(self.backend, one.base, spec, wanted)[:, tensors, column]
        else:
            found = np.empty((0, *spec.tail), spec.dtype)[:, tensors, column]
        if there.all():
            return found
        out = np.full((rows.size, *found.shape[1:]), np.nan if spec.dtype.startswith("float") else 0, spec.dtype)
        out[there] = found
        return out

    def _held_table(self, one: Attempt, spec: ArraySpec, first: int, wanted: int) -> NDArray[Any] | None:
        key = (one.base, spec.path)
        every = len(one.rows_of(spec.path.split("/", 1)[0]))
        size = every * product(spec.tail) * spec.itemsize
        worth = size <= CACHE_BYTES and (size <= SMALL_TABLE or 4 * wanted >= every)
        if key not in self._cache and worth and every > first:
            while self._cache and sum(a.nbytes for a in self._cache.values()) + size > CACHE_BYTES:
                self._cache.pop(next(iter(self._cache)))
            self._cache[key] = read_rows(self.backend, one.base, spec, np.arange(first, every))
        return self._cache.get(key)

    def statistic_tables(
        self, one: Attempt, entry: Entry, rows: NDArray[np.int64]
    ) -> list[tuple[tuple[str, ...], NDArray[np.float64]]]:
        """Return (names, [len(rows), names]) for each place where the tensor's statistics are; absent rows are NaN."""
        paths = [(f"{entry.info.collection}/{place.array}", place) for place in entry.stats]
        return [(_spec(one, path).statistics, self.table(one, path, rows, place.index)) for path, place in paths]

    def shapes(self, one: Attempt, entry: Entry, rows: NDArray[np.int64]) -> list[tuple[int, tuple[int, ...]]]:
        """Return (slot, shape) of a tensor at each row."""
        out: list[tuple[int, tuple[int, ...]]] = [(0, entry.info.shape)] * rows.size
        for place in entry.layout:
            lines = self.table(one, f"{entry.info.collection}/{place.array}", rows, place.index)
            for i in np.flatnonzero(lines[:, 0] > 0):
                line = lines[i]
                out[i] = (int(line[0]) - 1, tuple(int(n) for n in line[2 : 2 + int(line[1])]))
        return out

    def number_rows(self, one: Attempt, path: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return whole rows of an array of short rows, [len(rows), elements]; the same question again is free."""
        key = (one.base, f"{path}@{rows.size}.{crc32c(rows.tobytes())}")
        if key not in self._cache:
            found = read_rows(self.backend, one.base, _spec(one, path), rows)
            if found.nbytes > CACHE_BYTES // 4:
                return found
            while self._cache and sum(a.nbytes for a in self._cache.values()) + found.nbytes > CACHE_BYTES:
                self._cache.pop(next(iter(self._cache)))
            self._cache[key] = found
        return self._cache[key]

    def values(
        self, one: Attempt, entry: Entry, rows: NDArray[np.int64], index: tuple[Any, ...] | None = None
    ) -> list[NDArray[Any]]:
        """Return the tensor's value at each row (where full values were kept), or the part that `index` selects."""
        shapes = self.shapes(one, entry, rows)
        out: list[NDArray[Any]] = [np.empty(0)] * rows.size
        groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for i, shape in enumerate(shapes):
            groups.setdefault(shape, []).append(i)

        def read(group: tuple[int, tuple[int, ...]]) -> list[NDArray[Any]]:
            return self._same_shape(one, entry, rows[groups[group]], *group, index)

        if len(groups) > 1:  # a series whose shape changes: ask for all shapes at once, not one after the other
            with ThreadPoolExecutor(min(8, len(groups))) as pool:
                found = list(pool.map(read, groups))
        else:
            found = [read(group) for group in groups]
        for which, values in zip(groups.values(), found, strict=True):
            for i, value in zip(which, values, strict=True):
                out[i] = value
        return out

    def _same_shape(
        self,
        one: Attempt,
        entry: Entry,
        rows: NDArray[np.int64],
        slot_number: int,
        shape: tuple[int, ...],
        index: tuple[Any, ...] | None,
    ) -> list[NDArray[Any]]:
        if slot_number >= len(entry.slots):
            raise DamagedData(f"{one.base}: the catalogue has no slot {slot_number} of {entry.info.name!r}")
        slot = entry.slots[slot_number]
        spec = _spec(one, f"{entry.info.collection}/{slot.array}")
        if product(shape) > slot.capacity or slot.offset + slot.capacity > spec.tail[0]:
            raise DamagedData(f"{one.base}: the catalogue places {entry.info.name!r} outside of {spec.path}")
        text = slot.dtype in ("str", "bytes")
        plan = cut(shape, None if text else index, spec.chunk[1])
        runs = [(slot.offset + start, slot.offset + stop) for start, stop in plan.runs]
        found = read_elements(self.backend, one.base, spec, rows, runs)
        if text:
            texts = [decode(line, slot.dtype, shape) for line in found]
            return [np.asarray(t[index]) for t in texts] if index is not None else texts
        return [np.asarray(decode(line, slot.dtype, plan.shape)[plan.rest]) for line in found]

    # --- status ---

    def status(self, now: float | None = None) -> str:
        """Return running, completed, lost or 'failed: reason', derived from the workers."""
        now = time.time() if now is None else now
        newest = {one.rank: one for one in self.attempts}  # attempts are in order, so the last one stays
        states = {rank: str(one.facts["status"]) for rank, one in newest.items()}
        failed = [state for state in states.values() if state.startswith("failed")]
        if failed:
            return failed[0]
        if all(states.get(rank) == "completed" for rank in self.root["writers"]):
            return "completed"
        # A writer may never have begun; it is not waited for forever.
        return "lost" if any(self.lost(rank, now) for rank in {*newest, *self.root["writers"]}) else "running"

    def lost(self, rank: int, now: float) -> bool:
        """Tell whether a writer has been silent for more than 60 s without having ended; `now` in unix seconds.

        Of one that never began, the age is the run's.
        """
        mine = [one for one in self.attempts if one.rank == rank]
        if not mine:
            return now - self._began() > LOST_SECONDS
        return mine[-1].facts["status"] == "running" and now - mine[-1].last_commit > LOST_SECONDS

    def _began(self) -> float:
        """Return when the run was begun, by the store's clock."""
        return max((item.modified for item in self.backend.list("") if item.name == "zarr.json"), default=0.0)


def _of_rows(table: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[Any]:
    """Return rows of a table, without copying where they follow each other."""
    if rows.size and int(rows[-1]) - int(rows[0]) + 1 == rows.size:
        return table[int(rows[0]) : int(rows[-1]) + 1]
    found: NDArray[Any] = table[rows]
    return found


def _spec(one: Attempt, path: str) -> ArraySpec:
    spec = one.specs.get(path)
    if spec is None:
        raise DamagedData(f"{one.base}: the catalogue names an array {path!r} that the group does not have")
    return spec


def _read_root(backend: Backend) -> dict[str, Any]:
    try:
        data = json.loads(backend.get("zarr.json"))
        facts = data["attributes"]["smdbg"]
        version = facts["format"]
    except Missing:
        if backend.list(""):
            raise NotARun(f"{backend.url} is not a run: there is no zarr.json in it. `smdbg runs` lists runs") from None
        raise RunNotFound(f"{backend.url}: there is no run: check the URL, or list runs with `smdbg runs`") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise NotARun(f"{backend.url} is not a run: its zarr.json was not written by smdbg") from None
    if not isinstance(version, int) or version > FORMAT:
        raise NewerFormat(f"{backend.url} has format {version!r}; this smdbg reads up to {FORMAT}: upgrade it")
    if not isinstance(facts.get("writers"), list) or not all(isinstance(r, int) for r in facts["writers"]):
        raise NotARun(f"{backend.url} is not a run: its zarr.json does not say who writes it")
    check_root(backend.url, facts)
    return dict(facts)


Key = tuple[int, int]


def _read_groups(backend: Backend, known: Sequence[Key]) -> dict[Key, dict[str, Any]]:
    """Return the worker groups; one that is not there yet is left out."""
    found = backend.ranges([Range(worker_key(*key) + "/zarr.json") for key in known])
    return {key: _parse_group(backend, key, data) for key, data in zip(known, found, strict=True) if data is not None}


def _parse_group(backend: Backend, key: Key, data: bytes) -> dict[str, Any]:
    name = f"{backend.url}/{worker_key(*key)}"
    try:
        group: dict[str, Any] = json.loads(data)
        facts = {**group["attributes"]["smdbg"]}
        stated = facts.pop("crc32c")
        good = stated == crc32c(canonical(facts))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedData(f"{name}: the worker's zarr.json is damaged ({type(error).__name__})") from error
    if not good:
        raise DamagedData(f"{name}: the worker's zarr.json does not match its checksum")
    check_worker(name, facts)
    return group


def _read_logs(backend: Backend, groups: Mapping[Key, dict[str, Any]]) -> dict[Key, tuple[Log, float]]:
    """Return (log, time of the last commit by the store's clock) of each worker."""
    counts: dict[Key, int] = {}
    times: dict[Key, float] = {}
    for key, group in groups.items():
        counts[key], times[key] = _log_chunks(backend, key, group)
    wanted = [(key, i) for key in groups for i in range(counts[key])]
    found = backend.ranges([Range(f"{worker_key(*key)}/{log_spec().key(i * LOG_ROWS)}") for key, i in wanted])
    parts: dict[Key, list[Log]] = {key: [] for key in groups}
    for (key, i), data in zip(wanted, found, strict=True):
        where = f"{backend.url}/{worker_key(*key)}/steps, chunk {i}"
        if data is None:
            raise DamagedData(f"{where}: missing")
        size = LOG_ROWS * len(LOG_COLUMNS) * 8
        if len(data) != size + 4 or not intact(memoryview(data)):
            raise DamagedData(f"{where}: does not match its checksum")
        parts[key].append(np.frombuffer(data, "<i8", LOG_ROWS * len(LOG_COLUMNS)).reshape(LOG_ROWS, len(LOG_COLUMNS)))
    out = {}
    for key in groups:
        rows = np.concatenate(parts[key]) if parts[key] else np.zeros((0, len(LOG_COLUMNS)), np.int64)
        written = rows[:, END_TIME] != 0
        count = len(rows) if written.all() else int(np.argmin(written))
        out[key] = rows[:count], times[key]
    return out


def _log_chunks(backend: Backend, key: Key, group: Mapping[str, Any]) -> tuple[int, float]:
    """Return (number of log chunks, newest Last-Modified).

    The log's capacity is put before the first row that needs it, so at most the last chunk is not there yet. Of a
    closed worker the time is not asked for.
    """
    base = worker_key(*key)
    try:
        rows = group["consolidated_metadata"]["metadata"]["steps"]["shape"][0]
        chunks = -(-rows // LOG_ROWS) if 0 <= rows <= LONGEST_LOG else None
    except (KeyError, TypeError, IndexError):
        chunks = None
    if not isinstance(chunks, int):
        raise DamagedData(f"{backend.url}/{base}: the length of the log is damaged")
    if chunks > FEW_CHUNKS:
        _check_log_is_there(backend, base, chunks)
    if group["attributes"]["smdbg"]["status"] == "completed":
        return chunks, 0.0
    for last in range(chunks, max(0, chunks - 2), -1):
        times = [item.modified for item in backend.list(f"{base}/steps/c/{last - 1}") if not item.folder]
        if times:
            return last, max(times)
    return 0, max((item.modified for item in backend.list(base) if item.name == "zarr.json"), default=0.0)


def _check_log_is_there(backend: Backend, base: str, chunks: int) -> None:
    """Raise DamagedData if chunks of a long log do not lie there: one listing, in place of up to 2^20 requests.

    The last one may be yet to come, see `_log_chunks`.
    """
    there = {item.name for item in backend.list(f"{base}/steps/c")}
    for chunk in range(chunks - 1):
        if str(chunk) not in there:
            raise DamagedData(f"{backend.url}/{base}/steps, chunk {chunk} of {chunks}: missing")


def _attempt(backend: Backend, key: Key, group: dict[str, Any], log: Log, seen: float) -> Attempt:
    newest = int(log[-1, _VERSION]) if len(log) else 0
    for _ in range(3):
        # The log may have been read after the catalogue grew; what a row needs was written before the row.
        if int(group["attributes"]["smdbg"]["catalogue_version"]) >= newest:
            break
        group = _parse_group(backend, key, backend.get(worker_key(*key) + "/zarr.json"))
    facts = group["attributes"]["smdbg"]
    name = f"{backend.url}/{worker_key(*key)}"
    try:
        children = group["consolidated_metadata"]["metadata"]
        specs = {p: spec_from_json(p, m) for p, m in children.items() if m["node_type"] == "array"}
        entries = {entry.info.name: entry for entry in map(entry_from_json, facts["catalogue"])}
        check_collections(facts["collections"])
        for spec in specs.values():
            check_spec(spec)
        for entry in entries.values():
            if entry.info.collection not in facts["collections"]:
                raise ValueError("a tensor of no collection")
            check_places(entry, specs)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DamagedData(f"{name}: the catalogue is damaged ({error})") from error
    return Attempt(key[0], key[1], facts, entries, specs, log, seen)
