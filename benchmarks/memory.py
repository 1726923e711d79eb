"""What the writer keeps in memory, against the bound it was given: steps back to back on S3 with a small buffer.

The saving is done in a process of its own, so that its growth is that of the writer and not of other measurements.
"""

from __future__ import annotations

import json
import time

import child
from setting import Setting
from timing import Line
from workload import step, stored

from smdbg import Hook

MIB = 1 << 20
BOUND = 64 * MIB
STEPS = 25


def measure(setting: Setting) -> list[Line]:
    """Return the lines."""
    steps = 4 if setting.quick else STEPS
    found = child.run("memory.main", setting.s3_url(), steps)
    peak, grown = found["peak"], found["grown"]
    bound = f"{BOUND / MIB:.0f} MiB, the bound"
    note = "by the writer's own accounts, which do not go beyond it: the next line shows what they leave out; "
    note += f"{steps} steps back to back, {found['seconds'] / steps * 1000:.0f} ms each"
    lines = [Line("bytes the writer held at most", f"{peak / MIB:.1f} MiB", bound, [peak / BOUND], 1.0, note=note)]
    if grown is not None:
        about = f"{found['before'] / MIB:.0f} MiB before the first step; copies that the S3 client makes are in it"
        lines.append(Line("growth of the process", f"{grown / MIB:.1f} MiB", bound, [grown / BOUND], note=about))
    return lines


def main(url: str, steps: str) -> None:
    """Save steps back to back, and print peak, growth (bytes) and seconds as JSON. What the other process runs."""
    saved = step()
    with Hook(url, buffer_bytes=BOUND, when_full="block") as hook:
        before = child.resident("VmRSS")
        start = time.perf_counter()
        for _ in range(int(steps)):
            saved.save(hook)
        stored(hook)
        seconds = time.perf_counter() - start
        most = child.resident("VmHWM")
        writer = hook._writer
        assert writer is not None
        peak = writer.room.peak
    grown = None if before is None or most is None else most - before
    print(json.dumps({"peak": peak, "grown": grown, "before": before or 0, "seconds": seconds}))
