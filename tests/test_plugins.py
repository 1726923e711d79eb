"""Rules that do not come with smdbg: files, installed packages, and rules that look at a run step by step."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg import CollectionConfig, Hook, ReductionConfig, SaveConfig
from smdbg.analysis import plugins
from smdbg.analysis.checker import check
from smdbg.analysis.choice import choose
from smdbg.analysis.plugins import InstalledRules, known_rules, load_rules
from smdbg.analysis.rule import build, find_rule
from smdbg.cli import run as command
from smdbg.errors import BadConfig, RuleNotFound

EVERY = SaveConfig(save_interval=1)
RAW = ReductionConfig(save_raw_tensor=True)

STEP = """
from dataclasses import dataclass
from typing import ClassVar
from smdbg import StepRule
from smdbg.analysis.rule import parameter

@dataclass(frozen=True, kw_only=True)
class Large(StepRule):
    "A gradient is large."
    name: ClassVar[str] = "large"
    threshold: float = parameter(10.0, help="fire above it")

    def invoke_at_step(self, step):
        for name in self.base_trial.tensor_names(collection="gradients"):
            if self.base_trial.tensor(name).reduction_value(step, "mean", abs=True) > self.threshold:
                return True
        return False
"""


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def plugin(text: str, name: str = "mine.py") -> Path:
    Path(name).write_text(text)
    return Path(name)


def written(url: str = "run") -> str:
    """Save two gradients and a loss for ten steps; b is large from step 4 on, a at step 6. Odd steps are eval."""
    both = {"train": EVERY, "eval": EVERY}
    collections = [CollectionConfig(name, save_config=both) for name in ("gradients", "losses")]
    with Hook(url, collections=collections) as hook:
        for step in range(10):
            hook.set_mode("eval" if step % 2 else "train")
            hook.save_tensor("a", np.full(3, 100.0 if step == 6 else 1.0), "gradients", role="gradient")
            if step != 3:
                hook.save_tensor("b", np.full(3, -50.0 if step >= 4 else 1.0), "gradients", role="gradient")
            hook.save_tensor("loss", np.float32(step), "losses", role="loss")
            hook.end_step()
    return url


# ------------------------------------------------------------------------------------------------------ files


def test_a_plugin_is_loaded_by_name_and_its_rules_have_parameters() -> None:
    rules = load_rules([plugin(STEP), Path("./mine.py")])
    assert list(rules) == ["large"]
    assert build(rules["large"], {"threshold": "1e3"}).threshold == 1000.0  # type: ignore[attr-defined]
    assert not list(Path().glob("__pycache__"))


def test_a_changed_plugin_is_read_anew() -> None:
    load_rules([plugin(STEP)])
    assert list(load_rules([plugin(STEP.replace('"large"', '"huge"'))])) == ["huge"]


HEAD = "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom smdbg import Rule, StepRule\n"
BAD = {
    "syntax": ("x = 1\ndef f(:\n", "mine.py:2", "SyntaxError"),
    "import": ("\nimport no_such_module\n", "mine.py:2", "ModuleNotFoundError: No module named 'no_such_module'"),
    "raises": ("def f():\n    raise ValueError('boom')\n\nf()\n", "mine.py:2", "ValueError: boom"),
    "exit": ("import sys\nsys.exit(0)\n", "mine.py:2", "calls sys.exit"),
    "nothing": ("x = 1\n", "mine.py:", "holds no rule"),
    "only an import": (HEAD, "mine.py:", "holds no rule"),
    "no name": (HEAD + "class A(StepRule):\n    pass\n", "mine.py:4", "has no name"),
    "odd name": (HEAD + "class A(StepRule):\n    name = 'a.b'\n", "mine.py:4", "cannot be its name"),
    "taken": (HEAD + "class A(StepRule):\n    name = 'all_zero'\n", "mine.py:4", "comes with smdbg"),
    "twice": (HEAD + "class A(StepRule):\n    name = 'x'\nclass B(A):\n    pass\n", "mine.py:6", "name 'x' is taken"),
    "undecorated": (HEAD + "class A(StepRule):\n    name = 'x'\n    t: float = 1.0\n", "mine.py:4", "@dataclass("),
    "undeclared": (
        HEAD + "@dataclass(frozen=True, kw_only=True)\n"
        "class A(Rule):\n    name: ClassVar[str] = 'x'\n    t: float = 1.0\n",
        "mine.py:",
        "declare the parameter as `t: ... = parameter(...)`",
    ),
    "no default": (
        HEAD + "from smdbg.analysis.rule import parameter\nimport dataclasses\n"
        "@dataclass(frozen=True, kw_only=True)\nclass A(Rule):\n    name: ClassVar[str] = 'x'\n"
        "    t: float = dataclasses.field(metadata=dict(parameter(0).metadata))\n",
        "mine.py:",
        "cannot be made with its defaults",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_plugin_names_file_and_line_and_is_status_2(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    text, place, said = BAD[case]
    path, url = plugin(text), written()
    with pytest.raises(BadConfig) as caught:
        load_rules([path])
    assert place in str(caught.value) and said in str(caught.value)
    assert command(["--run", url, "check", "--plugin", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and "Traceback" not in err and "internal error" not in err


def test_the_place_of_a_plugin_is_checked() -> None:
    with pytest.raises(BadConfig, match="gone.py: there is no such file"):
        load_rules(["gone.py"])
    Path("mine.txt").write_text(STEP)
    with pytest.raises(BadConfig, match=r"ends in \.py"):
        load_rules(["mine.txt"])


def test_two_plugins_of_one_rule_are_refused() -> None:
    plugin(STEP, "other.py")
    with pytest.raises(BadConfig, match="a rule of that name is in mine.py"):
        load_rules([plugin(STEP), "other.py"])


def test_a_base_class_without_a_name_is_no_rule() -> None:
    text = HEAD + "class Base(StepRule):\n    pass\nclass A(Base):\n    name = 'x'\n"
    assert list(load_rules([plugin(text)])) == ["x"]


# -------------------------------------------------------------------------------------------------- what is run


def outcomes(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, str]]:
    status = int(command(["--run", "run", "check", "--format", "jsonl", *args]))
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return status, {record["name"]: record["outcome"] for record in records if record["type"] == "rule"}


def test_rules_of_a_plugin_are_added_and_count(capsys: pytest.CaptureFixture[str]) -> None:
    written()
    status, found = outcomes(capsys, "--plugin", str(plugin(STEP)))
    assert status == 1 and found["large"] == "violated" and "exploding_tensor" in found
    status, found = outcomes(capsys, "--plugin", "mine.py", "--set", "large.threshold=1e6")
    assert status == 0 and found["large"] == "clean"
    status, found = outcomes(capsys, "--plugin", "mine.py", "--ignore", "large")
    assert status == 0 and "large" not in found


def test_named_rules_are_run_alone(capsys: pytest.CaptureFixture[str]) -> None:
    written()
    plugin(STEP)
    assert outcomes(capsys, "--plugin", "mine.py", "--rules", "large") == (1, {"large": "violated"})
    assert outcomes(capsys, "--plugin", "mine.py", "--rules", "exploding_tensor")[1] == {"exploding_tensor": "clean"}
    assert outcomes(capsys, "--plugin", "mine.py", "--rules", "lar*") == (1, {"large": "violated"})


def test_rules_of_a_plugin_are_added_to_those_that_smdbg_yaml_names(capsys: pytest.CaptureFixture[str]) -> None:
    written()
    Path("smdbg.yaml").write_text("rules: [exploding_tensor]\n")
    expected = {"exploding_tensor": "clean", "large": "violated"}
    assert outcomes(capsys, "--plugin", str(plugin(STEP))) == (1, expected)


def test_a_plugin_with_nothing_to_judge_is_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    written()
    plugin(STEP)
    assert outcomes(capsys, "--plugin", "mine.py", "--set", "large.include=nothing*")[0] == 2


def test_a_pack_names_rules_of_a_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    written()
    plugin(STEP)
    Path("pack.yaml").write_text("rules:\n  - rule: large\n    name: not_so_large\n    parameters: {threshold: 1e6}\n")
    status, found = outcomes(capsys, "--plugin", "mine.py", "--pack", "pack.yaml")
    assert (status, found) == (0, {"not_so_large": "clean"})
    assert command(["--run", "run", "check", "--pack", "pack.yaml"]) == 2
    assert "pack.yaml:2" in capsys.readouterr().err


def test_what_a_plugin_prints_is_not_amid_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    written()
    plugin("print('hello')\n" + STEP.replace("        return False", "        print('at', step)\n        return False"))
    assert outcomes(capsys, "--plugin", "mine.py")[0] == 1
    assert command(["rules", "--plugin", "mine.py", "--format", "jsonl"]) == 0
    out, err = capsys.readouterr()
    assert "large" in [json.loads(line)["name"] for line in out.splitlines()] and "hello" in err


@pytest.mark.parametrize("error", ["raise RuntimeError('boom')", "import sys; sys.exit(1)", "return [][0]"])
def test_a_rule_that_breaks_while_it_judges_fails_alone(error: str, capsys: pytest.CaptureFixture[str]) -> None:
    written()
    plugin(STEP.replace("        for name in", f"        {error}\n        for name in"))
    status, found = outcomes(capsys, "--plugin", "mine.py")
    assert status == 2 and found["large"] == "failed" and found["exploding_tensor"] == "clean"


def test_rules_lists_and_explains_those_of_a_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    plugin(STEP)
    assert command(["rules", "--plugin", "mine.py", "--format", "tsv"]) == 0
    assert "large\tA gradient is large." in capsys.readouterr().out
    assert command(["rules", "large", "--plugin", "mine.py", "--format", "jsonl"]) == 0
    parameters = json.loads(capsys.readouterr().out)["parameters"]
    assert (parameters[0]["name"], parameters[0]["default"]) == ("threshold", 10.0)
    assert command(["rules", "large"]) == 2


# ------------------------------------------------------------------------------------------- installed packages


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package by its metadata: a good rule, and some that cannot be used."""
    site = tmp_path / "site"
    about = site / "their_rules-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-rules\nVersion: 1.0\n")
    points = ["large = their_rules:Large", "breaks = their_broken:X", "leaves = their_exit:X", "number = their_rules:N"]
    points += ["other = their_rules:Large", "all_zero = their_rules:Large"]
    (about / "entry_points.txt").write_text("[smdbg.rules]\n" + "\n".join(points) + "\n")
    (site / "their_rules.py").write_text(STEP + "\nN = 1\n")
    (site / "their_broken.py").write_text("raise ImportError('no GPU')\n")
    (site / "their_exit.py").write_text("import sys\nsys.exit(1)\n")
    monkeypatch.syspath_prepend(str(site))
    for name in ("their_rules", "their_broken", "their_exit"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("installed")
def test_an_installed_rule_is_run_when_it_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    written()
    assert outcomes(capsys, "--rules", "large") == (1, {"large": "violated"})
    assert "large" not in outcomes(capsys)[1]
    assert find_rule("all_zero", known_rules({})).__module__ == "smdbg.rules.all_zero"


@pytest.mark.usefixtures("installed")
def test_an_installed_rule_that_breaks_breaks_no_other_check(capsys: pytest.CaptureFixture[str]) -> None:
    written()
    assert outcomes(capsys)[0] == 0
    assert outcomes(capsys, "--rules", "exploding_tensor,large")[0] == 1
    assert "their_broken" not in sys.modules
    for name, said in (
        ("breaks", "ImportError: no GPU"),
        ("leaves", "SystemExit"),
        ("number", "is no rule"),
        ("other", "its class is called 'large'"),
    ):
        assert command(["--run", "run", "check", "--rules", name]) == 2
        err = capsys.readouterr().err
        assert said in err and "their-rules" in err and f"'{name}'" in err
    assert command(["rules", "--format", "tsv"]) == 0
    out, err = capsys.readouterr()
    assert "large\t" in out and "all_zero\t" in out and "breaks\t" not in out
    assert err.count("their-rules") == 4


def test_packages_are_not_looked_at_for_rules_of_smdbg(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> list[EntryPoint]:
        raise AssertionError("installed packages were looked at")

    monkeypatch.setattr("importlib.metadata.entry_points", refuse)
    assert choose(["exploding_tensor"], ignored=["all_zero"], extra=known_rules({}))
    with pytest.raises(AssertionError):
        choose(["exploding*"], extra=known_rules({}))


def test_an_unknown_rule_is_told_with_near_ones_of_everywhere() -> None:
    with pytest.raises(RuleNotFound, match="Did you mean large"):
        find_rule("larg", load_rules([plugin(STEP)]))
    assert isinstance(InstalledRules(), plugins.Mapping)


# ------------------------------------------------------------------------------------------------ a new rule


def test_a_new_rule_has_a_test_that_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["rules", "new", "large_weight", "--out", "mine"]) == 0
    assert capsys.readouterr().out.split() == ["mine/large_weight.py", "mine/test_large_weight.py"]
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "mine"]
    quick = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=quick)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout
    # The test holds the rule: with another comparison it fails.
    rule = Path("mine/large_weight.py")
    rule.write_text(rule.read_text().replace("largest > self", "largest < self"))
    test = runpy.run_path("mine/test_large_weight.py")
    with pytest.raises(AssertionError):
        test["test_it_fires"](tmp_path / "other")


