"""Rules that do not come with smdbg: from files that a user names, and from packages that are installed.

A file is imported once, under a name that nothing else has. Whatever goes wrong with it becomes one sentence that
names file and line. Packages offer rules by entry points of the group `smdbg.rules`; one is imported when its rule is
asked for, and not before, so that one that breaks cannot break other checks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, cast

from smdbg.analysis.rule import Rule, all_rules, build
from smdbg.errors import BadConfig

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "smdbg.rules"
HOW = "A rule is a class derived from smdbg.Rule or smdbg.StepRule"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*\Z")  # what --set, packs and globs can take apart
_DECORATOR = "@dataclass(frozen=True, kw_only=True)"


def known_rules(own: dict[str, type[Rule]]) -> Mapping[str, type[Rule]]:
    """Return rules of files and those of installed packages, by name; the latter are imported when asked for."""
    return ChainMap(own, cast(dict[str, type[Rule]], InstalledRules()))


def load_rules(paths: Sequence[str | os.PathLike[str]]) -> dict[str, type[Rule]]:
    """Return the rules that files hold, by name, in order; a file that is named twice is taken once.

    Raises BadConfig, with file and line, for a file that is not there, does not import, calls sys.exit or holds no
    rule, and for a rule that is declared wrongly or whose name is taken.
    """
    found: dict[str, type[Rule]] = {}
    taken = dict.fromkeys(all_rules(), "comes with smdbg")
    for path in {Path(path).resolve(): Path(path) for path in paths}.values():
        module = _imported(path)
        for rule_class in _rules_of(path, module):
            name = rule_class.name
            if name in taken:
                _refuse(path, rule_class, f"the name {name!r} is taken: a rule of that name {taken[name]}")
            taken[name] = f"is in {path}"
            found[name] = rule_class
    return found


class InstalledRules(Mapping[str, type[Rule]]):
    """The rules that installed packages offer, by name; each is imported when it is asked for."""

    @cached_property
    def _points(self) -> dict[str, EntryPoint]:
        # Costs a tenth of a second: not before it is known that a rule is none of smdbg's own.
        from importlib.metadata import entry_points

        own = set(all_rules())
        return {point.name: point for point in entry_points(group=GROUP) if point.name not in own}

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(sorted(self._points))

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._points)

    def __contains__(self, name: object) -> bool:
        """Tell whether there is a rule of that name, without importing it."""
        return name in self._points

    def __getitem__(self, name: str) -> type[Rule]:
        """Import a rule. Raises KeyError where there is none, BadConfig for one that cannot be used."""
        point = self._points[name]
        where = f"The rule {name!r} of the installed package {point.dist.name if point.dist else point.value!r}"
        try:
            rule_class = point.load()
        except (Exception, SystemExit) as error:
            raise BadConfig(f"{where} cannot be imported ({point.value}): {_said(error)}.") from None
        if not isinstance(rule_class, type) or not issubclass(rule_class, Rule):
            raise BadConfig(f"{where} is no rule: {point.value} is not a class derived from smdbg.Rule.")
        wrong = _wrong(rule_class)
        if not wrong and rule_class.name != name:
            wrong = f"its class is called {rule_class.name!r}; entry point and class must have one name"
        if wrong:
            raise BadConfig(f"{where} cannot be used: {wrong}.")
        return rule_class


# ---------------------------------------------------------------------------------------------------- files


class _Uncached(SourceFileLoader):
    """Compiles a file anew each time, and leaves no __pycache__ beside it."""

    def get_code(self, fullname: str) -> CodeType:
        """Return the code of the file as it is now."""
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code


def _imported(path: Path) -> ModuleType:
    """Import a file and return its module."""
    if path.suffix != ".py":
        raise BadConfig(f"{path}: a plugin is a Python file; its name ends in .py.")
    if not path.is_file():
        raise BadConfig(f"{path}: there is no such file. Give --plugin the path of a Python file.")
    name = f"smdbg_plugin_{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:12]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_Uncached(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their annotations up there
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, SystemExit):
            raise BadConfig(f"{_place(path, error)}: the plugin calls sys.exit; it was not loaded.") from None
        if isinstance(error, Exception):
            raise BadConfig(f"{_place(path, error)}: the plugin cannot be imported: {_said(error)}.") from None
        raise
    return module


def _place(path: Path, error: BaseException) -> str:
    """Return `file:line` of the last line of the file that an error came through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    return f"{path}:{lines[-1]}" if lines and lines[-1] else str(path)


def _said(error: BaseException) -> str:
    """Return an error in one line: `ValueError: no such thing`."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return " ".join(f"{type(error).__name__}: {text}".split()).rstrip(":.")


def _rules_of(path: Path, module: ModuleType) -> list[type[Rule]]:
    """Return the rules that a module defines itself, in order; classes that others derive from may have no name."""
    own = [item for item in vars(module).values() if _is_rule(item) and item.__module__ == module.__name__]
    own = list(dict.fromkeys(own))
    rules = [one for one in own if one.name or not any(one in other.__mro__[1:] for other in own)]
    if not rules:
        raise BadConfig(f"{path}: the file holds no rule. {HOW}; `smdbg rules new NAME` writes one.")
    for rule_class in rules:
        wrong = _wrong(rule_class)
        if wrong:
            _refuse(path, rule_class, wrong)
    return rules


def _is_rule(item: Any) -> bool:
    return isinstance(item, type) and issubclass(item, Rule)


def _wrong(rule_class: type[Rule]) -> str:
    """Return what is wrong with the declaration of a rule, '' when nothing is."""
    if not rule_class.name:
        return 'it has no name: write `name: ClassVar[str] = "my_rule"`'
    if not isinstance(rule_class.name, str) or not _NAME.match(rule_class.name):
        return f"{rule_class.name!r} cannot be its name: letters, digits, _ and -, and no digit first"
    for ancestor in rule_class.__mro__:
        undecorated = "__dataclass_fields__" not in vars(ancestor) and issubclass(ancestor, Rule)
        if undecorated and any("ClassVar" not in str(kind) for kind in inspect.get_annotations(ancestor).values()):
            return f"its parameters are not seen: write {_DECORATOR} above the class {ancestor.__name__}"
    ours = {field.name for base in rule_class.__mro__ if _comes_with_smdbg(base) for field in dataclasses.fields(base)}
    for field in dataclasses.fields(rule_class):
        if field.name not in ours and "unit" not in field.metadata:
            return f"declare the parameter as `{field.name}: ... = parameter(...)` (from smdbg.analysis.rule)"
    try:
        build(rule_class, {}).needs()
    except (Exception, SystemExit) as error:
        return f"it cannot be made with its defaults: {_said(error)}"
    return ""


def _comes_with_smdbg(base: type) -> bool:
    return base.__module__.partition(".")[0] == "smdbg" and dataclasses.is_dataclass(base)


def _refuse(path: Path, rule_class: type[Rule], why: str) -> NoReturn:
    """Raise BadConfig that names the file and the line of a class."""
    try:
        place = f"{path}:{inspect.findsource(rule_class)[1] + 1}"
    except (OSError, TypeError):
        place = str(path)
    raise BadConfig(f"{place}: the rule class {rule_class.__name__}: {why}.")
