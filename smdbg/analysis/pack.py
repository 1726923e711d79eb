"""Rule packs: YAML files that name rules and set their parameters.

    name: mine
    description: what this pack is for
    extends: [default]
    rules:
      - all_zero
      - rule: exploding_tensor
        name: exploding_outputs
        severity: warning
        collections: [outputs]
        parameters: {only_nan: true}

An entry whose name is that of a rule of an extended pack changes it: what it sets replaces what was set before.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from smdbg.analysis.parameters import convert, parameters_of
from smdbg.analysis.rule import Rule, all_rules, find_rule
from smdbg.errors import BadConfig, near
from smdbg.yamlfile import KeyPath, Lines, line_of, load

PACK_KEYS = ("name", "description", "extends", "rules")
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Pack:
    """Rules under one name, those of the packs it extends included and first; `path` is the file it came from."""

    name: str
    description: str
    rules: tuple[Rule, ...]
    path: str


@dataclass(frozen=True)
class _File:
    """A pack file as read, which can refuse an entry by its place."""

    path: Path
    data: Mapping[Any, Any]
    lines: Lines

    def refuse(self, at: KeyPath, why: str) -> NoReturn:
        """Raise BadConfig that names file and line."""
        raise BadConfig(f"{self.path}:{line_of(self.lines, at)}: {why}")


def pack_names() -> list[str]:
    """Return the names of the packs that come with smdbg, sorted."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def load_pack(name_or_path: str) -> Pack:
    """Return a pack that comes with smdbg by its name, or one from a file (has a slash, or ends in .yaml or .yml).

    Raises BadConfig, with file and line where there are any, for a pack that is not there, an unknown key, rule or
    parameter, a value of the wrong type, and packs that extend each other in a circle.
    """
    return _load(_locate(name_or_path, Path()), ())


def with_overrides(rules: Sequence[Rule], settings: Sequence[str]) -> list[Rule]:
    """Return the rules with settings such as `exploding_tensor.only_nan=true` applied, in order.

    The part before the dot is an instance's name, or a rule's name for all its instances. Raises BadConfig.
    """
    result = list(rules)
    for setting in settings:
        target, equals, value = setting.partition("=")
        name, dot, parameter = target.strip().partition(".")
        if not equals or not dot or not name or not parameter:
            raise BadConfig(f"The setting {setting!r} cannot be read. Write RULE.PARAMETER=VALUE.")
        chosen = [index for index, rule in enumerate(result) if rule.label == name]
        chosen = chosen or [index for index, rule in enumerate(result) if rule.name == name]
        if not chosen:
            known = {rule.label for rule in result} | {rule.name for rule in result}
            raise BadConfig(f"The setting {setting!r} names no selected rule.{near(name, known)}")
        for index in chosen:
            try:
                changed = convert(type(result[index]), parameter, value.strip())
            except BadConfig as error:
                raise BadConfig(f"The setting {setting!r} is wrong: {error}") from None
            result[index] = replace(result[index], **{parameter: changed})
    return result


def _folder() -> Path:
    """Return the folder of the packs that come with smdbg."""
    return Path(next(iter(importlib.import_module("smdbg.rules").__path__))) / "packs"


def _locate(name_or_path: str, beside: Path) -> Path:
    """Return the file of a pack; a path is taken from the folder `beside`."""
    if "/" in name_or_path or name_or_path.endswith(SUFFIXES):
        return beside / name_or_path
    known = pack_names()
    if name_or_path in known:
        return _folder() / f"{name_or_path}.yaml"
    hint = near(name_or_path, known) or f" There are: {', '.join(known)}."
    raise BadConfig(f"There is no pack {name_or_path!r}.{hint} A file of your own ends in .yaml.")


def _load(path: Path, chain: tuple[Path, ...]) -> Pack:
    """Read one pack file and those it extends; `chain` holds the files that led here."""
    data, lines = load(path)
    file = _File(path, data, lines)
    for key in data:
        if key not in PACK_KEYS:
            file.refuse((key,), f"a pack has no key {key!r}.{_near(key, PACK_KEYS)}")
    rules: dict[str, Rule] = {}
    for at, name in _strings(file, "extends"):
        for rule in _extended(file, at, name, (*chain, path.resolve())).rules:
            rules[rule.label] = rule
    entries = data.get("rules", [])
    if not isinstance(entries, list):
        file.refuse(("rules",), "rules must be a list")
    own: set[str] = set()
    for index, entry in enumerate(entries):
        rule = _entry(file, ("rules", index), entry, rules)
        if rule.label in own:
            file.refuse(("rules", index), f"a second rule is called {rule.label!r}; give it another name")
        own.add(rule.label)
        rules[rule.label] = rule
    for key in ("name", "description"):
        if not isinstance(data.get(key, ""), str):
            file.refuse((key,), f"{key} must be text")
    return Pack(data.get("name", path.stem), data.get("description", ""), tuple(rules.values()), str(path))


