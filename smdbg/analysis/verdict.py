"""Turns what a rule found wrong with one tensor into a finding: with severity, words, fix and fingerprint."""

from __future__ import annotations

from smdbg.analysis.course import Course
from smdbg.analysis.findings import Facts, Finding, Fold, Severity, Violated, fingerprint
from smdbg.analysis.rule import Rule
from smdbg.analysis.run_rule import RunRule, Trouble
from smdbg.analysis.table import Table
from smdbg.analysis.view import View
from smdbg.store.format import TensorInfo

Place = tuple[int, str, Severity | None]  # worker, mode, and the severity where the rule has settled it


def found_by_fold(rule: Rule, table: Table, fold: Fold, violated: Violated) -> tuple[Facts, Place]:
    """Return what is known of one tensor's violations, and where they are."""
    row, column = violated.first_row, violated.column
    info, kind = table.infos[column], fold.kinds[violated.kind]
    earlier = table.row_before(row, column)
    facts = Facts(
        tensor=info.name,
        info=info,
        kind=kind,
        kinds={one.name: count for one, count in zip(fold.kinds, violated.kinds, strict=True)},
        step=int(table.steps[row]),
        last_step=int(table.steps[violated.last_row]),
        before=violated.before,
        since=violated.since,
        violations=violated.violations,
        judged=violated.judged,
        worst=violated.worst,
        first=table.at(row, column),
        previous_step=None if earlier is None else int(table.steps[earlier]),
        previous={} if earlier is None else table.at(earlier, column),
        note=violated.note,
    )
    return facts, (table.worker, table.mode, None)


def found_by_rule(rule: RunRule, view: View, trouble: Trouble) -> tuple[Facts, Place]:
    """Return the same for what a run rule found."""
    kinds = rule.kinds()
    kind = kinds[trouble.kind]
    facts = Facts(
        tensor=trouble.tensor,
        info=view.catalogue.get(trouble.tensor, TensorInfo(trouble.tensor, "")),
        kind=kind,
        kinds={one.name: trouble.violations if one is kind else 0 for one in kinds},
        step=trouble.step,
        last_step=trouble.last_step,
        before=trouble.before,
        since=trouble.step if trouble.since is None else trouble.since,
        violations=trouble.violations,
        judged=trouble.judged,
        worst=trouble.worst,
        first={},
        previous_step=None,
        previous={},
        note=trouble.note,
    )
    return facts, (trouble.worker, trouble.mode, trouble.severity)


def finding_of(rule: Rule, view: View, facts: Facts, place: Place) -> Finding:
    """Put one tensor's violations into words and figures."""
    worker, mode, severity = place
    log = view.log(worker)
    row = int((log.step == facts.step).argmax()) if len(log.step) else -1
    if severity is None:
        # Most rules do not look at the course of the training, and then it need not be read.
        course = view.course(worker) if type(rule).grade is not Rule.grade else Course()
        severity = rule.grade(facts, course)
    return Finding(
        rule=rule.label,
        severity=severity,
        run=view.run.url,
        worker=worker,
        attempt=int(log.attempt[row]) if row >= 0 else 0,
        mode=mode,
        tensor=facts.tensor,
        first_step=facts.step,
        last_step=facts.last_step,
        first_mode_step=int(log.mode_step[row]) if row >= 0 else 0,
        onset=(facts.before, facts.since),
        violations=facts.violations,
        judged=facts.judged,
        worst=facts.worst,
        threshold=facts.kind.threshold,
        statistic=facts.kind.statistic,
        message=rule.message(facts),
        hint=rule.hint(facts),
        fingerprint=fingerprint(rule.label, facts.tensor, mode),
    )
