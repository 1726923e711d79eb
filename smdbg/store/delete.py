"""Deleting whole runs, so that what an interruption leaves never looks like a run, and is found again.

First `unfinished.json` says that the run is being deleted, then the root's zarr.json goes, without which nothing is a
run, then the rest, the note last.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smdbg.errors import DamagedData, NewerFormat, NotARun, RunNotFound, StoreError
from smdbg.store.backend import Backend, LocalBackend, open_backend
from smdbg.store.copy import is_live
from smdbg.store.keys import ROOT, UNFINISHED, is_partial, note_text, parse_key, read_note, refuse_links
from smdbg.store.reader import LOST_SECONDS, StoredRun

RUNNING = "running"
LEFT_BEHIND = "half deleted"
HALF_COPY = "half copied"


@dataclass(frozen=True)
class Found:
    """A run, or what is left of one. `changed`: when an object of it was last put, unix seconds by the store's clock.

    `status`: that of the run, or 'running', 'damaged', 'half deleted', 'half copied'. `objects` and `size` (bytes)
    count what belongs to the format; nothing else is ever deleted.
    """

    url: str
    run_id: str
    status: str
    changed: float
    objects: int
    size: int


def found_runs(
    url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> Iterator[tuple[Found, Backend]]:
    """Yield the run at a URL, or else those directly below it; runs of a newer format are left out."""
    backend = open_backend(url, storage_options)
    here = _found(backend)
    if here is not None:
        yield here, backend
        return
    base = os.fspath(url).rstrip("/")
    for item in backend.list(""):
        if item.folder and item.name not in (".", "..") and "\\" not in item.name and item.name.isprintable():
            below = open_backend(f"{base}/{item.name}", storage_options)
            there = _found(below)
            if there is not None:
                yield there, below


def _found(backend: Backend) -> Found | None:
    note = read_note(backend)
    told = str((note or {}).get("run_id", ""))
    try:
        stored = StoredRun(backend, "all")
        run_id, status = str(stored.root.get("run_id", "")), RUNNING if is_live(stored) else stored.status()
    except NewerFormat:
        return None
    except (NotARun, RunNotFound):
        doing = (note or {}).get("doing")
        if doing not in ("copy", "delete") or any(item.name == ROOT for item in backend.list("")):
            return None
        run_id, status = told, LEFT_BEHIND if doing == "delete" else HALF_COPY
    except DamagedData:
        run_id, status = told, "damaged"
    objects = [item for item in backend.walk("") if parse_key(item.name) or item.name == UNFINISHED]
    # A deletion that was interrupted as it began has not made the run young: it must go on.
    aside = ("checks/", UNFINISHED) if (note or {}).get("doing") == "delete" else ("checks/",)
    changed = max((item.modified for item in objects if not item.name.startswith(aside)), default=0.0)
    if status == "damaged" and time.time() - changed <= LOST_SECONDS:
        status = RUNNING  # it cannot be told; whoever writes has put something in the last minute
    return Found(backend.url, run_id, status, changed, len(objects), sum(item.size for item in objects))


def delete_run(backend: Backend, found: Found) -> None:
    """Delete a run, or what is left of one. Raises StoreError; running it again goes on."""
    if found.status == RUNNING:
        raise StoreError(f"{backend.url} is still being written: it is not deleted")
    refuse_links(backend)
    if found.status != LEFT_BEHIND:
        backend.put(UNFINISHED, note_text(found.run_id, "delete"))
    backend.remove([ROOT])
    names = [item.name for item in backend.walk("") if parse_key(item.name) or is_partial(item.name)]
    # Workers' metadata first: should somebody put a root there again, they are not found.
    backend.remove(sorted(names, key=lambda name: (not name.endswith("/zarr.json"), name)))
    backend.remove([UNFINISHED])
    if isinstance(backend, LocalBackend):
        with suppress(OSError):  # somebody keeps something of his own there
            Path(backend.url).expanduser().rmdir()
