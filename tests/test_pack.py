"""Rule packs, parameters of rules, and finding rules by name."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import smdbg
from smdbg.analysis.checker import check
from smdbg.analysis.expression_nodes import DOTTED, FUNCTIONS
from smdbg.analysis.expression_rule import ExpressionRule
from smdbg.analysis.pack import load_pack, pack_names, with_overrides
from smdbg.analysis.rule import Rule, all_rules, build, find_rule, parameter, parameters_of
from smdbg.errors import BadConfig, RuleNotFound

FOUR = ["all_zero", "exploding_tensor", "loss_not_decreasing", "vanishing_gradient"]


def pack(folder: Path, text: str, name: str = "mine.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


# rules by name


def test_rules_are_found_by_name() -> None:
    assert set(FOUR) <= set(all_rules()) and all_rules() == sorted(all_rules())
    for name in all_rules():
        assert find_rule(name).name == name


@pytest.mark.parametrize("name", ["exploding_tensors", "ExplodingTensor", "exploding-tensor"])
def test_an_unknown_rule_names_its_neighbours(name: str) -> None:
    with pytest.raises(RuleNotFound, match="exploding_tensor"):
        find_rule(name)


@pytest.mark.parametrize("name", ["", "packs", "__init__", "../rules", "os", "_hidden"])
def test_what_is_no_rule_is_not_imported(name: str) -> None:
    with pytest.raises(RuleNotFound):
        find_rule(name)


# parameters


@dataclass(frozen=True, kw_only=True)
class Every(Rule):
    """Has a parameter of every type."""

    name: ClassVar[str] = "every"
    flag: bool = parameter(False)
    whole: int = parameter(3, minimum=1, maximum=9, unit="steps")
    number: float = parameter(0.5, minimum=0)
    maybe: float | None = parameter(None)
    text: str = parameter("a")
    choice: str = parameter("a", choices=("a", "b"))
    texts: tuple[str, ...] = parameter(())
    wholes: tuple[int, ...] = parameter((1,))


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("flag", "True", True), ("flag", "off", False), ("flag", True, True), ("flag", "0", False),
        ("whole", "7", 7), ("whole", 7, 7), ("whole", 7.0, 7), ("whole", "7.0", 7),
        ("number", "1e-7", 1e-7), ("number", 2, 2.0), ("maybe", "None", None), ("maybe", None, None),
        ("maybe", "", None), ("maybe", "2.5", 2.5), ("text", "b c", "b c"), ("choice", "b", "b"),
        ("texts", "a, b", ("a", "b")), ("texts", "re:a{1,2}", ("re:a{1,2}",)), ("texts", ["a,b"], ("a,b",)),
        ("texts", [], ()), ("wholes", "0,2", (0, 2)), ("wholes", 3, (3,)), ("wholes", [1, "2"], (1, 2)),
        ("severity", "Warning", smdbg.Severity.WARNING), ("mode", "eval", "eval"), ("mode", None, None),
        ("end_step", "100", 100),
    ],
)  # fmt: skip
def test_values_are_converted(name: str, given: Any, expected: Any) -> None:
    value = getattr(build(Every, {name: given}), name)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("flag", "maybe", "true or false"), ("flag", 1, "true or false"), ("flag", None, "true or false"),
        ("whole", "x", "whole number"), ("whole", 1.5, "whole number"), ("whole", True, "whole number"),
        ("whole", 0, "from 1 to 9 steps"), ("whole", "10", "from 1 to 9 steps"), ("whole", 10**400, "whole number"),
        ("number", "x", "number"), ("number", "nan", "number"), ("number", float("inf"), "number"),
        ("number", -1, "at least 0"), ("number", [1], "number"), ("maybe", "x", "number or none"),
        ("text", 3, "text"), ("choice", "c", "one of a, b"), ("texts", 3, "list of texts"),
        ("texts", {"a": 1}, "list of texts"), ("wholes", "a", "list of whole numbers"),
        ("severity", "fatal", "one of error, warning, info"), ("mode", "test", "one of global, train, eval, predict"),
        ("start_step", -1, "at least 0 steps"),
    ],
)  # fmt: skip
def test_a_wrong_value_names_rule_parameter_and_what_was_expected(name: str, given: Any, said: str) -> None:
    with pytest.raises(BadConfig) as caught:
        build(Every, {name: given})
    assert f"rule every: parameter {name} must be {said}" in str(caught.value)


def test_an_unknown_parameter_names_the_nearest() -> None:
    with pytest.raises(BadConfig, match="no parameter 'only_nans'. Did you mean only_nan"):
        build(find_rule("exploding_tensor"), {"only_nans": True})


def test_parameters_are_listed_own_ones_first() -> None:
    listed = parameters_of(find_rule("vanishing_gradient"))
    assert listed[0].record() == {
        "name": "threshold", "type": "number", "default": 1e-7, "unit": "",
        "help": "fire when mean(abs(gradient)) is below it",
    }  # fmt: skip
    assert [one.name for one in listed[-10:]] == [one.name for one in parameters_of(Rule)]
    assert "instance" not in [one.name for one in listed]
    types = {one.name: (one.type, one.record()["default"]) for one in parameters_of(Every)}
    assert types["wholes"] == ("list of whole numbers", [1]) and types["maybe"] == ("number or none", None)
    assert types["severity"] == ("one of error, warning, info", "error")


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("exploding_tensor", {"only_nan": False}),
        ("vanishing_gradient", {"threshold": 1e-7}),
        ("all_zero", {"threshold": 100}),
        (
            "loss_not_decreasing",
            {
                "use_losses_collection": True, "num_steps": 10, "diff_percent": 0.1, "increase_threshold_percent": 5,
                "mode": None,
            },
        ),
    ],
)  # fmt: skip
def test_pack_sagemaker_has_the_catalogue_s_defaults(name: str, defaults: dict[str, Any]) -> None:
    (rule,) = (rule for rule in load_pack("sagemaker").rules if rule.label == name)
    assert rule == find_rule(name)()
    assert {key: getattr(rule, key) for key in defaults} == defaults


# packs


def test_shipped_packs_load() -> None:
    assert {"default", "sagemaker", "strict"} <= set(pack_names())
    for name in pack_names():
        loaded = load_pack(name)
        assert loaded.name == name and loaded.description
        assert {"exploding_tensor", "loss_not_decreasing"} <= {rule.name for rule in loaded.rules}
        assert all(rule.applicable() is None for rule in loaded.rules) or name == "sagemaker"


def test_pack_strict_holds_what_default_holds_and_nothing_milder() -> None:
    strict = {rule.label: rule for rule in load_pack("strict").rules}
    for rule in load_pack("default").rules:
        assert strict[rule.label].severity.rank >= rule.severity.rank
        assert (strict[rule.label].exclude_roles, strict[rule.label].roles) == (rule.exclude_roles, rule.roles)
    assert {rule.severity for label, rule in strict.items() if label in FOUR} == {smdbg.Severity.ERROR}


def test_entries_set_name_severity_selectors_and_parameters(tmp_path: Path) -> None:
    loaded = load_pack(
        pack(
            tmp_path,
            "rules:\n"
            "  - all_zero\n"
            "  - rule: exploding_tensor\n    name: outputs\n    severity: info\n    include: 'relu*'\n"
            "    exclude: [relu9]\n    mode: eval\n    parameters: {only_nan: 'True', start_step: 3}\n"
            "  - {rule: exploding_tensor}\n",
        )
    )
    assert (loaded.name, loaded.path) == ("mine", str(tmp_path / "mine.yaml"))
    zero, outputs, plain = loaded.rules
    assert (zero.label, plain.label) == ("all_zero", "exploding_tensor")
    expected = {
        "only_nan": True, "severity": "info", "include": ["relu*"], "exclude": "relu9", "mode": "eval", "start_step": 3,
    }  # fmt: skip
    assert outputs == build(find_rule("exploding_tensor"), expected, instance="outputs")


def test_extending_adds_to_and_changes_rules(tmp_path: Path) -> None:
    pack(
        tmp_path, "rules:\n  - rule: vanishing_gradient\n    severity: info\n    parameters: {threshold: 3}\n", "a.yaml"
    )
    text = (
        "extends: [./a.yaml, sagemaker]\nname: b\nrules:\n  - rule: vanishing_gradient\n    parameters: {repeats: 1}\n"
        "  - {rule: vanishing_gradient, name: more}\n"
    )
    loaded = load_pack(pack(tmp_path, text))
    assert loaded.name == "b"
    others = [rule.label for rule in load_pack("sagemaker").rules if rule.label != "vanishing_gradient"]
    assert [rule.label for rule in loaded.rules] == ["vanishing_gradient", *others, "more"]
    only_a = load_pack(pack(tmp_path, text.replace("[./a.yaml, sagemaker]", "./a.yaml"))).rules[0]
    assert (only_a.severity, getattr(only_a, "threshold", None)) == (smdbg.Severity.INFO, 3.0)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("rule: []", 1, "no key 'rule'. Did you mean rules"),
        ("description: x\nrules:\n  - exploding_tensr", 3, "no rule 'exploding_tensr'. Did you mean exploding_tensor"),
        ("rules:\n  - rule: zzz", 2, "no rule 'zzz'. Known: a"),
        ("rules:\n  - name: x", 2, "'rule' is missing"),
        (
            "rules:\n  - rule: all_zero\n    include: a\n    parameter: {}",
            4,
            "no key 'parameter'. Did you mean parameters",
        ),
        ("rules:\n  - rule: all_zero\n    when: 'l2 > 3'", 3, "no key 'when'"),
        ("rules:\n  - rule: all_zero\n    parameters:\n      treshold: 3", 4, "Did you mean threshold"),
        ("rules:\n  - rule: all_zero\n    parameters:\n      threshold: 300", 4, "from 0 to 100 %"),
        ("rules:\n  - rule: all_zero\n    parameters: [1]", 3, "parameters must be a mapping"),
        ("rules:\n  - rule: all_zero\n    severity: fatal", 3, "one of error, warning, info"),
        ("rules:\n  - rule: all_zero\n    mode: eval\n    parameters: {mode: train}", 4, "'mode' is set twice"),
        ("rules:\n  - all_zero\n  - all_zero", 3, "a second rule is called 'all_zero'"),
        ("rules:\n  - rule: all_zero\n    name: 3", 3, "name must be text"),
        ("rules: all_zero", 1, "rules must be a list"),
        ("rules:\n  - 3", 2, "an entry must be"),
        ("rules:\n  - rule: [a]", 2, "there is no rule"),
        ("\nextends: [defalt]", 2, "no pack 'defalt'. Did you mean default"),
        ("extends:\n  - default\n  - ./gone.yaml", 3, "is not there"),
        ("extends: {a: b}", 1, "extends must be a list"),
        ("\nname: [a]", 2, "name must be text"),
        ("extends: ./mine.yaml", 1, "this pack extends itself: mine.yaml -> mine.yaml"),
        ("extends: sagemaker\nrules:\n  - rule: all_zero\n    name: exploding_tensor", 3, "use another name"),
        ("default: {severity: info}", 1, "no key 'default'. Did you mean defaults"),
        ("defaults:\n  severty: info", 2, "defaults has no key 'severty'. Did you mean severity"),
        ("defaults:\n  threshold: 3", 2, "defaults has no key 'threshold'"),
        ("defaults:\n  severity: info\n  start_step: -1\nrules: [all_zero]", 3, "at least 0 steps"),
        ("defaults: [severity]", 1, "defaults must be a mapping"),
        ("rules:\n  - rule: all_zero\n    enabled: no", 3, "enabled must be true or false"),
        ("rules:\n  - rule: all_zero\n    enable: false", 3, "no key 'enable'. Did you mean enabled"),
        ("rules:\n  - rule: all_zero\n    enabled: false", 2, "This pack extends none"),
        ("extends: sagemaker\nrules:\n  - {rule: all_zer, enabled: false}", 3, "Did you mean all_zero"),
        (
            "extends: sagemaker\nrules:\n  - rule: all_zero\n    enabled: false\n    severity: info",
            5,
            "'severity' has no effect",
        ),
        ("rules:\n  - when: loss > 3", 2, "'name' is missing"),
        ("rules:\n  - name: a\n    when: loss > 3\n    expect: loss > 3", 4, "not both"),
        ("rules:\n  - name: a\n    when: 3", 3, "when must be an expression, in quotes"),
        ("rules:\n  - name: a\n    when: ''", 3, "when must be an expression, in quotes"),
        ("rules:\n  - name: a\n    severity: info\n    when: los > zzz(3)", 4, "'when': at character 7 ('zzz')"),
        ("rules:\n  - name: a\n    expect: medain(loss) < 3", 3, "Did you mean median"),
        ("rules:\n  - name: a\n    expect: loss < 3", 3, "write all(...)"),
        ("rules:\n  - name: a\n    when: loss > 3\n    mesage: hm", 4, "no key 'mesage'. Did you mean message"),
        ("rules:\n  - name: a\n    when: loss > 3\n    message: [hm]", 4, "message must be text"),
        ("rules:\n  - name: a\n    when: loss > 3\n    each: 3", 4, "each must be list of texts"),
        ("rules:\n  - name: a\n    when: loss > 3\n    severity: fatal", 4, "one of error, warning, info"),
        ("rules:\n  - name: a\n    when: loss > 3\n    parameters: {severity: info}", 4, "no key 'parameters'"),
        ("rules:\n  - {name: a, when: loss > 3}\n  - {name: a, when: loss > 4}", 3, "a second rule is called 'a'"),
        ("extends: sagemaker\nrules:\n  - name: all_zero\n    when: loss > 3", 3, "use another name"),
        ("rules: [a", 1, "not valid YAML"),
    ],
)
def test_errors_name_file_line_and_the_nearest(tmp_path: Path, text: str, line: int, said: str) -> None:
    path = pack(tmp_path, text)
    with pytest.raises(BadConfig) as caught:
        load_pack(path)
    assert str(caught.value).startswith(f"{path}:{line}:") and said in str(caught.value)


def test_defaults_hold_for_the_entries_of_their_file_that_do_not_set_them(tmp_path: Path) -> None:
    pack(tmp_path, "rules: [{rule: all_zero, severity: info, include: a}, exploding_tensor]", "a.yaml")
    text = (
        "extends: ./a.yaml\ndefaults: {severity: warning, start_step: 100, mode: train, exclude: ['*bias']}\nrules:\n"
        "  - rule: all_zero\n  - {rule: vanishing_gradient, parameters: {start_step: 5}}\n"
        "  - {rule: unchanged_tensor, mode: null, severity: error}\n  - {name: own, when: loss > 3, start_step: 7}\n"
    )
    loaded = {rule.label: rule for rule in load_pack(pack(tmp_path, text)).rules}
    facts = {
        label: (rule.severity.value, rule.start_step, rule.mode, rule.exclude, rule.include)
        for label, rule in loaded.items()
    }
    assert facts == {
        "all_zero": ("warning", 100, "train", ("*bias",), ("a",)),
        "exploding_tensor": ("error", 0, None, (), ()),  # only inherited
        "vanishing_gradient": ("warning", 5, "train", ("*bias",), ()),
        "unchanged_tensor": ("error", 100, None, ("*bias",), ()),
        "own": ("warning", 7, "train", ("*bias",), ()),
    }
    pack(tmp_path, text, "b.yaml")
    again = load_pack(pack(tmp_path, "extends: b.yaml\nrules: [{rule: all_zero, mode: eval}]")).rules[0]
    assert (again.mode, again.severity.value, again.start_step) == ("eval", "warning", 100)


def test_an_entry_switches_inherited_rules_off(tmp_path: Path) -> None:
    pack(
        tmp_path,
        "rules:\n  - all_zero\n  - {rule: exploding_tensor, name: a}\n  - {rule: exploding_tensor, name: b}\n"
        "  - {name: own, when: loss > 3}\n  - {rule: all_zero, name: other}\n",
        "base.yaml",
    )

    def left(*entries: str) -> list[str]:
        text = "extends: base.yaml\nrules:\n" + "".join(f"  - {{{one}, enabled: false}}\n" for one in entries)
        return [rule.label for rule in load_pack(pack(tmp_path, text)).rules]

    assert left("rule: all_zero") == ["a", "b", "own", "other"]
    assert left("rule: exploding_tensor") == ["all_zero", "own", "other"]  # all its instances
    assert left("name: a", "name: own") == ["all_zero", "b", "other"]
    with pytest.raises(BadConfig, match="no rule 'exploding_tensor' is inherited"):
        left("name: exploding_tensor")
    pack(tmp_path, "extends: base.yaml\nrules: [{name: a, enabled: false}]", "less.yaml")
    text = "extends: less.yaml\nrules:\n  - {rule: all_zero, name: a, enabled: true}\n"
    assert [rule.name for rule in load_pack(pack(tmp_path, text)).rules if rule.label == "a"] == ["all_zero"]


def test_expressions_are_entries_and_can_be_changed(tmp_path: Path) -> None:
    text = (
        "rules:\n  - name: jump\n    when: l2(tensor) > 10 * median(l2(tensor), 64)\n    each: gradients\n"
        "    message: It jumps.\n    severity: warning\n    mode: train\n  - {name: low, expect: last(loss) < 2.1}\n"
    )
    jump, low = load_pack(pack(tmp_path, text, "base.yaml")).rules
    assert jump == ExpressionRule(
        instance="jump", when="l2(tensor) > 10 * median(l2(tensor), 64)", each=("gradients",), text="It jumps.",
        severity=smdbg.Severity.WARNING, mode="train",
    )  # fmt: skip
    assert (jump.name, low.label) == ("expression", "low")
    text = "extends: base.yaml\nrules:\n  - {name: jump, severity: error}\n  - {name: low, when: loss > 9, mode: eval}"
    changed, other = load_pack(pack(tmp_path, text)).rules
    assert isinstance(jump, ExpressionRule)
    assert isinstance(changed, ExpressionRule) and isinstance(other, ExpressionRule)
    assert (changed.when, changed.severity.value, changed.each) == (jump.when, "error", ("gradients",))
    assert (other.when, other.expect, other.mode) == ("loss > 9", "", "eval")


def test_an_inherited_rule_may_be_changed_by_its_name_alone(tmp_path: Path) -> None:
    pack(tmp_path, "rules: [{rule: all_zero, name: zeros, parameters: {threshold: 50}}]", "base.yaml")
    (rule,) = load_pack(pack(tmp_path, "extends: base.yaml\nrules: [{name: zeros, parameters: {repeats: 3}}]")).rules
    assert rule == build(find_rule("all_zero"), {"threshold": 50, "repeats": 3}, instance="zeros")


def test_rules_of_plugins_are_known_in_packs_and_in_those_they_extend(tmp_path: Path) -> None:
    pack(tmp_path, "rules: [{rule: every, parameters: {whole: 5}}]", "base.yaml")
    path = pack(tmp_path, "extends: base.yaml\nrules: [all_zero, {rule: every, name: again, text: b}]".replace(
        "text: b", "parameters: {text: b}"
    ))  # fmt: skip
    rules = load_pack(path, {"every": Every}).rules
    assert rules[0] == Every(whole=5) and rules[2] == Every(instance="again", text="b")
    with pytest.raises(BadConfig, match=r"base.yaml:1: there is no rule 'every'"):
        load_pack(path)
    with pytest.raises(BadConfig, match="no rule 'evry'. Did you mean every"):
        load_pack(pack(tmp_path, "rules: [evry]"), {"every": Every})


def test_packs_that_extend_each_other_in_a_circle(tmp_path: Path) -> None:
    pack(tmp_path, "extends: b.yaml", "a.yaml")
    pack(tmp_path, "extends: ./c.yml", "b.yaml")
    path = pack(tmp_path, "\nextends: [a.yaml]", "c.yml")
    with pytest.raises(BadConfig, match=r"a.yaml -> b.yaml -> c.yml -> a.yaml") as caught:
        load_pack(str(tmp_path / "a.yaml"))
    assert str(caught.value).startswith(f"{path}:2:")


def test_a_pack_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="Did you mean sagemaker"):
        load_pack("sagemker")
    with pytest.raises(BadConfig, match="gone.yaml"):
        load_pack(str(tmp_path / "gone.yaml"))


@pytest.mark.parametrize("page", ["packs", "expressions"])
def test_the_packs_of_the_pages_load(tmp_path: Path, page: str) -> None:
    text = (Path(__file__).parent.parent / "docs" / f"{page}.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    found = {rule.label for rule in load_pack(pack(tmp_path, example)).rules}
    written = set(re.findall(r"name: (\w+)", example)) - {"mine"}
    assert written <= found and "all_zero" not in found


def test_the_page_of_expressions_names_every_function_and_statistic() -> None:
    text = (Path(__file__).parent.parent / "docs" / "expressions.md").read_text(encoding="utf-8")
    for name in (*FUNCTIONS, *DOTTED):
        assert re.search(rf"[`\s.]{name}\b", text), name


# settings from the command line


def test_overrides() -> None:
    rules = [build(find_rule("all_zero"), {}), build(find_rule("all_zero"), {}, instance="mine"), Every()]
    changed = with_overrides(
        rules, ["all_zero.threshold=50", "mine.threshold = 60", "every.texts=a,b", "every.text=x=y.z"]
    )
    assert [getattr(rule, "threshold", None) for rule in changed] == [50.0, 60.0, None]
    assert (getattr(changed[2], "texts", None), getattr(changed[2], "text", None)) == (("a", "b"), "x=y.z")
    named = [build(find_rule("all_zero"), {}, instance=name) for name in ("a", "b")]
    assert [getattr(rule, "repeats", None) for rule in with_overrides(named, ["all_zero.repeats=3"])] == [3, 3]
    assert getattr(rules[0], "threshold", None) == 100


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("all_zero.threshold", "RULE.PARAMETER=VALUE"),
        ("threshold=3", "RULE.PARAMETER=VALUE"),
        (".a=3", "RULE.PARAMETER"),
        ("all_zer.threshold=3", "Did you mean all_zero"),
        ("all_zero.treshold=3", "Did you mean threshold"),
        ("all_zero.threshold=x", "must be number"),
    ],
)
def test_wrong_overrides(setting: str, said: str) -> None:
    with pytest.raises(BadConfig, match=said) as caught:
        with_overrides([build(find_rule("all_zero"), {})], [setting])
    assert repr(setting) in str(caught.value)


# what the default pack says of healthy and of broken trainings


def train(url: Path, seed: int, learning_rate: float, steps: int = 700) -> smdbg.Run:
    """Softmax regression on ten normal clouds, batches of 32, saved by the real hook."""
    random = np.random.default_rng(seed)
    centres, weights = random.normal(size=(10, 20)) * 0.5, np.zeros((20, 10))
    with smdbg.Hook(url) as hook:
        hook.set_mode("train")
        for _ in range(steps):
            labels = random.integers(0, 10, 32)
            inputs = centres[labels] + random.normal(size=(32, 20))
            scores = np.exp(inputs @ weights)
            shares = scores / scores.sum(axis=1, keepdims=True)
            hook.save_scalar("loss", -np.log(shares[np.arange(32), labels]).mean(), "losses")
            shares[np.arange(32), labels] -= 1
            gradient = inputs.T @ shares / 32
            hook.save_tensor("w.weight", weights, "weights")
            hook.save_tensor("gradient/w.weight", gradient, "gradients")
            weights = weights - learning_rate * gradient
            hook.end_step()
    return smdbg.open_run(str(url))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("learning_rate", [0.03, 0.3])
def test_pack_default_is_quiet_on_a_healthy_run(tmp_path: Path, seed: int, learning_rate: float) -> None:
    run = train(tmp_path / "run", seed, learning_rate)
    report = check(run, load_pack("default").rules)
    assert report.findings == () and {"exploding_tensor", "loss_plateau", "dead_layer"} <= set(report.judged)
    literal = check(run, load_pack("sagemaker").rules)
    assert "loss_not_decreasing" in {one.rule for one in literal.findings}


def test_pack_default_tells_a_loss_that_never_falls(tmp_path: Path) -> None:
    found = check(train(tmp_path / "run", 0, 0.0), load_pack("default").rules).findings
    assert {one.rule for one in found} == {"initial_weights", "loss_not_decreasing", "loss_plateau"}
    assert {(one.severity.value, one.onset) for one in found} == {("error", (None, 0))}
