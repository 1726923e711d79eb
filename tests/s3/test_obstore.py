"""The S3 client obstore does what s3fs does, byte by byte and word by word."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.errors import AccessRefused, BadConfig, RunExists, RunNotFound, SmdbgError, StoreError
from smdbg.store.backend import Backend, Fill, Missing, Range, open_backend
from smdbg.store.remote import FsspecBackend

pytest.importorskip("obstore")

from smdbg.store.object_store import ObjectStoreBackend  # noqa: E402 - only where it is installed

OBSTORE = {"client": "obstore"}


def write(url: str, **options: Any) -> dict[str, list[Any]]:
    """Write a run of three steps, and return what it holds."""
    raw = smdbg.ReductionConfig(save_raw_tensor=True)
    truth: dict[str, list[Any]] = {"big": [], "small": [], "loss": []}
    mine = smdbg.CollectionConfig("mine", reduction_config=raw)
    with smdbg.Hook(url, collections=[mine, "losses"], **options) as hook:
        for step in range(3):
            given = {"big": np.arange(1_300_000, dtype=np.int32) + step, "small": np.full((3, 4), step / 7)}
            for name, value in given.items():
                hook.save_tensor(name, value, "mine")
            hook.save_scalar("loss", step / 4, "losses")
            for name, value in {**given, "loss": step / 4}.items():
                truth[name].append(value)
            hook.end_step()
    return truth


@pytest.mark.parametrize("writer", ["s3fs", "obstore"])
@pytest.mark.parametrize("reader", ["s3fs", "obstore"])
def test_a_run_written_and_read(bucket_url: str, writer: str, reader: str) -> None:
    url = f"{bucket_url}/a place"
    truth = write(url, storage_options={"client": writer})
    run = smdbg.open_run(url, storage_options={"client": reader})
    assert run.status == "completed" and run.tensors() == list(truth)
    for name, values in truth.items():
        np.testing.assert_array_equal(run.tensor(name).values(), np.stack(values))
    assert run.tensor("big").value(2, index=slice(-2, None)).tolist() == [1_300_000, 1_300_001]
    with pytest.raises(RunExists):
        smdbg.Hook(url, storage_options={"client": writer})
    with smdbg.Hook(url, storage_options={"client": reader}, resume=True) as hook:
        assert hook.step == 3
        hook.save_scalar("loss", 9, "losses")
    run.refresh()
    assert run.tensor("loss").values().tolist() == [0, 0.25, 0.5, 9]


def test_following_a_run(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMDBG_S3_CLIENT", "obstore")
    hook = smdbg.Hook(bucket_url)
    run = None
    for step in range(3):
        hook.save_scalar("loss", step, "losses")
        hook.end_step()
        assert hook.flush()
        if run is None:
            run = smdbg.open_run(bucket_url)
        run.refresh()
        assert run.tensor("loss").values().tolist() == list(range(step + 1)) and run.status == "running"
    hook.close()
    assert run is not None
    run.refresh()
    assert run.status == "completed"


@pytest.fixture
def both(bucket_url: str) -> tuple[Backend, Backend]:
    return ObjectStoreBackend(bucket_url, {}), FsspecBackend(bucket_url, {})


def test_every_operation_answers_the_same(both: tuple[Backend, Backend]) -> None:
    new, old = both
    big = np.random.default_rng(0).bytes(6_000_000)  # beyond what would be sent in parts
    new.put("a/one", b"0123456789")
    old.put("a/b/two", bytearray(b"xyz"))
    new.put("big", bytearray(big))
    assert new.create("made", b"1") and not new.create("made", b"2") and not old.create("made", b"3")
    ranges = [Range("a/one", 2, 5), Range("a/one"), Range("a/one", -3), Range("a/one", 4), Range("a/one", 8, 99)]
    ranges += [Range("a/one", 50, 60), Range("none"), Range("none", 1, 2), Range("none", -4)]
    ranges += [Range("big", 5, 4_000_000)]
    memory: list[bytearray] = []

    def room(*sizes: int) -> Callable[[], list[memoryview]]:
        def give() -> list[memoryview]:
            memory.extend(bytearray(size) for size in sizes)
            return [memoryview(piece) for piece in memory[-len(sizes) :]]

        return give

    for place in both:
        assert place.get("made") == b"1" and place.get("big") == big
        assert place.ranges(ranges) == old.ranges(ranges) and place.ranges([]) == []
        assert [item.name for item in place.list("")] == ["a", "big", "made"] and place.list("none") == []
        assert [replace(item, etag="") for item in place.list("a")] == old.list("a")
        assert [(item.name, item.folder) for item in place.list("a")] == [("b", True), ("one", False)]
        assert sorted(place.walk(""), key=lambda item: item.name) == sorted(old.walk(""), key=lambda item: item.name)
        assert [item.name for item in place.walk("a/b")] == ["a/b/two"]
        with pytest.raises(Missing):
            place.get("none")
        fills = [Fill("a/one", 2, 5, room(2, 3)), Fill("none", 0, 3, room(3)), Fill("a/one", 8, 5, room(5))]
        assert place.fill(fills) == [True, None, False]
        assert memory[:2] == [b"23", b"456"] and len(memory) == 2, "memory is taken for what is there"
        memory.clear()
        first = place.newer([("a/one", ""), ("none", "")])
        assert first[0] is not None and first[0].data == b"0123456789" and first[1] is None
        again = place.newer([("a/one", first[0].tag), ("none", "x")])
        assert again[0] is not None and again[0].same and again[1] is None
    new.remove(["made", "none", "big"])
    assert [item.name for item in old.walk("")] == ["a/b/two", "a/one"]


def said(action: Callable[[], object]) -> str:
    with pytest.raises(SmdbgError) as caught:
        action()
    return f"{type(caught.value).__name__}: {caught.value}"


def test_errors_read_the_same(s3: Any, bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [
        {"key": "nobody", "secret": "x"},
        {"key": s3.access_key, "secret": "x"},
        {"key": s3.identities[1].access_key, "secret": s3.identities[1].secret_key},
    ]
    for options in wrong:
        for kind in (ObjectStoreBackend, FsspecBackend):
            place = kind(bucket_url, options)
            with pytest.raises(AccessRefused, match="credentials"):
                place.get("x")
        new = said(lambda options=options: smdbg.open_run(bucket_url, storage_options={**options, **OBSTORE}))  # type: ignore[misc]
        old = said(lambda options=options: smdbg.open_run(bucket_url, storage_options=options))  # type: ignore[misc]
        assert new == old
    url = f"s3://no-such-bucket-{uuid.uuid4().hex[:6]}/run"
    for place in (url, bucket_url):
        new = said(lambda place=place: smdbg.open_run(place, storage_options=OBSTORE))  # type: ignore[misc]
        assert new == said(lambda place=place: smdbg.open_run(place))  # type: ignore[misc]
    with pytest.raises(RunNotFound):
        smdbg.open_run(bucket_url, storage_options=OBSTORE)
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name)
    with pytest.raises(AccessRefused, match="no AWS credentials were found"):
        smdbg.open_run(bucket_url, storage_options=OBSTORE)


def test_a_missing_object_of_a_name_like_an_error(bucket_url: str) -> None:
    """The error of a missing object tells its key and the request's id: no part of them is a code."""
    place = ObjectStoreBackend(f"{bucket_url}/416/InvalidRange", {})
    wanted = [Range("416", 0, 10), Range("InvalidRange", -4), Range("416")]
    assert place.ranges(wanted) == [None, None, None]
    with pytest.raises(RunNotFound):
        smdbg.open_run(place.url, storage_options=OBSTORE)
    place.put("416", b"0123")
    assert place.ranges([Range("416", 50, 60), Range("416", 2, 3)]) == [b"", b"2"]


