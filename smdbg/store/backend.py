"""Bytes in and out: a local folder, or any URL that fsspec knows.

A few operations are all the store needs. Keys are relative to the run, with `/` between parts. An object that is not
there is `Missing`; everything else that goes wrong is a StoreError, with the sentence a user will read.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from smdbg.errors import AccessRefused, SmdbgError, StoreError

Data = bytes | bytearray
S = TypeVar("S")
T = TypeVar("T")

SMALL = 16 << 20  # bytes that one thread reads as soon as several would
THREADS = 4  # that read files; more do not make a disk faster
AT_ONCE = 512  # pieces of memory that one read of the system fills; it may refuse more than 1,024


class Missing(KeyError):
    """There is no object of that key."""


@dataclass(frozen=True)
class Range:
    """Bytes [start, stop) of an object; stop None means to its end, and then a negative start counts from there."""

    key: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Listed:
    """One name directly below a prefix, or of `walk` a whole key. Folders have no size.

    `modified` is the store's own clock, unix seconds; `etag` what S3 tells versions apart by, '' elsewhere.
    """

    name: str
    folder: bool
    size: int = 0
    modified: float = 0.0
    etag: str = ""


@dataclass(frozen=True)
class Fill:
    """Bytes of an object from `start` on, wanted in memory that follows each other in the object.

    `into` is called once, when the store has shown that there are so many bytes: sizes that come from metadata take no
    memory before.
    """

    key: str
    start: int
    size: int
    into: Callable[[], Sequence[memoryview]]


@dataclass(frozen=True)
class Fetched:
    """An object, or that it is the `same` as known. `tag` tells versions apart; `modified`: unix seconds, 0 untold."""

    data: bytes
    tag: str
    modified: float
    same: bool = False


class Backend(Protocol):
    """What the store asks of a place that keeps bytes. All methods may be called from several threads."""

    url: str
    copies: int  # how many copies of an object the client holds while it sends it

    def put(self, key: str, data: Data) -> None:
        """Store an object whole, replacing one of the same key: readers see the old or the new, never a mixture."""

    def create(self, key: str, data: Data) -> bool:
        """Store an object only if there is none of that key; False when there is one."""

    def get(self, key: str) -> bytes:
        """Return an object. Raises Missing."""

    def ranges(self, wanted: Sequence[Range]) -> list[bytes | None]:
        """Return parts of objects, read in parallel; None where the object is missing. A part may come back short."""

    def fill(self, wanted: Sequence[Fill]) -> list[bool | None]:
        """Read parts of objects, in parallel, straight to their place: True, False if too short, None if missing."""

    def newer(self, wanted: Sequence[tuple[str, str]]) -> list[Fetched | None]:
        """Return objects, read in parallel, unless they are as known: (key, tag) each, '' for none; None if missing."""

    def list(self, prefix: str) -> list[Listed]:
        """Return what lies directly below a prefix, by name; empty when there is nothing."""

    def walk(self, prefix: str) -> Iterator[Listed]:
        """Yield every object below a prefix, however deep, in bounded memory; names are whole keys, in no order."""

    def remove(self, keys: Sequence[str]) -> None:
        """Delete objects, in this order where the store does; those that are missing are no error."""


def open_backend(
    url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None, concurrency: int = 8
) -> Backend:
    """Return the backend for a URL. Local paths and file:// never import fsspec."""
    text = os.fspath(url)
    if not text:
        raise StoreError("the URL of the run is empty: give a folder or a URL such as s3://bucket/runs/1")
    if "://" not in text or text.startswith("file://"):
        return LocalBackend(text.removeprefix("file://"), concurrency)
    options = dict(storage_options or {})
    client = str(options.pop("client", None) or os.environ.get("SMDBG_S3_CLIENT") or "s3fs")
    if client == "obstore" and text.startswith(("s3://", "s3a://")):
        from smdbg.store.object_store import ObjectStoreBackend

        return ObjectStoreBackend(text, options, concurrency)
    if client not in ("s3fs", "obstore"):
        raise StoreError(f"{text}: there is no S3 client {client!r}: s3fs and obstore are")
    from smdbg.store.remote import FsspecBackend

    return FsspecBackend(text, options, concurrency)


