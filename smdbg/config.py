"""The file smdbg.yaml: defaults for the command line, kept with a project.

Flags and environment variables come first; the command line reads those itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from smdbg import yamlfile
from smdbg.errors import BadConfig, near

FILE_NAME = "smdbg.yaml"
KEYS = ("run", "pack", "rules", "format", "storage_options")
FORMATS = ("table", "tsv", "jsonl")


@dataclass(frozen=True)
class Config:
    """What a smdbg.yaml says; every field has the value of an empty file until it is given.

    run and pack: a path in the file counts from the folder of the file, here it is absolute; URLs and names of packs
    stay as they are. rules: names or globs. storage_options: what s3fs or another fsspec file system is given.
    source: the file, None if there is none.
    """

    run: str | None = None
    pack: str | None = None
    rules: tuple[str, ...] = ()
    format: str | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # may hold secrets: not shown
    source: Path | None = None


def find_config(start: str | Path | None = None) -> Path | None:
    """Return the nearest smdbg.yaml in the folder `start` (default: the current one) or above it."""
    folder = Path.cwd() if start is None else Path(start).absolute()
    for place in (folder, *folder.parents):
        candidate = place / FILE_NAME
        if candidate.is_file():
            return candidate
    return None


def load_config(path: str | Path | None = None) -> Config:
    """Read the configuration from `path`, else from the nearest smdbg.yaml; without any, Config().

    Raises BadConfig with file and line for what cannot be read, an unknown key or a value of the wrong type.
    """
    source = find_config() if path is None else Path(path).absolute()
    if source is None:
        return Config()
    data, lines = yamlfile.load(source)
    for key in data:
        if key not in KEYS:
            hint = near(str(key), KEYS, 1) or f" Known are {', '.join(KEYS)}."
            raise BadConfig(f"{source}:{lines[(key,)]}: unknown key {str(key)!r}.{hint}")
    reader = _Reader(source, data, lines)
    run, pack = reader.text("run"), reader.text("pack")
    return Config(
        run=None if run is None else _placed(run, source),
        # A pack is a file if it looks like one; otherwise it is the name of a pack.
        pack=_placed(pack, source) if pack and ("/" in pack or pack.endswith((".yaml", ".yml"))) else pack,
        rules=reader.texts("rules"),
        format=reader.choice("format", FORMATS),
        storage_options=reader.mapping("storage_options"),
        source=source,
    )


@dataclass(frozen=True)
class _Reader:
    """Values of a file by key, each of the type that is asked for; a key without a value counts as absent."""

    source: Path
    data: Mapping[Any, Any]
    lines: yamlfile.Lines

    def text(self, key: str) -> str | None:
        value = self.data.get(key)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            self.refuse((key,), f"{key} must be text", value)
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts; one text is a list with commas."""
        value = self.data.get(key)
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        if not isinstance(value, list | None):
            self.refuse((key,), f"{key} must be a list of texts", value)
        for position, item in enumerate(value or ()):
            if not isinstance(item, str) or not item:
                self.refuse((key, position), f"each of {key} must be text", item)
        return tuple(value or ())

    def choice(self, key: str, choices: tuple[str, ...]) -> str | None:
        value = self.data.get(key)
        if value is not None and value not in choices:
            self.refuse((key,), f"{key} must be one of {', '.join(choices)}", value, near(str(value), choices, 1))
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.data.get(key)
        if not isinstance(value, dict | None):
            self.refuse((key,), f"{key} must be a mapping", value)
        for name in value or ():
            if not isinstance(name, str):
                self.refuse((key, name), f"the names in {key} must be text", name)
        return dict(value or {})

    def refuse(self, at: tuple[Any, ...], what: str, value: object, hint: str = "") -> NoReturn:
        line = yamlfile.line_of(self.lines, at)
        raise BadConfig(f"{self.source}:{line}: {what}, not {_shown(value)}.{hint}")


def _placed(path: str, source: Path) -> str:
    """Return a relative path of the file as an absolute one; URLs and `~` stay meaningful."""
    return path if "://" in path else str(source.parent / Path(path).expanduser())


def _shown(value: object) -> str:
    """Name a wrong value; only scalars are quoted, since a mapping may hold a secret."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return "nothing" if value is None else repr(value)
