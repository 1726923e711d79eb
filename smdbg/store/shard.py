"""Encoding and checking shards (Zarr v3 codec `sharding_indexed`, index at the end, inner chunks with crc32c).

A shard written here holds its inner chunks in C order without gaps. Without compression chunk i starts at
i * (chunk bytes + 4): readers may compute an offset and skip the index, which is there for every other Zarr reader.
Compressed chunks differ in length; their places are in the index alone.
"""

from __future__ import annotations

import numpy as np
from google_crc32c import value as _crc32c
from numpy.typing import NDArray

from smdbg.store.compress import compress, longest

CRC = 4
_LARGE_COPY = 16 << 10  # bytes from which on a copy by words is the faster one
MISSING = np.uint64(2**64 - 1)  # offset and length, in a shard's index, of a chunk that is not there
_LARGEST = 1 << 62  # no offset or length reaches it, nor their sum 2**63


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
        self._packed = bytearray()  # compressed chunks that no longer change, with their checksums
        self._lengths: list[int] = []  # of each chunk in there

    @property
    def geometry(self) -> tuple[int, int, int]:
        """Return (bytes of a chunk, chunks present, chunks of the grid): shards with the same can stand in."""
        return self.chunk_bytes, self.present, self.total

    def reset(self, pattern: bytes | None = None) -> None:
        """Begin another shard of the same geometry in the same memory, whose pages need not be fetched anew.

        Not before whatever `seal` returned without `present` has been stored: it is this memory. The content is filled
        with `pattern`, a repeated element; without one it stays what it was, for a caller that writes all of it.
        """
        self._packed, self._lengths = bytearray(), []
        if pattern is not None:
            self._fill(pattern)

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
                _copy(data[done : done + span].reshape(whole, size), self._rows[chunk : chunk + whole])
            else:
                span = min(size - inside, end - done)
                _copy(data[done : done + span], self._rows[chunk, inside : inside + span])
            done += span

    def fill(self, pattern: bytes) -> None:
        """Fill the whole content of a new shard with a repeated element (its length divides the chunk)."""
        if any(pattern):
            self._fill(pattern)

    def _fill(self, pattern: bytes) -> None:
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

    def seal_compressed(self, name: str, itemsize: int, present: int | None = None, complete: int = 0) -> bytes:
        """Return the object's bytes with its first `present` chunks (None: all) compressed, each with its checksum.

        The first `complete` of them are written to no more: they are compressed once, and have the same place in every
        later object. `name` and `itemsize` (bytes of an element) are the same in every call.
        """
        stored = self.present if present is None else present
        if not max(complete, len(self._lengths)) <= stored <= self.present:
            raise ValueError(f"{stored} chunks, where {len(self._lengths)} were complete, then {complete}")
        rest: list[bytes] = []
        lengths = self._lengths.copy()
        for chunk in range(len(lengths), stored):
            packed = compress(name, itemsize, self._rows[chunk])
            checked = packed + crc32c(packed).to_bytes(CRC, "little")
            lengths.append(len(checked))
            if chunk < complete:
                self._packed += checked
                self._lengths.append(len(checked))
            else:
                rest.append(checked)
        return b"".join((self._packed, *rest, _index_bytes(np.array(lengths, np.uint64), self.total)))


def _copy(source: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
    """Copy bytes between arrays of one shape.

    Chunks do not begin at multiples of 16 in a shard, and there plain copying takes up to twice its time on processors
    whose `rep movsb` wants aligned targets; a loop over whole words does not.
    """
    if source.shape[-1] % 4 == 0 and source.size >= _LARGE_COPY:
        np.positive(source.view(np.uint32), out=target.view(np.uint32))
    else:
        target[...] = source


def index_bytes(chunk_bytes: int, present: int, total: int) -> bytes:
    """Return index and its checksum for `present` chunks stored in C order, the rest missing."""
    return _index_bytes(np.full(present, chunk_bytes + CRC, np.uint64), total)


def _index_bytes(lengths: NDArray[np.uint64], total: int) -> bytes:
    index = np.full((total, 2), MISSING, "<u8")
    index[: lengths.size, 0] = np.cumsum(lengths, dtype=np.uint64) - lengths
    index[: lengths.size, 1] = lengths
    raw = index.tobytes()
    return raw + crc32c(raw).to_bytes(CRC, "little")


def parse_index(data: bytes | bytearray | memoryview, total: int, chunk_bytes: int | None = None) -> NDArray[np.uint64]:
    """Return offset and length of each chunk of a shard, [total, 2]; both are MISSING of one that is not there.

    `data` is the end of the object, 16 * total + 4 bytes; lengths count the checksum. Raises ValueError if it does not
    match its checksum, is of another size, or places a chunk where none can be. With `chunk_bytes`, the size of a chunk
    before compression, lengths are checked against what that can become at most.
    """
    if total < 1 or len(data) != 16 * total + CRC or not intact(memoryview(data)):
        raise ValueError(f"the index of {total} chunks is cut short or does not match its checksum")
    index: NDArray[np.uint64] = np.frombuffer(data, "<u8", 2 * total).reshape(total, 2).astype(np.uint64, copy=False)
    stored = index[(index != MISSING).any(axis=1)]
    most = longest(chunk_bytes) + CRC if chunk_bytes is not None else _LARGEST
    # Each by itself first, so that the sums cannot wrap.
    if stored.size and (stored.max() >= _LARGEST or stored[:, 1].min() <= CRC or stored[:, 1].max() > most):
        raise ValueError("the index places a chunk where none can be")
    return index


def with_crc(data: bytes | bytearray | memoryview) -> bytes:
    """Return `data` followed by its crc32c: a chunk of an array that is not sharded."""
    return bytes(data) + crc32c(data).to_bytes(CRC, "little")


def intact(data: memoryview) -> bool:
    """Tell whether the last four bytes are the crc32c of those before."""
    return len(data) > CRC and int.from_bytes(data[-CRC:], "little") == crc32c(data[:-CRC])
