"""Rule packs: YAML files that name rules, set their parameters, and hold expressions.

    name: mine
    description: what this pack is for
    extends: [default]
    defaults: {start_step: 100}
    rules:
      - all_zero
      - rule: exploding_tensor
        name: exploding_outputs
        severity: warning
        collections: [outputs]
        parameters: {only_nan: true}
      - name: gradient_jump
        when: "l2(gradients) > 10 * median(l2(gradients), 64)"

An entry whose name is that of a rule of an extended pack changes it: what it sets replaces what was set before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from smdbg.analysis.expression_rule import with_reference
from smdbg.analysis.pack_entry import DEFAULTS, read_entries
from smdbg.analysis.pack_file import PackFile, locate, pack_names, read
from smdbg.analysis.parameters import convert
from smdbg.analysis.rule import Rule
from smdbg.errors import BadConfig, near
from smdbg.yamlfile import KeyPath

__all__ = ["PACK_KEYS", "Pack", "load_pack", "pack_names", "with_overrides", "with_reference"]

PACK_KEYS = ("name", "description", "extends", DEFAULTS, "rules")
NO_RULES: Mapping[str, type[Rule]] = MappingProxyType({})


@dataclass(frozen=True)
class Pack:
    """Rules under one name, those of the packs it extends included and first; `path` is the file it came from."""

    name: str
    description: str
    rules: tuple[Rule, ...]
    path: str


def load_pack(name_or_path: str, extra: Mapping[str, type[Rule]] = NO_RULES) -> Pack:
    """Return a pack that comes with smdbg by its name, or one from a file (has a slash, or ends in .yaml or .yml).

    `extra` are rule classes by name that packs may use beside those of smdbg. Raises BadConfig, with file and line
    where there are any, for a pack that is not there, an unknown key, rule or parameter, a value of the wrong type, an
    expression that cannot be read, and packs that extend each other in a circle.
    """
    return _load(locate(name_or_path, Path()), (), extra)


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
                result[index] = replace(result[index], **{parameter: changed})
            except BadConfig as error:
                raise BadConfig(f"The setting {setting!r} is wrong: {error}") from None
    return result


def _load(path: Path, chain: tuple[Path, ...], extra: Mapping[str, type[Rule]]) -> Pack:
    """Read one pack file and those it extends; `chain` holds the files that led here."""
    file = read(path, extra)
    file.refuse_unknown((), "a pack", file.data, PACK_KEYS)
    inherited: dict[str, Rule] = {}
    for at, name in _extends(file):
        for rule in _extended(file, at, name, (*chain, path.resolve())).rules:
            inherited[rule.label] = rule
    rules = read_entries(file, inherited)
    for key in ("name", "description"):
        if not isinstance(file.data.get(key, ""), str):
            file.refuse((key,), f"{key} must be text")
    name, description = file.data.get("name", path.stem), file.data.get("description", "")
    return Pack(name, description, tuple(rules.values()), str(path))


def _extends(file: PackFile) -> list[tuple[KeyPath, str]]:
    """Return place and name of the packs that a file extends: one text or a list of texts."""
    key = "extends"
    value = file.data.get(key, [])
    items = [((key,), value)] if isinstance(value, str) else value
    if isinstance(value, list):
        items = [((key, index), item) for index, item in enumerate(value)]
    if not isinstance(items, list) or not all(isinstance(item, str) for _, item in items):
        file.refuse((key,), f"{key} must be a list of names")
    return items


def _extended(file: PackFile, at: KeyPath, name: str, chain: tuple[Path, ...]) -> Pack:
    """Return a pack that `file` extends."""
    try:
        path = locate(name, file.path.parent)
    except BadConfig as error:
        file.refuse(at, str(error))
    if path.resolve() in chain:
        circle = " -> ".join(item.name for item in (*chain, path))
        file.refuse(at, f"this pack extends itself: {circle}")
    if not path.is_file():
        file.refuse(at, f"the pack {name!r} that it extends is not there: {path}")
    return _load(path, chain, file.extra)
