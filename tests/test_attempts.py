"""Several lives of a worker, several workers, and what the run's status says of them."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.errors import RunExists
from smdbg.store.backend import open_backend
from smdbg.store.reader import StoredRun


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Return every file with its size and time of change."""
    found = [(str(p.relative_to(folder)), p.stat()) for p in folder.rglob("*")]
    return sorted((name, facts.st_size, facts.st_mtime_ns) for name, facts in found)


def write(url: Path, steps: Any, mark: float, **options: Any) -> smdbg.Hook:
    """Save `x` = [step, mark] at each step; the hook stays open."""
    hook = smdbg.Hook(url, **options)
    for step in steps:
        hook.set_step(step)
        hook.save_tensor("x", np.array([step, mark]))
        hook.save_scalar("loss", step + mark, "losses")
        hook.end_step()
    return hook


def age(url: Path, seconds: float) -> None:
    """Make every object of a run older."""
    for path in url.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - seconds,) * 2)


def test_a_later_attempt_supersedes_from_its_first_step(tmp_path: Path) -> None:
    url = tmp_path / "run"
    first = write(url, range(1731), 0.25)
    assert first.flush()
    first._writer = None  # as if killed: it never closes
    second = smdbg.Hook(url, resume=True)
    assert second.step == 1731
    second.set_step(1500)
    assert second.mode_step == 1500
    for step in range(1500, 1800):
        second.save_tensor("x", np.array([step, 0.5]))
        second.save_scalar("loss", step + 0.5, "losses")
        second.end_step()
    second.close()
    assert sorted(p.name for p in (url / "workers").iterdir()) == ["00000", "00000.1", "zarr.json"]

    latest = smdbg.open_run(url)
    assert latest.steps().tolist() == list(range(1800)) and latest.status == "completed"
    marks = latest.tensor("x").values()[:, 1].tolist()
    assert marks == [0.25] * 1500 + [0.5] * 300
    steps, loss = latest.tensor("loss").stat("mean")
    assert steps.tolist() == list(range(1800)) and loss.tolist() == [
        s + m for s, m in zip(range(1800), marks, strict=True)
    ]
    found = latest.stats("mean", collection="losses")
    assert found.steps.tolist() == list(range(1800)) and found.present.all()
    table = latest.step_table()
    assert table.step.tolist() == table.mode_step.tolist() == list(range(1800))
    assert table.attempt.tolist() == [0] * 1500 + [1] * 300
    assert latest.tensor("x").value(1499).tolist() == [1499, 0.25]
    assert latest.tensor("x").value(1500).tolist() == [1500, 0.5]

    facts = latest.attempts(0)
    assert [(f.attempt, f.first_step, f.last_step, f.status) for f in facts] == [
        (0, 0, 1730, "running"),
        (1, 1500, 1799, "completed"),
    ]
    old, new, every = (smdbg.open_run(url, attempt=which) for which in (0, 1, "all"))
    assert old.steps().tolist() == list(range(1731)) and old.tensor("x").value(1600).tolist() == [1600, 0.25]
    assert new.steps().tolist() == list(range(1500, 1800)) and new.tensor("x").value(1600).tolist() == [1600, 0.5]
    assert len(every.step_table().step) == 1731 + 300
    assert every.steps().tolist() == list(range(1800))


def test_an_attempt_that_saved_nothing_supersedes_nothing(tmp_path: Path) -> None:
    url = tmp_path / "run"
    write(url, range(10), 0.25).close()
    smdbg.Hook(url, resume=True).close()
    write(url, range(8, 12), 0.5, resume=True).close()
    run = smdbg.open_run(url)
    assert run.tensor("x").values()[:, 1].tolist() == [0.25] * 8 + [0.5] * 4
    assert [f.attempt for f in run.attempts()] == [0, 1, 2]


def test_resume_without_a_run_begins_one(tmp_path: Path) -> None:
    write(tmp_path / "run", range(2), 0, resume=True).close()
    assert smdbg.open_run(tmp_path / "run").attempts()[0].attempt == 0


