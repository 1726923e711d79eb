"""The JSON Schema of pack files, which editors complete and check them by; made from what the rules declare."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from smdbg.analysis.expression import LONGEST
from smdbg.analysis.expression_rule import ExpressionRule
from smdbg.analysis.pack import NO_RULES, PACK_KEYS
from smdbg.analysis.pack_entry import COMMON, DEFAULTS, EXPRESSION_KEYS, RULE_KEYS
from smdbg.analysis.parameters import Parameter, parameters_of
from smdbg.analysis.rule import Rule, all_rules, find_rule, summary_of

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_WORDS = {
    "name": "what the pack is called; the name of the file unless given",
    "description": "what the pack is for",
    "extends": "packs whose rules come first: names, or files beside this one",
    DEFAULTS: "common parameters of every entry of this file that does not set them itself",
    "rules": "names of rules, or mappings",
    "rule": "the rule",
    "label": "a name of its own; findings carry it",
    "enabled": "false: an inherited rule is left out",
    "parameters": "the parameters of the rule",
    "message": "what findings say first",
}


def pack_schema(extra: Mapping[str, type[Rule]] = NO_RULES) -> Schema:
    """Return the schema (draft 07) of packs that use the rules of smdbg and `extra`, rule classes by name."""
    classes = {name: find_rule(name) for name in all_rules()} | dict(extra)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A pack of rules of smdbg",
        "definitions": {
            "common": {name: one for name, one in _parameters(Rule).items() if name in COMMON},
            "parameters": {name: _closed({**_parameters(classes[name]), **_common()}) for name in sorted(classes)},
        },
        **_closed(
            {
                "name": _said(_TEXT, "name"),
                "description": _said(_TEXT, "description"),
                "extends": _said(_several(_TEXT), "extends"),
                DEFAULTS: _said(_closed(_common()), DEFAULTS),
                "rules": _said({"type": ["array", "null"], "items": _entry(classes)}, "rules"),
            },
            PACK_KEYS,
        ),
    }


def schema_text() -> str:
    """Return the schema as the text of a file."""
    return json.dumps(pack_schema(), indent=1) + "\n"


def _entry(classes: Mapping[str, type[Rule]]) -> Schema:
    """Return the schema of one entry: a name, a rule or an expression."""
    names = {"enum": sorted(classes)}
    rule = {
        "rule": _said(names, "rule"),
        "name": _said(_TEXT, "label"),
        "enabled": _said({"type": "boolean"}, "enabled"),
        "parameters": _said({"type": ["object", "null"]}, "parameters"),
    }
    per_rule = [
        {
            "if": {"properties": {"rule": {"const": name}}, "required": ["rule"]},
            "then": {
                "description": summary_of(classes[name]),
                "properties": {"parameters": {"anyOf": [{"type": "null"}, _to("parameters", name)]}},
            },
        }
        for name in sorted(classes)
    ]
    formula = {"type": "string", "minLength": 1, "maxLength": LONGEST}
    each = {one.name: one for one in parameters_of(ExpressionRule)}
    expression = {
        "name": _said(_TEXT, "label"),
        "enabled": _said({"type": "boolean"}, "enabled"),
        "when": {**formula, "description": each["when"].help},
        "expect": {**formula, "description": each["expect"].help},
        "each": {**_several(_TEXT), "description": each["each"].help},
        "message": _said(_TEXT, "message"),
    }
    return {
        "anyOf": [
            names,
            {
                **_closed({**rule, **_common()}, (*RULE_KEYS, *COMMON)),
                "anyOf": [{"required": ["rule"]}, {"required": ["name"]}],
                "allOf": per_rule,
            },
            {
                **_closed({**expression, **_common()}, (*EXPRESSION_KEYS, *COMMON)),
                "required": ["name"],
                "not": {"required": ["when", "expect"]},
            },
        ]
    }


def _common() -> Schema:
    return {name: _to("common", name) for name in COMMON}


def _to(*path: str) -> Schema:
    return {"$ref": "#/definitions/" + "/".join(path)}


def _closed(properties: Schema, keys: Sequence[str] | None = None) -> Schema:
    """Return the schema of a mapping with these keys and no other; `keys` are those that the loader takes."""
    if keys is not None and set(keys) != set(properties):
        raise ValueError(f"the schema and the loader differ in {sorted(set(keys) ^ set(properties))}")
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _said(schema: Schema, key: str) -> Schema:
    return {**schema, "description": _WORDS[key]}


def _parameters(rule_class: type[Rule]) -> Schema:
    """Return the schema of every parameter of a rule."""
    hints = typing.get_type_hints(rule_class)
    return {one.name: _parameter(one, hints[one.name]) for one in parameters_of(rule_class)}


def _parameter(one: Parameter, kind: Any) -> Schema:
    """Return the schema of one parameter."""
    schema = _of_type(kind, one)
    words = f"{one.help} ({one.unit})" if one.unit else one.help
    return {**schema, "description": words, "default": one.record()["default"]}


def _of_type(kind: Any, one: Parameter) -> Schema:
    """Return the schema of a declared type, with the range and the choices of the parameter."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (own,) = (member for member in typing.get_args(kind) if member is not type(None))
        return {"anyOf": [_of_type(own, one), {"type": "null"}]}
    if typing.get_origin(kind) is tuple:
        return _several(_of_type(typing.get_args(kind)[0], one))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    schema: Schema = {"type": {bool: "boolean", int: "integer", float: "number"}.get(kind, "string")}
    if one.choices:
        schema["enum"] = list(one.choices)
    if kind in (int, float):
        bounds = {"minimum": one.minimum, "maximum": one.maximum}
        schema |= {key: bound for key, bound in bounds.items() if bound is not None}
    return schema


def _several(schema: Schema) -> Schema:
    """Return the schema of one such value or a list of them."""
    return {"anyOf": [schema, {"type": "array", "items": schema}]}
