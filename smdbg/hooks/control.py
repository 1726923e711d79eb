"""The way back to the training: somebody puts `control/stop.json` into the run, and the training may ask for it."""

from __future__ import annotations

import json
import threading

from smdbg.errors import SmdbgError
from smdbg.store.backend import Backend, Missing
from smdbg.store.keys import LARGEST_NOTE, read_bounded

STOP_KEY = "control/stop.json"
POLL_SECONDS = 2.0


class StopWatch:
    """Looks for the stop object every two seconds, in a daemon thread, from its creation until `end`."""

    def __init__(self, backend: Backend) -> None:
        """Start looking."""
        self.asked = False
        self.reason = ""
        self._backend = backend
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="smdbg-stop", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop looking."""
        self._end.set()

    def _watch(self) -> None:
        while not self.asked:
            try:
                self._look()
            except Missing:
                pass
            except (SmdbgError, ValueError, KeyError, TypeError, RecursionError):
                pass  # the store is away, or somebody put nonsense: neither stops a training
            if self._end.wait(POLL_SECONDS):
                return

    def _look(self) -> None:
        wish = json.loads(read_bounded(self._backend, STOP_KEY, LARGEST_NOTE))
        run = json.loads(self._backend.get("zarr.json"))
        if isinstance(wish, dict) and wish.get("run_id") == run["attributes"]["smdbg"]["run_id"]:
            self.reason = str(wish.get("reason", ""))
            self.asked = True