def test_no_such_endpoint(bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{held.getsockname()[1]}")
        for attempt in (smdbg.open_run, smdbg.Hook):
            with pytest.raises(StoreError, match=r"does not answer: check the endpoint and the network"):
                attempt(bucket_url, storage_options=OBSTORE)


def test_options(s3: Any, bucket_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    login = {"key": s3.access_key, "secret": s3.secret_key}
    kwargs = {"endpoint_url": s3.endpoint, "region_name": "x-1"}
    for place in ({"endpoint_url": s3.endpoint}, {"client_kwargs": kwargs}):
        open_backend(bucket_url, {**OBSTORE, **login, **place, "config_kwargs": {"connect_timeout": 3}}).put("k", b"1")
    others: tuple[dict[str, Any], ...] = ({"acl": "x"}, {"client_kwargs": {"verify": 0}}, {"config_kwargs": {"a": 1}})
    for unknown in others:
        with pytest.raises(StoreError, match="obstore has no option"):
            open_backend(bucket_url, {**OBSTORE, **unknown})
    with pytest.raises((StoreError, BadConfig), match="no S3 client 'boto'"):
        open_backend(bucket_url, {"client": "boto"})


def test_credentials_of_a_profile(s3: Any, bucket_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    file.write_text(f"[lab]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    place = open_backend(bucket_url, OBSTORE)
    place.put("k", b"1")
    assert place.get("k") == b"1"
    monkeypatch.delenv("AWS_PROFILE")
    assert open_backend(bucket_url, {**OBSTORE, "profile": "lab"}).get("k") == b"1"
