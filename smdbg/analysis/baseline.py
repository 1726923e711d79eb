"""Known findings: a file that says which findings of a run are known, and why, so that a check fails on new ones alone.

    version: 1
    findings:
      - fingerprint: "0b1f5a..."
        rule: vanishing_gradient
        tensor: gradient/embed.weight
        mode: train
        reason: "frozen until epoch 3, by design"
        expires: "2027-01-31"

A finding is known by its fingerprint, which is the same in every run, attempt and worker. `expires` names the last day
on which it counts as known; it may be left out.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

import yaml

from smdbg.analysis.findings import Finding, fingerprint
from smdbg.analysis.report import Report
from smdbg.errors import BadConfig, near
from smdbg.yamlfile import KeyPath, Lines, line_of, load

VERSION = 1

_KEYS = ("fingerprint", "rule", "tensor", "mode", "reason", "expires")
_NEEDED = _KEYS[:4]
_TOP = ("version", "findings")
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}\Z", re.ASCII)
_HEAD = """\
# Findings of `smdbg check` that are known: they do not count for its exit status.
# Say why in `reason`. `expires: "YYYY-MM-DD"` is the last day on which an entry holds; it may be left out.
"""


@dataclass(frozen=True, kw_only=True)
class Known:
    """One entry: a finding that is known, why, and until when."""

    fingerprint: str
    rule: str
    tensor: str
    mode: str
    reason: str = ""
    expires: date | None = None

    def holds(self, today: date) -> bool:
        """Tell whether the entry has not expired."""
        return self.expires is None or today <= self.expires

    def record(self) -> dict[str, Any]:
        """Return the fields in their order as JSON-able data."""
        return vars(self) | {"expires": None if self.expires is None else self.expires.isoformat()}


@dataclass(frozen=True)
class Compared:
    """A report held against a baseline.

    `counted` is the report with the findings that are not known, and with those whose entry has expired; `known` and
    `expired` are findings with their entries; `fixed` are entries whose rule judged and no longer finds them.
    """

    counted: Report
    known: tuple[tuple[Finding, Known], ...] = ()
    expired: tuple[tuple[Finding, Known], ...] = ()
    fixed: tuple[Known, ...] = ()


def compare(report: Report, entries: Sequence[Known], today: date, *, whole: bool = True) -> Compared:
    """Take the findings that are known out of a report.

    `whole=False` says that only a part of the run was looked at; then, as in a run that is incomplete or damaged, none
    is said to be fixed.
    """
    by_print = {entry.fingerprint: entry for entry in entries}
    found = [(finding, by_print[finding.fingerprint]) for finding in report.findings if finding.fingerprint in by_print]
    known = tuple(pair for pair in found if pair[1].holds(today))
    expired = tuple(pair for pair in found if not pair[1].holds(today))
    gone = {finding.fingerprint for finding, _ in known}
    counted = replace(report, findings=tuple(one for one in report.findings if one.fingerprint not in gone))
    summary = report.summary
    fixed: tuple[Known, ...] = ()
    if whole and not (summary.incomplete or summary.damaged or summary.dropped_steps or summary.dropped_rows):
        there = {finding.fingerprint for finding in report.findings}
        fixed = tuple(one for one in entries if one.fingerprint not in there and one.rule in report.judged)
    return Compared(counted, known, expired, fixed)


def updated(
    report: Report, entries: Sequence[Known], reason: str, today: date, *, whole: bool = True
) -> list[Known]:
    """Return the entries for all findings of a report.

    What `entries` say of a finding stays, but that an entry which has expired is begun anew; what is fixed goes; what
    could not be judged stays. New ones get the reason.
    """
    compared = compare(report, entries, today, whole=whole)
    kept = {entry.fingerprint: entry for entry in entries if entry not in compared.fixed}
    for finding, entry in compared.expired:
        kept[finding.fingerprint] = replace(entry, expires=None, reason=reason or entry.reason)
    for one in compared.counted.findings:
        if one.fingerprint not in kept:
            kept[one.fingerprint] = Known(
                fingerprint=one.fingerprint, rule=one.rule, tensor=one.tensor, mode=one.mode, reason=reason
            )
    return list(kept.values())


# ---------------------------------------------------------------------------------------------------- the file


def read(path: str | os.PathLike[str]) -> list[Known]:
    """Return the entries of a file. Raises BadConfig with file and line for whatever is wrong in it."""
    data, lines = load(Path(path))
    file = _File(Path(path), lines)
    for key in data:
        if key not in _TOP:
            file.refuse((key,), f"a baseline has no key {key!r}.{near(str(key), _TOP)}")
    if data.get("version", VERSION) != VERSION:
        file.refuse(("version",), f"version must be {VERSION}; a newer smdbg may have written this file")
    found = data.get("findings") or []
    if not isinstance(found, list):
        file.refuse(("findings",), "findings must be a list")
    entries: dict[str, Known] = {}
    for index, entry in enumerate(found):
        known = _entry(file, ("findings", index), entry)
        if known.fingerprint in entries:
            file.refuse(("findings", index), "this finding is in the file twice; remove one")
        entries[known.fingerprint] = known
    return list(entries.values())


def write(path: str | os.PathLike[str], entries: Sequence[Known]) -> None:
    """Write a file of entries, sorted so that its differences are small; one of that name is replaced as a whole."""
    ordered = sorted(entries, key=lambda one: (one.rule, one.tensor, one.mode))
    records = [{key: value for key, value in one.record().items() if value is not None} for one in ordered]
    document = {"version": VERSION, "findings": records}
    text = yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)
    target = Path(path)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        part.write_text(_HEAD + text, encoding="utf-8")
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise BadConfig(f"{path}: the baseline cannot be written: {error.strerror or error}.") from None


class _Dumper(yaml.SafeDumper):
    """Writes every text in quotes: none is then taken for a number by any version of YAML."""


def _keys_plain(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text in (*_KEYS, *_TOP) else '"')


_Dumper.add_representer(str, _keys_plain)


@dataclass(frozen=True)
class _File:
    """A file that can refuse an entry by its place."""

    path: Path
    lines: Lines

    def refuse(self, at: KeyPath, why: str) -> NoReturn:
        """Raise BadConfig that names file and line."""
        raise BadConfig(f"{self.path}:{line_of(self.lines, at)}: {why.rstrip('.')}.")


def _entry(file: _File, at: KeyPath, entry: Any) -> Known:
    """Return one entry of a file."""
    if not isinstance(entry, Mapping):
        file.refuse(at, f"an entry must be a mapping with {', '.join(_NEEDED)}")
    for key, value in entry.items():
        if key not in _KEYS:
            file.refuse((*at, key), f"an entry has no key {key!r}.{near(str(key), _KEYS)}")
        if not isinstance(value, str) and not (key == "expires" and value is None):
            file.refuse((*at, key), f"{key} must be text, and {value!r} is none; put it in quotes")
    missing = [key for key in _NEEDED if key not in entry]
    if missing:
        file.refuse(at, f"the entry lacks {', '.join(missing)}")
    if fingerprint(entry["rule"], entry["tensor"], entry["mode"]) != entry["fingerprint"]:
        why = "the fingerprint is not that of this rule, tensor and mode"
        file.refuse((*at, "fingerprint"), f"{why}; let --write-baseline write entries")
    return Known(**{**entry, "expires": _day(file, (*at, "expires"), entry.get("expires"))})


def _day(file: _File, at: KeyPath, text: str | None) -> date | None:
    """Return a date written as YYYY-MM-DD."""
    if text is None:
        return None
    try:
        if _DAY.match(text):
            return date.fromisoformat(text)
    except ValueError:
        pass
    file.refuse(at, f"expires must be a day such as 2027-01-31, and got {text!r}")
