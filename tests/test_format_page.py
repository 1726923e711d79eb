"""docs/format.md is enough to read a run: a reader written from it alone finds everything that was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from format_reader import Run, checksum

import smdbg

EVERY = smdbg.ReductionConfig(save_raw_tensor=True)


def test_the_checksum_is_that_of_the_page() -> None:
    assert checksum(b"123456789") == 0xE3069283


def test_values_statistics_and_shapes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    own = [smdbg.CollectionConfig(name, reduction_config=EVERY) for name in ("mine", "wide")]
    seldom = smdbg.CollectionConfig("seldom", save_config=smdbg.SaveConfig(3), reduction_config=smdbg.ReductionConfig())
    truth: dict[tuple[str, int], Any] = {}
    with smdbg.Hook(tmp_path / "run", collections=[*own, seldom, "losses"]) as hook:
        for step in range(12):
            given = {"a": rng.normal(size=(3, 2)), "grows": rng.integers(0, 9, (step + 1, 2)), "b": rng.random() < 0.5}
            given |= {"text": np.array(["a", "längst", "日本"][: step % 3 + 1]), "one": np.array(f"step {step}")}
            given["day"] = np.datetime64("2026-01-01") + np.arange(step + 1)
            if step > 4:
                given["late"] = rng.normal(size=40).astype("float32")
            for name, value in given.items():
                hook.save_tensor(name, value, "mine")
            hook.save_tensor("brain", rng.normal(size=5).astype(ml_dtypes.bfloat16), "mine")
            if step == 7:
                given["big"] = rng.normal(size=(700, 800))
                hook.save_tensor("big", given["big"], "wide")
            hook.save_tensor("counted", np.full(4, step), "seldom")
            for part in range(step % 3 + 1):
                hook.save_scalar("loss", step + part, collection="losses")
            truth |= {(name, step): value for name, value in given.items()}
            hook.end_step()
    reader, run = Run(tmp_path / "run"), smdbg.open_run(tmp_path / "run")
    assert reader.workers[0][0].facts["status"] == "completed"
    for name in ("a", "grows", "b", "text", "one", "day", "late", "big"):
        for step in range(12):
            found = reader.value(name, step)
            if (name, step) in truth:
                np.testing.assert_array_equal(found, truth[name, step])
            else:
                assert found is None
    for step in range(12):
        kept = reader.statistics("counted", step)
        assert (kept is not None and kept["mean"] == step and kept["count"] == 4) if step % 3 == 0 else kept is None
        recorded = reader.statistics("loss", step)
        assert recorded is not None and recorded["count"] == step % 3 + 1
        assert recorded.get("last", step) == step + step % 3
        assert reader.value("loss", step) == step + (step % 3) / 2
        np.testing.assert_array_equal(reader.value("brain", step), run.tensor("brain").value(step).astype(np.float32))
    assert reader.value("counted", 3) is None


def test_attempts_and_steps_taken_back(tmp_path: Path) -> None:
    url = tmp_path / "run"
    with smdbg.Hook(url) as hook:
        for step in (0, 1, 2, 3, 2, 3, 4, 5):
            hook.set_step(step)
            hook.save_scalar("loss", hook.step + len(hook._mode_steps) * 0.5, "losses")
            hook.end_step()
    with smdbg.Hook(url, resume=True) as hook:
        hook.set_step(4)
        for step in (4, 5, 6):
            hook.save_scalar("loss", -step, "losses")
            hook.end_step()
    reader, run = Run(url), smdbg.open_run(url)
    assert len(reader.workers[0]) == 2
    steps = run.steps()
    assert steps.tolist() == list(range(7))
    for step in steps.tolist():
        assert reader.value("loss", step) == run.tensor("loss").value(step)
    assert [reader.value("loss", step) for step in (4, 5, 6)] == [-4, -5, -6]


def test_features(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    config = smdbg.CollectionConfig("outputs", save_config=smdbg.SaveConfig(2), reduction_config=EVERY)
    values = [rng.normal(size=(9, 6)).astype("float32") for _ in range(4)]
    with smdbg.Hook(tmp_path / "run", collections=[config]) as hook:
        for value in values:
            hook.save_tensor("layer", value, "outputs", feature_axis=1)
            hook.end_step()
    reader = Run(tmp_path / "run")
    assert reader.features("layer", 1) is None
    for step in (0, 2):
        lines, value = reader.features("layer", step), values[step]
        assert lines is not None
        expected = [(value > 0).mean(0), value.mean(0), value.std(0), value.min(0), value.max(0)]
        assert lines == pytest.approx(np.stack(expected, 1), rel=1e-5)
