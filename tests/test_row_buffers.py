"""Rows wide enough for memory of their own: values are copied there once, whatever else a step does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import smdbg
from smdbg import CollectionConfig, Hook, ReductionConfig, SaveConfig
from smdbg.store.rows import RowBuffer

Truth = dict[tuple[str, int], NDArray[Any]]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the elements of each copy straight into a row's buffer."""
    seen: list[int] = []
    plain = RowBuffer.write

    def write(self: RowBuffer, at: int, elements: NDArray[Any]) -> None:
        seen.append(elements.size)
        plain(self, at, elements)

    monkeypatch.setattr(RowBuffer, "write", write)
    return seen


def check(url: Path, truth: Truth) -> None:
    run = smdbg.open_run(url)
    assert run.status == "completed"
    for name in {name for name, _ in truth}:
        tensor = run.tensor(name)
        steps = sorted(step for other, step in truth if other == name)
        assert tensor.steps().tolist() == steps
        stats = {key: dict(zip(*tensor.stat(key), strict=True)) for key in ("count", "min", "max", "mean", "l2")}
        for step in steps:
            given = truth[name, step]
            found = tensor.value(step)
            assert found.dtype == given.dtype and found.shape == given.shape and np.array_equal(found, given)
            wide = given.astype(np.float64)
            expected = {"count": wide.size, "min": wide.min(), "max": wide.max(), "mean": wide.mean()}
            expected["l2"] = np.sqrt((wide**2).sum())
            for key, value in expected.items():
                assert stats[key][step] == pytest.approx(value, rel=1e-6, abs=1e-9), (name, step, key)


def test_steps_that_save_other_tensors_and_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holes, other shapes and dtypes, late tensors, a name saved twice: memory is used again throughout."""
    random = np.random.default_rng(0)
    truth: Truth = {}
    seen = counted(monkeypatch)
    shapes = [(256, 256), (1000, 333), (7,), (65_537,), (400, 500), (12, 11, 1000), (300_001,)]

    def save(hook: Hook, step: int, name: str, value: NDArray[Any], stored: str = "") -> None:
        hook.save_tensor(name, value)
        truth[stored or name, step] = value.copy()
        value[...] = -1  # it was copied: what becomes of it does not matter any more

    with Hook(tmp_path / "run") as hook:
        for step in range(24):
            for number, shape in enumerate(shapes):
                if (step + number) % 5 == 0 and step > 2:
                    continue
                dtype = [np.float32, np.float64, np.int16][number % 3]
                value = (random.standard_normal(shape) * 1000).astype(dtype)
                if step in (9, 10, 17) and number == 1:
                    value = value[:: step - 7]
                save(hook, step, f"t{number}", value)
            if step > 5:
                save(hook, step, "late", random.standard_normal((3000, 100), np.float32))
            if step % 4 == 0:
                save(hook, step, "late" if step > 5 else "other", random.standard_normal(70_000, np.float32), "late_1")
            hook.end_step()
            if step % 3 == 0:
                assert hook.flush()
    monkeypatch.undo()
    renamed = {("other" if name == "late_1" and step <= 5 else name, step): v for (name, step), v in truth.items()}
    assert sum(seen) > 5_000_000
    check(tmp_path / "run", renamed)


def test_a_row_of_several_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of 80 MB lies in two shards; tensors cross their border, and a shard nobody wrote to is not stored."""
    random = np.random.default_rng(1)
    truth: Truth = {}
    seen = counted(monkeypatch)
    sizes = [5_000_000, 5_000_000, 7_000_000, 3_000_000]
    with Hook(tmp_path / "run") as hook:
        for step in range(4):
            for number, size in enumerate(sizes):
                if step == 3 and number > 1:
                    continue
                value = random.standard_normal(size, np.float32)
                hook.save_tensor(f"t{number}", value)
                truth[f"t{number}", step] = value
            hook.end_step()
            assert hook.flush()
    assert sum(seen) >= sum(sizes) * 2
    shards = sorted(p.name for p in (tmp_path / "run/workers/00000/tensors/float32/c/3").iterdir())
    assert shards == ["0"] and len(list((tmp_path / "run/workers/00000/tensors/float32/c/2").iterdir())) == 2
    check(tmp_path / "run", truth)


def test_a_budget_that_is_spent_keeps_statistics_from_the_buffer(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    values = [random.standard_normal((2000, 1000), np.float32) for _ in range(2)]
    with Hook(tmp_path / "run", raw_budget=9 << 20) as hook:
        for value in values:  # 8 MB each; by default both steps keep them
            hook.save_tensor("a.weight", value)
            hook.end_step()
            assert hook.flush()
    run = smdbg.open_run(tmp_path / "run")
    assert run.tensor("a.weight").value_steps().tolist() == [0]
    assert run.tensor("a.weight").stat("mean")[1] == pytest.approx([v.mean(dtype=np.float64) for v in values])


def test_features_of_a_value_in_the_buffer(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    config = CollectionConfig("outputs", save_config=SaveConfig(), reduction_config=ReductionConfig(True))
    values = [random.standard_normal((700, 3000), np.float32) for _ in range(3)]
    with Hook(tmp_path / "run", collections=[config]) as hook:
        for value in values:
            hook.save_tensor("layer", value, "outputs", feature_axis=1)
            hook.end_step()
            assert hook.flush()
    stored = smdbg.open_run(tmp_path / "run")._stored
    one = stored.attempts[0]
    place = one.entries["layer"].features[0]
    lines = stored.table(one, f"outputs/{place.array}", np.arange(3), np.arange(place.index, place.index + 3000))
    for step, value in enumerate(values):
        assert lines[step, :, 1] == pytest.approx(value.mean(axis=0), rel=1e-4, abs=1e-6)


def test_a_full_buffer_gives_the_memory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room for a row's memory, the row is dropped and counted, and later ones are kept again."""
    monkeypatch.setattr("smdbg.store.room.ROOM_SECONDS", 0.05)
    values = np.random.default_rng(4).standard_normal((3, 1500, 1000)).astype(np.float32)
    with Hook(tmp_path / "run", buffer_bytes=40 << 20) as hook:
        for step in range(6):
            for number, value in enumerate(values if step != 3 else [*values, np.zeros(3_000_000, np.float32)]):
                hook.save_tensor(f"t{number}", value + step)
            hook.end_step()
            assert hook.flush()
    run = smdbg.open_run(tmp_path / "run")
    steps = run.tensor("t1").value_steps().tolist()
    assert steps == [0, 1, 2, 4, 5] and run.attempts(0)[0].dropped_steps == 1
    for step in steps:
        assert np.array_equal(run.tensor("t1").value(step), values[1] + step)
