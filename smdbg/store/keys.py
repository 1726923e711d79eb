"""Which keys below a run belong to the format, and what lies there. Anything else is neither copied nor deleted.

Keys come from a listing of somebody's store: one that leaves the folder (`../`, an absolute path, a backslash, a NUL)
fits no pattern here, and so never becomes a path.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smdbg.errors import StoreError
from smdbg.store.backend import Backend, LocalBackend, Missing, Range
from smdbg.store.format import LOG, parse_worker, valid_collection

ROOT = "zarr.json"
UNFINISHED = "unfinished.json"  # lies where a run is being copied to or deleted; no reader looks at it
STOP = "control/stop.json"
LARGEST_NOTE = 64 << 10
# Bytes of JSON; parsing takes many times as much memory. A worker's zarr.json holds its catalogue.
LARGEST_ROOT, LARGEST_JSON = 16 << 20, 256 << 20

_ARRAY = re.compile(r"(?:stats|layout|features|step|bool|u?int\d{1,2}|float\d{2}|complex\d{2,3})(?:-\d{1,6})?\Z")
_INDEX = re.compile(r"(?:0|[1-9]\d{0,15})\Z", re.ASCII)
_PARTIAL = re.compile(r"((?:[^/]+/)*)\.([^/]+)\.[0-9a-f]{32}\.partial\Z")
_CHECK = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}\.json\Z")


@dataclass(frozen=True)
class Key:
    """A key of the format, taken apart.

    `worker` is (rank, attempt), None for what belongs to the run. `array` is the path below the worker of an array or
    of a collection's group, '' for the worker's own zarr.json. `index`: the numbers of a chunk, () for a zarr.json.
    """

    text: str
    worker: tuple[int, int] | None = None
    array: str = ""
    index: tuple[int, ...] = ()

    @property
    def collection(self) -> str:
        """The collection that it belongs to, '' for none."""
        home = self.array.split("/", 1)[0]
        return "" if home == LOG else home


def parse_key(text: str) -> Key | None:
    """Take a key apart; None for one that no writer makes."""
    parts = text.split("/")
    if text == ROOT or text in ("workers/zarr.json", "control/zarr.json", "checks/zarr.json", STOP):
        return Key(text)
    if len(parts) == 2 and parts[0] == "checks" and _CHECK.match(parts[1]):
        return Key(text)
    worker = parse_worker(parts[1]) if parts[0] == "workers" and len(parts) > 2 and parts[1].isascii() else None
    return None if worker is None else _in_worker(text, worker, parts[2:])


def is_partial(text: str) -> bool:
    """Tell whether a name is what a local writer that was killed left of an object of the format."""
    found = _PARTIAL.match(text)
    return found is not None and (parse_key(found[1] + found[2]) is not None or found[1] + found[2] == UNFINISHED)


def _in_worker(text: str, worker: tuple[int, int], parts: list[str]) -> Key | None:
    if parts == [ROOT]:
        return Key(text, worker)
    if parts[0] == LOG:
        depth = 1
    elif valid_collection(parts[0]):
        depth = 2 if len(parts) > 2 else 1
        if depth == 2 and not _ARRAY.match(parts[1]):
            return None
    else:
        return None
    array, rest = "/".join(parts[:depth]), parts[depth:]
    if rest == [ROOT]:
        return Key(text, worker, array)
    if (depth == 2 or array == LOG) and 2 <= len(rest) <= 4 and rest[0] == "c" and all(map(_INDEX.match, rest[1:])):
        return Key(text, worker, array, tuple(int(number) for number in rest[1:]))
    return None


def read_bounded(backend: Backend, key: str, most: int) -> bytes:
    """Return an object of at most `most` bytes. Raises Missing; ValueError for a larger one, which is not read."""
    [data] = backend.ranges([Range(key, 0, most + 1)])
    if data is None:
        raise Missing(key)
    if len(data) > most:
        raise ValueError(f"more than {most:,} bytes")
    return data


def refuse_links(backend: Backend) -> None:
    """Raise StoreError where a folder of a local run is a link: what is put or deleted there would lie elsewhere."""
    if not isinstance(backend, LocalBackend):
        return
    root = Path(backend.url).expanduser()
    for top in ("workers", "control", "checks"):
        for folder, names, _ in os.walk(root / top):
            for path in (folder, *(os.path.join(folder, name) for name in names)):
                if os.path.islink(path):
                    raise StoreError(f"{path} is a link to another folder: nothing is put or deleted there")


def read_note(backend: Backend) -> dict[str, Any] | None:
    """Return what `unfinished.json` says, None when there is none; {} for one that cannot be read."""
    try:
        note = json.loads(read_bounded(backend, UNFINISHED, LARGEST_NOTE))
    except Missing:
        return None
    except (ValueError, RecursionError):
        note = {}
    return note if isinstance(note, dict) else {}


def note_text(run_id: str, doing: str) -> bytes:
    """Return the text of `unfinished.json`: which run, and if it is being copied ('copy') or deleted ('delete')."""
    return json.dumps({"smdbg": 1, "run_id": run_id, "doing": doing}).encode()
