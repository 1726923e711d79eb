"""A store that goes away and comes back, and the buffer that holds what waits for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.errors import AccessRefused, StoreError
from smdbg.hooks import base
from smdbg.store import room as rooms
from smdbg.store import upload, writer
from smdbg.store.backend import Data, Listed, LocalBackend, Range

MIB = 1 << 20


class Away:
    """A folder that can be told to refuse puts, or to take its time."""

    copies = 0

    def __init__(self, url: str) -> None:
        self.url = url
        self.error: Callable[[str], Exception | None] = lambda key: None
        self.pause = 0.0
        self.puts: list[str] = []
        self._inner = LocalBackend(url)

    def go(self, away: bool) -> None:
        self.error = (lambda key: StoreError(f"{self.url}: away")) if away else lambda key: None

    def put(self, key: str, data: Data) -> None:
        time.sleep(self.pause)
        error = self.error(key)
        if error is not None:
            raise error
        self.puts.append(key)
        self._inner.put(key, data)

    def create(self, key: str, data: Data) -> bool:
        return self._inner.create(key, data)

    def get(self, key: str) -> bytes:
        return self._inner.get(key)

    def ranges(self, wanted: Sequence[Range]) -> list[bytes | None]:
        return self._inner.ranges(wanted)

    def list(self, prefix: str) -> list[Listed]:
        return self._inner.list(prefix)


@pytest.fixture
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Away]:
    """The backend that every hook of the test gets; puts are tried again quickly."""
    backend = Away(str(tmp_path / "run"))
    monkeypatch.setattr(base, "open_backend", lambda url, options=None: backend)
    monkeypatch.setattr(upload, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(upload, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(base, "CLOSE_SECONDS", 10.0)
    yield backend


def save(hook: smdbg.Hook, step: int, size: int = 1000) -> None:
    hook.save_tensor("x", np.full(size, step, np.float32))
    hook.save_scalar("loss", step, "losses")
    hook.end_step()


class Watched(writer.Room):
    """Remembers the most bytes that were ever taken, however they were."""

    most = 0

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "_used":
            Watched.most = max(Watched.most, value)


@pytest.mark.parametrize("when_full", ["drop", "block"])
def test_memory_is_bounded_while_the_store_is_slow(away: Away, monkeypatch: pytest.MonkeyPatch, when_full: str) -> None:
    monkeypatch.setattr(writer, "Room", Watched)
    Watched.most, away.pause, bound = 0, 0.02, 40 * MIB
    hook = smdbg.Hook(buffer_bytes=bound, when_full=when_full)
    for step in range(12):
        hook.save_tensor("wide", np.full(5 * MIB // 4, step, np.float32), "big")
        if step % 3 == 0:
            hook.save_tensor("part", np.full(7 * MIB // 4, step, np.float32), "big")  # rows where one is missing
        hook.save_tensor("small", np.full(50_000, step), "little")
        hook.end_step()
    room = hook._writer.room
    hook.close()
    assert 10 * MIB < Watched.most <= bound and room.peak <= bound
    assert room._used == 0  # all of it was given back
    run = smdbg.open_run(away.url)
    assert run.attempts()[0].dropped_rows == 0
    assert run.tensor("wide").values()[:, 0].tolist() == list(range(12))
    assert run.tensor("small").values()[:, -1].tolist() == list(range(12))


def test_policy_drop_counts_and_goes_on(away: Away, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "ROOM_SECONDS", 0.5)
    hook = smdbg.Hook(buffer_bytes=MIB)
    for step in range(3):
        save(hook, step)
    assert hook.flush()
    away.go(True)
    slowest, start = 0.0, time.monotonic()
    for step in range(3, 300):
        before = time.monotonic()
        save(hook, step, 20_000)
        slowest = max(slowest, time.monotonic() - before)
    assert 0.4 < slowest < 1.5, "waits once for room, then no more"
    assert time.monotonic() - start < 3.0
    assert smdbg.open_run(away.url).steps().tolist() == [0, 1, 2]
    away.go(False)
    assert hook.flush(10)
    for step in range(300, 303):
        save(hook, step)
    hook.close()
    run = smdbg.open_run(away.url)
    assert run.status == "completed"
    kept, losses = run.tensor("x").steps().tolist(), run.tensor("loss").steps().tolist()
    assert kept[:3] == [0, 1, 2] and kept[-3:] == [300, 301, 302] and 3 < len(kept) < 250
    assert set(kept) < set(losses), "what is small still finds room"
    logged, flags = run.step_table().step, run.step_table().flags
    assert logged[flags & 4 != 0].tolist() == [s for s in losses if s not in kept]
    facts = run.attempts()[0]
    assert facts.dropped_rows == (303 - len(kept)) + (303 - len(losses)) and not facts.switched_off
    assert facts.dropped_steps == 303 - len(kept)
    for step, value in zip(kept, run.tensor("x").values(), strict=True):
        assert (value == step).all()


def test_scalars_and_statistics_are_bounded_too(away: Away, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records that hold no large array still take memory: they must not pile up while the store is away."""
    monkeypatch.setattr(rooms, "ROOM_SECONDS", 0.1)
    hook = smdbg.Hook(buffer_bytes=MIB)
    save(hook, 0)
    assert hook.flush()
    away.go(True)
    for step in range(1, 20_000):
        for name in "abc":
            hook.save_scalar(name, step)
        hook.end_step()
    assert hook._writer.room.peak <= MIB
    waiting = drain(hook._writer._queue)
    assert 100 < sum(len(g.all_items()) for r in waiting for g in r.groups) < 2000 and len(waiting) < 2000
    away.go(False)
    hook.close()
    run = smdbg.open_run(away.url)
    kept = run.tensor("a").steps()
    assert run.status == "completed" and run.attempts()[0].dropped_steps == 19_999 - kept.size > 0
    assert run.tensor("a").values().tolist() == kept.tolist()


