"""YAML files that people write: read safely, with the line of every entry, and errors that point at it.

Plain words are read by the rules of YAML 1.2: `yes`, `on`, `10:20` and `2024-01-01` are text, `1e-3` is a number.
Explicit tags (`!!python/...`, `!anything`) are refused, `<<` merges nothing, and each key may be given once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from smdbg.errors import BadConfig

KeyPath = tuple[Any, ...]
Lines = Mapping[KeyPath, int]

_TAG = "tag:yaml.org,2002:"
_CORE = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the plain words of YAML 1.2 (its core schema) instead of those of YAML 1.1."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {
        first: [(_TAG + tag, re.compile(f"(?:{words})\\Z")) for tag, words, firsts in _CORE if first in firsts]
        for first in {"", *"".join(firsts for _, _, firsts in _CORE)}
    }

    def whole_number(self, node: yaml.ScalarNode) -> int:
        """Return an int; unlike in YAML 1.1, a leading zero does not make it octal."""
        text = str(self.construct_scalar(node))
        return int(text, 16) if text.startswith("0x") else int(text)


_Loader.add_constructor(_TAG + "int", _Loader.whole_number)


def load(path: str | Path) -> tuple[dict[Any, Any], Lines]:
    """Read a YAML file that holds a mapping.

    Returns the data and the line (from 1) of each entry by its path of keys and positions; () is the whole. An empty
    file is an empty mapping. Raises BadConfig with file, line and column when the file cannot be read, is not UTF-8,
    is not YAML, gives a key twice, refers to itself, or holds something else than a mapping.
    """
    text = _read(path)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None or (node.tag == _TAG + "null" and not node.value):
            return {}, {(): 1}
        survey = _Survey(loader, path)
        if not isinstance(node, yaml.MappingNode):
            survey.refuse(node, f"the file must hold 'key: value' lines, not {_kind(node)}")
        survey.visit(node, ())
        return loader.construct_document(node), survey.lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise BadConfig(f"{path}{where}: this is not valid YAML: {said}.{_advice(said)}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = f"U+{ord(text[error.position]):04X}"
        raise BadConfig(f"{path}:{line}: YAML does not allow the character {character}. Remove it.") from None
    except BadConfig:
        raise
    except (OverflowError, ValueError) as error:
        # PyYAML lets a few through, such as an escape for a character that Unicode does not have.
        raise BadConfig(f"{path}: this is not valid YAML: {error}.") from None
    except RecursionError:
        raise BadConfig(f"{path} is nested too deeply to be read.") from None


def line_of(lines: Lines, path: KeyPath) -> int:
    """Return the line of an entry, or of the nearest thing around it that has one (behind aliases, for example)."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


@dataclass
class _Survey:
    """One pass over the nodes of a file, before anything is built from them: notes lines, refuses what is unsafe."""

    loader: _Loader
    file: str | Path
    lines: dict[KeyPath, int] = field(default_factory=dict)
    around: list[int] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def visit(self, node: yaml.Node, at: KeyPath) -> None:
        """Note the lines of a node and of what it holds; a node behind several aliases is entered once."""
        if id(node) in self.around:
            self.refuse(node, "an alias refers to what it is part of; write it out")
        self.lines.setdefault(at, node.start_mark.line + 1)
        if id(node) in self.seen:
            return
        self.seen.add(id(node))
        self.check_tag(node)
        self.around.append(id(node))
        if isinstance(node, yaml.SequenceNode):
            for position, item in enumerate(node.value):
                self.visit(item, (*at, position))
        elif isinstance(node, yaml.MappingNode):
            self.visit_mapping(node, at)
        self.around.pop()

    def visit_mapping(self, node: yaml.MappingNode, at: KeyPath) -> None:
        """Visit the entries of a mapping, whose keys must be plain and each given once."""
        first: dict[Any, int] = {}
        for key_node, value in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.refuse(key_node, f"a key must be a plain word, not {_kind(key_node)}")
            self.check_tag(key_node)
            key = self.loader.construct_object(key_node)
            if key in first:
                self.refuse(key_node, f"{key!r} is given twice (first on line {first[key]}); remove one")
            first[key] = line
            self.lines.setdefault((*at, key), line)
            self.visit(value, (*at, key))

    def check_tag(self, node: yaml.Node) -> None:
        """Refuse an explicit tag, and numbers that Python will not read."""
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        resolve: Callable[..., str] = self.loader.resolve
        if node.tag != resolve(type(node), node.value, (plain, not plain)):
            self.refuse(node, "tags (words that begin with '!') are not read; leave it out, or quote the text")
        if node.tag == _TAG + "int" and len(node.value) > 1000:
            self.refuse(node, "the number is too long")

    def refuse(self, node: yaml.Node, why: str) -> NoReturn:
        """Raise BadConfig that points at a node."""
        raise BadConfig(f"{self.file}:{node.start_mark.line + 1}:{node.start_mark.column + 1}: {why}.")


def _read(path: str | Path) -> str:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadConfig(f"{path} cannot be read: {error.strerror or error}.") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadConfig(f"{path}:{line}: the file is not UTF-8 text. Save it as UTF-8.") from None


def _kind(node: yaml.Node) -> str:
    return {"MappingNode": "a mapping", "SequenceNode": "a list"}.get(type(node).__name__, "a single value")


def _advice(said: str) -> str:
    if r"'\t'" in said:
        return " Indent with spaces, not with tabs."
    if "mapping values are not allowed" in said:
        return " Put quotes around text that holds ': ', and check the indentation."
    if "alias" in said or "cannot start any token" in said:
        return " Put quotes around text that begins with a special character, such as '*bias'."
    return ""
