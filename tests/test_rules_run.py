"""Rules that judge a run as a whole, where times, other runs or many labels cannot be told by a YAML case."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.analysis.checker import check
from smdbg.analysis.findings import Finding
from smdbg.analysis.report import Report
from smdbg.analysis.rule import build, find_rule
from smdbg.analysis.run import Run, WorkerFacts
from smdbg.rules.tree_depth import node_depths
from smdbg.rules.tree_depth import numbers as node_numbers

SECOND = 10**9


def begun(url: Path, steps: int, modes: Sequence[str] = ("train",)) -> Path:
    """Write a run with a loss at each step, the modes in turn."""
    with smdbg.Hook(url) as hook:
        for step in range(steps):
            hook.set_mode(modes[step % len(modes)])
            hook.save_scalar("loss", 1.0, "losses")
            hook.end_step()
    return url


class Timed(Run):
    """A run whose clock, log and status are given: real ones would make the tests wait."""

    seconds: np.ndarray[Any, Any]  # at which each step ended, since the run was created
    durations: np.ndarray[Any, Any] | None = None
    hook_seconds: np.ndarray[Any, Any] | None = None
    state = "completed"
    attempt_of_step: Sequence[int] = ()

    @classmethod
    def of(cls, url: Path, seconds: Sequence[float], state: str = "completed") -> Timed:
        run = cls(smdbg.open_run(str(url))._stored)
        run.seconds, run.state = np.array(seconds, np.float64), state
        return run

    @property
    def created(self) -> float:
        return 1e9

    @property
    def status(self) -> str:
        return self.state

    def attempts(self, worker: int | None = None) -> list[WorkerFacts]:
        return [dataclasses.replace(one, status=self.state) for one in super().attempts(worker)]

    def step_table(self, worker: int = 0) -> Any:
        table = super().step_table(worker)
        given: dict[str, Any] = {"end_time_ns": ((self.created + self.seconds) * SECOND).astype(np.int64)}
        if self.durations is not None:
            given["duration_ns"] = (self.durations * SECOND).astype(np.int64)
        if self.hook_seconds is not None:
            given["hook_ns"] = (self.hook_seconds * SECOND).astype(np.int64)
        if self.attempt_of_step:
            given["attempt"] = np.array(self.attempt_of_step, np.int64)
        return dataclasses.replace(table, **given)


def judged(run: Run, rule: str, **parameters: Any) -> Report:
    return check(run, [build(find_rule(rule), parameters)])


def one(report: Report) -> Finding:
    assert len(report.findings) == 1, report.findings
    finding = report.findings[0]
    assert finding.hint and finding.tensor in finding.message and str(finding.first_step) in finding.message
    return finding


# --- stalled_training ---


def test_a_gap_in_the_log_is_a_stall(tmp_path: Path) -> None:
    run = Timed.of(begun(tmp_path / "run", 5), [1, 2, 1802, 1803, 4000])
    finding = one(judged(run, "stalled_training"))
    assert (finding.first_step, finding.last_step, finding.onset) == (2, 4, (1, 2))
    assert (finding.violations, finding.judged, finding.worst) == (2, 4, 2197)
    assert finding.message == (
        "time between steps: 1,800 s went by without a new step on worker 0, before step 2 (2 of 4 times)."
    )


def test_what_is_shorter_is_none(tmp_path: Path) -> None:
    run = Timed.of(begun(tmp_path / "run", 3), [1, 1800, 3500])
    assert judged(run, "stalled_training").rules[0].outcome.value == "clean"


def test_time_between_attempts_is_no_stall(tmp_path: Path) -> None:
    run = Timed.of(begun(tmp_path / "run", 4), [1, 2, 9000, 9001])
    run.attempt_of_step = (0, 0, 1, 1)
    assert judged(run, "stalled_training").rules[0].outcome.value == "clean"


def test_steps_of_another_mode_do_not_count_when_a_mode_is_given(tmp_path: Path) -> None:
    url = begun(tmp_path / "run", 4, ("train", "eval"))
    run = Timed.of(url, [0, 1000, 2000, 3000])
    assert not judged(run, "stalled_training").findings
    finding = one(judged(run, "stalled_training", mode="train"))
    assert (finding.first_step, finding.mode, finding.worst) == (2, "train", 2000)


def test_a_running_run_without_a_new_step_is_stalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Timed.of(begun(tmp_path / "run", 3), [1, 2, 3], "running")
    monkeypatch.setattr(time, "time", lambda: 1e9 + 2003)
    finding = one(judged(run, "stalled_training"))
    assert (finding.first_step, finding.onset, finding.violations, finding.judged) == (2, (2, 3), 1, 3)
    assert finding.worst == pytest.approx(2000) and "since step 2, and it goes on" in finding.message
    run.state = "completed"
    assert not judged(run, "stalled_training").findings


def test_a_running_run_that_never_made_a_step_is_stalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Timed.of(begun(tmp_path / "run", 0), [], "running")
    monkeypatch.setattr(time, "time", lambda: 1e9 + 2000)
    for rule in ("stalled_training", "max_initialization_time"):
        finding = one(judged(run, rule))
        assert (finding.first_step, finding.worst, finding.onset[0]) == (0, 2000, None)


# --- max_initialization_time ---


def test_a_first_step_that_comes_late(tmp_path: Path) -> None:
    url = begun(tmp_path / "run", 2)
    finding = one(judged(Timed.of(url, [1201, 1202]), "max_initialization_time"))
    assert finding.message == "first step: step 0 of worker 0 ended 1,201 s after the run was created."
    assert judged(Timed.of(url, [1200, 9000]), "max_initialization_time").rules[0].outcome.value == "clean"


def test_first_steps_that_a_later_attempt_repeated_are_not_judged(tmp_path: Path) -> None:
    run = Timed.of(begun(tmp_path / "run", 2), [5000, 5001])
    run.attempt_of_step = (1, 1)
    result = judged(run, "max_initialization_time").rules[0]
    assert result.outcome.value == "insufficient" and "repeated by a later attempt" in result.detail


# --- step_outlier ---


def with_slow_steps(url: Path, slow: Sequence[int], hook: Sequence[int] = ()) -> Timed:
    """Return a run of 400 steps of 1 s each, with slow ones of 100 s, and some that are slow inside the hook only."""
    run = Timed.of(url, np.arange(400).tolist())
    run.durations, run.hook_seconds = np.ones(400), np.zeros(400)
    run.durations[[*slow, *hook]] = 100
    run.hook_seconds[list(hook)] = 99
    return run


def test_more_outliers_than_are_tolerated(tmp_path: Path) -> None:
    url = begun(tmp_path / "run", 400)
    finding = one(judged(with_slow_steps(url, range(150, 270, 10)), "step_outlier"))
    assert (finding.first_step, finding.last_step, finding.onset) == (250, 260, (149, 150))
    assert (finding.violations, finding.judged, finding.worst) == (2, 300, 100)
    assert "12 of 400 train steps of worker 0 took more than" in finding.message
    for quiet in (
        with_slow_steps(url, range(150, 250, 10)),  # ten are tolerated
        with_slow_steps(url, range(0, 24, 2)),  # all among the first hundred
        with_slow_steps(url, (), hook=range(150, 270, 10)),  # the hook's own time
    ):
        assert judged(quiet, "step_outlier").rules[0].outcome.value == "clean"


# --- class_imbalance and confusion ---


def test_class_imbalance_of_the_original_oracle(tmp_path: Path) -> None:
    labels = np.array([0] * 990 + [1] * 10)
    with smdbg.Hook(tmp_path / "run", collections=["labels"]) as hook:
        for _ in range(11):
            hook.save_tensor("labels", labels, "labels")
            hook.end_step()
    finding = one(judged(smdbg.open_run(tmp_path / "run"), "class_imbalance"))
    assert (finding.tensor, finding.first_step, finding.worst) == ("labels", 0, 99)
    assert "class 1 has 10 of 1,000 labels and class 0 has 990" in finding.message


def test_confusion_of_text_and_of_too_many_classes(tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run", collections=["labels", "predictions"]) as hook:
        hook.save_tensor("labels", np.array(["cat", "dog", "dog"]), "labels")
        hook.save_tensor("predictions", np.array(["cat", "dog", "cow"]), "predictions")
        hook.end_step()
    finding = one(judged(smdbg.open_run(tmp_path / "run"), "confusion"))
    assert "of the 2 labels of class dog, 50 % are predicted right and 50 % as class cow" in finding.message
    with smdbg.Hook(tmp_path / "many", collections=["labels", "predictions"]) as hook:
        hook.save_tensor("labels", np.arange(3000), "labels")
        hook.save_tensor("predictions", np.arange(3000), "predictions")
        hook.end_step()
    result = judged(smdbg.open_run(tmp_path / "many"), "confusion").rules[0]
    assert (result.outcome.value, result.detail) == ("insufficient", "labels has more than 2000 classes at step 0")


# --- similar_across_runs ---


def test_another_run_that_is_not_there_fails_in_words(tmp_path: Path) -> None:
    run = smdbg.open_run(begun(tmp_path / "run", 2))
    result = judged(run, "similar_across_runs", other_run=str(tmp_path / "gone")).rules[0]
    assert result.outcome.value == "failed" and "gone" in result.detail


def test_a_run_is_similar_to_itself_and_to_none_without_its_tensors(tmp_path: Path) -> None:
    run = smdbg.open_run(begun(tmp_path / "run", 2))
    assert judged(run, "similar_across_runs", other_run=run.url).rules[0].outcome.value == "clean"
    with smdbg.Hook(tmp_path / "else") as hook:
        hook.save_scalar("accuracy", 1.0)
    result = judged(run, "similar_across_runs", other_run=str(tmp_path / "else")).rules[0]
    assert result.outcome.value == "not applicable" and "no tensor of the same name" in result.detail


def test_statistics_of_values_that_agree_agree(tmp_path: Path) -> None:
    """Without full values nothing may be reported that with them would not be."""
    rng = np.random.default_rng(0)
    a = [rng.normal(size=1000) * scale for scale in (1, 1e-9, 1e6)]
    b = [x + 0.99 * (1e-8 + 1e-5 * np.abs(x)) * rng.choice([-1, 1], x.shape) for x in a]
    for url, values in (("a", a), ("b", b)):
        kept = smdbg.ReductionConfig(save_raw_tensor=False)
        with smdbg.Hook(tmp_path / url, reduction_config=kept) as hook:
            for value in values:
                hook.save_tensor("x", value, "mine")
                hook.end_step()
    result = judged(smdbg.open_run(tmp_path / "b"), "similar_across_runs", other_run=str(tmp_path / "a")).rules[0]
    assert (result.outcome.value, result.detail) == ("clean", "3 of 3 values compared by statistics alone")


# --- replica_desync ---


def test_replicas_of_different_attempts_are_not_compared(tmp_path: Path) -> None:
    for rank, value in ((0, 1.0), (1, 2.0)):
        with smdbg.Hook(tmp_path / "run", save_config=smdbg.SaveConfig(), rank=rank, world_size=2) as hook:
            hook.save_tensor("w", np.full(3, value), "weights", role="weight")
    with smdbg.Hook(tmp_path / "run", save_config=smdbg.SaveConfig(), rank=1, world_size=2, resume=True) as hook:
        hook.set_step(0)
        hook.save_tensor("w", np.full(3, 3.0), "weights", role="weight")
    run = smdbg.open_run(tmp_path / "run")
    assert judged(run, "replica_desync").rules[0].outcome.value == "insufficient"
    first = smdbg.open_run(tmp_path / "run", attempt=0)
    assert one(judged(first, "replica_desync")).worker == 1


# --- trees ---


def test_depth_of_random_trees_in_random_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        table: list[list[int]] = []
        for number in range(int(rng.integers(1, 4))):
            ids = rng.permutation(200)  # numbers say nothing of the place
            leaves, used = [(0, 0)], 1
            rows = [[number, int(ids[0]), -1, -1, 0]]
            for _ in range(int(rng.integers(0, 30))):
                at, deep = leaves.pop(int(rng.integers(len(leaves))))
                for side in (2, 3):
                    rows[at][side] = int(ids[used])
                    leaves.append((len(rows), deep + 1))
                    rows.append([number, int(ids[used]), -1, -1, deep + 1])
                    used += 1
            table += rows
        *columns, depth = np.array(table, np.int64)[rng.permutation(len(table))].T
        assert node_depths(*columns).tolist() == depth.tolist()


def test_node_numbers_from_text_bytes_and_floats() -> None:
    assert node_numbers(np.array(["0-12", "", "7", "nan"])).tolist() == [12, -1, 7, -1]
    assert node_numbers(np.array([b"3-4"])).tolist() == [4]
    assert node_numbers(np.array([2.0, np.nan, -1.0, np.inf])).tolist() == [2, -1, -1, -1]


# --- blocks ---


@pytest.mark.parametrize(
    ("rule", "parameters"),
    [
        ("overtraining", {"patience_train": 3}),
        ("nlp_sequence_ratio", {"token_values": "0,1", "token_thresholds_percent": "40,40"}),
    ],
)
def test_where_blocks_are_cut_changes_nothing(rule: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    with smdbg.Hook(tmp_path / "run", collections=["inputs", "losses"], save_config=smdbg.SaveConfig()) as hook:
        for step in range(40):
            hook.save_scalar("loss", float(1 / (1 + step // 9)), "losses")
            if step % 3:
                hook.save_tensor("embedding_input_0", rng.integers(0, 3, 8), "inputs")
            hook.end_step()
    run = smdbg.open_run(tmp_path / "run")
    built = [build(find_rule(rule), parameters)]
    whole = [finding.record() for finding in check(run, built).findings]
    assert whole
    for rows in (1, 2, 3, 7):
        assert [finding.record() for finding in check(run, built, block_rows=rows).findings] == whole
