"""Taking things out of a run that has ended: full values of some steps, or whole collections.

First the worker's zarr.json and then the log say what is no longer there; data go after that. So a run is whole at any
moment, and whatever is interrupted leaves data behind that nobody refers to. What is still to be deleted is noted in
the worker's facts (`pruned`, with `pending`), so that running it again, whatever is asked for, finishes it.

No object is ever put again with other values: a reader that was opened before would take them for the true ones. So
what shares an object with steps that are kept stays where it is, and only the log no longer lists it.

A collection that is taken out keeps its bits in the log: a reader that holds the former catalogue then still counts
rows rightly, and misses objects at worst. Bits that no collection has mean nothing.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smdbg.errors import BadSelection, DamagedData, near
from smdbg.select import StepList, StepRange
from smdbg.store.backend import Backend, Listed, Missing
from smdbg.store.copy import is_live, refuse_damaged
from smdbg.store.format import LOG_COLUMNS, LOG_ROWS, canonical, log_spec
from smdbg.store.intact import check_object
from smdbg.store.keys import Key, parse_key, refuse_links
from smdbg.store.reader import Attempt, StoredRun
from smdbg.store.shard import CRC, crc32c, with_crc
from smdbg.store.worker_group import with_checksum

LOST = "failed: lost"  # status of a worker that never ended: putting its log again must not look like a sign of life
_RAW = LOG_COLUMNS.index("raw")


@dataclass(frozen=True)
class Choice:
    """What to take out. `collections`: () means all that can lose their values.

    `steps`: those whose values go (`keep`: those that stay, of each all others go); None: of all steps. `whole`: take
    the collections out, statistics and all.
    """

    collections: tuple[str, ...] = ()
    steps: StepRange | StepList | None = None
    keep: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Pruned:
    """What goes, or went, of one collection over all workers.

    `steps` that lose something, `objects` deleted, `size` of these in bytes, `shared` objects that stay since they hold
    values of kept steps too. `what` is 'values', 'all' or 'left behind'.
    """

    collection: str
    what: str
    steps: int
    objects: int
    shared: int
    size: int


@dataclass
class _Work:
    """What is to be done in one attempt: new texts first, then data."""

    one: Attempt
    group: bool = False
    log: dict[str, NDArray[np.int64]] = field(default_factory=dict)  # chunk of the log -> its new column `raw`
    dropped: dict[str, NDArray[np.int64]] = field(default_factory=dict)  # collection -> steps that lose values now
    whole: tuple[str, ...] = ()
    gone: dict[str, list[Listed]] = field(default_factory=dict)
    shared: Counter[str] = field(default_factory=Counter)  # collection -> objects that kept steps have a part in


class Prune:
    """A plan, made by looking at the run; nothing is changed before `carry_out`."""

    def __init__(self, backend: Backend, choice: Choice) -> None:
        """Plan. Raises BadSelection for what the run does not have, or cannot lose, and for a run being written."""
        self._backend = backend
        self._stored = StoredRun(backend, "all")
        refuse_damaged(self._stored)
        if is_live(self._stored):
            raise BadSelection(f"{backend.url} is still being written: prune it when it has ended")
        self._choice = choice
        steps = _chosen_steps(self._stored, choice)
        names = _chosen_collections(self._stored, choice)
        objects: dict[tuple[int, int], list[tuple[Key, Listed]]] = {}
        for item in backend.walk("workers"):
            key = parse_key(item.name)
            if key is not None and key.worker is not None and key.collection:
                objects.setdefault(key.worker, []).append((key, item))
        self._work = [
            _plan(one, names, steps, choice.whole, objects.get((one.rank, one.attempt), []))
            for one in self._stored.attempts
        ]

    def planned(self) -> list[Pruned]:
        """Return what would go, a line a collection."""
        return self._lines()

    def carry_out(self) -> list[Pruned]:
        """Do it, and return what went. Raises StoreError and DamagedData; running it again goes on."""
        refuse_links(self._backend)
        now = time.time()
        for work in self._work:
            if work.group:
                self._put_group(work, now, pending=True)
        for work in self._work:
            for key, raw in work.log.items():
                self._put_log(work.one, key, raw)
        for work in self._work:
            # Metadata last: while there is data, there is something that tells plain Zarr readers what it is.
            names = [item.name for items in work.gone.values() for item in items]
            self._backend.remove(sorted(names, key=lambda name: name.endswith("/zarr.json")))
            if work.group:
                self._put_group(work, now, pending=False)
        return self._lines()

    def _put_group(self, work: _Work, now: float, pending: bool) -> None:
        """Put a worker's zarr.json without what was taken out, and with a note of it."""
        key = f"{work.one.base}/zarr.json"
        group: dict[str, Any] = json.loads(self._backend.get(key))
        facts, children = dict(group["attributes"]["smdbg"]), group["consolidated_metadata"]["metadata"]
        note = {name: dict(about) for name, about in _noted(work.one).items()}
        for name in (*work.dropped, *work.whole):
            note[name] = {"what": "all" if name in work.whole else "values", "time": now}
        for about in note.values():
            about.pop("pending", None)
            if pending:
                about["pending"] = True
        facts["pruned"] = note
        facts["collections"] = {n: about for n, about in facts["collections"].items() if n not in work.whole}
        facts["catalogue"] = [entry for entry in facts["catalogue"] if entry["collection"] not in work.whole]
        if facts["status"] == "running":
            facts["status"] = LOST
        kept = {path: meta for path, meta in children.items() if path.split("/", 1)[0] not in work.whole}
        if "arrays" in facts:
            facts["arrays"] = crc32c(canonical(kept))
        group["attributes"] = {**group["attributes"], "smdbg": with_checksum(facts)}
        group["consolidated_metadata"] = {**group["consolidated_metadata"], "metadata": kept}
        self._backend.put(key, json.dumps(group, separators=(",", ":"), allow_nan=False).encode())

    def _put_log(self, one: Attempt, key: str, raw: NDArray[np.int64]) -> None:
        """Put a chunk of the log again, changed in one column."""
        data = bytearray(self._get(parse_key(key) or Key(key), one)[:-CRC])
        np.frombuffer(data, "<i8").reshape(LOG_ROWS, -1)[: raw.size, _RAW] = raw
        self._backend.put(key, with_crc(data))

    def _get(self, key: Key, one: Attempt) -> bytes:
        """Return an object, checked."""
        try:
            data = self._backend.get(key.text)
        except Missing:
            raise DamagedData(f"{self._backend.url}/{key.text} is missing: see `smdbg verify`") from None
        check_object(self._backend.url, key, data, one)
        return data

    def _lines(self) -> list[Pruned]:
        out: list[Pruned] = []
        names = dict.fromkeys(n for w in self._work for n in (*w.whole, *w.dropped, *w.gone))
        for name in names:
            gone = [item for work in self._work for item in work.gone.get(name, ())]
            shared = sum(work.shared[name] for work in self._work)
            steps = _union(work.dropped[name] for work in self._work if name in work.dropped)
            whole = any(name in work.whole for work in self._work)
            what = "all" if whole else "values" if steps.size else "left behind"
            out.append(Pruned(name, what, steps.size, len(gone), shared, sum(item.size for item in gone)))
        return out


