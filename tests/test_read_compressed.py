"""Compressed shards: the index is read first, is not believed, and is read again when the shard was put anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from smdbg.errors import DamagedData
from smdbg.store.backend import LocalBackend, Range
from smdbg.store.chunks import read_elements, read_rows
from smdbg.store.format import ArraySpec, values_spec
from smdbg.store.shard import CRC, MISSING, Shard, crc32c

ROWS, WIDTH = 600, 64


def spec_of(name: str) -> ArraySpec:
    return dataclasses.replace(values_spec("c", "x", "float32", WIDTH), compression=name)


def content(rows: int = ROWS) -> np.ndarray:
    out = np.zeros((rows, WIDTH), np.float32)
    out[:, ::7] = np.arange(rows)[:, None]
    return out


def sealed(spec: ArraySpec, rows: np.ndarray) -> bytes:
    """Return the object that holds these rows."""
    total = spec.shard[0] // spec.chunk[0]
    present = -(-len(rows) // spec.chunk[0])
    shard = Shard(spec.chunk_bytes, present, total)
    shard.write(0, np.ascontiguousarray(rows).view(np.uint8).reshape(-1))
    return bytes(shard.seal_compressed(spec.compression, spec.itemsize))


class Counting(LocalBackend):
    """Notes the requests, and runs `after` behind each."""

    def __init__(self, url: Path) -> None:
        super().__init__(str(url))
        self.asked: list[Range] = []
        self.after: Callable[[], None] = lambda: None

    def ranges(self, wanted: Sequence[Range]) -> list[bytes | None]:
        self.asked += wanted
        found = super().ranges(wanted)
        self.after()
        return found


@pytest.fixture
def store(tmp_path: Path) -> Counting:
    return Counting(tmp_path)


@pytest.mark.parametrize("name", ["lz4", "zstd"])
def test_two_requests_a_shard(store: Counting, name: str) -> None:
    spec, given = spec_of(name), content()
    assert ROWS > 2 * spec.chunk[0]
    store.put(f"w/{spec.key(0)}", sealed(spec, given))
    rows = np.arange(ROWS)
    assert np.array_equal(read_rows(store, "w", spec, rows), given)
    assert [r.stop is None for r in store.asked] == [True, False], "the index, and all chunks in one"
    store.asked.clear()
    some = np.array([0, 3, ROWS - 1])
    assert np.array_equal(
        read_elements(store, "w", spec, some, [(2, 9), (60, 64)]), given[some][:, [*range(2, 9), *range(60, 64)]]
    )
    assert len(store.asked) <= 3
    asked = sum((r.stop or 0) - r.start for r in store.asked if r.stop is not None)
    assert asked < len(sealed(spec, given)), "not all of it"


def test_a_shard_that_grows_in_between(store: Counting) -> None:
    """Its index is read, then the shard is put with more rows, and its last chunk is another."""
    spec, given = spec_of("zstd"), content()
    half = spec.chunk[0] + spec.chunk[0] // 2
    store.put(f"w/{spec.key(0)}", sealed(spec, given[:half]))

    def grow() -> None:
        store.after = lambda: None
        store.put(f"w/{spec.key(0)}", sealed(spec, given))

    store.after = grow
    assert np.array_equal(read_rows(store, "w", spec, np.arange(half)), given[:half])
    assert len(store.asked) == 4


def with_index(data: bytes, spec: ArraySpec, change: Callable[[np.ndarray], None]) -> bytes:
    """Let `change` alter the index, whose checksum is made anew."""
    total = spec.shard[0] // spec.chunk[0]
    index = np.frombuffer(data[-16 * total - CRC : -CRC], "<u8").reshape(total, 2).copy()
    change(index)
    raw = index.tobytes()
    return data[: -16 * total - CRC] + raw + crc32c(raw).to_bytes(4, "little")


LIES: dict[str, Callable[[np.ndarray], None]] = {
    "overlapping": lambda index: index.__setitem__((1, 0), 0),
    "a gap": lambda index: index.__setitem__((1, 0), index[1, 0] + np.uint64(4)),
    "far away": lambda index: index.__setitem__((1, 0), 1 << 61),
    "beyond 2^63": lambda index: index.__setitem__((1, 0), MISSING - np.uint64(1)),
    "huge": lambda index: index.__setitem__((1, 1), 1 << 50),
    "empty": lambda index: index.__setitem__((1, 1), 0),
    "missing": lambda index: index.__setitem__(1, MISSING),
    "half missing": lambda index: index.__setitem__((1, 1), MISSING),
    "all missing": lambda index: index.__setitem__(slice(None), MISSING),
    "turned round": lambda index: index.__setitem__(slice(0, 2), index[1::-1].copy()),
}


@pytest.mark.parametrize("lie", list(LIES))
def test_an_index_that_lies(store: Counting, lie: str) -> None:
    spec = spec_of("lz4")
    key = f"w/{spec.key(0)}"
    store.put(key, with_index(sealed(spec, content()), spec, LIES[lie]))
    with pytest.raises(DamagedData, match=f"{key} is damaged"):
        read_rows(store, "w", spec, np.arange(ROWS))
    assert len(store.asked) == 1


def test_any_flipped_byte_is_found(store: Counting) -> None:
    spec, given = spec_of("zstd"), content()
    good = sealed(spec, given)
    key, rows = f"w/{spec.key(0)}", np.arange(ROWS)
    rng = np.random.default_rng(0)
    for at in [0, len(good) - 1, len(good) - 20, *rng.integers(0, len(good), 60)]:
        data = bytearray(good)
        data[at] ^= 1 << int(rng.integers(8))
        store.put(key, bytes(data))
        with pytest.raises(DamagedData, match=key):
            read_rows(store, "w", spec, rows)
    for length in (0, 3, 100, len(good) - 1):
        store.put(key, good[:length])
        with pytest.raises(DamagedData, match=key):
            read_rows(store, "w", spec, rows)


def test_what_does_not_decompress(store: Counting) -> None:
    """The checksum is right and the content is not what was compressed: a bomb, or another codec."""
    spec = spec_of("lz4")
    other = dataclasses.replace(spec, compression="zstd")
    store.put(f"w/{spec.key(0)}", sealed(other, content()))
    with pytest.raises(DamagedData, match="is damaged: chunk 0: .*compressed"):
        read_rows(store, "w", spec, np.arange(ROWS))


def test_absurd_grids_are_not_asked_for(store: Counting) -> None:
    spec = dataclasses.replace(spec_of("lz4"), shard=(1 << 40, WIDTH), chunk=(1, WIDTH))
    store.put(f"w/{spec.key(0)}", b"x" * 100)
    with pytest.raises(DamagedData, match="not believed"):
        read_rows(store, "w", spec, np.arange(3))
    assert store.asked == []
