"""Each rule on the cases of tests/rules/NAME.yaml, written through the real hook and read back from a folder.

A case has a `name`, `tensors`, `parameters` of the rule, and what is expected: `outcome`, `detail`, `findings` (any
fields of their records). Of each tensor, under its key (its name, unless `name` says another):

- `collection` and `values`, one per step, null where it is not saved; a series {points, start, end, noise, seed, shape}
  is a line from `start` to `end` (numbers or nested lists; `end` is `start` if left out) with normal noise on it;
- any field of TensorInfo: role, of, module_class, feature_axis, requires_grad, forward_order, ...; and `dtype`;
- `worker`: only this rank writes it, in place of what all write by the same name.

Of the case, all optional: `steps` and `modes` (one per row), `workers` (how many), `mesh` (one per worker),
`hyperparameters`, `raw` (whether full values are kept: true, false or a list of mode steps; left out, as the hook does
by default), `reduction` (further options of ReductionConfig: hash, features, quantiles, ...), `statistics`, those kept
beside the ten that always are, and `other`: a second run, which the parameter other_run then names.
"""

import math
import re
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
    """Return one value per step."""
    if isinstance(values, list):
        return values
    line = np.linspace(values["start"], values.get("end", values["start"]), values["points"])
    shape = (values["points"], *values.get("shape", line.shape[1:]))
    line = line.reshape(len(line), *(1,) * (len(shape) - line.ndim), *line.shape[1:])
    return list(np.random.default_rng(values.get("seed", 0)).normal(size=shape) * values.get("noise", 0.0) + line)


def reduction_of(case: dict[str, Any]) -> smdbg.ReductionConfig | None:
    """Return what is kept of each tensor; None: the hook's defaults."""
    options = dict(case.get("reduction", {}))
    if "statistics" in case:
        options["statistics"] = case["statistics"]
    if "raw" in case:
        raw = case["raw"]
        options["save_raw_tensor"] = raw if isinstance(raw, bool) else smdbg.SaveConfig(end_step=0, save_steps=raw)
    return smdbg.ReductionConfig(**options) if options else None


def tensors_of(case: dict[str, Any], rank: int) -> dict[str, dict[str, Any]]:
    """Return by name what a worker writes: `values` and the fields of TensorInfo."""
    found: dict[str, dict[str, Any]] = {}
    for key, spec in sorted(case["tensors"].items(), key=lambda item: "worker" in item[1]):
        if spec.get("worker", rank) == rank:
            found[spec.get("name", key)] = {k: v for k, v in spec.items() if k not in ("name", "worker")}
    order = [spec.get("name", key) for key, spec in case["tensors"].items()]
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def write(url: Path, case: dict[str, Any]) -> None:
    """Write the tensors of a case as a run, one row per step of the case."""
    workers = case.get("workers", 1 + max(spec.get("worker", 0) for spec in case["tensors"].values()))
    for rank in range(workers):
        write_worker(url, case, rank, workers)


def write_worker(url: Path, case: dict[str, Any], rank: int, workers: int) -> None:
    """Write what one worker saves."""
    tensors = tensors_of(case, rank)
    columns = {name: series(spec.pop("values")) for name, spec in tensors.items()}
    count = max(map(len, columns.values()), default=0)
    steps = case.get("steps", list(range(count)))
    modes = case.get("modes", ["train"] * count)
    with smdbg.Hook(
        url,
        save_config=smdbg.SaveConfig(),
        reduction_config=reduction_of(case),
        collections=sorted({spec["collection"] for spec in tensors.values()}),
        hyperparameters=case.get("hyperparameters"),
        rank=rank,
        world_size=workers,
        mesh=case["mesh"][rank] if "mesh" in case else None,
    ) as hook:
        for row in range(count):
            hook.set_mode(modes[row])
            hook.set_step(steps[row])
            for name, spec in tensors.items():
                value = columns[name][row] if row < len(columns[name]) else None
                if value is not None:
                    hook.save_tensor(name, np.array(value, spec.get("dtype", "float32")), **without_dtype(spec))
            hook.should_save("losses")  # a step is a step, even when nothing is saved in it
            hook.end_step()


def without_dtype(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key != "dtype"}


@pytest.mark.parametrize(("name", "case"), cases())
def test_case(name: str, case: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "run", case)
    if "other" in case:
        write(tmp_path / "other", case["other"])
        case = case | {"parameters": case.get("parameters", {}) | {"other_run": str(tmp_path / "other")}}
    run = smdbg.open_run(str(tmp_path / "run"))
    assert run.status == "completed"  # the hook took all that the case gave it
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
            assert documented_default(part, parameter.name) == shown(parameter.default), parameter.name


def documented_default(part: str, name: str) -> str:
    """Return what the docstring gives: `name (unit, default 1)`, or `one, other (unit, default 1 and 2)`."""
    entry = re.search(rf"^    ((?:\w+, )*{name}(?:, \w+)*) \((?:[^()]*, )?default (.*?)\):", part, re.M | re.S)
    assert entry, f"{name} has no entry"
    names, defaults = entry[1].split(", "), " ".join(entry[2].split())
    return shown(defaults if len(names) == 1 else defaults.split(" and ")[names.index(name)])


def shown(default: Any) -> str:
    """Return a default as text, numbers alike however they were written."""
    if isinstance(default, tuple):
        return ", ".join(map(shown, default)) or "none"
    text = "none" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
    try:
        return f"{float(text):.12g}"
    except ValueError:
        return text.strip("`")


@pytest.mark.parametrize("name", all_rules())
def test_a_run_without_steps_is_insufficient_or_not_applicable(name: str, tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run"):
        pass
    report = check(smdbg.open_run(str(tmp_path / "run")), [build(find_rule(name), {})])
    assert report.rules[0].outcome.value in ("insufficient", "not applicable")
    assert report.judged == () and not math.isnan(len(report.findings))
