"""What a report means for whoever waits for it: clean, violated, or no verdict and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from fnmatch import fnmatchcase

from smdbg.analysis.findings import Severity
from smdbg.analysis.report import Report


class Verdict(IntEnum):
    """The three ways a check can end; the numbers are the exit statuses of `smdbg check`."""

    CLEAN = 0
    VIOLATED = 1
    NONE = 2


@dataclass(frozen=True)
class Judged:
    """The verdict, and why there is none where it is NONE."""

    verdict: Verdict
    reason: str = ""


def judge(report: Report, named: Sequence[str], fail_on: Severity, allow_incomplete: bool) -> Judged:
    """Return the verdict of a report; `named` holds the names and globs of the rules that the user asked for.

    Whatever kept a rule that was asked for from judging comes first, then the findings, then what makes a clean result
    untrustworthy.
    """
    summary = report.summary
    if report.failed:
        return _none(f"{_list('the rule', report.failed)} failed; see above.")
    idle = [name for name in named if not _judged(report, name)]
    if idle:
        return _none(f"{_list('the rule', idle)} had nothing to judge; see above.")
    if report.at_least(fail_on):
        return Judged(Verdict.VIOLATED)
    if not report.judged:
        why = "; the hook switched itself off during the training, and its log says why" if summary.switched_off else ""
        return _none(f"no rule found anything to judge in {summary.run}{why}.")
    if summary.switched_off:
        text = "the hook switched itself off during the training, so what came after was not saved"
        return _none(f"nothing was found, but {text}. Its log says why.")
    if summary.damaged:
        text = f"nothing was found, but part of the run cannot be read: {summary.damaged[0]}"
        return _none(f"{text}. `smdbg verify` tells what is left.")
    if summary.dropped_rows or summary.dropped_steps:
        lost = f"{summary.dropped_steps} steps and {summary.dropped_rows} rows were dropped while the run was written"
        return _none(f"nothing was found, but {lost}.")
    if summary.incomplete and not allow_incomplete:
        advice = "--allow-incomplete accepts what there is"
        return _none(f"nothing was found, but the run is {summary.status}; {advice}.")
    return Judged(Verdict.CLEAN)


def _none(reason: str) -> Judged:
    return Judged(Verdict.NONE, f"No verdict: {reason}")


def _judged(report: Report, pattern: str) -> bool:
    """Return whether a rule that the name or glob means has judged something."""
    return any(
        fnmatchcase(result.name, pattern) or fnmatchcase(result.rule, pattern)
        for result in report.rules
        if result.name in report.judged
    )


def _list(noun: str, names: Sequence[str]) -> str:
    """Return `the rule x`, `the rules x and y`."""
    return f"{noun} {names[0]}" if len(names) == 1 else f"{noun}s {', '.join(names[:-1])} and {names[-1]}"
