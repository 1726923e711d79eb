"""The command line on resumed workers, on tensors of one worker alone, and on all the statistics that were kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smdbg import CollectionConfig, Hook, ReductionConfig, SaveConfig, open_run
from smdbg.analysis.run import Run, Tensor
from smdbg.cli import run
from smdbg.cli.exits import Exit
from smdbg.stats import DEFAULT

EVERY = SaveConfig(save_interval=1)
RAW = ReductionConfig(save_raw_tensor=True)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def write(steps: range, mark: float, rank: int = 0, world_size: int = 1, **options: Any) -> None:
    """Save x = [step, mark] and loss = step + mark at each step."""
    collections = [CollectionConfig(name, save_config=EVERY, reduction_config=RAW) for name in ("t", "losses")]
    with Hook("run", collections=collections, rank=rank, world_size=world_size, **options) as hook:
        for step in steps:
            hook.set_step(step)
            hook.save_tensor("x", np.array([step, mark]), "t")
            hook.save_scalar("loss", step + mark, "losses")
            hook.end_step()


@pytest.fixture
def resumed() -> None:
    """Steps 0 to 5 of attempt 0 (mark 0.25), and 4 to 7 of attempt 1 (mark 0.5)."""
    write(range(6), 0.25)
    write(range(4, 8), 0.5, resume=True)


def inspected(capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, Any]]:
    assert run(["--run", "run", "inspect", "--format", "jsonl", *args]) == Exit.CLEAN, capsys.readouterr().err
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# ---------------------------------------------------------------------------------------------------- attempts

OLD = [(step, 0, 0.25) for step in range(6)]
NEW = [(step, 1, 0.5) for step in range(4, 8)]


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [("latest", OLD[:4] + NEW), ("0", OLD), ("1", NEW), ("all", sorted(OLD + NEW))],
)
def test_no_record_mixes_attempts(
    resumed: None, attempt: str, expected: list[tuple[int, int, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    records = inspected(capsys, "loss", "--attempt", attempt)
    assert [(r["step"], r["attempt"], r["value"] - r["step"]) for r in records] == expected
    assert all(r["mean"] == r["min"] == r["max"] == r["value"] for r in records)
    assert list(records[0])[:6] == ["version", "step", "mode", "mode_step", "worker", "attempt"]
    values = inspected(capsys, "x", "--values", "--attempt", attempt)
    assert [(r["step"], r["attempt"], r["value"]) for r in values] == [(s, n, [s, mark]) for s, n, mark in expected]
    assert [r["max"] for r in inspected(capsys, "x", "--reduce", "max", "--attempt", attempt)] == [
        max(step, mark) for step, _, mark in expected
    ]
    indexed = inspected(capsys, "x", "--index", "1", "--attempt", attempt)
    assert [r["value"] for r in indexed] == [mark for *_, mark in expected]


def test_steps_of_all_attempts_are_selected_together(resumed: None, capsys: pytest.CaptureFixture[str]) -> None:
    records = inspected(capsys, "loss", "--attempt", "all", "--steps", "-3:")
    assert [(r["step"], r["attempt"]) for r in records] == [(5, 0), (5, 1), (6, 1), (7, 1)]
    assert [(r["step"], r["attempt"]) for r in inspected(capsys, "x", "--attempt", "all", "--steps", "0,7")] == [
        (0, 0),
        (7, 1),
    ]


def test_a_tensor_that_one_attempt_lacks(resumed: None, capsys: pytest.CaptureFixture[str]) -> None:
    with Hook("run", resume=True) as hook:
        hook.set_step(7)
        hook.save_scalar("late", 3)
        hook.end_step()
    assert [(r["step"], r["attempt"]) for r in inspected(capsys, "late", "--attempt", "all")] == [(7, 2)]
    assert len(inspected(capsys, "loss", "--attempt", "all")) == 10


def test_workers_with_different_numbers_of_attempts(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(2):
        write(range(2), rank, rank, 2)
    write(range(1, 2), 5, 1, 2, resume=True)
    records = inspected(capsys, "loss", "--attempt", "all")
    assert [(r["step"], r["worker"], r["attempt"], r["value"]) for r in records] == [
        (0, 0, 0, 0), (0, 1, 0, 1), (1, 0, 0, 1), (1, 1, 0, 2), (1, 1, 1, 6)
    ]  # fmt: skip


def test_a_step_repeated_within_an_attempt_is_shown_as_it_was_last(capsys: pytest.CaptureFixture[str]) -> None:
    with Hook("run") as hook:
        for number, step in enumerate([0, 1, 2, 1, 2]):
            hook.set_step(step)
            hook.save_scalar("loss", number, "losses")
            hook.end_step()
    write(range(2, 3), 0.5, resume=True)
    records = inspected(capsys, "loss", "--attempt", "all")
    assert [(r["step"], r["attempt"], r["value"]) for r in records] == [(0, 0, 0), (1, 0, 3), (2, 0, 4), (2, 1, 2.5)]
    assert [r["mean"] for r in records] == [r["value"] for r in records]


def test_the_table_says_which_attempt_where_there_are_several(
    resumed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["--run", "run", "inspect", "loss", "--format", "table", "--attempt", "all"])
    out = capsys.readouterr().out
    assert "attempt" in out and "5.25" in out and "5.5" in out
    run(["--run", "run", "inspect", "loss", "--format", "table", "--attempt", "1"])
    assert "attempt" not in capsys.readouterr().out


def test_one_array_is_of_one_attempt(resumed: None, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--run", "run", "inspect", "loss", "--out", "x.npy", "--attempt", "all"]
    assert run(args) == Exit.ERROR
    assert "attempts 0, 1: choose one with --attempt" in capsys.readouterr().err and not Path("x.npy").exists()
    assert run([*args, "--steps", "6:"]) == Exit.CLEAN
    assert np.load("x.npy").tolist() == [6.5, 7.5]


@pytest.mark.parametrize("args", [["ls"], ["inspect", "loss"], ["inspect", "nonsense"], ["check"]])
def test_an_attempt_that_nobody_has_is_refused(
    resumed: None, args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--run", "run", *args, "--attempt", "7"]) == Exit.ERROR
    out, err = capsys.readouterr()
    assert out == "" and "has an attempt 7; there are: 0, 1." in err
    assert run(["--run", "run", "ls", "--attempt", "1"]) == Exit.CLEAN


# ---------------------------------------------------------------------------------------------------- statistics


def test_all_statistics_that_were_kept_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    kept = ReductionConfig(hash=True, quantiles=True, histogram=True, exponent_histogram=True)
    with Hook("run", collections=[CollectionConfig("t", save_config=EVERY, reduction_config=kept)]) as hook:
        for step in range(2):
            hook.save_tensor("x", np.arange(101.0) + step, "t")
            hook.end_step()
    record = inspected(capsys, "x")[1]
    assert list(record)[6:19] == list(DEFAULT)
    assert set(open_run("run").tensor("x").statistics()) < set(record)
    assert (record["q25"], record["q50"]) == (26, 51)
    bins = [value for name, value in record.items() if name.startswith("histogram_")]
    assert len(bins) == 64 and sum(bins) == 101 and all(isinstance(n, int) for n in bins)
    assert isinstance(record["hash_hi"], int) and isinstance(record["hash_lo"], int)
    assert run(["--run", "run", "inspect", "x", "--format", "table"]) == Exit.CLEAN
    out = capsys.readouterr().out
    assert "q25" in out and "histogram" not in out and "exp" not in out
    assert f"{record['hash_hi']:08x}{record['hash_lo']:08x}" in out
    run(["--run", "run", "inspect", "x", "--format", "table", "--reduce", "histogram_00"])
    assert "histogram 00" in capsys.readouterr().out


def test_the_last_of_several_numbers_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Hook("run") as hook:
        for number in (1, 2, 6):
            hook.save_scalar("loss", number, "losses")
        hook.end_step()
    (record,) = inspected(capsys, "loss")
    assert (record["value"], record["count"], record["last"]) == (3, 3, 6)
    run(["--run", "run", "inspect", "loss", "--format", "table"])
    assert "last" in capsys.readouterr().out


def test_a_count_along_an_axis_is_shown_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    with Hook("run", collections=[CollectionConfig("t", save_config=EVERY, reduction_config=RAW)]) as hook:
        hook.save_tensor("x", np.array([[np.nan, 0], [np.nan, 0]]), "t")
        hook.end_step()
    assert run(["--run", "run", "inspect", "x", "--reduce", "nan", "--axis", "0", "--format", "table"]) == Exit.CLEAN
    assert "[2" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- index


def test_an_index_looks_up_no_shape_unless_it_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hook("run", collections=[CollectionConfig("t", save_config=EVERY, reduction_config=RAW)]) as hook:
        for step in range(30):
            hook.save_tensor("x", np.full(3 if step < 20 else 2, step), "t")
            hook.end_step()
    asked: list[int] = []
    shape_at = Tensor.shape_at

    def counting(self: Tensor, step: int, worker: int = 0) -> tuple[int, ...]:
        asked.append(step)
        return shape_at(self, step, worker)

    monkeypatch.setattr(Tensor, "shape_at", counting)
    assert [r["value"] for r in inspected(capsys, "x", "--index", "1")] == list(range(30)) and not asked
    for index, words in (("2", "The index 2 is outside"), ("2:", "selects nothing")):
        assert run(["--run", "run", "inspect", "x", "--index", index]) == Exit.ERROR
        out, err = capsys.readouterr()
        assert out == "" and words in err and "shape 2" in err
    assert [r["value"] for r in inspected(capsys, "x", "--index", "2:", "--steps", ":20")] == [[n] for n in range(20)]


# ---------------------------------------------------------------------------------------------------- workers


def test_what_worker_1_alone_has_needs_no_worker_option(capsys: pytest.CaptureFixture[str]) -> None:
    collections = [CollectionConfig("t", save_config=EVERY, reduction_config=RAW)]
    for rank in range(2):
        with Hook("run", rank=rank, world_size=2, collections=collections) as hook:
            for step in range(3):
                hook.save_scalar("loss", step)
                if rank:
                    hook.save_tensor("mine", np.array([step, 7]), "t")
                hook.end_step()
    run(["--run", "run", "ls", "mine", "--format", "jsonl"])
    record = json.loads(capsys.readouterr().out)
    assert (record["steps"], record["last_step"], record["workers"], record["bytes"]) == (3, 2, 1, 3 * 2 * 8)
    assert [(r["worker"], r["max"]) for r in inspected(capsys, "mine")] == [(1, 7)] * 3
    assert [r["value"] for r in inspected(capsys, "mine", "--index", "0")] == [0, 1, 2]
    assert inspected(capsys, "mine", "--reduce", "median")[2]["median"] == 4.5
    for args in ([], ["--values"], ["--attempt", "all"]):
        assert run(["--run", "run", "inspect", "mine", "--format", "table", *args]) == Exit.CLEAN
    assert run(["--run", "run", "inspect", "mine", "--out", "x.npy"]) == Exit.CLEAN
    assert np.load("x.npy").tolist() == [[0, 7], [1, 7], [2, 7]]
    capsys.readouterr()
    assert run(["--run", "run", "inspect", "mine", "--worker", "0"]) == Exit.ERROR
    assert "Worker 0 did not save 'mine'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- ls


def test_ls_reads_only_what_it_lists(
    resumed: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    parts = Run._parts

    def counting(self: Run, wanted: Any, tensor: Tensor, *args: Any, **options: Any) -> Any:
        read.append(tensor.name)
        return parts(self, wanted, tensor, *args, **options)

    monkeypatch.setattr(Run, "_parts", counting)
    for args in (["--collection", "losses"], ["loss", "--mode", "global"], ["--exclude", "x"]):
        read.clear()
        assert run(["--run", "run", "ls", "--format", "jsonl", *args]) == Exit.CLEAN
        assert json.loads(capsys.readouterr().out)["name"] == "loss"
        assert set(read) == {"loss"} and len(read) <= 2
    assert run(["--run", "run", "ls", "--mode", "eval"]) == Exit.CLEAN
    assert capsys.readouterr().out == ""
