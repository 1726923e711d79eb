"""Checks a run: plans what the rules read, lets them judge, and reports what they found.

What the selected rules need is planned together: each matrix of statistics and each full value is read once for all of
them. Rules are judged on several threads; one that raises is reported as failed and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from smdbg.analysis.cause import ordered
from smdbg.analysis.clock import Clock
from smdbg.analysis.concurrency import threads
from smdbg.analysis.findings import Bools, Finding, Fold, Ints, Outcome
from smdbg.analysis.measuring import measure_all
from smdbg.analysis.report import Report, RuleResult, Summary
from smdbg.analysis.rule import Needs, Rule, State
from smdbg.analysis.run import Run
from smdbg.analysis.run_rule import RunRule
from smdbg.analysis.table import partners
from smdbg.analysis.verdict import finding_of, found_by_fold, found_by_rule
from smdbg.analysis.view import View
from smdbg.errors import BadConfig, SmdbgError
from smdbg.select import matcher

__all__ = ["BLOCK_ROWS", "Progress", "Report", "RuleResult", "Summary", "check"]

BLOCK_ROWS = 4096
Progress = Callable[[int, int, str], None]


@dataclass
class _Job:
    """One rule on its way through the run: what it judges, and what has come of it so far.

    `rows` and `judged_rows` count, per worker, the saved steps it was given and those at which it judged.
    """

    rule: Rule
    view: View
    needs: Needs = field(default_factory=Needs)
    names: list[str] = field(default_factory=list)
    modes: list[str] = field(default_factory=list)
    reason: str = ""
    error: str = ""
    detail: str = ""
    findings: list[Finding] = field(default_factory=list)
    judged: set[str] = field(default_factory=set)
    rows: dict[int, int] = field(default_factory=dict)
    judged_rows: dict[int, int] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Tell whether there is something to judge."""
        return not self.reason and not self.error

    @property
    def measures(self) -> bool:
        """Tell whether the rule is to be given the full values, to measure them."""
        return self.needs.values and type(self.rule).measure is not Rule.measure

    def parts(self) -> list[tuple[int, str]]:
        """Return the workers and modes to judge."""
        workers = [w for w in self.view.run.workers() if not self.rule.workers or w in self.rule.workers]
        return [(worker, mode) for worker in workers for mode in self.modes]


def check(
    run: Run,
    rules: Sequence[Rule],
    *,
    progress: Progress | None = None,
    block_rows: int = BLOCK_ROWS,
    workers: int | None = None,
) -> Report:
    """Judge a run by rules and return what was found, with an outcome for every rule.

    `progress(done, total, text)` is called as the work goes on. `block_rows` bounds how many saved steps a rule sees
    at once; it does not change results. `workers`: threads; None: one a core. Raises BadConfig when two rules have one
    label and BadSelection for a selector that cannot be read; what a rule raises is told in its outcome.
    """
    _validate(rules)
    view = View(run, {name: run.tensor(name).info for name in run.tensors()})
    jobs = [_planned(rule, view) for rule in rules]
    _plan_reads(view, jobs)
    units = [(job, part) for job in jobs if job.ready for part in _units(job)]
    seen: list[Ints] = [np.zeros(0, np.int64)]
    with ThreadPoolExecutor(threads(workers)) as pool:
        try:
            wanted = [job for job in jobs if job.ready and job.measures]
            steps = _Progress(progress, len(units))
            plans = [(job.rule, job.names, job.parts(), job.view) for job in wanted]
            for rule, error in measure_all(pool, view, plans, steps.more):
                next(job for job in wanted if job.rule is rule).error = error
            units = [(job, part) for job, part in units if job.ready]
            futures = [pool.submit(_judged, job, part, block_rows) for job, part in units]
            for (job, _), future in zip(units, futures, strict=True):
                steps.done(job.rule.label)
                seen.append(_taken(job, future))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    steps.end()
    results = tuple(_result(job) for job in jobs)
    found = [finding for job in jobs for finding in job.findings]
    clock = Clock({worker: view.log(worker) for worker in run.workers()}) if found else Clock()
    findings = ordered(found, view.catalogue, clock, {result.name: result.rule for result in results})
    return Report(tuple(findings), results, _summary(run, results, len(np.unique(np.concatenate(seen)))))


