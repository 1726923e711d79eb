"""How many requests reading takes, by the count of a real S3 server, with sizes at which the limits bite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.cli import run as cli
from smdbg.cli.exits import Exit
from smdbg.store import format as layout

RAW = smdbg.ReductionConfig(save_raw_tensor=True)
Counts = Callable[[], dict[str, int]]


@pytest.fixture
def counts(s3: Any) -> Iterator[Counts]:
    last = s3.request_counts()

    def grown() -> dict[str, int]:
        nonlocal last
        now, out = s3.request_counts(), {}
        for key, count in now.items():
            out[key[1]] = out.get(key[1], 0) + count - last.get(key, 0)
        last = now
        return {kind: count for kind, count in out.items() if count}

    yield grown


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay out as wide what is a quarter of what counts as wide, so that little data makes many shards."""
    for name in ("WIDE_ROW", "WIDE_SHARD", "WIDE_CHUNK"):
        monkeypatch.setattr(layout, name, getattr(layout, name) // 4)


@pytest.mark.parametrize("closed", [True, False])
def test_opening_and_listing(bucket_url: str, counts: Counts, closed: bool) -> None:
    """Root, list of workers, group, a chunk of the log per 4,096 steps, and the table of the one collection."""
    hook = smdbg.Hook(bucket_url)
    for step in range(layout.LOG_ROWS + 10):
        hook.save_scalar("loss", step, "losses")
        if step % 1000 == 0:
            hook.save_tensor("vector", np.full(5, step), "losses")
        hook.end_step()
    assert hook.flush()
    if closed:
        hook.close()
    counts()
    run = smdbg.open_run(bucket_url)
    names = run.tensors()
    facts = {name: (run.tensor(name).shape, run.tensor(name).dtype, run.tensor(name).workers()) for name in names}
    assert sorted(facts) == ["loss", "vector"] and run.steps().size == layout.LOG_ROWS + 10
    assert counts() == {"LIST": 1, "GET": 2 + 2}
    assert [run.tensor(name).steps().size for name in sorted(names)] == [layout.LOG_ROWS + 10, 5]
    assert run.tensor("vector").nbytes == 5 * 5 * 8
    assert sum(counts().values()) <= 2 * 2, "two tables, each of a shard per 4,096 rows"
    hook.close()


def test_ls_of_many_collections(bucket_url: str, counts: Counts, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run that has ended the catalogue tells where tensors are, so no table is read, however many there are."""
    with smdbg.Hook(bucket_url) as hook:
        for step in range(30):
            hook.save_scalar("loss", step, "losses")
            hook.save_scalar("accuracy", step)
            for name in ("a.weight", "b.weight", "a.bias", "gradient/a.weight", "update/a.weight"):
                hook.save_tensor(name, np.full(6, step, np.float32))
            hook.end_step()
    counts()
    assert cli(["ls", "--run", bucket_url, "--format", "tsv"]) is Exit.CLEAN
    listed = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(listed) == 7 and {line[0]: line[5] for line in listed}["a.bias"] == "3"
    assert counts() == {"LIST": 1, "GET": 3}


def test_opening_a_run_of_several_workers(bucket_url: str, counts: Counts) -> None:
    for rank in range(4):
        with smdbg.Hook(bucket_url, rank=rank, world_size=4) as hook:
            hook.save_scalar("loss", rank, "losses")
    counts()
    run = smdbg.open_run(bucket_url)
    assert run.workers() == [0, 1, 2, 3] and run.status == "completed"
    assert counts() == {"LIST": 1, "GET": 1 + 4 + 4}


@pytest.mark.usefixtures("small_shards")
def test_values_of_wide_rows(bucket_url: str, counts: Counts) -> None:
    """One step: a shard each and the presence. N steps: N + 3."""
    steps, wide = 60, smdbg.CollectionConfig("wide", reduction_config=RAW)
    giant = np.arange(3 * layout.WIDE_SHARD // 4, dtype=np.float32)
    with smdbg.Hook(bucket_url, collections=[wide], when_full="block") as hook:
        for step in range(steps):
            hook.save_tensor("x", np.full(layout.WIDE_ROW // 4 + 9, step, np.float32), "wide")
            if step == 7:
                hook.save_tensor("giant", giant, "others")
            hook.end_step()
    run = smdbg.open_run(bucket_url)
    counts()
    assert np.array_equal(run.tensor("giant").value(7), giant)
    assert counts() == {"GET": 3}
    assert run.tensor("giant").value(7, index=5) == 5
    assert counts() == {"GET": 1}
    assert run.tensor("x").value(50)[-1] == 50
    assert sum(counts().values()) <= 2
    found = run.tensor("x").values(range(steps))
    assert found[:, -1].tolist() == list(range(steps))
    assert sum(counts().values()) <= steps + 3


def test_statistics_of_many_tensors(bucket_url: str, counts: Counts) -> None:
    only = smdbg.CollectionConfig("g", reduction_config=smdbg.ReductionConfig(save_raw_tensor=False))
    with smdbg.Hook(bucket_url, collections=[only]) as hook:
        for step in range(1000):
            for number in range(50):
                hook.save_tensor(f"t{number}", np.array([step, number], np.float32), "g")
            hook.end_step()
    counts()
    run = smdbg.open_run(bucket_url)
    found = run.stats("max", collection="g")
    assert (found.matrix == np.maximum(np.arange(1000)[:, None], np.arange(50))).all()
    assert sum(counts().values()) <= 8
    run.stats("min", collection="g")
    assert counts() == {}


def test_refresh_costs_one_request_a_worker(bucket_url: str, counts: Counts) -> None:
    hooks = [smdbg.Hook(bucket_url, rank=rank, world_size=2) for rank in range(2)]
    for hook in hooks:
        hook.save_scalar("loss", 0, "losses")
        hook.end_step()
        assert hook.flush()
    run = smdbg.open_run(bucket_url)
    counts()
    for _ in range(3):
        run.refresh()
        assert counts() == {"GET": 2}
    assert run.status == "running"
    hooks[1].save_scalar("loss", 5, "losses")
    hooks[1].end_step()
    assert hooks[1].flush()
    counts()
    run.refresh()
    assert counts()["GET"] <= 3, "the log of both, and the group of one, which may tell of the end"
    assert run.tensor("loss").values(worker=1).tolist() == [0, 5]
    hooks[1].close()
    counts()
    run.refresh()
    assert counts()["GET"] <= 3
    assert [facts.status for facts in run.attempts()] == ["running", "completed"]
    hooks[0].close()
    run.refresh()
    assert run.status == "completed"


def test_more_at_a_time_than_the_client_keeps_connections(bucket_url: str) -> None:
    with smdbg.Hook(bucket_url) as hook:
        for step in range(3):
            hook.save_tensor("x", np.full(40, step))
            hook.end_step()
    for concurrency in (1, 40):
        run = smdbg.open_run(bucket_url, concurrency=concurrency)
        assert run.tensor("x").value(1).tolist() == [1] * 40
