"""Encoding and checking shards (Zarr v3 codec `sharding_indexed`, index at the end, inner chunks with crc32c).

A shard written here holds its inner chunks in C order without gaps: chunk i starts at i * (chunk bytes + 4). Readers
may therefore compute an offset and skip the index; the index is there for every other Zarr reader.
"""

from __future__ import annotations

import numpy as np
from google_crc32c import value as _crc32c
from numpy.typing import NDArray

CRC = 4
_MISSING = np.uint64(2**64 - 1)


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """Return the Castagnoli checksum of `data` (not empty), without copying it.

    The extension takes bytes or an object whose buffer needs no release: an array over the data is one, a memoryview
    or a bytearray is not.
    """
    return int(_crc32c(np.frombuffer(data, np.uint8)))


class Shard:
    """A shard being filled: `chunks` inner chunks of `chunk_bytes` each, of which the first `present` are stored.

    `encoded` is the object's bytes, laid out from the start as they will be stored, so that values are copied once,
    straight to their place. `seal` adds checksums and index; a sealed shard can be written to and sealed again.
    """

    def __init__(self, chunk_bytes: int, present: int, total: int | None = None) -> None:
        """Make room for `present` chunks, zero-filled, out of a grid of `total` (default: the same)."""
        self.chunk_bytes = chunk_bytes
        self.present = present
        self.total = present if total is None else total
        self._stride = chunk_bytes + CRC
        self.encoded = bytearray(present * self._stride + 16 * self.total + CRC)
        body = np.frombuffer(self.encoded, np.uint8, present * self._stride)
        self._rows = body.reshape(present, self._stride)[:, :chunk_bytes]

    def write(self, at: int, data: NDArray[np.uint8]) -> None:
        """Copy bytes to position `at` of the shard's content (checksums not counted).

        Content position p lies in chunk p // chunk_bytes; data that crosses chunks is cut at their borders.
        """
        size, done, end = self.chunk_bytes, 0, data.size
        while done < end:
            chunk, inside = divmod(at + done, size)
            whole = (end - done) // size if inside == 0 else 0
            if whole:
                span = whole * size
                self._rows[chunk : chunk + whole] = data[done : done + span].reshape(whole, size)
            else:
                span = min(size - inside, end - done)
                self._rows[chunk, inside : inside + span] = data[done : done + span]
            done += span

    def fill(self, pattern: bytes) -> None:
        """Fill the whole content with a repeated element (its length divides the chunk)."""
        if any(pattern):
            self._rows[:] = np.frombuffer(pattern * (self.chunk_bytes // len(pattern)), np.uint8)

    def seal(self, present: int | None = None) -> bytes | bytearray:
        """Add checksums and index, and return the object's bytes.

        With `present`, only the first `present` chunks are part of the object; its bytes are then a copy, which stays
        as it is when the shard is written to again. Without, they are the shard's own buffer: a last use of it.
        """
        stored = self.present if present is None else present
        view = memoryview(self.encoded)
        for chunk in range(stored):
            start = chunk * self._stride
            end = start + self.chunk_bytes
            view[end : end + CRC] = crc32c(view[start:end]).to_bytes(CRC, "little")
        index = index_bytes(self.chunk_bytes, stored, self.total)
        body = stored * self._stride
        if present is None:
            view[body:] = index
            return self.encoded
        return b"".join((view[:body], index))


def index_bytes(chunk_bytes: int, present: int, total: int) -> bytes:
    """Return index and its checksum for `present` chunks stored in C order, the rest missing."""
    index = np.full((total, 2), _MISSING, "<u8")
    index[:present, 0] = np.arange(present, dtype=np.uint64) * np.uint64(chunk_bytes + CRC)
    index[:present, 1] = chunk_bytes + CRC
    raw = index.tobytes()
    return raw + crc32c(raw).to_bytes(CRC, "little")


def with_crc(data: bytes | bytearray | memoryview) -> bytes:
    """Return `data` followed by its crc32c: a chunk of an array that is not sharded."""
    return bytes(data) + crc32c(data).to_bytes(CRC, "little")


def intact(data: memoryview) -> bool:
    """Tell whether the last four bytes are the crc32c of those before."""
    return len(data) > CRC and int.from_bytes(data[-CRC:], "little") == crc32c(data[:-CRC])
