"""The hook under pressure: a store that is away, other threads, forks, errors of odd kinds, many numbers."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.errors import StoreError
from smdbg.store.backend import LocalBackend, Missing
from smdbg.store.verify import verify


def fail_puts(monkeypatch: pytest.MonkeyPatch, error: Exception, part: str = "") -> list[str]:
    """Make puts of keys with `part` in them fail; returns the keys that were refused."""
    plain, refused = LocalBackend.put, []

    def put(self: LocalBackend, key: str, data: Any) -> None:
        if part in key:
            refused.append(key)
            raise error
        plain(self, key, data)

    monkeypatch.setattr(LocalBackend, "put", put)
    return refused


def test_a_put_that_fails_for_good_is_never_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last words of a writer that broke down list what was committed before, and not what was lost."""
    url = tmp_path / "run"
    hook = smdbg.Hook(url)
    for step in range(6):
        if step == 3:
            assert hook.flush()
            fail_puts(monkeypatch, RuntimeError("odd"), "metrics/float64/c")
        hook.save_scalar("x", step)
        hook.end_step()
    hook.close()
    monkeypatch.undo()
    run = smdbg.open_run(url)
    assert run.status.startswith("failed: hook switched off") and run.steps().tolist() == [0, 1, 2]
    assert run.tensor("x").values().tolist() == [0, 1, 2]
    assert not verify(LocalBackend(str(url))).damage
    run.refresh()
    assert run.status.startswith("failed: hook switched off")


def test_a_put_that_finds_nothing_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = smdbg.Hook(tmp_path / "run")
    assert hook.flush()
    refused = fail_puts(monkeypatch, Missing("a bucket that is being made"))
    hook.save_scalar("x", 1)
    hook.end_step()
    while len(refused) < 2:
        time.sleep(0.01)
    monkeypatch.undo()
    hook.close()
    assert smdbg.open_run(tmp_path / "run").status == "completed"


def test_closing_while_the_training_waits_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `block` a training may wait for ever, but not once somebody ends it."""
    monkeypatch.setattr("smdbg.hooks.base.CLOSE_SECONDS", 0.6)
    hook = smdbg.Hook(tmp_path / "run", buffer_bytes=64 << 10, when_full="block")
    assert hook.flush()
    fail_puts(monkeypatch, StoreError("away"))
    saved: list[int] = []

    def train() -> None:
        for step in range(100_000):
            hook.save_scalar("x", step)
            hook.end_step()
            saved.append(step)

    training = threading.Thread(target=train, daemon=True)
    training.start()
    count = -1
    while len(saved) != count:  # until it waits
        count = len(saved)
        time.sleep(0.5)
    assert count < 100_000
    closing = threading.Thread(target=hook.close, daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()
    training.join(30)
    assert len(saved) == 100_000, "and the training goes on"


@pytest.mark.parametrize("call", ["save_scalar", "save_tensor"])
def test_a_child_forked_while_a_thread_saves(tmp_path: Path, call: str) -> None:
    """The lock that another thread held at the fork is held for ever in the child, which must not ask for it."""
    with smdbg.Hook(tmp_path / "run") as hook:
        hook.save_scalar("x", 1.0)
        held, free = threading.Event(), threading.Event()

        def hold() -> None:
            with hook._guard_lock:
                held.set()
                free.wait(20)

        threading.Thread(target=hold, daemon=True).start()
        held.wait()
        child = os.fork()
        if child == 0:
            getattr(hook, call)("x", 2.0)
            os._exit(7)
        free.set()
        deadline = time.monotonic() + 20
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        if ended[0] == 0:
            os.kill(child, 9)
        assert os.waitstatus_to_exitcode(ended[1]) == 7


class Speechless(Exception):
    """An error that cannot say what it is."""

    def __str__(self) -> str:
        """Fail."""
        raise ValueError("no words")


class Odd:
    """A value whose conversion fails so."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        """Fail."""
        raise Speechless


@pytest.mark.parametrize("calls", ["collection", "value"])
def test_odd_arguments_do_not_reach_the_training(tmp_path: Path, calls: str) -> None:
    with smdbg.Hook(tmp_path / "run") as hook:
        hook.save_scalar("x", 1.0)
        hook.end_step()
        hook.save_scalar("x", 1.0)
        if calls == "collection":
            hook.save_scalar("x", 2.0, ["no", "name"])  # type: ignore[arg-type]
        else:
            hook.save_tensor("y", Odd())
        hook.end_step()
    status = smdbg.open_run(tmp_path / "run").status
    assert status == "completed" if calls == "collection" else status.startswith("failed: hook switched off")


def test_many_recordings_of_one_number_stay_within_the_buffer(tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run", buffer_bytes=256 << 10) as hook:
        for count in (5000, 20_000):
            for value in range(count):
                hook.save_scalar("x", float(value))
            hook.end_step()
            assert hook.flush()
    run = smdbg.open_run(tmp_path / "run")
    assert run.tensor("x").steps().tolist() == [0] and run.attempts(0)[0].dropped_steps == 1
    assert run.tensor("x").stat("count")[1].tolist() == [5000] and run.tensor("x").values().tolist() == [2499.5]


def test_a_number_that_was_complex_once(tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run") as hook:
        for value in (1j, -3.0, -3.0):
            hook.save_scalar("z", value)
            hook.end_step()
        for _ in range(4):
            hook.save_scalar("large", 1e308)
        hook.end_step()
    run = smdbg.open_run(tmp_path / "run")
    assert run.tensor("z").stat("min")[1].tolist() == [1, -3, -3] and run.tensor("z").value(1).dtype == np.float64
    assert run.tensor("large").value(3) == 1e308


def test_a_step_without_room_spends_no_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smdbg.store.room.ROOM_SECONDS", 0.01)
    with smdbg.Hook(tmp_path / "run", buffer_bytes=9000, raw_budget=6000) as hook:
        room = hook._writer.room  # type: ignore[union-attr]
        hook.save_tensor("a.weight", np.zeros(500))
        assert room.take(room.bound - room._used)
        hook.end_step()
        assert hook._raw_left == 6000
        room.give(9000 - 8000)
