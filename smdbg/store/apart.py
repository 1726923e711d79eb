"""Reading rows that lie in many large chunks: each chunk's bytes go straight to their place in the answer.

What comes from the store is touched twice, by the read itself and by the checksum. A copy more would cost as much as
the read does, since memory that was not used before is slow to get.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from smdbg.store.backend import Backend, Fill
from smdbg.store.format import ArraySpec
from smdbg.store.parts import GONE, Chunk, Part, Spread, broken, check_chunks, columns, damaged, part_of
from smdbg.store.shard import CRC, crc32c

LARGE = 64 << 10  # bytes of a chunk from which on this way is the faster one
BATCH = 256 << 20  # bytes that are on their way while those before are checked

S = TypeVar("S")
T = TypeVar("T")
Bytes = NDArray[np.uint8]


def lies_apart(spec: ArraySpec) -> bool:
    """Tell whether an array's rows lie in large chunks of their own, uncompressed."""
    return spec.chunk[0] == 1 and spec.chunk_bytes >= LARGE and not spec.compression


@dataclass
class _Answer:
    """The memory that is read into, made when the store has shown the first part of what belongs there."""

    rows: int
    total: int
    dtype: str
    _array: NDArray[Any] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def array(self) -> NDArray[Any]:
        with self._lock:
            if self._array is None:
                self._array = np.empty((self.rows, self.total), self.dtype)
            return self._array


@dataclass
class _Piece:
    """A chunk on its way: `content` is its place in the answer, or memory of its own where not all of it is wanted."""

    part: Part
    position: int  # among the rows asked for
    content: Bytes = field(default_factory=lambda: np.empty(0, np.uint8))
    crc: Bytes = field(default_factory=lambda: np.empty(CRC, np.uint8))


def read_apart(
    backend: Backend, base: str, spec: ArraySpec, rows: NDArray[np.int64], runs: Sequence[tuple[int, int]]
) -> NDArray[Any]:
    """Return the elements of ascending `runs` (start, stop) of each of the rows: [len(rows), total].

    Raises DamagedData.
    """
    check_chunks(backend, base, spec)
    spread = Spread(runs)
    answer = _Answer(rows.size, spread.total, spec.dtype)

    def fill(batch: list[list[_Piece]]) -> list[bool | None]:
        return backend.fill([_fill(spec, spread, answer, group) for group in batch])

    for batch, found in _ahead(fill, _batches(_groups(base, spec, rows, runs))):
        for group, filled in zip(batch, found, strict=True):
            _check(backend, spec, group, filled)
            for piece in group:
                _hand_over(spec, spread, answer, piece)
    return answer.array()


def _ahead(action: Callable[[S], T], given: Iterator[S]) -> Iterator[tuple[S, T]]:
    """Yield each of the given with what the action makes of it; the next is made meanwhile, if there is one."""
    now, after = next(given, None), next(given, None)
    if now is None:
        return
    if after is None:  # a thread would cost more than it saves
        yield now, action(now)
        return
    with ThreadPoolExecutor(1) as pool:
        coming: Future[T] | None = pool.submit(action, now)
        while coming is not None and now is not None:
            made = coming.result()
            coming = None if after is None else pool.submit(action, after)
            yield now, made
            now, after = after, next(given, None)


def _groups(
    base: str, spec: ArraySpec, rows: NDArray[np.int64], runs: Sequence[tuple[int, int]]
) -> Iterator[list[_Piece]]:
    """Yield the chunks that are wanted, those together that follow each other in one object."""
    group: list[_Piece] = []
    for position, row in enumerate(rows.tolist()):
        for column in columns(runs, spec.chunk[1]):
            piece = _Piece(part_of(base, spec, Chunk(row, column)), position)
            last = group[-1].part if group else None
            if last is not None and (last.key, last.stop) != (piece.part.key, piece.part.start):
                yield group
                group = []
            group.append(piece)
    if group:
        yield group


def _batches(groups: Iterator[list[_Piece]]) -> Iterator[list[list[_Piece]]]:
    batch: list[list[_Piece]] = []
    size = 0
    for group in groups:
        length = group[-1].part.stop - group[0].part.start
        if batch and size + length > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(group)
        size += length
    if batch:
        yield batch


def _fill(spec: ArraySpec, spread: Spread, answer: _Answer, group: list[_Piece]) -> Fill:
    start, stop = group[0].part.start, group[-1].part.stop
    return Fill(group[0].part.key, start, stop - start, partial(_places, spec, spread, answer, group))


def _places(spec: ArraySpec, spread: Spread, answer: _Answer, group: list[_Piece]) -> list[memoryview]:
    """Return the memory for some chunks and their checksums, one after the other."""
    out = answer.array().view(np.uint8)  # [rows, bytes]
    width, item = spec.chunk[1], spec.itemsize
    for piece in group:
        at, first, stop = next(spread.within(piece.part.chunk.column * width, width))
        if stop - first == width:
            piece.content = out[piece.position, at * item : (at + width) * item]
        else:
            piece.content = np.empty(spec.chunk_bytes, np.uint8)
    return [part.data for piece in group for part in (piece.content, piece.crc)]


def _check(backend: Backend, spec: ArraySpec, group: list[_Piece], filled: bool | None) -> None:
    """Raise DamagedChunk for what is missing, short, or does not match its checksum."""
    if filled is None:
        raise damaged(backend, spec, group[0].part, GONE)
    for piece in group:
        if not filled or crc32c(piece.content.data) != int.from_bytes(piece.crc.tobytes(), "little"):
            raise damaged(backend, spec, piece.part, broken(piece.part))


def _hand_over(spec: ArraySpec, spread: Spread, answer: _Answer, piece: _Piece) -> None:
    """Copy what is wanted of a chunk that was read beside its place."""
    width = spec.chunk[1]
    wanted = list(spread.within(piece.part.chunk.column * width, width))
    if wanted[0][2] - wanted[0][1] < width:
        out, content = answer.array(), piece.content.view(spec.dtype)
        for at, first, stop in wanted:
            out[piece.position, at : at + stop - first] = content[first:stop]
    piece.content = np.empty(0, np.uint8)  # memory of its own is given back
