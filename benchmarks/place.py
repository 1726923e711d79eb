"""Where steps and raw bytes go: an S3 bucket or a folder, written and read as plainly as it can be done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from smdbg import Hook

CONCURRENCY = 8  # ranged GETs at a time: as many as a run opens with
Part = tuple[str, int, int]  # object, and the bytes [start, stop) of it


class Place(Protocol):
    """`verb` and `read_verb`: what writing and reading raw are called.

    Goals of a saved step, as ratios to raw writing: `alone`, and back to back to that of one and of two threads.
    """

    verb: str
    read_verb: str
    alone: float | None
    one_thread: float | None
    two_threads: float | None
    url: str

    def write(self, name: str, data: bytes) -> None:
        """Write an object, once."""

    def read(self, parts: Sequence[Part]) -> list[bytes]:
        """Read parts of objects."""

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the objects below a prefix and their sizes."""

    def clear(self) -> None:
        """Take away what was written, where that gives memory back for the next round."""


class Bucket:
    """An S3 bucket; raw requests go through the very client that hooks use."""

    verb: str = "PUT"
    read_verb: str = "ranged GET"
    alone: float | None = 1.5
    one_thread: float | None = None
    two_threads: float | None = 1.15

    def __init__(self, url: str) -> None:
        """Take the client that a hook has made."""
        import s3fs

        self.url = url
        with Hook(f"{url}/first"):
            self.client = s3fs.S3FileSystem.current()

    def write(self, name: str, data: bytes) -> None:
        """One PUT."""
        self.client.pipe_file(f"{self.url}/{name}", data)

    def read(self, parts: Sequence[Part]) -> list[bytes]:
        """One GET a part, some at a time."""
        paths = [f"{self.url}/{name}" for name, _, _ in parts]
        starts, stops = [part[1] for part in parts], [part[2] for part in parts]
        found: list[bytes] = self.client.cat_ranges(paths, starts, stops, on_error="raise", batch_size=CONCURRENCY)
        return found

    def sizes(self, prefix: str) -> dict[str, int]:
        """List them."""
        start = len(self.url.removeprefix("s3://")) + 1
        found: Mapping[str, dict[str, int]] = self.client.find(f"{self.url}/{prefix}", detail=True)
        return {name[start:]: item["size"] for name, item in found.items()}

    def clear(self) -> None:
        """Nothing: the server frees no space, and needs none back."""


class Folder:
    """A folder; a raw write is written beside its place and renamed, so that readers see it whole."""

    verb: str = "write"
    read_verb: str = "read"
    alone: float | None = None
    one_thread: float | None = 1.5
    two_threads: float | None = None

    def __init__(self, root: Path) -> None:
        """Take an empty folder."""
        self.url = str(root)
        self._root = root

    def write(self, name: str, data: bytes) -> None:
        """One write and one rename."""
        path = self._root / name
        part = path.with_name(path.name + ".part")
        with open(part, "wb") as file:
            file.write(data)
        os.replace(part, path)

    def read(self, parts: Sequence[Part]) -> list[bytes]:
        """One read a part, one after another."""
        out = []
        for name, start, stop in parts:
            with open(self._root / name, "rb") as file:
                file.seek(start)
                out.append(file.read(stop - start))
        return out

    def sizes(self, prefix: str) -> dict[str, int]:
        """Look through the folder."""
        found = [path for path in (self._root / prefix).rglob("*") if path.is_file()]
        return {path.relative_to(self._root).as_posix(): path.stat().st_size for path in found}

    def clear(self) -> None:
        """Remove everything. Memory that was never used before costs far more than memory that comes back."""
        for found in self._root.iterdir():
            shutil.rmtree(found) if found.is_dir() else found.unlink()
