"""Expression rules on runs that the real hook wrote: what names stand for, verdicts, other runs, what is refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import smdbg
from smdbg import stats
from smdbg.analysis.checker import check
from smdbg.analysis.expression_nodes import DOTTED, Name
from smdbg.analysis.expression_rule import ExpressionRule, with_reference
from smdbg.analysis.expression_source import RunSource, merged
from smdbg.analysis.expression_values import Series
from smdbg.analysis.pack import with_overrides
from smdbg.analysis.report import Report
from smdbg.analysis.view import View
from smdbg.errors import BadConfig, BadSelection

STEPS = 40
Values = dict[int, dict[str, Any]]


def write(url: Path, value: Callable[[int, str], Any], collections: dict[str, str], **options: Any) -> str:
    """Write a run of STEPS steps, each in mode train but every tenth; `value` gives a tensor's value, None for none."""
    roles = {"weights": "weight", "gradients": "gradient", "losses": "loss", "metrics": "metric"}
    config = smdbg.SaveConfig()
    with smdbg.Hook(url, save_config=config, collections=sorted(set(collections.values())), **options) as hook:
        for step in range(STEPS):
            hook.set_mode("eval" if step % 10 == 9 else "train")
            for name, collection in collections.items():
                found = value(step, name)
                if found is not None:
                    hook.save_tensor(name, np.asarray(found, np.float64), collection, role=roles.get(collection, ""))
            hook.should_save("losses")
            hook.end_step()
    return str(url)


NAMES = {"loss": "losses", "metrics/acc": "metrics", "a.weight": "weights", "gradient/a.weight": "gradients",
         "gradient/b": "gradients"}  # fmt: skip


def plain(step: int, name: str) -> Any:
    """A run in which all is well: the loss falls, gradients are there in mode train and of one size."""
    random = np.random.default_rng([step, sorted(NAMES).index(name)])
    if name in ("loss", "metrics/acc"):
        return 3 - 0.05 * step if name == "loss" else step / STEPS
    if step % 10 == 9 and "gradient" in name:
        return None
    return random.normal(size=(3, 4) if name.endswith("weight") else 5)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("run") / "healthy", plain, NAMES)


@pytest.fixture(scope="module")
def jumping(tmp_path_factory: pytest.TempPathFactory) -> str:
    def value(step: int, name: str) -> Any:
        found = plain(step, name)
        return found * 50 if found is not None and name == "gradient/b" and step >= 25 else found

    return write(tmp_path_factory.mktemp("run") / "jumping", value, NAMES)


def judged(url: str, **given: Any) -> Report:
    reference = given.pop("reference", None)
    rules: list[Any] = [ExpressionRule(instance="mine", **given)]
    return check(smdbg.open_run(url), with_reference(rules, reference) if reference else rules)


def outcome(report: Report) -> str:
    return report.rules[0].outcome.value


def source(url: str, mode: str = "train", **given: Any) -> RunSource:
    run = smdbg.open_run(url)
    view = View(run, {name: run.tensor(name).info for name in run.tensors()})
    return RunSource(view, mode, 0, given.pop("allowed", set(run.tensors())), **given)


# ------------------------------------------------------------------------------------ what names stand for


TRAIN = [step for step in range(STEPS) if step % 10 != 9]


@pytest.mark.parametrize("statistic", [name for name in DOTTED if name[0] != "q"])
@pytest.mark.parametrize("name", [Name("gradients"), Name("gradient"), Name("gradient/*", quoted=True)])
def test_a_collection_role_or_glob_is_its_tensors_taken_together(healthy: str, name: Name, statistic: str) -> None:
    found = source(healthy).statistic(statistic, name)
    together = [np.concatenate([plain(s, one).reshape(-1) for one in NAMES if "gradient" in one]) for s in TRAIN]
    assert found.steps.tolist() == TRAIN
    np.testing.assert_allclose(found.values, [stats.from_value(statistic, one) for one in together], rtol=1e-6)


