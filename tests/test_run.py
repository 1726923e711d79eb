"""Reading a run: what is there and what is not, tensors that come late or change, long runs, live runs."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.errors import OnlyStatistics, StepNotSaved, StepNotYet


def by_name(matrix: Any, name: str) -> tuple[list[float], list[bool]]:
    column = matrix.names.index(name)
    return matrix.matrix[:, column].tolist(), matrix.present[:, column].tolist()


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_absent_and_nan_are_told_apart(tmp_path: Path, raw: bool, shape: tuple[int, ...]) -> None:
    """One metric at every 7th step with a real NaN at step 14, beside one at every step."""
    steps, seventh = range(30), [0, 7, 14, 21, 28]
    config = smdbg.CollectionConfig("metrics", reduction_config=smdbg.ReductionConfig(save_raw_tensor=raw))
    with smdbg.Hook(tmp_path / "run", collections=[config]) as hook:
        for step in steps:
            hook.save_tensor("every", np.full(shape, float(step)), "metrics")
            if step in seventh:
                hook.save_tensor("seventh", np.full(shape, math.nan if step == 14 else step / 2), "metrics")
            hook.end_step()
    run = smdbg.open_run(tmp_path / "run")
    tensor, size = run.tensor("seventh"), math.prod(shape)
    assert tensor.steps().tolist() == seventh and run.tensor("every").steps().tolist() == list(steps)
    assert tensor.value_steps().tolist() == (seventh if raw else [])
    at, mean = tensor.stat("mean")
    assert at.tolist() == seventh
    np.testing.assert_array_equal(mean, [0, 3.5, math.nan, 10.5, 14])
    assert tensor.stat("nan")[1].tolist() == [0, 0, size, 0, 0]
    assert tensor.stat("count")[1].tolist() == [size] * 5
    for statistic in ("mean", "min", "abs_max", "variance", "rms"):
        found = run.stats(statistic, collection="metrics")
        values, present = by_name(found, "seventh")
        assert found.steps.tolist() == list(steps) and found.names == ["every", "seventh"]
        assert [s for s in steps if present[s]] == seventh
        assert [s for s in seventh if math.isnan(values[s])] == [14]
        assert all(math.isnan(values[s]) for s in steps if s not in seventh)
        assert by_name(found, "every")[1] == [True] * 30
    assert run.stats("mean", tensors=["seventh"]).steps.tolist() == seventh
    assert run.tensors(step=14) == ["every", "seventh"] and run.tensors(step=13) == ["every"]
    if raw:
        np.testing.assert_array_equal(tensor.value(14), np.full(shape, math.nan))
        np.testing.assert_array_equal(tensor.values()[:, ...].reshape(5, -1)[:, 0], [0, 3.5, math.nan, 10.5, 14])
    else:
        with pytest.raises(OnlyStatistics):
            tensor.value(14)
    for step in (13, 29):
        with pytest.raises(StepNotSaved):
            tensor.value(step)


def test_a_real_nan_of_save_scalar(tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run") as hook:
        for step in range(21):
            hook.save_scalar("every", step)
            if step % 7 == 0:
                hook.save_scalar("seventh", math.nan if step == 14 else -math.inf if step == 7 else 0)
            hook.end_step()
    run = smdbg.open_run(tmp_path / "run")
    at, counts = run.tensor("seventh").stat("count")
    assert (at.tolist(), counts.tolist()) == ([0, 7, 14], [1, 1, 1])
    assert run.tensor("seventh").stat("nan")[1].tolist() == [0, 0, 1]
    assert run.tensor("seventh").stat("neginf")[1].tolist() == [0, 1, 0]
    np.testing.assert_array_equal(run.tensor("seventh").values(), [0, -math.inf, math.nan])
    assert by_name(run.stats("zeros"), "seventh")[0][0] == 1


@pytest.mark.parametrize("raw", [True, False])
def test_empty_tensors_are_present(tmp_path: Path, raw: bool) -> None:
    config = smdbg.ReductionConfig(save_raw_tensor=raw)
    with smdbg.Hook(tmp_path / "run", reduction_config=config) as hook:
        for step in range(4):
            hook.save_tensor("other", np.ones(2))
            if step % 2:
                hook.save_tensor("x", np.empty((0, 3)) if step == 1 else np.ones((2, 3)))
            hook.end_step()
    run = smdbg.open_run(tmp_path / "run")
    tensor = run.tensor("x")
    assert tensor.steps().tolist() == [1, 3]
    assert tensor.stat("count")[1].tolist() == [0, 6]
    np.testing.assert_array_equal(tensor.stat("max")[1], [math.nan, 1])
    np.testing.assert_array_equal(tensor.stat("l2")[1], [0, math.sqrt(6)])
    assert tensor.shape == tensor.shape_at(1) == (0, 3) and tensor.shape_at(3) == (2, 3)
    if raw:
        assert [v.shape for v in tensor.values()] == [(0, 3), (2, 3)]


def test_late_tensors(tmp_path: Path) -> None:
    """Tensors that appear after others have filled the arrays; some after a shard of rows."""
    comes = {"a": 0, "b": 0, "c": 3, **{f"many/{i}": 5 for i in range(40)}, **{f"late/{i}": 4200 for i in range(9)}}
    url = tmp_path / "run"
    with smdbg.Hook(url) as hook:
        for step in range(4300):
            for name, first in comes.items():
                if step >= first and (step < 10 or name == "a" or step > 4190):
                    hook.save_tensor(name, np.array([step, first], np.float32), "c")
            hook.end_step()
    group = json.loads((url / "workers/00000/zarr.json").read_text())
    arrays = {k: v for k, v in group["consolidated_metadata"]["metadata"].items() if v["node_type"] == "array"}
    firsts = {k: v["attributes"]["smdbg"].get("first_row", 0) for k, v in arrays.items()}
    assert (firsts["c/stats"], firsts["c/stats-1"], firsts["c/stats-2"]) == (0, 5, 4200)
    assert {v["shape"][0] for v in arrays.values()} == {4300}
    run = smdbg.open_run(url)
    assert run.tensors() == list(comes)
    for name, first in comes.items():
        steps = [s for s in range(4300) if s >= first and (s < 10 or name == "a" or s > 4190)]
        tensor = run.tensor(name)
        assert tensor.steps().tolist() == steps
        assert tensor.values().tolist() == [[s, first] for s in steps]
        assert tensor.stat("max")[1].tolist() == [max(s, first) for s in steps]
    found = run.stats("mean", collection="c")
    assert found.present.sum(axis=0).tolist() == [run.tensor(n).steps().size for n in comes]


def test_shapes_ranks_and_dtypes_that_change(tmp_path: Path) -> None:
    shapes = [(2, 3), (3, 2), (1,), (), (40,), (5, 5, 5), (2, 3), (0, 9), (90,), (1,) * 12, (200,), (6,), (2, 3)]
    dtypes = ["float32", "float32", "int8", "complex64", "float32", "float64", "bool", "float32", "float32"]
    rng = np.random.default_rng(3)
    given = [(rng.normal(size=s) * 3).astype(dtypes[i % len(dtypes)]) for i, s in enumerate(shapes)]
    for value in given[::2]:
        value[...] = value + 1
    url = tmp_path / "run"
    with smdbg.Hook(url) as hook:
        for i, value in enumerate(given):
            hook.save_tensor("same", np.full(4, i))
            hook.save_tensor("x", value)
            if i % 3:
                hook.save_tensor("y", value, "statistics_of", role="output")
            hook.end_step()
    run = smdbg.open_run(url)
    tensor = run.tensor("x")
    assert tensor.shape == (2, 3) and tensor.dtype == "float32"
    for i, value in enumerate(given):
        back = tensor.value(i)
        assert back.dtype == value.dtype and back.shape == value.shape == tensor.shape_at(i)
        np.testing.assert_array_equal(back, value)
        if i % 3:
            np.testing.assert_array_equal(run.tensor("y").value(i), value)
        assert run.tensor("same").value(i).tolist() == [i] * 4
    bulk = tensor.values()
    assert isinstance(bulk, list) and all(np.array_equal(a, b) for a, b in zip(bulk, given, strict=True))
    assert isinstance(tensor.values([0, 0]), np.ndarray)
    assert tensor.stat("count")[1].tolist() == [v.size for v in given]
    catalogue = json.loads((url / "workers/00000/zarr.json").read_text())["attributes"]["smdbg"]["catalogue"]
    slots = next(e["slots"] for e in catalogue if e["name"] == "x")
    capacities = [slot[2] for slot in slots]
    assert all(b >= 2 * max(capacities[:i]) for i, b in enumerate(capacities) if i)
    places = sorted((s[0], s[1], s[1] + s[2]) for e in catalogue if e["collection"] == "tensors" for s in e["slots"])
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in zip(places, places[1:], strict=False))


def test_a_tensor_that_grows_from_narrow_to_wide(tmp_path: Path) -> None:
    sizes = [10, 100_000, 10, 3_000_000, 100_000, 7]
    with smdbg.Hook(tmp_path / "run") as hook:
        for step, size in enumerate(sizes):
            hook.save_tensor("x", np.arange(size, dtype=np.float32) + step)
            hook.end_step()
    tensor = smdbg.open_run(tmp_path / "run").tensor("x")
    for step, size in enumerate(sizes):
        assert np.array_equal(tensor.value(step), np.arange(size, dtype=np.float32) + step)
        assert tensor.value(step, index=-1) == np.float32(size - 1 + step)


def test_many_rows(tmp_path: Path) -> None:
    """Beyond the 4,096 rows of a chunk of the log: every border, the lengths of all arrays, plain Zarr."""
    import zarr

    url, n = tmp_path / "run", 9001
    with smdbg.Hook(url) as hook:
        for step in range(n):
            hook.save_scalar("every", step * 0.5)
            if step % 2 == 1:
                hook.save_tensor("odd", np.array([step, -step], np.int32), "pairs")
            hook.end_step()
            if step in (0, 4095, 4096, 8191):
                assert hook.flush()
                live = smdbg.open_run(url)
                assert live.status == "running" and live.tensor("every").value(step) == step * 0.5
                assert live.steps().size == step + 1
                lengths = [v.shape[0] for _, v in zarr.open_group(str(url), mode="r")["workers/00000/metrics"].arrays()]
                assert len(set(lengths)) == 1 and lengths[0] >= step + 1 and lengths[0] % 4096 == 0
    run = smdbg.open_run(url)
    assert run.steps().tolist() == list(range(n))
    assert run.tensor("every").values().tolist() == [s * 0.5 for s in range(n)]
    assert run.tensor("odd").values().tolist() == [[s, -s] for s in range(1, n, 2)]
    assert run.tensor("odd").values([8999, 1, 4097]).tolist() == [[8999, -8999], [1, -1], [4097, -4097]]
    group = zarr.open_group(str(url), mode="r")["workers/00000"]
    assert group["steps"].shape == (n, 10) and sorted(
        p.name for p in (url / "workers/00000/steps/c").iterdir()
    ) == list("012")
    assert group["metrics/step"][:].tolist() == list(range(n))
    assert group["pairs/step"][:].tolist() == list(range(1, n, 2))
    assert group["pairs/int32"].shape[0] == n // 2


def test_what_a_run_says(tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run", hyperparameters={"seed": 3, "lr": 0.1}, rank=1, world_size=3, host=False) as hook:
        for step in range(6):
            hook.set_mode("train" if step % 3 else "eval")
            hook.save_scalar("loss", step, "losses")
            hook.end_step()
    run = smdbg.open_run(tmp_path / "run")
    assert run.workers() == [1] and run.world_size == 3 and run.seed == 3 and run.hyperparameters["lr"] == 0.1
    assert run.modes() == ["train", "eval"] and run.collections() == ["losses"] and run.host == ""
    assert run.versions["numpy"] == np.__version__ and len(run.run_id) == 16 and run.framework == ""
    assert run.tensor("loss").role == "loss"
    assert run.tensor("loss").steps("eval").tolist() == [0, 3] == run.steps("eval", worker=1).tolist()
    table = run.step_table(1)
    assert table.step.tolist() == list(range(6)) and table.mode.tolist() == ["eval", "train", "train"] * 2
    assert table.mode_step.tolist() == [0, 0, 1, 1, 2, 3] and (table.duration_ns >= table.hook_ns).all()
    assert (np.diff(table.end_time_ns) >= 0).all() and abs(table.end_time_ns[0] / 1e9 - run.created) < 60


def test_refresh_follows_a_live_run(tmp_path: Path) -> None:
    hook = smdbg.Hook(tmp_path / "run")
    run = None
    for step in range(6):
        hook.save_tensor("x", np.full(2, step))
        if step >= 3:
            hook.save_tensor(f"new{step}", np.ones(300 * step), "late")
        hook.end_step()
        assert hook.flush()
        run = run or smdbg.open_run(tmp_path / "run")
        run.refresh()
        assert run.tensor("x").value(step).tolist() == [step, step] and run.steps().size == step + 1
        assert ("new3" in run.tensors()) == (step >= 3)
        with pytest.raises(StepNotYet, match=f"step {step + 1} is not written yet.* at step {step}"):
            run.tensor("x").value(step + 1)
    hook.close()
    run.refresh()
    assert run.status == "completed"
    with pytest.raises(StepNotSaved) as caught:
        run.tensor("x").value(6)
    assert not isinstance(caught.value, StepNotYet) and "was not saved at step 6" in str(caught.value)


def test_one_value_of_a_long_run_is_cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read for one value does not grow with the number of steps."""
    from smdbg.store import reader
    from smdbg.store.backend import LocalBackend

    with smdbg.Hook(tmp_path / "run", reduction_config=smdbg.ReductionConfig(save_raw_tensor=True)) as hook:
        for step in range(600):
            for name in "abcdefghij":
                hook.save_tensor(name, np.full(3, step))
            hook.end_step()
    monkeypatch.setattr(reader, "SMALL_TABLE", 0)
    read: list[int] = []
    plain = LocalBackend._read

    def counting(self: Any, wanted: Any) -> Any:
        data = plain(self, wanted)
        read.append(len(data or b""))
        return data

    run = smdbg.open_run(tmp_path / "run")
    monkeypatch.setattr(LocalBackend, "_read", counting)
    assert run.tensor("e").value(411).tolist() == [411] * 3 and run.tensor("e").shape_at(411) == (3,)
    assert sum(read) < 400_000, "a chunk of statistics for each question, and a chunk of values"
    read.clear()
    assert run.tensor("e").values().tolist() == [[s] * 3 for s in range(600)]
    assert len(read) < 6


