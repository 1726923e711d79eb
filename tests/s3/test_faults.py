"""What networks and stores do to a training on S3: a proxy between it and the real server does it on purpose."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.errors import SmdbgError, StoreError
from smdbg.store import remote, room, upload

sys.path.insert(0, str(Path(__file__).parent.parent))
from faulty_proxy import FAULTS, LATE, FaultyProxy, Request  # noqa: E402

WIDE = 1_100_000  # float32: 4.4 MB, in shards of its own
SAID = {
    "reset_request": "does not answer",
    "reset_answer": "does not answer",
    "lost_answer": "does not answer",
    "error_500": "an error of its own (InternalError)",
    "slow_down": "asks for a slower pace (SlowDown)",
    "expired": "credentials have expired or are no longer known (ExpiredToken)",
    "quota": "no room",
    "full": "no room",
    "hang": "does not answer",
    "stall": "does not answer",
    "refused": "does not answer",
}


@pytest.fixture
def proxy(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy that this process and its children use for S3; waits of the store are short."""
    with FaultyProxy("127.0.0.1", s3.ports["s3"]) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.endpoint)
        monkeypatch.setattr(upload, "LOUD_AFTER", 0.1)
        yield found


@pytest.fixture
def direct(s3: Any) -> dict[str, Any]:
    """Options for a reader that goes past the proxy."""
    return {"endpoint_url": s3.endpoint}


IMPATIENT = {"config_kwargs": {"read_timeout": 1, "connect_timeout": 1}}


def wide(step: int) -> np.ndarray:
    return np.arange(WIDE, dtype=np.float32) + step


def save(hook: smdbg.Hook, step: int) -> None:
    hook.save_scalar("loss", step / 8, "losses")
    hook.save_tensor("x", np.full((20, 10), step, np.float64), "narrow")
    if step % 5 == 0:
        hook.save_tensor("big", wide(step), "big")
    hook.end_step()


def assert_right(run: smdbg.Run, steps: list[int]) -> None:
    """Of these steps, and of no others, everything is there and right."""
    assert run.steps().tolist() == steps
    if not steps:
        return
    assert run.tensor("loss").values().tolist() == [step / 8 for step in steps]
    assert (run.tensor("x").values() == np.array(steps)[:, None, None]).all()
    assert run.tensor("x").stat("max")[1].tolist() == steps
    for step in (step for step in steps if step % 5 == 0):
        assert np.array_equal(run.tensor("big").value(step), wide(step))


