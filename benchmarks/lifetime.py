"""How soon a run can be read, and what is lost when the training is killed at once: on S3 and in a folder."""

from __future__ import annotations

import itertools
import os
import random
import signal
import struct
import subprocess
import sys
import time
from statistics import median

import child
import numpy as np
from place import Bucket, Folder, Place
from setting import Setting, folder
from timing import Cost, Line, compare, interleaved, timed

from smdbg import Hook
from smdbg.analysis.run import open_run
from smdbg.errors import SmdbgError

ROUNDS, KILLS = 7, 12
STEP_SECONDS, LEAST, SPREAD = 0.02, 0.5, 3.0  # of the training that is killed, after 0.5 to 3.5 s
PATIENCE = 60.0
BOUND = 1.0  # second: how often the writer commits
MARK = struct.Struct("<qd")  # a step, and when it was done


def measure(setting: Setting) -> list[Line]:
    """Return the lines for S3, then those for a folder."""
    with folder() as root:
        return [*_lines(setting, Bucket(setting.s3_url()), "on S3"), *_lines(setting, Folder(root), "in a folder")]


def _lines(setting: Setting, place: Place, where: str) -> list[Line]:
    return [_first_row(setting, place, where), *_killed(setting, place, where)]


def _first_row(setting: Setting, place: Place, where: str) -> Line:
    """Until somebody who opens the run sees its first step, against writing and reading the step raw."""
    number = itertools.count()
    saved = setting.step()
    raw = saved.as_bytes()

    def ours() -> Cost:
        url = f"{place.url}/first-{next(number)}"
        start, used = time.perf_counter(), time.process_time()
        with Hook(url) as hook:
            saved.save(hook)
            while not _last_step(url) == 0:
                if time.perf_counter() - start > PATIENCE:
                    raise RuntimeError("the first step is not to be seen")
                time.sleep(0.002)
            return Cost(time.perf_counter() - start, time.process_time() - used)

    def plain() -> None:
        name = f"raw-{next(number)}"
        place.write(name, raw)
        place.read([(name, 0, len(raw))])

    costs = interleaved(setting.rounds(ROUNDS), {"raw": timed(plain), "ours": ours})
    name = f"from Hook() until a reader sees step 0, {where}, against writing and reading it raw"
    return compare(name, costs["ours"], costs["raw"])


def _last_step(url: str) -> int | None:
    """Return the last step that is to be seen."""
    try:
        steps = open_run(url).steps()
    except SmdbgError:
        return None
    return int(steps[-1]) if steps.size else None


def _killed(setting: Setting, place: Place, where: str) -> list[Line]:
    """Seconds of training that were done and are not in the run, after SIGKILL at a random moment."""
    dice = random.Random(0)
    lost, steps = [], []
    for number in range(setting.rounds(KILLS)):
        url = f"{place.url}/killed-{number}"
        marks = _kill_one(url, LEAST + (0.0 if setting.quick else SPREAD * dice.random()))
        seen = _last_step(url)
        last, end = marks[-1]
        committed = next((when for step, when in marks if step == seen), marks[0][1] - STEP_SECONDS)
        lost.append(max(0.0, end - committed))
        steps.append(last - (-1 if seen is None else seen))
    base = f"{BOUND:g} s, how often it commits"
    shown = f"{median(lost):.2f} s ({min(lost):.2f} to {max(lost):.2f})"
    note = f"{len(lost)} trainings of steps of {STEP_SECONDS * 1000:.0f} ms, {median(steps):.0f} of them lost"
    worst = f"the worst of them, {where}"
    return [
        Line(f"training lost at SIGKILL, {where}", shown, base, [s / BOUND for s in lost], 1.0, note=note),
        Line(worst, f"{max(lost):.2f} s", base, [max(lost) / BOUND]),
    ]


def _kill_one(url: str, after: float) -> list[tuple[int, float]]:
    """Train in another process, kill it so many seconds after its first step, and return what it had done."""
    command = child.command("lifetime.train", url)
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=child.environment()) as process:
        assert process.stdout is not None
        data = os.read(process.stdout.fileno(), MARK.size)
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        data += process.stdout.read()
    whole = len(data) // MARK.size * MARK.size
    if not whole:
        raise RuntimeError("the training that was to be killed did not begin")
    return list(MARK.iter_unpack(data[:whole]))


def train(url: str) -> None:
    """Train until killed, and say after each step that it is done."""
    value = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    out = sys.stdout.fileno()
    with Hook(url) as hook:
        for step in itertools.count():
            time.sleep(STEP_SECONDS)
            hook.save_tensor("layer/value", value)
            hook.save_scalar("loss", 1 / (step + 1))
            hook.end_step()
            os.write(out, MARK.pack(step, time.monotonic()))
