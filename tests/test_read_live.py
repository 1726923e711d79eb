"""Following a run that a process of its own writes: whole steps, new workers and attempts, and its end."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.cli import run as cli
from smdbg.cli.exits import Exit
from smdbg.errors import DamagedData, OnlyStatistics
from smdbg.store import format as layout
from smdbg.store import reader
from smdbg.store.backend import Fetched, Listed, LocalBackend, Range
from smdbg.store.shard import with_crc

WRITER = """
import sys, numpy as np, smdbg
hook = smdbg.Hook(sys.argv[1], when_full="block", reduction_config=smdbg.ReductionConfig(save_raw_tensor=True))
for step in range(int(sys.argv[2])):
    hook.save_scalar("loss", step / 2, "losses")
    hook.save_tensor("x", np.full(2000, step, np.float32), "values")
    if step % 40 == 0:
        hook.save_tensor(f"late{step}", np.arange(step + 1), "late")
    if step % 500 == 0:
        hook.save_tensor("wide", np.full(1_200_000, step, np.float32), "wide")
    hook.end_step()
    if step % 25 == 0:
        hook.flush()
hook.close()
"""


def test_a_process_that_writes(tmp_path: Path) -> None:
    """Beyond a chunk of the log: every step that is seen is there with all its values, and so is the end."""
    url, steps = str(tmp_path / "run"), layout.LOG_ROWS + 300
    child = subprocess.Popen([sys.executable, "-c", WRITER, url, str(steps)])
    try:
        while True:
            ended = child.poll() is not None
            try:
                run = smdbg.open_run(url)
                break
            except (smdbg.errors.RunNotFound, smdbg.errors.NotARun):  # the first objects are being put
                assert not ended
        sizes = set()
        deadline = time.monotonic() + 120
        while True:
            ended = child.poll() is not None
            run.refresh()
            seen = run.steps()
            assert seen.tolist() == list(range(seen.size)) and run.damaged == []
            sizes.add(seen.size)
            if seen.size:
                assert np.array_equal(run.tensor("loss").values(), seen / 2)
                last = int(seen[-1])
                assert run.tensor("x").values([0, last])[:, ::999].tolist() == [[0] * 3, [last] * 3]
                late, wide = last // 40 * 40, last // 500 * 500
                assert run.tensor(f"late{late}").value(late).tolist() == list(range(late + 1))
                assert run.tensor("wide").value(wide, index=-1) == wide
            if ended:
                break
            assert run.status == "running" or seen.size == steps
            assert time.monotonic() < deadline
    finally:
        child.kill()
        child.wait()
    assert run.status == "completed" and seen.size == steps and len(sizes) > 3


class Asked(LocalBackend):
    """Notes what is read."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked: list[str] = []
        self.read: list[str] = []

    def newer(self, wanted: Sequence[tuple[str, str]]) -> list[Fetched | None]:
        self.asked += [key for key, _ in wanted]
        found = super().newer(wanted)
        self.read += [key for (key, _), item in zip(wanted, found, strict=True) if item and not item.same]
        return found

    def list(self, prefix: str) -> list[Listed]:
        self.asked.append(f"list {prefix}")
        return super().list(prefix)

    def ranges(self, wanted: Sequence[Range]) -> list[bytes | None]:
        self.asked += [f"{w.key}:{w.start}" for w in wanted]
        return super().ranges(wanted)

    def __call__(self) -> list[str]:
        asked, self.asked = self.asked, []
        return asked


def mark(url: Path, value: int, chunk: int = 0) -> None:
    """Put the mark behind the last row of the log by which a worker tells that it writes (1) or has ended (2)."""
    path = url / f"workers/00000/steps/c/{chunk}/0"
    rows = np.frombuffer(path.read_bytes()[:-4], "<i8").reshape(layout.LOG_ROWS, -1).copy()
    rows[np.argmin(rows[:, layout.END_TIME] != 0), 0] = value
    path.write_bytes(with_crc(rows.tobytes()))


def test_nothing_new_costs_one_look(tmp_path: Path) -> None:
    url, log = tmp_path / "run", "workers/00000/steps/c/0/0"
    hook = smdbg.Hook(url)
    hook.save_scalar("x", 1)
    hook.end_step()
    assert hook.flush()
    mark(url, 1)
    run = smdbg.open_run(url)
    backend = run._stored.backend = Asked(str(url))
    before = run._stored.attempts
    for _ in range(3):
        run.refresh()
        assert backend() == [log] and backend.read == []
        assert run._stored.attempts[0] is before[0], "nothing is parsed again"
    (url / log).touch()  # a heartbeat
    run.refresh()
    assert backend() == [log] and run.status == "running"
    hook.close()
    mark(url, 2)
    run.refresh()
    assert backend()[:2] == [log, "workers/00000/zarr.json"] and run.status == "completed"
    run.refresh()
    assert backend() == ["workers/00000/zarr.json", "list workers"], "it may be pruned or resumed"


