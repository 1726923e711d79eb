"""Checks a run: plans what the rules read, lets them judge block by block, and reports what they found.

Each matrix of statistics (collection, statistic, mode, worker) is read once for all rules together. A rule that
raises is reported as failed and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from smdbg.analysis.cause import ordered
from smdbg.analysis.findings import Facts, Finding, Fold, Ints, Outcome, Violated, fingerprint
from smdbg.analysis.report import Report, RuleResult, Summary
from smdbg.analysis.rule import Needs, Rule, State
from smdbg.analysis.run import Run
from smdbg.analysis.table import Matrices, Table, read_table
from smdbg.errors import BadConfig, SmdbgError
from smdbg.select import matcher
from smdbg.store.format import TensorInfo

__all__ = ["BLOCK_ROWS", "Progress", "Report", "RuleResult", "Summary", "check"]

BLOCK_ROWS = 4096
Progress = Callable[[int, int, str], None]


@dataclass
class _Job:
    """One rule on its way through the run: what it judges, and what has come of it so far.

    `rows` and `judged_rows` count, per worker, the saved steps it was given and those at which it judged.
    """

    rule: Rule
    needs: Needs = field(default_factory=Needs)
    names: list[str] = field(default_factory=list)
    modes: list[str] = field(default_factory=list)
    reason: str = ""
    error: str = ""
    findings: list[Finding] = field(default_factory=list)
    judged: set[str] = field(default_factory=set)
    rows: dict[int, int] = field(default_factory=dict)
    judged_rows: dict[int, int] = field(default_factory=dict)


def check(run: Run, rules: Sequence[Rule], *, progress: Progress | None = None, block_rows: int = BLOCK_ROWS) -> Report:
    """Judge a run by rules and return what was found, with an outcome for every rule.

    `progress(done, total, text)` is called as the work goes on. `block_rows` bounds how many saved steps a rule sees
    at once; it does not change results. Raises BadConfig when two rules have one label and BadSelection for a
    selector that cannot be read; what a rule raises is told in its outcome.
    """
    _validate(rules)
    catalogue = {name: run.tensor(name).info for name in run.tensors()}
    jobs = [_planned(rule, run, catalogue) for rule in rules]
    parts = [(worker, mode) for worker in run.workers() for mode in run.modes()]
    seen: Ints = np.zeros(0, np.int64)
    done = 0
    for worker, mode in parts:
        matrices = Matrices(run, worker, mode)
        for job in jobs:
            if progress is not None:
                progress(done, len(parts) * len(jobs), job.rule.label)
            done += 1
            seen = np.union1d(seen, _judge(job, matrices, catalogue, block_rows))
    if progress is not None:
        progress(done, done, "")
    findings = ordered([finding for job in jobs for finding in job.findings], catalogue)
    results = tuple(_result(job) for job in jobs)
    return Report(tuple(findings), results, _summary(run, results, len(seen)))


def _validate(rules: Sequence[Rule]) -> None:
    """Refuse rules that share a label, and selectors that cannot be read."""
    labels = [rule.label for rule in rules]
    for index, rule in enumerate(rules):
        if rule.label in labels[:index]:
            raise BadConfig(f"Two rules are called {rule.label!r}. Give one of them a name of its own.")
        for pattern in (*rule.include, *rule.exclude):
            matcher(pattern)


@contextmanager
def _guarded(job: _Job) -> Iterator[None]:
    """Take whatever a rule raises, SystemExit too, for the outcome 'failed'; an interrupt goes through."""
    try:
        yield
    except (Exception, SystemExit) as error:
        job.error = str(error) if isinstance(error, SmdbgError) else f"{type(error).__name__}: {error}"


def _planned(rule: Rule, run: Run, catalogue: Mapping[str, TensorInfo]) -> _Job:
    """Settle what a rule judges, or why it cannot."""
    job = _Job(rule)
    with _guarded(job):
        job.needs = rule.needs()
        job.names = rule.select(catalogue)
        job.modes = rule.modes([mode for mode in run.modes() if any(len(run.tensor(n).steps(mode)) for n in job.names)])
        job.reason = rule.applicable() or _no_match(job, run, bool(catalogue))
    return job


def _no_match(job: _Job, run: Run, any_tensor: bool) -> str:
    """Return why there is nothing to judge, '' when there is or when the run has not saved anything yet."""
    rule, modes, workers = job.rule, run.modes(), run.workers()
    if not any_tensor:
        return ""
    if not job.names:
        return f"nothing matched: it looks for {rule.looked_for()}"
    if not rule.modes(modes):
        wanted = [rule.mode] if rule.mode else job.needs.modes
        return f"the run has no step in mode {' or '.join(wanted) or 'that it judges'}"
    if rule.workers and not set(rule.workers) & set(workers):
        return f"the run has no worker {' or '.join(map(str, rule.workers))}"
    return ""


def _judge(job: _Job, matrices: Matrices, catalogue: Mapping[str, TensorInfo], block_rows: int) -> Ints:
    """Let a rule judge one worker and mode; return the steps it was given (int64[n])."""
    rule, worker = job.rule, matrices.worker
    skip = job.reason or job.error or (rule.workers and worker not in rule.workers)
    with _guarded(job):
        if skip or matrices.mode not in job.modes:
            return np.zeros(0, np.int64)
        infos = [catalogue[name] for name in job.names]
        table = read_table(matrices, infos, job.needs.statistics, rule.start_step, rule.end_step)
        fold = Fold(len(infos), rule.kinds())
        state: State = {}
        for block in table.blocks(range(0, len(table.steps), block_rows), job.needs.look_back, job.needs.values):
            judgement, state = rule.evaluate(block, state)
            fold.add(block.steps, judgement, block.first)
        job.findings += [_finding(rule, table, fold, violated) for violated in fold.results()]
        job.judged.update(infos[column].name for column in np.flatnonzero(fold.judged))
        job.rows[worker] = job.rows.get(worker, 0) + len(table.steps)
        job.judged_rows[worker] = job.judged_rows.get(worker, 0) + fold.judged_rows
        return table.steps
    return np.zeros(0, np.int64)


def _finding(rule: Rule, table: Table, fold: Fold, violated: Violated) -> Finding:
    """Put one tensor's violations into words and figures."""
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
    return Finding(
        rule=rule.label,
        severity=rule.severity,
        run=table.run.url,
        worker=table.worker,
        attempt=int(table.attempts[row]),
        mode=table.mode,
        tensor=info.name,
        first_step=facts.step,
        last_step=facts.last_step,
        first_mode_step=int(table.mode_steps[row]),
        onset=(facts.before, facts.since),
        violations=facts.violations,
        judged=facts.judged,
        worst=facts.worst,
        threshold=kind.threshold,
        statistic=kind.statistic,
        message=rule.message(facts),
        hint=rule.hint(facts),
        fingerprint=fingerprint(rule.label, info.name, table.mode),
    )