@pytest.mark.parametrize("name", ["gradient/b", "*/b", "re:b$"])
def test_a_tensor_is_itself(healthy: str, name: str) -> None:
    found = source(healthy).statistic("l2", Name(name, quoted=True))
    np.testing.assert_allclose(found.values, [np.linalg.norm(plain(step, "gradient/b")) for step in TRAIN], rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_merging_is_computing_over_all_elements(seed: int) -> None:
    """Of tensors that may be absent, empty, hold NaN and infinities."""
    random = np.random.default_rng(seed)
    rows, columns = 3, int(random.integers(1, 7))
    present = random.random((rows, columns)) < 0.8
    arrays = [[random.choice([0.0, 1.5, -2.0, 40.0, np.nan, np.inf], random.integers(0, 5)) for _ in range(columns)]
              for _ in range(rows)]  # fmt: skip
    table = np.array([[stats.compute(one) if there else np.full(len(stats.DEFAULT), np.nan)
                       for one, there in zip(*row, strict=True)]
                      for row in zip(arrays, present, strict=True)])  # fmt: skip
    parts = {name: table[:, :, index] for index, name in enumerate(stats.DEFAULT)}
    found = merged(parts, present)
    for row in range(rows):
        there = [one for one, is_there in zip(arrays[row], present[row], strict=True) if is_there]
        expected = stats.compute(np.concatenate(there)) if there else np.full(len(stats.DEFAULT), np.nan)
        np.testing.assert_allclose([found[name][row] for name in stats.DEFAULT], expected, rtol=1e-9, atol=1e-12)


def test_a_statistic_that_was_not_kept_of_one_is_not_known_of_all() -> None:
    present = np.ones((1, 2), bool)
    count = np.array([[2.0, 2.0]])
    found = merged({"zeros": np.array([[1.0, np.nan]]), "count": count}, present)
    assert math.isnan(found["zeros"][0]) and found["count"][0] == 4


def test_collections_out_of_phase_meet_where_all_were_saved(tmp_path: Path) -> None:
    def value(step: int, name: str) -> Any:
        return None if step % (2 if name == "x/a" else 3) or (name == "y/c" and step < 20) else np.full(4, step + 1.0)

    url = write(tmp_path / "run", value, {"x/a": "one", "y/b": "two", "y/c": "two"})
    both = [step for step in TRAIN if step % 6 == 0]
    found = source(url).statistic("l2", Name("*", quoted=True))
    assert found.steps.tolist() == both
    np.testing.assert_allclose(found.values, [2 * (s + 1) * (2 if s < 20 else 3) ** 0.5 for s in both])
    assert source(url).statistic("l2", Name("two")).steps.tolist() == [step for step in TRAIN if step % 3 == 0]


def test_exclude_narrows_what_groups_stand_for_and_not_what_is_named(healthy: str) -> None:
    def worst(**given: Any) -> float:
        (found,) = judged(healthy, mode="train", **given).findings
        return found.worst

    both = max(math.hypot(*(np.linalg.norm(plain(step, one)) for one in NAMES if "gradient" in one)) for step in TRAIN)
    one = max(float(np.linalg.norm(plain(step, "gradient/b"))) for step in TRAIN)
    assert worst(when="l2(gradients) > 0") == pytest.approx(both)
    for choice in ({"exclude": ("*.weight",)}, {"include": ("*/b",)}):
        assert worst(when="l2(gradients) > 0", **choice) == pytest.approx(one)
    assert worst(when='l2("gradient/b") > 0', exclude=("*",)) == pytest.approx(one)
    assert outcome(judged(healthy, when="l2(gradients) > 0", exclude=("*",))) == "not applicable"


def test_a_scalar_s_name_is_its_value_infinities_too(tmp_path: Path) -> None:
    numbers = {0: 1.0, 1: math.inf, 2: -math.inf, 3: math.nan}
    url = write(tmp_path / "run", lambda step, name: numbers.get(step, 2.0), {"loss": "losses"})
    np.testing.assert_array_equal(source(url).value(Name("loss")).values[:5], [1, math.inf, -math.inf, math.nan, 2])
    assert [one.onset for one in judged(url, when="not isfinite(loss)", mode="train").findings] == [(0, 1)]


@pytest.mark.parametrize(
    ("collections", "expected"),
    [
        ({"aux": "losses", "loss": "other"}, "loss"),  # a tensor of that name
        ({"total": "losses", "aux": "losses"}, "total"),  # the main loss: the first one
        ({"x": "other", "nll": "losses"}, "nll"),
    ],
)
def test_loss_is_the_tensor_of_that_name_or_the_main_loss(
    tmp_path: Path, collections: dict[str, str], expected: str
) -> None:
    url = write(tmp_path / "run", lambda step, name: step + len(name) / 10, collections)
    assert source(url).value(Name("loss")).values[0] == pytest.approx(len(expected) / 10)
    (found,) = judged(url, expect="last(loss) < 0", mode="train").findings
    assert found.tensor == expected and found.message.startswith(f"{expected}, ")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"when": "gradients > 3"}, "'gradients' stands for 2 tensors of more than one number; ask for a statistic"),
        ({"when": '"gradient/b" > 3'}, "such as l2(\"gradient/b\") or \"gradient/b\".max"),
        ({"when": "gradients.q50 > 3"}, "q50 of several tensors does not follow"),
        ({"when": "gradiants.l2 > loss"}, "no tensor, collection or role 'gradiants'. Did you mean gradients"),
        ({"when": "gradiants.l2 > 3"}, "nothing matched: it looks for gradiants"),
        ({"when": "l2(tensor) > 3", "each": ("zzz*",)}, "nothing matched: it looks for zzz*"),
        ({"when": "loss > ref(loss)"}, "give --reference RUN"),
        ({"when": "loss > 3", "mode": "predict"}, "no step in mode predict"),
    ],
)  # fmt: skip
def test_what_does_not_apply_says_why(healthy: str, given: dict[str, Any], said: str) -> None:
    report = judged(healthy, **given)
    assert outcome(report) == "not applicable" and said in report.rules[0].detail