def _strings(file: _File, key: str) -> list[tuple[KeyPath, str]]:
    """Return the places and texts of an entry that is one text or a list of texts."""
    value = file.data.get(key, [])
    items = [((key,), value)] if isinstance(value, str) else value
    if isinstance(value, list):
        items = [((key, index), item) for index, item in enumerate(value)]
    if not isinstance(items, list) or not all(isinstance(item, str) for _, item in items):
        file.refuse((key,), f"{key} must be a list of names")
    return items


def _extended(file: _File, at: KeyPath, name: str, chain: tuple[Path, ...]) -> Pack:
    """Return a pack that `file` extends."""
    try:
        path = _locate(name, file.path.parent)
    except BadConfig as error:
        file.refuse(at, str(error))
    if path.resolve() in chain:
        circle = " -> ".join(item.name for item in (*chain, path))
        file.refuse(at, f"this pack extends itself: {circle}")
    if not path.is_file():
        file.refuse(at, f"the pack {name!r} that it extends is not there: {path}")
    return _load(path, chain)


def _entry(file: _File, at: KeyPath, entry: Any, inherited: Mapping[str, Rule]) -> Rule:
    """Return the rule of one entry: a name, or a mapping; on top of an inherited rule of the same name."""
    if isinstance(entry, str):
        entry = {"rule": entry}
    if not isinstance(entry, dict):
        file.refuse(at, "an entry must be the name of a rule, or a mapping with 'rule'")
    name = entry.get("rule")
    if name not in all_rules():
        place = (*at, "rule") if "rule" in entry else at
        file.refuse(place, f"there is no rule {name!r}.{_near(name, all_rules())}" if name else "'rule' is missing")
    rule_class = find_rule(name)
    label = entry.get("name", name)
    if not isinstance(label, str) or not label:
        file.refuse((*at, "name"), "name must be text")
    values = {
        key: _value(file, place, rule_class, key, value) for key, (place, value) in _settings(file, at, entry).items()
    }
    base = inherited.get(label)
    if base is None:
        return rule_class(instance="" if label == name else label, **values)
    if type(base) is not rule_class:
        file.refuse(at, f"{label!r} is a rule {base.name!r} in a pack that this one extends; use another name")
    return replace(base, **values)


def _settings(file: _File, at: KeyPath, entry: Mapping[Any, Any]) -> dict[Any, tuple[KeyPath, Any]]:
    """Return place and value of every parameter that an entry sets, itself or under `parameters`."""
    common = [field.name for field in fields(Rule) if field.name != "instance"]
    found: dict[Any, tuple[KeyPath, Any]] = {}
    for key, value in entry.items():
        if key in common:
            found[key] = ((*at, key), value)
        elif key not in ("rule", "name", "parameters"):
            known = ["rule", "name", "parameters", *common]
            file.refuse((*at, key), f"an entry has no key {key!r}.{_near(key, known)}")
    parameters = entry.get("parameters") or {}
    if not isinstance(parameters, dict):
        file.refuse((*at, "parameters"), "parameters must be a mapping of names to values")
    for key, value in parameters.items():
        place = (*at, "parameters", key)
        if key in found:
            file.refuse(place, f"{key!r} is set twice, in the entry and in its parameters; remove one")
        found[key] = (place, value)
    return found


def _value(file: _File, at: KeyPath, rule_class: type[Rule], key: Any, value: Any) -> Any:
    """Return a parameter's value, converted."""
    known = [parameter.name for parameter in parameters_of(rule_class)]
    if key not in known:
        file.refuse(at, f"rule {rule_class.name} has no parameter {key!r}.{_near(key, known)}")
    try:
        return convert(rule_class, key, value)
    except BadConfig as error:
        file.refuse(at, str(error))


def _near(name: Any, known: Sequence[str]) -> str:
    """Return the names most like an unknown one, or else all there are."""
    return near(str(name), known) or f" Known: {', '.join(known)}."
