"""What a run's arrays hold: lines of statistics, shapes and values, read in few ranged requests and partly kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import RLock
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from smdbg.errors import DamagedData
from smdbg.store.attempt import Attempt
from smdbg.store.backend import Backend
from smdbg.store.chunks import cut, read_elements, read_parts, read_rows
from smdbg.store.dtypes import decode
from smdbg.store.format import ArraySpec, Entry, ValueSlot, product
from smdbg.store.parts import DamagedChunk
from smdbg.store.shard import crc32c

CACHE_BYTES = 256 << 20
TURN_BYTES = 16 << 20  # a larger table is not kept: of it the statistics that are asked for are

Rows = NDArray[np.int64]
T = TypeVar("T")


class Values:
    """Reads arrays, and keeps tables that are asked for again. Committed rows never change, so what is kept stays."""

    def __init__(self, backend: Backend, small_table: int) -> None:
        """Read from `backend`; a table of up to `small_table` bytes is read whole, whatever is asked of it."""
        self.backend = backend
        self._small_table = small_table
        self._cache: dict[tuple[str, str], NDArray[Any]] = {}
        self._lock = RLock()  # tables may be asked for from several threads, and each is read once

    def table(
        self,
        one: Attempt,
        path: str,
        rows: Rows,
        tensors: int | Rows,
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
        with self._lock:
            held = self._held_table(one, spec, first, rows.size)
        if held is not None:
            found = _of_rows(held, wanted - first)[:, tensors, column]
        elif wanted.size:
            found = self._rows(one, spec, wanted)[:, tensors, column]
        else:
            found = np.empty((0, *spec.tail), spec.dtype)[:, tensors, column]
        if there.all():
            return found
        out = np.full((rows.size, *found.shape[1:]), np.nan if spec.dtype.startswith("float") else 0, spec.dtype)
        out[there] = found
        return out

    def columns(
        self, one: Attempt, path: str, rows: Rows, tensors: Rows, columns: Sequence[int]
    ) -> list[NDArray[Any]]:
        """Return some numbers of each line of a statistics array, one array [rows, tensors] a number.

        A large table is gone through once, chunk by chunk.
        """
        spec = _spec(one, path)
        first = spec.first_row // spec.shard[0] * spec.shard[0]
        large = rows.size * product(spec.tail) * spec.itemsize > TURN_BYTES
        if large and (one.base, path) not in self._cache and spec.chunk[1:] == spec.tail and (rows >= first).all():
            return self._turned(one, spec, rows, tensors, columns)
        table = self.table(one, path, rows, tensors)
        return [np.ascontiguousarray(table[:, :, column]) for column in columns]

    def _turned(
        self, one: Attempt, spec: ArraySpec, rows: Rows, tensors: Rows, columns: Sequence[int]
    ) -> list[NDArray[Any]]:
        """Return columns of a large table, chunk by chunk: the table as it is stored is never in memory whole."""
        if np.max(tensors, initial=0) >= spec.tail[0]:
            raise DamagedData(f"{one.base}: the catalogue places a tensor outside of {spec.path}")
        every = len(tensors) == spec.tail[0] and np.array_equal(tensors, np.arange(len(tensors)))

        def read() -> list[NDArray[Any]]:
            out: NDArray[Any] | None = None
            for here, part in read_parts(self.backend, one.base, spec, rows):
                if out is None:  # memory is taken only after the store has shown that such data exist
                    out = np.empty((len(columns), rows.size, len(tensors)), spec.dtype)
                for number, column in enumerate(columns):
                    out[number, here] = part[:, :, column] if every else part[:, tensors, column]
            return list(np.empty((len(columns), 0, len(tensors)), spec.dtype) if out is None else out)

        return _told(one, _home(spec), rows, f"{spec.kind} of collection {_home(spec)!r}", read)

    def _held_table(self, one: Attempt, spec: ArraySpec, first: int, wanted: int) -> NDArray[Any] | None:
        """Return a table from row `first` on, reading only what was not held before; None where that does not pay."""
        key = (one.base, spec.path)
        every = len(one.rows_of(_home(spec)))
        size = every * product(spec.tail) * spec.itemsize
        worth = size <= CACHE_BYTES and (size <= self._small_table or 4 * wanted >= every)
        held = self._cache.get(key)
        if held is not None and held.shape[1:] != spec.tail:
            held = None
        have = first + (0 if held is None else len(held))
        if have >= every and held is not None:
            return held
        if not worth or every <= first:
            return None
        try:
            more = read_rows(self.backend, one.base, spec, np.arange(have, every))
        except DamagedChunk:
            return None  # the rows that are asked for may be whole; if not, reading them says so
        self._cache.pop(key, None)
        return self._keep(key, more if held is None else np.concatenate((held, more)))

    def _keep(self, key: tuple[str, str], found: NDArray[Any]) -> NDArray[Any]:
        while self._cache and sum(a.nbytes for a in self._cache.values()) + found.nbytes > CACHE_BYTES:
            self._cache.pop(next(iter(self._cache)))
        self._cache[key] = found
        return found

    def _rows(self, one: Attempt, spec: ArraySpec, rows: Rows) -> NDArray[Any]:
        what = f"{spec.kind} of collection {_home(spec)!r}" if spec.kind != "values" else f"{_home(spec)!r}"
        return _told(one, _home(spec), rows, what, lambda: read_rows(self.backend, one.base, spec, rows))

    def statistic_tables(
        self, one: Attempt, entry: Entry, rows: Rows
    ) -> list[tuple[tuple[str, ...], NDArray[np.float64]]]:
        """Return (names, [len(rows), names]) for each place where the tensor's statistics are; absent rows are NaN."""
        paths = [(f"{entry.info.collection}/{place.array}", place) for place in entry.stats]
        return [(_spec(one, path).statistics, self.table(one, path, rows, place.index)) for path, place in paths]

    def shapes(self, one: Attempt, entry: Entry, rows: Rows) -> list[tuple[int, tuple[int, ...]]]:
        """Return (slot, shape) of a tensor at each row."""
        out: list[tuple[int, tuple[int, ...]]] = [(0, entry.info.shape)] * rows.size
        for place in entry.layout:
            lines = self.table(one, f"{entry.info.collection}/{place.array}", rows, place.index)
            for i in np.flatnonzero(lines[:, 0] > 0):
                line = lines[i]
                out[i] = (int(line[0]) - 1, tuple(int(n) for n in line[2 : 2 + int(line[1])]))
        return out

    def number_rows(self, one: Attempt, path: str, rows: Rows) -> NDArray[Any]:
        """Return whole rows of an array of short rows, [len(rows), elements]; the same question again is free."""
        key = (one.base, f"{path}@{rows.size}.{crc32c(rows.tobytes())}")
        with self._lock:
            if key not in self._cache:
                found = self._rows(one, _spec(one, path), rows)
                if found.nbytes > CACHE_BYTES // 4:
                    return found
                self._keep(key, found)
            return self._cache[key]

    def values(
        self, one: Attempt, entry: Entry, rows: Rows, index: tuple[Any, ...] | None = None
    ) -> NDArray[Any] | list[NDArray[Any]]:
        """Return the tensor's value at each row (where full values were kept), or the part that `index` selects.

        One array [rows, ...] where all are of one shape and are no text, else a list.
        """
        shapes = self.shapes(one, entry, rows)
        groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for i, shape in enumerate(shapes):
            groups.setdefault(shape, []).append(i)

        def read(group: tuple[int, tuple[int, ...]]) -> NDArray[Any] | list[NDArray[Any]]:
            return self._same_shape(one, entry, rows[groups[group]], *group, index)

        if len(groups) == 1:
            return read(next(iter(groups)))
        out: list[NDArray[Any]] = [np.empty(0)] * rows.size
        # A series whose shape changes: ask for all shapes at once, not one after the other.
        with ThreadPoolExecutor(max(1, min(8, len(groups)))) as pool:
            for which, values in zip(groups.values(), pool.map(read, groups), strict=True):
                for i, value in zip(which, values, strict=True):
                    out[i] = value
        return out

    def _same_shape(
        self,
        one: Attempt,
        entry: Entry,
        rows: Rows,
        slot_number: int,
        shape: tuple[int, ...],
        index: tuple[Any, ...] | None,
    ) -> NDArray[Any] | list[NDArray[Any]]:
        slot, spec = self._slot(one, entry, slot_number, shape)
        text = slot.dtype in ("str", "bytes")
        plan = cut(shape, None if text else index, spec.chunk[1])
        runs = [(slot.offset + start, slot.offset + stop) for start, stop in plan.runs]
        found = _told(
            one,
            entry.info.collection,
            rows,
            repr(entry.info.name),
            lambda: read_elements(self.backend, one.base, spec, rows, runs),
        )
        if text:
            texts = [decode(line, slot.dtype, shape) for line in found]
            return [np.asarray(t[index]) for t in texts] if index is not None else texts
        return decode(found.reshape(-1), slot.dtype, (rows.size, *plan.shape))[(slice(None), *plan.rest)]

    def _slot(self, one: Attempt, entry: Entry, number: int, shape: tuple[int, ...]) -> tuple[ValueSlot, ArraySpec]:
        if number >= len(entry.slots):
            raise DamagedData(f"{one.base}: the catalogue has no slot {number} of {entry.info.name!r}")
        slot = entry.slots[number]
        spec = _spec(one, f"{entry.info.collection}/{slot.array}")
        if product(shape) > slot.capacity or slot.offset + slot.capacity > spec.tail[0]:
            raise DamagedData(f"{one.base}: the catalogue places {entry.info.name!r} outside of {spec.path}")
        return slot, spec

    def bytes_of(self, one: Attempt, entry: Entry, rows: Rows) -> list[int]:
        """Return how many bytes the tensor's value takes at each row; sizes come from metadata and may lie."""
        sizes: list[int] = []
        for number, shape in self.shapes(one, entry, rows):
            _, spec = self._slot(one, entry, number, shape)
            sizes.append(product(shape) * spec.itemsize)
        return sizes


def _told(one: Attempt, home: str, rows: Rows, what: str, read: Callable[[], T]) -> T:
    """Read, and let an error of a damaged chunk tell what it is of, and at which steps."""
    try:
        return read()
    except DamagedChunk as error:
        hit = rows[(rows >= error.first) & (rows < error.stop)]
        steps = one.log[one.rows_of(home)[hit], 0]
        span = f"step {steps[0]}" if steps.size == 1 else f"steps {steps.min()} to {steps.max()}" if steps.size else ""
        raise DamagedData(f"{what}, {span}, worker {one.rank}: {error}; other steps and tensors can be read") from error


def _home(spec: ArraySpec) -> str:
    return spec.path.split("/", 1)[0]


def _of_rows(table: NDArray[Any], rows: Rows) -> NDArray[Any]:
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
