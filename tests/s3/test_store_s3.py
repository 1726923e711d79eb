"""The same store on a real S3 server: values, permissions, how many requests it takes, and how failures read."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.errors import AccessRefused, RunExists, RunNotFound, StoreError

GIVEN = {
    "float32": np.arange(30, dtype=np.float32).reshape(5, 6) / 7,
    "big": np.arange(1_300_000, dtype=np.int32),
    "int8": np.array([-1, 2], np.int8),
    "bool": np.array(True),
    "complex": np.array([[1 + 2j]]),
    "empty": np.empty((0, 2)),
    "text": np.array(["a", "größer"]),
}


def write(url: str, steps: int = 3, **options: Any) -> smdbg.Hook:
    hook = smdbg.Hook(url, **options)
    for step in range(steps):
        for name, value in GIVEN.items():
            later = value + (step == 1) if value.dtype.kind in "ifc" else value
            hook.save_tensor(name, later.astype(value.dtype), "wide" if name == "big" else "values")
        hook.save_scalar("loss", step / 4, "losses")
        hook.end_step()
    return hook


def assert_right(url: str, **options: Any) -> None:
    run = smdbg.open_run(url, **options)
    assert run.status == "completed" and run.tensors() == [*(n for n in GIVEN if n != "big"), "big", "loss"]
    for name, value in GIVEN.items():
        for step in range(3):
            back = run.tensor(name).value(step)
            assert np.array_equal(back, value + (step == 1) if value.dtype.kind in "ifc" else value), (name, step)
    assert run.tensor("loss").values().tolist() == [0, 0.25, 0.5]
    assert run.tensor("big").value(2, index=slice(-2, None)).tolist() == [1_299_998, 1_299_999]


class Counts:
    """Requests that the server answered since the last look."""

    def __init__(self, s3: Any) -> None:
        self._s3 = s3
        self._last = s3.request_counts()

    def __call__(self) -> dict[str, int]:
        now, out = self._s3.request_counts(), {}
        for key, count in now.items():
            out[key[1]] = out.get(key[1], 0) + count - self._last.get(key, 0)
        self._last = now
        return {kind: count for kind, count in out.items() if count}


@pytest.fixture
def counts(s3: Any) -> Iterator[Counts]:
    yield Counts(s3)


def as_user(monkeypatch: pytest.MonkeyPatch, s3: Any, identity: Any) -> None:
    """Let this process, from here on, be another user of the server."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    for name, value in s3.environment(identity).items():
        monkeypatch.setenv(name, value)


def test_round_trip(bucket_url: str) -> None:
    write(f"{bucket_url}/run").close()
    assert_right(f"{bucket_url}/run")
    assert smdbg.analysis.run.list_runs(bucket_url) == [f"{bucket_url}/run"]


def test_plain_zarr(bucket_url: str) -> None:
    import zarr

    write(bucket_url).close()
    worker = zarr.open_group(bucket_url, mode="r")["workers/00000"]
    entries = {e["name"]: e for e in worker.attrs["smdbg"]["catalogue"]}
    for name, collection in (("float32", "values"), ("big", "wide")):
        array, offset, *_ = entries[name]["slots"][0]
        value = GIVEN[name]
        got = worker[f"{collection}/{array}"][0, offset : offset + value.size].reshape(value.shape)
        assert got.tobytes() == value.tobytes()


