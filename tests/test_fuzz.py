"""Whatever is done to the objects of a run, reading it tells the truth or says that something is damaged.

Each round damages a run that has every kind of array, and asks all that can be asked of it, by the library and by the
command line. Every answer must be the one of the whole run, or an error of smdbg: no other value, no traceback, no
hang, no jump of memory, and nothing written. `smdbg verify` must find each change.

Two changes cannot be noticed, by the format: an object put in the place of another that passes all the checks of that
place (the same array of another row, worker or attempt, say: a checksum covers the bytes, not where they belong); such
a round must still end well. And a worker's zarr.json that is gone reads as of an attempt that has not begun; then the
answers are those of the run without it, and `smdbg verify` tells.

SMDBG_FUZZ_ROUNDS sets how many rounds there are, SMDBG_FUZZ_SEED the first.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import random
import re
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.analysis.run import Run
from smdbg.cli import run as command_line
from smdbg.errors import DamagedData, SmdbgError, StoreError
from smdbg.store import apart, backend, places
from smdbg.store import format as layout
from smdbg.store.intact import check_object
from smdbg.store.keys import parse_key
from smdbg.store.reader import StoredRun

ROUNDS = int(os.environ.get("SMDBG_FUZZ_ROUNDS") or 16)  # read here: the tests see no such variables
FIRST = int(os.environ.get("SMDBG_FUZZ_SEED") or 0)

STEPS = 10
SECONDS = 30  # a round takes a fraction of one
MEMORY = 128 << 20  # bytes above those of reading the whole run

Ask = Callable[[Run], Any]
Answers = dict[str, Any]
COMMANDS = (
    ["ls"],
    ["ls", "--format", "tsv"],
    ["inspect", "wide", "--values", "--format", "jsonl", "--index", "::1000"],
    ["inspect", "packed", "--values", "--format", "tsv"],
    ["inspect", "loss"],
    ["inspect", "grows", "--attempt", "all", "--format", "tsv"],
    ["check"],
    ["runs", "--format", "jsonl"],
)


@dataclass
class Whole:
    """The run as it was written: its objects, what it answers, and what it answers without one attempt."""

    path: Path
    objects: dict[str, bytes]
    asks: dict[str, Ask]
    stored: StoredRun
    truth: Answers
    without: dict[str, Answers] = field(default_factory=dict)
    home: dict[str, str] = field(default_factory=dict)  # tensor -> collection
    said: dict[int, tuple[int, str, str]] = field(default_factory=dict)  # what each of COMMANDS says of it

    def asked(self, rng: random.Random, changed: Iterable[str]) -> dict[str, Ask]:
        """Return what is asked after these objects were changed: what they touch, and some of all else."""
        touched = [(key.collection, key.worker[0]) for k in changed if (key := parse_key(k)) and key.worker]
        if not all(home for home, _ in touched):
            return self.asks
        near = {f"{n} of {k}" for home, k in touched for n in self.home if self.home[n] == home}
        return {q: ask for q, ask in self.asks.items() if rng.random() < 0.1 or any(about in q for about in near)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    """Two workers of two attempts each, laid out so that little data make many objects and chunks."""
    path = tmp_path_factory.mktemp("fuzz") / "runs" / "run"
    with pytest.MonkeyPatch.context() as patch:
        small = {"WIDE_ROW": 16, "WIDE_SHARD": 8, "WIDE_CHUNK": 4, "NARROW_SHARD": 8, "NARROW_CHUNK": 1}
        for name, kib in small.items():
            patch.setattr(layout, name, kib << 10)
        patch.setattr(places, "WIDE_ROW", 16 << 10)
        for attempt in range(2):
            for rank in range(2):
                write(path, rank, attempt)
        patch.setattr(apart, "LARGE", 1 << 10)
        patch.setattr(backend, "SMALL", 1 << 30)  # no threads for what is small here
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        objects = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
        run = smdbg.open_run(path)
        asks = questions(run)
        found = Whole(path, objects, asks, StoredRun(run._stored.backend, "all"), answers(run, asks))
        assert not {name: a for name, a in found.truth.items() if isinstance(a, SmdbgError)}
        for key in objects:
            if key.startswith("workers/0") and key.count("/") == 2 and key.endswith("/zarr.json"):
                (path / key).unlink()
                found.without[key] = answers(smdbg.open_run(path), asks)
                (path / key).write_bytes(objects[key])
        found.home = {name: run.tensor(name).collection for name in run.tensors()}
        found.said = {i: told(on(path, args)) for i, args in enumerate(COMMANDS)}
        yield found


def write(path: Path, rank: int, attempt: int) -> None:
    rng = np.random.default_rng(10 * rank + attempt)
    raw = smdbg.ReductionConfig(save_raw_tensor=True, features=True, quantiles=True)
    cast = smdbg.CollectionConfig("cast", reduction_config=raw, dtype="bfloat16")
    packed = [smdbg.CollectionConfig(c, reduction_config=raw, compression=c) for c in ("lz4", "zstd")]
    options: dict[str, Any] = {"rank": rank, "world_size": 2, "resume": attempt > 0, "hyperparameters": {"lr": 0.125}}
    with smdbg.Hook(path, collections=[cast, *packed], reduction_config=raw, on_error="raise", **options) as hook:
        if attempt:
            hook.set_step(STEPS - 4)
        for step in range(hook.step, STEPS + attempt):
            hook.set_mode("eval" if step % 4 == 3 else "train")
            hook.save_tensor("w", rng.normal(size=(5, 7)).astype("float32"))
            hook.save_tensor("out", rng.normal(size=(6, 4)).astype("float32"), role="output", feature_axis=1)
            hook.save_tensor("grows", np.arange(2 + step) * step, "growing")
            hook.save_tensor("text", np.array(["a", "bc" * (step + 1)]))
            hook.save_tensor("cast", rng.normal(size=300).astype("float32"), "cast")
            hook.save_tensor("packed", np.round(rng.normal(size=(40, 25))), "zstd")
            hook.save_tensor("lz", rng.integers(0, 3, 9000) + step, "lz4")
            if step % 3 == 0:
                hook.save_tensor("wide", rng.normal(size=7000).astype("float32"), "wide")
            hook.save_scalar("loss", float(rng.random()), "losses")
            hook.end_step()


def questions(run: Run) -> dict[str, Ask]:
    """Return all that is asked, under names."""
    asks: dict[str, Ask] = {
        "facts": lambda r: (r.status, r.run_id, r.hyperparameters, r.argv, r.created, r.world_size, r.versions),
        "names": lambda r: (r.tensors(), r.collections(), r.modes(), r.workers(), len(r.attempts())),
        "steps": lambda r: (r.steps(), r.steps("eval"), r.complete_steps()),
        "all means": lambda r: r.stats("mean"),
    }
    for rank in run.workers():
        asks[f"table of {rank}"] = lambda r, k=rank: tuple(vars(r.step_table(k)).values())
        for name in run.tensors():
            about = f"{name} of {rank}"
            where = run.tensor(name).steps(worker=rank).tolist()
            asks[f"steps of {about}"] = lambda r, n=name, k=rank: r.tensor(n).steps(worker=k)
            asks[f"values of {about}"] = lambda r, n=name, k=rank: r.tensor(n).values(worker=k)
            asks[f"each of {about}"] = lambda r, n=name, k=rank: list(r.tensor(n).each(worker=k))
            asks[f"features of {about}"] = lambda r, n=name, k=rank: r.tensor(n).features(worker=k)
            for what in ("count", "min", "mean") if name not in ("text",) else ("count",):
                asks[f"{what} of {about}"] = lambda r, n=name, k=rank, w=what: r.tensor(n).stat(w, worker=k)
            for step in where[:: max(1, len(where) // 4)]:
                asks[f"{about} at {step}"] = lambda r, n=name, k=rank, s=step: r.tensor(n).value(s, worker=k)
    asks |= {f"facts of {n}": lambda r, n=n: (r.tensor(n).nbytes, r.tensor(n).info) for n in run.tensors()}
    return asks


def answers(run: Run, asks: dict[str, Ask]) -> Answers:
    out: Answers = {}
    for name, ask in asks.items():
        try:
            out[name] = ask(run)
        except SmdbgError as error:
            out[name] = error
    return out


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, SmdbgError) or isinstance(b, SmdbgError):
        return isinstance(a, SmdbgError) and isinstance(b, SmdbgError) and type(a) is type(b)
    return bool(a == b)


# --- damage ---


def damage(rng: random.Random, objects: dict[str, bytes]) -> dict[str, bytes | None]:
    """Return what some object, or two, are to be replaced by; None: deleted."""
    kinds: dict[str, list[str]] = {}
    for key in objects:  # as likely JSON or the log as one of the many shards
        kinds.setdefault("json" if key.endswith("json") else key.rsplit("/c/", 1)[0], []).append(key)
    name = rng.choice(kinds["json"]) if rng.random() < 0.25 else rng.choice(kinds[rng.choice(sorted(kinds))])
    old = bytearray(objects[name])
    at = rng.randrange(len(old))
    match rng.choice(("flip", "flip", "flip", "overwrite", "cut", "extend", "delete", "swap", "replace", "shift")):
        case "flip":
            for _ in range(rng.choice((1, 1, 2, 20))):
                old[rng.randrange(len(old))] ^= 1 << rng.randrange(8)
        case "overwrite":
            size = min(len(old) - at, rng.choice((1, 4, 100, 5000)))
            old[at : at + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
        case "cut":
            del old[rng.choice((at, len(old) - 1, 0, len(old) - 4)) :]
        case "extend":
            old += rng.choice((b"\0", rng.randbytes(rng.randrange(1, 9000)), bytes(old)))
        case "shift":
            del old[at : at + rng.choice((1, 8, 4096))]
        case "delete":
            return {name: None}
        case "swap":
            other = rng.choice(sorted(objects))
            return {name: objects[other], other: bytes(old)}
        case "replace":  # by one of another step, worker, attempt or array of the same kind
            tail = name.split("/")[-3:]
            alike = [key for key in objects if key.split("/")[-1] == tail[-1] and len(objects[key]) == len(old)]
            return {name: objects[rng.choice(alike)]}
    return {name: bytes(old)}


def fits(whole: Whole, changed: dict[str, bytes | None]) -> bool:
    """Tell whether a chunk was put in the place of another where it passes every check that there is."""
    for name, data in changed.items():
        key = parse_key(name)
        if key is None or not key.index or data is None or data == whole.objects[name]:
            continue
        one = next(o for o in whole.stored.attempts if (o.rank, o.attempt) == key.worker)
        with contextlib.suppress(DamagedData, KeyError):
            check_object("", key, data, one)
            return True
    return False


# --- a round ---


class Hangs(BaseException):
    """A round has taken too long."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # should it hang where no signal is seen
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reset_peak() -> bool:
    """Let the system count the most memory of this process from now on."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak() -> int:
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def told(args: list[str]) -> tuple[int, str, str]:
    """Run a command line; return its status, and what it said on stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = command_line(args)
    text = out.getvalue() + err.getvalue()
    assert "internal error" not in text and "Traceback" not in text, text
    assert all(c.isprintable() or c in "\n\t" for c in text), text
    return int(status), re.sub(r'"age": [0-9.]+', "", out.getvalue()), err.getvalue()


