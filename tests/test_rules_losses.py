"""The rules on losses where a table of values cannot say it: noise of many kinds, new and trained models, workers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import smdbg
from smdbg.analysis.checker import check
from smdbg.analysis.course import Course
from smdbg.analysis.findings import Severity
from smdbg.analysis.losses import Loss, blocks_of, losses_of, noise_of, rolling_median
from smdbg.analysis.rule import Rule, build, find_rule
from smdbg.analysis.view import View
from smdbg.rules.loss_divergence import LossDivergence
from smdbg.rules.loss_not_decreasing import LossNotDecreasing
from smdbg.rules.loss_oscillation import LossOscillation
from smdbg.rules.loss_plateau import LossPlateau, standing
from smdbg.rules.loss_spike import LossSpike

DEFAULT = {"window": 50, "patience": 2, "diff_percent": 1, "until_fallen": 10}


def rule(name: str, **parameters: Any) -> Rule:
    return build(find_rule(name), parameters)


def loss(values: Any, course: Course | None = None, main: bool = True) -> Loss:
    """Return a loss with these values at steps 0, 1, ..."""
    found = np.asarray(values, np.float64)
    return Loss("loss", 0, "train", np.arange(len(found)), found, main, course or Course())


def curve(kind: str, seed: int, count: int = 500) -> Any:
    """Return the losses of a training that goes well."""
    random = np.random.default_rng(seed)
    at = np.arange(count)
    normal = random.normal(size=count)
    return {
        "classes": lambda: (2.3 * np.exp(-at / 120) + 0.1) * np.exp(0.15 * normal),
        "batch of one": lambda: random.exponential(2.3 * np.exp(-at / 150) + 0.05),
        "label noise": lambda: 1.6 + 0.7 * np.exp(-at / 80) + 0.1 * normal,
        "warm-up": lambda: np.where(at < 60, 2.3, 2.3 * np.exp(-(at - 60) / 100)) * np.exp(0.05 * normal) + 0.02,
        "below zero": lambda: 1.0 - 3 * (1 - np.exp(-at / 100)) + 0.15 * normal,
        "regression": lambda: (np.exp(-at / 60) + 0.02) * random.chisquare(8, count) / 8,
        "fast, then flat": lambda: (1.0 * np.exp(-at / 4) + 0.3) * np.exp(0.1 * normal),
        "converged, heavy tail": lambda: 1e-3 * np.exp(1.5 * normal) + 2 * np.exp(-at / 10),
        "full batch": lambda: 2.3 * np.exp(-at / 50) + 1e-4,
        "cosine restarts": lambda: 2.3 * np.exp(-at / 90) * (1 + 0.3 * np.abs(np.sin(at / 125 * np.pi))) + 0.1,
    }[kind]()


KINDS = (
    "classes", "batch of one", "label noise", "warm-up", "below zero", "regression", "fast, then flat",
    "converged, heavy tail", "full batch", "cosine restarts",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_trainings_that_go_well_are_left_alone(kind: str) -> None:
    loud = []
    for seed in range(40):
        values = curve(kind, seed)
        for share in (0.4, 1.0):
            part = loss(values[: int(share * len(values))])
            found = [LossDivergence()._one(part), LossSpike()._one(part), LossOscillation()._one(part)]
            loud += [(seed, share, one.note) for one in found if one is not None and one.severity is not Severity.INFO]
        checks = LossNotDecreasing(**DEFAULT)._windows(loss(values))
        loud += [(seed, one.note) for one in checks[-1:] if one.bad]
        if standing(values, values[:20], 0.01) is not None:
            loud.append((seed, "stands"))
    assert loud == []


# a loss that diverges


@settings(max_examples=40, deadline=None, derandomize=True)
@given(at=st.integers(60, 380), times=st.floats(5, 1e20), seed=st.integers(0, 1000))
def test_the_onset_of_a_jump_is_where_it_is(at: int, times: float, seed: int) -> None:
    values = curve("classes", seed, 420)
    values[at:] = (values[at] + 2.3) * times * np.exp(0.2 * np.random.default_rng(seed).normal(size=420 - at))
    found = LossDivergence()._one(loss(values))
    assert found is not None and found.severity is Severity.ERROR
    assert (found.before, found.since) == (at - 1, at)
    spike = LossSpike()._one(loss(values[: max(at + 60, 96)]))
    assert spike is not None and (spike.before, spike.step) == (at - 1, at)


def test_a_slow_rise_began_where_the_loss_left_its_lowest_level() -> None:
    values = np.concatenate([np.linspace(2, 1, 200), np.linspace(1, 9, 200)])
    found = LossDivergence()._one(loss(values + np.random.default_rng(0).normal(size=400) * 0.02))
    assert found is not None and found.since is not None and 195 <= found.since <= 215


def test_a_loss_that_jumps_at_once_and_never_comes_back() -> None:
    values = np.concatenate([[0.7], np.random.default_rng(0).normal(4, 0.8, 200)])
    found = LossDivergence()._one(loss(values))
    assert found is not None and (found.before, found.since) == (0, 1) and "never came near" in found.note


def test_what_was_lost_again_settles_how_bad_a_rise_is() -> None:
    def after(level: float) -> Severity | None:
        values = np.concatenate([np.linspace(2, 0.2, 300), np.full(100, level)])
        found = LossDivergence()._one(loss(values + np.random.default_rng(0).normal(size=400) * 0.01))
        return found and found.severity

    assert [after(0.3), after(0.9), after(1.5)] == [None, Severity.WARNING, Severity.ERROR]


def test_a_rise_below_zero() -> None:
    values = np.concatenate([np.linspace(1, -2, 200), np.linspace(-2, 0.5, 100), np.full(60, 0.5)])
    found = LossDivergence()._one(loss(values + np.random.default_rng(0).normal(size=360) * 0.05))
    assert found is not None and found.severity is Severity.ERROR
    assert found.since is not None and 190 < found.since < 220


def test_a_term_that_rises_is_only_told() -> None:
    values = np.linspace(1, 9, 100)
    assert (found := LossDivergence()._one(loss(values, main=False))) is not None and found.severity is Severity.INFO
    nan = LossDivergence()._one(loss([1, np.nan], main=False))
    assert nan is not None and nan.severity is Severity.ERROR


# spikes


@pytest.mark.parametrize(
    ("length", "severity"), [(5, Severity.INFO), (30, Severity.WARNING), (80, Severity.ERROR)]
)
def test_how_long_a_spike_lasts_settles_how_bad_it_is(length: int, severity: Severity) -> None:
    values = curve("classes", 3)
    values[200 : 200 + length] = 9.0
    found = LossSpike()._one(loss(values))
    assert found is not None and (found.step, found.severity) == (200, severity)
    values[400:405] = 9.0
    again = LossSpike()._one(loss(values))
    assert again is not None and "2 spikes in all" in again.note and again.last_step == 400


def test_a_spike_that_ends_in_nan_is_an_error() -> None:
    values = np.concatenate([curve("classes", 1)[:200], [80.0, 1e4, 1e9], np.full(20, np.nan)])
    found = LossSpike()._one(loss(values))
    assert found is not None and found.severity is Severity.ERROR and found.step == 200


# swings


def test_data_sorted_by_class_show_a_period() -> None:
    random = np.random.default_rng(0)
    saw = np.tile(np.repeat([3.0, 0.5, 1.0, 0.02], 70), 8)
    decay = np.tile(np.exp(-np.arange(70) / 15), 32)
    found = LossOscillation()._one(loss(0.02 + saw * decay * np.exp(0.2 * random.normal(size=len(saw)))))
    assert found is not None and found.kind == 1 and found.worst == pytest.approx(280, abs=8)


def test_batches_that_come_in_the_same_order_do_not_swing() -> None:
    random = np.random.default_rng(0)
    epoch = np.exp(random.normal(size=300))
    values = np.tile(epoch, 8) * np.exp(-np.arange(2400) / 900) * np.exp(0.1 * random.normal(size=2400))
    assert LossOscillation()._one(loss(values)) is None


@pytest.mark.parametrize("shift", [0, 20])
def test_stretches_that_alternate_wherever_they_are_cut(shift: int) -> None:
    random = np.random.default_rng(0)
    values = np.tile(np.repeat([1.0, 1.6], 40), 10)[shift:] * np.exp(0.3 * random.normal(size=800 - shift))
    found = LossOscillation()._one(loss(values * np.exp(-np.arange(len(values)) / 400)))
    assert found is not None and found.kind == 0 and found.worst < -0.5


# losses that stand still, in runs


def write(url: Path, losses: Any, weights: Any, drift: float = 0.01, rates: Any = None, **hook: Any) -> smdbg.Run:
    """Write losses at every step, and at every tenth weights that move by `drift`, with their gradient."""
    with smdbg.Hook(url, save_config=smdbg.SaveConfig(), **hook) as saver:
        for row, value in enumerate(losses):
            saver.set_mode("train")
            saver.save_tensor("loss", np.float64(value), "losses", role="loss")
            if rates is not None:
                saver.save_tensor("opt/lr/0", np.float64(rates[row]), "metrics", role="lr")
            if row % 10 == 0 and weights is not None:
                moved = weights + drift * row * np.cos(np.arange(weights.size)).reshape(weights.shape)
                saver.save_tensor("head.weight", moved.astype(np.float32), "weights", role="weight")
            saver.end_step()
    return smdbg.open_run(str(url))


def new_weights() -> Any:
    return np.random.default_rng(0).uniform(-0.3, 0.3, size=(7, 11))


def trained_weights() -> Any:
    return np.random.default_rng(0).standard_t(4, size=(7, 11)) * 0.2


FLAT = 0.31 + 0.02 * np.random.default_rng(1).normal(size=240)
CHANCE = np.log(7) + 0.02 * np.random.default_rng(2).normal(size=240)


@pytest.mark.parametrize(
    ("losses", "weights", "drift", "plateau", "falls_not"),
    [
        (FLAT, new_weights(), 0.01, "error", "warning"),
        (FLAT, trained_weights(), 0.01, None, None),
        (FLAT, trained_weights(), 0.0, "error", "error"),
        (FLAT, None, 0.0, "warning", "warning"),
        (CHANCE, trained_weights(), 0.01, "error", "warning"),
        (np.linspace(2, 1, 240), new_weights(), 0.01, None, None),
        (-FLAT, new_weights(), 0.01, "warning", "warning"),
    ],
    ids=["new", "trained", "trained, does not move", "unknown", "guessing", "falls", "below zero"],
)
def test_a_loss_that_stands_still(
    tmp_path: Path, losses: Any, weights: Any, drift: float, plateau: str | None, falls_not: str | None
) -> None:
    run = write(tmp_path / "run", losses, weights, drift)
    found = check(run, [rule("loss_plateau"), rule("loss_not_decreasing", **DEFAULT)])
    assert [one.outcome.value for one in found.rules] == [
        "clean" if one is None else "violated" for one in (plateau, falls_not)
    ]
    severities = {one.rule: one.severity.value for one in found.findings}
    assert (severities.get("loss_plateau"), severities.get("loss_not_decreasing")) == (plateau, falls_not)


def test_a_gradient_of_zero_beside_a_loss_that_stands(tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run", save_config=smdbg.SaveConfig()) as hook:
        for row in range(220):
            hook.save_tensor("loss", np.float64(FLAT[row]), "losses", role="loss")
            hook.save_tensor("w", trained_weights() + row * 0.01, "weights", role="weight")
            hook.save_tensor("gradient/w", np.zeros((7, 11)), "gradients", role="gradient", of="w")
            hook.end_step()
    found = check(smdbg.open_run(str(tmp_path / "run")), [rule("loss_plateau")])
    assert found.findings == ()  # the model had learned: a perfect fit has no gradient either
    with smdbg.Hook(tmp_path / "new", save_config=smdbg.SaveConfig()) as hook:
        for row in range(220):
            hook.save_tensor("loss", np.float64(FLAT[row]), "losses", role="loss")
            hook.save_tensor("w", new_weights() + row * 0.01, "weights", role="weight")
            hook.save_tensor("gradient/w", np.zeros((7, 11)), "gradients", role="gradient", of="w")
            hook.end_step()
    found = check(smdbg.open_run(str(tmp_path / "new")), [rule("loss_plateau")])
    assert found.findings[0].severity is Severity.ERROR
    assert "gradient/w was all zero at 220 of 220 saved steps" in found.findings[0].message


def test_the_warm_up_is_waited_for(tmp_path: Path) -> None:
    rising = np.linspace(1e-6, 1e-3, 240)
    run = write(tmp_path / "a", FLAT, new_weights(), rates=rising)
    result = check(run, [rule("loss_plateau")]).rules[0]
    assert (result.outcome.value, "still rises" in result.detail) == ("insufficient", True)
    # It falls as soon as the rate is high, and the rule looks no earlier.
    late = np.concatenate([np.full(200, 2.0), np.linspace(2, 1, 60)]) + 0.01 * np.random.default_rng(0).normal(size=260)
    rates = np.concatenate([np.full(200, 1e-6), np.full(60, 1e-3)])
    run = write(tmp_path / "b", late, new_weights(), rates=rates)
    assert check(run, [rule("loss_not_decreasing", **DEFAULT)]).findings == ()


def test_a_rate_that_has_run_out_lets_no_loss_fall(tmp_path: Path) -> None:
    rates = np.concatenate([np.full(60, 1e-3), np.full(180, 1e-6)])
    run = write(tmp_path / "run", FLAT, new_weights(), rates=rates)
    found = check(run, [rule("loss_not_decreasing", **DEFAULT)]).findings
    assert [(one.first_step, one.judged) for one in found] == [(59, 1)]


def test_each_worker_by_itself(tmp_path: Path) -> None:
    write(tmp_path / "run", np.linspace(2, 1, 240), new_weights(), rank=0, world_size=2)
    run = write(tmp_path / "run", FLAT, new_weights(), rank=1, world_size=2)
    rules = [rule("loss_plateau"), rule("loss_not_decreasing", **DEFAULT)]
    assert {one.worker for one in check(run, rules).findings} == {1}
    alone = [rule("loss_plateau", workers=[0]), rule("loss_not_decreasing", workers=[0], **DEFAULT)]
    assert check(run, alone).findings == ()


def test_the_severity_given_is_never_exceeded(tmp_path: Path) -> None:
    run = write(tmp_path / "run", FLAT, new_weights(), 0.0)
    for given_severity in ("info", "warning"):
        more = {"severity": given_severity}
        found = check(run, [rule("loss_plateau", **more), rule("loss_not_decreasing", **more, **DEFAULT)])
        assert [one.severity.value for one in found.findings] == [given_severity] * 2


def test_bounds_are_kept(tmp_path: Path) -> None:
    run = write(tmp_path / "run", np.concatenate([np.linspace(2, 1, 100), [np.nan]]), new_weights())
    assert check(run, [rule("loss_divergence", end_step=100)]).findings == ()
    assert check(run, [rule("loss_divergence")]).findings[0].first_step == 100


# what they share


def test_losses_of_a_run(tmp_path: Path) -> None:
    run = write(tmp_path / "run", [3, 2, 1], None)
    view = View(run, {name: run.tensor(name).info for name in run.tensors()})
    (found,) = losses_of(LossPlateau(), view, ["loss"])
    assert (found.name, found.main, found.mode, found.values.tolist()) == ("loss", True, "train", [3, 2, 1])
    assert losses_of(LossPlateau(workers=(1,)), view, ["loss"]) == []


def test_figures() -> None:
    values = np.arange(20000.0)
    assert rolling_median(values, 5).tolist() == values[2:-2].tolist() and len(rolling_median(values[:3], 5)) == 0
    assert blocks_of(np.arange(7.0), 3).tolist() == [[1, 2, 3], [4, 5, 6]]
    noise = np.random.default_rng(0).normal(size=4000) * 0.5
    assert noise_of(noise + np.linspace(0, 100, 4000)) == pytest.approx(0.5, rel=0.1)