def test_a_name_for_several_numbers_asks_for_one_of_them(tmp_path: Path) -> None:
    url = write(tmp_path / "run", lambda step, name: 1.0, {"m/a": "metrics", "m/b": "metrics"})
    assert "name one of them in quotes: m/a, m/b" in judged(url, when="metrics > 3").rules[0].detail
    assert outcome(judged(url, when='"m/b" > 3')) == "clean"


# ------------------------------------------------------------------------------------------------ verdicts


def test_when_finds_the_steps_where_it_is_true(jumping: str, healthy: str) -> None:
    rule = {"when": "l2(gradients) > 10 * median(l2(gradients), 16)", "severity": smdbg.Severity.WARNING}
    report = judged(jumping, **rule)
    (found,) = report.findings
    assert (found.rule, found.severity.value, found.tensor, found.mode) == ("mine", "warning", "gradients", "train")
    assert (found.onset, found.first_step, found.judged) == ((24, 25), 25, len(TRAIN) - 16)
    bad = [step for step in TRAIN if step >= 25]
    assert (found.last_step, found.violations) == (bad[7], 8)  # then half of the 16 are large as well
    assert found.statistic == "l2(gradients)" and found.threshold is None and found.worst > 100
    assert report.rules[0].steps_judged == len(TRAIN) - 16 and report.rules[0].tensors_judged == 2
    assert "gradients at step 25: l2(gradients) is " in found.message and "(8 of 20 judged steps)" in found.message
    assert " and 10 * median(l2(gradients), 16) is " in found.message and found.hint
    assert outcome(judged(healthy, **rule)) == "clean"


def test_each_gives_one_verdict_a_tensor(jumping: str) -> None:
    report = judged(jumping, when="l2(tensor) > 10 * median(l2(tensor), 16)", each=("gradients",))
    (found,) = report.findings
    assert (found.tensor, found.onset) == ("gradient/b", (24, 25)) and "gradient/b at step 25" in found.message
    assert (report.rules[0].tensors_judged, report.rules[0].tensors) == (2, 2)
    report = judged(jumping, expect="max(abs_max(tensor)) < 1e-9", each=("*weight", "loss"), exclude=("gradient*",))
    assert {one.tensor for one in report.findings} == {"a.weight", "loss"}