def _union(parts: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.unique(np.concatenate([np.zeros(0, np.int64), *parts]))


# --- what was asked for ---


def _noted(one: Attempt) -> dict[str, Any]:
    """Return what earlier prunes left in a worker's facts: collection -> what, time, pending."""
    found = one.facts.get("pruned")
    return {n: a for n, a in found.items() if isinstance(a, dict)} if isinstance(found, dict) else {}


def needs_values(one: Attempt, collection: str) -> bool:
    """Tell whether statistics of a collection are derived from its values: of single numbers only the count is kept."""
    entries = (entry for entry in one.entries.values() if entry.info.collection == collection and entry.slots)
    return any("min" not in one.specs[f"{collection}/{p.array}"].statistics for e in entries for p in e.stats)


def _chosen_steps(stored: StoredRun, choice: Choice) -> NDArray[np.int64] | None:
    """Return the steps that lose their values, None for all. Raises BadSelection where none is meant."""
    if choice.steps is None:
        return None
    saved = _union(one.log[:, 0] for one in stored.attempts)
    named = choice.steps.apply(saved)
    return np.setdiff1d(saved, named) if choice.keep else named


def _chosen_collections(stored: StoredRun, choice: Choice) -> set[str]:
    known = {name for one in stored.attempts for name in one.bits}
    before = {name for one in stored.attempts for name in _noted(one)}
    bound = {name for one in stored.attempts for name in one.bits if needs_values(one, name)}
    for name in choice.collections:
        if name not in known | before:
            there = ", ".join(sorted(known)) or "none"
            where = f"There is no collection {name!r} in {stored.backend.url}; it has {there}."
            raise BadSelection(where + near(name, known))
        if name in bound and not choice.whole:
            raise BadSelection(
                f"{name!r} holds single numbers whose statistics come from their values: nothing is left without. "
                "To take all of it out, say --all"
            )
    return set(choice.collections or known - bound)


# --- the plan of one attempt ---


def _plan(
    one: Attempt,
    names: set[str],
    steps: NDArray[np.int64] | None,
    whole: bool,
    objects: Iterable[tuple[Key, Listed]],
) -> _Work:
    work = _Work(one)
    mine = [name for name in one.bits if name in names]
    pending = {name for name, about in _noted(one).items() if about.get("pending")}
    log = one.log.copy()
    if whole:
        work.whole = tuple(mine)
        work.dropped = {name: one.log[one.rows_of(name), 0] for name in mine}
    else:
        for name in mine:
            at = one.rows_of(name)
            at = at[one.raw_at(name, at)]
            at = at if steps is None else at[np.isin(one.log[at, 0], steps)]
            if at.size:
                log[at, _RAW] &= ~(1 << one.bits[name])
                work.dropped[name] = one.log[at, 0]
        work.log = _changed_chunks(one, log)
    work.group = bool(work.whole or work.dropped or pending)
    alive = {name: (log[one.rows_of(name), _RAW] >> bit) & 1 == 1 for name, bit in one.bits.items()}
    before = {name: one.raw_at(name, one.rows_of(name)) for name in one.bits}
    touched = {*work.whole, *work.dropped, *pending}
    for key, item in objects:
        if key.collection not in touched:
            continue
        spec = one.specs.get(key.array)
        if key.collection not in one.bits or key.collection in work.whole:
            work.gone.setdefault(key.collection, []).append(item)
        elif spec is not None and spec.kind == "values" and key.index:
            rows = slice(key.index[0] * spec.shard[0], (key.index[0] + 1) * spec.shard[0])
            kept = alive[key.collection][rows]
            if not kept.any():
                work.gone.setdefault(key.collection, []).append(item)
            elif (before[key.collection][rows] & ~kept).any():
                work.shared[key.collection] += 1
    return work


def _changed_chunks(one: Attempt, log: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    out = {}
    for start in range(0, len(log), LOG_ROWS):
        raw = log[start : start + LOG_ROWS, _RAW]
        if not np.array_equal(raw, one.log[start : start + LOG_ROWS, _RAW]):
            out[f"{one.base}/{log_spec().key(start)}"] = raw
    return out
