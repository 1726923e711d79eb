"""S3 through obstore (the extra `smdbg[obstore]`), a client written in Rust, in place of s3fs.

Chosen by the storage option `client: obstore` or the variable SMDBG_S3_CLIENT. It takes the options of s3fs that have a
counterpart and refuses others; credentials and the region come from where botocore, and so s3fs, finds them.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from smdbg.errors import MissingExtra, StoreError
from smdbg.store.backend import Data, Fetched, Fill, Listed, Missing, Range
from smdbg.store.remote_errors import EXPIRED, Unanswered, store_error

S = TypeVar("S")
T = TypeVar("T")

CONNECT_SECONDS = 5
REQUEST_SECONDS = 300  # for a whole request; a shard of 64 MiB needs a wire of 220 kB/s
CREDENTIAL_MINUTES = 15  # after which they are looked up again
RENEW_SECONDS = 5.0  # between two looks for new credentials
RETRIES = 2  # of what is asked; puts are tried once, since whoever puts has patience
_OPTIONS = ("key", "secret", "token", "anon", "profile", "endpoint_url", "client_kwargs", "config_kwargs")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_STATUS = re.compile(r"\b(?:status|HTTP status)[^0-9]{1,40}([45]\d\d)\b")


class _AnswerError(Exception):
    """An error as botocore tells it, so that it becomes the same sentence."""

    def __init__(self, code: str, said: str) -> None:
        super().__init__(said)
        self.response = {"Error": {"Code": code}}


class ObjectStoreBackend:
    """An s3:// URL by way of obstore."""

    copies = 1

    def __init__(self, url: str, storage_options: Mapping[str, Any], concurrency: int = 8) -> None:
        """Make the clients; no request is made yet. Raises MissingExtra, and StoreError for unknown options."""
        try:
            import obstore
        except ImportError as error:
            raise MissingExtra(
                "The S3 client obstore is not installed: install smdbg[obstore], or leave SMDBG_S3_CLIENT and the "
                "storage option `client` out"
            ) from error
        if not url.startswith(("s3://", "s3a://")):
            raise StoreError(f"{url}: the client obstore is for s3:// URLs; leave it out for others")
        self.url = url.rstrip("/")
        bucket, _, self._root = self.url.split("://", 1)[1].partition("/")
        self._obstore = obstore
        self._errors = obstore.exceptions
        self._bucket, self._settings = bucket, _settings(self.url, storage_options)
        self._concurrency = concurrency
        self._connected = 0.0
        self._connect()

    def _connect(self) -> None:
        """Make the clients; they look credentials up at their first request."""
        self._connected = time.monotonic()
        self._reads = self._call(lambda: _store(self._bucket, *self._settings, RETRIES), "")
        self._puts = self._call(lambda: _store(self._bucket, *self._settings, 0), "")

    def _path(self, key: str) -> str:
        return "/".join(filter(None, (self._root, key)))

    def _call(self, action: Callable[[], T], key: str) -> T:
        try:
            return action()
        except Exception as error:
            raise self._told(error, key) from error

    def _told(self, error: Exception, key: str) -> Exception:
        """Return the error to raise in place of one of obstore."""
        if isinstance(error, Missing | StoreError):
            return error
        said = str(error)
        code = _code(said)
        first = said.strip().split("\n", 1)[0][:300]
        if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
            return Missing(key)
        if "NoCredentials" in said:
            return store_error(type("NoCredentialsError", (Exception,), {})(first), self.url, key)
        if code in EXPIRED and time.monotonic() - self._connected > RENEW_SECONDS:
            self._connect()  # somebody may have logged in again
        if code:
            return store_error(_AnswerError(code, first), self.url, key)
        if isinstance(error, self._errors.PermissionDeniedError | self._errors.UnauthenticatedError):
            return store_error(PermissionError(first), self.url, key)
        if "error sending request" in said or "timed out" in said:
            # Whether the request got through is not told, so it may still be executed.
            return Unanswered(f"{self.url}: the store does not answer: check the endpoint and the network ({first})")
        return store_error(error, self.url, key)

    def _each(self, action: Callable[[S], T], wanted: Sequence[S]) -> list[T]:
        if len(wanted) < 2:
            return [action(one) for one in wanted]
        with ThreadPoolExecutor(min(self._concurrency, len(wanted))) as pool:
            return list(pool.map(action, wanted))

    def put(self, key: str, data: Data) -> None:
        """One PUT, tried once."""
        self._call(lambda: self._obstore.put(self._puts, self._path(key), data, use_multipart=False), key)

    def create(self, key: str, data: Data) -> bool:
        """One PUT with If-None-Match."""
        try:
            self._obstore.put(self._reads, self._path(key), data, mode="create", use_multipart=False)
        except self._errors.AlreadyExistsError:
            return False
        except Exception as error:
            raise self._told(error, key) from error
        return True

    def get(self, key: str) -> bytes:
        """One GET."""
        return self._call(lambda: bytes(self._obstore.get(self._reads, self._path(key)).bytes()), key)

    def ranges(self, wanted: Sequence[Range]) -> list[bytes | None]:
        """One GET a range, at most `concurrency` at a time."""
        return self._each(self._range, wanted)

    def _range(self, wanted: Range) -> bytes | None:
        found = self._part(wanted)
        return None if found is None else bytes(found)

    def _part(self, wanted: Range) -> Any:
        path = self._path(wanted.key)
        try:
            if wanted.stop is not None:
                return self._obstore.get_range(self._reads, path, start=wanted.start, end=wanted.stop)
            span = {"suffix": -wanted.start} if wanted.start < 0 else {"offset": wanted.start}
            options: Any = {"range": span} if wanted.start else {}
            return self._obstore.get(self._reads, path, options=options).bytes()
        except Exception as error:
            if _code(str(error)) in ("InvalidRange", "416"):  # a request id may hold any three digits
                return b""
            told = self._told(error, wanted.key)
            if isinstance(told, Missing):
                return None
            raise told from error

    def fill(self, wanted: Sequence[Fill]) -> list[bool | None]:
        """One GET each; the bytes are copied to their place when all are there."""
        return self._each(self._fill, wanted)

    def _fill(self, wanted: Fill) -> bool | None:
        found = self._part(Range(wanted.key, wanted.start, wanted.start + wanted.size))
        if found is None or len(found) != wanted.size:
            return None if found is None else False
        at, view = 0, memoryview(found)
        for piece in wanted.into():
            piece[:] = view[at : at + len(piece)]
            at += len(piece)
        return True

    def newer(self, wanted: Sequence[tuple[str, str]]) -> list[Fetched | None]:
        """One conditional GET each."""
        return self._each(lambda known: self._newer(*known), wanted)

    def _newer(self, key: str, tag: str) -> Fetched | None:
        try:
            found = self._obstore.get(self._reads, self._path(key), options={"if_none_match": tag} if tag else {})
            meta = found.meta
            return Fetched(bytes(found.bytes()), str(meta["e_tag"] or ""), meta["last_modified"].timestamp())
        except self._errors.NotModifiedError:
            return Fetched(b"", tag, 0.0, same=True)
        except Exception as error:
            told = self._told(error, key)
            if isinstance(told, Missing):
                return None
            raise told from error

    def list(self, prefix: str) -> list[Listed]:
        """One LIST a thousand names."""
        path = self._path(prefix.rstrip("/"))
        found = self._call(lambda: self._obstore.list_with_delimiter(self._reads, path or None), prefix)
        out = [Listed(name.rstrip("/").rsplit("/", 1)[-1], True) for name in found["common_prefixes"]]
        return sorted([*out, *(_listed(item, "") for item in found["objects"])], key=lambda listed: listed.name)

    def walk(self, prefix: str) -> Iterator[Listed]:
        """One LIST a thousand names."""
        path, above = self._path(prefix.rstrip("/")), f"{self._root}/" if self._root else ""
        pages = iter(self._call(lambda: self._obstore.list(self._reads, path or None, chunk_size=1000), prefix))
        while (page := self._call(lambda: next(pages, None), prefix)) is not None:
            yield from (_listed(item, above) for item in page)

    def remove(self, keys: Sequence[str]) -> None:
        """One bulk delete a thousand keys."""
        for start in range(0, len(keys), 1000):
            paths = [self._path(key) for key in keys[start : start + 1000]]
            self._call(lambda paths=paths: self._obstore.delete(self._reads, paths), keys[start])  # type: ignore[misc]


