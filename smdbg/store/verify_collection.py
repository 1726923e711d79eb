"""The arrays of one collection, held against the log: which objects must be there, and what is wrong with them.

Layouts and statistics come first, for they tell which tensors each row holds, and with what shape; then values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smdbg.store.attempt import Attempt
from smdbg.store.backend import Backend
from smdbg.store.format import ArraySpec, Entry, Place, ValueSlot, product
from smdbg.store.shard import CRC
from smdbg.store.verify_report import Report, Worker, damage_of
from smdbg.store.verify_shards import LARGEST_OBJECT, Shard, check_shard, fetched, size_problem, unlisted

MOST_CELLS = 256 << 20  # rows times tensors whose presence is held in memory
Index = tuple[int, ...]
Bools = NDArray[np.bool_]
Found = Callable[[Index, Shard], None]


@dataclass
class Check:
    """One collection of one attempt. `there`: array -> index -> size of the objects that a listing showed."""

    backend: Backend
    one: Attempt
    worker: Worker
    collection: str
    there: Mapping[str, Mapping[Index, int]]
    report: Report
    quick: bool
    used: dict[str, set[Index]] = field(default_factory=dict)  # array -> objects that the log refers to

    def run(self) -> None:
        """Check all arrays of the collection."""
        log_rows = self.one.rows_of(self.collection)
        self.rows = len(log_rows)
        self.steps = self.one.log[log_rows, 0]
        self.raw = self.one.raw_at(self.collection, log_rows)
        self.entries = [e for e in self.one.entries.values() if e.info.collection == self.collection]
        self.number = {id(entry): i for i, entry in enumerate(self.entries)}
        specs = [s for p, s in self.one.specs.items() if p.split("/", 1)[0] == self.collection]
        self.held = self.rows * len(self.entries) <= MOST_CELLS
        if not self.held:
            self.report.unchecked.append(
                f"{self.one.base}/{self.collection}: too many tensors and steps to hold which were saved when; values "
                "that are there were checked, not whether some are missing"
            )
        shape = (len(self.entries), self.rows) if self.held else (0, 0)
        self.present = np.zeros(shape, bool)
        self.slot = np.zeros(shape, np.int16)
        self.size: dict[int, NDArray[np.int64]] = {}  # of tensors that changed their shape: elements in each row
        self.unknown = np.zeros(self.rows, bool)  # rows of which a table is damaged
        for kind in ("layout", "stats", "features"):
            for spec in specs:
                if spec.kind == kind:
                    self._table(spec)
        if self.held:
            self._count()
        for spec in specs:
            if spec.kind == "values":
                self._values(spec)

    # --- tables ---

    def _table(self, spec: ArraySpec) -> None:
        height = spec.shard[0]
        first, count = spec.first_row // height, -(-self.rows // height) if self.rows > spec.first_row else 0
        needed: dict[Index, int] = {(s, 0, 0): self._needed(spec, s) for s in range(first, count)}
        places = [(e, p) for e in self.entries for p in getattr(e, spec.kind) if p.array == spec.path.split("/", 1)[1]]

        def lost(index: Index, found: Shard) -> None:
            rows = self._lost_rows(spec, index, found)
            self.unknown[rows] = self.unknown[rows] | (spec.kind != "features")
            if spec.kind == "stats" and self.held:
                self._untold([e for e, _ in places], rows)
            names = [e.info.name for e, _ in places if rows.size and e.since <= rows[-1]]
            lines = sum(int((rows >= e.since).sum()) for e, _ in places) if spec.kind == "stats" else 0
            key = self._key(spec, index)
            self.report.broken(damage_of(key, found.what, self.worker, names, self.steps[rows], lines=lines))

        def take(index: Index, found: Shard) -> None:
            for chunk, content in found.content.items():
                start = index[0] * height + chunk * spec.chunk[0]
                block = content[: max(0, self.rows - start)]
                if len(block):
                    problem = self._take(spec, places, slice(start, start + len(block)), block)
                    if problem:
                        rows = self.steps[start : start + len(block)]
                        self.report.broken(
                            damage_of(self._key(spec, index), problem[0], self.worker, problem[1:], rows)
                        )

        self._objects(spec, needed, take, lost, keep=self.held and spec.kind != "features")

    def _untold(self, entries: list[Entry], rows: NDArray[np.int64]) -> None:
        """Take it that tensors which the catalogue says are in every row are; of others it is not known."""
        for entry in entries:
            at = rows[rows >= entry.since]
            if entry.whole:
                self.present[self.number[id(entry)], at] = True
            elif entry.slots and self.raw[at].any():
                self.report.unknown = True

    def _take(
        self, spec: ArraySpec, places: list[tuple[Entry, Place]], at: slice, block: NDArray[Any]
    ) -> tuple[str, ...]:
        """Learn from rows of a table. Return what is wrong and the tensors it is wrong of, () for nothing."""
        bad: list[str] = []
        for entry, place in places:
            line = block[:, place.index]
            which = self.number[id(entry)]
            if spec.kind == "layout":
                good = self._take_layout(entry, which, at, line)
            else:
                good = self._take_counts(spec, entry, which, at, line[:, 0])
            if not good:
                bad.append(entry.info.name)
        what = "shapes that its places do not hold" if spec.kind == "layout" else "counts that the shapes do not have"
        return (f"has {what}", *bad) if bad else ()

    def _take_layout(self, entry: Entry, which: int, at: slice, lines: NDArray[np.int64]) -> bool:
        told = lines[:, 0] > 0
        if not told.any():
            return not (lines[:, 0] < 0).any()
        slots, dims = lines[told, 0] - 1, lines[told, 1]
        if (dims < 0).any() or (dims > lines.shape[1] - 2).any() or (slots >= max(1, len(entry.slots))).any():
            return False
        sizes = lines[told, 2:].astype(np.float64)
        sizes[np.arange(sizes.shape[1]) >= dims[:, None]] = 1
        elements = sizes.prod(axis=1)
        capacity = np.array([slot.capacity for slot in entry.slots] or [2**62])
        numbers = self.size.setdefault(which, np.full(self.rows, product(entry.info.shape), np.int64))
        if (sizes < 0).any() or (elements >= 2**62).any():
            return False
        self.slot[which, at][told] = slots
        numbers[at][told] = elements.astype(np.int64)
        kept = told & self.raw[at]
        return bool((numbers[at][kept] <= capacity[self.slot[which, at][kept]]).all()) if entry.slots else True

    def _take_counts(self, spec: ArraySpec, entry: Entry, which: int, at: slice, counts: NDArray[np.float64]) -> bool:
        told = ~np.isnan(counts)
        self.present[which, at] |= told
        if (counts[told] < 0).any() or (counts[told] % 1 != 0).any():
            return False
        plain = not entry.info.dtype.startswith(("str", "bytes", "M8", "m8")) and "last" not in spec.statistics
        if not plain or len(spec.statistics) == 1:
            return True
        shapes = self.size.get(which)
        wanted = product(entry.info.shape) if shapes is None else shapes[at][told]
        return bool(np.all((counts[told] == wanted) | self.unknown[at][told]))

    def _count(self) -> None:
        self.report.lines += int(self.present.sum())
        for which, entry in enumerate(self.entries):
            if entry.slots:
                self.report.values += int((self.present[which] & self.raw).sum())
            first = entry.since
            if entry.whole and not (self.present[which, first:] | self.unknown[first:]).all():
                what = "says of a tensor that it is in every row, and its statistics do not"
                absent = self.steps[first:][~self.present[which, first:]]
                key = f"{self.one.base}/zarr.json"
                self.report.broken(damage_of(key, what, self.worker, [entry.info.name], absent))

    # --- values ---

    def _values(self, spec: ArraySpec) -> None:
        array = spec.path.split("/", 1)[1]
        slots = [(e, k, s) for e in self.entries for k, s in enumerate(e.slots) if s.array == array]
        needed = self._needed_values(spec, slots) if self.held else {}
        gone: set[tuple[int, int]] = set()  # (tensor, row) of values that are lost: each is counted once

        def lost(index: Index, found: Shard) -> None:
            names: list[str] = []
            rows, before = [np.zeros(0, np.int64)], len(gone)
            for start, stop in found.lost:
                for chunk in range(start, min(stop, start + 4096)):
                    low, high, left, right = self._span(spec, index, chunk)
                    for entry, k, slot in slots:
                        if slot.offset < right and left < slot.offset + slot.capacity and low < self.rows:
                            at = low + np.flatnonzero(self._kept(entry, k, slice(low, high), slot, left, right))
                            if at.size:
                                names.append(entry.info.name)
                                rows.append(at)
                                gone.update((self.number[id(entry)], int(r)) for r in at)
            steps = self.steps[np.concatenate(rows)]
            key = self._key(spec, index)
            self.report.broken(damage_of(key, found.what, self.worker, names, steps, values=len(gone) - before))

        self._objects(spec, needed, lambda _index, _found: None, lost, keep=False)

    def _kept(self, entry: Entry, k: int, at: slice, slot: ValueSlot, left: int, right: int) -> Bools:
        """Tell in which rows the tensor lies in that slot with elements in [left, right)."""
        raw = self.raw[at]
        if not self.held:
            return raw
        which = self.number[id(entry)]
        here = self.present[which, at] & raw & (self.slot[which, at] == k)
        size = self.size.get(which)
        elements = product(entry.info.shape) if size is None else size[at]
        found: Bools = here & ((slot.offset + elements > left) & (elements > 0) & (slot.offset < right))
        return found

    def _needed_values(self, spec: ArraySpec, slots: list[tuple[Entry, int, ValueSlot]]) -> dict[Index, int]:
        """Return, for each shard in which a value lies, how many chunks it must have."""
        height, width = spec.shard[0], spec.shard[1]
        out: dict[Index, int] = {}
        for entry, k, slot in slots:
            last = slot.offset + max(1, slot.capacity) - 1
            for across in range(slot.offset // width, last // width + 1):
                left = across * width
                rows = np.flatnonzero(
                    self._kept(entry, k, slice(0, self.rows), slot, left, left + width) & ~self.unknown
                )
                for shard in np.unique(rows // height):
                    row = rows[np.searchsorted(rows, (shard + 1) * height) - 1]
                    chunks = self._chunks(spec, int(row) % height, across)
                    index = (int(shard), across)
                    out[index] = max(out.get(index, 0), chunks)
        return out

    def _chunks(self, spec: ArraySpec, row: int, across: int) -> int:
        if spec.shard[0] == 1:
            width = min(spec.shard[1], spec.tail[0] - across * spec.shard[1])
            return width // spec.chunk[1]
        return (row // spec.chunk[0] + 1) * spec.chunks_per_row

    # --- objects ---

    def _needed(self, spec: ArraySpec, shard: int) -> int:
        rows = min(self.rows - shard * spec.shard[0], spec.shard[0])
        return -(-rows // spec.chunk[0]) * spec.chunks_per_row

    def _key(self, spec: ArraySpec, index: Index) -> str:
        return f"{self.one.base}/{spec.path}/c/{'/'.join(map(str, index))}"

    def _span(self, spec: ArraySpec, index: Index, chunk: int) -> tuple[int, int, int, int]:
        """Return the rows [low, high) and elements [left, right) that a chunk of a shard holds."""
        group, column = divmod(chunk, spec.chunks_per_row)
        low = index[0] * spec.shard[0] + group * spec.chunk[0]
        left = index[1] * spec.shard[1] + column * spec.chunk[1]
        return low, low + spec.chunk[0], left, left + spec.chunk[1]

    def _lost_rows(self, spec: ArraySpec, index: Index, found: Shard) -> NDArray[np.int64]:
        start, parts = index[0] * spec.shard[0], [np.zeros(0, np.int64)]
        for first, stop in found.lost:
            low = start + first // spec.chunks_per_row * spec.chunk[0]
            high = start + -(-stop // spec.chunks_per_row) * spec.chunk[0]
            parts.append(np.arange(min(low, self.rows), min(high, self.rows)))
        return np.concatenate(parts)

    def _objects(self, spec: ArraySpec, needed: Mapping[Index, int], take: Found, lost: Found, keep: bool) -> None:
        """Check the objects of an array: those that are needed, and others of rows that the log lists."""
        there = self.there.get(spec.path, {})
        used = self.used.setdefault(spec.path, set(needed))
        gone = {self._key(spec, index): index for index in needed if index not in there}
        hidden = unlisted(self.backend, list(gone))
        for key, index in gone.items():
            if key not in hidden:
                what = "is missing, although the commit log lists what it held"
                lost(index, Shard(what, [(0, needed[index])]))
        for index in there:
            if index not in used and self._may_be_ours(spec, index):
                used.add(index)
        indices = {key: gone[key] for key in hidden if not (self.quick and spec.kind == "values")}
        wanted = [(key, needed[index] * (spec.chunk_bytes + CRC)) for key, index in indices.items()]
        for index in sorted(used & set(there)):
            chunks = needed.get(index, 0)
            problem = size_problem(spec, there[index], chunks)
            # What is cut short is read all the same, to tell what of it is good.
            # Quickly, only what tells which values there must be is read.
            unread = self.quick and spec.kind == "values"
            if problem and (unread or there[index] > LARGEST_OBJECT):
                lost(index, Shard(problem, [(0, chunks)]))
            elif not unread:
                indices[self._key(spec, index)] = index
                wanted.append((self._key(spec, index), there[index]))
        for key, data in fetched(self.backend, wanted):
            index = indices[key]
            if data is None:
                lost(index, Shard("went away while it was checked", [(0, needed.get(index, 0))]))
                continue
            found = check_shard(spec, data, needed.get(index, 0), keep)
            take(index, found)
            if found.what:
                lost(index, found)

    def _may_be_ours(self, spec: ArraySpec, index: Index) -> bool:
        """Tell whether an object that no value is known in lies in rows that the log lists, with full values."""
        low = index[0] * spec.shard[0]
        if spec.kind != "values" or low >= self.rows or len(index) != 2 or index[1] >= spec.shards_across:
            return False
        return bool(self.raw[low : low + spec.shard[0]].any())
