"""Is one object of a run listed, whole, and what the format says lies there? Asked of objects one at a time."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smdbg.errors import DamagedData
from smdbg.store.format import ArraySpec, product, spec_from_json
from smdbg.store.keys import Key
from smdbg.store.reader import Attempt
from smdbg.store.shard import CRC, intact

_MISSING = np.uint64(2**64 - 1)


def largest(spec: ArraySpec) -> int:
    """Return how many bytes an object of an array can have; compression may add a little to what it does not shrink."""
    chunks = product(spec.grid)
    return chunks * (spec.chunk_bytes + spec.chunk_bytes // 64 + 1024 + CRC + 16) + CRC


def lists(one: Attempt, key: Key) -> bool:
    """Tell whether the log lists anything that lies in this chunk of a collection's array."""
    spec = one.specs.get(key.array)
    if spec is None or key.collection not in one.bits or len(key.index) != max(1, len(spec.tail) + 1):
        return False
    rows = one.rows_of(key.collection)[key.index[0] * spec.shard[0] : (key.index[0] + 1) * spec.shard[0]]
    if spec.kind != "values":
        return rows.size > 0 and not any(key.index[1:])
    return key.index[1] < spec.shards_across and bool(one.raw_at(key.collection, rows).any())


def shard_places(spec: ArraySpec, data: bytes) -> NDArray[np.uint64] | None:
    """Return offset and length (with checksum) of each chunk that a shard holds, [chunks, 2]; None for no whole shard.

    Chunks fill the object from its start to the index without gaps, and those that are missing are at the end.
    """
    total = product(spec.grid)
    index_bytes = 16 * total + CRC
    if len(data) <= index_bytes or not intact(memoryview(data)[-index_bytes:]):
        return None
    index = np.frombuffer(data, "<u8", 2 * total, len(data) - index_bytes).reshape(total, 2)
    present = int((index != _MISSING).any(axis=1).sum())
    held = index[:present].astype(np.uint64)
    lengths = held[:, 1]
    if present == 0 or (index[present:] != _MISSING).any() or lengths.max() > len(data) or lengths.min() <= CRC:
        return None
    ends = np.cumsum(lengths)
    good = (held[:, 0] == ends - lengths).all() and int(ends[-1]) == len(data) - index_bytes
    return held if good else None


def check_object(url: str, key: Key, data: bytes, one: Attempt | None) -> None:
    """Raise DamagedData unless an object's checksums hold and its JSON is what it should be. `one`: whose it is."""
    try:
        good = _chunk_is_good(one.specs[key.array], data) if one and key.index else _json_is_good(key, data, one)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        good = False
    if not good:
        raise DamagedData(
            f"{url}/{key.text} is damaged: it does not match its checksum or is cut short. `smdbg verify` says what is "
            "lost by it"
        )


def _chunk_is_good(spec: ArraySpec, data: bytes) -> bool:
    view = memoryview(data)
    if not spec.sharded:
        return len(data) == spec.chunk_bytes + CRC and intact(view)
    places = shard_places(spec, data)
    if places is None:
        return False
    return all(intact(view[start : start + length]) for start, length in places.tolist())


def _json_is_good(key: Key, data: bytes, one: Attempt | None) -> bool:
    """Tell whether a zarr.json describes what the worker's own says, which has a checksum; other JSON must be JSON."""
    found: Any = json.loads(data)
    if one is None or not key.array:
        return isinstance(found, dict)
    if key.array in one.specs:
        return spec_from_json(key.array, found) == one.specs[key.array]
    return bool(found["node_type"] == "group" and found["zarr_format"] == 3)
