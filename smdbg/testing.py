"""For tests of trainings: hold a run against rules, as `smdbg check` does.

    from smdbg.testing import assert_clean

    def test_the_training_is_healthy(tmp_path):
        train(tmp_path / "run", steps=200)
        assert_clean(tmp_path / "run")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smdbg.analysis.gate import Judged
    from smdbg.analysis.report import Report
    from smdbg.analysis.rule import Rule
    from smdbg.analysis.run import Run

__all__ = ["assert_clean"]

MOST_SHOWN = 20


def assert_clean(
    run: Run | str | os.PathLike[str],
    pack: str = "default",
    rules: Sequence[str | Rule] | None = None,
    fail_on: str = "error",
    allow_incomplete: bool = False,
    baseline: str | os.PathLike[str] | None = None,
) -> Report:
    """Check a run and return the report; AssertionError with the findings in words unless `check` would end with 0.

    `rules`: names, globs or rules, in place of the pack. `fail_on`: the least severity that counts. Without a verdict
    (a rule failed, or nothing was found in a run that is incomplete) the assertion fails too, and says why. Raises the
    errors of open_run, load_pack and of the baseline file.
    """
    from smdbg.analysis import baseline as known
    from smdbg.analysis.checker import check
    from smdbg.analysis.findings import Severity
    from smdbg.analysis.gate import Verdict, judge
    from smdbg.analysis.run import open_run
    from smdbg.errors import BadConfig, near

    __tracebackhide__ = True  # pytest shows the test, not this
    if fail_on not in set(Severity):
        raise BadConfig(f"fail_on must be one of {', '.join(Severity)}, not {fail_on!r}.{near(str(fail_on), Severity)}")
    chosen, named = _chosen(pack, rules)
    opened = open_run(run) if isinstance(run, str | os.PathLike) else run
    report = check(opened, chosen)
    if baseline is not None:
        report = known.compare(report, known.read(baseline), datetime.now(UTC).date()).counted
    judged = judge(report, named, Severity(fail_on), allow_incomplete)
    if judged.verdict is not Verdict.CLEAN:
        raise AssertionError(_text(report, judged, Severity(fail_on)))
    return report


def _chosen(pack: str, rules: Sequence[str | Rule] | None) -> tuple[list[Rule], list[str]]:
    """Return the rules to run, and the names of those that were asked for one by one."""
    from smdbg.analysis.choice import choose
    from smdbg.analysis.plugins import known_rules

    extra = known_rules({})
    if rules is None:
        return choose(pack=pack, extra=extra), []
    names = [one for one in rules if isinstance(one, str)]
    made = [one for one in rules if not isinstance(one, str)]
    found = choose(named=names, extra=extra) if names or not made else []
    return found + made, names + [one.label for one in made]


def _text(report: Report, judged: Judged, fail_on: object) -> str:
    """Return what is wrong, for people: a line for each finding that counts, then what became of other rules."""
    from smdbg.analysis.findings import Outcome, Severity
    from smdbg.analysis.gate import Verdict

    found = report.at_least(Severity(str(fail_on)))
    lines = [f"{report.summary.run}: {_heading(len(found))}" if found else f"{report.summary.run}:"]
    for finding in found[:MOST_SHOWN]:
        lines.append(f"  {finding.severity.value} {finding.rule}: {finding.message}")
    if len(found) > MOST_SHOWN:
        lines.append(f"  and {len(found) - MOST_SHOWN} more")
    if judged.verdict is Verdict.NONE:
        lines.append(judged.reason.replace("--allow-incomplete accepts", "allow_incomplete=True accepts"))
    for result in report.rules:
        if result.outcome in (Outcome.FAILED, Outcome.NOT_APPLICABLE, Outcome.INSUFFICIENT):
            lines.append(f"  {result.name}: {result.outcome.value}: {result.detail}")
    lines.append(report.summary.text())
    return "\n".join(lines)


def _heading(count: int) -> str:
    return "1 finding" if count == 1 else f"{count} findings"
