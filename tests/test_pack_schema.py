"""The JSON Schema of packs: it takes what the loader takes and refuses what the loader refuses."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from smdbg.analysis.pack import load_pack, pack_names
from smdbg.analysis.pack_schema import pack_schema, schema_text
from smdbg.analysis.rule import Rule, all_rules, find_rule, parameter, parameters_of
from smdbg.errors import BadConfig
from smdbg.yamlfile import load

PACKS = Path(__file__).parent.parent / "rules" / "packs"
TYPES: dict[str, Any] = {"string": str, "boolean": bool, "object": dict, "array": list, "null": type(None)}


def is_type(value: Any, name: str) -> bool:
    if name in ("integer", "number"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (name == "number" or value == int(value))
    return isinstance(value, TYPES[name])


def valid(value: Any, schema: Any, root: dict[str, Any]) -> bool:
    """Judge by the keywords of JSON Schema that ours uses; an unknown one is a mistake of the test."""
    known = {"$schema", "$ref", "title", "definitions", "description", "default", "type", "enum", "const", "minimum",
             "maximum", "minLength", "maxLength", "items", "properties", "required", "additionalProperties", "anyOf",
             "allOf", "not", "if", "then"}  # fmt: skip
    assert set(schema) <= known, set(schema) - known
    if "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return valid(value, target, root)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    checks = [
        not kinds or any(is_type(value, kind) for kind in kinds),
        "enum" not in schema or value in schema["enum"],
        "const" not in schema or value == schema["const"],
        "anyOf" not in schema or any(valid(value, one, root) for one in schema["anyOf"]),
        all(valid(value, one, root) for one in schema.get("allOf", [])),
        "not" not in schema or not valid(value, schema["not"], root),
        "if" not in schema or not valid(value, schema["if"], root) or valid(value, schema["then"], root),
    ]
    if isinstance(value, int | float) and not isinstance(value, bool):
        checks += [value >= schema.get("minimum", value), value <= schema.get("maximum", value)]
    if isinstance(value, str):
        checks += [schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9)]
    if isinstance(value, list) and "items" in schema:
        checks += [valid(one, schema["items"], root) for one in value]
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        checks += [key in value for key in schema.get("required", [])]
        checks += [schema.get("additionalProperties", True) or set(value) <= set(properties)]
        checks += [valid(value[key], one, root) for key, one in properties.items() if key in value]
    return all(checks)


SCHEMA = pack_schema()


def accepts(folder: Path, text: str) -> bool:
    (folder / "read.yaml").write_text(text)
    return valid(load(folder / "read.yaml")[0], SCHEMA, SCHEMA)


def loads(folder: Path, text: str) -> bool:
    (folder / "pack.yaml").write_text(text)
    try:
        load_pack(str(folder / "pack.yaml"))
    except BadConfig:
        return False
    return True


@pytest.mark.parametrize("name", pack_names())
def test_packs_that_come_with_smdbg_are_valid(name: str, tmp_path: Path) -> None:
    assert accepts(tmp_path, (PACKS / f"{name}.yaml").read_text())


GOOD = [
    "rules: []",
    "name: a\ndescription: b\nextends: sagemaker",
    "extends: [sagemaker]\ndefaults: {severity: info, mode: null, exclude: '*bias'}\nrules:",
    "rules: [all_zero, {rule: exploding_tensor, name: x, parameters: {only_nan: true}, roles: [weight]}]",
    "rules:\n  - {rule: all_zero, parameters: {threshold: 99.5, severity: info}, workers: [0, 1]}",
    "rules:\n  - {rule: all_zero, parameters: null, workers: 3}",
    "extends: sagemaker\nrules: [{rule: all_zero, enabled: false}, {name: exploding_tensor, severity: info}]",
    "rules: [{name: a, when: loss > 3, message: m, mode: eval}, {name: b, expect: last(tensor.l2) < 3, each: '*'}]",
]
BAD = [
    "rule: []",
    "name: [a]",
    "extends: {a: b}",
    "defaults: {threshold: 3}",
    "defaults: {severity: fatal}",
    "rules: all_zero",
    "rules: [all_zer]",
    "rules: [3]",
    "rules: [{rule: all_zero, parameters: {treshold: 3}}]",
    "rules: [{rule: all_zero, parameters: {threshold: 300}}]",
    "rules: [{rule: all_zero, parameters: {only_nan: true}}]",
    "rules: [{rule: all_zero, parameters: {threshold: much}}]",
    "rules: [{rule: all_zero, repeats: 3}]",
    "rules: [{rule: all_zero, when: loss > 3}]",
    "rules: [{rule: all_zero, mode: test}]",
    "rules: [{rule: all_zero, start_step: -1}]",
    "rules: [{rule: all_zero, enabled: maybe}]",
    "rules: [{severity: info}]",
    "rules: [{when: loss > 3}]",
    "rules: [{name: a, when: loss > 3, expect: loss > 3}]",
    "rules: [{name: a, when: 3}]",
    "rules: [{name: a, when: ''}]",
    "rules: [{name: a, when: loss > 3, parameters: {}}]",
]


@pytest.mark.parametrize("text", GOOD)
def test_what_loads_is_valid(text: str, tmp_path: Path) -> None:
    assert loads(tmp_path, text) and accepts(tmp_path, text)


@pytest.mark.parametrize("text", BAD)
def test_what_does_not_load_is_not_valid(text: str, tmp_path: Path) -> None:
    assert not loads(tmp_path, text) and not accepts(tmp_path, text)


def test_every_parameter_of_every_rule_is_there_with_its_help() -> None:
    known = SCHEMA["definitions"]["parameters"]
    assert sorted(known) == all_rules()
    for name in all_rules():
        properties = known[name]["properties"]
        for one in parameters_of(find_rule(name)):
            schema = properties[one.name]
            if "$ref" not in schema:
                assert one.help in schema["description"] and schema["default"] == one.record()["default"]


@dataclass(frozen=True, kw_only=True)
class Mine(Rule):
    """A rule of a plugin."""

    name: ClassVar[str] = "mine"
    most: int | None = parameter(None, minimum=1, unit="steps", help="how many")


def test_rules_of_plugins_can_be_added() -> None:
    schema = pack_schema({"mine": Mine})
    value = {"rules": ["mine", {"rule": "mine", "parameters": {"most": 3}}]}
    assert valid(value, schema, schema) and not valid(value, SCHEMA, SCHEMA)
    assert not valid({"rules": [{"rule": "mine", "parameters": {"most": 0}}]}, schema, schema)


def test_the_text_is_json_and_the_same_each_time() -> None:
    assert json.loads(schema_text()) == SCHEMA and schema_text() == schema_text()
    assert re.search(r'"\$schema": "http://json-schema.org/draft-07/schema#"', schema_text())
