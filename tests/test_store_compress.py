"""Compressed chunks and shards, with zarr-python as judge, and what hostile bytes do to the decoders."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numcodecs import blosc, zstd
from numpy.typing import NDArray

from smdbg.store.compress import compress, decompress, longest
from smdbg.store.format import COMPRESSIONS, ArraySpec, array_json, canonical, values_spec
from smdbg.store.shard import CRC, MISSING, Shard, crc32c, intact, parse_index

NAMES = pytest.mark.parametrize("name", COMPRESSIONS)
ITEMSIZES = (1, 2, 4, 8, 16)


def _contents(size: int) -> dict[str, NDArray[np.uint8]]:
    rng = np.random.default_rng(size)
    sparse = np.zeros(size, np.uint8)
    sparse[:: max(1, size // 7)] = 3
    return {"zeros": np.zeros(size, np.uint8), "noise": rng.integers(0, 256, size, dtype=np.uint8), "sparse": sparse}


@NAMES
@pytest.mark.parametrize("size", [16, 48, 4096, 131_072, 131_088, 1 << 20])
def test_round_trip_of_every_kind_of_content(name: str, size: int) -> None:
    for what, content in _contents(size).items():
        for itemsize in ITEMSIZES:
            packed = compress(name, itemsize, content)
            assert len(packed) <= longest(size), what
            assert bytes(decompress(name, packed, size)) == content.tobytes()
            assert what == "noise" or size < 4096 or len(packed) < size / 4
            for form in (content.tobytes(), bytearray(content.tobytes()), memoryview(content)):
                assert compress(name, itemsize, form) == packed
        for form in (bytearray(packed), memoryview(packed), np.frombuffer(packed, np.uint8)):
            assert bytes(decompress(name, form, size)) == content.tobytes()


@NAMES
@pytest.mark.parametrize("dtype", ["bool", "uint16", "float32", "int64", "complex128"])
def test_chunks_are_those_of_zarr(name: str, dtype: str, tmp_path: Path) -> None:
    spec = replace(values_spec("c", "a", dtype, 96), compression=name)
    rng = np.random.default_rng(1)
    rows = (rng.integers(0, 9, (spec.shard[0] + 3, spec.tail[0])) * (rng.random(spec.tail[0]) < 0.2)).astype(dtype)

    # zarr reads what a shard writes, also one that is not full
    ours = tmp_path / "ours"
    _write_json(ours, spec, len(rows))
    for number in range(2):
        content = rows[number * spec.shard[0] :][: spec.shard[0]]
        shard = _filled(spec, content)
        groups = -(-len(content) // spec.chunk[0])
        sealed = shard.seal_compressed(name, spec.itemsize, groups * spec.chunks_per_row)
        target = ours / "c" / str(number) / "0"
        target.parent.mkdir(parents=True)
        target.write_bytes(sealed)
    assert np.array_equal(zarr.open_array(ours, mode="r")[:], rows)

    # and we read what zarr writes; a chunk of it is ours to the byte
    theirs = tmp_path / "theirs"
    _write_json(theirs, spec, len(rows))
    zarr.open_array(theirs, mode="r+")[:] = rows
    stored = (theirs / "c" / "0" / "0").read_bytes()
    total = shard.total
    index = parse_index(stored[-16 * total - CRC :], total, spec.chunk_bytes)
    shard = _filled(spec, rows[: spec.shard[0]])
    for chunk, (start, length) in enumerate(index.tolist()):
        part = memoryview(stored)[start : start + length]
        content = shard.encoded[chunk * (spec.chunk_bytes + CRC) :][: spec.chunk_bytes]
        assert intact(part) and bytes(decompress(name, part[:-CRC], spec.chunk_bytes)) == content
        assert bytes(part[:-CRC]) == compress(name, spec.itemsize, content)


def _write_json(folder: Path, spec: ArraySpec, rows: int) -> None:
    folder.mkdir()
    (folder / "zarr.json").write_bytes(canonical(array_json(spec, rows)))


def _filled(spec: ArraySpec, rows: NDArray[Any]) -> Shard:
    total = int(np.prod(spec.grid))
    shard = Shard(spec.chunk_bytes, total, total)
    shard.write(0, rows.reshape(-1).view(np.uint8))
    return shard


@NAMES
def test_a_growing_shard_keeps_the_places_of_complete_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def counted(name: str, itemsize: int, chunk: Any) -> bytes:
        nonlocal count
        count += 1
        return compress(name, itemsize, chunk)

    monkeypatch.setattr("smdbg.store.shard.compress", counted)
    rng = np.random.default_rng(0)
    chunk_bytes, total, line = 4096, 6, 1024
    truth = rng.integers(0, 3, total * chunk_bytes, dtype=np.uint8)
    shard = Shard(chunk_bytes, total)
    before = np.full((total, 2), MISSING)
    complete_before, old = 0, b""
    for end in range(line, truth.size + 1, line):
        shard.write(end - line, truth[end - line : end])
        present, complete = -(-end // chunk_bytes), end // chunk_bytes
        count = 0
        sealed = shard.seal_compressed(name, 4, present, complete)
        assert count == present - complete_before, "a complete chunk was compressed again"
        index = parse_index(sealed[-16 * total - CRC :], total, chunk_bytes)
        assert np.array_equal(index[:complete_before], before[:complete_before])
        stable = int(index[:complete_before, 1].sum())
        assert sealed[:stable] == old[:stable]
        assert (index[present:] == MISSING).all()
        assert index[:present, 1].sum() + 16 * total + CRC == len(sealed), "there are gaps"
        content = b""
        for start, length in index[:present].tolist():
            part = memoryview(sealed)[start : start + length]
            assert intact(part)
            content += decompress(name, part[:-CRC], chunk_bytes)
        assert content[:end] == truth[:end].tobytes() and not any(content[end:])
        before, complete_before, old = index, complete, sealed
    assert shard.seal_compressed(name, 4) == old
    assert bytes(shard.seal()) == bytes(_plain(truth, chunk_bytes, total)), "the uncompressed form has changed"
    with pytest.raises(ValueError):
        shard.seal_compressed(name, 4, total - 1)


def _plain(content: NDArray[np.uint8], chunk_bytes: int, total: int) -> bytes | bytearray:
    shard = Shard(chunk_bytes, total)
    shard.write(0, content)
    return shard.seal()


@NAMES
def test_a_shard_used_again_holds_nothing_of_the_last(name: str) -> None:
    content = np.arange(4 * 512, dtype=np.uint32).view(np.uint8)
    nan = np.array(np.nan, np.float32).tobytes()
    used = Shard(2048, 4, 5)
    memory = used.encoded
    for pattern in (b"\0", nan):
        used.reset()
        used.write(0, content)
        used.seal()
        used.seal_compressed(name, 4, 4, 4)
        used.reset(pattern)
        fresh = Shard(2048, 4, 5)
        fresh.fill(pattern)
        assert used.geometry == fresh.geometry == (2048, 4, 5)
        for shard in (used, fresh):
            shard.write(2044, content[:8])
        assert used.seal_compressed(name, 4, 2, 1) == fresh.seal_compressed(name, 4, 2, 1)
        assert used.seal(3) == fresh.seal(3)
        assert used.seal() == fresh.seal()
    assert used.encoded is memory
    used.reset()
    used.write(0, content)
    fresh = Shard(2048, 4, 5)
    fresh.write(0, content)
    assert used.seal_compressed(name, 4) == fresh.seal_compressed(name, 4)


def _signed(index: NDArray[np.uint64]) -> bytes:
    raw = index.astype("<u8").tobytes()
    return raw + crc32c(raw).to_bytes(CRC, "little")


def test_a_bad_index_is_refused() -> None:
    sealed = Shard(64, 3, 4).seal_compressed("lz4", 4)
    good = sealed[-68:]
    index = parse_index(good, 4, 64)
    assert index.dtype == np.uint64 and index.shape == (4, 2) and (index[3] == MISSING).all()
    assert np.array_equal(parse_index(_signed(index), 4), index)
    for at in range(len(good)):
        with pytest.raises(ValueError):
            parse_index(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :], 4, 64)
    for data, total in ((good[1:], 4), (good, 3), (good, 5), (b"", 0), (b"\0" * 4, 0), (sealed, 4)):
        with pytest.raises(ValueError):
            parse_index(data, total)
    largest = longest(64) + CRC
    for row, column, value in (
        (0, 0, 2**64 - 1),
        (0, 1, 2**64 - 1),
        (1, 0, 2**63),
        (1, 1, 2**63),
        (2, 1, CRC),
        (2, 1, 0),
        (3, 0, 0),
    ):
        wrong = index.copy()
        wrong[row, column] = value
        with pytest.raises(ValueError):
            parse_index(_signed(wrong), 4)
    wrong = index.copy()
    wrong[0, 1] = largest
    assert np.array_equal(parse_index(_signed(wrong), 4, 64), wrong)
    wrong[0, 1] = largest + 1
    with pytest.raises(ValueError):
        parse_index(_signed(wrong), 4, 64)
    empty = np.full((2, 2), MISSING)
    assert np.array_equal(parse_index(_signed(empty), 2, 64), empty)


SIZE = 6000
CONTENT = (np.arange(SIZE, dtype=np.uint32) % 11).astype(np.uint8).tobytes()
EMPTY_FRAME = zstd.compress(b"", 1)
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"


@NAMES
def test_other_sizes_are_refused(name: str) -> None:
    packed = compress(name, 4, CONTENT)
    for size in (0, 1, SIZE - 1, SIZE + 1, 2 * SIZE, 1 << 40):
        with pytest.raises(ValueError):
            decompress(name, packed, size)
    for cut in range(len(packed)):
        with pytest.raises(ValueError):
            decompress(name, packed[:cut], SIZE)
    for behind in (b"\0", packed, EMPTY_FRAME, SKIPPABLE):
        with pytest.raises(ValueError):
            decompress(name, packed + behind, SIZE)
        with pytest.raises(ValueError):
            decompress(name, behind + packed, SIZE)


def test_frames_that_do_not_tell_their_size_are_refused() -> None:
    # single segment and content size off, window of 1 KiB; a run of 200 bytes
    run = int(200 << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"x"
    with pytest.raises(ValueError, match="any number"):
        decompress("zstd", b"\x28\xb5\x2f\xfd\x00\x00" + run, 200)
    # the same that tells it is read, and one that lies is not
    assert bytes(decompress("zstd", b"\x28\xb5\x2f\xfd\x20\xc8" + run, 200)) == b"x" * 200
    with pytest.raises(ValueError):
        decompress("zstd", b"\x28\xb5\x2f\xfd\x20\xc9" + run, 201)
    # each width of the field
    for descriptor, width, less in ((0x60, 2, 256), (0xA0, 4, 0), (0xE0, 8, 0)):
        frame = b"\x28\xb5\x2f\xfd" + bytes([descriptor]) + (300 - less).to_bytes(width, "little")
        run = int(300 << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"y"
        assert bytes(decompress("zstd", frame + run, 300)) == b"y" * 300
    # with a checksum, as zarr writes it where it is asked to
    assert bytes(decompress("zstd", zstd.compress(CONTENT, 1, True), SIZE)) == CONTENT
    # empty blocks before it are read, a flood of them is not
    run = int(200 << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"x"
    assert bytes(decompress("zstd", b"\x28\xb5\x2f\xfd\x20\xc8" + b"\0\0\0" * 20 + run, 200)) == b"x" * 200
    with pytest.raises(ValueError):
        decompress("zstd", b"\x28\xb5\x2f\xfd\x20\xc8" + b"\0\0\0" * 10_000 + run, 200)


def test_bombs_take_no_memory() -> None:
    script = """