def test_tables_are_read_on_from_where_they_were(tmp_path: Path) -> None:
    url = tmp_path / "run"
    with smdbg.Hook(url) as hook:
        for step in range(900):
            for number in range(30):
                hook.save_tensor(f"t{number}", np.full(2, step), "c")
            hook.end_step()
            if step == 500:
                assert hook.flush()
                run = smdbg.open_run(url)
                assert run.tensor("t1").stat("mean")[1].tolist() == list(range(run.steps().size))
                spec = run._stored.attempts[0].specs["c/stats"]
                held = run.steps().size
    backend = run._stored.backend = Asked(str(url))
    run.refresh()
    backend()
    assert run.tensor("t1").stat("mean")[1].tolist() == list(range(900))
    first = held // spec.chunk[0] * (spec.chunk_bytes + 4)
    assert backend() == [f"workers/00000/c/stats/c/0/0/0:{first}"]


def test_new_workers_and_attempts_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = tmp_path / "run"

    def write(value: int, **options: Any) -> smdbg.Hook:
        hook = smdbg.Hook(url, world_size=2, **options)
        hook.set_step(value)
        hook.save_scalar("x", value)
        hook.end_step()
        assert hook.flush()
        return hook

    first = write(0, rank=0)
    run = smdbg.open_run(url)
    assert run.workers() == [0]
    second = write(0, rank=1)
    run.refresh()
    assert run.workers() == [0, 1], "a writer that was announced is looked for"
    backend = run._stored.backend = Asked(str(url))
    run.refresh()
    assert "list workers" not in backend()
    second.close()
    run.refresh()
    third = write(1, rank=1, resume=True)
    run.refresh()
    assert run.tensor("x").values(worker=1).tolist() == [0, 1], "after an end the next attempt is looked for"
    backend()
    fourth = write(2, rank=0, resume=True)  # the one before never ended
    monkeypatch.setattr(reader, "LOOK_SECONDS", 0)
    run.refresh()
    assert "list workers" in backend()
    assert run.tensor("x").values().tolist() == [0, 2]
    for hook in (first, third, fourth):
        hook.close()


def test_the_end_is_seen_with_all_steps(tmp_path: Path) -> None:
    """The group that tells of the end may be read after a log that lacks the last rows: then that is read again."""
    url = tmp_path / "run"
    hook = smdbg.Hook(url)
    hook.save_scalar("x", 0)
    hook.end_step()
    assert hook.flush()
    run = smdbg.open_run(url)

    class Slow(LocalBackend):
        def newer(self, wanted: Sequence[tuple[str, str]]) -> list[Fetched | None]:
            out = []
            for item in wanted:
                out += super().newer([item])
                if hook._active() and item[0].endswith("steps/c/0/0"):
                    hook.save_scalar("x", 1)
                    hook.close()
            return out

    run._stored.backend = Slow(str(url))
    run.refresh()
    run.refresh()
    assert run.status == "completed" and run.tensor("x").values().tolist() == [0, 1]


@pytest.mark.parametrize("rows", [layout.LOG_ROWS, 2 * layout.LOG_ROWS, 2 * layout.LOG_ROWS + 1])
def test_following_over_the_border_of_a_chunk(tmp_path: Path, rows: int) -> None:
    url = tmp_path / "run"
    hook = smdbg.Hook(url)
    hook.save_scalar("x", 0)
    hook.end_step()
    assert hook.flush()
    run = smdbg.open_run(url)
    for step in range(1, rows):
        hook.save_scalar("x", step)
        hook.end_step()
        if step in (4094, 4095, 4096):
            assert hook.flush()
            run.refresh()
            assert run.step_table().step.size == step + 1
    assert hook.flush()
    run.refresh()
    assert run.step_table().step.tolist() == list(range(rows))
    hook.close()
    run.refresh()
    assert run.status == "completed" and run.step_table().step.size == rows


def test_a_run_that_is_pruned_while_it_is_open(tmp_path: Path) -> None:
    """A reader with the log of before meets true values or missing objects, and after a refresh what is left."""
    url = tmp_path / "run"
    with smdbg.Hook(url) as hook:
        for step in range(6):
            hook.save_tensor("wide", np.full(1_100_000, step, np.float32), "wide")
            hook.save_tensor("narrow", np.full(5, step), "narrow")
            hook.end_step()
    run = smdbg.open_run(url)
    assert run.tensor("narrow").value(1).tolist() == [1] * 5
    for collection in ("wide", "narrow"):
        assert cli(["prune", str(url), "--collection", collection, "--steps", "1:5:2", "--yes"]) is Exit.CLEAN
    for name in ("wide", "narrow"):
        for step in range(6):
            try:
                assert (run.tensor(name).value(step) == step).all()
            except DamagedData:
                assert step in (1, 3)
    run.refresh()
    for name in ("wide", "narrow"):
        assert run.tensor(name).value_steps().tolist() == [0, 2, 4, 5]
        with pytest.raises(OnlyStatistics):
            run.tensor(name).value(1)
        assert (run.tensor(name).value(2) == 2).all()
    assert run.status == "completed"