def wait_until(true: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "slow"])
def test_a_fault_in_the_middle_of_a_run(
    proxy: FaultyProxy,
    direct: Any,
    bucket_url: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    """The training goes on, what was committed stays, the reason is told, and afterwards nothing is missing."""
    monkeypatch.setattr(remote, "PUT_SECONDS", 2.0)
    monkeypatch.setattr(remote, "SLOWEST", 5_000_000)
    monkeypatch.setattr(upload, "SETTLE", 0.3)
    hook = smdbg.Hook(bucket_url, storage_options=IMPATIENT, when_full="block")
    for step in range(5):
        save(hook, step)
    assert hook.flush()
    proxy.set(fault)
    with caplog.at_level(logging.WARNING, "smdbg"):
        for step in range(5, 15):
            save(hook, step)
        if fault == "refused":
            assert not hook.flush(0.5)
        else:
            wait_until(lambda: proxy.count(fault) > (4 if fault in ("hang", "stall") else 8))
        wait_until(lambda: "retrying" in caplog.text)
    assert SAID[fault] in caplog.text
    assert 1 <= caplog.text.count("retrying") <= 2, "twice where the machine itself stalls"
    seen = smdbg.open_run(bucket_url, storage_options=direct)
    # Where only the answer gets lost, the store has more than the writer knows of; it may still be of whole steps only.
    assert_right(seen, list(range(5 if "answer" not in fault else len(seen.steps()))))
    assert len(seen.steps()) >= 5
    proxy.set(None)
    assert hook.flush(60)
    save(hook, 15)
    hook.close()
    assert "takes data again" in caplog.text
    run = smdbg.open_run(bucket_url, storage_options=direct)
    assert run.status == "completed" and run.attempts()[0].dropped_rows == 0
    assert_right(run, list(range(16)))


def test_a_put_that_is_executed_late(
    proxy: FaultyProxy, direct: Any, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client gave it up and repeated it: it must not undo what the same object got since."""
    monkeypatch.setattr(upload, "SETTLE", 4.0)
    hook = smdbg.Hook(bucket_url, storage_options=IMPATIENT)
    proxy.set(LATE, lambda request: "/narrow/stats/c/" in request.path, times=1)
    save(hook, 0)
    assert hook.flush()
    assert proxy.count(LATE) == 1
    for step in range(1, 4):
        save(hook, step)
    assert hook.flush()
    time.sleep(2.5)  # it has been executed by now, in any case
    hook.close()
    assert_right(smdbg.open_run(bucket_url, storage_options=direct), list(range(4)))


def test_a_slow_server(proxy: FaultyProxy, direct: Any, bucket_url: str) -> None:
    """At 1 MB/s everything arrives, in its time."""
    proxy.set("slow")
    hook = smdbg.Hook(bucket_url, when_full="block")
    for step in range(4):
        save(hook, step)
    hook.close()
    assert proxy.count("slow") > 5
    run = smdbg.open_run(bucket_url, storage_options=direct)
    assert run.status == "completed"
    assert_right(run, list(range(4)))


def test_drop_counts_what_it_drops_and_goes_on(
    proxy: FaultyProxy, direct: Any, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "ROOM_SECONDS", 0.3)
    hook = smdbg.Hook(bucket_url, buffer_bytes=1 << 20)
    for step in range(3):
        hook.save_tensor("y", np.full(10_000, step), "narrow")
        hook.end_step()
    assert hook.flush()
    proxy.set("error_500")
    hook.save_tensor("y", np.full(10_000, 3), "narrow")
    hook.end_step()
    wait_until(lambda: proxy.count("error_500"))  # from here on the writer waits, and takes no more steps
    for step in range(4, 60):
        hook.save_tensor("y", np.full(10_000, step), "narrow")
        hook.end_step()
    proxy.set(None)
    assert hook.flush(60)
    for step in range(60, 70):
        hook.save_tensor("y", np.full(10_000, step), "narrow")
        hook.end_step()
    hook.close()
    run = smdbg.open_run(bucket_url, storage_options=direct)
    kept = run.tensor("y").steps().tolist()
    assert run.status == "completed"
    assert kept[:3] == [0, 1, 2] and kept[-10:] == list(range(60, 70)) and 14 < len(kept) < 50
    assert (run.tensor("y").values() == np.array(kept)[:, None]).all()
    told = run.attempts()[0]
    assert told.dropped_steps == told.dropped_rows == 70 - len(kept)
    table = run.step_table()
    assert table.step[table.flags & 4 != 0].tolist() == [s for s in table.step.tolist() if s not in kept]


@pytest.mark.parametrize(("what", "resume"), [("root", False), ("worker", False), ("both", False), ("both", True)])
def test_a_lost_answer_to_the_first_puts(
    proxy: FaultyProxy, direct: Any, bucket_url: str, what: str, resume: bool
) -> None:
    """The run is made, but nobody says so: it is recognised as ours, and no attempt is left behind."""
    lost: set[str] = set()

    def affects(request: Request) -> bool:
        if not request.create or request.path in lost:
            return False
        if what != "both" and ("workers/00000" in request.path) != (what == "worker"):
            return False
        lost.add(request.path)
        return True

    proxy.set("lost_answer", affects)
    hook = smdbg.Hook(bucket_url, resume=resume)
    assert proxy.count("lost_answer") == len(lost) > 0
    save(hook, 0)
    hook.close()
    run = smdbg.open_run(bucket_url, storage_options=direct)
    assert [found.attempt for found in run.attempts()] == [0] and run.status == "completed"
    assert_right(run, [0])


@pytest.mark.parametrize("fault", ["reset_request", "error_500", "slow_down", "lost_answer"])
def test_a_run_begins_in_spite_of_a_hiccup(proxy: FaultyProxy, direct: Any, bucket_url: str, fault: str) -> None:
    proxy.set(fault, times=2)
    hook = smdbg.Hook(bucket_url)
    save(hook, 0)
    hook.close()
    assert proxy.count(fault) == 2
    assert_right(smdbg.open_run(bucket_url, storage_options=direct), [0])


def test_new_credentials_are_picked_up(
    proxy: FaultyProxy, s3: Any, direct: Any, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old ones expire; somebody puts new ones where the first were found."""
    monkeypatch.setattr(remote, "RENEW_SECONDS", 0.2)
    old, new = s3.identities[0], s3.identities[1]
    hook = smdbg.Hook(bucket_url)
    save(hook, 0)
    assert hook.flush()
    proxy.set("expired", lambda request: request.access_key == old.access_key)
    save(hook, 1)
    assert not hook.flush(1)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", new.access_key)
        patch.setenv("AWS_SECRET_ACCESS_KEY", new.secret_key)
        assert hook.flush(30)
        hook.close()
    assert proxy.seen[-1][0].access_key == new.access_key
    run = smdbg.open_run(bucket_url, storage_options=direct)
    assert run.status == "completed"
    assert_right(run, [0, 1])


def test_two_who_resume_at_the_same_moment(proxy: FaultyProxy, direct: Any, bucket_url: str) -> None:
    """Each gets an attempt of its own, and neither writes into the other's."""
    first = smdbg.Hook(bucket_url)
    save(first, 0)
    assert first.flush()
    hooks: dict[int, smdbg.Hook] = {}
    ready = threading.Barrier(3)

    def resume(number: int) -> None:
        ready.wait()
        hooks[number] = smdbg.Hook(bucket_url, resume=True)
        for _ in range(3):
            hooks[number].save_scalar("who", number)
            hooks[number].end_step()

    threads = [threading.Thread(target=resume, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for hook in (*hooks.values(), first):
        hook.close()
    run = smdbg.open_run(bucket_url, storage_options=direct)
    assert [found.attempt for found in run.attempts()] == [0, 1, 2, 3] and run.status == "completed"
    alone = [smdbg.open_run(bucket_url, storage_options=direct, attempt=n) for n in range(4)]
    assert_right(alone[0], [0])
    who = [one.tensor("who").values().tolist() for one in alone[1:]]
    assert sorted(who) == [[0] * 3, [1] * 3, [2] * 3]


# --- reading ---


def test_a_reader_meets_faults(proxy: FaultyProxy, bucket_url: str) -> None:
    """It gets the right values or an error that says what is wrong, never anything else."""
    with smdbg.Hook(bucket_url) as hook:
        for step in range(6):
            save(hook, step)
    for fault in ("reset_answer", "lost_answer", "error_500", "reset_request"):
        proxy.set(fault, times=2)
        assert_right(smdbg.open_run(bucket_url), list(range(6)))
        assert proxy.left == 0
    run = smdbg.open_run(bucket_url)
    for fault in ("error_500", "expired", "full"):
        proxy.set(fault)
        with pytest.raises(StoreError, match=bucket_url):
            run.tensor("big").value(5)
        with pytest.raises(StoreError, match=bucket_url):
            smdbg.open_run(bucket_url)
    proxy.set(None)
    assert_right(run, list(range(6)))
    for left in (1, 2, 3, 5, 8):  # the fault begins somewhere on the way
        good = iter(range(left))
        proxy.set("expired", lambda request, good=good: next(good, None) is None)  # type: ignore[misc]
        with contextlib.suppress(SmdbgError):
            assert_right(smdbg.open_run(bucket_url), list(range(6)))


# --- how a process ends ---

CHILD = """
import sys, time, numpy as np, smdbg
hook = smdbg.Hook(sys.argv[1])
for step in range(3):
    hook.save_tensor("x", np.full(1000, step))
    hook.end_step()
hook.flush()
print("saved", flush=True)
sys.stdin.readline()
for step in range(3, 6):
    hook.save_tensor("x", np.full(1000, step))
    hook.end_step()
hook.save_tensor("x", np.full(1000, 6))  # still open
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, "failed: SIGTERM"), (signal.SIGINT, "failed: Keyboard")])
def test_a_signal_while_the_store_is_away(
    proxy: FaultyProxy, direct: Any, bucket_url: str, sent: signal.Signals, status: str
) -> None:
    """The process waits with its end until the store is back, and nothing is lost."""
    command = [sys.executable, "-c", CHILD, bucket_url]
    restore = signal.signal(signal.SIGINT, signal.default_int_handler)  # one that is ignored here is so in a child
    try:
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ))
    finally:
        signal.signal(signal.SIGINT, restore)
    assert child.stdin is not None and child.stdout is not None
    try:
        assert child.stdout.readline() == b"saved\n"
        proxy.set("error_500")
        child.stdin.write(b"go on\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(sent)
        failed = proxy.count("error_500")
        wait_until(lambda: proxy.count("error_500") > failed + 3)
        assert child.poll() is None
        proxy.set(None)
        assert child.wait(30) == -sent
    finally:
        child.kill()
        child.communicate()
    run = smdbg.open_run(bucket_url, storage_options=direct)
    assert run.status.startswith(status)
    assert run.tensor("x").values()[:, 0].tolist() == list(range(7))
