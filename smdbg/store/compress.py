"""Compressing inner chunks with the codecs of Zarr: blosc (lz4, bitshuffle) and zstd, both by numcodecs.

Stored bytes are not trusted: their headers must say exactly the size that the metadata asks for before a decoder sees
them, so that a small object never takes much memory.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smdbg.errors import near
from smdbg.store.format import COMPRESSIONS

Data = bytes | bytearray | memoryview | NDArray[np.uint8]

# Blosc takes the size of an element from the buffer; numcodecs before 0.16 knows no other way to tell it.
_ELEMENT = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}

# version, version of lz4, flags, typesize; bytes of content, in a block of it, stored
_BLOSC_HEADER = struct.Struct("<BBBBIII")
_BLOSC_FORMAT = 2
_BLOSC_LZ4 = 1  # in the three highest bits of the flags
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SMALLEST_BLOCK = 1024  # bytes of content that a zstd block holds on average at least; nothing sane makes smaller ones


def prepare() -> None:
    """Load the codecs ahead of time; else the first chunk does."""
    _codecs()


def compress(name: str, itemsize: int, chunk: Data) -> bytes:
    """Return a chunk of elements of `itemsize` bytes (1, 2, 4, 8 or 16), compressed. Starts no threads.

    Raises ValueError for a compression that is not in COMPRESSIONS.
    """
    _check_name(name)
    blosc, zstd = _codecs()
    if name == "zstd":
        return bytes(zstd.compress(chunk, 1, False))
    with _single_threaded(blosc):
        return bytes(blosc.compress(np.frombuffer(chunk, _ELEMENT[itemsize]), b"lz4", 5, blosc.BITSHUFFLE, 0))


def decompress(name: str, data: Data, size: int) -> memoryview:
    """Return the `size` bytes that `data` is the compressed form of.

    Raises ValueError for anything that does not decode to exactly that; no more memory than `size` is taken for it.
    """
    _check_name(name)
    source = np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)
    check = _check_zstd if name == "zstd" else _check_blosc
    try:
        check(source.data, size)
    except (struct.error, IndexError):
        raise ValueError("compressed data end too early") from None
    blosc, zstd = _codecs()
    out = np.empty(size, np.uint8)
    try:
        if name == "zstd":
            zstd.decompress(source, out)
        else:
            with _single_threaded(blosc):
                blosc.decompress(source, out)
    except RuntimeError as error:
        raise ValueError(f"compressed data cannot be read ({error})") from error
    return out.data


def longest(size: int) -> int:
    """Return how long a chunk of `size` bytes can become at most, whatever it holds."""
    return size + (size >> 8) + 128


def _check_name(name: str) -> None:
    if name not in COMPRESSIONS:
        raise ValueError(f"unknown compression {name!r}: use {' or '.join(COMPRESSIONS)}.{near(name, COMPRESSIONS)}")


@cache
def _codecs() -> tuple[Any, Any]:
    """Return the modules numcodecs.blosc and numcodecs.zstd."""
    import multiprocessing

    chosen = multiprocessing.get_start_method(allow_none=True)
    from numcodecs import blosc, zstd

    # Its first use makes a lock of multiprocessing, which settles the start method for the whole process: the training
    # could no longer choose its own. Undone here, once for all.
    with _single_threaded(blosc):
        blosc.compress(bytes(16), b"lz4", 5)
    if chosen is None:
        multiprocessing.set_start_method(None, force=True)
    return blosc, zstd


@contextmanager
def _single_threaded(blosc: Any) -> Iterator[None]:
    """Keep blosc from starting threads of its own.

    Off the main thread it never does, unless the user told it to. On the main thread it would; the switch is put back,
    since it is one for the whole process.
    """
    switch = blosc.use_threads is None and threading.current_thread() is threading.main_thread()
    if switch:
        blosc.use_threads = False
    try:
        yield
    finally:
        if switch:
            blosc.use_threads = None


def _check_blosc(data: memoryview, size: int) -> None:
    version, _, flags, typesize, content, block, stored = _BLOSC_HEADER.unpack_from(data)
    # The decoder goes by the length in the header, not by that of the buffer.
    if stored != len(data) or content != size:
        raise ValueError(f"{stored} compressed bytes of {content}, where {len(data)} of {size} should be")
    if version != _BLOSC_FORMAT or flags >> 5 != _BLOSC_LZ4 or not typesize or not 0 < block <= max(size, 1):
        raise ValueError("compressed data are not those of blosc with lz4")


def _check_zstd(data: memoryview, size: int) -> None:
    """Check that `data` is one zstd frame that says it holds `size` bytes, and nothing behind it (RFC 8878, 3.1.1)."""
    if data[:4] != _ZSTD_MAGIC:
        raise ValueError("compressed data are not those of zstd")
    descriptor = data[4]
    single, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
    at = 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3]  # behind the sizes of window and dictionary name
    width = (single, 2, 4, 8)[descriptor >> 6]
    content = int.from_bytes(data[at : at + width], "little") + (256 if width == 2 else 0)
    if width == 0 or content != size:
        raise ValueError(f"compressed data say they hold {content if width else 'any number of'} bytes, not {size}")
    at += width
    for _ in range(64 + size // _SMALLEST_BLOCK):
        header = data[at] | data[at + 1] << 8 | data[at + 2] << 16
        is_run = header >> 1 & 3 == 1  # one byte, repeated
        at += 3 + (1 if is_run else header >> 3)
        if header & 1:
            break
    if at + 4 * checksum != len(data):
        raise ValueError("compressed data are cut short, or something follows them")
