"""One life of a worker, as its zarr.json and its commit log tell it; what they say is checked before it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smdbg.errors import DamagedData
from smdbg.store.checks import check_collections, check_places, check_spec, check_worker
from smdbg.store.format import (
    END_TIME,
    LOG,
    LOG_COLUMNS,
    LOG_ENDED,
    LOG_ROWS,
    ArraySpec,
    Entry,
    canonical,
    entry_from_json,
    spec_from_json,
    worker_key,
)
from smdbg.store.keys import LARGEST_JSON
from smdbg.store.shard import crc32c, intact

LONGEST_LOG = 1 << 32  # steps; metadata that says more is not believed
ENDED = LOG_ENDED

Log = NDArray[np.int64]
_SAVED, _RAW = LOG_COLUMNS.index("saved"), LOG_COLUMNS.index("raw")


@dataclass(frozen=True)
class Catalogue:
    """A worker's zarr.json: its facts, tensors by name, arrays by path, and the length of its log.

    `rows`: how many the log has room for; once the worker has completed, how many it has.
    """

    facts: Mapping[str, Any]
    entries: dict[str, Entry]
    specs: dict[str, ArraySpec]
    rows: int

    @property
    def status(self) -> str:
        """What the worker says of itself: running, completed or 'failed: reason'."""
        return str(self.facts["status"])

    @property
    def chunks(self) -> int:
        """How many chunks the log may have; its capacity is put before the first row that needs it."""
        return -(-self.rows // LOG_ROWS)

    @property
    def version(self) -> int:
        """Which version of the catalogue this is."""
        return int(self.facts["catalogue_version"])


@dataclass
class Attempt:
    """One life of a worker: its catalogue, its arrays and its committed log.

    `until`: rows of steps from here on are superseded by a later attempt (None: none is).
    """

    rank: int
    attempt: int
    facts: Mapping[str, Any]
    entries: dict[str, Entry]
    specs: dict[str, ArraySpec]
    log: Log
    last_commit: float = 0.0
    until: int | None = None
    _rows: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The worker group's key."""
        return worker_key(self.rank, self.attempt)

    @cached_property
    def bits(self) -> dict[str, int]:
        """Collection -> its bit in the masks."""
        return {name: int(about["bit"]) for name, about in self.facts["collections"].items()}

    @cached_property
    def lasting(self) -> NDArray[np.bool_]:
        """Tell for each log row whether the worker did not go back to its step, or before it, later on."""
        out = np.ones(len(self.log), bool)
        step = self.log[:, 0]
        out[:-1] = step[:-1] < np.minimum.accumulate(step[::-1])[::-1][1:]
        return out

    def rows_of(self, collection: str) -> NDArray[np.int64]:
        """Return for each stored row of a collection the index of its log row: row r belongs to the r-th."""
        if collection not in self._rows:
            bit = self.bits.get(collection)
            saved = np.zeros(len(self.log), bool) if bit is None else (self.log[:, _SAVED] >> bit) & 1 == 1
            self._rows[collection] = np.flatnonzero(saved)
        return self._rows[collection]

    def raw_at(self, collection: str, log_index: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell for log rows whether full values of the collection were kept there."""
        kept: NDArray[np.bool_] = (self.log[log_index, _RAW] >> self.bits[collection]) & 1 == 1
        return kept


def parse_catalogue(name: str, data: bytes, key: tuple[int, int] | None = None) -> Catalogue:
    """Read a worker's zarr.json; `name` says where it is, `key` whose it must be. Raises DamagedData."""
    if len(data) > LARGEST_JSON:
        raise DamagedData(f"{name}: the worker's zarr.json has {len(data):,} bytes, which is not believed")
    try:
        group: dict[str, Any] = json.loads(data)
        facts = {**group["attributes"]["smdbg"]}
        stated = facts.pop("crc32c")
        good = stated == crc32c(canonical(facts))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedData(f"{name}: the worker's zarr.json is damaged ({type(error).__name__})") from error
    if not good or not _arrays_are_intact(facts, group):
        raise DamagedData(f"{name}: the worker's zarr.json does not match its checksum")
    if key is not None and (facts.get("rank", key[0]), facts.get("attempt", key[1])) != key:
        raise DamagedData(f"{name}: the zarr.json of another worker or attempt lies in its place")
    check_worker(name, facts)
    rows = _log_rows(name, group)
    try:
        children = group["consolidated_metadata"]["metadata"]
        specs = {p: spec_from_json(p, m) for p, m in children.items() if m["node_type"] == "array"}
        entries = {entry.info.name: entry for entry in map(entry_from_json, facts["catalogue"])}
        check_collections(facts["collections"])
        for spec in specs.values():
            check_spec(spec)
        for entry in entries.values():
            if entry.info.collection not in facts["collections"]:
                raise ValueError("a tensor of no collection")
            check_places(entry, specs)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DamagedData(f"{name}: the catalogue is damaged ({error})") from error
    return Catalogue(facts, entries, specs, rows)


def _arrays_are_intact(facts: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    """Tell whether the metadata of arrays match the checksum that the facts have of them; earlier writers left none."""
    try:
        return "arrays" not in facts or facts["arrays"] == crc32c(canonical(group["consolidated_metadata"]["metadata"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _log_rows(name: str, group: Mapping[str, Any]) -> int:
    """Return how many rows the log may have."""
    try:
        rows = group["consolidated_metadata"]["metadata"][LOG]["shape"][0]
        if 0 <= rows <= LONGEST_LOG:
            return int(rows)
    except (KeyError, TypeError, IndexError, AttributeError):
        pass
    raise DamagedData(f"{name}: the length of the log is damaged")


def parse_log(where: str, data: bytes) -> tuple[Log, int]:
    """Return (rows [n, 10] of a chunk of the log, mark behind them: see ENDED). Raises DamagedData."""
    size = LOG_ROWS * len(LOG_COLUMNS) * 8
    if len(data) != size + 4 or not intact(memoryview(data)):
        raise DamagedData(f"{where}: does not match its checksum")
    rows = np.frombuffer(data, "<i8", LOG_ROWS * len(LOG_COLUMNS)).reshape(LOG_ROWS, len(LOG_COLUMNS))
    written = rows[:, END_TIME] != 0
    count = len(rows) if written.all() else int(np.argmin(written))
    return rows[:count], int(rows[count, 0]) if count < len(rows) else 0
