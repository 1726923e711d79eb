"""A run as it stands in the store: which workers there are, what they have committed, and following them.

Nothing is believed that the commit log does not list, and no size from metadata is acted on before it is checked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smdbg.errors import DamagedData, NewerFormat, NotARun, RunNotFound
from smdbg.store.attempt import ENDED, Attempt, Catalogue, Log, parse_catalogue, parse_log
from smdbg.store.backend import Backend, Fetched, Missing
from smdbg.store.checks import check_root
from smdbg.store.format import (
    FLAG_DROPPED,
    FORMAT,
    LOG_COLUMNS,
    LOG_ROWS,
    log_spec,
    parse_worker,
    worker_key,
)
from smdbg.store.keys import LARGEST_ROOT, ROOT, read_bounded
from smdbg.store.values import Values

__all__ = ["Attempt", "StoredRun"]

LOST_SECONDS = 60.0
LOOK_SECONDS = 30.0  # between looks for workers and attempts that nothing announces
FEW_CHUNKS = 16  # of a log; more are not asked for before they were seen in a listing
SMALL_TABLE = 8 << 20
TRIES = 3  # to find the catalogue that the log speaks of

Key = tuple[int, int]
_SAVED, _RAW = LOG_COLUMNS.index("saved"), LOG_COLUMNS.index("raw")
_VERSION, _FLAGS = LOG_COLUMNS.index("catalogue_version"), LOG_COLUMNS.index("flags")


@dataclass(eq=False)
class _Worker:
    """What is known of one attempt of a worker, and how the store called the versions that were read."""

    key: Key
    url: str
    catalogue: Catalogue
    group_tag: str
    parts: list[Log] = field(default_factory=list)  # rows of each chunk of the log
    log_tag: str = ""  # of the last chunk
    mark: int = 0
    seen: float = 0.0  # last sign of life, by the store's clock
    asked: int = 0  # times the catalogue was asked for since the log went ahead of it
    silent: bool = False  # the store did not tell when the log was last put
    looked: float = 0.0
    attempt: Attempt | None = None

    @property
    def base(self) -> str:
        return worker_key(*self.key)

    @property
    def running(self) -> bool:
        return self.catalogue.status == "running"

    def log_key(self, chunk: int) -> str:
        return f"{self.base}/{log_spec().key(chunk * LOG_ROWS)}"

    def first_asks(self) -> list[_Ask]:
        """Return what to poll: the last chunk of the log or, where it is full, the next.

        The end of a worker is in its group, put after the log. Where the log does not tell of it, the group is polled.
        """
        tells = self.mark and time.time() - self.seen < LOST_SECONDS / 2  # a writer that broke down may not have
        return [self.log_ask()] if tells else [self.log_ask(), _Ask(self, None, self.group_tag)]

    def log_ask(self) -> _Ask:
        full = bool(self.parts) and len(self.parts[-1]) == LOG_ROWS
        chunk = len(self.parts) if full or not self.parts else len(self.parts) - 1
        return _Ask(self, chunk, "" if chunk == len(self.parts) else self.log_tag, follow=True)

    def behind(self) -> bool:
        """Tell whether the group that is held is older than what the log says."""
        newest = int(self.parts[-1][-1, _VERSION]) if self.parts and len(self.parts[-1]) else 0
        return self.catalogue.version < newest or (self.mark == ENDED and self.running)

    def view(self) -> Attempt:
        """Return the attempt as it is known now; the same object while nothing changes."""
        if self.attempt is None:
            rows = np.concatenate(self.parts) if self.parts else np.zeros((0, len(LOG_COLUMNS)), np.int64)
            told = self.catalogue
            if "pruned" in told.facts:  # bits of collections that were taken out stay in the log
                rows = rows.copy()
                rows[:, [_SAVED, _RAW]] &= sum(1 << int(about["bit"]) for about in told.facts["collections"].values())
            self.attempt = Attempt(*self.key, told.facts, told.entries, told.specs, rows)
        self.attempt.last_commit = self.seen
        return self.attempt


@dataclass(frozen=True)
class _Ask:
    """A request for a chunk of a worker's log (None: for its group), unless it is as the tag says.

    `follow`: further chunks are looked for behind a full one, whatever the group says.
    """

    worker: _Worker
    chunk: int | None
    tag: str = ""
    follow: bool = False

    @property
    def key(self) -> str:
        return f"{self.worker.base}/zarr.json" if self.chunk is None else self.worker.log_key(self.chunk)


class StoredRun(Values):
    """A run as it stands in the store. `damaged` tells of workers, by rank and attempt, that cannot be read."""

    def __init__(self, backend: Backend, attempt: str | int = "latest") -> None:
        """Read root, worker groups and logs. Raises RunNotFound, NotARun, NewerFormat, DamagedData, StoreError.

        What is damaged of some workers only is kept out; where no worker can be read, it is raised.
        """
        super().__init__(backend, SMALL_TABLE)
        self._which = attempt
        self._workers: dict[Key, _Worker] = {}
        self._looked = 0.0
        self.damaged: dict[Key, str] = {}
        self.attempts: list[Attempt] = []
        self.root = _read_root(backend)
        self.refresh()
        if self.damaged and not self.attempts:
            raise DamagedData(next(iter(self.damaged.values())))

    def refresh(self) -> None:
        """Read what a running run may have added: one conditional request a worker where nothing was."""
        newest = {rank: self._workers[rank, number] for rank, number in sorted(self._workers)}
        following = [w for w in self._workers.values() if w.running and (w is newest[w.key[0]] or _lively(w))]
        was_damaged, self.damaged = bool(self.damaged), {}
        _ask(self.backend, [ask for worker in following for ask in worker.first_asks()], self.damaged)
        for worker in following:
            self._look_for_life(worker)
        pruned = self._forget_changed([w for w in self._workers.values() if w not in following])
        if was_damaged or pruned or self._time_to_look(newest.values()):
            self._look()
        self.attempts = [self._workers[key].view() for key in sorted(self._workers) if not self._hidden(key)]
        self._supersede()

    def _forget_changed(self, ended: Sequence[_Worker]) -> bool:
        """Forget ended workers whose group has changed, by pruning; they are then read anew. True if there is one."""
        found = self.backend.newer([(f"{worker.base}/zarr.json", worker.group_tag) for worker in ended])
        changed = [w for w, now in zip(ended, found, strict=True) if now is None or not now.same]
        for worker in changed:
            del self._workers[worker.key]
            for key in [key for key in self._cache if key[0] == worker.base]:
                del self._cache[key]
        return bool(changed)

    def _time_to_look(self, newest: Iterable[_Worker]) -> bool:
        """Tell whether there may be workers, or attempts, that are not known: some is missing, has ended or is lost."""
        known = {worker.key[0]: worker for worker in newest}
        now = time.time()
        return (
            time.monotonic() - self._looked >= LOOK_SECONDS
            or not set(self.root["writers"]) <= set(known)
            or any(not worker.running or now - worker.seen > LOST_SECONDS for worker in known.values())
        )

    def _look(self) -> None:
        """List the workers and read those that are new; what was damaged is tried again."""
        self._looked = time.monotonic()
        names = [item.name for item in self.backend.list("workers")]
        keys = sorted(found for name in names if (found := parse_worker(name)) is not None)
        fresh = _open_workers(self.backend, [key for key in keys if key not in self._workers], self.damaged)
        self._workers.update({worker.key: worker for worker in fresh})

    def _look_for_life(self, worker: _Worker) -> None:
        """Ask when the log was last put, where an unchanged one did not tell and it matters."""
        now = time.monotonic()
        if worker.silent and time.time() - worker.seen > LOST_SECONDS / 2 and now - worker.looked > LOOK_SECONDS / 2:
            worker.looked = now
            last = max(0, len(worker.parts) - 1)
            times = [item.modified for item in self.backend.list(f"{worker.base}/steps/c/{last}") if not item.folder]
            worker.seen = max([worker.seen, *times])

    def _hidden(self, key: Key) -> bool:
        """Tell whether a later attempt that cannot be read may have superseded this one."""
        return self._which == "latest" and any(rank == key[0] and number > key[1] for rank, number in self.damaged)

    def _supersede(self) -> None:
        for one in self.attempts:
            later = [o for o in self.attempts if o.rank == one.rank and o.attempt > one.attempt and len(o.log)]
            one.until = min((int(o.log[:, 0].min()) for o in later), default=None)

    def of_rank(self, rank: int) -> list[Attempt]:
        """Return the attempts of a worker that are to be looked at, oldest first."""
        mine = [one for one in self.attempts if one.rank == rank]
        return [one for one in mine if one.attempt == self._which] if isinstance(self._which, int) else mine

    def visible(self, one: Attempt) -> NDArray[np.bool_]:
        """Tell for each log row of an attempt whether it is to be shown."""
        if self._which != "latest":
            return np.ones(len(one.log), bool)
        return one.lasting if one.until is None else one.lasting & (one.log[:, 0] < one.until)

    def log_rows(self, rank: int) -> Log:
        """Return the visible log rows of a worker over its attempts, in order."""
        parts = [one.log[self.visible(one)] for one in self.of_rank(rank)]
        return np.concatenate(parts) if parts else np.zeros((0, len(LOG_COLUMNS)), np.int64)

    # --- status ---

    def status(self, now: float | None = None) -> str:
        """Return running, completed, lost or 'failed: reason', derived from the workers."""
        now = time.time() if now is None else now
        newest = {one.rank: one for one in self.attempts}  # attempts are in order, so the last one stays
        states = {rank: str(one.facts["status"]) for rank, one in newest.items()}
        failed = [state for state in states.values() if state.startswith("failed")]
        failed += [f"failed: worker {rank} cannot be read" for rank, _ in sorted(self.damaged)]
        if failed:
            return failed[0]
        if all(states.get(rank) == "completed" for rank in self.root["writers"]):
            return "completed"
        # A writer may never have begun; it is not waited for forever.
        return "lost" if any(self.lost(rank, now) for rank in {*newest, *self.root["writers"]}) else "running"

    def lost(self, rank: int, now: float) -> bool:
        """Tell whether a writer has been silent for more than 60 s without having ended; `now` in unix seconds.

        Of one that never began, the age is the run's.
        """
        mine = [one for one in self.attempts if one.rank == rank]
        if not mine:
            return now - self._began() > LOST_SECONDS
        return mine[-1].facts["status"] == "running" and now - mine[-1].last_commit > LOST_SECONDS

    def _began(self) -> float:
        """Return when the run was begun, by the store's clock."""
        return max((item.modified for item in self.backend.list("") if item.name == "zarr.json"), default=0.0)


