"""Reading inner chunks: which bytes of which objects hold given rows and elements, fetched in few ranged requests.

Every chunk that is read is checked against its crc32c. Objects lie without gaps (see shard.py), so offsets are
computed and a shard's index is not read, unless the chunks are compressed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smdbg.errors import DamagedData
from smdbg.store.apart import lies_apart, read_apart
from smdbg.store.backend import Backend, Range
from smdbg.store.compress import decompress
from smdbg.store.format import ArraySpec, product
from smdbg.store.parts import GONE, Chunk, Part, Spread, broken, check_chunks, columns, damaged, part_of
from smdbg.store.shard import CRC, MISSING, intact, parse_index

GAP = 64 << 10  # bytes that are cheaper to read along than to ask for the next part separately
BATCH = 128 << 20  # bytes fetched before they are handed on
BATCH_CHUNKS = 8192
MOST_CHUNKS = 1 << 16  # in a shard whose index is read; as above
TRIES = 3  # to read the index of a compressed shard that changes while it is read


def fetch(
    backend: Backend, base: str, spec: ArraySpec, wanted: Iterable[Chunk]
) -> Iterator[tuple[Chunk, NDArray[Any]]]:
    """Yield (chunk, its elements in the chunk's shape) in the order of `wanted`, reading in bounded batches.

    Raises DamagedData when an object is missing, short or does not match its checksum.
    """
    check_chunks(backend, base, spec)
    per_batch = min(BATCH_CHUNKS, max(1, BATCH // (spec.chunk_bytes + CRC)))
    left = iter(wanted)
    while parts := [part_of(base, spec, chunk) for chunk in islice(left, per_batch)]:
        yield from _fetch_batch(backend, spec, parts)


def _fetch_batch(backend: Backend, spec: ArraySpec, parts: Sequence[Part]) -> Iterator[tuple[Chunk, NDArray[Any]]]:
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    if spec.compression:
        held = _fetch_compressed(backend, spec, parts)
    else:
        held, bad = _fetch_places(backend, spec, parts)
        if bad:
            raise damaged(backend, spec, bad[0], broken(bad[0]))
    for part in parts:
        yield part.chunk, np.frombuffer(held[part.chunk], dtype).reshape(spec.chunk)


def _fetch_places(
    backend: Backend, spec: ArraySpec, parts: Iterable[Part]
) -> tuple[dict[Chunk, memoryview], list[Part]]:
    """Return the chunks that are intact, without their checksums, and where the others should be.

    Neighbours are read together. Raises DamagedChunk where an object is missing.
    """
    runs: list[list[Part]] = []
    for part in sorted(parts, key=lambda part: (part.key, part.start)):
        last = runs[-1][-1] if runs else None
        if last is not None and last.key == part.key and part.start - last.stop <= GAP:
            runs[-1].append(part)
        else:
            runs.append([part])
    found = backend.ranges([Range(run[0].key, run[0].start, run[-1].stop) for run in runs])
    held: dict[Chunk, memoryview] = {}
    bad: list[Part] = []
    for run, data in zip(runs, found, strict=True):
        if data is None:
            raise damaged(backend, spec, run[0], GONE)
        view = memoryview(data)
        for part in run:
            piece = view[part.start - run[0].start : part.stop - run[0].start]
            if len(piece) == part.stop - part.start and intact(piece):
                held[part.chunk] = piece[:-CRC]
            else:
                bad.append(part)
    return held, bad


def _fetch_compressed(backend: Backend, spec: ArraySpec, parts: Sequence[Part]) -> dict[Chunk, memoryview]:
    """Return chunks as they were before compression: first the index of each shard, then the chunks.

    A shard may be put again in between, and its last chunk with another length: then its index is read anew.
    """
    held: dict[Chunk, memoryview] = {}
    left = list(parts)
    for _ in range(TRIES):
        placed = _placed(backend, spec, left)
        found, left = _fetch_places(backend, spec, placed)
        held.update(found)
        if not left:
            break
    else:
        raise damaged(backend, spec, left[0], broken(left[0]))
    for part in parts:
        try:
            held[part.chunk] = memoryview(decompress(spec.compression, held[part.chunk], spec.chunk_bytes))
        except ValueError as error:
            raise damaged(backend, spec, part, f"is damaged: chunk {part.index}: {error}") from None
    return held


def _placed(backend: Backend, spec: ArraySpec, parts: Sequence[Part]) -> list[Part]:
    """Return the parts with the places that the indexes of their shards tell."""
    count = product(spec.grid)
    if count > MOST_CHUNKS:
        raise DamagedData(f"{backend.url}/{parts[0].key}: shards of {count} chunks are not believed")
    firsts = {part.key: part for part in reversed(parts)}
    found = backend.ranges([Range(key, -(16 * count + CRC)) for key in firsts])
    indexes: dict[str, NDArray[np.int64]] = {}
    for (key, first), data in zip(firsts.items(), found, strict=True):
        if data is None:
            raise damaged(backend, spec, first, GONE)
        indexes[key] = _stops(backend, spec, first, data)
    out = []
    for part in parts:
        stops = indexes[part.key]
        if part.index >= len(stops):
            raise damaged(backend, spec, part, f"is damaged: it has {len(stops)} chunks, and the log lists more")
        start = int(stops[part.index - 1]) if part.index else 0
        out.append(Part(part.key, start, int(stops[part.index]), part.chunk, part.index))
    return out


def _stops(backend: Backend, spec: ArraySpec, part: Part, data: bytes) -> NDArray[np.int64]:
    """Return where each chunk of a shard ends. Raises DamagedChunk unless they follow each other without gaps."""
    try:
        index = parse_index(data, product(spec.grid), spec.chunk_bytes)
    except ValueError as error:
        raise damaged(backend, spec, part, f"is damaged: {error}") from None
    there = index[:, 1] != MISSING
    present = len(index) if there.all() else int(np.argmin(there))
    stops: NDArray[np.int64] = np.cumsum(index[:present, 1].astype(np.int64))
    starts = stops - index[:present, 1].astype(np.int64)
    if there[present:].any() or (index[:present, 0] != starts.astype(np.uint64)).any():
        raise damaged(backend, spec, part, "is damaged: its index tells of chunks that do not follow each other")
    return stops


def read_rows(backend: Backend, base: str, spec: ArraySpec, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Return whole rows of an array of which a chunk holds whole rows, in ascending order: [len(rows), *tail].

    Raises DamagedData.
    """
    out: NDArray[Any] | None = None
    for here, part in read_parts(backend, base, spec, rows):
        if out is None:  # memory is taken only after the store has shown that such data exist
            out = np.empty((rows.size, *spec.tail), spec.dtype)
        out[here] = part
    return np.empty((rows.size, *spec.tail), spec.dtype) if out is None else out


def read_parts(
    backend: Backend, base: str, spec: ArraySpec, rows: NDArray[np.int64]
) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Yield (which of `rows`, their content [n, *tail]) chunk by chunk; `rows` ascend. Errors as of `read_rows`."""
    if spec.chunk[1:] != spec.tail:
        raise DamagedData(f"{backend.url}/{base}/{spec.path}: its chunks are not whole rows")
    height = spec.chunk[0]
    groups = rows // height
    for chunk, content in fetch(backend, base, spec, [Chunk(int(g)) for g in np.unique(groups)]):
        here = slice(*np.searchsorted(groups, [chunk.group, chunk.group + 1]).tolist())
        inside = rows[here] - chunk.group * height
        follow = int(inside[-1]) - int(inside[0]) + 1 == inside.size
        yield here, content[int(inside[0]) : int(inside[-1]) + 1] if follow else content[inside]


def read_elements(
    backend: Backend, base: str, spec: ArraySpec, rows: NDArray[np.int64], runs: Sequence[tuple[int, int]]
) -> NDArray[Any]:
    """Return the elements of `runs` ((start, stop) across a row, ascending) for each of `rows`: [len(rows), total].

    Raises DamagedData, also where a run leaves the row.
    """
    if not all(0 <= start <= stop <= spec.tail[0] for start, stop in runs):
        raise DamagedData(f"{backend.url}/{base}/{spec.path}: the catalogue places a value outside of it")
    if lies_apart(spec):
        return read_apart(backend, base, spec, rows, runs)
    width, height = spec.chunk[1], spec.chunk[0]
    spread = Spread(runs)
    total = spread.total
    groups = rows // height
    out: NDArray[Any] | None = None
    wanted = (Chunk(int(group), column) for group in np.unique(groups) for column in columns(runs, width))
    for chunk, content in fetch(backend, base, spec, wanted):
        if out is None:
            out = np.empty((rows.size, total), spec.dtype)
        here = np.flatnonzero(groups == chunk.group)
        inside = rows[here] - chunk.group * height
        for at, first, last in spread.within(chunk.column * width, width):
            out[here, at : at + last - first] = content[inside, first:last]
    return np.empty((rows.size, total), spec.dtype) if out is None else out


@dataclass(frozen=True)
class Cut:
    """How to read part of a tensor: `runs` of its flat elements, which reshape to `shape` and are then indexed."""

    runs: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    rest: tuple[Any, ...]


def cut(shape: tuple[int, ...], index: tuple[Any, ...] | None, enough: int) -> Cut:
    """Plan reading `tensor[index]` (NumPy basic indexing) of a C-order tensor without reading all of it.

    Rows along the first sliced axis that lie further apart than `enough` elements are read one by one. Raises
    IndexError as NumPy does.
    """
    size = 1
    for length in shape:
        size *= length
    for i in index or ():
        if not (i is None or i is Ellipsis or isinstance(i, slice) or _is_whole(i)):
            raise IndexError(f"{i!r} is no basic index: whole numbers, slices, ... and None are")
    whole = Cut(((0, size),), shape, () if index is None else index)
    if index is None or size == 0 or any(i is None for i in index):
        return whole
    full = _expanded(index, len(shape))
    base, axis = 0, 0
    strides = [0] * len(shape)
    step = 1
    for i in range(len(shape) - 1, -1, -1):
        strides[i], step = step, step * shape[i]
    while axis < len(shape) and not isinstance(full[axis], slice):
        position = full[axis].__index__()
        if not -shape[axis] <= position < shape[axis]:
            raise IndexError(f"index {position} is out of range for axis {axis}, which has {shape[axis]} elements")
        base += (position % shape[axis]) * strides[axis]
        axis += 1
    if axis == len(shape):
        return Cut(((base, base + 1),), (), ())
    block = strides[axis]
    positions = range(*full[axis].indices(shape[axis]))
    rest = tuple(full[axis + 1 :])
    tail = shape[axis + 1 :]
    if len(positions) == 0:
        return Cut((), (0, *tail), (slice(None), *rest))
    if abs(positions.step) * block < enough or len(positions) == 1 or positions.step == 1:
        low, high = min(positions[0], positions[-1]), max(positions[0], positions[-1])
        span = slice(None, None, positions.step)
        return Cut(((base + low * block, base + (high + 1) * block),), (high - low + 1, *tail), (span, *rest))
    ascending = positions if positions.step > 0 else positions[::-1]
    runs = tuple((base + p * block, base + (p + 1) * block) for p in ascending)
    turn = slice(None) if positions.step > 0 else slice(None, None, -1)
    return Cut(runs, (len(runs), *tail), (turn, *rest))


def _is_whole(index: Any) -> bool:
    array = isinstance(index, np.ndarray) and index.ndim > 0
    return hasattr(index, "__index__") and not isinstance(index, bool | np.bool_) and not array


def _expanded(index: tuple[Any, ...], ndim: int) -> list[Any]:
    """Return the index with an Ellipsis spelled out and an entry for each axis."""
    given = sum(1 for i in index if i is not Ellipsis)
    if len(index) - given > 1:
        raise IndexError("an index has at most one ...")
    if given > ndim:
        raise IndexError(f"{given} indices for {ndim} axes")
    if not any(i is Ellipsis for i in index):
        index = (*index, Ellipsis)
    at = next(k for k, i in enumerate(index) if i is Ellipsis)
    return [*index[:at], *[slice(None)] * (ndim - given), *index[at + 1 :]]