def test_a_new_rule_replaces_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Path("test_mine.py").write_text("precious")
    assert command(["rules", "new", "mine"]) == 2
    assert "test_mine.py is there already" in capsys.readouterr().err
    assert Path("test_mine.py").read_text() == "precious" and not Path("mine.py").exists()


@pytest.mark.parametrize("name", ["Large", "a-b", "../x", "class", "new", "1st", "all_zero", "a.b", ""])
def test_a_new_rule_needs_a_good_name(name: str) -> None:
    assert command(["rules", "new", name]) == 2
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("args", [["new"], ["new", "a", "b"], ["a", "b"], ["all_zero", "--out", "x"], ["--out", "x"]])
def test_odd_arguments_of_rules(args: list[str]) -> None:
    assert command(["rules", *args]) == 2


# ----------------------------------------------------------------------------------------------- step by step


def judged(text: str, url: str = "run", **parameters: Any) -> Any:
    (rule_class,) = load_rules([plugin(HEAD + text)]).values()
    return check(smdbg.open_run(url), [build(rule_class, parameters)])


def test_a_step_rule_blames_the_tensor_that_it_read_last() -> None:
    (rule_class,) = load_rules([plugin(STEP)]).values()
    report = check(smdbg.open_run(written()), [build(rule_class, {"threshold": "10"})])
    found = {(f.tensor, f.mode): f for f in report.findings}
    assert set(found) == {("a", "train"), ("b", "train"), ("b", "eval")}
    train = found["b", "train"]
    assert (train.first_step, train.last_step, train.onset) == (4, 8, (2, 4))
    assert (train.violations, train.judged, train.worst, train.first_mode_step) == (2, 4, 2.0, 2)  # a hides b at 6
    assert found["a", "train"].onset == (4, 6) and found["a", "train"].violations == 1
    # At step 3 the rule asks for b, which was not saved: not judged, and said.
    assert found["b", "eval"].onset == (1, 5)
    assert report.rules[0].steps_judged == 9 and "1 of 10 steps could not be judged" in report.rules[0].detail
    assert "'b' was not saved at step 3" in report.rules[0].detail
    assert str(train.first_step) in train.message and "b" in train.message