def on(path: Path, args: list[str]) -> list[str]:
    return [*args, str(path.parent)] if args[0] == "runs" else [*args, "--run", str(path)]


def files_around(path: Path) -> dict[str, tuple[int, int]]:
    found = [p for root in (path.parent.parent, Path.cwd()) for p in root.rglob("*") if p.is_file()]
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in found}


def ask_all(whole: Whole, run: Run, asks: dict[str, Ask], hit: set[str], gone: list[str], strict: bool) -> None:
    """Ask everything, and hold the answers against those that are right: without an attempt, if that is told."""
    truths = [whole.truth, *(whole.without[key] for key in (hit if run.damaged else gone) if key in whole.without)]
    for name, answer in answers(run, asks).items():
        if any(same(answer, truth[name]) for truth in truths) or not strict:
            continue
        if isinstance(answer, SmdbgError):
            # That a step or a tensor was never saved is an answer too, and here a wrong one.
            assert run.damaged or isinstance(answer, StoreError | DamagedData), f"{name}: {answer!r}"
        else:  # what a worker held that cannot be read is not there, and this is said
            general = name in ("names", "steps", "all means") or name.startswith("facts")
            assert run.damaged and general, f"{name}: {answer}"


def damaged_round(whole: Whole, seed: int) -> None:
    rng = random.Random(seed)
    changed = damage(rng, whole.objects)
    strict = not fits(whole, changed)
    hit = {"/".join(key.split("/")[:2]) + "/zarr.json" for key in changed}
    gone = [key for key, data in changed.items() if data is None and key in whole.without]
    asks = whole.asked(rng, changed)
    opened = smdbg.open_run(whole.path)
    answers(opened, {name: ask for name, ask in asks.items() if rng.random() < 0.1})
    try:
        for name, data in changed.items():
            (whole.path / name).write_bytes(data) if data is not None else (whole.path / name).unlink()
        before = files_around(whole.path)
        opened.refresh()
        ask_all(whole, opened, asks, hit, gone, strict)
        run: Run | None = None
        with contextlib.suppress(SmdbgError):
            run = smdbg.open_run(whole.path)
        if run is not None:
            ask_all(whole, run, asks, hit, gone, strict)
        number = rng.randrange(len(COMMANDS))
        status, out, err = told(on(whole.path, COMMANDS[number]))
        right = whole.said[number]
        if strict and not gone and (status, out) != right[:2]:
            assert status == 2 or err or run is None or run.damaged, (COMMANDS[number], out, right)
            if COMMANDS[number][0] == "inspect" and not (run and run.damaged):
                assert set(out.splitlines()) <= set(right[1].splitlines()), (COMMANDS[number], out)
        verified, out, err = told(["verify", "--format", "jsonl", str(whole.path)])
        if all(data == whole.objects[name] for name, data in changed.items()):
            assert verified == 0, (out, err)
        elif strict:
            assert verified in (1, 2), (out, err)
        assert files_around(whole.path) == before
    finally:
        for name in changed:
            (whole.path / name).parent.mkdir(parents=True, exist_ok=True)
            (whole.path / name).write_bytes(whole.objects[name])


