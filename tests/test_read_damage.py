"""Damage: what it hit is named, and everything else can be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.errors import BadSelection, DamagedData

WIDE = 1_300_000
RAW = smdbg.ReductionConfig(save_raw_tensor=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three workers, a wide and a narrow tensor, steps enough for several chunks of the narrow ones."""
    path = tmp_path_factory.mktemp("damage") / "run"
    for rank in range(3):
        with smdbg.Hook(path, rank=rank, world_size=3, reduction_config=RAW) as hook:
            for step in range(40):
                if step < 3:
                    hook.save_tensor("wide", np.full(WIDE, step, np.float32), "wide")
                hook.save_tensor("narrow", np.full(5000, step + rank, np.float32), "narrow")
                hook.save_tensor("beside", np.full(5000, step, np.float32), "narrow")
                hook.save_scalar("loss", step, "losses")
                hook.end_step()
    return path


@pytest.fixture
def url(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def only_shard(folder: Path, row: int = 0) -> Path:
    return folder / "c" / str(row) / "0"


@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_a_damaged_value_is_named(url: Path, how: str) -> None:
    shard = only_shard(url / "workers/00000/wide/float32", 1)
    if how == "flipped":
        flip(shard, 1000)
    elif how == "cut":
        shard.write_bytes(shard.read_bytes()[:100_000])
    else:
        shard.unlink()
    run = smdbg.open_run(url)
    assert run.damaged == [] and run.status == "completed"
    for read in (lambda t: t.value(1), lambda t: t.values(), lambda t: list(t.each())):
        with pytest.raises(DamagedData, match=r"'wide', step 1, worker 0: .*workers/00000/wide/float32/c/1/0 is "):
            read(run.tensor("wide"))
    assert run.tensor("wide").values([0, 2])[:, -1].tolist() == [0, 2]
    assert run.tensor("wide").value(1, worker=1)[0] == 1
    assert run.tensor("narrow").values()[:, 0].tolist() == list(range(40))
    if how == "flipped":  # the other chunks of the shard are good
        assert run.tensor("wide").value(1, index=-1) == 1


def test_a_damaged_chunk_of_several_rows(url: Path) -> None:
    run = smdbg.open_run(url)
    spec = run._stored.attempts[0].specs["narrow/float32"]
    assert spec.chunk[0] < 40, "several chunks"
    flip(only_shard(url / "workers/00000/narrow/float32"), spec.chunk_bytes + 4 + 7)
    bad = range(spec.chunk[0], 2 * spec.chunk[0])
    span = f"step {bad[0]}" if len(bad) == 1 else f"steps {bad[0]} to {bad[-1]}"
    with pytest.raises(DamagedData, match=rf"'narrow', {span}, worker 0: .*/c/0/0 is damaged: bytes"):
        run.tensor("narrow").values()
    with pytest.raises(DamagedData, match=f"step {bad[0]}, worker 0"):
        run.tensor("beside").value(bad[0])
    good = [step for step in range(40) if step not in bad]
    assert run.tensor("narrow").values(good)[:, 0].tolist() == good
    assert run.tensor("narrow").stat("max")[1].tolist() == list(range(40))


def test_damaged_statistics_leave_other_steps(tmp_path: Path) -> None:
    """A table of several chunks; those that are good are still read, although small tables are read whole."""
    url = tmp_path / "run"
    with smdbg.Hook(url, reduction_config=RAW) as hook:
        for step in range(300):
            for number in range(20):
                hook.save_tensor(f"t{number}", np.full(2, step), "c")
            hook.save_scalar("loss", step, "losses")
            hook.end_step()
    run = smdbg.open_run(url)
    spec = run._stored.attempts[0].specs["c/stats"]
    assert 2 * spec.chunk[0] < 300
    flip(url / "workers/00000/c/stats/c/0/0/0", 99)
    with pytest.raises(DamagedData, match=f"stats of collection 'c', steps 0 to {spec.chunk[0] - 1}, worker 0"):
        run.stats("mean", collection="c")
    with pytest.raises(DamagedData, match="steps 0 to"):
        run.tensor("t3").stat("mean")
    assert run.tensor("t3").value(5).tolist() == [5, 5], "the catalogue tells that it is there"
    assert run.tensor("t3").value(200).tolist() == [200, 200]
    assert run.tensor("loss").stat("mean")[1].tolist() == list(range(300))


@pytest.mark.parametrize("what", ["zarr.json", "steps/c/0/0"])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing", "empty"])
def test_a_worker_that_cannot_be_read(url: Path, what: str, how: str) -> None:
    path = url / "workers/00001" / what
    if how == "flipped":
        flip(path, 300)
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 200 if how == "cut" else 0])
    run = smdbg.open_run(url)
    assert run.workers() == [0, 2]
    assert run.tensor("narrow").value(7, worker=2)[0] == 9 and run.tensor("narrow").value(7)[0] == 7
    assert run.stats("mean", collection="losses", worker=2).matrix[:, 0].tolist() == list(range(40))
    if (what, how) == ("zarr.json", "missing"):  # as of one that has not begun
        assert run.damaged == [] and run.status == "running"
        with pytest.raises(BadSelection):
            run.tensor("narrow").value(7, worker=1)
        return
    assert len(run.damaged) == 1 and "workers/00001" in run.damaged[0]
    assert run.status == "failed: worker 1 cannot be read"
    for ask in (
        lambda: run.tensor("narrow").value(7, worker=1),
        lambda: run.step_table(1),
        lambda: run.steps(worker=1),
    ):
        with pytest.raises(DamagedData, match="worker 1 cannot be read: .*workers/00001"):
            ask()
    shutil.copytree(url.parent / "run", url.parent / "copy")
    for rank in (0, 2):
        shutil.rmtree(url / f"workers/0000{rank}")
    with pytest.raises(DamagedData, match="workers/00001"):
        smdbg.open_run(url)


