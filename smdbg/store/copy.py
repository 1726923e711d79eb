"""Copying a run, byte by byte, so that whatever interrupts it, the target holds the whole run or none.

The root's zarr.json, without which nothing is a run, is put last and only if there is none. Until then
`unfinished.json` says which run is on its way, so that running the copy again goes on with it, and no other run is put
on top of its parts.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from smdbg.errors import AccessRefused, BadSelection, DamagedData, NotARun, RunExists, StoreError
from smdbg.store.backend import Backend, Listed, Missing, Range
from smdbg.store.format import END_TIME, LOG, LOG_COLUMNS, LOG_ROWS, log_spec
from smdbg.store.intact import check_object, largest, lists
from smdbg.store.keys import (
    LARGEST_JSON,
    LARGEST_ROOT,
    ROOT,
    STOP,
    UNFINISHED,
    Key,
    is_partial,
    note_text,
    parse_key,
    read_note,
    refuse_links,
)
from smdbg.store.reader import LOST_SECONDS, Attempt, StoredRun
from smdbg.store.room import Room
from smdbg.store.shard import CRC
from smdbg.store.verify import verify

IN_MEMORY = 256 << 20  # bytes of objects that are on their way at once
TRIES = 10  # to read a growing log and its catalogue as of one moment
_MD5 = re.compile(r"[0-9a-f]{32}\Z")

Progress = Callable[[int, int, int, int], None]  # objects done, of how many, bytes done, of how many


@dataclass(frozen=True)
class Copied:
    """What a copy did. `objects` and `size` (bytes) were sent; `present` objects were at the target already.

    `left_out`: objects in the run's folder that are not part of the run.
    """

    run_id: str
    objects: int
    size: int
    present: int
    left_out: int


@dataclass(frozen=True)
class _Item:
    key: Key
    listed: Listed
    one: Attempt | None
    data: bytes | None = None  # of what was read already: what is committed, as of one moment


def refuse_damaged(stored: StoredRun) -> None:
    """Raise DamagedData if a worker cannot be read: what is made of the others would pass for the run."""
    for said in stored.damaged.values():
        raise DamagedData(f"{said}. `smdbg verify` says what is lost by it")


def is_live(stored: StoredRun) -> bool:
    """Tell whether somebody still writes the run, or may be about to."""
    now = time.time()
    alive = (o.facts["status"] == "running" and now - o.last_commit <= LOST_SECONDS for o in stored.attempts)
    return stored.status(now) == "running" or any(alive)


def copy_run(
    source: Backend,
    target: Backend,
    *,
    incomplete: bool = False,
    progress: Progress | None = None,
    threads: int = 8,
) -> Copied:
    """Copy a run to an empty place, or go on with a copy of it that was interrupted.

    `incomplete`: also copy a run that is still being written, as it stands: what its logs list by now. The source is
    first checked for what is missing or cut short, then every object's checksum on the way. Raises RunExists where the
    target holds another run or another state of this one, NotARun where it holds something else, BadSelection for a run
    that is being written, DamagedData for a damaged or missing object, and what opening the source raises.
    """
    stored = StoredRun(source, "all")
    refuse_damaged(stored)
    if not incomplete and is_live(stored):
        raise BadSelection(f"{source.url} is still being written: wait for its end, or copy with --allow-incomplete")
    _refuse_losses(source)
    stored, committed = _committed(source, stored)
    root, run_id = source.get(ROOT), str(stored.root.get("run_id", ""))
    items, left_out = _items(source, stored, committed)
    whole = _claim(target, run_id, root)
    there = {item.name: item for item in target.walk("")}
    if whole:
        _refuse_changes(source, target, items, there)
    else:
        wanted = {item.key.text for item in items} | {UNFINISHED}
        target.remove([name for name in there if name not in wanted and (parse_key(name) or is_partial(name))])
    job = _Job(source, target, there, whole, progress, len(items), sum(item.listed.size for item in items))
    # A worker's own zarr.json makes it visible: after all that it describes.
    for late in (False, True):
        job.run([item for item in items if _is_late(item.key) == late], threads)
    _refuse_moved(source, stored)
    if not whole and not target.create(ROOT, root) and target.get(ROOT) != root:
        raise _exists(target)
    with suppress(AccessRefused):  # a role that may only put; readers do not look at it
        target.remove([UNFINISHED])
    sent = 0 if whole else 1
    return Copied(run_id, job.sent + sent, job.sent_bytes + sent * len(root), job.present + 1 - sent, left_out)


def _is_late(key: Key) -> bool:
    return not key.index and not key.array


def _refuse_losses(source: Backend) -> None:
    """Raise DamagedData if something that the source should hold is not there: nothing would tell of it in the copy."""
    report = verify(source, quick=True)
    for first in report.damage[:1]:
        rest = "" if report.damage_count == 1 else f" It is the first of {report.damage_count:,} findings."
        raise DamagedData(
            f"{source.url} is damaged, and not copied: {first.object} {first.what}.{rest} `smdbg verify {source.url}` "
            "says what is lost by it"
        )


# --- what there is to copy ---


def _committed(source: Backend, stored: StoredRun) -> tuple[StoredRun, dict[str, bytes]]:
    """Return the run and the very bytes of its logs and workers' zarr.json that it was read from."""
    for _ in range(TRIES):
        found: dict[str, bytes] = {}
        if all(_settled(source, one, found) for one in stored.attempts):
            return stored, found
        stored.refresh()
        refuse_damaged(stored)
    raise StoreError(f"{source.url} changes faster than it can be read: copy it again later")


