"""Where inner chunks lie: in which object, at which bytes, and what part of a row they hold."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from smdbg.errors import DamagedData
from smdbg.store.backend import Backend
from smdbg.store.format import ArraySpec
from smdbg.store.shard import CRC

LARGEST_CHUNK = 512 << 20  # no writer makes one; metadata that says so is not believed
GONE = "is missing, although the commit log lists what it held"


class DamagedChunk(DamagedData):
    """Damage in rows [first, stop) of an array; who knows what tensor and steps they are says so instead."""

    def __init__(self, message: str, first: int, stop: int) -> None:
        """Take the message and the rows of the array."""
        super().__init__(message)
        self.first = first
        self.stop = stop


@dataclass(frozen=True, order=True)
class Chunk:
    """An inner chunk: `group` counts chunk heights down the rows, `column` chunk widths across a row."""

    group: int
    column: int = 0


@dataclass(frozen=True)
class Part:
    """Where a chunk lies: bytes [start, stop) of an object, checksum included; `index`: its number in the shard."""

    key: str
    start: int
    stop: int
    chunk: Chunk
    index: int


def check_chunks(backend: Backend, base: str, spec: ArraySpec) -> None:
    """Raise DamagedData for chunks larger than any writer makes."""
    if spec.chunk_bytes > LARGEST_CHUNK:
        raise DamagedData(f"{backend.url}/{base}/{spec.path}: chunks of {spec.chunk_bytes} bytes are not believed")


def part_of(base: str, spec: ArraySpec, chunk: Chunk) -> Part:
    """Return where a chunk lies; of a compressed one, only object and number mean anything."""
    size = spec.chunk_bytes + CRC
    groups, across = spec.grid[0], spec.grid[1] if len(spec.grid) > 1 else 1
    key = f"{base}/{spec.key(chunk.group * spec.chunk[0], chunk.column // across)}"
    index = (chunk.group % groups) * spec.chunks_per_row + chunk.column % across
    return Part(key, index * size, (index + 1) * size, chunk, index)


def damaged(backend: Backend, spec: ArraySpec, part: Part, what: str) -> DamagedChunk:
    """Return the error for a chunk, which says where it was looked for."""
    first = part.chunk.group * spec.chunk[0]
    return DamagedChunk(f"{backend.url}/{part.key} {what}", first, first + spec.chunk[0])


def broken(part: Part) -> str:
    """Say that a checksum does not fit."""
    return f"is damaged: bytes {part.start} to {part.stop} do not match their checksum"


def columns(runs: Sequence[tuple[int, int]], width: int) -> Iterator[int]:
    """Yield the chunk columns that ascending runs touch, each once."""
    after = 0
    for start, stop in runs:
        if stop > start:
            first = max(after, start // width)
            after = (stop - 1) // width + 1
            yield from range(first, after)


class Spread:
    """Ascending runs (start, stop) of a row's elements, that lie one behind the other in what is read."""

    def __init__(self, runs: Sequence[tuple[int, int]]) -> None:
        """Add up the runs."""
        self._starts = [start for start, _ in runs]
        self._stops = [stop for _, stop in runs]
        self._places = [0, *accumulate(stop - start for start, stop in runs)]
        self.total = self._places[-1]

    def within(self, left: int, width: int) -> Iterator[tuple[int, int, int]]:
        """Yield what of the row's elements [left, left + width) is in the runs: (place, first, stop), from `left`."""
        i = bisect_right(self._stops, left)
        while i < len(self._starts) and self._starts[i] < left + width:
            first, stop = max(self._starts[i], left), min(self._stops[i], left + width)
            if first < stop:
                yield self._places[i] + first - self._starts[i], first - left, stop - left
            i += 1