def test_bounds_mode_and_selection_hold_for_step_rules() -> None:
    (rule_class,) = load_rules([plugin(STEP)]).values()
    run = smdbg.open_run(written())
    only = check(run, [build(rule_class, {"mode": "eval"})])
    assert {f.mode for f in only.findings} == {"eval"} and only.rules[0].steps_judged == 4
    assert not check(run, [build(rule_class, {"end_step": 4})]).findings
    assert {f.tensor for f in check(run, [build(rule_class, {"include": "a"})]).findings} == {"a"}
    late = check(run, [build(rule_class, {"start_step": 5, "mode": "eval"})]).findings
    assert [(f.first_step, f.onset) for f in late] == [(5, (None, 5))]


def test_nothing_to_read_is_insufficient_and_says_why() -> None:
    text = "class A(StepRule):\n    name = 'x'\n    def invoke_at_step(self, step):\n"
    report = judged(text + "        return self.base_trial.tensor('gone').value(step) > 0\n", written())
    assert report.rules[0].outcome is smdbg.Outcome.INSUFFICIENT and "no tensor 'gone'" in report.rules[0].detail


def test_a_step_at_which_nothing_was_read_is_told_of_the_run() -> None:
    text = "class A(StepRule):\n    name = 'x'\n    def invoke_at_step(self, step):\n        return step > 7\n"
    report = judged(text, written())
    found = [(f.tensor, f.mode, f.first_step) for f in report.findings]
    assert found == [("the run", "train", 8), ("the run", "eval", 9)]


