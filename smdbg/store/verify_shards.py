"""Is the object of a chunk or of a shard whole? Which of its inner chunks are not?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smdbg.store.backend import Backend, Range
from smdbg.store.compress import decompress
from smdbg.store.format import ArraySpec, product
from smdbg.store.intact import shard_places
from smdbg.store.shard import CRC, intact

LARGEST_OBJECT = 512 << 20  # bytes; no writer makes such objects
BATCH_BYTES = 64 << 20
BATCH_OBJECTS = 256


@dataclass
class Shard:
    """What is wrong with a shard: `what` is '' for nothing. `lost`: chunks [start, stop) that cannot be read.

    `content` holds, where it was asked for, the chunks that are good by number.
    """

    what: str = ""
    lost: list[tuple[int, int]] = field(default_factory=list)
    content: dict[int, NDArray[Any]] = field(default_factory=dict)


def fetched(backend: Backend, wanted: Iterable[tuple[str, int]]) -> Iterator[tuple[str, bytes | None]]:
    """Yield (key, bytes) of objects, given with their sizes, in bounded batches; None for one that went away."""
    batch: list[str] = []
    total = 0
    for key, size in wanted:
        if batch and (total + size > BATCH_BYTES or len(batch) == BATCH_OBJECTS):
            yield from zip(batch, backend.ranges([Range(name) for name in batch]), strict=True)
            batch, total = [], 0
        batch.append(key)
        total += size
    if batch:
        yield from zip(batch, backend.ranges([Range(name) for name in batch]), strict=True)


def unlisted(backend: Backend, keys: Sequence[str]) -> set[str]:
    """Return which objects are there although a listing left them out: stores promise less of listings."""
    found = backend.ranges([Range(key, 0, 1) for key in keys])
    return {key for key, data in zip(keys, found, strict=True) if data is not None}


def size_problem(spec: ArraySpec, size: int, needed: int) -> str:
    """Return what is wrong with an object's size, '' if nothing: all that can be told without reading it."""
    if size > LARGEST_OBJECT or spec.chunk_bytes > LARGEST_OBJECT:
        return f"has {size:,} bytes, which no writer makes"
    if not spec.sharded:
        return "" if size == spec.chunk_bytes + CRC else f"has {size:,} bytes in place of {spec.chunk_bytes + CRC:,}"
    total = product(spec.grid)
    body = size - 16 * total - CRC
    least = needed * (2 * CRC if spec.compression else spec.chunk_bytes + CRC)
    most = total * (spec.chunk_bytes + spec.chunk_bytes // 64 + 1024)
    if body < max(1, least):
        return f"is cut short: it has {size:,} bytes"
    if body > most or (not spec.compression and body % (spec.chunk_bytes + CRC)):
        return f"has {size:,} bytes, which do not make whole chunks"
    return ""


def check_shard(spec: ArraySpec, data: bytes, needed: int, keep: bool = False) -> Shard:
    """Check index and chunks of a shard, of which the first `needed` chunks must be there."""
    out = Shard()
    size, total = spec.chunk_bytes + CRC, product(spec.grid)
    problem = size_problem(spec, len(data), needed)
    places = shard_places(spec, data) if 16 * total + CRC < len(data) else None
    if places is not None and not spec.compression and (places[:, 1] != size).any():
        places = None
    if places is None:
        out.what = problem or "its index does not match its checksum"
        if spec.compression or spec.chunk_bytes > LARGEST_OBJECT:
            out.lost.append((0, needed))
            return out
        # Readers compute where a chunk lies, so that those that are whole can still be read.
        there = min(needed, len(data) // size)
        spans = [(k * size, size) for k in range(there)]
    else:
        spans = [(int(start), int(length)) for start, length in places]
        there = min(needed, len(spans))
    view = memoryview(data)
    for number, (start, length) in enumerate(spans):
        piece = view[start : start + length]
        if not intact(piece):
            out.what = out.what or f"bytes {start} to {start + length} do not match their checksum"
            out.lost.append((number, number + 1))
            continue
        try:
            plain = decompress(spec.compression, piece[:-CRC], spec.chunk_bytes) if spec.compression else piece[:-CRC]
        except ValueError as error:
            out.what = out.what or f"a chunk cannot be decompressed ({error})"
            out.lost.append((number, number + 1))
            continue
        if keep:
            out.content[number] = np.frombuffer(plain, np.dtype(spec.dtype).newbyteorder("<")).reshape(spec.chunk)
    if there < needed:
        out.what = out.what or f"holds {there:,} chunks of the {needed:,} that the log needs"
        out.lost.append((there, needed))
    return out
