"""Arrays under construction, row by row.

Narrow arrays keep the shard that is being filled in memory and write it anew at each flush; wide rows become shards of
their own at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from smdbg.store.format import ArraySpec, product
from smdbg.store.pool import ShardPool
from smdbg.store.shard import CRC, Shard

Array = NDArray[Any]
Span = tuple[int, int]  # elements [start, stop) of a row
SHORT_ROW = 64 << 10  # bytes


class Put(Protocol):
    """Hands an object to the store; `done` is called once the store has it, from another thread."""

    def __call__(self, key: str, data: bytes | bytearray, done: Callable[[], None] | None = None) -> None:
        """Hand over an object."""


class Narrow:
    """An array whose rows are short: the shard being filled is kept, and put again at each flush."""

    def __init__(self, spec: ArraySpec) -> None:
        """Start before the first row."""
        self.spec = spec
        self.dirty = False
        self._shard: Shard | None = None
        self._row0 = 0
        self._used = 0
        self._row_bytes = product(spec.tail) * spec.itemsize
        self._blank = np.zeros(product(spec.tail) if self._row_bytes <= SHORT_ROW else 0, spec.dtype)
        if any(_fill_bytes(spec.dtype)):
            self._blank[:] = np.frombuffer(_fill_bytes(spec.dtype), spec.dtype)

    def write(self, row: int, at: int, data: Array) -> None:
        """Copy `data` to element `at` of `row`. Rows come in order; a full shard has been flushed before."""
        raw = data.view(np.uint8)
        self._at(row).write((row - self._row0) * self._row_bytes + at * self.spec.itemsize, raw)
        self._used = row - self._row0 + 1
        self.dirty = True

    def write_row(self, row: int, offsets: Sequence[int], data: Sequence[Array]) -> None:
        """Copy the parts of a row to their places. Nothing is put before the next flush."""
        if self._row_bytes > SHORT_ROW:
            for at, one in zip(offsets, data, strict=True):
                self.write(row, at, one)
            return
        # Many small parts, single numbers mostly: gathered first, since each write on its own costs more than a copy.
        line = self._blank.copy()
        joined = np.concatenate(data)
        if joined.size == len(data) and all(one.size == 1 for one in data):
            line[offsets] = joined
        else:
            for at, one in zip(offsets, data, strict=True):
                line[at : at + one.size] = one
        self.write(row, 0, line)

    def extend(self, row: int) -> None:
        """Count `row` in, as fill values where nothing was written: so a reader may ask for every row there is."""
        self._at(row)
        self._used = row - self._row0 + 1
        self.dirty = True

    def _at(self, row: int) -> Shard:
        rows = self.spec.shard[0]
        if self._shard is None or row - self._row0 >= rows:
            self._row0 = row // rows * rows
            total = product(self.spec.grid)
            self._shard = Shard(self.spec.chunk_bytes, total, total)
            self._shard.fill(_fill_bytes(self.spec.dtype))
        return self._shard

    def full_after(self, row: int) -> bool:
        """Tell whether `row` is the last one of its shard."""
        return self._shard is not None and row + 1 == self._row0 + self.spec.shard[0]

    def flush(self, put: Put, rows: int = 0) -> None:
        """Put the shard as it is, if it changed; let go of it once the collection has more `rows` than it holds."""
        if self.dirty and self._shard is not None:
            spec, per_group = self.spec, self.spec.chunks_per_row
            present = -(-self._used // spec.chunk[0]) * per_group
            final = self._used // spec.chunk[0] * per_group
            put(spec.key(self._row0), _sealed(self._shard, spec, present, final))
            self.dirty = False
        if rows >= self._row0 + self.spec.shard[0]:
            self._shard = None


class RowBuffer:
    """The memory of one row of a wide array, laid out as its shards are stored, so that values are copied once.

    Shards come from a pool when they are first written to, and go back to it when everybody has said `done`: the
    writer, and the store for each shard put.
    """

    def __init__(self, spec: ArraySpec, pool: ShardPool) -> None:
        """Start with no shard taken."""
        self.spec = spec
        self._pool = pool
        self._shards: list[Shard | None] = [None] * spec.shards_across
        self._users = 1
        self._lock = threading.Lock()

    def write(self, at: int, elements: Array) -> None:
        """Copy elements to element `at` of the row."""
        width, item = self.spec.shard[1], self.spec.itemsize
        end = at + elements.size
        if end <= width:  # the first shard, which mostly is the only one
            self._shard(0).write(at * item, elements.view(np.uint8))
            return
        for across in range(at // width, -(-end // width)):
            first, last = max(at, across * width), min(end, (across + 1) * width)
            part = elements if last - first == elements.size else elements[first - at : last - at]
            self._shard(across).write((first - across * width) * item, part.view(np.uint8))

    def pieces(self, at: int, size: int) -> list[Array]:
        """Return `size` elements from `at` on as views of the memory, cut where chunks end; some are not aligned."""
        out: list[Array] = []
        (_, width), (_, part), item = self.spec.shard, self.spec.chunk, self.spec.itemsize
        end = at + size
        while at < end:
            across, inside = divmod(at, width)
            chunk, skipped = divmod(inside, part)
            count = min(part - skipped, end - at)
            start = chunk * (part * item + CRC) + skipped * item
            out.append(np.frombuffer(self._shard(across).encoded, self.spec.dtype, count, start))
            at += count
        return out

    def put(self, row: int, across: int, gaps: Sequence[Span], put: Put) -> None:
        """Put a shard, if it was written to, with the fill value in the gaps that nobody wrote to."""
        shard = self._shards[across]
        if shard is None:
            return
        width, fill = self.spec.shard[1], np.frombuffer(_fill_bytes(self.spec.dtype), np.uint8)
        for start, stop in gaps:
            first, last = max(start, across * width), min(stop, (across + 1) * width)
            for piece in self.pieces(first, last - first):
                piece.view(np.uint8).reshape(-1, fill.size)[:] = fill
        with self._lock:
            self._users += 1
        put(self.spec.key(row, across), _sealed(shard, self.spec), self.done)

    def done(self) -> None:
        """Note that one user less reads the memory; after the last it is used again."""
        with self._lock:
            self._users -= 1
            free = self._shards if self._users == 0 else []
        for shard in free:
            if shard is not None:
                self._pool.give(shard)

    def _shard(self, across: int) -> Shard:
        found = self._shards[across]
        if found is None:
            spec = self.spec
            width = min(spec.shard[1], spec.tail[0] - across * spec.shard[1])
            found = self._pool.take(spec.chunk_bytes, width // spec.chunk[1], product(spec.grid))
            self._shards[across] = found
        return found


def row_memory(spec: ArraySpec) -> int:
    """Return the bytes that a row's buffer takes when all of its shards are there."""
    chunks = spec.tail[0] // spec.chunk[1]
    return chunks * (spec.chunk_bytes + 4) + spec.shards_across * (16 * product(spec.grid) + 4)


