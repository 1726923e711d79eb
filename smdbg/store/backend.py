"""Bytes in and out: a local folder, or any URL that fsspec knows.

Six operations are all the store needs. Keys are relative to the run, with `/` between parts. An object that is not
there is `Missing`; everything else that goes wrong is a StoreError, with the sentence a user will read.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from smdbg.errors import AccessRefused, SmdbgError, StoreError

Data = bytes | bytearray
T = TypeVar("T")


class Missing(KeyError):
    """There is no object of that key."""


@dataclass(frozen=True)
class Range:
    """Bytes [start, stop) of an object; stop None means to its end."""

    key: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Listed:
    """One name directly below a prefix. `modified` is the store's own clock, unix seconds; folders have no size."""

    name: str
    folder: bool
    size: int = 0
    modified: float = 0.0


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

    def list(self, prefix: str) -> list[Listed]:
        """Return what lies directly below a prefix, by name; empty when there is nothing."""


def open_backend(
    url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None, concurrency: int = 8
) -> Backend:
    """Return the backend for a URL. Local paths and file:// never import fsspec."""
    text = os.fspath(url)
    if not text:
        raise StoreError("the URL of the run is empty: give a folder or a URL such as s3://bucket/runs/1")
    if "://" not in text or text.startswith("file://"):
        return LocalBackend(text.removeprefix("file://"), concurrency)
    return FsspecBackend(text, storage_options or {}, concurrency)


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
                    if wanted.start:
                        file.seek(wanted.start)
                    return file.read(-1 if wanted.stop is None else wanted.stop - wanted.start)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None

    def ranges(self, wanted: Sequence[Range]) -> list[bytes | None]:
        """Read parts of files; many large ones in parallel, since a cold disk and a page cache both gain by it."""
        if len(wanted) < 2 or self._concurrency < 2:
            return [self._read(w) for w in wanted]
        with ThreadPoolExecutor(min(self._concurrency, len(wanted), 4)) as pool:
            return list(pool.map(self._read, wanted))

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


class FsspecBackend:
    """Any fsspec URL; S3 through s3fs, which takes credentials, region and endpoint from the standard AWS places."""

    copies = 1

    def __init__(self, url: str, storage_options: Mapping[str, Any], concurrency: int = 8) -> None:
        """Open the file system named by the URL's scheme. No request is made yet."""
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        self._s3 = url.startswith(("s3://", "s3a://"))
        options = dict(storage_options)
        if self._s3:
            # One GET an object instead of HEAD and GET; nothing remembered of listings, since others write.
            options.setdefault("max_concurrency", 1)
            options.setdefault("use_listings_cache", False)
            config = {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 2, "mode": "standard"}}
            options["config_kwargs"] = {**config, **options.get("config_kwargs", {})}
        self._fs, self._root = self._call(lambda: url_to_fs(self.url, **options), "")
        self._concurrency = concurrency
        self._conditional = True

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else str(self._root)

    def _call(self, action: Callable[[], T], key: str) -> T:
        try:
            return action()
        except Exception as error:
            raise _store_error(error, self.url, key) from error

    def put(self, key: str, data: Data) -> None:
        """One PUT (a multipart upload beyond 100 MB)."""
        self._call(lambda: self._fs.pipe_file(self._path(key), data), key)

    def create(self, key: str, data: Data) -> bool:
        """One PUT with If-None-Match; a plain PUT where the store does not know conditions."""
        if self._conditional:
            try:
                self._fs.pipe_file(self._path(key), data, mode="create")
                return True
            except Exception as error:
                code = _code(error)
                if isinstance(error, FileExistsError) or code in ("PreconditionFailed", "ConditionalRequestConflict"):
                    return False
                if code not in ("NotImplemented", "InvalidArgument", "501") and not isinstance(error, TypeError):
                    raise _store_error(error, self.url, key) from error
                self._conditional = False
        self.put(key, data)
        return True

    def get(self, key: str) -> bytes:
        """One GET."""
        return self._call(lambda: bytes(self._fs.cat_file(self._path(key))), key)

    def ranges(self, wanted: Sequence[Range]) -> list[bytes | None]:
        """One GET a range, at most `concurrency` at a time."""
        if not wanted:
            return []
        paths = [self._path(w.key) for w in wanted]
        starts = [w.start or None if w.stop is None else w.start for w in wanted]
        ends = [w.stop for w in wanted]
        found = self._call(
            lambda: self._fs.cat_ranges(paths, starts, ends, on_error="return", batch_size=self._concurrency), ""
        )
        out: list[bytes | None] = []
        for item, asked in zip(found, wanted, strict=True):
            if isinstance(item, Exception):
                error = _store_error(item, self.url, asked.key)
                if not isinstance(error, Missing):
                    raise error from item
                out.append(None)
            else:
                out.append(bytes(item))
        return out

    def list(self, prefix: str) -> list[Listed]:
        """One LIST a thousand names."""
        path = self._path(prefix.rstrip("/"))
        try:
            found = self._call(lambda: self._fs.ls(path, detail=True, refresh=True), prefix)
        except Missing:
            return []
        out = []
        for item in found:
            name = str(item["name"]).rstrip("/").rsplit("/", 1)[-1]
            if str(item["name"]).rstrip("/") == path:  # a file of that very name, or the folder's own marker
                continue
            if item["type"] == "directory":
                out.append(Listed(name, True))
            else:
                out.append(Listed(name, False, int(item.get("size") or 0), _modified(item)))
        return sorted(out, key=lambda listed: listed.name)


