"""Parameters of rules: declared as dataclass fields, listed, and converted from what a user wrote.

A rule declares `threshold: float = parameter(1e-7, unit="", help="...")`. Values come from packs (YAML types), from
the command line and from people used to smdebug (both strings): one conversion serves them all.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from smdbg.errors import BadConfig, near

if TYPE_CHECKING:
    from smdbg.analysis.rule import Rule

_TRUE, _FALSE, _NONE = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("", "none", "null")


def parameter(
    default: Any,
    *,
    unit: str = "",
    help: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """Declare a parameter of a rule: a dataclass field with a default, a unit, a help sentence and a range."""
    metadata = {"unit": unit, "help": help, "minimum": minimum, "maximum": maximum, "choices": tuple(choices)}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Parameter:
    """A declared parameter; `type` is in words a user reads: `number`, `whole number`, `true or false`, ..."""

    name: str
    type: str
    default: object
    unit: str
    help: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()

    def record(self) -> dict[str, object]:
        """Return name, type, default, unit and help as JSON-able data."""
        default = self.default
        if isinstance(default, Enum):
            default = default.value
        elif isinstance(default, tuple):
            default = list(default)
        return {"name": self.name, "type": self.type, "default": default, "unit": self.unit, "help": self.help}


def parameters_of(rule_class: type[Rule]) -> tuple[Parameter, ...]:
    """Return the parameters of a rule: its own first, then those common to all rules."""
    hints = typing.get_type_hints(rule_class)
    declared = [field for field in dataclasses.fields(rule_class) if "unit" in field.metadata]
    common = {field.name for field in dataclasses.fields(_base(rule_class))}
    declared.sort(key=lambda field: field.name in common)
    return tuple(
        Parameter(field.name, _words(hints[field.name]), field.default, **field.metadata) for field in declared
    )


def build(rule_class: type[Rule], values: Mapping[str, Any], *, instance: str = "") -> Rule:
    """Return a rule with the given parameters, the rest at their defaults.

    Strings are converted as smdebug did ("True", "1e-7"). Raises BadConfig for an unknown parameter, a value of
    another type, or one out of its range.
    """
    return rule_class(instance=instance, **{name: convert(rule_class, name, values[name]) for name in values})


def convert(rule_class: type[Rule], name: str, value: Any) -> Any:
    """Return `value` as the type that parameter `name` of the rule declares; BadConfig when that cannot be done."""
    known = {declared.name: declared for declared in parameters_of(rule_class)}
    if name not in known:
        hint = near(name, known) or f" It has: {', '.join(known)}."
        raise BadConfig(f"rule {rule_class.name} has no parameter {name!r}.{hint}")
    declared = known[name]
    try:
        result = _converted(typing.get_type_hints(rule_class)[name], value)
    except (TypeError, ValueError, OverflowError):
        raise BadConfig(
            f"rule {rule_class.name}: parameter {name} must be {declared.type}, and got {value!r}."
        ) from None
    wrong = _out_of_range(declared, result)
    if wrong:
        raise BadConfig(f"rule {rule_class.name}: parameter {name} must be {wrong}, and got {value!r}.")
    return result


def _base(rule_class: type[Rule]) -> type[Any]:
    """Return the class that declares the common parameters: the last dataclass among the ancestors."""
    return [ancestor for ancestor in rule_class.__mro__ if dataclasses.is_dataclass(ancestor)][-1]


def _out_of_range(declared: Parameter, value: object) -> str:
    """Return what the value should have been, '' when it is in range."""
    if declared.choices and value is not None and value not in declared.choices:
        return f"one of {', '.join(declared.choices)}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    low, high = declared.minimum, declared.maximum
    unit = f" {declared.unit}" if declared.unit else ""
    if (low is None or value >= low) and (high is None or value <= high):
        return ""
    if low is not None and high is not None:
        return f"from {low:g} to {high:g}{unit}"
    return f"at least {low:g}{unit}" if low is not None else f"at most {high:g}{unit}"


def _members(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union such as `int | None`, or the type itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def _words(kind: Any) -> str:
    """Return a declared type in plain words."""
    members = _members(kind)
    if len(members) > 1:
        return " or ".join("none" if member is type(None) else _words(member) for member in members)
    if typing.get_origin(kind) is tuple:
        return f"list of {_words(typing.get_args(kind)[0])}s"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(str(member.value) for member in kind)
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}.get(kind, str(kind))


def _converted(kind: Any, value: Any) -> Any:
    """Return `value` as `kind`; TypeError or ValueError when it is none."""
    members = _members(kind)
    if type(None) in members and (value is None or (isinstance(value, str) and value.strip().lower() in _NONE)):
        return None
    kind = next(member for member in members if member is not type(None))
    if typing.get_origin(kind) is tuple:
        return _list(typing.get_args(kind)[0], value)
    if issubclass(kind, Enum):
        return kind(value.strip().lower() if isinstance(value, str) else value)
    if kind is str:
        if not isinstance(value, str):
            raise TypeError(value)
        return value
    return _truth(value) if kind is bool else _number(kind, value)


def _list(kind: Any, value: Any) -> tuple[Any, ...]:
    """Return a tuple from a list, from one value, or from text with commas (a regular expression is kept whole)."""
    if isinstance(value, str):
        value = [value] if value.startswith("re:") else [part.strip() for part in value.split(",") if part.strip()]
    elif not isinstance(value, list | tuple):
        value = [value]
    return tuple(_converted(kind, part) for part in value)


def _truth(value: Any) -> bool:
    """Return a bool from a bool or from text that says one."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _TRUE + _FALSE:
        return value.strip().lower() in _TRUE
    raise ValueError(value)


def _number(kind: Any, value: Any) -> Any:
    """Return a finite int or float from a number or from text that says one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(value)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    if kind is float:
        return number
    if number != int(number):
        raise ValueError(value)
    return int(value) if not isinstance(value, str) or value.strip().lstrip("+-").isdigit() else int(number)
