"""Judges stored cases with the rules of a pack, as a whole, by their first fifth, and without losses and metrics."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.detection.train import RUN
from smdbg.analysis.checker import check
from smdbg.analysis.findings import Finding, Outcome
from smdbg.analysis.pack import load_pack
from smdbg.analysis.rule import Rule, build, find_rule
from smdbg.analysis.run import Run
from smdbg.errors import SmdbgError
from smdbg.store.backend import open_backend
from smdbg.store.reader import StoredRun

log = logging.getLogger("smdbg.detection")

VIEWS = ("whole", "early", "hidden")
EARLY = 0.2  # the share of the steps that the early view shows
HIDDEN = ("losses", "metrics")
REQUESTS = 4

Record = dict[str, Any]


@cache
def rules_of(names: tuple[str, ...]) -> tuple[Rule, ...]:
    """Return the rules to judge with: of a pack, or those named, of the pack where it has them."""
    rules = load_pack("default").rules
    if not names:
        return rules
    known = [rule for rule in rules if rule.name in names or rule.label in names]
    missing = set(names) - {rule.name for rule in known} - {rule.label for rule in known}
    return (*known, *(build(find_rule(name), {}) for name in sorted(missing)))


def shown(folder: Path, view: str, steps: int) -> Run:
    """Open a case's run as a view shows it: what is left out is not there, so no rule can look at it."""
    stored = StoredRun(open_backend(folder / RUN, None, REQUESTS))
    if view == "early":
        end = int(steps * EARLY)
        stored.attempts = [replace(one, log=one.log[one.log[:, 0] < end], _rows={}) for one in stored.attempts]
    if view == "hidden":
        stored.attempts = [
            replace(one, entries={n: e for n, e in one.entries.items() if e.info.collection not in HIDDEN})
            for one in stored.attempts
        ]
    return Run(stored)


def judge(folder: Path, steps: int, views: Sequence[str], names: tuple[str, ...] = ()) -> Record:
    """Return, for each view, the findings in the order of the report, and which rules failed with what."""
    found: Record = {}
    for view in views:
        run = shown(folder, view, steps)
        report = check(run, rules_of(names), workers=1)
        kinds = {result.name: result.rule for result in report.rules}
        found[view] = {
            "findings": [_record(run, one, kinds[one.rule]) for one in report.findings],
            "failed": {one.name: one.detail for one in report.rules if one.outcome is Outcome.FAILED},
        }
        if view == "whole":
            found["saved"] = _saved_steps(run)
    return found


def _record(run: Run, finding: Finding, kind: str) -> Record:
    """Return of a finding what the score needs."""
    module = run.tensor(finding.tensor).info.module if finding.tensor in run.tensors() else ""
    return {
        "rule": finding.rule,
        "kind": kind,
        "severity": finding.severity.value,
        "tensor": finding.tensor,
        "module": module,
        "onset": finding.onset[1],
        "message": finding.message,
    }


def _saved_steps(run: Run) -> list[int]:
    """Return the train steps at which weights were saved: what onsets are counted in."""
    weights = [name for name in run.tensors() if run.tensor(name).info.role in ("weight", "embedding")]
    return run.tensor(weights[0]).steps("train").tolist() if weights else []


def judge_all(
    verdicts: Sequence[Record], root: Path, jobs: int, views: Sequence[str] = VIEWS, names: tuple[str, ...] = ()
) -> Iterator[tuple[str, Record]]:
    """Judge every labelled case; yield its id and what `judge` returns, as they come.

    One that cannot be read, as while it is trained anew, is passed over with a warning.
    """
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running = {
            pool.submit(judge, root / one["id"], one["steps"], views, names): one["id"]
            for one in verdicts
            if one["label"]
        }
        for done in as_completed(running):
            try:
                yield running[done], done.result()
            except SmdbgError as error:
                log.warning("%s is passed over: %s", running[done], error)
