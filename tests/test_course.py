"""How a training went: its main loss, learning rate and norms, what was skipped, and whether it learned."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.analysis.course import Course
from smdbg.analysis.run import Run
from smdbg.analysis.view import View


def course(url: Path, tensors: dict[str, Any], modes: list[str] | None = None, worker: int = 0) -> Course:
    """Write `name` -> (collection, role, one value per step or None) and return the course of the run."""
    return view(write(url, tensors, modes)).course(worker)


def write(url: Path, tensors: dict[str, Any], modes: list[str] | None = None) -> Run:
    count = max((len(values) for _, _, values in tensors.values()), default=0)
    with smdbg.Hook(url, save_config=smdbg.SaveConfig()) as hook:
        for row in range(count):
            hook.set_mode(modes[row] if modes else "train")
            for name, (collection, role, values) in tensors.items():
                if row < len(values) and values[row] is not None:
                    hook.save_tensor(name, np.asarray(values[row], np.float32), collection, role=role)
            hook.should_save("losses")
            hook.end_step()
    return smdbg.open_run(str(url))


def view(run: Run) -> View:
    return View(run, {name: run.tensor(name).info for name in run.tensors()})


def of(values: Any, **more: Any) -> Course:
    """Return a course with these losses at steps 0, 1, ..."""
    found = np.asarray(values, np.float64)
    return Course(loss=(np.arange(len(found)), found), **more)


def noisy(start: float, end: float, count: int, noise: float = 0.02) -> Any:
    return np.linspace(start, end, count) + np.random.default_rng(0).normal(size=count) * noise


# what it learned


@pytest.mark.parametrize(
    ("losses", "learned"),
    [
        ([], None),
        (noisy(2, 1, 19), None),
        (noisy(2, 1, 20), True),
        (noisy(2, 1.95, 100), False),
        (noisy(2, 4, 100), False),
        (noisy(0.5, -1.5, 100), True),
        (noisy(-1, -1.5, 100), True),
        (noisy(-1, -1.02, 100), False),
        (noisy(0, 0, 100), False),
        ([*noisy(2, 1, 60), *[np.nan] * 20], False),
        ([2.0, np.nan, np.nan], False),
        ([*noisy(2, 1, 40), np.nan, *noisy(1, 0.9, 20)], True),
    ],
)
def test_learned(losses: Any, learned: bool | None) -> None:
    assert of(losses).learned is learned


def test_a_model_that_had_learned_before_may_stand_still_but_not_get_worse() -> None:
    assert of(noisy(0.3, 0.3, 100), fresh=False).learned is None
    assert of(noisy(0.3, 0.6, 100), fresh=False).learned is False
    assert of(noisy(0.3, 0.2, 100), fresh=False).learned is True


def test_levels_are_medians_of_what_is_finite() -> None:
    one = of([9, 1, np.nan, 3, 2, 2, 2, np.inf])
    assert (one.level(), one.level(1, 4), one.level(100)) == (2, 2, pytest.approx(np.nan, nan_ok=True))
    assert (one.start_level, one.end_level) == (2, 2)
    assert np.isnan(of([np.nan]).start_level) and np.isnan(Course().end_level)


def test_rises_after() -> None:
    one = of([*noisy(2, 1, 60), *noisy(3, 3, 60)])
    assert one.rises_after(60) and one.rises_after(30) and not of(noisy(2, 1, 120)).rises_after(60)
    assert of([*noisy(2, 1, 60), np.nan]).rises_after(10) and not of([np.nan, *noisy(2, 1, 60)]).rises_after(10)
    assert of([1, 1.1, 0.9, 1, 1, *noisy(5, 9, 60)]).rises_after(0)
    assert of([*noisy(2, 1, 100), *noisy(1, 1, 80), *noisy(4, 4, 40)]).rises_after(100)
    assert not Course().rises_after(5) and not of([1, 9]).rises_after(1)


# the learning rate


def test_learning_rate_and_warm_up() -> None:
    rate = np.array([0.1, 0.5, 0.95, 1.0, 0.5, 0.1])
    one = Course(lr=(np.arange(0, 60, 10), rate))
    assert one.peak_lr == 1 and one.warm_from == 20 and not one.warming
    assert one.lr_at(np.array([0, 15, 59])).tolist() == [0.1, 0.5, 0.1]
    assert np.isnan(Course(lr=(np.array([5]), np.array([1.0]))).lr_at(np.array([4]))).all()
    assert Course(lr=(np.arange(3), rate[:3])).warming and not Course(lr=(np.arange(3), np.ones(3))).warming
    assert Course().warm_from is None and np.isnan(Course().peak_lr) and not Course().warming
    assert Course(lr=(np.arange(2), np.zeros(2))).warm_from is None


# what a run holds


def test_series_of_a_run_in_mode_train(tmp_path: Path) -> None:
    tensors = {
        "loss": ("losses", "loss", [3, 99, 2, 1]),
        "optimizer/lr/0": ("metrics", "lr", [0.1, None, 0.2, 0.1]),
        "optimizer/lr/1": ("metrics", "lr", [0.3, None, 0.1, None]),
        "optimizer/grad_norm": ("metrics", "metric", [1, None, 2, np.nan]),
    }
    one = course(tmp_path / "run", tensors, ["train", "eval", "train", "train"])
    assert one.loss_name == "loss" and [part.tolist() for part in one.loss] == [[0, 2, 3], [3, 2, 1]]
    assert one.lr[0].tolist() == [0, 2, 3] and one.lr[1] == pytest.approx([0.3, 0.2, 0.1])
    assert one.gradient_norm[1] == pytest.approx([1, 2, np.nan], nan_ok=True)
    assert one.steps.tolist() == [0, 2, 3] and one.non_finite is None


def test_a_loss_recorded_in_global_only_is_found_beside_a_training(tmp_path: Path) -> None:
    tensors = {"loss": ("losses", "loss", [3, None, 2]), "w": ("weights", "weight", [None, [1.0, 2.0], None])}
    one = course(tmp_path / "run", tensors, ["global", "train", "global"])
    assert one.loss[0].tolist() == [0, 2] and one.steps.tolist() == [0, 2]


def test_evaluation_alone_shows_no_course(tmp_path: Path) -> None:
    one = course(tmp_path / "run", {"loss": ("losses", "loss", [3, np.nan])}, ["eval", "eval"])
    assert (one.loss_name, len(one.loss[0]), one.non_finite, one.learned) == ("", 0, None, None)


@pytest.mark.parametrize(
    ("names", "main"),
    [
        (["a", "b"], "a"),
        (["kl", "loss"], "loss"),
        (["box", "total_loss", "class"], "total_loss"),
        (["rare", "loss_a"], "loss_a"),
        (["rows", "number"], "number"),
        (["rows"], "rows"),
    ],
)
def test_which_of_several_losses_is_the_main_one(tmp_path: Path, names: list[str], main: str) -> None:
    values: dict[str, list[Any]] = {name: [3, 2, 1] for name in names}
    values |= {"rare": [3, None, None], "rows": [[1.0, 2.0]] * 3}
    tensors = {name: ("losses", "loss", values[name]) for name in names}
    one = course(tmp_path / "run", tensors)
    assert one.loss_name == main and len(one.loss[0]) == 3


def test_norm_from_the_saved_gradients(tmp_path: Path) -> None:
    tensors = {
        "gradient/a": ("gradients", "gradient", [[3.0], [np.inf], [3.0]]),
        "gradient/b": ("gradients", "gradient", [[4.0], [4.0], None]),
    }
    one = course(tmp_path / "run", tensors)
    assert one.gradient_norm[1] == pytest.approx([5, np.nan, 3], nan_ok=True)


def test_first_step_that_is_not_finite(tmp_path: Path) -> None:
    weights = {"w": ("weights", "weight", [[1.0], [1.0], [np.inf], [1.0]])}
    assert course(tmp_path / "a", {**weights, "loss": ("losses", "loss", [1, 1, 1, np.nan])}).non_finite == 2
    assert course(tmp_path / "b", {"loss": ("losses", "loss", [1, np.nan, 1])}).non_finite == 1


def test_skipped_steps_are_told_by_what_they_left_sound(tmp_path: Path) -> None:
    norm = ("metrics", "metric", [1, np.inf, 1, np.nan, 1, np.nan])
    sound = {"loss": ("losses", "loss", [3, 3, 3, 3, 3, np.nan]), "opt/grad_norm": norm}
    assert course(tmp_path / "a", sound).skipped == {1, 3}
    spoilt = {**sound, "w": ("weights", "weight", [[1.0], [1.0], [1.0], [1.0], [np.nan], [np.nan]])}
    assert course(tmp_path / "b", spoilt).skipped == {1}


def test_too_many_skipped_steps() -> None:
    steps = np.arange(300)

    def often(*skipped: int) -> bool:
        return Course(steps=steps, skipped=frozenset(skipped)).skips_too_often()

    assert not often() and not often(*range(16)) and often(*range(17))
    assert not often(50, 51, 52, 53) and often(50, 51, 52, 53, 54)
    assert not often(*range(100, 200, 10)) and often(*range(100, 200, 9))
    assert Course(steps=np.arange(20), skipped=frozenset(range(20))).skips_too_often()
    assert not Course().skips_too_often()


# whether the model was new


@pytest.mark.parametrize("trained", [False, True])
def test_new_parameters_show(tmp_path: Path, trained: bool) -> None:
    random = np.random.default_rng(0)
    moved = (lambda shape: random.normal(size=shape) * 0.1) if trained else (lambda shape: np.zeros(shape))
    parameters = {
        "kernel": ("weights", "weight", random.normal(size=(16, 16))),
        "even": ("weights", "weight", random.uniform(-0.25, 0.25, size=(16, 16)) + moved((16, 16))),
        "bias": ("biases", "bias", moved(16)),
        "scale": ("weights", "norm", 1 + moved(16)),
        "wide": ("biases", "bias", moved(64)),
    }
    tensors = {name: (home, role, [value, value + 1]) for name, (home, role, value) in parameters.items()}
    assert course(tmp_path / "run", tensors).fresh is not trained


def test_nothing_tells_whether_the_model_was_new(tmp_path: Path) -> None:
    late = {"w": ("weights", "weight", [None, np.zeros(64)]), "loss": ("losses", "loss", [1, 1])}
    assert course(tmp_path / "a", late).fresh is False
    assert course(tmp_path / "b", {"loss": ("losses", "loss", [1, 1])}).fresh is None
    assert course(tmp_path / "c", {"w": ("weights", "weight", [[0.5, 0.25]])}).fresh is None


def test_bounds_hold_for_the_course(tmp_path: Path) -> None:
    run = write(tmp_path / "run", {"loss": ("losses", "loss", [4, 3, np.nan, 1])})
    one = view(run).between(1, 2).course()
    assert one.loss[0].tolist() == [1] and one.steps.tolist() == [1] and one.non_finite is None
