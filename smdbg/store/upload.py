"""Parallel puts with patience: a few threads, retries with back-off, and a count of what is on its way."""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable

from smdbg.errors import StoreError
from smdbg.store.backend import Backend, Data, Missing
from smdbg.store.remote_errors import Unanswered

log = logging.getLogger("smdbg")

FIRST_PAUSE = 0.1  # seconds, doubled after each failure
LONGEST_PAUSE = 2.0  # four threads then ask twice a second: little for a store, and soon enough when it is back
# A put that was not answered in time may still be executed by an overloaded store, after its repetition, and would then
# undo a later put of the same object. So that object is not changed for as long after its fate became known.
SETTLE = 10.0
LOUD_AFTER = 5.0  # seconds without success before a warning is logged


class Uploader:
    """Puts objects from `threads` daemon threads, each until it succeeds or `give_up` is set.

    Own threads rather than an executor: an interpreter that is shutting down refuses new work to executors, and the
    last flush happens just then.
    """

    def __init__(self, backend: Backend, threads: int = 4) -> None:
        """Start the threads."""
        self._backend = backend
        self._jobs: queue.SimpleQueue[tuple[str, Data, Callable[[], None] | None] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._open = 0
        self._successes = 0
        self._settled: dict[str, float] = {}  # key -> when it may be put again
        self._random = random.Random()  # the training's own is left alone
        self._failing_since: float | None = None
        self._loud = False
        self.give_up = threading.Event()
        self.lost = 0
        names = [f"smdbg-put-{i}" for i in range(threads)]
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def put(self, key: str, data: Data, done: Callable[[], None] | None = None) -> None:
        """Queue an object; `done` is called from an upload thread once the store has it."""
        with self._changed:
            self._open += 1
        self._jobs.put((key, data, done))

    def wait(self) -> bool:
        """Wait until nothing is on its way. True if everything queued so far is stored."""
        with self._changed:
            self._changed.wait_for(lambda: self._open == 0)
            return self.lost == 0

    def abandon(self) -> None:
        """Give up what is not stored yet."""
        with self._changed:
            self.give_up.set()
            self._changed.notify_all()

    def stop(self) -> None:
        """End the threads once the queue is empty."""
        for _ in self._threads:
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            key, data, done = job
            stored = self._persist(key, data)
            if stored and done is not None:
                done()
            del data, job, done  # not kept alive while waiting for the next
            with self._changed:
                self._open -= 1
                self.lost += not stored
                self._changed.notify_all()

    def _persist(self, key: str, data: Data) -> bool:
        pause = FIRST_PAUSE
        unsure = False
        if self.give_up.wait(max(0.0, self._settled.pop(key, 0.0) - time.monotonic())):
            return False
        while True:
            begun, successes = time.monotonic(), self._successes
            try:
                self._backend.put(key, data)
            except (StoreError, Missing) as error:  # missing: a folder above it went away, say
                self._failed(error, begun)
                unsure = unsure or isinstance(error, Unanswered)
                if self._pause(pause, successes):
                    return False
                pause = min(2 * pause, LONGEST_PAUSE)
            except Exception:
                log.exception("smdbg: cannot store %s", key)
                return False
            else:
                if unsure:
                    self._settled[key] = time.monotonic() + SETTLE
                self._worked()
                return True

    def _pause(self, seconds: float, successes: int) -> bool:
        """Wait before another try, but no longer than until a put of another thread succeeds. True to give up."""
        # Not all at the same moment, nor at the same moment as all other workers of the training.
        seconds *= self._random.uniform(0.5, 1.0)
        with self._changed:
            self._changed.wait_for(lambda: self.give_up.is_set() or self._successes != successes, seconds)
            soon = self._successes != successes
        # If it is this one object that is refused while others get through, the others must not drive us to haste.
        return self.give_up.wait(FIRST_PAUSE if soon else 0.0)

    def _failed(self, error: Exception, begun: float) -> None:
        with self._changed:
            now = time.monotonic()
            self._failing_since = begun if self._failing_since is None else self._failing_since
            loud = not self._loud and now - self._failing_since >= LOUD_AFTER
            self._loud = self._loud or loud
        if loud:
            log.warning("smdbg: the store does not take data, retrying: %s", error)

    def _worked(self) -> None:
        with self._changed:
            was_loud, self._loud, self._failing_since = self._loud, False, None
            self._successes += 1
            self._changed.notify_all()
        if was_loud:
            log.warning("smdbg: the store takes data again")
