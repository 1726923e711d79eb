"""Trainings under random faults, killed and resumed at random; afterwards everything committed must be right.

`python tests/chaos.py --rounds 100` runs rounds against a real S3 server through a proxy that breaks things, every
fifth in a local folder; `--rounds 1 --seed N` repeats one. A round is one run, in several lives: child processes that
save values which follow from the seed, the life and the step, and that write down which steps `flush()` confirmed. What
is random follows from the seed, but for the timing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import smdbg
from smdbg.errors import SmdbgError
from smdbg.store.backend import open_backend
from smdbg.store.verify import verify

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

from faulty_proxy import FAULTS, FaultyProxy  # noqa: E402

WIDE = 1_100_000  # float32: 4.4 MB, in shards of its own
FIRST_LATE = 15
ENDS = ("kill", "kill", "kill", "term", "int", "raise", "exit", "close")
REFUSED = 3
IMPATIENT = {"config_kwargs": {"read_timeout": 2, "connect_timeout": 2}}

# --- the truth ---


def number(seed: int, life: int, step: int) -> int:
    return (seed * 1_000_003 + life * 10_007 + step * 101) % 99_991


def loss(mark: int, step: int) -> float:
    return mark / 8


def weight(mark: int, step: int) -> np.ndarray:
    return (np.arange(20.0) + mark).reshape(5, 4)


def wide(mark: int, step: int) -> np.ndarray:
    return np.arange(WIDE, dtype=np.float32) + mark % 4096


def late(mark: int, step: int) -> np.ndarray:
    return np.arange(step % 50 + 1, dtype=np.int32) * (mark % 100)


SAVED = {
    "loss": ("losses", loss, lambda step: True),
    "weight": ("w", weight, lambda step: step % 3 == 0),
    "late": ("w", late, lambda step: step >= FIRST_LATE and step % 7 == 0),
    "reduced": ("reduced", weight, lambda step: step % 2 == 0),
    "wide": ("big", wide, lambda step: step % 23 == 4),
}

# --- the child ---


def train(url: str, seed: int, life: int, progress: str, policy: str, start: int, end: str) -> None:
    """Save until told to end, and note what was confirmed. `start` -1: go on where the run ends."""
    ended: list[int] = []
    signal.signal(signal.SIGHUP, lambda *_: ended.append(1))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    reduced = smdbg.CollectionConfig("reduced", reduction_config=smdbg.ReductionConfig(save_raw_tensor=False))
    options = IMPATIENT if "://" in url else None
    with open(progress, "w", buffering=1) as notes:
        try:
            hook = smdbg.Hook(
                url, collections=["losses", "metrics", reduced], storage_options=options, resume=life > 0,
                buffer_bytes=24 << 20, when_full=policy,
            )  # fmt: skip
        except SmdbgError as error:
            notes.write(f"refused {type(error).__name__}: {error}\n")
            sys.exit(REFUSED)
        if start >= 0:
            hook.set_step(min(start, hook.step))
        notes.write(f"begun {hook.step}\n")
        step = hook.step
        while not ended:
            mark = number(seed, life, step)
            hook.save_scalar("life", life)
            for name, (collection, value, due) in SAVED.items():
                if due(step):
                    save = hook.save_scalar if name == "loss" else hook.save_tensor
                    save(name, value(mark, step), collection)
            hook.end_step()
            notes.write(f"saved {step}\n")
            if step % 37 == 36 and hook.flush(1.0):
                notes.write(f"flushed {step}\n")
            step += 1
            time.sleep(0.005)
        if end == "raise":
            raise RuntimeError("of the training")
        if end == "close":
            hook.close()
            notes.write("closed\n")


# --- the parent ---


@dataclass(frozen=True)
class Life:
    """What a child wrote down: its first step, the last that it saved, the last that was confirmed (-1: none)."""

    number: int
    policy: str
    end: str
    first: int
    saved: int
    flushed: int
    closed: bool


@dataclass
class Round:
    """A round as it went."""

    seed: int
    url: str
    lives: list[Life] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    steps: int = 0


class Place:
    """Where a round writes: a folder, or S3 through a proxy. Begins and ends faults there."""

    def __init__(
        self, url: str, server: Any = None, proxy: FaultyProxy | None = None, *, restarts: bool = True
    ) -> None:
        self.url, self.server, self.proxy = url, server, proxy
        self.faults = ["file_limit"] if proxy is None else [*FAULTS, "restart"] if restarts else list(FAULTS)
        self.reader = {"endpoint_url": server.endpoint} if server is not None else None

    def begin(self, fault: str, child: subprocess.Popen[bytes]) -> None:
        if self.proxy is None:
            _limit_files(child, 1 << 18)
        elif fault == "restart":
            self.server.stop()
        else:
            self.proxy.set(fault)

    def end(self, fault: str, child: subprocess.Popen[bytes]) -> None:
        if self.proxy is None:
            _limit_files(child, -1)
        elif fault == "restart":
            self.server.restart()
        else:
            self.proxy.set(None)

    def mend(self) -> None:
        """End whatever fault is left."""
        if self.proxy is not None:
            self.proxy.set(None)
            if self.server.process is None:
                self.server.restart()


def _limit_files(child: subprocess.Popen[bytes], size: int) -> None:
    """Limit how large files of a child may get, from outside, so that it also works while the child is ending."""
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (size, -1))


def run_round(place: Place, seed: int, folder: Path) -> Round:
    """Run all lives of a round, then check what they left. Raises AssertionError."""
    rng = random.Random(seed)
    done = Round(seed, place.url)
    number_of_lives = rng.randint(2, 4)
    for life in range(number_of_lives):
        last = life == number_of_lives - 1
        end = "close" if last else rng.choice(ENDS)
        policy = "block" if last or rng.random() < 0.7 else "drop"
        reached = max((found.saved for found in done.lives), default=0)
        start = rng.randint(0, reached) if rng.random() < 0.5 else -1
        found = _live(place, rng, done, life, policy, start, end, folder / f"{seed}-{life}")
        if found is not None:
            done.lives.append(found)
    try:
        check(place, done)
    except AssertionError as error:
        raise AssertionError(f"{error}; after {dict(done.faults)} and {dict(done.ends)}") from error
    return done


def _live(
    place: Place, rng: random.Random, done: Round, life: int, policy: str, start: int, end: str, progress: Path
) -> Life | None:
    arguments = [place.url, done.seed, life, progress, policy, start, end]
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    with open(f"{progress}.err", "wb") as errors:
        child = subprocess.Popen(command, stderr=errors, stdin=subprocess.DEVNULL)
    try:
        _wait_for_steps(child, progress)
        fault = ""
        for _ in range(rng.randint(0, 2)):
            time.sleep(rng.uniform(0.1, 0.6))
            if fault:
                place.end(fault, child)
            fault = rng.choice(place.faults)
            if child.poll() is None:
                place.begin(fault, child)
                done.faults[fault] += 1
            time.sleep(rng.uniform(0.2, 1.2))
            if rng.random() < 0.7:  # otherwise it goes on while the process ends
                place.end(fault, child)
                fault = ""
        time.sleep(rng.uniform(0.1, 0.8))
        done.ends[end] += 1
        sent = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}.get(end, signal.SIGHUP)
        if child.poll() is None:
            child.send_signal(sent)
        if fault:
            time.sleep(rng.uniform(0, 0.5))
            place.end(fault, child)
        code = child.wait(90)
    finally:
        place.mend()
        child.kill()
        child.wait()
    return _noted(progress, life, policy, end, code)


def _wait_for_steps(child: subprocess.Popen[bytes], progress: Path) -> None:
    deadline = time.monotonic() + 60
    while child.poll() is None and not (progress.exists() and b"saved" in progress.read_bytes()):
        assert time.monotonic() < deadline, "the child does not begin"
        time.sleep(0.02)


def _noted(progress: Path, life: int, policy: str, end: str, code: int) -> Life | None:
    lines = progress.read_text().splitlines() if progress.exists() else []
    told = Path(f"{progress}.err").read_text()
    allowed = {"kill": -9, "term": -15, "int": -2, "raise": 1}.get(end, 0)
    if code == REFUSED:
        return None
    assert code == allowed, f"life {life} ended with {code} instead of {allowed} ({end}): {told}"
    expected = "RuntimeError: of the training" if end == "raise" else "KeyboardInterrupt"
    # aiohttp leaves a task behind when a connection is reset while it sends headers; asyncio tells of it at exit.
    left = len(re.findall(r"^future: <Task finished .*ClientConnectionResetError", told, re.MULTILINE))
    traces = told.count("Traceback") - left
    assert traces == 0 or (end in ("raise", "int") and traces == 1 and expected in told), told
    last = {"begun": -1, "saved": -1, "flushed": -1}
    for line in lines:
        word, _, rest = line.partition(" ")
        if word in last and rest.isdigit():
            last[word] = int(rest)
    return Life(life, policy, end, last["begun"], last["saved"], last["flushed"], "closed" in lines)


# --- what must be true afterwards ---


def check(place: Place, done: Round) -> None:
    """Every attempt holds what its life saved, nothing else, and no confirmed step is missing."""
    lives = {life.number: life for life in done.lives}
    whole = smdbg.open_run(place.url, storage_options=place.reader)
    shown: dict[int, int] = {}
    seen: set[int] = set()
    attempts = whole.attempts()
    for facts in attempts:
        run = smdbg.open_run(place.url, storage_options=place.reader, attempt=facts.attempt)
        steps = run.step_table().step.tolist()
        done.steps += len(steps)
        if not steps:
            continue
        ran = set(run.tensor("life").values().tolist())
        assert len(ran) == 1, f"attempt {facts.attempt} mixes lives {ran}"
        life = lives[int(ran.pop())]
        assert life.number not in seen and life.number > max(seen, default=-1), "lives in disorder"
        seen.add(life.number)
        _check_attempt(run, facts, life, done.seed)
        shown = {step: number for step, number in shown.items() if step < steps[0]}
        shown |= dict.fromkeys(steps, life.number)
    for life in done.lives:
        assert life.number in seen or life.flushed < 0, f"life {life.number} is missing, flushed to {life.flushed}"
    assert whole.steps().tolist() == sorted(shown), "what a reader is shown by default"
    assert whole.tensor("life").steps().tolist() == sorted(shown)
    assert whole.tensor("life").values().tolist() == [shown[step] for step in sorted(shown)]
    found = verify(open_backend(place.url, place.reader))
    assert not found.damage and not found.unchecked, f"verify: {found.damage[:3]} {found.unchecked[:3]}"
    last = done.lives[-1]
    if last.end == "close":
        assert last.closed and whole.status == "completed", whole.status


def _check_attempt(run: Any, facts: Any, life: Life, seed: int) -> None:
    table = run.step_table()
    steps = table.step.tolist()
    lossy = set(table.step[table.flags & 4 != 0].tolist())
    said = f"life {life.number} ({life.policy}, {life.end}), attempt {facts.attempt}"
    assert steps == sorted(set(steps)) and steps[0] >= life.first, f"{said}: steps in disorder"
    # The note of the last step may not have been written when it was killed.
    assert steps[-1] <= life.saved + 1, f"{said}: {steps[-1]} was never saved"
    if life.policy == "block":
        assert steps == list(range(life.first, life.first + len(steps))) and not lossy, f"{said}: holes"
        assert steps[-1] >= life.flushed, f"{said}: {steps[-1]} is the last, {life.flushed} was confirmed"
    # A signal comes in the middle of a step, which is then closed as it is.
    partial = lossy | ({steps[-1]} if life.end in ("term", "int") and steps[-1] > life.saved else set())
    if life.end != "kill":
        assert steps[-1] >= life.saved or life.policy == "drop", f"{said}: the end is missing"
        unlogged = len(range(life.first, max(life.saved, steps[-1]) + 1)) - len(steps)
        assert facts.dropped_steps == unlogged + len(lossy), f"{said}: {facts} {unlogged} {len(lossy)}"
    elif life.policy == "drop":
        lost = sum(1 for step in range(life.first, life.flushed + 1) if step not in set(steps))
        assert lost <= facts.dropped_steps, f"{said}: {lost} confirmed steps are missing, told {facts.dropped_steps}"
    for name, (_, value, due) in SAVED.items():
        wanted = [step for step in steps if due(step)]
        if name not in run.tensors():
            assert set(wanted) <= partial, f"{said}: {name} is missing"
            continue
        tensor = run.tensor(name)
        there = tensor.steps().tolist()
        assert set(there) <= set(wanted), f"{said}: {name} at {there}"
        assert set(wanted) - set(there) <= partial, f"{said}: {name} only at {there} of {wanted}, dropped {lossy}"
        truth = {step: value(number(seed, life.number, step), step) for step in there if name != "wide"}
        if name != "wide":
            found = dict(zip(*(part.tolist() for part in tensor.stat("max")), strict=True))
            assert found == {step: np.max(truth[step]) for step in there}, f"{said}: statistics of {name}"
        if name == "reduced":
            continue
        assert tensor.value_steps().tolist() == there
        for step in there if name == "wide" else []:
            assert np.array_equal(tensor.value(step), wide(number(seed, life.number, step), step)), (said, name, step)
        if name != "wide" and there:
            for step, kept in zip(there, tensor.values(there), strict=True):
                assert np.array_equal(kept, truth[step]), (said, name, step)


# --- running rounds ---


@contextlib.contextmanager
def s3_place() -> Iterator[tuple[Any, FaultyProxy]]:
    """A server and a proxy before it, with the environment set for children to use the proxy."""
    import s3_server

    with s3_server.s3_server() as server, FaultyProxy("127.0.0.1", server.ports["s3"]) as proxy:
        os.environ.update({**server.environment(), "AWS_ENDPOINT_URL": proxy.endpoint})
        yield server, proxy


def rounds(seeds: list[int], folder: Path) -> Iterator[tuple[int, Round | None, str, float]]:
    """Run rounds one after another: (seed, what happened, what was wrong, seconds)."""
    with s3_place() as (server, proxy):
        for seed in seeds:
            local = seed % 5 == 0
            place = Place(str(folder / str(seed))) if local else Place(f"s3://{server.bucket}/{seed}", server, proxy)
            start = time.monotonic()
            try:
                done, wrong = run_round(place, seed, folder), ""
            except (AssertionError, SmdbgError, subprocess.TimeoutExpired) as error:
                done, wrong = None, f"{type(error).__name__}: {error}"
            yield seed, done, wrong, time.monotonic() - start
            if local and done is not None:
                shutil.rmtree(place.url, ignore_errors=True)


def main(arguments: list[str]) -> int:
    """Run rounds and print a line for each; 1 if any failed."""
    if arguments[:1] == ["--child"]:
        url, seed, life, progress, policy, start, end = arguments[1:]
        train(url, int(seed), int(life), progress, policy, int(start), end)
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    parser.add_argument("--jobs", type=int, default=3, help="rounds at a time, each with a server of its own")
    parser.add_argument("--stride", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    jobs = min(given.jobs, given.rounds)
    seeds = list(range(given.seed, given.seed + given.rounds * given.stride, given.stride))
    if jobs > 1:
        command = [sys.executable, __file__, "--jobs", "1", "--stride", str(jobs)]
        parts = [seeds[n::jobs] for n in range(jobs)]
        children = [subprocess.Popen([*command, "--seed", str(p[0]), "--rounds", str(len(p))]) for p in parts]
        return max(child.wait() for child in children)
    failed, folder = 0, Path(tempfile.mkdtemp(prefix="chaos-"))
    for seed, done, wrong, seconds in rounds(seeds, folder):
        if done is None:
            failed += 1
            print(f"seed {seed}: FAILED after {seconds:.1f} s: {wrong} (its notes: {folder})", flush=True)
        else:
            what = ", ".join(f"{kind} {n}" for kind, n in sorted((done.faults + done.ends).items()))
            size = f"{len(done.lives)} lives, {done.steps} steps"
            print(f"seed {seed}: right, {size}, {seconds:.0f} s: {what}", flush=True)
    if not failed:
        shutil.rmtree(folder)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