def test_credentials_as_options(s3: Any, bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    options = {"key": s3.access_key, "secret": s3.secret_key, "endpoint_url": s3.endpoint}
    write(bucket_url, storage_options=options).close()
    assert_right(bucket_url, storage_options=options)


def test_a_role_that_may_only_put(s3: Any, bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_user(monkeypatch, s3, s3.identities[1])
    monkeypatch.setattr("smdbg.store.writer.HEARTBEAT_SECONDS", 0.3)  # looks for a later attempt, and may not
    hook = write(bucket_url)
    assert hook.flush()
    time.sleep(1)
    assert hook._active()
    hook.close()
    with pytest.raises(RunExists):
        smdbg.Hook(bucket_url)
    for rank in (1, 0):
        write(f"{bucket_url}-two", rank=rank, world_size=2).close()
    with pytest.raises(RunExists):
        smdbg.Hook(f"{bucket_url}-two", rank=1, world_size=2)
    with pytest.raises(AccessRefused, match="refused access"):
        smdbg.open_run(bucket_url)
    as_user(monkeypatch, s3, s3.identities[0])
    assert_right(bucket_url)
    assert smdbg.open_run(f"{bucket_url}-two").workers() == [0, 1]
    assert smdbg.open_run(f"{bucket_url}-two").status == "completed"


def test_an_existing_run_is_left_alone(s3: Any, bucket_url: str, counts: Counts) -> None:
    write(bucket_url).close()

    def listing() -> list[tuple[str, Any, str]]:
        found = s3.client().list_objects_v2(Bucket=s3.bucket, Prefix=bucket_url.split("/", 3)[3])["Contents"]
        return [(item["Key"], item["LastModified"], item["ETag"]) for item in found]

    before = listing()
    with pytest.raises(RunExists, match="pass resume=True"):
        smdbg.Hook(bucket_url)
    assert listing() == before
    with smdbg.Hook(bucket_url, resume=True) as hook:
        assert hook.step == 3
        hook.save_scalar("loss", 9, "losses")
    run = smdbg.open_run(bucket_url)
    assert run.tensor("loss").values().tolist() == [0, 0.25, 0.5, 9] and len(run.attempts()) == 2


def test_requests_of_a_training(bucket_url: str, counts: Counts) -> None:
    """A saved step: its wide shards, at most three objects a collection, one log; never a GET or a LIST."""
    hook = smdbg.Hook(bucket_url)
    begun = counts()
    assert begun["PUT"] <= 6 and begun.get("GET", 0) + begun.get("LIST", 0) == 0, begun
    write_step(hook, 0)
    assert hook.flush()
    first = counts()
    assert set(first) == {"PUT"} and first["PUT"] < 30
    for step in range(1, 6):
        write_step(hook, step)
        assert hook.flush()
        saved = counts()
        assert set(saved) == {"PUT"}
        assert saved["PUT"] <= 1 + 3 * 2 + 1, "a wide shard, two narrow collections, the log"
    start = time.monotonic()
    for step in range(6, 206):
        hook.save_scalar("loss", step, "losses")
        hook.end_step()
    assert hook.flush()
    flushes = 2 + int(time.monotonic() - start)
    saved = counts()
    assert set(saved) == {"PUT"} and saved["PUT"] <= 3 * flushes, "steps of one second go together"
    hook.close()
    assert set(counts()) == {"PUT"}


def write_step(hook: smdbg.Hook, step: int) -> None:
    hook.save_tensor("big", GIVEN["big"] + np.int32(step), "wide")
    hook.save_tensor("small", np.full(100, step), "narrow")
    hook.save_scalar("loss", step, "losses")
    hook.end_step()


@pytest.mark.parametrize("closed", [True, False])
def test_requests_of_a_reader(bucket_url: str, counts: Counts, closed: bool) -> None:
    hook = smdbg.Hook(bucket_url)
    for step in range(4100):
        if step < 3:
            hook.save_tensor("big", GIVEN["big"] + np.int32(step), "wide")
            hook.save_tensor("other", GIVEN["big"], "wide")
        hook.save_scalar("loss", step, "losses")
        hook.end_step()
    if closed:
        hook.close()
    else:
        assert hook.flush()
    counts()
    run = smdbg.open_run(bucket_url)
    assert run.tensors() == ["big", "other", "loss"] and run.steps().size == 4100
    opened = counts()
    assert sum(opened.values()) <= 4 + 2, opened
    assert run.tensor("big").value(1)[-1] == GIVEN["big"][-1] + 1
    read = counts()
    assert set(read) == {"GET"} and read["GET"] <= 2, read
    assert run.tensor("big").value(2, index=5) == 7
    assert counts() == {"GET": 1}
    assert run.tensor("loss").stat("mean")[1].sum() == 4099 * 2050
    assert sum(counts().values()) <= 4
    hook.close()


def test_status_by_the_stores_clock(bucket_url: str) -> None:
    from smdbg.store.backend import open_backend
    from smdbg.store.reader import StoredRun

    hook = write(bucket_url)
    assert hook.flush()
    stored = StoredRun(open_backend(bucket_url))
    assert stored.status() == "running" and stored.status(time.time() + 90) == "lost"
    assert abs(stored.attempts[0].last_commit - time.time()) < 10
    with pytest.raises(ValueError), hook:
        raise ValueError("stop")
    assert smdbg.open_run(bucket_url).status == "failed: ValueError: stop"


# --- failures ---


@pytest.mark.parametrize("what", ["secret", "key", "none"])
def test_wrong_credentials(bucket_url: str, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "secret":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    elif what == "key":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    else:
        for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
            monkeypatch.delenv(name)
    start = time.monotonic()
    for attempt in (smdbg.open_run, smdbg.Hook):
        with pytest.raises(AccessRefused, match="credentials"):
            attempt(bucket_url)
    assert time.monotonic() - start < 30


def test_no_such_bucket(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs
    from botocore.exceptions import ClientError

    url = f"s3://no-such-bucket-{uuid.uuid4().hex[:6]}/run"
    with pytest.raises(StoreError, match="there is no bucket 'no-such-bucket"):
        smdbg.open_run(url)

    # This server makes a bucket when its administrator puts something; others say this to the hook.
    async def refuse(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError from ClientError({"Error": {"Code": "NoSuchBucket"}}, "PutObject")

    monkeypatch.setattr("s3fs.S3FileSystem._pipe_file", refuse)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreError, match="there is no bucket 'no-such-bucket"):
        smdbg.Hook(url)


def test_no_such_run(bucket_url: str) -> None:
    with pytest.raises(RunNotFound, match="there is no run"):
        smdbg.open_run(bucket_url)
    with pytest.raises(RunNotFound):
        smdbg.open_run(bucket_url.rsplit("/", 1)[0] + "/a/b/c")


def test_no_such_endpoint(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{held.getsockname()[1]}")
        start = time.monotonic()
        for attempt in (smdbg.open_run, smdbg.Hook):
            with pytest.raises(StoreError, match=r"does not answer: check the endpoint and the network"):
                attempt(bucket_url)
        assert time.monotonic() - start < 30
        assert smdbg.Hook(bucket_url, on_error="off").should_save("losses") is False


def test_a_server_that_goes_away_and_comes_back(s3_session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a server of its own: nothing is lost, and the training does not notice."""
    with sys.modules["s3_server"].s3_server() as server:
        as_user(monkeypatch, server, server.identities[0])
        hook = smdbg.Hook(f"s3://{server.bucket}/run")
        for step in range(30):
            if step == 10:
                assert hook.flush()
                server.stop()
            if step == 20:
                time.sleep(2)
                server.restart()
            start = time.monotonic()
            hook.save_tensor("x", np.full(1000, step))
            hook.end_step()
            assert time.monotonic() - start < 1
        assert hook.flush(60)
        hook.close()
        run = smdbg.open_run(f"s3://{server.bucket}/run")
        assert run.status == "completed" and run.attempts()[0].dropped_rows == 0
        assert run.tensor("x").values()[:, 0].tolist() == list(range(30))
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def test_an_exit_without_close(bucket_url: str, tmp_path: Path) -> None:
    """The last flush happens while the interpreter shuts down."""
    import subprocess

    code = (
        "import sys, smdbg\nhook = smdbg.Hook(sys.argv[1])\nfor i in range(5):\n"
        "    hook.save_scalar('x', i)\n    hook.end_step()\nhook.save_scalar('x', 5)\n"
        "if len(sys.argv) > 2: raise ValueError(sys.argv[2])"
    )
    for extra, status, ended in (((), "completed", 0), (("why",), "failed: ValueError: why", 1)):
        url = f"{bucket_url}/{ended}"
        done = subprocess.run([sys.executable, "-c", code, url, *extra], stderr=subprocess.PIPE, timeout=60)
        assert done.returncode == ended, done.stderr.decode()
        run = smdbg.open_run(url)
        assert run.status == status and run.tensor("x").values().tolist() == list(range(6))
        assert b"smdbg" not in done.stderr.replace(b"smdbg.Hook", b"")


def test_killed_twenty_times(bucket_url: str, tmp_path: Path) -> None:
    path = Path(__file__).parent.parent / "killed_writer.py"
    spec = importlib.util.spec_from_file_location("killed_writer", path)
    assert spec is not None and spec.loader is not None and os.environ["AWS_ENDPOINT_URL"]
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    committed = module.kill_many([f"{bucket_url}/{i}" for i in range(20)], tmp_path)
    assert sum(steps > 0 for steps in committed) > 10