MET = """
from smdbg.analysis.step_rule import RuleEvaluationConditionMet
class A(StepRule):
    name = 'x'
    def invoke_at_step(self, step):
        self.state['seen'] = self.state.get('seen', 0) + 1
        if self.state['seen'] >= 3:
            raise RuleEvaluationConditionMet('x', step, end_of_rule=True)
        return False
"""


def test_the_condition_may_be_raised_and_state_is_kept_within_one_check() -> None:
    for _ in range(2):
        report = judged(MET, written("run") if not Path("run").exists() else "run")
        assert [(f.first_step, f.violations) for f in report.findings] == [(2, 1)]
        assert report.rules[0].steps_judged == 3


REQUIRED = """
class A(StepRule):
    name = 'x'
    def set_required_tensors(self, step):
        for name in self.base_trial.tensor_names(collection='gradients'):
            self.req_tensors.add(name, steps=[step])
    def invoke_at_step(self, step):
        assert self.req_tensors.get_names() == ['a', 'b']
        return any(t.reduction_value(step, 'mean', abs=True) > 10 for t in self.req_tensors.get())
"""


def test_required_tensors() -> None:
    report = judged(REQUIRED, written())
    assert ("b", 4) in [(f.tensor, f.first_step) for f in report.findings]
    assert "'b' was not saved at step 3" in report.rules[0].detail