def _modified(item: Mapping[str, Any]) -> float:
    for name in ("LastModified", "mtime", "created", "last_modified", "updated"):
        value = item.get(name)
        if value is not None:
            return float(value) if isinstance(value, int | float) else float(value.timestamp())
    return time.time()


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    seen = 0
    while error is not None and seen < 10:
        yield error
        error, seen = error.__cause__ or error.__context__, seen + 1


def _code(error: BaseException) -> str:
    """Return the S3 error code of an exception or of what caused it, '' without one."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, Mapping):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


_REFUSED = frozenset(
    (
        "AccessDenied 403 Forbidden InvalidAccessKeyId SignatureDoesNotMatch ExpiredToken InvalidToken "
        "AllAccessDisabled AccountProblem RequestTimeTooSkewed TokenRefreshRequired"
    ).split()
)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError")
_UNREACHABLE = (
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ConnectionClosedError",
    "ClientConnectorError",
    "HTTPClientError",
    "ProxyConnectionError",
)


def _store_error(error: Exception, url: str, key: str) -> Exception:
    """Return the error to raise in place of one from fsspec, s3fs or botocore."""
    if isinstance(error, SmdbgError | Missing):
        return error
    code, kinds = _code(error), {type(link).__name__ for link in _chain(error)}
    said = str(error).strip() or type(error).__name__
    bucket = url.split("://", 1)[-1].split("/", 1)[0]
    if code == "NoSuchBucket":
        return StoreError(f"{url}: there is no bucket {bucket!r}: make it, or check the name and the region")
    if kinds.intersection(_NO_CREDENTIALS):
        return AccessRefused(
            f"{url}: no AWS credentials were found: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if code in _REFUSED or isinstance(error, PermissionError):
        return AccessRefused(
            f"{url}: the store refused access to {key or 'it'} ({code or said}): check credentials, their expiry, and "
            "that the role may do this"
        )
    if kinds.intersection(_UNREACHABLE) or isinstance(error, ConnectionError | TimeoutError):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        where = f" at {endpoint}" if endpoint else ""
        return StoreError(f"{url}: the store{where} does not answer: check the endpoint and the network ({said})")
    if isinstance(error, FileNotFoundError):
        return Missing(key)
    if isinstance(error, ImportError):
        return StoreError(f"{url}: this kind of URL needs a package that is not installed ({said})")
    if isinstance(error, ValueError) and "Protocol not known" in said:
        return StoreError(f"{url}: unknown kind of URL: give a folder, or a URL such as s3://bucket/runs/1")
    return StoreError(f"{url}: the store failed on {key or 'a request'} ({type(error).__name__}: {said})")