import resource
import struct
import numpy as np
from numcodecs import zstd
from smdbg.store.compress import compress, decompress, prepare
prepare()
huge = struct.pack("<BBBBIII", 2, 1, 0x21, 4, 2**31 - 100, 1 << 20, 36) + bytes(20)
bomb = compress("zstd", 1, np.zeros(64 << 20, np.uint8))
told = b"\\x28\\xb5\\x2f\\xfd\\xe0" + (1 << 40).to_bytes(8, "little") + b"\\x01\\x00\\x00"
limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, data in (("lz4", huge), ("zstd", bomb), ("zstd", told), ("zstd", bomb * 50)):
    try:
        decompress(name, data, 4096)
    except ValueError:
        continue
    raise SystemExit(f"{name}: accepted")
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - limit < 16 << 10
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(COMPRESSIONS),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=5),
    st.booleans(),
)
def test_flipped_bits_give_content_of_that_size_or_a_value_error(
    name: str, flips: list[tuple[int, int]], header: bool
) -> None:
    data = bytearray(compress(name, 4, CONTENT))
    for at, bits in flips:
        data[at % (min(24, len(data)) if header else len(data))] ^= bits
    try:
        assert len(decompress(name, data, SIZE)) == SIZE
    except ValueError:
        pass


@given(
    st.binary(max_size=200),
    st.sampled_from(COMPRESSIONS),
    st.sampled_from([b"", b"\x28\xb5\x2f\xfd", b"\2\1\x31\4"]),
)
def test_any_bytes_are_refused_or_have_the_size(data: bytes, name: str, start: bytes) -> None:
    try:
        assert len(decompress(name, start + data, 64)) == 64
    except ValueError:
        pass


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="Did you mean zstd"):
        compress("zst", 4, CONTENT)
    with pytest.raises(ValueError, match="unknown compression"):
        decompress("", CONTENT, SIZE)
    with pytest.raises(ValueError, match="lz4"):  # of another compressor in the same container
        decompress("lz4", blosc.compress(CONTENT, b"zstd", 5), SIZE)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads by /proc")
def test_no_threads_and_no_settings_of_the_process() -> None:
    script = """
import multiprocessing
import os
import threading
import numpy as np
from smdbg.store.compress import compress, decompress
assert "numcodecs" not in __import__("sys").modules
chunk = np.zeros(8 << 20, np.uint8)
tasks = len(os.listdir("/proc/self/task"))
def work():
    for name in ("lz4", "zstd"):
        decompress(name, compress(name, 4, chunk), chunk.size)
        assert len(os.listdir("/proc/self/task")) == tasks + extra, "threads were started"
extra = 0
work()
extra = 1
thread = threading.Thread(target=work)
thread.start()
thread.join()
from numcodecs import blosc
assert blosc.use_threads is None
assert multiprocessing.get_start_method(allow_none=True) is None
multiprocessing.set_start_method("spawn")
pid = os.fork()
if pid == 0:
    extra = 0
    tasks = len(os.listdir("/proc/self/task"))
    work()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