def _result(job: _Job) -> RuleResult:
    """Return the outcome of a rule, and in words why it is not a plain verdict."""
    judged = max(job.judged_rows.values(), default=0)
    rows = max(job.rows.values(), default=0)
    outcome, detail = Outcome.CLEAN, ""
    if len(job.judged) < len(job.names):
        detail = f"{len(job.judged)} of {len(job.names)} tensors could be judged"
    if job.error:
        outcome, detail = Outcome.FAILED, job.error
    elif job.reason:
        outcome, detail = Outcome.NOT_APPLICABLE, job.reason
    elif job.findings:
        outcome = Outcome.VIOLATED
    elif not judged:
        outcome, detail = Outcome.INSUFFICIENT, f"saw {rows} of the {job.needs.minimum} saved steps it needs"
        if rows >= job.needs.minimum:
            what = f"a finite {' and '.join(job.needs.statistics)}" if job.needs.statistics else "a value"
            few = "none" if job.needs.minimum == 1 else f"fewer than {job.needs.minimum}"
            detail = f"of {rows} saved steps {few} had {what}" + ("" if few == "none" else ", and it needs as many")
    return RuleResult(
        name=job.rule.label,
        rule=job.rule.name,
        outcome=outcome,
        detail=detail,
        findings=len(job.findings),
        tensors_judged=len(job.judged),
        tensors=len(job.names),
        steps_judged=judged,
        steps_needed=job.needs.minimum,
    )


def _summary(run: Run, results: Sequence[RuleResult], seen: int) -> Summary:
    """Return how much was judged and whether the run is whole."""
    workers = run.workers()
    attempts = [attempt for worker in workers for attempt in run.attempts(worker)]
    dropped = sum(attempt.dropped_steps for attempt in attempts)
    return Summary(
        run=run.url,
        status=run.status,
        rules_judged=sum(result.outcome in (Outcome.VIOLATED, Outcome.CLEAN) for result in results),
        rules=len(results),
        steps_seen=seen,
        steps=len(run.steps()) + sum(attempt.unlogged_steps for attempt in attempts),
        workers=tuple(workers),
        incomplete=run.status != "completed",
        dropped_steps=dropped,
        dropped_rows=sum(attempt.dropped_rows for attempt in attempts),
        switched_off=any(attempt.switched_off for attempt in attempts),
        damaged=tuple(run.damaged),
    )
