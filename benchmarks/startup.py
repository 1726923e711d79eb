"""How long the command line takes to start: `smdbg --help`, the whole process, against importing click alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from setting import Setting
from timing import Action, Line, compare, interleaved, timed

ROUNDS = 15


def measure(setting: Setting) -> list[Line]:
    """Return one line."""
    program = Path(sys.executable).parent / "smdbg"
    costs = interleaved(
        setting.rounds(ROUNDS),
        {
            "help": _process([str(program), "--help"]),
            "click": _process([sys.executable, "-c", "import click"]),
            "python": _process([sys.executable, "-c", ""]),
        },
    )
    name = "`smdbg --help`, against `python -c 'import click'`"
    note = "of both, Python itself takes " + compare("", costs["python"], costs["click"]).ours
    note += "; `import smdbg` imports neither numpy, zarr nor s3fs (tests hold that)"
    return [compare(name, costs["help"], costs["click"], 3.0, note=note)]


def _process(command: Sequence[str]) -> Action:
    return timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