def _lively(worker: _Worker) -> bool:
    """Tell whether an attempt that was superseded may still write; it notices within a heartbeat."""
    return time.time() - worker.seen <= LOST_SECONDS


def _read_root(backend: Backend) -> dict[str, Any]:
    try:
        data = json.loads(read_bounded(backend, ROOT, LARGEST_ROOT))
        facts = data["attributes"]["smdbg"]
        version = facts["format"]
    except Missing:
        if backend.list(""):
            raise NotARun(f"{backend.url} is not a run: there is no zarr.json in it. `smdbg runs` lists runs") from None
        raise RunNotFound(f"{backend.url}: there is no run: check the URL, or list runs with `smdbg runs`") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise NotARun(f"{backend.url} is not a run: its zarr.json was not written by smdbg") from None
    if not isinstance(version, int) or version > FORMAT:
        raise NewerFormat(f"{backend.url} has format {version!r}; this smdbg reads up to {FORMAT}: upgrade it")
    if not isinstance(facts.get("writers"), list) or not all(isinstance(r, int) for r in facts["writers"]):
        raise NotARun(f"{backend.url} is not a run: its zarr.json does not say who writes it")
    check_root(backend.url, facts)
    return dict(facts)


def _open_workers(backend: Backend, keys: Sequence[Key], damaged: dict[Key, str]) -> list[_Worker]:
    """Read groups and then logs; a worker whose group is not there yet is left out, as is one that is damaged."""
    opened: list[_Worker] = []
    for key, found in zip(keys, backend.newer([(worker_key(*key) + "/zarr.json", "") for key in keys]), strict=True):
        if found is None:
            continue
        name = f"{backend.url}/{worker_key(*key)}"
        try:
            worker = _Worker(key, name, parse_catalogue(name, found.data, key), found.tag, seen=found.modified)
            if worker.catalogue.chunks > FEW_CHUNKS:
                _check_log_is_there(backend, worker)
            opened.append(worker)
        except DamagedData as error:
            damaged[key] = str(error)
    _ask(backend, [_Ask(worker, i) for worker in opened for i in range(worker.catalogue.chunks)], damaged)
    for worker in opened:  # what was read was put before the group that says it has completed
        rows = sum(map(len, worker.parts))
        if worker.key not in damaged and worker.catalogue.status == "completed" and rows != worker.catalogue.rows:
            told = f"lists {rows:,} steps, and the worker's zarr.json {worker.catalogue.rows:,}"
            damaged[worker.key] = f"{worker.url}/steps: {told}"
    return [worker for worker in opened if worker.key not in damaged]