def test_expect_is_violated_when_it_is_not_true(healthy: str) -> None:
    assert outcome(judged(healthy, expect="median(loss[10:30]) < 2.1", mode="train")) == "clean"
    report = judged(healthy, expect="median(loss[10:30]) < 2", mode="train", text="The loss must fall.")
    (found,) = report.findings
    steps = [step for step in TRAIN if 10 <= step < 30]
    value = float(np.median([plain(step, "loss") for step in steps]))
    assert (found.onset, found.first_step, found.worst, found.threshold) == ((None, 28), 28, pytest.approx(value), 2)
    assert found.statistic == "median(loss[10:30])" and report.rules[0].steps_judged == len(steps)
    assert found.message == (
        f"The loss must fall: loss, up to step 28: median(loss[10:30]) < 2 was expected, and median(loss[10:30]) is "
        f"{value:.4g}."
    )


def test_a_loss_that_is_not_a_number_does_not_pass(tmp_path: Path) -> None:
    url = write(tmp_path / "run", lambda step, name: math.nan if step == 20 else 1.0, {"loss": "losses"})
    assert outcome(judged(url, expect="median(loss) < 2")) == "violated"
    assert outcome(judged(url, expect="median(finite(loss)) < 2")) == "clean"
    (found,) = judged(url, when="loss == 1", mode="train", start_step=20).findings
    assert found.onset == (None, 21)  # a step that could not be judged is not a clean one
    report = judged(url, when="loss > 2", mode="train")
    assert outcome(report) == "clean" and report.rules[0].steps_judged == len(TRAIN) - 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"expect": "median(loss[500:]) < 2"}, "of 40 saved steps none is one that the expression needs"),
        ({"when": "loss > median(loss, 64)"}, "of 0 saved steps none had a value on both sides"),
        ({"when": "loss > sqrt(-1 * loss)"}, "of 40 saved steps none had a value on both sides"),
    ],
)
def test_too_little_is_said(healthy: str, given: dict[str, Any], said: str) -> None:
    report = judged(healthy, **given)
    assert (outcome(report), report.rules[0].detail) == ("insufficient", said)


