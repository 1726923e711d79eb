"""How fast statistics are computed, against copying the same array."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import numpy as np
import numpy.typing as npt
from setting import Setting
from timing import Cost, Line, compare, interleaved, timed

from smdbg import stats

ROUNDS = 9
SIZE = 16 << 20  # elements: 64 MiB of float32
SMALL = 256 * 256
STEP = 50  # tensors of 256 KiB: 13 MB
TINY, MANY = 64, 10_000  # elements of a tensor, and tensors


def measure(setting: Setting) -> list[Line]:
    """Return a line for each set of statistics, of one large array, of many small ones and of very many tiny ones."""
    array = np.random.default_rng(0).standard_normal(SMALL if setting.quick else SIZE, np.float32)
    target = np.empty_like(array)
    targets = list(target.reshape(-1, 256, 256))
    small = list(array.reshape(-1, 256, 256))
    step = small[:STEP]
    tiny = list(array.reshape(-1, TINY)[:MANY])

    def many(arrays: list[npt.NDArray[np.float32]]) -> Callable[[], object]:
        return lambda: stats.compute_many(arrays, stats.DEFAULT)

    costs = interleaved(
        setting.rounds(ROUNDS),
        {
            "copy": timed(lambda: np.copyto(target, array)),
            "ALWAYS": timed(lambda: stats.compute(array, stats.ALWAYS)),
            "DEFAULT": timed(lambda: stats.compute(array, stats.DEFAULT)),
            "small": timed(many(small)),
            "step": timed(many(step)),
            "copy of step": timed(lambda: [np.copyto(b, a) for a, b in zip(step, targets, strict=False)]),
            "tiny": timed(many(tiny)),
            "copy of tiny": timed(lambda: [part.copy() for part in tiny]),
        },
    )
    what = f"{array.nbytes >> 20} MiB of float32"
    names = {
        "ALWAYS": f"the {len(stats.ALWAYS)} that are always kept, of {what}",
        "DEFAULT": f"the {len(stats.DEFAULT)} of the default, of {what}",
        "small": f"the {len(stats.DEFAULT)} of the default, of the same in tensors of {SMALL * 4 >> 10} KiB",
    }
    total = sum(part.nbytes for part in step)
    in_step = f"the {len(stats.DEFAULT)} of the default, of {total / 1e6:.0f} MB in tensors of {SMALL * 4 >> 10} KiB"
    each = f"the {len(stats.DEFAULT)} of the default, of {len(tiny):,} tensors of {TINY} elements, each"
    return [
        *(_line(name, array.nbytes, costs[key], costs["copy"]) for key, name in names.items()),
        compare(in_step, costs["step"], costs["copy of step"]),
        _line_each(each, len(tiny), costs["tiny"], costs["copy of tiny"]),
    ]


def _line(name: str, nbytes: int, ours: list[Cost], base: list[Cost]) -> Line:
    """Return a line whose ratio says how many times the copy's time it takes."""
    speeds = [f"{nbytes / median(cost.seconds for cost in costs) / 1e9:.1f} GB/s" for costs in (ours, base)]
    return Line(name, speeds[0], speeds[1], [a.seconds / b.seconds for a, b in zip(ours, base, strict=True)])


def _line_each(name: str, number: int, ours: list[Cost], base: list[Cost]) -> Line:
    """Return a line of the time that each of `number` tensors takes."""
    shown = [f"{median(cost.seconds for cost in costs) / number * 1e6:.2f} µs" for costs in (ours, base)]
    return Line(name, shown[0], shown[1], [a.seconds / b.seconds for a, b in zip(ours, base, strict=True)])
