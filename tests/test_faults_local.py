"""What happens to a training that writes into a folder: full and read-only disks, clocks, forks, two at once."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import smdbg

HEAD = """
import os, resource, sys, time
from pathlib import Path
import numpy as np
import smdbg
from smdbg.store import room, upload
url, steps = Path(sys.argv[1]), 0

def save(hook, count=1, size=20_000):
    global steps
    for _ in range(count):
        hook.save_scalar("loss", steps / 8, "losses")
        hook.save_tensor("x", np.full(size, steps, np.float32), "narrow")
        hook.end_step()
        steps += 1

def check(status, dropped=False):
    run = smdbg.open_run(url)
    assert run.status == status, run.status
    told = run.attempts()[0]
    losses, kept = run.tensor("loss").steps().tolist(), run.tensor("x").steps().tolist()
    assert (told.dropped_rows > 0) is dropped, told
    if dropped:
        assert told.dropped_rows == 2 * steps - len(losses) - len(kept), (told, losses, kept)
    else:
        assert losses == kept == list(range(steps))
    assert run.tensor("loss").values().tolist() == [step / 8 for step in losses]
    for step, value in zip(kept, run.tensor("x").values(kept), strict=True):
        assert (value == step).all(), step
    assert not list(url.rglob("*.partial"))
    return kept
"""


def run_child(body: str, *arguments: object, before: tuple[str, ...] = (), seconds: float = 60) -> str:
    """Run a training of its own process; return what it told on stderr. It asserts what is to be true."""
    command = [*before, sys.executable, "-c", HEAD + body, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, timeout=seconds, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def may_mount() -> bool:
    """Tell whether this user may mount a file system in a namespace of its own."""
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


FILL_AND_FREE = """
import subprocess
room.ROOM_SECONDS, upload.LOUD_AFTER = 0.3, 0.1
place = url.parent
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], check=True)
ballast = place / "ballast"
ballast.write_bytes(bytes(20 << 20))
hook = smdbg.Hook(url, buffer_bytes=4 << 20)
save(hook)
assert hook.flush()
save(hook, 300)  # more than fits
assert not hook.flush(3)
committed = smdbg.open_run(url)
assert (committed.tensor("x").values()[:, 0] == committed.tensor("x").steps()).all()
dropping = steps
"""


@pytest.mark.skipif(not may_mount(), reason="needs user namespaces, to mount a small disk")
def test_a_full_disk(tmp_path: Path) -> None:
    """A real one of 24 MB: rows are dropped and counted, what was committed stays, and with room again it goes on."""
    told = run_child(
        FILL_AND_FREE
        + """
ballast.unlink()
assert hook.flush(30)
save(hook, 3)
hook.close()
assert check("completed", dropped=True)[-3:] == [steps - 3, steps - 2, steps - 1]
""",
        tmp_path / "run",
        before=("unshare", "-Urm"),
    )
    assert told.count("does not take data") == 1 and "No space left on device" in told
    assert told.count("takes data again") == 1


@pytest.mark.skipif(not may_mount(), reason="needs user namespaces, to mount a small disk")
def test_a_disk_that_stays_full(tmp_path: Path) -> None:
    """The end waits for room, gives up, and what was committed can be read."""
    run_child(
        """
from smdbg.hooks import base
base.CLOSE_SECONDS = 1.0
"""
        + FILL_AND_FREE
        + """
hook.close()
run = smdbg.open_run(url)
assert run.status == "running"
kept = run.tensor("x").steps()
assert len(kept) and (run.tensor("x").values()[:, 0] == kept).all()
ballast.unlink()
with smdbg.Hook(url, resume=True) as hook:
    assert hook.step == run.steps()[-1] + 1
    hook.save_scalar("loss", 7, "losses")
assert smdbg.open_run(url).status == "completed"
assert (smdbg.open_run(url).tensor("x").values()[:, 0] == kept).all()
""",
        tmp_path / "run",
        before=("unshare", "-Urm"),
    )


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """What a batch system's limits do; needs no rights. Writing breaks off in the middle of an object."""
    told = run_child(
        """
upload.LOUD_AFTER = 0.1
hook = smdbg.Hook(url)
save(hook, 5)
assert hook.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, resource.RLIM_INFINITY))
save(hook, 40)
assert not hook.flush(1)
run = smdbg.open_run(url)
assert (run.tensor("x").values()[:, 0] == np.arange(5)).all() and run.steps().tolist() == list(range(5))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert hook.flush(30)
save(hook)
hook.close()
check("completed")
""",
        tmp_path / "run",
    )
    assert told.count("does not take data") == 1 and "File too large" in told


