"""Is the run itself there: its own zarr.json, and every worker that it says it has?"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from smdbg.errors import NewerFormat, NotARun, RunNotFound
from smdbg.store.backend import Backend, Missing
from smdbg.store.format import FORMAT, worker_key
from smdbg.store.keys import LARGEST_ROOT, ROOT, read_bounded, read_note
from smdbg.store.reader import LOST_SECONDS
from smdbg.store.verify_json import BROKEN, root_problem
from smdbg.store.verify_report import MOST_KEPT, Damage, Report, Worker, WorkerState

_UNFINISHED = {
    "copy": "an unfinished copy: run `smdbg cp` again to end it",
    "delete": "an unfinished deletion: run `smdbg prune` again to end it",
}


def check_root(backend: Backend, report: Report, has_workers: bool) -> dict[str, Any]:
    """Check the run's zarr.json and return what it says, {} if that cannot be told.

    Raises NotARun, RunNotFound and NewerFormat where there is no run that could be checked.
    """
    try:
        data = read_bounded(backend, ROOT, LARGEST_ROOT)
    except ValueError as error:
        if not has_workers:
            raise NotARun(f"{backend.url} is not a run: its zarr.json has {error}") from None
        report.broken(Damage(ROOT, f"has {error}"))
        return {}
    except Missing:
        _no_root(backend, report, has_workers)
        return {}
    facts: dict[str, Any] = {}
    try:
        facts = dict(json.loads(data)["attributes"]["smdbg"])
        report.run_id = str(facts["run_id"])
        version = facts["format"]
    except BROKEN:
        version = None
        if not has_workers:
            raise NotARun(f"{backend.url} is not a run: its zarr.json was not written by smdbg") from None
    problem = root_problem(data)
    if isinstance(version, int) and version > FORMAT and not problem:
        raise NewerFormat(f"{backend.url} has format {version!r}; this smdbg reads up to {FORMAT}: upgrade it")
    if problem:
        report.broken(Damage(ROOT, problem))
    return {} if problem else facts


def _no_root(backend: Backend, report: Report, has_workers: bool) -> None:
    note = read_note(backend)
    if note is not None:
        report.unfinished = _UNFINISHED.get(
            str(note.get("doing")), "an unfinished copy or deletion: run `smdbg cp` or `smdbg prune` again to end it"
        )
    if has_workers:
        reason = report.unfinished or "without it no reader takes this for a run"
        report.broken(Damage(ROOT, f"is missing: {reason}"))
    elif note is not None:
        raise NotARun(f"{backend.url} is not a run, but {report.unfinished}")
    elif backend.list(""):
        raise NotARun(f"{backend.url} is not a run: there is no zarr.json in it. `smdbg runs` lists runs")
    else:
        raise RunNotFound(f"{backend.url}: there is no run: check the URL, or list runs with `smdbg runs`")


def check_contiguous(workers: Sequence[Worker], report: Report) -> None:
    """Note attempts that are not there although a later one is: each was made after it had seen the one before."""
    known = set(workers)
    for rank, attempt in workers:
        if attempt and (rank, attempt - 1) not in known:
            key = f"{worker_key(rank, attempt - 1)}/zarr.json"
            report.broken(Damage(key, "is missing, although a later attempt is there", (rank, attempt - 1)))


def check_writers(
    backend: Backend, facts: dict[str, Any], workers: Sequence[Worker], ranks: Sequence[int], report: Report
) -> None:
    """Note workers of which nothing is there although the run says that they write, once they had time to begin.

    To be called when those that are there were checked.
    """
    told = {rank for rank in facts.get("writers", ()) if type(rank) is int and rank >= 0}
    wanted = told.intersection(ranks) if ranks else told
    absent = sorted(wanted.difference(rank for rank, _ in workers))[:MOST_KEPT]
    if not absent:
        return
    if _is_beginning(backend, facts, report):
        shown = ", ".join(map(str, absent[:5])) + (" …" if len(absent) > 5 else "")
        report.unchecked.append(f"worker {shown}: nothing of it is here, but the run is younger than a minute")
        return
    for rank in absent:
        report.workers[rank, 0] = WorkerState()
        what = f"is missing: the run says that worker {rank} writes, and nothing of it is here"
        report.broken(Damage(f"{worker_key(rank, 0)}/zarr.json", what, (rank, 0)))
        report.unknown = True


def _is_beginning(backend: Backend, facts: dict[str, Any], report: Report) -> bool:
    """Tell whether the root is so young that a writer may not have begun; that of a copy of an ended run only looks so.

    The age is the store's, as readers ask; who made the run may have another clock.
    """
    now = time.time()
    began = max((item.modified for item in backend.list("") if item.name == ROOT), default=0.0)
    created = facts.get("created")
    old = isinstance(created, int | float) and now - created > LOST_SECONDS
    ended = any(state.status == "completed" for state in report.workers.values())
    return now - began <= LOST_SECONDS and not (old and ended)
