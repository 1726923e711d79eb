"""What went wrong with a remote store, in words that a user can act on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from smdbg.errors import AccessRefused, CredentialsExpired, SmdbgError, StoreError
from smdbg.store.backend import Missing


class Unanswered(StoreError):
    """A request was sent and nothing came back in time: the store may still execute it, at any later moment."""


def chain(error: BaseException | None) -> Iterable[BaseException]:
    """Yield an exception and what caused it, the outermost first."""
    seen = 0
    while error is not None and seen < 10:
        yield error
        error, seen = error.__cause__ or error.__context__, seen + 1


def code_of(error: BaseException) -> str:
    """Return the S3 error code of an exception or of what caused it, '' without one."""
    for link in chain(error):
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
EXPIRED = frozenset("ExpiredToken ExpiredTokenException InvalidToken TokenRefreshRequired InvalidAccessKeyId".split())
_BUSY = frozenset("SlowDown ServiceUnavailable TooManyRequests RequestLimitExceeded Throttling 503 429".split())
_FULL = frozenset("QuotaExceeded XMinioStorageFull InsufficientStorage EntityTooLarge 507".split())
_BROKEN = frozenset("InternalError 500 BadGateway 502 GatewayTimeout 504".split())
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError")
_UNANSWERED = ("ReadTimeoutError", "FSTimeoutError", "SocketTimeoutError", "ServerTimeoutError")
_UNREACHABLE = (
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ConnectionClosedError",
    "ClientConnectorError",
    "HTTPClientError",
    "ProxyConnectionError",
)


def store_error(error: Exception, url: str, key: str) -> Exception:
    """Return the error to raise in place of one from fsspec, s3fs or botocore."""
    if isinstance(error, SmdbgError | Missing):
        return error
    code, kinds = code_of(error), {type(link).__name__ for link in chain(error)}
    said = str(error).strip() or type(error).__name__
    bucket = url.split("://", 1)[-1].split("/", 1)[0]
    if code == "NoSuchBucket":
        return StoreError(f"{url}: there is no bucket {bucket!r}: make it, or check the name and the region")
    if kinds.intersection(_NO_CREDENTIALS):
        return AccessRefused(
            f"{url}: no AWS credentials were found: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if code in EXPIRED:
        return CredentialsExpired(
            f"{url}: the credentials have expired or are no longer known ({code}): log in again; new ones in the "
            "environment or the files of AWS are picked up"
        )
    if code in _FULL:
        return StoreError(f"{url}: the store has no room for {key} ({code}): make room, or have its quota raised")
    if code in _BUSY:
        return StoreError(f"{url}: the store is overloaded and asks for a slower pace ({code})")
    if code in _BROKEN:
        return StoreError(f"{url}: the store has an error of its own ({code}), on {key or 'a request'}")
    if code in _REFUSED or isinstance(error, PermissionError):
        return AccessRefused(
            f"{url}: the store refused access to {key or 'it'} ({code or said}): check credentials, their expiry, and "
            "that the role may do this"
        )
    if kinds.intersection(_UNREACHABLE) or isinstance(error, ConnectionError | TimeoutError):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        where = f" at {endpoint}" if endpoint else ""
        kind = Unanswered if kinds.intersection(_UNANSWERED) else StoreError
        return kind(f"{url}: the store{where} does not answer: check the endpoint and the network ({said})")
    if isinstance(error, FileNotFoundError):
        return Missing(key)
    if isinstance(error, ImportError):
        return StoreError(f"{url}: this kind of URL needs a package that is not installed ({said})")
    if isinstance(error, ValueError) and "Protocol not known" in said:
        return StoreError(f"{url}: unknown kind of URL: give a folder, or a URL such as s3://bucket/runs/1")
    return StoreError(f"{url}: the store failed on {key or 'a request'} ({type(error).__name__}: {said})")
