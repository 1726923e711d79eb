"""The entries of a pack: each sets up a rule or an expression, changes an inherited one, or switches it off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from smdbg.analysis.expression_rule import ExpressionRule
from smdbg.analysis.pack_file import PackFile, nearest
from smdbg.analysis.parameters import convert, parameters_of
from smdbg.analysis.rule import Rule
from smdbg.errors import BadConfig
from smdbg.yamlfile import KeyPath

COMMON = tuple(field.name for field in fields(Rule) if field.name != "instance")
RULE_KEYS = ("rule", "name", "enabled", "parameters")
EXPRESSION_KEYS = ("name", "enabled", "when", "expect", "each", "message")
DEFAULTS = "defaults"

_Settings = dict[Any, tuple[KeyPath, Any]]


def read_entries(file: PackFile, inherited: Mapping[str, Rule]) -> dict[str, Rule]:
    """Return the inherited rules, by label, with what the entries of the file make of them."""
    rules = dict(inherited)
    defaults = _defaults(file)
    entries = file.data.get("rules")
    if not isinstance(entries, list | None):
        file.refuse(("rules",), "rules must be a list")
    own: set[str] = set()
    for index, entry in enumerate(entries or ()):
        at = ("rules", index)
        if not isinstance(entry, str | dict):
            file.refuse(at, "an entry must be the name of a rule, or a mapping with 'rule', 'when' or 'expect'")
        given = {"rule": entry} if isinstance(entry, str) else entry
        label = _label(file, at, given)
        if label in own:
            file.refuse(at, f"a second rule is called {label!r}; give it another name")
        own.add(label)
        if not _enabled(file, at, given):
            for switched_off in _inherited(file, at, given, label, inherited):
                rules.pop(switched_off, None)
        elif _is_expression(given, rules.get(label)):
            rules[label] = _expression(file, at, given, rules.get(label), defaults)
        else:
            rules[label] = _rule(file, at, given, rules.get(label), defaults)
    return rules


def _defaults(file: PackFile) -> _Settings:
    """Return place and value of what holds for every entry of the file that does not set it itself."""
    given = file.mapping((DEFAULTS,), file.data.get(DEFAULTS))
    file.refuse_unknown((DEFAULTS,), DEFAULTS, given, COMMON)
    for key, value in given.items():
        _value(file, (DEFAULTS, key), Rule, key, value)  # wrong even where no entry uses it
    return {key: ((DEFAULTS, key), value) for key, value in given.items()}


def _label(file: PackFile, at: KeyPath, entry: Mapping[Any, Any]) -> str:
    """Return the name of an entry: its own, or else that of the rule."""
    if "rule" not in entry and "name" not in entry:
        wanted = "'name'" if {"when", "expect"} & set(entry) else "'rule'"
        file.refuse_unknown(at, "an entry", entry, (*dict.fromkeys((*RULE_KEYS, *EXPRESSION_KEYS)), *COMMON))
        file.refuse(at, f"{wanted} is missing")
    label = entry.get("name", entry.get("rule"))
    if not isinstance(label, str) or not label:
        key = "name" if "name" in entry else "rule"
        file.refuse((*at, key), f"{key} must be text" if key == "name" else f"there is no rule {label!r}")
    return label


def _enabled(file: PackFile, at: KeyPath, entry: Mapping[Any, Any]) -> bool:
    """Return whether an entry is to be run."""
    enabled = entry.get("enabled", True)
    if not isinstance(enabled, bool):
        file.refuse((*at, "enabled"), "enabled must be true or false")
    return enabled


def _inherited(
    file: PackFile, at: KeyPath, entry: Mapping[Any, Any], label: str, inherited: Mapping[str, Rule]
) -> list[str]:
    """Return the labels that an entry switches off: the rule of that name, or else all instances of the rule."""
    for key in entry:
        if key not in ("rule", "name", "enabled"):
            file.refuse((*at, key), f"{key!r} has no effect on a rule that is not enabled; remove it")
    found = [label] if label in inherited else []
    if "name" not in entry:
        found = found or [one for one, rule in inherited.items() if rule.name == label]
    if not found:
        known = [*inherited]
        hint = nearest(label, known) if known else " This pack extends none."
        file.refuse(at, f"no rule {label!r} is inherited that could be switched off.{hint}")
    return found


def _is_expression(entry: Mapping[Any, Any], base: Rule | None) -> bool:
    """Tell whether an entry is an expression, or changes one."""
    if "rule" in entry:
        return False
    return isinstance(base, ExpressionRule) or bool({"when", "expect"} & set(entry))


def _rule(file: PackFile, at: KeyPath, entry: Mapping[Any, Any], base: Rule | None, defaults: _Settings) -> Rule:
    """Return the rule of an entry, on top of an inherited one of the same name."""
    file.refuse_unknown(at, "an entry", entry, (*RULE_KEYS, *COMMON))
    if "rule" in entry:
        rule_class = file.rule_class((*at, "rule"), entry["rule"])
    elif base is not None:
        rule_class = type(base)
    else:
        file.refuse(at, "'rule' is missing (or 'when' or 'expect', for an expression)")
    settings = defaults | _settings(file, at, entry)
    values = {key: _value(file, place, rule_class, key, value) for key, (place, value) in settings.items()}
    label = entry.get("name", rule_class.name)
    if base is None:
        return rule_class(instance="" if label == rule_class.name else label, **values)
    if type(base) is not rule_class:
        file.refuse(at, f"{label!r} is a rule {base.name!r} in a pack that this one extends; use another name")
    return replace(base, **values)


def _settings(file: PackFile, at: KeyPath, entry: Mapping[Any, Any]) -> _Settings:
    """Return place and value of every parameter that an entry sets, itself or under `parameters`."""
    found: _Settings = {key: ((*at, key), value) for key, value in entry.items() if key in COMMON}
    for key, value in file.mapping((*at, "parameters"), entry.get("parameters")).items():
        place = (*at, "parameters", key)
        if key in found:
            file.refuse(place, f"{key!r} is set twice, in the entry and in its parameters; remove one")
        found[key] = (place, value)
    return found


def _value(file: PackFile, at: KeyPath, rule_class: type[Rule], key: Any, value: Any) -> Any:
    """Return a parameter's value, converted."""
    known = [parameter.name for parameter in parameters_of(rule_class)]
    if key not in known:
        file.refuse(at, f"rule {rule_class.name} has no parameter {key!r}.{nearest(key, known)}")
    try:
        return convert(rule_class, key, value)
    except BadConfig as error:
        file.refuse(at, str(error))


