"""Compression and down-casting through the hook: what was saved comes back, statistics are of what was given."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr

import smdbg
from smdbg import CollectionConfig, Hook


def stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != "zarr.json")


def sparse_gradient(rows: int, step: int) -> np.ndarray:
    """Return [rows, 64] float32, of which a step touches one row in 250."""
    random = np.random.default_rng(step)
    out = np.zeros((rows, 64), np.float32)
    touched = random.choice(rows, rows // 250, replace=False)
    out[touched] = random.standard_normal((touched.size, 64), np.float32)
    return out


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize("rows", [1_000, 40_000])  # of 256 kB, many to a shard; of 10 MB, a shard each
def test_a_sparse_gradient_takes_a_tenth(tmp_path: Path, compression: str, rows: int) -> None:
    url, steps = tmp_path / "run", 21
    config = CollectionConfig("sparse", compression=compression)
    with Hook(url, collections=[config, "losses"]) as hook:
        for step in range(steps):
            hook.save_tensor("embedding", sparse_gradient(rows, step), "sparse")
            hook.save_tensor("number", np.float64(step), "sparse")
            hook.save_scalar("loss", step, "losses")
            hook.end_step()
            if step in (3, 4, 11):
                assert hook.flush()  # the shard is put, grows and is put again
    run = smdbg.open_run(url)
    assert run.status == "completed"
    tensor = run.tensor("embedding")
    for step in range(steps):
        assert np.array_equal(tensor.value(step), sparse_gradient(rows, step))
    assert run.tensor("number").values().tolist() == list(range(steps))
    assert np.array_equal(tensor.value(7, index=(slice(10, 20), 3)), sparse_gradient(rows, 7)[10:20, 3])
    raw = rows * 64 * 4 * steps
    assert stored_bytes(url / "workers/00000/sparse/float32") < raw / 10
    group = zarr.open_group(str(url), mode="r")["workers/00000/sparse/float32"]
    assert np.array_equal(group[5, : rows * 64].reshape(rows, 64), sparse_gradient(rows, 5))


@pytest.mark.parametrize("target", ["bfloat16", "float16", "float32"])
def test_values_are_cast_and_statistics_are_not(tmp_path: Path, target: str) -> None:
    url = tmp_path / "run"
    random = np.random.default_rng(0)
    wide = [random.standard_normal((1300, 1024), np.float32) for _ in range(2)]  # rows of their own
    small = [random.standard_normal(7) * 1e6 for _ in range(2)]
    with Hook(url, collections=[CollectionConfig("mine", dtype=target, compression="lz4")]) as hook:
        for step in range(2):
            hook.save_tensor("wide", wide[step], "mine")
            hook.save_tensor("small", small[step], "mine")
            hook.save_tensor("whole", np.arange(5) + step, "mine")
            hook.save_scalar("number", 0.1 + step, "mine")
            hook.end_step()
    run = smdbg.open_run(url)
    kind = getattr(ml_dtypes, target, None) or np.dtype(target)
    for step in range(2):
        for name, given in (("wide", wide[step]), ("small", small[step])):
            found = run.tensor(name).value(step)
            with np.errstate(over="ignore"):
                expected = given.astype(kind) if given.dtype.itemsize > np.dtype(kind).itemsize else given
            assert found.dtype == expected.dtype and np.array_equal(found, expected, equal_nan=True)
            assert run.tensor(name).stat("min")[1][step] == given.min()
            assert run.tensor(name).stat("posinf")[1][step] == 0
        assert run.tensor("whole").value(step).tolist() == (np.arange(5) + step).tolist()
        assert run.tensor("number").value(step) == 0.1 + step
    assert run.tensor("wide").dtype == "float32" and run.tensor("small").dtype == "float64"


def test_a_collection_without_options_is_not_compressed(tmp_path: Path) -> None:
    with Hook(tmp_path / "run", collections=[CollectionConfig("a", compression="zstd"), "losses"]) as hook:
        hook.save_tensor("x", np.zeros(100_000), "a")
        hook.save_tensor("y", np.zeros(100_000), "b")
    base = tmp_path / "run/workers/00000"
    assert stored_bytes(base / "a/float64") < 10_000 < 800_000 <= stored_bytes(base / "b/float64")
