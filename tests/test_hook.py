"""The neutral hook: when it saves what, modes and steps, budgets, names."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import smdbg
from smdbg import CollectionConfig, ReductionConfig, SaveConfig

RAW = ReductionConfig(save_raw_tensor=True)


def facts(url: Any) -> dict[str, Any]:
    return json.loads((Path(url) / "workers/00000/zarr.json").read_text())["attributes"]["smdbg"]


# --- when ---

configs = st.builds(
    SaveConfig,
    save_interval=st.integers(1, 9),
    start_step=st.integers(0, 12),
    end_step=st.none() | st.integers(0, 30),
    save_steps=st.lists(st.integers(0, 40), max_size=4),
)


def defined(config: SaveConfig, n: int) -> list[int]:
    """Return the saved mode steps, from the definition in words."""
    end = n if config.end_step is None else config.end_step
    regular = {s for s in range(config.start_step, min(end, n)) if s % config.save_interval == 0}
    return sorted(regular | {s for s in config.save_steps if s < n})


@given(train=configs, evaluation=configs, modes=st.lists(st.sampled_from(["train", "eval", "predict"]), max_size=40))
@settings(max_examples=25)
def test_what_is_saved_is_what_the_config_says(train: SaveConfig, evaluation: SaveConfig, modes: list[str]) -> None:
    config = CollectionConfig("c", save_config={"train": train, "eval": evaluation})
    with tempfile.TemporaryDirectory() as folder:
        with smdbg.Hook(folder + "/run", collections=[config]) as hook:
            for mode in modes:
                hook.set_mode(mode)
                due = hook.should_save("c")
                assert due == (mode != "predict" and (train if mode == "train" else evaluation).due(hook.mode_step))
                hook.save_tensor("x", [hook.step, hook.mode_step], "c")
                hook.end_step()
        run = smdbg.open_run(folder + "/run")
        expected = []
        for mode, one in (("train", train), ("eval", evaluation)):
            places = [step for step, m in enumerate(modes) if m == mode]
            mine = [places[s] for s in defined(one, len(places))]
            expected += mine
            if "x" in run.tensors():
                assert run.tensor("x").steps(mode).tolist() == mine
        assert run.steps().tolist() == sorted(expected)
        if expected:
            assert run.tensor("x").values()[:, 0].tolist() == sorted(expected)
        assert run.step_table().mode.tolist() == modes if modes else True


@given(config=configs, raw=configs)
@settings(max_examples=20)
def test_full_values_follow_their_own_schedule(config: SaveConfig, raw: SaveConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        options = {"save_config": config, "reduction_config": ReductionConfig(save_raw_tensor=raw)}
        with smdbg.Hook(folder + "/run", **options) as hook:
            for step in range(45):
                hook.save_tensor("x", [float(step)])
                hook.end_step()
        run = smdbg.open_run(folder + "/run")
        kept, saved = defined(raw, 45), sorted({*defined(raw, 45), *defined(config, 45)})
        assert run.steps().tolist() == saved
        if saved:
            assert run.tensor("x").steps().tolist() == saved == run.tensor("x").stat("max")[1].tolist()
            assert run.tensor("x").value_steps().tolist() == kept
            assert np.ravel(run.tensor("x").values()).tolist() == kept


def test_the_default_configuration(tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run") as hook:
        hook.set_mode("train")
        for step in range(1031):
            hook.save_scalar("loss", step, "losses")
            hook.save_scalar("accuracy", step)
            for name in ("w.weight", "w.bias", "gradient/w.weight", "update/w.weight"):
                hook.save_tensor(name, np.full(2, float(step)))
            hook.save_tensor("in", np.ones(3), "inputs")
            hook.save_tensor("pred", np.ones(3), "predictions")
            hook.save_tensor("own", np.ones(3))
            hook.end_step()
        hook.set_mode("eval")
        for _ in range(11):
            hook.save_scalar("loss", 0, "losses")
            hook.save_tensor("w.weight", np.zeros(2))
            hook.end_step()
    run = smdbg.open_run(tmp_path / "run")
    collections = ["losses", "metrics", "weights", "biases", "gradients", "updates", "tensors"]
    assert sorted(run.collections()) == sorted(collections)
    assert [run.tensor(n).role for n in ("loss", "accuracy", "w.weight", "gradient/w.weight", "own")] == [
        "loss", "metric", "weight", "gradient", "",
    ]  # fmt: skip
    tens, doubling = set(range(0, 1031, 10)), [0, 1, 512, 513, 1024, 1025]
    assert run.tensor("loss").value_steps("train").tolist() == list(range(1031))
    assert run.tensor("loss").value_steps("eval").tolist() == list(range(1031, 1042))
    for name in ("w.weight", "gradient/w.weight"):
        assert run.tensor(name).steps().tolist() == sorted(tens | set(doubling))
        assert run.tensor(name).value_steps().tolist() == doubling
    for name in ("w.bias", "update/w.weight"):
        assert run.tensor(name).steps().tolist() == sorted(tens) and run.tensor(name).value_steps().size == 0
    assert run.tensor("own").value_steps().tolist() == list(range(1031))


def test_the_raw_budget_is_kept_and_recorded(tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run", raw_budget=2000) as hook:
        for step in range(600):
            hook.save_tensor("a.weight", np.full(100, step, np.float32))  # 400 bytes a row
            hook.save_tensor("gradient/a.weight", np.full(150, step, np.float32))  # 600
            hook.save_tensor("own", np.full(1000, step), "own")  # asked for: not part of the budget
            hook.end_step()
    run = smdbg.open_run(tmp_path / "run")
    assert run.tensor("a.weight").value_steps().tolist() == [0, 1]
    assert run.tensor("gradient/a.weight").value_steps().tolist() == [0, 1]
    assert run.tensor("a.weight").steps().size == run.tensor("gradient/a.weight").steps().size == 63
    assert run.tensor("own").value_steps().size == 600
    left = {name: about["raw_left_out"] for name, about in facts(run.url)["collections"].items()}
    assert left == {"weights": 2, "gradients": 2, "own": 0}


def test_left_out_collections_and_patterns(tmp_path: Path) -> None:
    collections = ["losses", CollectionConfig("mine", include=["conv*", "re:^b.$"], reduction_config=RAW)]
    with smdbg.Hook(tmp_path / "run", collections=collections) as hook:
        for name in ("conv1.weight", "fc.weight", "b1", "loss_total", "gradient/x", "other"):
            hook.save_tensor(name, np.ones(2))
        hook.save_tensor("fc.bias", np.ones(2), "biases")
        hook.save_scalar("lr", 1.0)
        assert hook.should_save("mine") and hook.should_save("losses") and not hook.should_save("metrics")
    run = smdbg.open_run(tmp_path / "run")
    homes = {name: run.tensor(name).collection for name in run.tensors()}
    # What belongs to a collection that is left out is not saved elsewhere instead.
    assert homes == {"conv1.weight": "mine", "b1": "mine", "loss_total": "losses", "other": "tensors"}


# --- steps and modes ---


def test_steps_and_modes(tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run") as hook:
        hook.end_step()
        hook.set_mode("train")
        hook.end_step()
        assert (hook.step, hook.mode_step, hook.mode) == (0, 0, "train")
        hook.save_scalar("x", 0)
        hook.set_mode("train")  # the same mode: the step stays open
        hook.save_scalar("y", 0)
        hook.end_step()
        hook.end_step()
        assert (hook.step, hook.mode_step) == (1, 1)
        hook.should_save("losses")  # opens a step
        hook.set_mode("eval")  # closes it
        assert (hook.step, hook.mode_step) == (2, 0)
        hook.save_scalar("x", 2)
        hook.set_mode("train")
        hook.save_scalar("x", 3)
        hook.set_step(10)
        hook.save_scalar("x", 10)
        hook.set_mode("predict")
    run = smdbg.open_run(tmp_path / "run")
    table = run.step_table()
    assert table.step.tolist() == [0, 1, 2, 3, 10]
    assert table.mode.tolist() == ["train", "train", "eval", "train", "train"]
    assert table.mode_step.tolist() == [0, 1, 0, 2, 3]
    assert run.steps().tolist() == [0, 2, 3, 10] and run.modes() == ["train", "eval"]
    assert run.tensor("y").steps().tolist() == [0] and run.tensor("x").values().tolist() == [0, 2, 3, 10]


# --- names and repetition ---


@pytest.mark.parametrize("raw", [True, False])
def test_a_scalar_recorded_many_times(tmp_path: Path, raw: bool) -> None:
    config = ReductionConfig(save_raw_tensor=raw)
    with smdbg.Hook(tmp_path / "run", reduction_config=config) as hook:
        for step in range(4):
            for part in range(step % 3 + 1):
                hook.save_scalar("loss", step + part, "losses")
            hook.end_step()
    tensor = smdbg.open_run(tmp_path / "run").tensor("loss")
    means = [0, 1.5, 3, 3]
    assert tensor.stat("mean")[1].tolist() == means
    # With full values the mean is what is kept; else the statistics are those of all that was recorded.
    assert tensor.stat("max")[1].tolist() == (means if raw else [0, 2, 4, 3])
    assert tensor.stat("rms")[1].tolist() == pytest.approx(means if raw else [0, 2.5**0.5, (29 / 3) ** 0.5, 3])
    assert tensor.stat("count")[1].tolist() == [1, 2, 3, 1]
    assert tensor.stat("last")[1].tolist() == [0, 2, 4, 3]
    if raw:
        assert tensor.values().tolist() == means


def test_a_tensor_saved_twice_gets_a_suffix(tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run") as hook:
        for step in range(2):
            for part in range(3):
                hook.save_tensor("h", np.full(2, 10 * step + part), "acts")
            hook.save_scalar("h", -1, "acts")
            hook.end_step()
    run = smdbg.open_run(tmp_path / "run")
    assert sorted(run.tensors()) == ["h", "h_1", "h_2", "h_3"]
    assert [run.tensor(n).value(1)[0] for n in ("h", "h_1", "h_2")] == [10, 11, 12]
    assert run.tensor("h_3").values().tolist() == [-1, -1]


@pytest.mark.parametrize("first", ["twice", "plain"])
def test_a_suffix_never_takes_the_name_of_another(tmp_path: Path, first: str) -> None:
    def twice(hook: smdbg.Hook) -> None:
        hook.save_tensor("h", [1], "one")
        hook.save_tensor("h", [2], "one")

    with smdbg.Hook(tmp_path / "run") as hook:
        for _ in range(2):
            if first == "twice":
                twice(hook)
            hook.save_tensor("h_1", [3], "two")
            if first == "plain":
                twice(hook)
            hook.end_step()
    run = smdbg.open_run(tmp_path / "run")
    found = {name: np.ravel(run.tensor(name).values()).tolist() for name in run.tensors()}
    assert sorted(found.values()) == [[1, 1], [2, 2], [3, 3]], found


def test_a_name_has_one_home(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with smdbg.Hook(tmp_path / "run") as hook:
        for step in range(3):
            hook.save_tensor("x", [step], "one")
            hook.save_tensor("y", [step], "two")
            hook.end_step()
            hook.save_tensor("x", [step + 0.5], "two")
            hook.end_step()
    run = smdbg.open_run(tmp_path / "run")
    assert run.tensor("x").collection == "one" and run.tensor("x").steps().tolist() == list(range(6))
    assert caplog.text.count("belongs to collection 'one'") == 1


def test_names_are_any_text(tmp_path: Path) -> None:
    names = ["loss/loss:0", "a b\n", "../../etc", "", "日本", "x" * 5000, "\x1b[31m", "re:[", "*", "steps", "\ud800"]
    with smdbg.Hook(tmp_path / "run") as hook:
        for number, name in enumerate(names):
            hook.save_tensor(name, [number], "t")
    run = smdbg.open_run(tmp_path / "run")
    assert run.tensors() == names and [int(run.tensor(n).value(0)[0]) for n in names] == list(range(len(names)))


def test_scalars_of_all_kinds(tmp_path: Path) -> None:
    given = {"int": 3, "bool": True, "np": np.float16(0.5), "array": np.array([[2]]), "complex": 3 + 4j, "big": 2**70}
    with smdbg.Hook(tmp_path / "run") as hook:
        for name, value in given.items():
            hook.save_scalar(name, value)
        hook.save_tensor("date", np.datetime64("2026-01-02", "ns"))
        hook.save_tensor("text", "abc")
        hook.save_tensor("flag", True)
        hook.save_tensor("int64", np.int64(2**62 + 1))
    run = smdbg.open_run(tmp_path / "run")
    assert run.status == "completed"
    for name, value in given.items():
        assert run.tensor(name).value(0) == np.ravel(value)[0]
        assert run.tensor(name).stat("max")[1].tolist() == [abs(np.ravel(value)[0])]
    assert run.tensor("date").value(0) == np.datetime64("2026-01-02", "ns")
    assert run.tensor("int64").value(0) == 2**62 + 1 and run.tensor("flag").stat("mean")[1].tolist() == [1]
    found = run.stats("mean")
    assert found.present.all() and [n for n, v in zip(found.names, found.matrix[0], strict=True) if np.isnan(v)] == [
        "date", "text",
    ]  # fmt: skip


def test_scalars_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    with smdbg.Hook(tmp_path / "run") as hook:
        hook.save_scalar("bf16", torch.tensor(1.5, dtype=torch.bfloat16, requires_grad=True))
        hook.save_scalar("f32", torch.tensor([[0.25]]))
    run = smdbg.open_run(tmp_path / "run")
    assert run.status == "completed" and run.stats("mean").matrix.tolist() == [[1.5, 0.25]]
