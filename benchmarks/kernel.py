"""How fast statistics are computed, against copying the same array."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import numpy as np
from setting import Setting
from timing import Cost, Line, interleaved, timed

from smdbg import stats

ROUNDS = 9
SIZE = 16 << 20  # elements: 64 MiB of float32
SMALL = 256 * 256


def measure(setting: Setting) -> list[Line]:
    """Return a line for each set of statistics, of one large array and of many small ones."""
    array = np.random.default_rng(0).standard_normal(SMALL if setting.quick else SIZE, np.float32)
    target = np.empty_like(array)
    small = array.reshape(-1, SMALL)

    def pieces(names: tuple[str, ...]) -> Callable[[], object]:
        return lambda: [stats.compute(part, names) for part in small]

    costs = interleaved(
        setting.rounds(ROUNDS),
        {
            "copy": timed(lambda: np.copyto(target, array)),
            "ALWAYS": timed(lambda: stats.compute(array, stats.ALWAYS)),
            "DEFAULT": timed(lambda: stats.compute(array, stats.DEFAULT)),
            "small": timed(pieces(stats.DEFAULT)),
        },
    )
    what = f"{array.nbytes >> 20} MiB of float32"
    names = {
        "ALWAYS": f"the {len(stats.ALWAYS)} that are always kept, of {what}",
        "DEFAULT": f"the {len(stats.DEFAULT)} of the default, of {what}",
        "small": f"the {len(stats.DEFAULT)} of the default, of the same in tensors of {SMALL * 4 >> 10} KiB",
    }
    return [_line(name, array.nbytes, costs[key], costs["copy"]) for key, name in names.items()]


def _line(name: str, nbytes: int, ours: list[Cost], base: list[Cost]) -> Line:
    """Return a line whose ratio says how many times the copy's time it takes."""
    speeds = [f"{nbytes / median(cost.seconds for cost in costs) / 1e9:.1f} GB/s" for costs in (ours, base)]
    return Line(name, speeds[0], speeds[1], [a.seconds / b.seconds for a, b in zip(ours, base, strict=True)])