FUTURE = """
from smdbg.analysis.step_rule import TensorUnavailableForStep
class A(StepRule):
    name = 'x'
    def invoke_at_step(self, step):
        loss = self.base_trial.tensor('loss')
        assert self.base_trial.steps()[-1] == loss.steps()[-1] == step
        assert loss.prev_steps(step, 2) == [s for s in (step - 1, step - 2) if s >= 0]
        try:
            loss.value(step + 1)
        except TensorUnavailableForStep:
            return False
        return True
"""


def test_a_rule_sees_nothing_of_later_steps() -> None:
    assert judged(FUTURE, written()).rules[0].outcome is smdbg.Outcome.CLEAN


TRIAL = """
import numpy as np
from smdbg.analysis.step_rule import ModeKeys, TensorUnavailable, modes
class A(StepRule):
    name = 'x'
    def invoke_at_step(self, step):
        t = self.base_trial
        if step < 9:
            return False
        assert t.tensor_names() == ['a', 'b', 'loss'] and t.tensor_names(regex='^l') == ['loss']
        assert t.tensor_names(regex=['a', 'b']) == ['a', 'b'] and t.tensor_names(step=3) == ['a', 'loss']
        assert t.tensor_names(step=1, mode=modes.EVAL, collection='gradients') == ['a']
        assert t.has_tensor('a') and not t.has_tensor('z')
        assert t.modes() == [modes.TRAIN, ModeKeys.EVAL] and t.mode(3) == modes.EVAL and t.mode_step(3) == 1
        assert t.global_step(modes.EVAL, 1) == 3
        assert t.steps() == list(range(10)) and t.steps(modes.EVAL) == [0, 1, 2, 3, 4]
        assert t.workers() == ['worker_0'] and set(t.collections()) == {'gradients', 'losses'}
        assert t.collection('gradients').tensor_names == ('a', 'b')
        loss = t.tensor('loss')
        assert loss.value(3) == 3 and loss.value(1, mode=modes.EVAL) == 3 and loss.value(3, worker='worker_0') == 3
        assert list(loss.values(modes.EVAL)) == [0, 1, 2, 3, 4] and loss.values()[4] == 4
        assert loss.shape(3) == () and loss.workers(3) == ['worker_0']
        assert t.tensor('b').steps() == [0, 1, 2, 4, 5, 6, 7, 8, 9] and t.tensor('b').steps(modes.EVAL) == [0, 2, 3, 4]
        b = t.tensor('b')
        got = b.reduction_values(4)
        assert got['mean', False] == -50 and got['mean', True] == 50
        assert got['sum', False] == -150 and got['l1', False] == 150
        assert b.reduction_value(4, 'max') == -50 and b.reduction_value(4, 'max', abs=True) == 50
        assert np.isclose(b.reduction_value(4, 'l2'), 50 * 3**0.5) and b.reduction_value(4, 'variance') == 0
        try:
            t.tensor('z')
        except TensorUnavailable:
            return False
        return True
"""


