"""Each rule on the cases of tests/rules/NAME.yaml, written through the real hook and read back from a folder.

A case: `tensors` (name -> collection, role, values: one per step of `steps`, null where it is not saved), optional
`modes` (one per step), `parameters` of the rule, `statistics` kept beside the ten that always are, and what is
expected. `values` may be a series: {points, start, end, noise, seed}, a line with normal noise.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.analysis.checker import check
from smdbg.analysis.rule import all_rules, build, find_rule, parameters_of, summary_of
from smdbg.yamlfile import load

FOLDER = Path(__file__).parent / "rules"
SECTIONS = ["What it does", "Why it matters", "Parameters", "Example output", "How to fix", "References"]


def cases() -> list[Any]:
    found = []
    for path in sorted(FOLDER.glob("*.yaml")):
        for case in load(path)[0]["cases"]:
            found.append(pytest.param(path.stem, case, id=f"{path.stem}: {case['name']}"))
    return found


def series(values: Any) -> list[Any]:
    if isinstance(values, list):
        return values
    noise = np.random.default_rng(values.get("seed", 0)).normal(size=values["points"]) * values.get("noise", 0.0)
    return list(np.linspace(values["start"], values["end"], values["points"]) + noise)


def write(url: Path, case: dict[str, Any]) -> None:
    """Write the tensors of a case as a run, one row per step of the case."""
    columns = {name: series(spec["values"]) for name, spec in case["tensors"].items()}
    count = max(map(len, columns.values()))
    steps = case.get("steps", list(range(count)))
    modes = case.get("modes", ["train"] * count)
    everything = smdbg.SaveConfig()
    collections = sorted({spec["collection"] for spec in case["tensors"].values()})
    reduction = smdbg.ReductionConfig(statistics=case["statistics"]) if "statistics" in case else None
    with smdbg.Hook(url, save_config=everything, reduction_config=reduction, collections=collections) as hook:
        for row in range(count):
            hook.set_mode(modes[row])
            hook.set_step(steps[row])
            for name, spec in case["tensors"].items():
                value = columns[name][row] if row < len(columns[name]) else None
                if value is not None:
                    given = {key: spec[key] for key in ("role", "of") if key in spec}
                    hook.save_tensor(name, np.array(value, spec.get("dtype", "float32")), spec["collection"], **given)
            hook.should_save("losses")  # a step is a step, even when nothing is saved in it
            hook.end_step()


@pytest.mark.parametrize(("name", "case"), cases())
def test_case(name: str, case: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "run", case)
    run = smdbg.open_run(str(tmp_path / "run"))
    report = check(run, [build(find_rule(name), case.get("parameters", {}))])
    result, expected = report.rules[0], case["expect"]
    assert (result.outcome.value, result.detail) == (expected["outcome"], expected.get("detail", result.detail))
    assert len(report.findings) == len(expected.get("findings", []))
    for finding, wanted in zip(report.findings, expected.get("findings", []), strict=True):
        record = finding.record()
        for key, value in wanted.items():
            if isinstance(value, float):
                assert record[key] == pytest.approx(value, rel=1e-4), key
            else:
                assert record[key] == value, key
        assert str(finding.first_step) in finding.message and finding.tensor in finding.message
        assert finding.hint


def test_every_rule_has_firing_silent_and_insufficient_cases() -> None:
    for name in all_rules():
        outcomes = {case["expect"]["outcome"] for case in load(FOLDER / f"{name}.yaml")[0]["cases"]}
        assert {"violated", "clean", "insufficient"} <= outcomes, name


@pytest.mark.parametrize("name", all_rules())
def test_docstring_has_its_sections_and_names_each_parameter(name: str) -> None:
    rule_class = find_rule(name)
    text = rule_class.__doc__ or ""
    at = [text.find(f"    {section}\n    {'-' * len(section)}\n") for section in SECTIONS]
    assert -1 not in at and at == sorted(at)
    assert summary_of(rule_class).endswith(".")
    part = text[at[2] : at[3]]
    common = {parameter.name for parameter in parameters_of(smdbg.Rule)}
    for parameter in parameters_of(rule_class):
        assert parameter.help
        if parameter.name not in common:
            assert parameter.name in part
            default = parameter.default
            shown = "none" if default is None else str(default).lower() if isinstance(default, bool) else f"{default:g}"
            assert f"default {shown}" in part or "1 and 1" in part or f"default {float(shown):g}" in part


@pytest.mark.parametrize("name", all_rules())
def test_a_run_without_steps_is_insufficient_or_not_applicable(name: str, tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run"):
        pass
    report = check(smdbg.open_run(str(tmp_path / "run")), [build(find_rule(name), {})])
    assert report.rules[0].outcome.value in ("insufficient", "not applicable")
    assert report.judged == () and not math.isnan(len(report.findings))