def test_a_folder_that_becomes_read_only(tmp_path: Path) -> None:
    """As another user where this one is root, whom no mode binds."""
    told = run_child(
        """
upload.LOUD_AFTER = 0.1
os.chdir(url.parent)  # the folders above may be closed to others
url = Path("run")
hook = smdbg.Hook(url)
save(hook, 5)
assert hook.flush()
assert len(smdbg.open_run(url).tensor("x").values()) == 5  # and all that is needed has been imported
if os.getuid() == 0:
    for path in [Path("."), url, *url.rglob("*")]:
        os.chown(path, 65534, 65534)
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
folders = [p for p in [url, *url.rglob("*")] if p.is_dir()]
for folder in folders:
    folder.chmod(0o555)
save(hook, 5)
assert not hook.flush(1)
assert smdbg.open_run(url).tensor("x").values()[:, 0].tolist() == list(range(5))
for folder in folders:
    folder.chmod(0o755)
assert hook.flush(30)
save(hook)
hook.close()
check("completed")
url.chmod(0o555)
try:
    smdbg.Hook(url / "another")
except smdbg.errors.AccessRefused as error:
    assert "permission denied" in str(error)
else:
    raise AssertionError("begun in a folder that is read-only")
smdbg.Hook(url / "another", on_error="off").close()
url.chmod(0o755)
""",
        tmp_path / "run",
    )
    assert "permission denied" in told


def test_a_clock_that_goes_backwards(tmp_path: Path) -> None:
    """Steps keep their order, durations their sense, and the run its status."""
    run_child(
        """
real, shift = time.time_ns, 0
time.time_ns = lambda: real() - shift
hook = smdbg.Hook(url)
for shift in (0, 3600 * 10**9, 2 * 10**18, 0, 10**19, -(10**17)):
    save(hook, 3)
    assert hook.flush()
    assert smdbg.open_run(url).steps().tolist() == list(range(steps))
hook.close()
check("completed")
table = smdbg.open_run(url).step_table()
assert table.step.tolist() == list(range(18)) and (table.duration_ns >= 0).all() and (table.end_time_ns > 0).all()
assert (np.diff(table.end_time_ns) < 0).any()
""",
        tmp_path / "run",
    )


def test_forks_while_threads_hold_locks(tmp_path: Path) -> None:
    """Children that use all of the hook, forked at random moments, neither hang nor write; the parent goes on."""
    run_child(
        """
import gc, signal, threading
hook = smdbg.Hook(url, when_full="block", buffer_bytes=1 << 20)
assert hook.should_stop is False
done = threading.Event()

def train():
    while not done.is_set():
        save(hook, 1, 30_000)

threading.Thread(target=train).start()
children = []
for number in range(60):
    time.sleep(0.01)
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # ends a child that hangs
        hook.save_tensor("child", np.ones(1000))
        hook.save_scalar("child", 1)
        hook.set_mode("eval")
        hook.set_step(5)
        hook.load_state_dict(hook.state_dict())
        hook.end_step()
        assert not hook.should_save("losses") and not hook.flush(5) and not hook.should_stop
        if number % 3 == 0:
            hook.close()
        if number % 3 == 1:
            with hook:
                pass
        del hook
        gc.collect()
        os._exit(0)
    children.append(pid)
for pid in children:
    assert os.waitpid(pid, 0)[1] == 0
done.set()
while threading.active_count() > 5 and any(t.name.startswith("Thread") for t in threading.enumerate()):
    time.sleep(0.01)
hook.close()
check("completed")
assert sorted(smdbg.open_run(url).tensors()) == ["loss", "x"] and len(smdbg.open_run(url).attempts()) == 1
""",
        tmp_path / "run",
    )


def test_a_forked_child_that_ends_on_its_own_leaves_the_run_alone(tmp_path: Path) -> None:
    """By exit, by an exception and by SIGTERM, as workers of data loaders do."""
    run_child(
        """
import signal
hook = smdbg.Hook(url)
save(hook, 3)
for end in ("exit", "raise", "term"):
    pid = os.fork()
    if pid == 0:
        if end == "raise":
            raise ValueError("of the child")
        if end == "term":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        sys.exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == {"exit": 0, "raise": 1, "term": -signal.SIGTERM}[end], (end, code)
    save(hook)
    assert hook.flush()
    assert smdbg.open_run(url).status == "running"
hook.close()
check("completed")
""",
        tmp_path / "run",
    )


def test_two_who_begin_at_the_same_moment(tmp_path: Path) -> None:
    """One of them has the run; the other is refused, and disturbs nothing."""
    for number in range(20):
        url, ready = tmp_path / str(number), threading.Barrier(3)
        hooks: list[smdbg.Hook] = []
        refused: list[Exception] = []

        def begin(url: Path = url, ready: threading.Barrier = ready, hooks: list[smdbg.Hook] = hooks,
                  refused: list[Exception] = refused) -> None:  # fmt: skip
            ready.wait()
            try:
                hooks.append(smdbg.Hook(url))
            except smdbg.errors.RunExists as error:
                refused.append(error)

        threads = [threading.Thread(target=begin) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(hooks) == 1 and len(refused) == 2
        hooks[0].save_tensor("x", np.arange(3))
        hooks[0].close()
        run = smdbg.open_run(url)
        assert run.status == "completed" and run.tensor("x").value(0).tolist() == [0, 1, 2]
        assert len(run.attempts()) == 1
