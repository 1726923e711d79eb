"""The bound on what waits to be written: bytes taken by the training thread, given back by the writer."""

from __future__ import annotations

import threading
import time

ROOM_SECONDS = 10.0  # how long the training thread waits for room before policy `drop` drops


class Room:
    """Bytes that may be on their way, shared by the training thread (takes) and the writer (gives back)."""

    def __init__(self, bound: int, block: bool) -> None:
        """Start empty. `block`: wait as long as it takes, instead of dropping."""
        self.bound = bound
        self.peak = 0
        self._block = block
        self._used = 0
        self._gave_up = False
        self._closed = False
        self._last: float | None = None  # when the last wait ends
        self._changed = threading.Condition()

    def take(self, size: int, held: int = 0) -> bool:
        """Reserve `size` bytes; `held` are already reserved by the step that is still open, which cannot drain.

        Waits for room while the store keeps up. Under policy drop it gives up after ten seconds, and then at once
        until the writer has given something back, so that a store that is away costs the training ten seconds once.
        """
        with self._changed:
            if size + held > self.bound or self._closed:
                return False
            fits = self._used + size <= self.bound
            if not fits and not self._gave_up:
                fits = self._wait_for(size)
                self._gave_up = not fits
            if fits:
                self._used += size
                self.peak = max(self.peak, self._used)
            return fits

    def _wait_for(self, size: int) -> bool:
        until = None if self._block else time.monotonic() + ROOM_SECONDS
        while self._used + size > self.bound:
            ends = [end for end in (until, self._last) if end is not None]
            left = min(ends) - time.monotonic() if ends else None
            if self._closed or (left is not None and left <= 0):
                return False
            self._changed.wait(left)
        return not self._closed

    def end_by(self, seconds: float) -> None:
        """Let nobody wait for longer than `seconds` from now on, under any policy: the training is ending."""
        with self._changed:
            self._last = time.monotonic() + seconds
            self._changed.notify_all()

    def take_now(self, size: int) -> bool:
        """Reserve `size` bytes if they are free this moment."""
        with self._changed:
            fits = not self._closed and self._used + size <= self.bound
            if fits:
                self._used += size
                self.peak = max(self.peak, self._used)
            return fits

    def give(self, size: int, stored: bool = True) -> None:
        """Return bytes; `stored` is False where they were not used after all.

        A negative size takes more, without asking: the writer pads rows, and only it can go on.
        """
        with self._changed:
            self._used -= size
            self.peak = max(self.peak, self._used)
            self._gave_up = self._gave_up and not stored
            self._changed.notify_all()

    def close(self) -> None:
        """Let nobody wait any more: nothing will be given back."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