def _expression(
    file: PackFile, at: KeyPath, entry: Mapping[Any, Any], base: Rule | None, defaults: _Settings
) -> Rule:
    """Return the expression of an entry, on top of an inherited one of the same name."""
    file.refuse_unknown(at, "an expression", entry, (*EXPRESSION_KEYS, *COMMON))
    label = entry["name"]
    if base is not None and not isinstance(base, ExpressionRule):
        file.refuse(at, f"{label!r} is a rule {base.name!r} in a pack that this one extends; use another name")
    if "when" in entry and "expect" in entry:
        file.refuse((*at, "expect"), "an expression has 'when' or 'expect', not both")
    values: dict[str, Any] = {}
    for key in ("when", "expect"):
        if key in entry:
            if not isinstance(entry[key], str) or not entry[key].strip():
                file.refuse((*at, key), f"{key} must be an expression, in quotes")
            values.update({"when": "", "expect": ""} | {key: entry[key]})
    if "message" in entry:
        if not isinstance(entry["message"], str):
            file.refuse((*at, "message"), "message must be text")
        values["text"] = entry["message"]
    own = {key: ((*at, key), value) for key, value in entry.items() if key in COMMON or key == "each"}
    for key, (place, value) in (defaults | own).items():
        values[key] = _value(file, place, ExpressionRule, key, value)
    place = next(((*at, key) for key in ("when", "expect", "each") if key in entry), at)
    try:
        return ExpressionRule(instance=label, **values) if base is None else replace(base, **values)
    except BadConfig as error:
        file.refuse(place, str(error))
