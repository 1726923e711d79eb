"""Corners where the pieces meet: each of these once lost, hid or mixed up something."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg import ReductionConfig
from smdbg.analysis.checker import check
from smdbg.analysis.rule import Outcome, build, find_rule
from smdbg.errors import AccessRefused, StoreError
from smdbg.store.backend import LocalBackend
from smdbg.store.worker_group import WorkerFacts
from smdbg.store.writer import Writer


def test_a_loss_recorded_twice_a_step_is_judged(tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run") as hook:
        for _ in range(60):
            hook.save_scalar("loss", 0.9, "losses")
            hook.save_scalar("loss", 1.1, "losses")
            hook.end_step()
    run = smdbg.open_run(tmp_path / "run")
    report = check(run, [build(find_rule("loss_not_decreasing"), {})])
    assert report.rules[0].outcome is Outcome.VIOLATED
    assert run.tensor("loss").stat("rms")[1].tolist() == [1.0] * 60  # of one number: the mean


def test_late_tensors_need_few_arrays(tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run") as hook:
        for step in range(300):
            hook.save_tensor(f"t{step}", np.full(50, step, np.float32), "mine")
            hook.end_step()
    run = smdbg.open_run(tmp_path / "run")
    assert all((run.tensor(f"t{step}").value(step) == step).all() for step in range(0, 300, 37))
    arrays = [p.name for p in (tmp_path / "run/workers/00000/mine").iterdir() if p.is_dir()]
    assert len(arrays) < 20


def test_another_collection_after_a_resume(tmp_path: Path) -> None:
    for attempt, collection in enumerate(("a", "b")):
        with smdbg.Hook(tmp_path / "run", resume=attempt > 0) as hook:
            hook.save_scalar("x", attempt, collection)
            hook.end_step()
    run = smdbg.open_run(tmp_path / "run")
    tensor = run.tensor("x")
    assert tensor.nbytes == 16 and "min" in tensor.statistics()
    assert tensor.values().tolist() == [0, 1]
    assert run.tensors(collection="a") == run.tensors(collection="b") == ["x"]
    assert run.stats("mean", collection="b").matrix.ravel().tolist() == [0, 1]


def test_names_and_facts_are_checked_where_they_are_given(tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run") as hook:
        hook.save_tensor("x", np.ones((2, 3)), feature_axis=np.int64(0), aliases=["y"])
        hook.end_step()
        hook.save_scalar(5, 1.0)  # type: ignore[arg-type]
    run = smdbg.open_run(tmp_path / "run")
    assert run.tensors() == ["x"] and run.tensor("x").info.feature_axis == 0
    assert run.status == "failed: hook switched off: TypeError: a tensor's name is text, not 5"


class OnceBroken(LocalBackend):
    """Fails with something nobody expects, once, on data."""

    broken = False

    def put(self, key: str, data: Any) -> None:
        """Put, or fail."""
        if "/c/" in key and not self.broken:
            self.broken = True
            raise ValueError("odd")
        super().put(key, data)


def test_the_status_says_it_when_an_object_could_not_be_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smdbg.hooks import base

    monkeypatch.setattr(base, "open_backend", lambda url, options: OnceBroken(str(url)))
    hook = smdbg.Hook(tmp_path / "run")
    hook.save_scalar("x", 1)
    hook.end_step()
    hook.flush(5)
    hook.close()
    assert smdbg.open_run(tmp_path / "run").status.startswith("failed: hook switched off: StoreError")


def test_a_resumed_worker_that_goes_back_further(tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run") as hook:
        for step in range(10):
            hook.save_scalar("x", step)
            hook.end_step()
    with smdbg.Hook(tmp_path / "run", resume=True) as hook:
        hook.save_scalar("x", 100)
        hook.end_step()
        hook.set_step(5)
        for step in range(5, 8):
            hook.save_scalar("x", 10 * step)
            hook.end_step()
    steps, values = smdbg.open_run(tmp_path / "run").tensor("x").stat("mean")
    assert steps.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert values.tolist() == [0, 1, 2, 3, 4, 50, 60, 70]


def test_complete_steps_need_no_save(tmp_path: Path) -> None:
    hooks = [smdbg.Hook(tmp_path / "run", rank=rank, world_size=2) for rank in range(2)]
    for step in range(20):
        for rank, hook in enumerate(hooks):
            hook.should_save("metrics")
            if rank == 0 or step % 10 == 0:
                hook.save_scalar("x", step)
            hook.end_step()
    for hook in hooks:
        hook.close()
    run = smdbg.open_run(tmp_path / "run")
    assert run.complete_steps().tolist() == list(range(20))
    assert run.steps(worker=1).tolist() == [0, 10]


def test_a_tensor_whose_row_is_not_committed_does_not_exist(tmp_path: Path) -> None:
    hook = smdbg.Hook(tmp_path / "run")
    hook.save_tensor("early", np.ones(3))
    hook.end_step()
    hook.flush()
    log = tmp_path / "run/workers/00000/steps/c/0/0"
    before = log.read_bytes()
    hook.save_tensor("late", np.ones(3))
    hook.save_scalar("loss", 1.0, "losses")
    hook.end_step()
    hook.flush()
    after = log.read_bytes()
    log.write_bytes(before)  # as if the writer had been killed between catalogue and log
    run = smdbg.open_run(tmp_path / "run")
    assert run.tensors() == ["early"] and run.collections() == ["tensors"]
    log.write_bytes(after)
    hook.close()
    assert smdbg.open_run(tmp_path / "run").tensors() == ["early", "late", "loss"]


def test_features_of_other_sizes_and_without_a_finite_value(tmp_path: Path) -> None:
    shapes = [(2, 4), (2, 8), (2, 4)]
    with smdbg.Hook(tmp_path / "run", collections=["outputs"], save_config=smdbg.SaveConfig()) as hook:
        for shape in (*shapes, (2, 4)):
            value = np.ones(shape) if hook.step < 3 else np.full(shape, np.nan)
            hook.save_tensor("y", value, "outputs", feature_axis=1)
            hook.end_step()
    steps, tables = smdbg.open_run(tmp_path / "run").tensor("y").features()
    assert steps.tolist() == [0, 1, 2, 3] and [len(t) for t in tables] == [4, 8, 4, 4]


def test_statistics_that_were_asked_for_are_kept_of_single_numbers(tmp_path: Path) -> None:
    config = ReductionConfig(save_raw_tensor=True, hash=True, quantiles=True)
    with smdbg.Hook(tmp_path / "run", reduction_config=config) as hook:
        for value in (1.0, 2.0):
            hook.save_tensor("x", value)
            hook.end_step()
    tensor = smdbg.open_run(tmp_path / "run").tensor("x")
    assert tensor.stat("q50")[1].tolist() == [1, 2] == tensor.stat("max")[1].tolist()
    assert len(set(tensor.stat("hash_lo")[1].tolist())) == 2


@pytest.mark.parametrize(("code", "status"), [(0, "completed"), (None, "completed"), (3, "failed: SystemExit: 3")])
def test_leaving_with_a_status(tmp_path: Path, code: int | None, status: str) -> None:
    with pytest.raises(SystemExit), smdbg.Hook(tmp_path / "run") as hook:
        hook.save_scalar("x", 1)
        sys.exit(code)
    assert smdbg.open_run(tmp_path / "run").status == status


@pytest.mark.parametrize(("error", "again"), [(StoreError("away"), True), (AccessRefused("no"), False)])
def test_a_store_that_is_away_is_asked_again_who_superseded(tmp_path: Path, error: Exception, again: bool) -> None:
    class Moody(LocalBackend):
        def get(self, key: str) -> bytes:
            raise error

    writer = Writer(Moody(str(tmp_path)), WorkerFacts(0, 0, "me"))
    assert writer._superseded() is False
    assert writer._may_look is again
    writer.close("completed")


def test_a_dropped_collection_is_no_further_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with smdbg.Hook(tmp_path / "run", buffer_bytes=1 << 20) as hook:
        for step in range(10):
            hook.save_scalar("x", step)
            hook.save_tensor("big", np.zeros(1 << 18), "big")  # 2 MiB never fit
            hook.end_step()
    run = smdbg.open_run(tmp_path / "run")
    summary = check(run, [build(find_rule("exploding_tensor"), {})]).summary
    assert (summary.steps_seen, summary.steps, summary.dropped_steps) == (10, 10, 10)


def test_single_numbers_are_read_together(tmp_path: Path) -> None:
    asked = []

    class Counting(LocalBackend):
        def ranges(self, wanted: Any) -> list[bytes | None]:
            asked.append(len(wanted))
            return super().ranges(wanted)

    with smdbg.Hook(tmp_path / "run") as hook:
        for step in range(50):
            for number in range(40):
                hook.save_scalar(f"m{number}", step * number)
            hook.end_step()
    run = smdbg.open_run(tmp_path / "run")
    run._stored.backend = Counting(str(tmp_path / "run"))
    matrix = run.stats("mean")
    assert (matrix.matrix == np.arange(50)[:, None] * np.arange(40)).all()
    assert len(asked) <= 2
