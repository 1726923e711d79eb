"""Deleting what no commit refers to, and nothing else.

Only names that a writer gives are deleted, of attempts that have ended or been silent for long, whose log and catalogue
are whole. What a writer has put and not yet committed looks the same: so what is alive is left alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from smdbg.errors import BadSelection
from smdbg.store.backend import Backend
from smdbg.store.format import worker_key
from smdbg.store.keys import refuse_links
from smdbg.store.verify import is_alive
from smdbg.store.verify_report import SILENT_SECONDS, Orphan, Report

STALE_SECONDS = 3600.0  # of an unfinished file that belongs to no worker


def repairable(report: Report, force: bool = False) -> list[Orphan]:
    """Return what `repair` would delete. `force`: also in a run of which some workers are running, but not of these.

    Raises BadSelection where a worker is running, unless forced.
    """
    now = time.time()
    alive = [key for key, state in report.workers.items() if is_alive(state, now)]
    if alive and not force:
        raise BadSelection(
            f"{report.url} is still being written by worker {alive[0][0]}: what it has not committed yet looks like "
            "what nobody needs. Repair it when it has ended, or leave that worker out with --force"
        )
    return [one for one in report.orphans if one.ours and _may_go(report, one, now)]


def _may_go(report: Report, one: Orphan, now: float) -> bool:
    if one.worker is None:
        return now - one.modified > STALE_SECONDS
    state = report.workers[one.worker]
    if not state.readable:
        return False
    return state.status != "running" or now - state.newest > SILENT_SECONDS


def repair(backend: Backend, report: Report, wanted: list[Orphan]) -> Iterator[Orphan]:
    """Delete and yield what was deleted. May be interrupted and run again at any time. Raises StoreError."""
    refuse_links(backend)
    by_worker: dict[tuple[int, int] | None, list[Orphan]] = {}
    for one in wanted:
        by_worker.setdefault(one.worker, []).append(one)
    for worker, items in by_worker.items():
        if worker is not None and _moved(backend, report, worker):
            continue  # it has come to life since it was looked at
        # Metadata last: while there are data, there is something that tells what they are.
        ordered = sorted(items, key=lambda one: (one.object.endswith("/zarr.json"), one.object))
        for start in range(0, len(ordered), 1000):
            batch = ordered[start : start + 1000]
            backend.remove([one.object for one in batch])
            yield from batch


def _moved(backend: Backend, report: Report, worker: tuple[int, int]) -> bool:
    base = worker_key(*worker)
    times = [item.modified for item in (*backend.walk(f"{base}/steps"), *backend.list(base)) if not item.folder]
    return max(times, default=0.0) > report.workers[worker].newest