def _settled(source: Backend, one: Attempt, found: dict[str, bytes]) -> bool:
    """Read an attempt's log and zarr.json; False if they are no longer what was read before."""
    chunks = -(-len(one.log) // LOG_ROWS)
    names = [f"{one.base}/zarr.json", *(f"{one.base}/{log_spec().key(i * LOG_ROWS)}" for i in range(chunks))]
    data = source.ranges([Range(name) for name in names])
    for name, text in zip(names, data, strict=True):
        if text is None:
            return False
        found[name] = text
    times = np.frombuffer(b"".join(found[name][:-CRC] for name in names[1:]), "<i8").reshape(-1, len(LOG_COLUMNS))
    written = times[times[:, END_TIME] != 0, END_TIME]  # a moment each, so that they tell whether rows were added
    try:
        facts = json.loads(found[names[0]])["attributes"]["smdbg"]
    except (ValueError, KeyError, TypeError):
        return False
    same = {**facts, "crc32c": 0} == {**one.facts, "crc32c": 0}
    return same and np.array_equal(written, one.log[:, END_TIME])


def _items(source: Backend, stored: StoredRun, committed: Mapping[str, bytes]) -> tuple[list[_Item], int]:
    """Return what to copy, but for the root, and how many objects are not part of the run."""
    attempts = {(one.rank, one.attempt): one for one in stored.attempts}
    items, left_out = [], 0
    for listed in source.walk(""):
        key = parse_key(listed.name)
        if key is None or key.text in (ROOT, STOP) or not _belongs(key, attempts, committed):
            left_out += key is None and listed.name != UNFINISHED and not is_partial(listed.name)
            continue
        one = attempts[key.worker] if key.worker else None
        small = LARGEST_JSON if key.worker and _is_late(key) else LARGEST_ROOT
        most = largest(one.specs[key.array]) if one and key.index else small
        if listed.size > most:
            raise DamagedData(f"{source.url}/{key.text} has {listed.size} bytes, which no object of its kind has")
        items.append(_Item(key, listed, one, committed.get(key.text)))
    missing = set(committed).difference(item.key.text for item in items)
    if missing:
        raise StoreError(f"{source.url}: {min(missing)} went away while it was copied: copy it again")
    return sorted(items, key=lambda item: item.key.text), left_out


def _belongs(key: Key, attempts: Mapping[tuple[int, int], Attempt], committed: Mapping[str, bytes]) -> bool:
    """Tell whether a key is of metadata that the run knows, or of data that the log lists; of it, what was read."""
    if key.worker is None:
        return True
    one = attempts.get(key.worker)
    if one is None:
        return False
    if key.array == LOG:
        return not key.index or key.text in committed
    if not key.index:
        return key.array in ("", *one.bits) or key.array in one.specs
    return lists(one, key)


# --- the target ---


def _exists(target: Backend) -> RunExists:
    return RunExists(f"{target.url}: a run exists: copy to another URL")


def _claim(target: Backend, run_id: str, root: bytes) -> bool:
    """Make the target ours; True when it holds this run whole. Raises RunExists and NotARun."""
    refuse_links(target)
    note = read_note(target)
    if note is not None and note.get("doing") == "delete":
        raise RunExists(f"{target.url}: a run there is being deleted: `smdbg prune` ends that; or copy elsewhere")
    try:
        if target.get(ROOT) != root:
            raise _exists(target)
        return True
    except Missing:
        pass
    if note is None:
        if next(iter(target.walk("")), None) is not None:
            raise NotARun(
                f"{target.url}: there is something else: name a place for the copy itself, such as "
                f"{target.url.rstrip('/')}/{run_id}"
            )
        if target.create(UNFINISHED, note_text(run_id, "copy")):
            return False
        note = read_note(target) or {}
    if (note.get("run_id"), note.get("doing")) != (run_id, "copy"):
        raise RunExists(f"{target.url}: the unfinished copy of another run is there: copy to another URL")
    return False


def _refuse_changes(source: Backend, target: Backend, items: Iterable[_Item], there: Mapping[str, Listed]) -> None:
    """Raise RunExists if a whole run would not only get further attempts and checks, but be changed.

    Nobody who reads the target then sees anything but a whole run.
    """
    known = {key.worker for name in there if (key := parse_key(name)) is not None and _is_late(key)}
    for item in items:
        here = there.get(item.key.text)
        if here is None and item.key.worker is not None and item.key.worker in known:
            break
        if here is not None and not _same_already(item, here, source, target) and not _same(
            item, here, _fetch(source, item), target
        ):
            break
    else:
        return
    raise RunExists(
        f"{target.url}: another state of this run exists ({item.key.text} differs): copy to another URL, or delete it "
        "there first"
    )


def _refuse_moved(source: Backend, before: StoredRun) -> None:
    """Raise StoreError if what was copied is no longer what the source says: it was pruned meanwhile."""
    now = {(one.rank, one.attempt): one for one in StoredRun(source, "all").attempts}
    for one in before.attempts:
        later = now.get((one.rank, one.attempt))
        if later is None or not np.array_equal(later.log[: len(one.log)], one.log) or set(one.bits) - set(later.bits):
            raise StoreError(f"{source.url} was changed while it was copied ({one.base}): copy it again")


# --- objects ---


def _same_already(item: _Item, here: Listed, source: Backend, target: Backend) -> bool:
    """Tell, without reading the source, that the object at the target is the same one; False means: not known."""
    if here.size != item.listed.size or item.data is not None:
        return False
    if here.etag and item.listed.etag:
        return here.etag == item.listed.etag
    known = not here.etag and _MD5.match(item.listed.etag)
    return bool(known) and _md5(target.get(here.name)) == item.listed.etag


def _same(item: _Item, here: Listed, data: bytes, target: Backend) -> bool:
    """Tell whether the object at the target holds these bytes."""
    if here.size != len(data):
        return False
    return here.etag == _md5(data) or target.get(item.key.text) == data


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()  # what S3 gives as ETag of an object put at once


def _fetch(source: Backend, item: _Item) -> bytes:
    """Return an object, checked."""
    try:
        data = source.get(item.key.text) if item.data is None else item.data
    except Missing:
        raise StoreError(f"{source.url}: {item.key.text} went away while it was copied: copy it again") from None
    if not item.key.index and len(data) != item.listed.size:  # a link to somewhere else, perhaps: it stays at home
        raise StoreError(f"{source.url}: {item.key.text} is not what it was when it was listed: copy it again")
    check_object(source.url, item.key, data, item.one)
    return data


class _Job:
    """Sends objects, several at a time, their bytes in bounded memory."""

    def __init__(
        self,
        source: Backend,
        target: Backend,
        there: Mapping[str, Listed],
        whole: bool,
        progress: Progress | None,
        objects: int,
        size: int,
    ) -> None:
        self.sent = self.sent_bytes = self.present = 0
        self._source, self._target, self._there, self._whole = source, target, there, whole
        self._progress, self._totals = progress, (objects, size)
        self._done_bytes = 0
        self._counting = threading.Lock()

    def run(self, items: Iterable[_Item], threads: int) -> None:
        """Send what is not there yet. The first error ends it, when what is on its way has come to an end."""
        room = Room(IN_MEMORY, block=True)
        pool = ThreadPoolExecutor(threads)
        futures: list[Future[None]] = []
        try:
            for item in items:
                cost = min(IN_MEMORY, item.listed.size * (1 + self._target.copies))
                room.take(cost)
                if any(f.done() and f.exception() for f in futures[-threads * 4 :]):
                    break
                futures.append(pool.submit(self._one, item, room, cost))
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _one(self, item: _Item, room: Room, cost: int) -> None:
        try:
            size = self._send(item)
        finally:
            room.give(cost)
        with self._counting:
            self.sent += size is not None
            self.sent_bytes += size or 0
            self.present += size is None
            self._done_bytes += item.listed.size
            if self._progress:
                self._progress(self.sent + self.present, self._totals[0], self._done_bytes, self._totals[1])

    def _send(self, item: _Item) -> int | None:
        """Put an object unless the same is there; return its bytes, None if it was."""
        here = self._there.get(item.key.text)
        if here is not None and (self._whole or _same_already(item, here, self._source, self._target)):
            return None  # of a whole run all that is there was compared before
        data = _fetch(self._source, item)
        if here is not None and _same(item, here, data, self._target):
            return None
        self._target.put(item.key.text, data)
        return len(data)