@dataclass
class Wide:
    """An array whose rows are put at once, in one or more shards each."""

    spec: ArraySpec
    pool: ShardPool

    def write_row(
        self,
        row: int,
        offsets: Sequence[int],
        data: Sequence[Array | None],
        gaps: Sequence[Span],
        put: Put,
        buffer: RowBuffer | None = None,
    ) -> None:
        """Put a row. None among `data`: that part lies in the buffer already; `gaps`: elements that no part covers."""
        row_buffer = RowBuffer(self.spec, self.pool) if buffer is None else buffer
        width = self.spec.shard[1]
        rest = [(at, one) for at, one in zip(offsets, data, strict=True) if one is not None]
        for across in range(self.spec.shards_across):  # one after the other, so that few wait in memory at a time
            start, stop = across * width, (across + 1) * width
            for at, one in rest:
                first, last = max(at, start), min(at + one.size, stop)
                if first < last:
                    row_buffer.write(first, one[first - at : last - at])
            row_buffer.put(row, across, gaps, put)
        if buffer is None:
            row_buffer.done()


def _sealed(shard: Shard, spec: ArraySpec, present: int | None = None, final: int = 0) -> bytes | bytearray:
    """Return a shard's object with its first `present` chunks (None: all), `final` of which never change."""
    if spec.compression:
        return shard.seal_compressed(spec.compression, spec.itemsize, present, final)
    return shard.seal(present)


def _fill_bytes(dtype: str) -> bytes:
    if dtype.startswith(("float", "complex")):
        value: complex = complex(np.nan, np.nan) if dtype.startswith("complex") else np.nan
        return np.array(value, dtype).tobytes()
    return b"\0"
