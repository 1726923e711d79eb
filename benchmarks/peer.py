"""smdebug 1.0.34, the closed service's library, on the same work in the same folder, in interleaved rounds.

It needs older packages than smdbg, so it gets an environment of its own below build/, made at the first use, and does
its part in a process of that environment. Its hooks belong to frameworks; here one of them is driven with plain arrays.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from place import Folder
from setting import Setting, folder
from timing import Action, Cost, Line, compare, interleaved, timed
from workload import SCALARS, SIDE, TENSORS, Step, step, stored

from smdbg import Hook
from smdbg.analysis.checker import check
from smdbg.analysis.rule import build, find_rule
from smdbg.analysis.run import open_run

HERE = Path(__file__).resolve().parent
NAME = "smdebug 1.0.34"
# Its generated code needs protobuf 3; the last of those is 3.20.3.
PACKAGES = ("smdebug==1.0.34", "numpy<2.3", "protobuf==3.20.3", "requests", "pandas", "psutil")
HOME = HERE.parent / "build" / "smdebug-1.0.34"
ROUNDS, STEPS, SCALAR_STEPS = 5, 10, 100
TENSOR = "layer1/value"
MANY, MANY_SIDE, MANY_STEPS = 100, 16, 40
RULES = ("exploding_tensor", "vanishing_gradient", "all_zero", "tensor_variance", "loss_not_decreasing")
TIMES_FASTER = 50.0
PYTHON_ONLY = (
    "of protobuf 3.20 there are compiled packages up to Python 3.10 only; with this Python it runs as plain Python"
)


class Unavailable(Exception):
    """The environment cannot be made here."""


class Peer:
    """A process of smdebug's environment that does what it is told."""

    def __init__(self, python: Path) -> None:
        """Start it."""
        command = [str(python), str(HERE / "peer_worker.py")]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=_clean()
        )
        self.ask("begin", tensors=TENSORS, side=SIDE, scalars=SCALARS)

    def ask(self, what: str, **words: Any) -> Cost:
        """Let it do something, and return what it took. Its processor time is not known."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": what, **words}) + "\n")
        self._process.stdin.flush()
        answer = next((line for line in self._process.stdout if line.startswith("{")), "")  # the others are its log
        if not answer:
            raise RuntimeError(f"{NAME} failed at {what!r}; run benchmarks/peer_worker.py by hand to see why")
        return Cost(json.loads(answer)["seconds"], 0.0)

    def end(self) -> None:
        """End it."""
        self._process.communicate()


def measure(setting: Setting) -> list[Line]:
    """Return the lines, or one that says why there are none."""
    if setting.quick:
        return [Line(NAME, "", "", [], note="left out with --quick")]
    try:
        python = _environment()
    except Unavailable as error:
        return [Line(NAME, "", "", [], note=f"left out: {error}")]
    peer = Peer(python)
    try:
        with folder() as root:
            return [*_lines(setting, peer, root), _rules(setting, peer, root), _imports(python)]
    finally:
        peer.end()


def _environment() -> Path:
    """Return the Python of smdebug's environment. Raises Unavailable."""
    python, stamp = HOME / "bin" / "python", HOME / ".packages"
    if stamp.is_file() and stamp.read_text() == "\n".join(PACKAGES):
        return python
    shutil.rmtree(HOME, ignore_errors=True)
    for command in (
        [sys.executable, "-m", "venv", str(HOME)],
        [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *PACKAGES],
        [str(python), "-c", "import smdebug.core.hook, smdebug.trials"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(HOME, ignore_errors=True)
            last = (done.stderr.strip().splitlines() or ["it failed"])[-1]
            raise Unavailable(f"no environment with {' '.join(PACKAGES)} could be made ({last})")
    stamp.write_text("\n".join(PACKAGES))
    return python


def _clean() -> dict[str, str]:
    """Return the environment without what would put packages of one Python before another."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _lines(setting: Setting, peer: Peer, root: Path) -> list[Line]:
    place, saved, number = Folder(root), step(), itertools.count()

    def theirs(reductions: bool) -> Action:
        def run() -> Cost:
            cost = peer.ask("write", folder=str(root / f"run-{next(number)}"), steps=STEPS, reductions=reductions)
            place.clear()
            return cost

        return run

    waits: list[Cost] = []

    def ours() -> Cost:
        with Hook(root / f"run-{next(number)}") as hook:
            saved.save(hook)
            stored(hook)
            cost = timed(lambda: _steps(saved, hook, waits))()
        place.clear()
        return cost

    costs = interleaved(
        setting.rounds(ROUNDS), {"values": theirs(False), "reductions": theirs(True), "ours": ours}, warm_up=0
    )
    held = [Cost(sum(c.seconds for c in waits[i : i + STEPS]), 0.0) for i in range(0, len(waits), STEPS)]
    what = f"a step of 13 MB, {STEPS} back to back, each"
    lines = [
        compare(f"{what}: values and 13 statistics, against values and 6", costs["ours"], costs["reductions"], 1.0,
                STEPS, "theirs: min, max, mean, std, abs max, abs mean; its l1 and l2 are matrix norms, left out, "
                "since an l2 is a singular value decomposition"),
        compare(f"{what}: the same, against values alone", costs["ours"], costs["values"], 1.0, STEPS, PYTHON_ONLY),
        compare("of it, time taken from the training, against values alone", held, costs["values"], 1.0, STEPS,
                "smdebug writes in the training thread, without a checksum of the values; smdbg waits for room only"),
        _scalars(setting, peer, root),
    ]  # fmt: skip
    place.clear()
    return lines + _reading(setting, peer, root)


def _steps(saved: Step, hook: Hook, waits: list[Cost]) -> None:
    for _ in range(STEPS):
        waits.append(timed(lambda: saved.save(hook))())
    stored(hook)


def _scalars(setting: Setting, peer: Peer, root: Path) -> Line:
    number, values = itertools.count(), step().scalars

    def save(hook: Hook, steps: int) -> None:
        for _ in range(steps):
            for index, value in enumerate(values):
                hook.save_scalar(f"metric{index}", value)
            hook.end_step()
        stored(hook)

    def ours() -> Cost:
        with Hook(root / f"scalars-{next(number)}") as hook:
            save(hook, 1)
            return timed(lambda: save(hook, SCALAR_STEPS))()

    def theirs() -> Cost:
        return peer.ask("scalar_steps", folder=str(root / f"scalars-{next(number)}"), steps=SCALAR_STEPS)

    costs = interleaved(setting.rounds(3), {"theirs": theirs, "ours": ours}, warm_up=0)
    return compare(
        f"{SCALAR_STEPS} steps of {SCALARS} scalars, each step", costs["ours"], costs["theirs"], 1.0, SCALAR_STEPS
    )


def _reading(setting: Setting, peer: Peer, root: Path) -> list[Line]:
    place, saved, steps = Folder(root), step(), STEPS + 1
    with Hook(root / "ours") as hook:
        for _ in range(steps):
            saved.save(hook)
        stored(hook)
    peer.ask("write", folder=str(root / "theirs"), steps=STEPS, reductions=True)
    theirs = str(root / "theirs")

    def opened() -> None:
        run = open_run(root / "ours")
        assert len(run.tensors()) == TENSORS + SCALARS and run.steps().size == steps

    def series() -> Cost:
        run = open_run(root / "ours")
        return timed(lambda: _same(run.tensor(TENSOR).values(), saved, steps))()

    def deviations() -> Cost:
        run = open_run(root / "ours")
        return timed(lambda: run.stats("std", collection="tensors"))()

    costs = interleaved(
        setting.rounds(ROUNDS),
        {
            "list": lambda: peer.ask("list", folder=theirs),
            "our list": timed(opened),
            "series": lambda: peer.ask("series", folder=theirs, name=TENSOR, steps=steps),
            "our series": series,
            "deviations": lambda: peer.ask("deviations", folder=theirs, steps=steps),
            "our deviations": deviations,
        },
    )
    sizes = [sum(place.sizes(name).values()) for name in ("ours", "theirs")]
    waits = "without the second that smdebug waits, once, to see whether more comes"
    return [
        compare(f"opening a run of {steps} steps and listing it", costs["our list"], costs["list"], 1.0, note=waits),
        compare(f"one tensor at {steps} steps", costs["our series"], costs["series"], 1.0),
        compare(f"std of {TENSORS} tensors at {steps} steps", costs["our deviations"], costs["deviations"], 1.0),
        Line("bytes of the run", f"{sizes[0]:,}", f"{sizes[1]:,}", [sizes[0] / sizes[1]], 1.0,
             note="smdbg keeps 13 statistics and a checksum of all; room for later rows is not stored"),
    ]  # fmt: skip


def _rules(setting: Setting, peer: Peer, root: Path) -> Line:
    """The same five rules over the same numbers, opening the run included."""
    block = np.random.default_rng(0).standard_normal((MANY, MANY_SIDE, MANY_SIDE), np.float32)
    with Hook(root / "many") as hook:
        for at in range(MANY_STEPS):
            for number, tensor in enumerate(block):
                hook.save_tensor(f"layer{number}/value", tensor)
            hook.save_scalar("loss", 2.0 / (1 + at), "losses")
            hook.end_step()
        stored(hook)
    peer.ask("write_many", folder=str(root / "their-many"), tensors=MANY, side=MANY_SIDE, steps=MANY_STEPS)
    every = {"include": "layer*/value"}
    given: dict[str, dict[str, object]] = {
        "vanishing_gradient": every,
        "all_zero": every,
        "tensor_variance": {**every, "max_threshold": 1e6},
    }
    rules = [build(find_rule(name), given.get(name, {})) for name in RULES]

    def ours() -> None:
        report = check(open_run(root / "many"), rules)
        if len(report.judged) != len(RULES):
            raise RuntimeError(f"not all was judged: {report.rules}")

    costs = interleaved(
        setting.rounds(3),
        {
            "ours": timed(ours),
            "theirs": lambda: peer.ask("rules", folder=str(root / "their-many"), tensors=MANY, steps=MANY_STEPS),
        },
    )
    name = f"five rules over {MANY} tensors x {MANY_STEPS} steps, opening the run included: how many times as fast"
    pairs = zip(costs["ours"], costs["theirs"], strict=True)
    shown = compare("", costs["ours"], costs["theirs"])
    note = "smdebug's rules were never published: these ask its Trial API for each tensor and step, as its examples do"
    ratios = [theirs.seconds / ours.seconds for ours, theirs in pairs]
    return Line(name, shown.ours, shown.base, ratios, TIMES_FASTER, at_least=True, note=note)


def _same(found: Any, saved: Step, steps: int) -> None:
    if len(found) != steps or not np.array_equal(found[-1], saved.block[1]):
        raise RuntimeError("what was read is not what was saved")


def _imports(python: Path) -> Line:
    def process(program: Path | str, code: str, env: dict[str, str] | None = None) -> Action:
        return timed(lambda: subprocess.run([str(program), "-c", code], check=True, capture_output=True, env=env))

    costs = interleaved(
        ROUNDS,
        {
            "theirs": process(python, "import smdebug.core.hook, smdebug.trials", _clean()),
            "ours": process(sys.executable, "from smdbg import Hook, open_run"),
        },
    )
    name = "importing what saves and what opens a run, the whole process"
    return compare(name, costs["ours"], costs["theirs"], 1.0, note="smdebug without its framework, which adds to it")
