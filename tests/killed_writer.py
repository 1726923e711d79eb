"""A training that is killed: run as a script it writes at full speed; `check` tells whether what is left is right.

Every value follows from the step number, so that a reader can tell a right value from a wrong one.
"""

from __future__ import annotations

import random
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import smdbg

WIDE = 1_200_000  # float32: 4.8 MB, in shards of its own
LATE = 40
ENTRY = struct.Struct("<qd")  # step, unix seconds when it was closed


def weight(step: int) -> np.ndarray:
    return (np.arange(12.0) + step / 4).reshape(3, 4)


def wide(step: int) -> np.ndarray:
    out = np.arange(WIDE, dtype=np.float32)
    out[::1000] = step
    return out


def late(step: int) -> np.ndarray:
    return np.arange(step % 50 + 1, dtype=np.int32) * step


def text(step: int) -> str:
    return f"step {step} " * (step % 5 + 1)


DUE = {
    "loss": lambda step: True,
    "weight": lambda step: step % 3 == 0,
    "wide": lambda step: step % 20 == 5,
    "late": lambda step: step >= LATE and step % 7 == 0,
    "text": lambda step: step % 11 == 0,
    "reduced": lambda step: step % 2 == 0,
}


def write(url: str, progress: str) -> None:
    """Write for ever, and tell which steps were closed when."""
    collections = [
        "losses",
        smdbg.CollectionConfig("reduced", reduction_config=smdbg.ReductionConfig(save_raw_tensor=False)),
    ]
    hook = smdbg.Hook(url, collections=collections, buffer_bytes=48 << 20, when_full="block")
    with open(progress, "wb", buffering=0) as file:
        step = 0
        while True:
            hook.save_scalar("loss", step / 8, "losses")
            if DUE["weight"](step):
                hook.save_tensor("weight", weight(step), "w")
            if DUE["wide"](step):
                hook.save_tensor("wide", wide(step), "big")
            if DUE["late"](step):
                hook.save_tensor("late", late(step), "w")
            if DUE["text"](step):
                hook.save_tensor("text", text(step), "texts")
            if DUE["reduced"](step):
                hook.save_tensor("reduced", weight(step), "reduced")
            hook.end_step()
            file.write(ENTRY.pack(step, time.time()))
            step += 1


def start_and_kill(url: str, progress: Path, seed: int) -> float:
    """Run a writer, kill it at a random moment of its writing, and return when that was."""
    child = subprocess.Popen([sys.executable, __file__, url, str(progress)], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not (progress.exists() and progress.stat().st_size) and time.monotonic() < deadline:
            assert child.poll() is None, child.stderr and child.stderr.read().decode()
            time.sleep(0.02)
        time.sleep(random.Random(seed).uniform(0.3, 2.5))
        assert child.poll() is None
    finally:
        child.send_signal(signal.SIGKILL)
        killed = time.time()
        child.communicate()
    return killed


def check(url: str, progress: Path, killed: float, seconds: float) -> int:
    """Assert that every committed step is whole and right, nothing else visible, and little lost; return how many."""
    from smdbg.store.backend import open_backend
    from smdbg.store.reader import StoredRun

    stored = StoredRun(open_backend(url))
    assert stored.status(stored.attempts[0].last_commit + 30) == "running"
    assert stored.status(stored.attempts[0].last_commit + 61) == "lost"
    run = smdbg.open_run(url)
    assert run.status != "completed"
    steps = run.step_table().step.tolist()
    assert steps == run.steps().tolist() == list(range(len(steps)))
    made: dict[str, Any] = {"loss": lambda s: s / 8, "weight": weight, "wide": wide, "late": late, "text": text}
    for name in run.tensors():
        tensor, due = run.tensor(name), [s for s in steps if DUE[name](s)]
        assert tensor.steps().tolist() == due, name
        if name == "reduced":
            assert tensor.stat("max")[1].tolist() == [weight(s).max() for s in due]
            continue
        for first in range(0, len(due), 10):
            part = due[first : first + 10] if name == "wide" else due
            for step, value in zip(part, tensor.values(part), strict=True):
                assert np.array_equal(value, made[name](step)), (name, step)
            if name != "wide":
                break
    assert set(run.tensors()) >= {name for name, due in DUE.items() if any(map(due, steps))}
    raw = progress.read_bytes()
    closed = dict(ENTRY.iter_unpack(raw[: len(raw) // ENTRY.size * ENTRY.size]))
    assert len(steps) <= len(closed) + 1
    lost = [at for step, at in closed.items() if step >= len(steps)]
    assert not lost or killed - min(lost) < seconds, f"lost {killed - min(lost):.2f} s, {len(lost)} steps"
    return len(steps)


def kill_many(urls: Sequence[str], folder: Path, seconds: float = 2.5) -> list[int]:
    """Kill a writer at each URL, some at a time, and check each; return how many steps each had committed."""

    def one(number: int) -> float:
        return start_and_kill(urls[number], folder / f"progress{number}", number)

    with ThreadPoolExecutor(4) as pool:
        killed = list(pool.map(one, range(len(urls))))
    return [check(url, folder / f"progress{i}", killed[i], seconds) for i, url in enumerate(urls)]


if __name__ == "__main__":
    write(*sys.argv[1:])
