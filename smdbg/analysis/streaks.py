"""Runs of bad saved steps: symptoms that must show at several judged steps in a row, for many tensors at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from smdbg.analysis.findings import NO_STEP, Bools, Facts, Fold, Ints, Violated
from smdbg.analysis.rule import Judgement, Rule, State
from smdbg.analysis.run_rule import Trouble, Verdicts
from smdbg.analysis.table import Table

__all__ = ["in_a_row", "often", "verdicts"]

_RUN, _SINCE, _BEFORE, _SEEN = range(4)


def in_a_row(
    steps: Ints, names: Sequence[str], judged: Bools, bad: Bools, length: int, state: State
) -> tuple[Bools, Bools, Ints, Ints, State]:
    """Demand that a symptom show at `length` judged steps of a tensor one after the other.

    judged, bad: bool[rows, tensors] of rows that were not given before. Steps at which a tensor was not judged neither
    break a run of bad ones nor add to it. Returns (judged, violated, since, before) as a Judgement has them, and the
    state for the next rows: per tensor the bad steps in a row, where they began, the last clean step before, and how
    many were judged.
    """
    carried = np.array([state.get(name, (0, NO_STEP, NO_STEP, 0)) for name in names], np.int64).reshape(-1, 4)
    if judged.all():
        seen = np.arange(1, len(steps) + 1)[:, None] + carried[:, _SEEN]
    else:
        seen = np.cumsum(judged, axis=0) + carried[:, _SEEN]
    hit = judged & bad
    if not hit.any():
        violated = np.zeros_like(hit)
        since = before = np.broadcast_to(np.int64(NO_STEP), hit.shape)
        after = _after_clean(steps, judged, carried)
    else:
        clean = judged & ~bad
        total = np.cumsum(hit, axis=0) + carried[:, _RUN]
        run = np.where(hit, total - np.maximum.accumulate(np.where(clean, total, 0), axis=0), 0)
        began = _newest(steps, hit & (run == 1), carried[:, _SINCE])
        last = _newest(steps, clean, carried[:, _BEFORE])
        violated = run >= length
        since, before = np.where(violated, began, NO_STEP), np.where(violated, last, NO_STEP)
        after = np.stack([_last_run(run, judged, carried), began[-1], last[-1], seen[-1]], axis=1)
    enough = judged & ((seen >= length) | violated)
    if len(steps):
        state = dict(zip(names, after.tolist(), strict=True))
    return enough, violated, since, before, state


def _newest(steps: Ints, marked: Bools, earlier: Ints) -> Ints:
    """Return int64[rows, tensors]: the newest marked step up to each row, of earlier rows `earlier`."""
    rows = np.maximum.accumulate(np.where(marked, np.arange(1, len(steps) + 1)[:, None], 0), axis=0)
    return np.where(rows > 0, steps[rows - 1], earlier)


def _last_run(run: Ints, judged: Bools, carried: Ints) -> Ints:
    """Return how many bad steps in a row each tensor ends with."""
    newest = len(judged) - 1 - judged[::-1].argmax(axis=0)
    return np.where(judged.any(axis=0), run[newest, np.arange(run.shape[1])], carried[:, _RUN])


def _after_clean(steps: Ints, judged: Bools, carried: Ints) -> Ints:
    """Return the state after rows without a symptom."""
    after = carried.copy()
    if not len(steps):
        return after
    any_judged = judged.any(axis=0)
    newest = steps[len(steps) - 1 - judged[::-1].argmax(axis=0)]
    after[any_judged, _RUN] = 0
    after[any_judged, _BEFORE] = newest[any_judged]
    after[:, _SEEN] += judged.sum(axis=0)
    return after


def verdicts(rule: Rule, judged: Iterable[tuple[Table, Judgement]], detail: str = "") -> Verdicts:
    """Return the answer of a run rule that has judged whole tables, one for each worker, row by row."""
    found: list[Trouble] = []
    names: dict[str, None] = {}
    steps = seen = 0
    for table, judgement in judged:
        fold = Fold(len(table.infos), rule.kinds())
        fold.add(table.steps, judgement)
        found += [_trouble(table, one) for one in fold.results()]
        names.update(dict.fromkeys(table.infos[column].name for column in np.flatnonzero(fold.judged)))
        steps, seen = max(steps, fold.judged_rows), max(seen, len(table.steps))
    return Verdicts(troubles=found, judged=list(names), steps=steps, seen=seen, detail=detail)


def _trouble(table: Table, one: Violated) -> Trouble:
    return Trouble(
        tensor=table.infos[one.column].name,
        worker=table.worker,
        mode=table.mode,
        step=int(table.steps[one.first_row]),
        last_step=int(table.steps[one.last_row]),
        violations=one.violations,
        judged=one.judged,
        worst=one.worst,
        kind=one.kind,
        since=one.since,
        before=one.before,
        note=one.note,
    )


def often(facts: Facts) -> str:
    """Return in words how many of the judged steps violate the rule."""
    return f"{facts.violations} of {facts.judged} saved steps"
