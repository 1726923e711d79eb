"""Work in a process of its own, whose time and memory are its alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def environment() -> dict[str, str]:
    """Return the environment in which another Python finds the modules that this one finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}


def command(call: str, *words: object) -> list[str]:
    """Return the command that calls `module.function` with words, as texts."""
    module, function = call.rsplit(".", 1)
    program = f"import sys, {module}; {module}.{function}(*sys.argv[1:])"
    return [sys.executable, "-c", program, *map(str, words)]


def run(call: str, *words: object) -> Any:
    """Run `module.function` in a process of its own, and return what it printed as JSON."""
    done = subprocess.run(command(call, *words), check=True, stdout=subprocess.PIPE, text=True, env=environment())
    return json.loads(done.stdout)


def resident(field: str) -> int | None:
    """Return VmRSS (now) or VmHWM (at most so far) of this process in bytes; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


class Watch:
    """What this process took since the watch was made."""

    def __init__(self) -> None:
        """Start."""
        self._before = resident("VmRSS")
        self._start, self._used = time.perf_counter(), time.process_time()

    def found(self) -> dict[str, Any]:
        """Return seconds, processor seconds, and memory in bytes (None where unknown): before, and at most."""
        return {
            "seconds": time.perf_counter() - self._start,
            "processor": time.process_time() - self._used,
            "before": self._before,
            "peak": resident("VmHWM"),
        }
