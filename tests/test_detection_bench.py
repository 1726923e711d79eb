"""The detection benchmark: its trainings show what they claim, views hide what they should, and the sums are right."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from benchmarks.detection import architectures, faults, healthy, judge, report, score, train, truth  # noqa: E402
from benchmarks.detection.recipe import Case, Recipe  # noqa: E402

SMALL = Recipe("wine", "mlp", width=8, batch=16, steps=60, evaluate_every=20, lr=5e-3)


def small(case_id: str, fault=None, **changes) -> Case:
    """A case that takes a fraction of a second."""
    expected = fault.expected if fault else ()
    return Case(case_id, fault.kind if fault else "plain", 1, replace(SMALL, **changes), fault, expected=expected)


def fault_called(kind: str):
    """The first fault of a kind."""
    return next(case.fault for case in faults.cases() if case.family == kind)


def test_there_are_as_many_cases_as_promised():
    faulty, well = faults.cases(), healthy.cases()
    assert len(faulty) >= 60 and len({case.family for case in faulty}) >= 15
    assert len(well) >= 400
    assert sum(case.family != "plain" for case in well) * 2 >= len(well)
    assert len(architectures.cases()) == 100 and sum(one.faulty for one in architectures.TABLE) == 11
    assert len(train.all_cases()) == len(faulty) + len(well) + 100, "ids repeat"
    for half in ("calibrate", "report"):
        kinds = {case.family for case in faulty if case.half == half}
        assert kinds == {case.family for case in faulty}


def test_a_healthy_case_from_training_to_its_score(tmp_path):
    case = small("well")
    verdict = train.train(case, tmp_path)
    assert verdict["label"] == "healthy", verdict["why"]
    assert verdict["expected"] == [] and verdict["first_faulty_step"] is None
    assert train.last_logged(tmp_path / "well") == verdict["steps"]  # the last evaluation comes after the last step
    assert train.trained(case, tmp_path) and not train.trained(replace(case, recipe=replace(SMALL, lr=1.0)), tmp_path)
    record = judge.judge(tmp_path / "well", verdict["steps"], judge.VIEWS)
    assert score.level_of(record, "whole") in ("", "info", "warning")
    assert not record["whole"]["failed"]


def test_a_faulty_case_from_training_to_its_score(tmp_path):
    fault = replace(fault_called("NaN in a row"), start=20, on_batch=faults.m.spoil_row(float("nan"), 20))
    verdict = train.train(small("nan", fault), tmp_path)
    assert verdict["label"] == "faulty"
    assert verdict["first_faulty_step"] == 22  # 20 training steps and 2 evaluations came before
    record = judge.judge(tmp_path / "nan", verdict["steps"], ("whole", "early"), ("exploding_tensor",))
    found = score.hit(verdict, record, "whole")
    assert (found.detected, found.right, found.layer) == (True, True, True)
    assert found.saved_off == 0
    assert not score.acts_early(verdict) and not score.hit(verdict, record, "early").detected
    text = report.page([verdict], {"nan": {**record, "hidden": record["whole"]}})
    assert "| NaN in a row | 1 | 1/1 | 1/1 | 1/1 (1/1) |" in text


def test_a_fault_that_does_not_show_is_left_out(tmp_path):
    verdict = train.train(small("mild", fault_called("rate too high: explodes")), tmp_path)
    assert verdict["label"] == "" and verdict["why"] == "the fault does not show"


def test_replicas_agree_until_one_drifts(tmp_path):
    pair = {"replicas": 2, "steps": 30}
    fault = replace(
        fault_called("replicas drift"), start=10, after_update=faults.m.on_rank(1, faults.m.nudge("2.bias", 0.1))
    )
    assert train.train(small("drifts", fault, **pair), tmp_path)["label"] == "faulty"
    train.train(small("agrees", **pair), tmp_path)
    assert not truth.read(tmp_path / "agrees")["course"]["drifted"]
    assert judge.shown(tmp_path / "agrees" / "", "whole", 30).workers() == [0, 1]


def test_the_views_hide_what_they_should(tmp_path):
    verdict = train.train(small("seen"), tmp_path)
    folder, steps = tmp_path / "seen", verdict["steps"]
    whole, early, hidden = (judge.shown(folder, view, steps) for view in judge.VIEWS)
    assert {"losses", "metrics"} <= set(whole.collections())
    assert not {"losses", "metrics"} & set(hidden.collections())
    assert set(hidden.tensors()) < set(whole.tensors()) and len(hidden.steps()) == len(whole.steps())
    assert early.tensors() == whole.tensors()
    assert early.steps().max() < steps * judge.EARLY < whole.steps().max()
    assert early.tensor("0.weight").stat("l2")[0].max() < steps * judge.EARLY


def test_resumed_and_scaled_runs_count_their_steps_as_the_hook_does(tmp_path):
    for name, changes in {
        "resumed": {"resume_at": 30},
        "loop": {"scaling": "loop"},
        "wrapper": {"scaling": "wrapper"},
        "accumulated": {"accumulate": 2},
    }.items():
        verdict = train.train(small(name, **changes), tmp_path)
        assert train.last_logged(tmp_path / name) == verdict["steps"], name


def test_wilson_interval_against_known_values():
    low, high = score.wilson(0, 381)
    assert low == 0 and high == pytest.approx(0.00998, abs=1e-4)
    assert score.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert score.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert score.wilson(0, 0) == (0, 1)


def finding(rule: str, severity: str = "error", tensor: str = "2.weight", onset: int = 31, **changes):
    module = tensor.rpartition("/")[2].rpartition(".")[0]
    about = {"rule": rule, "kind": rule, "severity": severity, "tensor": tensor, "module": module, "onset": onset}
    return {**about, "message": "", **changes}


VERDICT = {"expected": ["dead_layer"], "level": "error", "layers": ["2"], "first_faulty_step": 20, "steps": 100}


def record_of(*findings):
    return {"saved": [1, 11, 21, 31, 41, 51], "whole": {"findings": list(findings), "failed": {}}}


def test_a_hit_needs_the_right_rule_at_the_right_severity():
    assert score.hit(VERDICT, record_of(), "whole") == score.Hit(False, False, (), False, False)
    other = score.hit(VERDICT, record_of(finding("overfit")), "whole")
    assert (other.detected, other.right) == (True, False)
    assert not score.hit(VERDICT, record_of(finding("dead_layer", "warning")), "whole").detected
    warned = {**VERDICT, "level": "warning"}
    assert score.hit(warned, record_of(finding("dead_layer", "warning")), "whole").right


def test_layer_and_onset_of_a_hit():
    found = score.hit(
        VERDICT, record_of(finding("overfit"), finding("dead_layer", tensor="gradient/2.weight")), "whole"
    )
    assert (found.layer, found.first_layer, found.steps_off, found.saved_off) == (True, True, 11, 1)
    second = record_of(finding("dead_layer", tensor="12.weight"), finding("dead_layer"))
    assert (score.hit(VERDICT, second, "whole").layer, score.hit(VERDICT, second, "whole").first_layer) == (True, False)
    told = record_of(finding("dead_layer", tensor="loss", module="", message="mostly 2.weight, step 2. Then 12.bias"))
    assert score.hit(VERDICT, told, "whole").layer
    wrong = record_of(
        finding("dead_layer", tensor="loss", module="", message="step 2. Mostly 12.weight or net.2.weight")
    )
    assert score.hit(VERDICT, wrong, "whole").layer is False
    before = score.hit(VERDICT, record_of(finding("dead_layer", onset=1)), "whole")
    assert (before.steps_off, before.saved_off) == (-19, -2)
    assert str(score.near([found, before], 1)) == "1/2"
    assert score.median_off([found, before]) == (15, 1.5)


def test_outcome_of_an_architecture():
    course = truth.Truth(losses=[1.0] * 6 + [0.8] * 6 + [0.95] * 6)
    assert truth.outcome(course, 6) == "faulty"
    assert truth.outcome(replace(course, losses=course.losses[:12]), 6) == ""
    assert truth.outcome(replace(course, losses=[1.0] * 6 + [0.5] * 6), 6) == "healthy"
    assert truth.outcome(replace(course, losses=[1.0] * 6 + [0.5] * 6, bad_step=7), 6) == "faulty"


def test_overfitting_is_measured_from_the_best_validation():
    losses = [1.0, 0.5, 0.4, 0.4, 0.4, 0.6, 0.6, 0.6]
    course = truth.Truth(losses=[1.0, 0.1], validation=[(10 * i, loss, 0.9) for i, loss in enumerate(losses)])
    assert course.overfits() == pytest.approx(0.5)
    assert truth.healthy(course, 0.6, "loss") == ""


def test_initialisers_of_the_architectures_have_their_spread():
    torch.manual_seed(0)
    tensor = torch.empty(400, 400)
    for how, std in {
        "he_uniform": (2 / 400) ** 0.5,
        "lecun_normal": (1 / 400) ** 0.5,
        "uniform_0.05": 0.05 / 3**0.5,
    }.items():
        architectures._fill(tensor, how)
        assert float(tensor.std()) == pytest.approx(std, rel=0.02), how
    model = architectures.build("mi_7")
    assert not model[-2].weight.any() and model[-2].bias.any() and len(model) == 12