def test_what_is_mended_is_read_again(url: Path) -> None:
    path = url / "workers/00002/zarr.json"
    good = path.read_bytes()
    path.write_bytes(b"{")
    run = smdbg.open_run(url)
    assert run.workers() == [0, 1] and run.damaged
    run.refresh()
    assert run.workers() == [0, 1] and run.damaged
    path.write_bytes(good)
    run.refresh()
    assert run.workers() == [0, 1, 2] and run.damaged == [] and run.status == "completed"


def test_an_attempt_that_may_have_superseded(tmp_path: Path) -> None:
    """Where a later attempt cannot be read, nobody knows which steps of the earlier ones still hold."""
    url = tmp_path / "run"
    for attempt in range(2):
        for rank in range(2):
            with smdbg.Hook(url, rank=rank, world_size=2, resume=attempt > 0) as hook:
                hook.set_step(attempt)
                hook.save_scalar("x", attempt)
    (url / "workers/00000.1/zarr.json").write_bytes(b"[]")
    run = smdbg.open_run(url)
    assert run.workers() == [1] and len(run.damaged) == 1 and "00000.1" in run.damaged[0]
    with pytest.raises(DamagedData, match="worker 0 cannot be read"):
        run.tensor("x").value(0, worker=0)
    for attempt in ("all", 0):
        shown: Any = smdbg.open_run(url, attempt=attempt)
        assert shown.tensor("x").value(0).item() == 0 and shown.damaged == run.damaged


def test_the_facts_of_a_run_are_held_against_their_checksum(tmp_path: Path) -> None:
    url = tmp_path / "run"
    with smdbg.Hook(url, hyperparameters={"lr": 0.1}) as hook:
        hook.save_scalar("loss", 1)
    root = url / "zarr.json"
    root.write_text(root.read_text().replace('"lr": 0.1', '"lr": 0.7'))
    with pytest.raises(DamagedData, match="does not match its checksum"):
        smdbg.open_run(url)
    facts = json.loads(root.read_text())
    del facts["attributes"]["smdbg"]["crc32c"]  # as runs of earlier versions are
    root.write_text(json.dumps(facts))
    assert smdbg.open_run(url).hyperparameters == {"lr": 0.7}
