"""Verdicts that stay with a run: `<run>/checks/<id>.json`, written once and never changed.

Ids begin with the time, so that the newest is the last by name. What is read back was written by whoever can write to
the run: it is bounded and checked, and one that cannot be read is said to be so.
"""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import smdbg
from smdbg.analysis.report import Report
from smdbg.errors import SmdbgError, StoreError
from smdbg.store.backend import Backend, LocalBackend, Missing, open_backend
from smdbg.store.keys import read_bounded

VERSION = 1
FOLDER = "checks"
LARGEST = 1 << 20  # bytes of one verdict
MOST_FINDINGS = 1000

_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}\Z", re.ASCII)
_WORDS = 500  # characters of a text that is kept of a verdict that was read
_LATEST = 1 << 34  # unix seconds that are still taken for a time


@dataclass(frozen=True)
class LastVerdict:
    """The newest verdict that was left in a run.

    `time`: unix seconds by the clock of who checked. `status`: the exit status, 0, 1 or 2. `unreadable` says why
    nothing but the id is known.
    """

    id: str
    time: float = 0.0
    status: int = 2
    errors: int = 0
    warnings: int = 0
    infos: int = 0
    reason: str = ""
    unreadable: str = ""


def save_verdict(
    url: str,
    report: Report,
    *,
    status: int,
    reason: str = "",
    asked: Mapping[str, Any] | None = None,
    known: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
) -> str:
    """Leave a verdict in a run and return its key. Raises StoreError, AccessRefused.

    `status` is the exit status of the check, `reason` why there is no verdict; `asked` is what the check was asked for
    (pack, rules, options); `known` are the fingerprints of findings that a baseline knows.
    """
    now = time.time()
    key = f"{FOLDER}/{datetime.fromtimestamp(now, UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}.json"
    document = {
        "version": VERSION,
        "id": key.partition("/")[2].removesuffix(".json"),
        "time": now,
        "smdbg": smdbg.__version__,
        "asked": dict(asked or {}),
        "status": status,
        "reason": reason,
        "severities": _severities(report, known),
        "summary": _without_place(report.summary.record()),
        "rules": [result.record() for result in report.rules],
        "known": list(known),
    }
    backend = open_backend(url, storage_options)
    _refuse_link(backend)
    if not backend.create(key, _encoded(document, [_without_place(one.record()) for one in report.findings])):
        raise StoreError(f"{url}/{key}: there is an object of that name already; check once more")
    return key


def last_verdict(url: str, storage_options: Mapping[str, Any] | None = None) -> LastVerdict | None:
    """Return the newest verdict of a run, None where there is none: one listing, and one read where it holds any."""
    backend = open_backend(url, storage_options)
    try:
        names = [item.name.removesuffix(".json") for item in backend.list(FOLDER) if item.name.endswith(".json")]
        newest = max((name for name in names if _ID.match(name)), default=None)
        if newest is None:
            return None
        try:
            return _decoded(newest, read_bounded(backend, f"{FOLDER}/{newest}.json", LARGEST))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, Missing):
            return LastVerdict(newest, unreadable="it was not written by smdbg, or is damaged")
    except SmdbgError as error:
        return LastVerdict("", unreadable=str(error))


def _without_place(record: dict[str, Any]) -> dict[str, Any]:
    """Leave out where the run was when it was checked; it may be moved, and the verdict goes with it."""
    return {key: value for key, value in record.items() if key != "run"}


def _severities(report: Report, known: Sequence[str]) -> dict[str, int]:
    """Count the findings that are not known."""
    found = [finding.severity.value for finding in report.findings if finding.fingerprint not in known]
    return {severity: found.count(severity) for severity in ("error", "warning", "info")}


def _encoded(document: Mapping[str, Any], findings: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a document as JSON, with as many findings as have room, the first by cause."""
    kept = list(findings[:MOST_FINDINGS])
    while True:
        full = {**document, "findings_found": len(findings), "findings": kept}
        data = json.dumps(_plain(full), allow_nan=False).encode()
        if len(data) <= LARGEST or not kept:
            return data
        kept = kept[: len(kept) // 2]


def _plain(value: Any) -> Any:
    """Return data as JSON can hold it: NaN and infinities as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def _decoded(name: str, data: bytes) -> LastVerdict:
    """Return what of a verdict is shown in lists. Raises ValueError and the like for what is none."""
    found = json.loads(data)
    if found["version"] != VERSION:
        return LastVerdict(name, unreadable="a newer smdbg wrote it")
    at, status, counts = found["time"], found["status"], found["severities"]
    errors, warnings, infos = (counts[severity] for severity in ("error", "warning", "info"))
    whole = all(type(number) is int and 0 <= number < 1 << 53 for number in (errors, warnings, infos))
    if not whole or type(status) is not int or status not in (0, 1, 2) or isinstance(at, bool) or not 0 <= at < _LATEST:
        raise ValueError("a field has a value that no writer gives it")
    return LastVerdict(name, float(at), status, errors, warnings, infos, str(found["reason"])[:_WORDS])


def _refuse_link(backend: Backend) -> None:
    if isinstance(backend, LocalBackend) and (Path(backend.url).expanduser() / FOLDER).is_symlink():
        raise StoreError(f"{backend.url}/{FOLDER} is a link to another folder: nothing is put there")