@dataclass
class _Progress:
    """Counts what is done of what there is to do, for whoever watches."""

    tell: Progress | None
    units: int
    read: int = 0
    at: int = 0

    def more(self, total: int, text: str) -> None:
        """Count one full read of `total`."""
        self.read += 1
        if self.tell is not None:
            self.tell(self.read, total + self.units, text)

    def done(self, text: str) -> None:
        """Count one judgement that is being waited for."""
        if self.tell is not None:
            self.tell(self.read + self.at, self.read + self.units, text)
        self.at += 1

    def end(self) -> None:
        """Say that all is done."""
        if self.tell is not None:
            self.tell(self.read + self.units, self.read + self.units, "")


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
        job.error = failure(error)


def failure(error: BaseException) -> str:
    """Return in a sentence what a rule raised."""
    return str(error) if isinstance(error, SmdbgError) else f"{type(error).__name__}: {error}"


def _planned(rule: Rule, view: View) -> _Job:
    """Settle what a rule judges, or why it cannot."""
    job = _Job(rule, view.between(rule.start_step, rule.end_step))
    with _guarded(job):
        job.needs = rule.needs()
        job.names = rule.select(view.catalogue) if job.needs.tensors else []
        modes = view.run.modes()
        if job.needs.tensors:
            used = {mode for name in job.names for mode in view.modes_of(name)}
            modes = [mode for mode in modes if mode in used]
        job.modes = rule.modes(modes)
        job.reason = rule.applicable() or _no_match(job, view.run, bool(view.catalogue))
    return job


def _no_match(job: _Job, run: Run, any_tensor: bool) -> str:
    """Return why there is nothing to judge, '' when there is or when the run has not saved anything yet."""
    rule, modes, workers = job.rule, run.modes(), run.workers()
    if not any_tensor:
        return ""
    if job.needs.tensors and not job.names:
        return f"nothing matched: it looks for {rule.looked_for()}"
    if not rule.modes(modes):
        wanted = [rule.mode] if rule.mode else job.needs.modes
        return f"the run has no step in mode {' or '.join(wanted) or 'that it judges'}"
    if rule.workers and not set(rule.workers) & set(workers):
        return f"the run has no worker {' or '.join(map(str, rule.workers))}"
    return ""


def _plan_reads(view: View, jobs: Sequence[_Job]) -> None:
    """Tell the view all that will be asked for, so that each collection is gone through once."""
    for job in jobs:
        if not job.ready:
            continue
        infos = [view.catalogue[name] for name in job.names]
        for statistic in job.needs.statistics:
            role, dot, own = statistic.partition(".")
            chosen = partners(view.catalogue, infos, role) if dot else infos
            for collection in {info.collection for info in chosen if info is not None}:
                view.plan(collection, [own if dot else statistic])


def _units(job: _Job) -> list[tuple[int, str] | None]:
    """Return the parts that a job is judged in: workers and modes, or the whole run (None) at once."""
    return [None] if isinstance(job.rule, RunRule) else list(job.parts())


@dataclass(frozen=True)
class _Judged:
    """What came of one part of a job; `judged` names tensors, `steps` are those it was given."""

    findings: Sequence[Finding]
    judged: Sequence[str]
    rows: Mapping[int, int]
    judged_rows: Mapping[int, int]
    steps: Ints
    detail: str = ""
    reason: str = ""


def _judged(job: _Job, part: tuple[int, str] | None, block_rows: int) -> _Judged:
    """Let a rule judge a part of the run."""
    return _by_run(job, job.rule) if isinstance(job.rule, RunRule) else _by_blocks(job, part or (0, ""), block_rows)


