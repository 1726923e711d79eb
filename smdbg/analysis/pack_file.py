"""Pack files as they are read: found by name or path, and refused with file and line."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from smdbg.analysis.rule import Rule, all_rules, find_rule
from smdbg.errors import BadConfig, near
from smdbg.yamlfile import KeyPath, Lines, line_of, load

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class PackFile:
    """A pack file as read; `extra` are rule classes by name that do not come with smdbg."""

    path: Path
    data: Mapping[Any, Any]
    lines: Lines
    extra: Mapping[str, type[Rule]] = field(default_factory=dict)

    def refuse(self, at: KeyPath, why: str) -> NoReturn:
        """Raise BadConfig that names file and line."""
        raise BadConfig(f"{self.path}:{line_of(self.lines, at)}: {why}")

    def refuse_unknown(self, at: KeyPath, what: str, given: Iterable[Any], known: Sequence[str]) -> None:
        """Refuse a key of the mapping at `at` that is not known, and name the nearest."""
        for key in given:
            if key not in known:
                self.refuse((*at, key), f"{what} has no key {key!r}.{nearest(key, known)}")

    def mapping(self, at: KeyPath, value: Any) -> Mapping[Any, Any]:
        """Return the value at `at`, which must be a mapping; nothing stands for an empty one."""
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.refuse(at, f"{at[-1]} must be a mapping of names to values")
        return value

    def rule_class(self, at: KeyPath, name: Any) -> type[Rule]:
        """Return the class of a rule by its name; `at` is where that stands."""
        if not isinstance(name, str) or not (name in all_rules() or name in self.extra):
            known = sorted({*all_rules(), *self.extra})
            self.refuse(at, f"there is no rule {name!r}.{nearest(name, known)}")
        return find_rule(name, self.extra)


def read(path: Path, extra: Mapping[str, type[Rule]]) -> PackFile:
    """Read a pack file; BadConfig when it cannot be read."""
    data, lines = load(path)
    return PackFile(path, data, lines, extra)


def pack_names() -> list[str]:
    """Return the names of the packs that come with smdbg, sorted."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def locate(name_or_path: str, beside: Path) -> Path:
    """Return the file of a pack; a path is taken from the folder `beside`."""
    if "/" in name_or_path or name_or_path.endswith(SUFFIXES):
        return beside / name_or_path
    known = pack_names()
    if name_or_path in known:
        return _folder() / f"{name_or_path}.yaml"
    hint = near(name_or_path, known) or f" There are: {', '.join(known)}."
    raise BadConfig(f"There is no pack {name_or_path!r}.{hint} A file of your own ends in .yaml.")


def nearest(name: Any, known: Sequence[str]) -> str:
    """Return the names most like an unknown one, or else all there are."""
    return near(str(name), known) or f" Known: {', '.join(known)}."


def _folder() -> Path:
    """Return the folder of the packs that come with smdbg."""
    return Path(next(iter(importlib.import_module("smdbg.rules").__path__))) / "packs"