def drain(queue: Any) -> list[Any]:
    """Return what is in a queue, and leave it there."""
    held = [queue.get_nowait() for _ in range(queue.qsize())]
    for item in held:
        queue.put(item)
    return held


def test_policy_block_loses_nothing(away: Away) -> None:
    hook = smdbg.Hook(buffer_bytes=MIB, when_full="block")
    save(hook, 0)
    assert hook.flush()
    away.go(True)
    threading.Timer(1.0, away.go, [False]).start()
    start = time.monotonic()
    for step in range(1, 100):
        save(hook, step, 20_000)
    assert time.monotonic() - start > 0.8
    hook.close()
    run = smdbg.open_run(away.url)
    assert run.attempts()[0].dropped_rows == 0 and run.status == "completed"
    assert run.tensor("x").steps().tolist() == list(range(100))
    assert [v[0] for v in run.tensor("x").values()] == list(range(100))


def test_a_store_that_comes_back_gets_everything(away: Away, caplog: pytest.LogCaptureFixture) -> None:
    hook = smdbg.Hook()
    failures = iter(range(1000))
    away.error = lambda key: StoreError("no") if next(failures) % 3 else None  # two of three puts fail
    for step in range(50):
        save(hook, step, 5000)
        if step % 10 == 0:
            hook.flush()
    hook.close()
    run = smdbg.open_run(away.url)
    assert run.status == "completed" and next(failures) > 20
    assert [v[0] for v in run.tensor("x").values()] == list(range(50))
    assert run.attempts()[0].dropped_rows == 0


@pytest.mark.parametrize("when_full", ["drop", "block"])
def test_a_step_that_can_never_fit(away: Away, when_full: str) -> None:
    hook = smdbg.Hook(buffer_bytes=MIB, when_full=when_full)
    start = time.monotonic()
    for step in range(3):
        hook.save_tensor("huge", np.zeros(MIB), "big")
        for part in range(20):
            hook.save_tensor(f"part{part}", np.zeros(20_000, np.float32), "sum")
        hook.save_tensor("fits", np.full(10, step), "fit")
        hook.end_step()
    assert time.monotonic() - start < 5
    hook.close()
    run = smdbg.open_run(away.url)
    assert run.status == "completed" and run.tensors() == ["fits"]
    assert run.attempts()[0].dropped_steps == 3 and run.attempts()[0].dropped_rows == 6
    assert (run.step_table().flags & 4 != 0).all()


def test_a_store_that_never_comes_back(
    away: Away, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(base, "CLOSE_SECONDS", 0.5)
    monkeypatch.setattr(upload, "LOUD_AFTER", 0.2)
    hook = smdbg.Hook()
    save(hook, 0)
    assert hook.flush()
    away.error = lambda key: AccessRefused(f"{away.url}: the store refused access")
    save(hook, 1)
    time.sleep(0.4)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, "smdbg"):
        hook.close()
    assert time.monotonic() - start < 4 and "given up" in caplog.text
    run = smdbg.open_run(away.url)
    assert run.steps().tolist() == [0] and run.status == "running"
    assert not any(thread.name == "smdbg-writer" and thread.is_alive() for thread in threading.enumerate())


def test_the_commit_log_comes_last(away: Away) -> None:
    """Nothing is committed while a data object is still refused, though the log itself would be taken."""
    hook = smdbg.Hook()
    save(hook, 0)
    assert hook.flush()
    away.error = lambda key: StoreError("no") if "/tensors/" in key else None
    save(hook, 1)
    assert not hook.flush(0.5)
    assert smdbg.open_run(away.url).steps().tolist() == [0]
    away.go(False)
    assert hook.flush(5)
    assert smdbg.open_run(away.url).steps().tolist() == [0, 1]
    hook.close()
    last_data = max(i for i, key in enumerate(away.puts) if "/c/" in key and "/steps/" not in key)
    last_log = max(i for i, key in enumerate(away.puts) if "/steps/c/" in key)
    assert away.puts.count("workers/00000/steps/c/0/0") >= 2 and last_data < len(away.puts) and last_log > 0