def _by_blocks(job: _Job, part: tuple[int, str], block_rows: int) -> _Judged:
    """Let a rule judge one worker and mode block by block."""
    rule, (worker, mode) = job.rule, part
    table = job.view.table(job.names, job.needs.statistics, mode, worker)
    measures = {
        (step, column): found
        for column, name in enumerate(job.names if job.measures else ())
        for step, found in job.view.measured(rule.label, name, mode, worker).items()
    }
    fold = Fold(len(table.infos), rule.kinds())
    state: State = {}
    for block in table.blocks(range(0, len(table.steps), block_rows), job.needs.look_back, job.needs.values, measures):
        judgement, state = rule.evaluate(block, state)
        fold.add(block.steps, judgement, block.first)
    findings = [finding_of(rule, job.view, *found_by_fold(rule, table, fold, one)) for one in fold.results()]
    names = [table.infos[column].name for column in np.flatnonzero(fold.judged)]
    return _Judged(findings, names, {worker: len(table.steps)}, {worker: fold.judged_rows}, table.steps)


def _by_run(job: _Job, rule: RunRule) -> _Judged:
    """Let a rule judge the whole run."""
    verdicts = rule.judge(job.view, job.names)
    findings = [finding_of(rule, job.view, *found_by_rule(rule, job.view, one)) for one in verdicts.troubles]
    steps = [np.zeros(0, np.int64)]
    if verdicts.steps:
        for worker, mode in job.parts():
            log = job.view.log(worker)
            here: Bools = (log.mode == mode) & job.view.inside(log.step)
            steps.append(job.view.table(job.names, (), mode, worker).steps if job.names else log.step[here])
    return _Judged(
        findings,
        [name for name in verdicts.judged if name in job.names],
        {0: verdicts.seen or verdicts.steps},
        {0: verdicts.steps},
        np.concatenate(steps),
        verdicts.detail,
        verdicts.not_applicable,
    )


def _taken(job: _Job, future: Future[_Judged]) -> Ints:
    """Add what came of a part to its job; return the steps that were judged in it."""
    with _guarded(job):
        found = future.result()
        job.findings += found.findings
        job.judged.update(found.judged)
        job.detail, job.reason = job.detail or found.detail, job.reason or found.reason
        for total, more in ((job.rows, found.rows), (job.judged_rows, found.judged_rows)):
            for worker, count in more.items():
                total[worker] = total.get(worker, 0) + count
        return found.steps
    return np.zeros(0, np.int64)


def _result(job: _Job) -> RuleResult:
    """Return the outcome of a rule, and in words why it is not a plain verdict."""
    judged = max(job.judged_rows.values(), default=0)
    rows = max(job.rows.values(), default=0)
    outcome, detail = Outcome.CLEAN, job.detail
    if not detail and len(job.judged) < len(job.names):
        detail = f"{len(job.judged)} of {len(job.names)} tensors could be judged"
    if job.error:
        outcome, detail = Outcome.FAILED, job.error
    elif job.reason:
        outcome, detail = Outcome.NOT_APPLICABLE, job.reason
    elif job.findings:
        outcome = Outcome.VIOLATED
    elif not judged:
        outcome, detail = Outcome.INSUFFICIENT, job.detail or _too_little(job.needs, rows)
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


def _too_little(needs: Needs, rows: int) -> str:
    """Return how much a rule saw of what it needs."""
    if rows < needs.minimum:
        return f"saw {rows} of the {needs.minimum} saved steps it needs"
    what = f"a finite {' and '.join(needs.statistics)}" if needs.statistics else "a value"
    if needs.minimum == 1:
        return f"of {rows} saved steps none had {what}"
    return f"of {rows} saved steps fewer than {needs.minimum} had {what}, and it needs as many"


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