def test_the_trial_answers_as_documented() -> None:
    report = judged(TRIAL, written())
    assert (report.rules[0].outcome, report.rules[0].detail) == (smdbg.Outcome.CLEAN, "2 of 3 tensors could be judged")


VALUES = [
    [1.0, -2.0, 3.0],
    [np.nan, 1.0],
    [np.inf, 1.0],
    [-np.inf, 1.0],
    [np.inf, -np.inf],
    [np.nan, np.inf],
    [np.inf, np.inf],
    [-np.inf],
    [0.0],
    [-1.0, -2.0],
    [np.nan],
]


@pytest.mark.parametrize("raw", [True, False])
def test_reductions_are_those_of_numpy(raw: bool) -> None:
    from smdbg.analysis.reductions import REDUCTIONS
    from smdbg.analysis.trial import TensorUnavailableForStep, Trial
    from smdbg.analysis.view import View

    reduction = ReductionConfig(save_raw_tensor=raw)
    with Hook("run", collections=[CollectionConfig("t", save_config=EVERY, reduction_config=reduction)]) as hook:
        for value in VALUES:
            hook.save_tensor("x", np.array(value), "t")
            hook.end_step()
    run = smdbg.open_run("run")
    trial = Trial(View(run, {"x": run.tensor("x").info}), ["x"], [0])
    trial.now = 99
    missing = set()
    for step, value in enumerate(VALUES):
        for name in REDUCTIONS:
            for absolute in (False, True):
                array = np.abs(value) if absolute else np.array(value)
                with np.errstate(all="ignore"):
                    wanted = {
                        "l1": lambda a: np.abs(a).sum(), "l2": lambda a: np.sqrt((a**2).sum()), "variance": np.var,
                    }.get(name, getattr(np, name, None))(array)  # fmt: skip
                try:
                    got = trial.tensor("x").reduction_value(step, name, abs=absolute)
                except TensorUnavailableForStep:
                    missing.add((name, absolute))
                    continue
                np.testing.assert_allclose(got, wanted, rtol=1e-6, err_msg=f"{name} {absolute} of {value}")
    assert missing <= (set() if raw else {("prod", False), *((n, True) for n in ("prod", "min", "std", "variance"))})
    assert raw or ("prod", False) in missing


# ------------------------------------------------------------------------------------------------- docs/custom-rules.md


def test_the_page_of_custom_rules_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "custom-rules.md").read_text(encoding="utf-8")
    rule, training, test = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    plugin(rule, "my_rules.py")
    plugin(training, "train.py")
    runpy.run_path("train.py")
    (large,) = load_rules(["my_rules.py"]).values()
    runpy.run_path(str(plugin(test, "check.py")), {"LargeGradient": large, "smdbg": smdbg})
    assert command(["--run", "runs/mine", "check", "--plugin", "my_rules.py", "--format", "jsonl"]) == 1
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (found,) = [record for record in records if record["type"] == "finding" and record["rule"] == "large_gradient"]
    assert (found["tensor"], found["onset"], found["last_step"]) == ("gradient/last.weight", [5, 6], 9)
    (point,) = re.findall(r'^large_gradient = "(.*)"$', page, re.MULTILINE)
    assert EntryPoint("large_gradient", point, plugins.GROUP).attr == "LargeGradient"
