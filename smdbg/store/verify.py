"""Checking a whole run: every checksum, the commit log against the objects, and what nothing refers to.

Nothing is changed. Of a run that is being written, what is committed when its log is read counts.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from smdbg.errors import DamagedData
from smdbg.store.attempt import Attempt, Catalogue, parse_catalogue
from smdbg.store.backend import Backend, Listed, Missing
from smdbg.store.format import LOG, LOG_COLUMNS, LOG_ROWS, log_spec, parse_worker, worker_key
from smdbg.store.keys import LARGEST_ROOT, ROOT, STOP, UNFINISHED, parse_key
from smdbg.store.reader import LOST_SECONDS
from smdbg.store.shard import CRC
from smdbg.store.verify_collection import Check
from smdbg.store.verify_json import (
    BROKEN,
    DIFFERS,
    child_problem,
    plain_group_problem,
    sensible,
    unread,
    worker_problem,
)
from smdbg.store.verify_log import check_coordinate, check_log, read_log
from smdbg.store.verify_report import SILENT_SECONDS, Damage, Orphan, Report, Worker, WorkerState
from smdbg.store.verify_root import check_contiguous, check_root, check_writers
from smdbg.store.verify_shards import unlisted

Progress = Callable[[str], None]
PLAIN = ("workers", "control", "checks")
VERSION = LOG_COLUMNS.index("catalogue_version")
_PARTIAL = re.compile(r"(.*/)?\.([^/]+)\.[0-9a-f]{32}\.partial\Z")
_UNREFERENCED = "no commit refers to it"


def verify(
    backend: Backend, *, quick: bool = False, ranks: tuple[int, ...] = (), progress: Progress | None = None
) -> Report:
    """Check a run, or some workers of it. `quick`: of full values only that they are there in full length.

    Raises RunNotFound, NotARun, NewerFormat, StoreError and AccessRefused where nothing can be checked.
    """
    report = Report(backend.url)
    workers = sorted(k for i in backend.list("workers") if i.folder and (k := parse_worker(i.name)) is not None)
    facts = check_root(backend, report, bool(workers))
    check_contiguous(workers, report)
    for key in workers:
        if not ranks or key[0] in ranks:
            if progress:
                progress(f"worker {key[0]}" + (f", attempt {key[1]}" if key[1] else ""))
            _Worker(backend, key, report, quick).run()
    check_writers(backend, facts, workers, ranks, report)
    _check_rest(backend, report)
    return report


# --- what belongs to the run ---


def _check_rest(backend: Backend, report: Report) -> None:
    """Check what lies outside of the workers."""
    there: set[str] = set()
    for item in _outside(backend):
        there.add(item.name)
        report.objects += 1
        report.bytes += item.size
        if item.name == ROOT:
            continue
        key = parse_key(item.name)
        if key is None or key.worker is not None:
            _orphan(report, item, None)
        elif item.size > LARGEST_ROOT:
            report.broken(Damage(item.name, f"has {item.size:,} bytes"))
        else:
            _check_small(backend, report, item.name)
    for name in PLAIN:
        if f"{name}/zarr.json" not in there:
            report.broken(Damage(f"{name}/zarr.json", "is missing"))


def _outside(backend: Backend) -> Iterator[Listed]:
    for item in backend.list(""):
        if not item.folder:
            yield item
        elif item.name != "workers":
            yield from backend.walk(item.name)
    for item in backend.list("workers"):
        if not item.folder:
            yield Listed(f"workers/{item.name}", False, item.size, item.modified)
        elif parse_worker(item.name) is None:
            yield from backend.walk(f"workers/{item.name}")


def _check_small(backend: Backend, report: Report, name: str) -> None:
    try:
        data = backend.get(name)
    except Missing:
        return
    problem = ""
    if name.endswith("/zarr.json"):
        problem = plain_group_problem(data)
    else:
        try:
            found = json.loads(data)
            if name == STOP and report.run_id and found["run_id"] != report.run_id:
                problem = "it names another run"
        except BROKEN as error:
            problem = unread(error)
    if problem:
        report.broken(Damage(name, problem))


def _orphan(report: Report, item: Listed, worker: Worker | None, what: str = "") -> None:
    partial = _PARTIAL.match(item.name)
    if partial and parse_key(f"{partial[1] or ''}{partial[2]}") is not None:
        running = worker is not None and report.workers[worker].status == "running"
        young = running and time.time() - item.modified < SILENT_SECONDS
        what = "being written" if young else "left by a writer that died"
        report.left(Orphan(item.name, what, item.size, item.modified, worker))
    elif what:
        report.left(Orphan(item.name, what, item.size, item.modified, worker))
    elif item.name == UNFINISHED:
        report.left(Orphan(item.name, "a copy or a deletion was not finished", item.size, item.modified, ours=False))
    else:
        report.left(Orphan(item.name, "not part of the format", item.size, item.modified, worker, ours=False))


# --- a worker ---


class _Worker:
    """One attempt of a worker."""

    def __init__(self, backend: Backend, key: Worker, report: Report, quick: bool) -> None:
        self.backend, self.key, self.report, self.quick = backend, key, report, quick
        self.base = worker_key(*key)
        self.state = report.workers.setdefault(key, WorkerState())

    def run(self) -> None:
        """Check it. The log is read before the catalogue, and that before the listing: each is put before the last."""
        log_chunks = {
            key.index[0]: item.size
            for item in self.backend.walk(f"{self.base}/{LOG}/c")
            if (key := parse_key(item.name)) is not None and len(key.index) == 2 and key.index[1] == 0
        }
        number = 0
        while number in log_chunks or unlisted(self.backend, [f"{self.base}/{LOG}/c/{number}/0"]):
            log_chunks.setdefault(number, log_spec().chunk_bytes + CRC)
            number += 1
        scratch = Report("")
        log, whole = read_log(self.backend, self.key, self.base, log_chunks, 0, scratch)
        catalogue, children = self._catalogue()
        items = list(self.backend.walk(self.base))
        self.state.newest = max((item.modified for item in items), default=0.0)
        self.report.objects += len(items)
        self.report.bytes += sum(item.size for item in items)
        if catalogue is None:
            self.report.unknown = True
            for damage in scratch.damage:
                self.report.broken(damage)
            return
        self.state.status = catalogue.status
        rows = children[LOG]["shape"][0]
        trimmed = catalogue.status != "running" and len(log) == rows
        least = catalogue.chunks - (0 if catalogue.status == "completed" or rows % LOG_ROWS else 1)
        if least > len(log_chunks) and not scratch.damage:
            missing = next(i for i in range(least) if i not in log_chunks)
            lacking = f"{self.base}/{LOG}/c/{missing}/0"
            scratch.broken(Damage(lacking, "is missing: the steps it lists are lost", self.key))
        for damage in scratch.damage:
            self.report.broken(damage)
        whole = whole and not scratch.damage
        if whole and catalogue.status == "completed" and len(log) != rows:
            what = f"lists {len(log):,} steps, and the worker's zarr.json {rows:,}"
            self.report.broken(Damage(f"{self.base}/{LOG}/c/{max(0, len(log) - 1) // LOG_ROWS}/0", what, self.key))
        one = Attempt(*self.key, catalogue.facts, catalogue.entries, catalogue.specs, log)
        check_log(one, self.key, self.report)
        self.state.readable = whole
        self.report.unknown |= not whole
        there, jsons, strange = _sorted_out(items)
        used = self._collections(one, there, trimmed)
        self._children(one, children, jsons, trimmed)
        for item in strange:
            _orphan(self.report, item, self.key)
        if whole:
            self._orphans(items, used, children, len(log_chunks))

    def _catalogue(self) -> tuple[Catalogue | None, dict[str, Any]]:
        name = f"{self.base}/zarr.json"
        try:
            data = self.backend.get(name)
            catalogue = parse_catalogue(f"{self.backend.url}/{self.base}", data, self.key)
        except Missing:
            self.report.broken(Damage(name, "is missing: nothing of this worker can be read", self.key))
            return None, {}
        except DamagedData as error:
            what = str(error).rsplit("zarr.json ", 1)[-1].removeprefix(f"{self.backend.url}/{self.base}: ")
            if error.__cause__ is not None and what.startswith("is damaged"):
                what = unread(error.__cause__)
            self.report.broken(Damage(name, f"{what}: nothing of this worker can be read", self.key))
            return None, {}
        problem = worker_problem(data)
        if problem:
            self.report.broken(Damage(name, problem, self.key))
        return catalogue, json.loads(data)["consolidated_metadata"]["metadata"]

    def _collections(
        self, one: Attempt, there: Mapping[str, Mapping[tuple[int, ...], int]], trimmed: bool
    ) -> dict[str, set[tuple[int, ...]]]:
        used: dict[str, set[tuple[int, ...]]] = {}
        for name in one.bits:
            check = Check(self.backend, one, self.key, name, there, self.report, self.quick)
            check.run()
            used.update(check.used)
            path = f"{name}/step"
            used[path] = check_coordinate(self.backend, one, self.key, name, there.get(path, {}), trimmed, self.report)
        return used

    def _children(self, one: Attempt, children: Mapping[str, Any], jsons: Mapping[str, int], trimmed: bool) -> None:
        """Hold each zarr.json below the worker against its copy in the worker's own."""
        # Of a writer that was killed between its catalogue and the commit that needs it, arrays may not have begun.
        newest = int(one.log[-1, VERSION]) if len(one.log) else 0
        ahead = one.facts["status"] == "running" and int(one.facts["catalogue_version"]) > newest
        for path, copy in children.items():
            key = f"{self.base}/{path}/zarr.json"
            if path not in jsons and not unlisted(self.backend, [key]):
                if ahead:
                    continue
                self.report.broken(Damage(key, "is missing (plain Zarr readers need it)", self.key))
                continue
            if jsons.get(path, 0) > LARGEST_ROOT:
                self.report.broken(Damage(key, f"has {jsons[path]:,} bytes", self.key))
                continue
            try:
                data = self.backend.get(key)
            except Missing:
                continue
            home = path.split("/", 1)[0]
            rows = len(one.log) if path == LOG else len(one.rows_of(home))
            settled = one.facts["status"] == "completed" and self.state.readable
            problem = child_problem(path, data, copy, rows, settled)
            if problem and self.state.readable:
                self.report.broken(Damage(key, problem, self.key))
            if self.state.readable and not sensible(path, copy, rows, settled):
                self._own_damaged(f"what it says of {path} is not what a writer makes of {rows:,} rows")
            elif problem == DIFFERS:
                self._own_damaged(f"what it says of {path} differs from that array's own zarr.json; see there")

    def _own_damaged(self, what: str) -> None:
        own = f"{self.base}/zarr.json"
        if own not in self.report.damaged_objects:
            self.report.broken(Damage(own, what, self.key))

    def _orphans(
        self,
        items: list[Listed],
        used: Mapping[str, set[tuple[int, ...]]],
        children: Mapping[str, Any],
        log_chunks: int,
    ) -> None:
        for item in items:
            key = parse_key(item.name)
            if key is None or not key.array:
                continue
            if not key.index:
                if key.array not in children:
                    _orphan(self.report, item, self.key, "the worker knows no such array")
            elif key.array == LOG:
                if key.index[1:] != (0,):
                    _orphan(self.report, item, self.key, _UNREFERENCED)
            elif key.index not in used.get(key.array, ()):
                _orphan(self.report, item, self.key, _UNREFERENCED)


def _sorted_out(
    items: list[Listed],
) -> tuple[dict[str, dict[tuple[int, ...], int]], dict[str, int], list[Listed]]:
    """Return objects by array and index, the sizes of zarr.json by path, and what is neither."""
    there: dict[str, dict[tuple[int, ...], int]] = {}
    jsons: dict[str, int] = {}
    strange: list[Listed] = []
    for item in items:
        key = parse_key(item.name)
        if key is None:
            strange.append(item)
        elif key.index:
            there.setdefault(key.array, {})[key.index] = item.size
        else:
            jsons[key.array] = item.size
    return there, jsons, strange


def is_alive(state: WorkerState, now: float | None = None) -> bool:
    """Tell whether somebody may still write this attempt: it says so, and put something in the last minute."""
    now = time.time() if now is None else now
    return state.status in ("running", "") and now - state.newest <= LOST_SECONDS
