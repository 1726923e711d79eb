"""How fast a run is checked: statistics of many tensors by the whole default pack, and full values by a rule for them.

What is checked is a healthy training, written through the real hook; the check is the whole process from the shell.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import child
import numpy as np
from child import Watch
from counting import traffic
from setting import Setting, folder
from timing import Action, Cost, Line, interleaved

from smdbg import stats
from smdbg.analysis.checker import check
from smdbg.analysis.rule import build, find_rule
from smdbg.analysis.run import open_run

LAYERS, STEPS, SIDE = 250, 1000, 16  # four tensors a layer
WIDE, WIDE_STEPS, WIDE_SIDE = 10, 10, 1024  # 4 MiB each
ROUNDS = 5
MOST_SECONDS, MOST_REQUESTS, MOST_BYTES = 2.0, 60, 600e6
OF_KERNEL, OF_CORES = 0.5, 1.7
READ = "import sys, numpy; [numpy.fromfile(path, numpy.uint8) for path in sys.argv[1:]]"
VALUE_RULE = "unchanged_tensor"


def measure(setting: Setting) -> list[Line]:
    """Return the lines of statistics, on S3 and in a folder, and those of full values."""
    shape = (setting.sized(LAYERS), setting.sized(STEPS), SIDE)
    url = setting.s3_url()
    with folder() as root:
        child.run("shapes.training", root / "run", *shape, 0)
        child.run("shapes.training", url, *shape, 0)
        lines = [*_local(setting, str(root / "run"), shape), _on_s3(setting, url, shape)]
    with folder() as root:
        return lines + _values(setting, root)


def _process(command: Sequence[str], peaks: list[int] | None = None) -> Action:
    """Return an action that runs a whole process; `peaks` gets its memory at most, in bytes."""

    def run() -> Cost:
        start = time.perf_counter()
        started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(started.pid, 0)
        seconds = time.perf_counter() - start
        started.returncode = os.waitstatus_to_exitcode(status)  # it is waited for already
        if started.returncode:
            raise RuntimeError(f"{command} ended with {started.returncode}")
        if peaks is not None:
            peaks.append(usage.ru_maxrss * 1024)
        return Cost(seconds, usage.ru_utime + usage.ru_stime)

    return run


def _smdbg(*words: str) -> list[str]:
    return [str(Path(sys.executable).parent / "smdbg"), *words, "--format", "tsv", "--exit-zero"]


def _local(setting: Setting, url: str, shape: tuple[int, int, int]) -> list[Line]:
    peaks: list[int] = []
    costs = interleaved(
        setting.rounds(ROUNDS),
        {
            "check": _process(_smdbg("--run", url, "check"), peaks),
            "raw": _process([sys.executable, "-c", READ, *map(str, _objects(url))]),
        },
    )
    what = f"{4 * shape[0]:,} tensors x {shape[1]:,} steps of statistics"
    seconds = sorted(cost.seconds for cost in costs["check"])
    raw = sorted(cost.seconds for cost in costs["raw"])
    ratios = [a.seconds / b.seconds for a, b in zip(costs["check"], costs["raw"], strict=True)]
    processor = sorted(cost.processor for cost in costs["check"])
    middle = len(seconds) // 2
    return [
        Line(
            f"`smdbg check` of {what}, pack default, the whole process, against Python with NumPy reading its files",
            f"{seconds[middle]:.2f} s",
            f"{raw[middle]:.2f} s",
            ratios,
            note=f"from {seconds[0]:.2f} to {seconds[-1]:.2f} s; {processor[middle]:.2f} s of processor time",
        ),
        _bound(f"the same, against {MOST_SECONDS:g} s", seconds[middle], MOST_SECONDS, "s"),
        _bound("memory of the process at most", max(peaks) / 1e6, MOST_BYTES / 1e6, "MB"),
    ]


def _on_s3(setting: Setting, url: str, shape: tuple[int, int, int]) -> Line:
    before = traffic(setting.server)
    cost = _process(_smdbg("--run", url, "check"))()
    found = traffic(setting.server) - before
    total = sum(found.requests.values())
    name = f"`smdbg check` of {4 * shape[0]:,} tensors x {shape[1]:,} steps on S3: requests"
    note = f"{found.text()}, by the server's own count; {cost.seconds:.2f} s"
    return Line(name, f"{total:,}", f"{MOST_REQUESTS}", [total / MOST_REQUESTS], 1.0, note=note)


def _bound(name: str, value: float, most: float, unit: str) -> Line:
    return Line(name, f"{value:,.2f} {unit}", f"{most:g} {unit}", [value / most], 1.0)


def _values(setting: Setting, root: Path) -> list[Line]:
    """Full values: a rule that reads them, on one core and on two, against the kernel of the statistics."""
    sizes = (2, 3, 64) if setting.quick else (WIDE, WIDE_STEPS, WIDE_SIDE)
    child.run("shapes.tensors", root / "run", *sizes, 1)
    nbytes = sizes[0] * sizes[1] * sizes[2] ** 2 * 4
    cores = sorted(os.sched_getaffinity(0))[:2]

    def action(call: str, used: int) -> Action:
        def run() -> Cost:
            found = child.run(f"checking.{call}", root / "run", ",".join(map(str, cores[:used])))
            return Cost(found["seconds"], found["processor"])

        return run

    actions = {"rule": action("by_rule", 1), "kernel": action("by_kernel", 1)}
    if len(cores) > 1:
        actions["two"] = action("by_rule", 2)
    costs = interleaved(setting.rounds(ROUNDS), actions)
    what = f"{nbytes / 1e6:,.0f} MB of full values in the page cache"
    one, kernel = costs["rule"], costs["kernel"]
    lines = [
        Line(
            f"{VALUE_RULE} over {what} on one core: speed, of that of the statistics over the same files",
            _speed(nbytes, one),
            _speed(nbytes, kernel),
            [b.seconds / a.seconds for a, b in zip(one, kernel, strict=True)],
            OF_KERNEL,
            at_least=True,
        )
    ]
    if "two" in costs:
        ratios = [a.seconds / b.seconds for a, b in zip(one, costs["two"], strict=True)]
        name = "the same on two cores: speed, of that on one"
        lines.append(Line(name, _speed(nbytes, costs["two"]), _speed(nbytes, one), ratios, OF_CORES, at_least=True))
    return lines


def _speed(nbytes: int, costs: Sequence[Cost]) -> str:
    return f"{nbytes / sorted(cost.seconds for cost in costs)[len(costs) // 2] / 1e9:.2f} GB/s"


def _objects(url: str) -> list[Path]:
    return sorted(path for path in Path(url).rglob("*") if path.is_file() and "/c/" in path.as_posix())


def by_rule(url: str, cores: str) -> None:
    """Check a run by one rule that reads full values, on these cores."""
    os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    run, rule = open_run(url), build(find_rule(VALUE_RULE), {"include": "*"})
    watch = Watch()
    report = check(run, [rule])
    if not report.judged:
        raise RuntimeError(f"nothing was judged: {report.rules}")
    _tell(watch)


def by_kernel(url: str, cores: str) -> None:
    """Compute the default statistics of what the same files hold, on these cores."""
    os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
    wanted = [path for path in _objects(url) if "float32" in path.parts]
    watch = Watch()
    for path in wanted:
        data = np.fromfile(path, np.uint8)
        stats.compute(data[: len(data) // 4 * 4].view(np.float32), stats.DEFAULT)
    _tell(watch)


def _tell(watch: Watch, **more: Any) -> None:
    print(json.dumps({**watch.found(), **more}))
