"""Parallel puts with patience: a few threads, retries with back-off, and a count of what is on its way."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from smdbg.errors import StoreError
from smdbg.store.backend import Backend, Data

log = logging.getLogger("smdbg")

FIRST_PAUSE = 0.1  # seconds, doubled after each failure
LONGEST_PAUSE = 10.0
LOUD_AFTER = 5.0  # seconds of failing before a warning is logged


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

    def away(self) -> float:
        """Return for how many seconds puts have been failing, 0.0 while they succeed."""
        since = self._failing_since
        return 0.0 if since is None else time.monotonic() - since

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
        while True:
            try:
                self._backend.put(key, data)
            except StoreError as error:
                self._failed(error)
                if self.give_up.wait(pause):
                    return False
                pause = min(2 * pause, LONGEST_PAUSE)
            except Exception:
                log.exception("smdbg: cannot store %s", key)
                return False
            else:
                self._worked()
                return True

    def _failed(self, error: StoreError) -> None:
        with self._changed:
            now = time.monotonic()
            self._failing_since = now if self._failing_since is None else self._failing_since
            loud = not self._loud and now - self._failing_since >= LOUD_AFTER
            self._loud = self._loud or loud
        if loud:
            log.warning("smdbg: the store does not take data, retrying: %s", error)

    def _worked(self) -> None:
        with self._changed:
            was_loud, self._loud, self._failing_since = self._loud, False, None
        if was_loud:
            log.warning("smdbg: the store takes data again")
