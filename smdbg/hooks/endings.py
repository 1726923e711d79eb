"""How a process ends, and what a hook does then: at a normal exit, after an uncaught exception, on SIGTERM."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Endings:
    """Calls `finish(status)` once, however the process ends (SIGKILL apart), and restores what it hooked into."""

    def __init__(self, finish: Callable[[str], None]) -> None:
        """Hook into exit, sys.excepthook and, where nobody else has, SIGTERM."""
        self._finish: Callable[[str], None] | None = finish
        self._pid = os.getpid()
        self._reason = ""
        self._excepthook = sys.excepthook
        self._own_excepthook = self._note_exception  # bound once, so that `is` can recognise it
        sys.excepthook = self._own_excepthook
        self._old_sigterm: Any = None
        self._own_sigterm = self._on_sigterm
        if threading.current_thread() is threading.main_thread():
            self._old_sigterm = signal.getsignal(signal.SIGTERM)
            if self._old_sigterm is not None:  # None: a handler that was not set from Python, and must stay
                signal.signal(signal.SIGTERM, self._own_sigterm)
        # Before the interpreter stops executors, which the event loop of a remote store uses to look up names; plain
        # atexit runs after that.
        register = getattr(threading, "_register_atexit", atexit.register)
        try:
            register(self._at_exit)
        except RuntimeError:  # the interpreter is shutting down already
            atexit.register(self._at_exit)

    def release(self) -> None:
        """Stop watching."""
        self._finish = None
        if sys.excepthook is self._own_excepthook:
            sys.excepthook = self._excepthook
        if threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGTERM) is self._own_sigterm and self._old_sigterm is not None:
                signal.signal(signal.SIGTERM, self._old_sigterm)

    def _note_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        self._reason = describe(error)
        self._excepthook(kind, error, trace)

    def _at_exit(self) -> None:
        if self._finish is not None and os.getpid() == self._pid:
            self._finish(f"failed: {self._reason}" if self._reason else "completed")

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        finish, old = self._finish, self._old_sigterm
        ours = os.getpid() == self._pid
        if callable(old):
            # The training has a plan of its own for SIGTERM, which may be to go on. If the process then ends without
            # closing the hook, this was why.
            self._reason = self._reason or "SIGTERM"
            old(signum, frame)
            return
        if finish is not None and ours:
            finish("failed: SIGTERM")
        if old != signal.SIG_IGN:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)


def describe(error: BaseException) -> str:
    """Return an exception as one short line: its type and the first line of its text."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # an error that cannot even say what it is
        lines = []
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