def test_random_damage(whole: Whole) -> None:
    with in_time():
        damaged_round(whole, -1)
    counted = reset_peak()
    usual = peak() if counted else 0
    for seed in range(FIRST, FIRST + ROUNDS):
        try:
            with in_time():
                damaged_round(whole, seed)
            assert not counted or peak() - usual < MEMORY, f"{peak() - usual} bytes more than usual"
        except (Exception, Hangs) as error:
            changed = damage(random.Random(seed), whole.objects)
            what = {name: None if data is None else len(data) for name, data in changed.items()}
            raise AssertionError(f"round {seed}, {what}: {type(error).__name__}: {str(error)[:3000]}") from error


def test_the_run_has_everything(whole: Whole) -> None:
    """What the rounds are worth depends on it."""
    specs = [spec for one in whole.stored.attempts for spec in one.specs.values()]
    assert {spec.kind for spec in specs} >= {"log", "stats", "values", "features", "layout", "step"}
    assert {spec.compression for spec in specs} == {"", "lz4", "zstd"}
    assert any(apart.lies_apart(spec) and spec.shards_across > 1 for spec in specs)
    assert any(spec.chunk[0] > 1 for spec in specs if spec.kind == "values")
    assert len(whole.stored.attempts) == 4 and len(whole.objects) > 100
