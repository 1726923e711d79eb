"""The wall between the hook and the training: whatever goes wrong on our side stays on our side."""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Guarded(Protocol):
    """What `quiet` needs of an object."""

    _guard_lock: threading.RLock
    _guard_depth: int

    def _active(self) -> bool:
        """Tell whether hook code is to run at all."""

    def _account(self, nanoseconds: int) -> None:
        """Take note of time that the training spent in hook code."""

    def _switch_off(self, error: BaseException) -> None:
        """Stop for good after an error."""


H = TypeVar("H", bound=Guarded)


def quiet(otherwise: R) -> Callable[[Callable[Concatenate[H, P], R]], Callable[Concatenate[H, P], R]]:
    """Make a method return `otherwise` when the hook is inactive or the method fails; a failure switches it off."""

    def decorate(method: Callable[Concatenate[H, P], R]) -> Callable[Concatenate[H, P], R]:
        @functools.wraps(method)
        def wrapper(self: H, /, *args: P.args, **kwargs: P.kwargs) -> R:
            if not self._active():
                return otherwise
            start = time.perf_counter_ns()
            with self._guard_lock:
                self._guard_depth += 1
                try:
                    return method(self, *args, **kwargs)
                except Exception as error:
                    self._switch_off(error)
                    return otherwise
                finally:
                    self._guard_depth -= 1
                    if self._guard_depth == 0:
                        self._account(time.perf_counter_ns() - start)

        return wrapper

    return decorate


class Guard:
    """Base class that holds what `quiet` needs."""

    def __init__(self) -> None:
        """Remember the process: a fork (a data loader's worker) must not write to its parent's run."""
        self._guard_lock = threading.RLock()
        self._guard_depth = 0
        self._off = False
        self._closed = False
        self._forked = False
        # Told at the fork, rather than asked for at each call: asking costs more than all else that a call does.
        os.register_at_fork(after_in_child=functools.partial(_note_fork, weakref.ref(self)))

    def _active(self) -> bool:
        return not (self._off or self._closed or self._forked)


def _note_fork(ref: weakref.ref[Guard]) -> None:
    guard = ref()
    if guard is not None:
        guard._forked = True
