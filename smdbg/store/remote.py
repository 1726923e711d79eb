"""Bytes in and out of any URL that fsspec knows, and what its errors mean in words."""

from __future__ import annotations

import asyncio
import email.utils
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from smdbg.errors import AccessRefused, StoreError
from smdbg.store.backend import Data, Fetched, Fill, Listed, Missing, Range
from smdbg.store.remote_errors import EXPIRED, chain, code_of, store_error

S = TypeVar("S")
T = TypeVar("T")

log = logging.getLogger("smdbg")

POOL = 10  # connections that the S3 client keeps unless told otherwise
AT_ONCE = 1 << 20  # bytes; more than there ever are, so that what has arrived is taken as it is
PUT_SECONDS = 20.0  # how long a put may take at most, and beside it
SLOWEST = 50_000  # bytes a second of it; what takes longer is broken off and tried again
RENEW_SECONDS = 5.0  # between two looks for new credentials
CREATE_TRIES = 4
CREATE_SECONDS = 30.0  # no further try after that
CREATE_PAUSE = 0.2  # tripled after each failure


class FsspecBackend:
    """Any fsspec URL; S3 through s3fs, which takes credentials, region and endpoint from the standard AWS places."""

    copies = 1

    def __init__(self, url: str, storage_options: Mapping[str, Any], concurrency: int = 8) -> None:
        """Open the file system named by the URL's scheme. No request is made yet."""
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        self._s3 = url.startswith(("s3://", "s3a://"))
        options, once = dict(storage_options), dict(storage_options)
        if self._s3:
            # One GET an object instead of HEAD and GET; nothing remembered of listings, since others write.
            options.setdefault("max_concurrency", 1)
            options.setdefault("use_listings_cache", False)
            retries = {"max_attempts": 2, "mode": "standard"}
            config: dict[str, Any] = {"connect_timeout": 5, "read_timeout": 20, "retries": retries}
            if concurrency > POOL:
                config["max_pool_connections"] = concurrency
            options["config_kwargs"] = {**config, **storage_options.get("config_kwargs", {})}
            # Puts have a client that tries once: whoever puts has patience, and is to learn soon what is wrong.
            config.update(read_timeout=60, retries={"total_max_attempts": 1})
            once = {**options, "config_kwargs": {**config, **storage_options.get("config_kwargs", {})}}
        self._fs, self._root = self._call(lambda: url_to_fs(self.url, **options), "")
        self._puts = self._fs
        if self._s3:
            self._puts = self._call(lambda: url_to_fs(self.url, **once), "")[0]
            self._puts.retries = 1
        self._renewed = -RENEW_SECONDS
        self._renewing = threading.Lock()
        self._concurrency = concurrency
        self._free: asyncio.Semaphore | None = None  # requests that may still be sent, over all threads
        self._conditional = True

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else str(self._root)

    def _call(self, action: Callable[[], T], key: str) -> T:
        try:
            return action()
        except Exception as error:
            raise store_error(error, self.url, key) from error

    def put(self, key: str, data: Data) -> None:
        """One PUT (a multipart upload beyond 100 MB), tried once."""
        try:
            self._send(key, data)
        except Exception as error:
            raise store_error(error, self.url, key) from error

    def _send(self, key: str, data: Data, **more: Any) -> None:
        if self._s3:  # a connection whose other end has gone may stay silent for a quarter of an hour
            more["timeout"] = PUT_SECONDS + len(data) / SLOWEST
        try:
            self._puts.pipe_file(self._path(key), data, **more)
        except Exception as error:
            if self._s3 and code_of(error) in EXPIRED:
                self._renew()
            raise

    def _renew(self) -> None:
        """Look for credentials anew, in the environment and the files of AWS: somebody may have logged in again."""
        with self._renewing:
            if time.monotonic() - self._renewed < RENEW_SECONDS:
                return
            self._renewed = time.monotonic()
            for known in (self._puts, self._fs):
                try:
                    known.connect(refresh=True, timeout=PUT_SECONDS)
                except Exception as error:
                    log.debug("smdbg: no new credentials: %s", error)

    def create(self, key: str, data: Data) -> bool:
        """One PUT with If-None-Match; a plain PUT where the store does not know conditions. Tried a few times.

        A try whose answer got lost may have been executed: then False is returned, and the object is as given.
        """
        start, pause = time.monotonic(), CREATE_PAUSE
        for left in reversed(range(CREATE_TRIES)):
            try:
                return self._create(key, data)
            except AccessRefused:
                raise
            except StoreError:
                if not left or time.monotonic() - start > CREATE_SECONDS:
                    raise
            time.sleep(pause)
            pause *= 3
        raise AssertionError("unreachable")

    def _create(self, key: str, data: Data) -> bool:
        if self._conditional:
            try:
                self._send(key, data, mode="create")
                return True
            except Exception as error:
                code = code_of(error)
                if isinstance(error, FileExistsError) or code in ("PreconditionFailed", "ConditionalRequestConflict"):
                    return False
                if code not in ("NotImplemented", "InvalidArgument", "501") and not isinstance(error, TypeError):
                    raise store_error(error, self.url, key) from error
                self._conditional = False
        self.put(key, data)
        return True

    def get(self, key: str) -> bytes:
        """One GET."""
        return self._call(lambda: bytes(self._fs.cat_file(self._path(key))), key)

    def ranges(self, wanted: Sequence[Range]) -> list[bytes | None]:
        """One GET a range, at most `concurrency` at a time."""
        if not getattr(self._fs, "async_impl", False):
            return self._plain_ranges(wanted)

        async def get(asked: Range) -> bytes:
            start = None if asked.start == 0 and asked.stop is None else asked.start
            return bytes(await self._fs._cat_file(self._path(asked.key), start=start, end=asked.stop))

        return [self._found(item, asked.key) for item, asked in zip(self._each(get, wanted), wanted, strict=True)]

    def _plain_ranges(self, wanted: Sequence[Range]) -> list[bytes | None]:
        paths = [self._path(w.key) for w in wanted]
        starts = [w.start or None if w.stop is None else w.start for w in wanted]
        found = self._call(lambda: self._fs.cat_ranges(paths, starts, [w.stop for w in wanted], on_error="return"), "")
        return [self._found(item, asked.key) for item, asked in zip(found, wanted, strict=True)]

    def _found(self, item: Any, key: str) -> bytes | None:
        """Return what came of a request: bytes, b'' where the object ends before, None where there is none."""
        if not isinstance(item, Exception):
            return bytes(item)
        if code_of(item) == "InvalidRange":
            return b""
        error = store_error(item, self.url, key)
        if not isinstance(error, Missing):
            raise error from item
        return None

    def _each(self, action: Callable[[S], Awaitable[T]], wanted: Sequence[S]) -> list[T | Exception]:
        """Run requests on the file system's own loop, at most `concurrency` at a time; errors are returned."""
        from fsspec.asyn import sync

        async def run(one: S, free: asyncio.Semaphore) -> T | Exception:
            async with free:
                try:
                    return await action(one)
                except Exception as error:
                    return error

        async def run_all() -> list[T | Exception]:
            if self._free is None:
                self._free = asyncio.Semaphore(self._concurrency)
            return list(await asyncio.gather(*(run(one, self._free) for one in wanted)))

        if not wanted:
            return []
        return self._call(lambda: sync(self._fs.loop, run_all), "")

    def fill(self, wanted: Sequence[Fill]) -> list[bool | None]:
        """One GET each. From S3 the bytes go to their place as they arrive."""
        if self._s3:
            found = self._each(self._stream, wanted)
            left = [i for i, item in enumerate(found) if isinstance(item, Exception) and not code_of(item)]
        else:
            found, left = [False] * len(wanted), list(range(len(wanted)))
        # What broke on the way, rather than being refused, is asked for once more by way of fsspec, which tries again.
        again = self.ranges([Range(wanted[i].key, wanted[i].start, wanted[i].start + wanted[i].size) for i in left])
        for i, data in zip(left, again, strict=True):
            found[i] = FileNotFoundError() if data is None else _copy(data, wanted[i])
        out: list[bool | None] = []
        for item, asked in zip(found, wanted, strict=True):
            out.append(item if isinstance(item, bool) else None if self._found(item, asked.key) is None else False)
        return out

    async def _stream(self, wanted: Fill) -> bool:
        bucket, path, _ = self._fs.split_path(self._path(wanted.key))
        span = f"bytes={wanted.start}-{wanted.start + wanted.size - 1}"
        answer = await self._fs._call_s3("get_object", Bucket=bucket, Key=path, Range=span)
        body = answer["Body"]
        try:
            if answer["ContentLength"] != wanted.size:
                return False
            left, pieces = wanted.size, iter(wanted.into())
            piece = memoryview(b"")
            while left:
                data = memoryview(await body.read(AT_ONCE))
                if not data:
                    raise OSError("the connection ended early")
                left -= len(data)
                while data:
                    piece = piece or next(pieces)
                    size = min(len(piece), len(data))
                    piece[:size] = data[:size]
                    piece, data = piece[size:], data[size:]
            await body.read()  # nothing; the connection can then be used again
            return True
        finally:
            body.close()

    def newer(self, wanted: Sequence[tuple[str, str]]) -> list[Fetched | None]:
        """One conditional GET each from S3; elsewhere the object's facts are asked for first."""
        if self._s3:
            found = self._each(lambda known: self._newer_s3(*known), wanted)
        else:
            found = [self._newer_plain(*known) for known in wanted]
        out: list[Fetched | None] = []
        for item, (key, _) in zip(found, wanted, strict=True):
            out.append(item if isinstance(item, Fetched) else None)
            if isinstance(item, Exception):
                self._found(item, key)  # raises unless it is missing
        return out

    async def _newer_s3(self, key: str, tag: str) -> Fetched:
        bucket, path, _ = self._fs.split_path(self._path(key))
        try:
            answer = await self._fs._call_s3(
                "get_object", Bucket=bucket, Key=path, **({"IfNoneMatch": tag} if tag else {})
            )
        except Exception as error:
            if tag and code_of(error) in ("304", "NotModified"):
                return Fetched(b"", tag, _told_time(error), same=True)
            raise
        try:
            data, now = await answer["Body"].read(), str(answer.get("ETag", ""))
        except Exception:  # broke on the way; fsspec tries again, and may then get a later version: told as unknown
            data, now = await self._fs._cat_file(self._path(key)), ""
        return Fetched(bytes(data), now, _modified(answer))

    def _newer_plain(self, key: str, tag: str) -> Fetched | Exception:
        try:
            facts = self._fs.info(self._path(key))
            times = [facts[name] for name in (*_TIMES, "ETag", "etag") if facts.get(name) is not None]
            now = repr((times, facts.get("size"))) if times else ""
            same = bool(tag) and now == tag
            return Fetched(b"" if same else bytes(self._fs.cat_file(self._path(key))), now, _modified(facts), same)
        except Exception as error:
            return error

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

    def walk(self, prefix: str) -> Iterator[Listed]:
        """One LIST a thousand names from S3; elsewhere one a folder."""
        below = prefix.rstrip("/")
        if not self._s3:
            for item in self.list(below):
                name = f"{below}/{item.name}" if below else item.name
                if item.folder:
                    yield from self.walk(name)
                else:
                    yield Listed(name, False, item.size, item.modified)
            return
        bucket, root, _ = self._fs.split_path(self._path(""))
        above = f"{root}/" if root else ""
        more: dict[str, str] = {}
        while True:
            wanted = {"Bucket": bucket, "Prefix": above + (f"{below}/" if below else ""), **more}
            page = self._s3_call("list_objects_v2", below, **wanted)
            for item in page.get("Contents", ()):
                name = str(item["Key"]).removeprefix(above)
                if name and not name.endswith("/"):  # a folder's marker
                    yield Listed(name, False, int(item["Size"]), _modified(item), str(item.get("ETag", "")).strip('"'))
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def remove(self, keys: Sequence[str]) -> None:
        """One request a thousand keys to S3; elsewhere one a key."""
        if not self._s3:
            for key in keys:
                try:
                    self._call(lambda key=key: self._fs.rm_file(self._path(key)), key)  # type: ignore[misc]
                except Missing:
                    pass
            return
        for start in range(0, len(keys), 1000):
            found = [self._fs.split_path(self._path(key)) for key in keys[start : start + 1000]]
            objects = {"Objects": [{"Key": path} for _, path, _ in found], "Quiet": True}
            answer = self._s3_call("delete_objects", keys[start], Bucket=found[0][0], Delete=objects)
            for error in answer.get("Errors", ()):
                if error.get("Code") != "NoSuchKey":
                    self._refuse_delete(error)

    def _refuse_delete(self, error: Mapping[str, Any]) -> None:
        said = f"{self.url}: the store did not delete {error.get('Key')} ({error.get('Code')}: {error.get('Message')})"
        raise (AccessRefused if error.get("Code") == "AccessDenied" else StoreError)(said)

    def _s3_call(self, method: str, key: str, **wanted: Any) -> Any:
        from fsspec.asyn import sync

        return self._call(lambda: sync(self._fs.loop, self._fs._call_s3, method, **wanted), key)


def _copy(data: bytes, wanted: Fill) -> bool:
    """Put bytes that were read to their places; False if there are too few."""
    if len(data) != wanted.size:
        return False
    at, view = 0, memoryview(data)
    for piece in wanted.into():
        piece[:] = view[at : at + len(piece)]
        at += len(piece)
    return True


def _told_time(error: BaseException) -> float:
    """Return the Last-Modified of an answer that was an error (304), 0 where the store leaves it out."""
    for link in chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, Mapping):
            told = response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("last-modified")
            try:
                return email.utils.parsedate_to_datetime(told).timestamp() if told else 0.0
            except ValueError:
                return 0.0
    return 0.0


_TIMES = ("LastModified", "mtime", "created", "last_modified", "updated")


def _modified(item: Mapping[str, Any]) -> float:
    for name in _TIMES:
        value = item.get(name)
        if value is not None:
            return float(value) if isinstance(value, int | float) else float(value.timestamp())
    return time.time()