def _check_log_is_there(backend: Backend, worker: _Worker) -> None:
    """Raise DamagedData if chunks of a long log do not lie there: one listing, in place of up to 2^20 requests.

    The last one may be yet to come.
    """
    there = {item.name for item in backend.list(f"{worker.base}/steps/c")}
    for chunk in range(worker.catalogue.chunks - 1):
        if str(chunk) not in there:
            raise DamagedData(f"{worker.url}/steps, chunk {chunk} of {worker.catalogue.chunks}: missing")


def _ask(backend: Backend, asks: Sequence[_Ask], damaged: dict[Key, str]) -> None:
    """Make requests, all at once, and those that the answers call for, until nothing is open."""
    while asks:
        further: list[_Ask] = []
        found = backend.newer([(ask.key, ask.tag) for ask in asks])
        for ask, answer in zip(asks, found, strict=True):
            if ask.worker.key in damaged:
                continue
            try:
                further += _take_group(ask.worker, answer) if ask.chunk is None else _take_log(ask, ask.chunk, answer)
            except DamagedData as error:
                damaged[ask.worker.key] = str(error)
        asks = list(dict.fromkeys(further))


def _take_log(ask: _Ask, chunk: int, answer: Fetched | None) -> list[_Ask]:
    """Take a chunk of the log, and return what has to be asked next."""
    worker, where = ask.worker, f"{ask.worker.url}/steps, chunk {chunk}"
    if answer is None:
        # Of a worker that writes, the last one may be yet to come.
        if chunk < len(worker.parts) or chunk < worker.catalogue.chunks - (worker.catalogue.status != "completed"):
            raise DamagedData(f"{where}: missing")
        worker.silent = True
        return []
    worker.silent = answer.same and not answer.modified
    worker.seen = max(worker.seen, answer.modified)
    if answer.same:
        return []
    rows, worker.mark = parse_log(where, answer.data)
    held = len(worker.parts[chunk]) if chunk < len(worker.parts) else 0
    if chunk > len(worker.parts) or len(rows) < held:
        raise DamagedData(f"{where}: is shorter than it was")
    worker.parts[chunk:] = [rows]
    worker.log_tag, worker.attempt = answer.tag, None
    further = []
    if len(rows) == LOG_ROWS and ask.follow and (worker.running or chunk + 1 < worker.catalogue.chunks):
        further.append(_Ask(worker, chunk + 1, follow=True))
    dropped = bool((rows[held:, _FLAGS] & FLAG_DROPPED).any())
    if worker.behind() or (dropped and ask.follow and worker.running):
        further.append(_Ask(worker, None, worker.group_tag))
    return further


def _take_group(worker: _Worker, answer: Fetched | None) -> list[_Ask]:
    """Take a worker's group, and return what has to be asked next."""
    if answer is None:
        raise DamagedData(f"{worker.url}/zarr.json: missing")
    further = []
    if not answer.same:
        was_running = worker.running
        worker.catalogue = parse_catalogue(worker.url, answer.data, worker.key)
        worker.group_tag, worker.attempt = answer.tag, None
        # The log was read before the group, so its last rows may have come in between.
        if was_running and not worker.running and worker.mark != ENDED:
            log = worker.log_ask()
            further = [log] if log.tag or (log.chunk or 0) < worker.catalogue.chunks else []
    worker.asked = worker.asked + 1 if worker.behind() else 0
    if 0 < worker.asked < TRIES:
        further.append(_Ask(worker, None))
    elif worker.asked:
        worker.asked = 0
    return further