def test_mode_steps_go_on_after_a_resume(tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run") as hook:
        for step in range(9):
            hook.set_mode("eval" if step % 3 == 2 else "train")
            hook.save_scalar("x", step)
            hook.end_step()
        kept = hook.state_dict()
    with smdbg.Hook(tmp_path / "run", resume=True) as hook:
        hook.set_mode("train")
        assert (hook.step, hook.mode_step) == (9, 6)
        hook.set_step(4)  # steps 0, 1, 3 were of training
        assert hook.mode_step == 3
        hook.load_state_dict(kept)
        assert (hook.step, hook.mode_step, hook.state_dict()) == (9, 6, kept)
        hook.save_scalar("x", 9)
    assert smdbg.open_run(tmp_path / "run").step_table().mode_step[-1] == 6


@pytest.mark.parametrize("state", ["completed", "running"])
def test_an_existing_run_is_left_alone(tmp_path: Path, state: str) -> None:
    url = tmp_path / "run"
    hook = write(url, range(5), 0.25)
    assert hook.flush()
    if state == "completed":
        hook.close()
    before = listing(tmp_path)
    for options in ({}, {"world_size": 2}, {"rank": 1, "world_size": 2}):
        with pytest.raises(RunExists, match="a run exists: pass resume=True to continue it, or another URL"):
            smdbg.Hook(url, **options)
    quiet = write(url, range(5), 0.75, on_error="off")
    quiet.close()
    assert listing(tmp_path) == before
    hook.close()
    assert smdbg.open_run(url).tensor("x").values()[:, 1].tolist() == [0.25] * 5


def test_four_workers_at_once(tmp_path: Path) -> None:
    url = tmp_path / "run"
    hooks: dict[int, smdbg.Hook] = {}
    ready = threading.Barrier(4)

    def begin(rank: int) -> None:
        ready.wait()
        hooks[rank] = write(url, range(20), rank / 8, rank=rank, world_size=4)

    threads = [threading.Thread(target=begin, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(hooks) == [0, 1, 2, 3]
    for rank in (2, 0, 3):
        hooks[rank].close()
        assert smdbg.open_run(url).status == "running"
    hooks[1].close()
    run = smdbg.open_run(url)
    assert run.status == "completed" and run.workers() == [0, 1, 2, 3] and run.world_size == 4
    for rank in range(4):
        assert run.tensor("x").values(worker=rank).tolist() == [[s, rank / 8] for s in range(20)]
        assert run.stats("mean", collection="losses", worker=rank).matrix[:, 0].tolist() == [
            s + rank / 8 for s in range(20)
        ]
    with pytest.raises(RunExists):
        smdbg.Hook(url, rank=2, world_size=4)
    resumed = [write(url, range(15, 18), 9, rank=rank, world_size=4, resume=True) for rank in (0, 1)]
    assert all(hook.flush() for hook in resumed)
    later = smdbg.open_run(url)
    assert later.status == "running"
    assert [later.steps(worker=rank).size for rank in range(4)] == [18, 18, 20, 20]
    for hook in resumed:
        hook.close()
    later.refresh()
    assert later.status == "completed"


def test_only_one_worker_writes_if_asked(tmp_path: Path) -> None:
    hooks = [write(tmp_path / "run", range(3), 0, rank=r, world_size=2, workers="one") for r in range(2)]
    hooks[0].close()
    assert smdbg.open_run(tmp_path / "run").workers() == [0]
    assert smdbg.open_run(tmp_path / "run").status == "completed"
    hooks[1].close()


def test_ranks_come_from_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    write(tmp_path / "run", range(3), 0).close()
    run = smdbg.open_run(tmp_path / "run")
    assert (run.workers(), run.world_size) == ([2], 3)


def test_one_failed_worker_fails_the_run(tmp_path: Path) -> None:
    url = tmp_path / "run"
    with pytest.raises(KeyError), smdbg.Hook(url, rank=0, world_size=2) as hook:
        hook.save_scalar("x", 1)
        raise KeyError("no such\nlayer")
    assert smdbg.open_run(url).status == r"failed: KeyError: 'no such\nlayer'"
    write(url, range(3), 0, rank=1, world_size=2).close()
    run = smdbg.open_run(url)
    assert run.status.startswith("failed: KeyError") and run.tensor("x").workers() == [0, 1]
    write(url, range(3), 0, rank=0, world_size=2, resume=True).close()
    run.refresh()
    assert run.status == "completed"


def test_running_lost_completed(tmp_path: Path) -> None:
    url = tmp_path / "run"
    hook = smdbg.Hook(url)
    empty = StoredRun(open_backend(url))
    assert empty.status() == "running" and empty.status(time.time() + 90) == "lost"
    hook.save_scalar("x", 1)
    hook.end_step()
    assert hook.flush()
    stored = StoredRun(open_backend(url))
    assert stored.status() == "running" and stored.status(time.time() + 55) == "running"
    assert stored.status(time.time() + 65) == "lost"
    age(url, 300)
    assert smdbg.open_run(url).status == "lost"
    os.utime(url / "workers/00000/steps/c/0/0")  # the heartbeat alone counts
    assert smdbg.open_run(url).status == "running"
    hook.close()
    age(url, 300)
    assert smdbg.open_run(url).status == "completed"


def test_a_worker_that_never_began_leaves_the_run_lost(tmp_path: Path) -> None:
    url = tmp_path / "run"
    write(url, range(3), 0, rank=0, world_size=2).close()
    assert smdbg.open_run(url).status == "running"
    age(url, 300)
    assert smdbg.open_run(url).status == "lost"


def test_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle worker puts its log again, also when the newest chunk of the log is just full, and before any step."""
    from smdbg.store import writer

    monkeypatch.setattr(writer, "HEARTBEAT_SECONDS", 0.2)
    for rows in (0, 3, 4096):
        url = tmp_path / str(rows)
        hook = smdbg.Hook(url)
        for step in range(rows):
            hook.save_scalar("x", step)
            hook.end_step()
        assert hook.flush()
        age(url, 300)
        deadline = time.monotonic() + 5
        while smdbg.open_run(url).status != "running" and time.monotonic() < deadline:
            time.sleep(0.05)
        run = smdbg.open_run(url)
        assert run.status == "running", rows
        assert run.steps().size == rows
        hook.save_scalar("x", rows)
        hook.close()
        assert smdbg.open_run(url).tensor("x").values().tolist() == list(range(rows + 1))


def test_a_superseded_writer_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smdbg.store import writer

    monkeypatch.setattr(writer, "HEARTBEAT_SECONDS", 0.2)
    old = write(tmp_path / "run", range(3), 0.25)
    new = write(tmp_path / "run", range(1, 4), 0.5, resume=True)
    deadline = time.monotonic() + 5
    while old._active() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not old._active() and new._active()
    old.save_scalar("loss", 7)
    old.close()
    new.close()
    run = smdbg.open_run(tmp_path / "run")
    assert run.status == "completed" and run.tensor("x").values()[:, 1].tolist() == [0.25, 0.5, 0.5, 0.5]