class LocalBackend:
    """A folder. Objects are files, written beside their place and moved there."""

    copies = 0

    def __init__(self, path: str, concurrency: int = 8) -> None:
        """Take the folder's path; it is made at the first put."""
        self.url = path
        self._root = Path(path).expanduser()
        self._concurrency = concurrency

    def put(self, key: str, data: Data) -> None:
        """Write beside the target, then move into place."""
        with _local_errors(self.url):
            part = self._write_part(key, data)
            try:
                os.replace(part, self._root / key)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def create(self, key: str, data: Data) -> bool:
        """Write beside the target, then link it there, which fails if the name is taken."""
        with _local_errors(self.url):
            if (self._root / key).exists():
                return False
            part = self._write_part(key, data)
            try:
                os.link(part, self._root / key)
            except FileExistsError:
                return False
            except OSError:  # a file system without links: the name itself is the lock
                return self._create_exclusive(key, data)
            finally:
                part.unlink(missing_ok=True)
        return True

    def _create_exclusive(self, key: str, data: Data) -> bool:
        try:
            with open(self._root / key, "xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        return True

    def _write_part(self, key: str, data: Data) -> Path:
        target = self._root / key
        part = target.parent / f".{target.name}.{uuid.uuid4().hex}.partial"
        try:
            file = open(part, "wb")
        except FileNotFoundError:
            target.parent.mkdir(parents=True, exist_ok=True)
            file = open(part, "wb")
        try:
            with file:
                file.write(data)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return part

    def get(self, key: str) -> bytes:
        """Read a file whole."""
        found = self._read(Range(key))
        if found is None:
            raise Missing(key)
        return found

    def _read(self, wanted: Range) -> bytes | None:
        with _local_errors(self.url):
            try:
                with open(self._root / wanted.key, "rb") as file:
                    if wanted.start < 0:
                        file.seek(max(0, os.fstat(file.fileno()).st_size + wanted.start))
                    elif wanted.start:
                        file.seek(wanted.start)
                    return file.read(-1 if wanted.stop is None else wanted.stop - wanted.start)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None

    def ranges(self, wanted: Sequence[Range]) -> list[bytes | None]:
        """Read parts of files; in parallel where it is much, since a cold disk and a page cache both gain by it."""
        return self._each(self._read, wanted, sum(SMALL if w.stop is None else w.stop - w.start for w in wanted))

    def fill(self, wanted: Sequence[Fill]) -> list[bool | None]:
        """Read parts of files without a copy in between."""
        return self._each(self._fill, wanted, sum(w.size for w in wanted))

    def newer(self, wanted: Sequence[tuple[str, str]]) -> list[Fetched | None]:
        """Look at each file's time, size and inode, and read it if they are others than before."""
        return self._each(lambda known: self._newer(*known), wanted, 0)

    def _each(self, action: Callable[[S], T], wanted: Sequence[S], size: int) -> list[T]:
        threads = min(self._concurrency, len(wanted), THREADS)
        if threads < 2 or size < SMALL:
            return [action(w) for w in wanted]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(action, wanted))

    def _fill(self, wanted: Fill) -> bool | None:
        with _local_errors(self.url):
            try:
                file = os.open(os.path.join(self._root, wanted.key), os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if os.fstat(file).st_size < wanted.start + wanted.size:
                        return False
                    return _read_into(file, wanted.start, wanted.into())
                finally:
                    os.close(file)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None

    def _newer(self, key: str, tag: str) -> Fetched | None:
        with _local_errors(self.url):
            try:
                with open(self._root / key, "rb") as file:
                    facts = os.fstat(file.fileno())
                    now = f"{facts.st_mtime_ns}-{facts.st_size}-{facts.st_ino}"
                    same = now == tag
                    return Fetched(b"" if same else file.read(), now, facts.st_mtime, same)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None

    def list(self, prefix: str) -> list[Listed]:
        """List a folder."""
        out = []
        with _local_errors(self.url):
            try:
                for found in os.scandir(self._root / prefix):
                    if found.name.endswith(".partial"):
                        continue
                    if found.is_dir():
                        out.append(Listed(found.name, True))
                    else:
                        facts = found.stat()
                        out.append(Listed(found.name, False, facts.st_size, facts.st_mtime))
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(out, key=lambda item: item.name)

    def walk(self, prefix: str) -> Iterator[Listed]:
        """Walk a folder, unfinished files of writers included; links to folders are not followed."""
        with _local_errors(self.url):
            for folder, _, names in os.walk(self._root / prefix.rstrip("/"), onerror=_raise_unless_gone):
                above = os.path.relpath(folder, self._root).replace(os.sep, "/")
                for name in names:
                    with suppress(FileNotFoundError):
                        facts = os.stat(os.path.join(folder, name), follow_symlinks=False)
                        key = name if above == "." else f"{above}/{name}"
                        yield Listed(key, False, facts.st_size, facts.st_mtime)

    def remove(self, keys: Sequence[str]) -> None:
        """Delete files, and folders that are empty then."""
        with _local_errors(self.url):
            for key in keys:
                (self._root / key).unlink(missing_ok=True)
            folders = {folder for key in keys for folder in (self._root / key).parents if self._root in folder.parents}
            for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
                with suppress(OSError):
                    folder.rmdir()


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _read_into(file: int, at: int, pieces: Sequence[memoryview]) -> bool:
    """Fill pieces of memory one after the other from an open file; False if it ends before."""
    left = [piece for piece in pieces if len(piece)]
    while left:
        got = os.preadv(file, left[:AT_ONCE], at) if hasattr(os, "preadv") else _read_one(file, at, left[0])
        if got == 0:
            return False
        at += got
        done = 0
        while done < len(left) and got >= len(left[done]):
            got -= len(left[done])
            done += 1
        left = left[done:]
        if got:
            left[0] = left[0][got:]
    return True


def _read_one(file: int, at: int, piece: memoryview) -> int:
    """Do what preadv does, for one piece, where the system has none."""
    os.lseek(file, at, os.SEEK_SET)
    data = os.read(file, len(piece))
    piece[: len(data)] = data
    return len(data)


class _local_errors:  # noqa: N801 - reads as a statement
    """Turn a file system's errors into sentences."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, PermissionError):
            raise AccessRefused(
                f"{self._url}: permission denied ({error.filename or error}): check who owns the folder and its mode"
            ) from error
        if isinstance(error, OSError) and not isinstance(error, SmdbgError):
            raise StoreError(f"{self._url}: {error.strerror or error} ({error.filename or 'no file named'})") from error