def test_going_back_within_an_attempt(tmp_path: Path) -> None:
    """After a return to a checkpoint in the same process, what was done again counts, and nothing twice."""
    with smdbg.Hook(tmp_path / "run") as hook:
        for mark, step in enumerate([0, 1, 2, 3, 4, 2, 3, 1, 2]):
            hook.set_step(step)
            hook.save_scalar("x", mark)
            hook.end_step()
    run = smdbg.open_run(tmp_path / "run")
    assert run.steps().tolist() == run.step_table().step.tolist() == [0, 1, 2]
    assert run.tensor("x").values().tolist() == run.tensor("x").stat("mean")[1].tolist() == [0, 7, 8]
    assert run.stats("mean").matrix[:, 0].tolist() == [0, 7, 8]
    assert len(smdbg.open_run(tmp_path / "run", attempt="all").step_table().step) == 9


def test_reading_while_it_is_written(tmp_path: Path) -> None:
    """A reader beside a writer at full speed sees whole steps, at any moment, with tensors coming all the time."""
    url, stop = tmp_path / "run", threading.Event()
    hook = smdbg.Hook(url, buffer_bytes=32 << 20, when_full="block")

    def write() -> None:
        step = 0
        while not stop.is_set():
            hook.save_scalar("loss", step / 2, "losses")
            hook.save_tensor(f"t{step // 50}", np.arange(step % 30) + step, f"c{step // 200 % 40}")
            hook.end_step()
            step += 1
            if step % 100 == 0:
                hook.flush()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        run, end = smdbg.open_run(url), time.monotonic() + 3
        while time.monotonic() < end:
            run.refresh()
            steps = run.steps()
            assert steps.tolist() == list(range(steps.size))
            if "loss" in run.tensors():
                assert np.array_equal(run.tensor("loss").values(), steps / 2)
            for name in run.tensors("t*")[-2:]:
                for step in run.tensor(name).steps().tolist():
                    assert np.array_equal(run.tensor(name).value(step), np.arange(step % 30) + step)
    finally:
        stop.set()
        writer.join()
        hook.close()
    assert steps.size > 100
