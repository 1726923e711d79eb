"""What the reading API says when there is nothing to give: each error a class of its own and a clear sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.errors import (
    BadSelection,
    DamagedData,
    NewerFormat,
    NotARun,
    OnlyStatistics,
    RunNotFound,
    StepNotSaved,
    StoreError,
    TensorNotFound,
)

STATISTICS_ONLY = smdbg.ReductionConfig(save_raw_tensor=False)


def test_errors_say_what_and_where(tmp_path: Path) -> None:
    url = tmp_path / "run"
    with smdbg.Hook(url, reduction_config=STATISTICS_ONLY) as hook:
        for step in range(20):
            if step % 5 == 0:
                hook.save_tensor("layer1.weight", np.ones((2, 2)), "weights")
            hook.save_scalar("loss", 1.0, "losses")
            hook.end_step()
    run = smdbg.open_run(url)
    with pytest.raises(TensorNotFound, match=r"no tensor 'layer1.wieght'.*Did you mean layer1.weight\?"):
        run.tensor("layer1.wieght")
    with pytest.raises(OnlyStatistics, match="only statistics at step 10; no full value was kept at any step"):
        run.tensor("layer1.weight").value(10)
    with pytest.raises(StepNotSaved, match="was not saved at step 7; it was at 0, 10"):
        run.tensor("layer1.weight").value(7)
    with pytest.raises(BadSelection, match="no worker 3: workers are 0"):
        run.tensor("loss").value(0, worker=3)
    with pytest.raises(BadSelection, match="unknown mode 'trian'.*train"):
        run.steps("trian")
    with pytest.raises(BadSelection, match="no statistic 'maen'.*mean"):
        run.tensor("layer1.weight").stat("maen")
    with pytest.raises(BadSelection, match="attempt"):
        smdbg.open_run(url, attempt="newest")


def test_what_is_not_a_run(tmp_path: Path) -> None:
    import zarr

    (tmp_path / "empty").mkdir()
    for nothing in ("empty", "missing"):
        with pytest.raises(RunNotFound, match="there is no run: check the URL"):
            smdbg.open_run(tmp_path / nothing)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "notes.txt").write_text("x")
    with pytest.raises(NotARun, match="no zarr.json"):
        smdbg.open_run(tmp_path / "files")
    zarr.create_group(str(tmp_path / "group"), attributes={"smdbg": "x"})
    zarr.create_group(str(tmp_path / "plain"))
    zarr.create_array(str(tmp_path / "array"), shape=(3,), dtype="i4")
    for other in ("group", "plain", "array"):
        with pytest.raises(NotARun, match="is not a run"):
            smdbg.open_run(tmp_path / other)
        before = sorted(str(p) for p in tmp_path.rglob("*"))
        with pytest.raises((NotARun, FileExistsError)):
            smdbg.Hook(tmp_path / other)
        assert before == sorted(str(p) for p in tmp_path.rglob("*"))
    for text in ("", "{", "[]", "null", '{"attributes": 3}', '{"attributes": {"smdbg": {"format": 1}}}', "[" * 100_000):
        (tmp_path / "group/zarr.json").write_text(text)
        with pytest.raises(NotARun, match="is not a run"):
            smdbg.open_run(tmp_path / "group")
    with smdbg.Hook(tmp_path / "run") as hook:
        hook.save_scalar("x", 1)
    root = json.loads((tmp_path / "run/zarr.json").read_text())
    root["attributes"]["smdbg"]["format"] = 2
    (tmp_path / "run/zarr.json").write_text(json.dumps(root))
    with pytest.raises(NewerFormat, match="format 2; this smdbg reads up to 1: upgrade"):
        smdbg.open_run(tmp_path / "run")
    with pytest.raises(StoreError, match="URL of the run is empty"):
        smdbg.open_run("")


def test_absurd_metadata_is_not_believed(tmp_path: Path) -> None:
    """Sizes and places that the data does not bear out end in an error, not in memory taken or in a wrong value."""
    from smdbg.store.format import canonical
    from smdbg.store.shard import crc32c

    url = tmp_path / "run"
    with smdbg.Hook(url) as hook:
        hook.save_tensor("x", np.arange(6.0))
        hook.save_tensor("y", np.arange(6.0), "other")
    path = url / "workers/00000/zarr.json"
    good = json.loads(path.read_text())

    def damaged(change: Any) -> None:
        group = json.loads(json.dumps(good))
        change(group["attributes"]["smdbg"], group["consolidated_metadata"]["metadata"])
        facts = {k: v for k, v in group["attributes"]["smdbg"].items() if k != "crc32c"}
        group["attributes"]["smdbg"] = {**facts, "crc32c": crc32c(canonical(facts))}
        path.write_text(json.dumps(group))
        with pytest.raises((DamagedData, StepNotSaved, TensorNotFound)):
            smdbg.open_run(url).tensor("x").value(0)

    for shape in ([1 << 50], [1 << 20, 1 << 20], [-1], ["6"], [6.0]):
        damaged(lambda facts, arrays, shape=shape: facts["catalogue"][0].update(shape=shape))
    for slot in (["float64", 0, 1 << 50, "float64"], ["nowhere", 0, 6, "float64"], ["float64", 100, 6, "float64"]):
        damaged(lambda facts, arrays, slot=slot: facts["catalogue"][0].update(slots=[slot]))
    damaged(lambda facts, arrays: facts["catalogue"][0].update(stats=[["stats", 9999, 1]]))
    damaged(lambda facts, arrays: facts["catalogue"][0].pop("slots"))
    damaged(lambda facts, arrays: facts["collections"]["tensors"].update(bit=64))
    damaged(lambda facts, arrays: facts.update(collections={}))
    damaged(lambda facts, arrays: arrays["steps"].update(shape=[1 << 50, 10]))
    damaged(lambda facts, arrays: arrays["tensors/float64"].update(data_type="object"))

    def giant(facts: Any, arrays: Any) -> None:
        chunk = arrays["tensors/float64"]["codecs"][0]["configuration"]
        chunk["chunk_shape"] = arrays["tensors/float64"]["chunk_grid"]["configuration"]["chunk_shape"] = [1, 1 << 40]
        arrays["tensors/float64"]["shape"] = [1, 1 << 40]

    damaged(giant)