def _code(said: str) -> str:
    """Return the code of S3 that an error of obstore tells, else its HTTP status, else ''."""
    return next(iter(_CODE.findall(said) or _STATUS.findall(said)), "")


def _listed(item: Mapping[str, Any], above: str) -> Listed:
    """Return an object; its name is the last part of its path, or what comes after `above`."""
    path = str(item["path"])
    name = path.removeprefix(above) if above else path.rsplit("/", 1)[-1]
    etag = str(item["e_tag"] or "").strip('"')
    return Listed(name, False, int(item["size"]), item["last_modified"].timestamp(), etag)


# --- settings ---


def _store(bucket: str, settings: Mapping[str, Any], client: Mapping[str, Any], retries: int) -> Any:
    from obstore.store import S3Store

    make: Any = S3Store  # its types name every key; these come from a user
    retry = {"max_retries": retries, "retry_timeout": timedelta(seconds=REQUEST_SECONDS)}
    return make(bucket, client_options=client, retry_config=retry, **settings)


def _settings(url: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (settings of the store, settings of its HTTP client) for options as s3fs takes them."""
    more, config = dict(options.get("client_kwargs") or {}), dict(options.get("config_kwargs") or {})
    style = (config.pop("s3", None) or {}).get("addressing_style", "path")
    unknown = [name for name in options if name not in _OPTIONS]
    unknown += [f"client_kwargs.{name}" for name in more if name not in ("endpoint_url", "region_name")]
    unknown += [f"config_kwargs.{name}" for name in config if name not in ("connect_timeout", "read_timeout")]
    if unknown:
        raise StoreError(f"{url}: the client obstore has no option {unknown[0]!r}: leave it out, or use s3fs")
    from botocore.session import Session

    session = Session(profile=options.get("profile"))
    given = options.get("endpoint_url") or more.get("endpoint_url")
    endpoint = given or _told("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    region = more.get("region_name") or _told("AWS_REGION") or session.get_config_variable("region") or "us-east-1"
    settings: dict[str, Any] = {"region": region, "virtual_hosted_style_request": style == "virtual"}
    if endpoint:
        settings["endpoint"] = endpoint
    if options.get("anon"):
        settings["skip_signature"] = True
    elif options.get("key"):
        settings |= {"access_key_id": options["key"], "secret_access_key": options.get("secret") or ""}
        settings |= {"session_token": options["token"]} if options.get("token") else {}
    else:
        settings["credential_provider"] = _Credentials(url, session)
    client = {
        "connect_timeout": timedelta(seconds=config.get("connect_timeout", CONNECT_SECONDS)),
        "timeout": timedelta(seconds=config.get("read_timeout", REQUEST_SECONDS)),
        "allow_http": str(endpoint or "").startswith("http://"),
    }
    return settings, client


def _told(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


class _Credentials:
    """Looks credentials up where botocore does: environment, files and profiles of AWS, single sign-on, the machine."""

    def __init__(self, url: str, session: Any) -> None:
        self._url, self._session = url, session

    def __call__(self) -> dict[str, Any]:
        found = self._session.get_credentials()
        if found is None:
            raise RuntimeError("NoCredentials")
        keys = found.get_frozen_credentials()
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "token": keys.token,
            "expires_at": datetime.now(UTC) + timedelta(minutes=CREDENTIAL_MINUTES),
        }
