"""The background writer of one worker: takes steps from the training thread, commits them in order.

The training thread reserves room, hands over a `StepRecord` and goes on. The writer thread lays the rows out and puts
wide shards at once; at most once a second, when a shard is full, and at the end it puts the buffered shards and then
the commit log. Only what the log lists exists, so whatever happens in between, readers see whole steps.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from smdbg.errors import AccessRefused, CredentialsExpired, SmdbgError, StoreError
from smdbg.store.backend import Backend, Missing
from smdbg.store.collection import Collection
from smdbg.store.format import (
    CAPACITY_ROWS,
    FLAG_DROPPED,
    LOG_COLUMNS,
    LOG_ENDED,
    LOG_ROWS,
    LOG_RUNNING,
    MAX_COLLECTIONS,
    ArraySpec,
    array_json,
    entry_to_json,
    group_json,
    log_spec,
    step_spec,
    worker_key,
)
from smdbg.store.item import Group
from smdbg.store.pool import ShardPool
from smdbg.store.room import Room
from smdbg.store.rows import RowBuffer, row_memory
from smdbg.store.shard import with_crc
from smdbg.store.upload import Uploader
from smdbg.store.worker_group import WorkerFacts, sealed_group, with_checksum, worker_attributes

log = logging.getLogger("smdbg")

FLUSH_SECONDS = 1.0
HEARTBEAT_SECONDS = 30.0


@dataclass(frozen=True)
class StepRecord:
    """A closed step. `mode` is an index into MODES; times are unix ns and ns; `reserved` bytes of room."""

    step: int
    mode: int
    mode_step: int
    end_time: int
    duration: int
    hook_time: int
    groups: tuple[Group, ...] = ()
    flags: int = 0
    dropped_rows: int = 0
    reserved: int = 0


@dataclass(frozen=True)
class _End:
    status: str


class Writer:
    """Writes one attempt of one worker. Create it after `begin` has made the worker group."""

    def __init__(
        self,
        backend: Backend,
        facts: WorkerFacts,
        *,
        buffer_bytes: int = 512 << 20,
        block: bool = False,
        upload_threads: int = 4,
    ) -> None:
        """Start the writer thread and the upload threads."""
        self.room = Room(buffer_bytes, block)
        self._pool = ShardPool(buffer_bytes // 4)
        self.failure: str = ""
        self.dropped_steps = 0
        self.dropped_rows = 0
        self._skipped = (0, 0)  # steps and rows that were not even handed over; only the training thread sets it
        self.left_out: dict[str, int] = {}  # collection -> rows whose full values the budget did not admit
        self._backend = backend
        self._facts = facts
        self._base = worker_key(facts.rank, facts.attempt)
        self._uploader = Uploader(backend, upload_threads)
        self._queue: queue.SimpleQueue[StepRecord | _End | threading.Event] = queue.SimpleQueue()
        self._collections: dict[str, Collection] = {}
        self._coordinates: dict[str, list[int]] = {}
        self._log = np.zeros((LOG_ROWS, len(LOG_COLUMNS)), np.int64)
        self._rows = 0  # logged so far
        self._committed = 0  # of these, what the store has
        self._urgent = False  # rows wait that readers want
        self._waiting = False  # rows wait that nobody is in a hurry for
        self._told_rows: dict[str, int] = {}  # what the store's metadata says now
        self._told_state: Any = None
        self._told_group: dict[str, Any] = {}
        self._version = 0
        self._described: Any = None
        self._last_flush = -FLUSH_SECONDS
        self._last_commit = time.monotonic()
        self._last_look = time.monotonic()
        self._may_look = True
        self._status = "running"
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._main, name="smdbg-writer", daemon=True)
        self._thread.start()

    # --- training thread ---

    def submit(self, record: StepRecord) -> None:
        """Hand over a closed step."""
        self._queue.put(record)

    def skip(self, reserved: int, rows: int) -> None:
        """Count a closed step that is not handed over, since there is no room even for its record."""
        self.room.give(reserved, stored=False)
        self._skipped = (self._skipped[0] + 1, self._skipped[1] + rows)

    def cost(self, nbytes: int, raw: bool) -> int:
        """Return the room that a value takes: its copy, and if kept its shard and what the client copies of that."""
        return nbytes * (2 + self._backend.copies) if raw else nbytes

    def place(self, collection: str, name: str, dtype: str, size: int) -> tuple[int, int, ArraySpec] | None:
        """Return (slot, offset, array) of a tensor that has a place in rows wide enough for a buffer of their own."""
        found = self._collections.get(collection)
        return None if found is None else found.wide_slot(name, dtype, size)

    def row_cost(self, spec: ArraySpec) -> int:
        """Return the room that a row's buffer takes, with what the client copies of it."""
        return row_memory(spec) * (1 + self._backend.copies)

    def row_buffer(self, spec: ArraySpec) -> RowBuffer:
        """Return memory for a row of a wide array, to be filled by the training thread."""
        return RowBuffer(spec, self._pool)

    def flush(self, timeout: float | None = None) -> bool:
        """Commit everything handed over so far; True once that is done."""
        done = threading.Event()
        self._queue.put(done)
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while not done.wait(min(0.1, max(0.0, end - time.monotonic()))):
            if self.ended.is_set() or time.monotonic() >= end:
                return done.is_set()
        return True

    def close(self, status: str, timeout: float = 60.0) -> bool:
        """Commit what is left, leave `status` in the worker group and end. False if the store did not take it."""
        self._queue.put(_End(status))
        if not self.ended.wait(timeout):
            log.warning("smdbg: the store does not answer; what was not yet committed is given up")
            self._uploader.abandon()
            self.ended.wait(5.0)
        return self.ended.is_set() and self._uploader.lost == 0

    def end_soon(self, status: str) -> None:
        """Ask for the end without waiting for it."""
        self._queue.put(_End(status))

    # --- writer thread ---

    def _main(self) -> None:
        try:
            self._loop()
        except BaseException as error:  # the training must not notice; the run's status says it
            if not self._uploader.give_up.is_set():
                log.exception("smdbg: the writer failed; this hook saves nothing more")
            self.failure = f"{type(error).__name__}: {error}"
            self._end_after_failure()
        finally:
            self.room.close()
            self._uploader.stop()
            self.ended.set()

    def _end_after_failure(self) -> None:
        """Leave the reason in the run, and the steps before the failure if the store still takes them."""
        if self._uploader.give_up.is_set():
            return
        status = f"failed: hook switched off: {self.failure}"
        try:
            self._finish(status)
        except BaseException:
            try:  # what was last told of this worker still holds, but for its status
                facts = {**self._told_group["attributes"]["smdbg"], "status": status}
                group = {**self._told_group, "attributes": {"smdbg": with_checksum(facts)}}
                self._backend.put(f"{self._base}/zarr.json", _json(group))
                self._put_ended_log()
            except BaseException:
                log.exception("smdbg: the last state of this worker could not be written")

    def _loop(self) -> None:
        self._put_metadata()
        self._await_stored()  # puts run in parallel: the same key must not be on its way twice
        while True:
            try:
                message = self._queue.get(timeout=self._pause())
            except queue.Empty:
                message = None
            if isinstance(message, StepRecord):
                self._take(message)
                message = None  # its values are not kept alive while waiting for the next
            elif isinstance(message, threading.Event):
                self._flush()
                message.set()
            elif isinstance(message, _End):
                self._finish(message.status)
                return
            now = time.monotonic()
            if self._urgent and now - self._last_flush >= FLUSH_SECONDS:
                self._flush()
            if now - self._last_commit >= HEARTBEAT_SECONDS:
                self._heartbeat()
            if now - self._last_look >= HEARTBEAT_SECONDS and self._superseded():
                log.warning("smdbg: a later attempt of worker %d has begun; this one stops writing", self._facts.rank)
                self.failure = "superseded by a later attempt"
                return

    def _pause(self) -> float:
        now = time.monotonic()
        due = self._last_commit + HEARTBEAT_SECONDS
        if self._urgent:
            due = min(due, self._last_flush + FLUSH_SECONDS)
        return max(0.001, due - now)

    def _take(self, record: StepRecord) -> None:
        saved = raw = on_the_wire = 0

        def put(key: str, data: bytes | bytearray, done: Callable[[], None] | None = None) -> None:
            nonlocal on_the_wire
            size = len(data) * (1 + self._backend.copies)
            on_the_wire += size
            if on_the_wire > record.reserved:  # rows are padded to whole shards: no more than one beyond the room
                self._await_stored()
            self._uploader.put(f"{self._base}/{key}", data, partial(self._stored, size, done))

        for group in record.groups:
            collection = self._collection(group)
            collection.write_row(group, put)
            self._coordinates[group.name].append(record.step)
            saved |= 1 << collection.bit
            raw |= (1 << collection.bit) if group.raw else 0
        self.room.give(record.reserved - on_the_wire)
        self._count_dropped(record)
        flags = record.flags | (FLAG_DROPPED if record.dropped_rows else 0)
        if self._rows % LOG_ROWS == 0:
            self._log[:] = 0  # a new chunk; the one before was put when it was full, and again at heartbeats
        self._log[self._rows % LOG_ROWS] = (
            record.step,
            record.mode,
            record.mode_step,
            max(1, record.end_time),
            record.duration,
            record.hook_time,
            saved,
            raw,
            flags,
            self._catalogue_version(),
        )
        self._rows += 1
        self._waiting = True
        self._urgent = self._urgent or bool(saved or flags)
        if self._rows % LOG_ROWS == 0 or self._a_shard_is_full(record):
            self._flush()

    def _stored(self, size: int, done: Callable[[], None] | None) -> None:
        if done is not None:
            done()
        self.room.give(size)

    def _collection(self, group: Group) -> Collection:
        name = group.name
        found = self._collections.get(name)
        if found is None:
            if len(self._collections) == MAX_COLLECTIONS:
                raise ValueError(f"{name!r} would be collection {MAX_COLLECTIONS + 1}; a run holds {MAX_COLLECTIONS}")
            self._coordinates[name] = []
            found = Collection(name, len(self._collections), self._pool, group.compression)
            self._collections[name] = found
        return found

    def _count_dropped(self, record: StepRecord) -> None:
        if record.dropped_rows:
            self.dropped_rows += record.dropped_rows
            self.dropped_steps += 1

    def _a_shard_is_full(self, record: StepRecord) -> bool:
        touched = [self._collections[group.name] for group in record.groups]
        return any(held.full_after(c.rows - 1) for c in touched for held in c.places.narrow())

    def _catalogue_version(self) -> int:
        """Return the number of the catalogue that describes everything taken so far."""
        state = [(name, c.places.version) for name, c in self._collections.items()]
        if state != self._described:
            self._described = state
            self._version += 1
        return self._version

    def _flush(self) -> None:
        """Put buffered shards and changed metadata, wait for them, then put the log."""
        self._last_flush = time.monotonic()
        if not self._waiting:
            return
        for collection in self._collections.values():
            for held in collection.places.narrow():
                held.flush(self._put, collection.rows)
            self._put_coordinate(collection, only_full=True)
        self._put_metadata()
        self._await_stored()
        self._put_log()
        self._await_stored()
        self._urgent = self._waiting = False
        self._committed = self._rows
        self._last_commit = time.monotonic()

    def _await_stored(self) -> None:
        """Wait for all puts. Raises StoreError when one was given up: then nothing after it may be committed."""
        if not self._uploader.wait():
            raise StoreError("the store did not take an object; later steps cannot be committed")

    def _put(self, key: str, data: bytes | bytearray, done: Callable[[], None] | None = None) -> None:
        self._uploader.put(f"{self._base}/{key}", data, done)

    def _put_log(self) -> None:
        chunk = max(0, self._rows - 1) // LOG_ROWS
        at = self._rows - chunk * LOG_ROWS
        if at < LOG_ROWS:  # behind the last row: so the object changes when the worker ends, and readers notice
            self._log[at, 0] = LOG_RUNNING if self._status == "running" else LOG_ENDED
        self._put(log_spec().key(chunk * LOG_ROWS), with_crc(self._log.tobytes()))

    def _put_coordinate(self, collection: Collection, only_full: bool) -> None:
        steps = self._coordinates[collection.name]
        spec = step_spec(collection.name)
        size = spec.shard[0]
        if not steps or (only_full and len(steps) < size):
            return
        chunk = np.zeros(size, np.int64)
        chunk[: len(steps)] = steps[:size]
        self._put(spec.key(collection.rows - len(steps)), with_crc(chunk.tobytes()))
        del steps[:size]

    def _heartbeat(self) -> None:
        if self._waiting:
            self._flush()
        else:
            self._put_log_again()
        self._last_commit = time.monotonic()

    def _put_log_again(self) -> None:
        self._put_log()
        self._await_stored()

    def _put_ended_log(self) -> None:
        """Put the log with the mark of the end, and no row that is not committed: its data may not be there."""
        first = max(0, self._rows - 1) // LOG_ROWS * LOG_ROWS  # of the chunk that is held
        kept = self._committed - first
        if 0 <= kept < LOG_ROWS:  # a full chunk is in the store as it is, and has no mark
            self._log[kept:] = 0
            self._log[kept, 0] = LOG_ENDED
            self._backend.put(f"{self._base}/{log_spec().key(first)}", with_crc(self._log.tobytes()))

    def _superseded(self) -> bool:
        self._last_look = time.monotonic()
        if not self._may_look:
            return False
        try:
            self._backend.get(worker_key(self._facts.rank, self._facts.attempt + 1) + "/zarr.json")
        except Missing:
            return False
        except CredentialsExpired:
            return False
        except AccessRefused:
            self._may_look = False  # a role that may only put; then nobody can tell us
            return False
        except SmdbgError:
            return False  # away for the moment
        return True

    # --- metadata ---

    def _arrays(self, trimmed: bool) -> list[tuple[ArraySpec, int]]:
        """Return every array with its rows: its capacity, or at the end the rows there are."""
        out = [(log_spec(), self._rows)]
        for name, collection in self._collections.items():
            for spec in (*collection.places.specs(), step_spec(name)):
                out.append((spec, collection.rows))
        if not trimmed:
            out = [(spec, max(1, -(-rows // CAPACITY_ROWS)) * CAPACITY_ROWS) for spec, rows in out]
        return out

    def _put_metadata(self, trimmed: bool = False) -> None:
        """Put the zarr.json of groups and arrays that are new or changed size, and the worker's if anything changed."""
        children: dict[str, Any] = {name: group_json({}) for name in self._collections}
        rows_of = dict.fromkeys(self._collections, 0)
        for spec, rows in self._arrays(trimmed):
            children[spec.path] = array_json(spec, rows)
            rows_of[spec.path] = rows
        for path, rows in rows_of.items():
            if self._told_rows.get(path) != rows:
                self._put(f"{path}/zarr.json", _json(children[path]))
        state = (self._catalogue_version(), self._drops(), self._status, dict(self.left_out))
        if rows_of != self._told_rows or state != self._told_state:
            group = sealed_group(self._describe(), children)
            self._put("zarr.json", _json(group))
            self._told_group = group
        self._told_rows, self._told_state = rows_of, state

    def _drops(self) -> tuple[int, int]:
        steps, rows = self._skipped
        return self.dropped_steps + steps, self.dropped_rows + rows

    def _describe(self) -> dict[str, Any]:
        return worker_attributes(
            self._facts,
            self._status,
            self._version,
            self._drops(),
            {n: {"bit": c.bit, "raw_left_out": self.left_out.get(n, 0)} for n, c in self._collections.items()},
            [entry_to_json(e) for c in self._collections.values() for e in c.places.entries.values()],
        )

    def _finish(self, status: str) -> None:
        """Commit what waits, trim the arrays to what they hold, leave the final status."""
        self._flush()
        self._status = status
        for collection in self._collections.values():
            self._put_coordinate(collection, only_full=False)
            collection.end()
        self._put_metadata(trimmed=True)
        self._await_stored()
        self._put_log_again()


def _json(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":"), allow_nan=False).encode()