def test_a_run_without_steps_is_insufficient(tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run"):
        pass
    assert outcome(judged(str(tmp_path / "run"), when="loss > 3")) == "insufficient"


def test_modes_and_bounds_are_kept_apart(healthy: str) -> None:
    report = judged(healthy, when="loss > 0")
    assert {(one.mode, one.violations) for one in report.findings} == {("train", 36), ("eval", 4)}
    (found,) = judged(healthy, when="loss > 0", mode="train", start_step=10, end_step=20).findings
    assert (found.first_step, found.last_step, found.violations) == (10, 18, 9)
    (found,) = judged(healthy, when="l2(gradients) > 0 or loss > 99").findings  # eval: not known, so not judged
    assert found.mode == "train"


@pytest.mark.parametrize(
    ("when", "worst", "threshold"),
    [("loss > 1", 3.0, 1.0), ("loss < 2", 1.1, 2.0), ("2 > loss", 1.1, 2.0), ("1 < loss < 9", 3.0, 1.0)],
)
def test_the_worst_is_that_of_what_is_compared(healthy: str, when: str, worst: float, threshold: float) -> None:
    (found,) = judged(healthy, when=when, mode="train").findings
    assert (found.worst, found.threshold, found.statistic) == (pytest.approx(worst), threshold, "loss")


def test_workers_are_judged_by_themselves(tmp_path: Path) -> None:
    for rank in range(2):
        with smdbg.Hook(tmp_path / "run", rank=rank, world_size=2, save_config=smdbg.SaveConfig()) as hook:
            for step in range(5):
                hook.save_scalar("loss", 10.0 * rank + step, "losses")
                hook.end_step()
    (found,) = judged(str(tmp_path / "run"), when="loss > 5").findings
    assert (found.worker, found.onset, found.violations) == (1, (None, 0), 5)
    assert outcome(judged(str(tmp_path / "run"), when="loss > 5", workers=(0,))) == "clean"


# ----------------------------------------------------------------------------------------------- other runs


def test_ref_is_the_same_of_another_run(healthy: str, jumping: str) -> None:
    same = "abs(median(l2(gradients)) / ref(median(l2(gradients))) - 1) < 0.3"
    assert outcome(judged(healthy, expect=same, reference=healthy)) == "clean"
    report = judged(jumping, expect=same.replace("median", "max"), reference=healthy)
    (found,) = report.findings
    ratio = report.findings[0].worst
    assert ratio > 10 and found.tensor == "gradients" and f"{ratio:.4g}" in found.message
    (found,) = judged(jumping, when='abs("gradient/b".l2 - ref("gradient/b".l2)) > 1e-9', reference=healthy).findings
    assert found.onset == (24, 25)
    (found,) = judged(jumping, when="tensor.l2 != ref(tensor.l2)", each=("*",), reference=healthy).findings
    assert (found.tensor, found.onset) == ("gradient/b", (24, 25))


def test_a_reference_that_lacks_what_is_named(healthy: str, tmp_path: Path) -> None:
    other = write(tmp_path / "other", lambda step, name: 1.0, {"loss": "losses"})
    report = judged(healthy, expect="mean(l2(gradients)) < ref(mean(l2(gradients)))", reference=other)
    assert outcome(report) == "not applicable" and f"in the reference run {other}" in report.rules[0].detail
    report = judged(healthy, when="tensor.l2 != ref(tensor.l2)", each=("*",), reference=other)
    assert {one.tensor for one in report.findings} == {"loss"} and report.rules[0].tensors_judged == 1
    report = judged(healthy, expect="mean(loss) < ref(mean(loss))", reference=str(tmp_path / "gone"))
    assert outcome(report) == "failed" and "gone" in report.rules[0].detail


def test_a_reference_is_opened_once_and_only_if_needed(healthy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = smdbg.open_run

    def open_run(url: str, **options: Any) -> smdbg.Run:
        opened.append(url)
        return real(url, **options)

    monkeypatch.setattr("smdbg.analysis.expression_source.open_run", open_run)
    several: list[Any] = [ExpressionRule(instance=str(i), expect=f"mean(loss) < {i} + ref(mean(loss))") for i in (1, 2)]
    other: list[Any] = [ExpressionRule(instance="x", expect="mean(loss) < 9")]
    check(real(healthy), with_reference(other, healthy))
    assert opened == []
    check(real(healthy), with_reference(several + other, healthy))
    assert opened == [healthy]


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "either 'when' or 'expect'"),
        ({"when": "loss > 3", "expect": "loss > 3"}, "either 'when' or 'expect'"),
        ({"when": "loss"}, "'when' must say yes or no"),
        ({"when": "median(loss) > 3"}, "use 'expect'"),
        ({"expect": "loss > 3"}, "write all(...)"),
        ({"expect": "2 > 1"}, "names no tensor"),
        ({"when": "zzz(loss) > 3"}, "'when': at character 1 ('zzz'): there is no function"),
        ({"when": "tensor.l2 > 3"}, "'each' and the name 'tensor'"),
        ({"when": "loss > 3", "each": ("*",)}, "'each' and the name 'tensor'"),
        ({"when": "tensor.l2 > 3", "each": ("re:(",)}, "not a regular expression"),
    ],
)  # fmt: skip
def test_what_is_no_rule(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadConfig) as caught:
        ExpressionRule(instance="mine", **given)
    assert said in str(caught.value)


def test_settings_of_the_command_line_reach_expressions() -> None:
    rules: list[Any] = [ExpressionRule(instance="mine", when="loss > 3")]
    changed = with_overrides(rules, ["mine.when=loss > 5", "expression.severity=info"])[0]
    assert isinstance(changed, ExpressionRule) and changed.when == "loss > 5" and changed.severity.value == "info"
    assert changed.tree != rules[0].tree
    with pytest.raises(BadConfig, match="setting 'mine.when=loss' is wrong: 'when' must say yes or no"):
        with_overrides(rules, ["mine.when=loss"])


def test_a_source_without_a_reference_says_so(healthy: str) -> None:
    with pytest.raises(BadSelection, match="--reference"):
        source(healthy).other()
    assert isinstance(source(healthy, tensor="gone").value(Name("tensor")), Series)
