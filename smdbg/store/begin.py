"""How a run, and each life of a worker in it, comes into being: create-only puts, so that nobody overwrites anybody."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from smdbg.errors import AccessRefused, NotARun, RunExists
from smdbg.store.backend import Backend, Missing
from smdbg.store.format import FORMAT, canonical, group_json, log_spec, parse_worker, worker_key
from smdbg.store.format import array_json as _array_json
from smdbg.store.worker_group import WorkerFacts, sealed_group, with_checksum, worker_attributes

SUBGROUPS = ("workers", "control", "checks")


@dataclass(frozen=True)
class RunFacts:
    """What the root group says of a run. All of it must be JSON-able; NaN and infinities are given as text."""

    world_size: int = 1
    writers: tuple[int, ...] = (0,)
    framework: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    argv: tuple[str, ...] = ()
    git_commit: str = ""
    seed: int | None = None
    host: str = ""


def begin(
    backend: Backend, run: RunFacts, rank: int, *, resume: bool = False, mesh: Mapping[str, int] | None = None
) -> WorkerFacts:
    """Make the run if it is not there, and a worker group of our own in it.

    Raises RunExists, with nothing written, where there is a run (or this worker of it) and `resume` is off; NotARun
    where something else is in the way; StoreError and AccessRefused from the store.
    """
    writer_id = uuid.uuid4().hex
    root = {
        "format": FORMAT,
        "run_id": uuid.uuid4().hex[:16],
        "created": time.time(),
        "world_size": run.world_size,
        "writers": list(run.writers),
        "framework": run.framework,
        "versions": dict(run.versions),
        "hyperparameters": dict(run.hyperparameters),
        "argv": list(run.argv),
        "git_commit": run.git_commit,
        "seed": run.seed,
        "host": run.host,
        "writer_id": writer_id,
    }
    if not backend.create("zarr.json", _dump(group_json({"smdbg": with_checksum(root)}))):
        _join(backend, run, rank, writer_id, resume)
    for name in SUBGROUPS:
        backend.create(f"{name}/zarr.json", _dump(group_json({})))
    attempt = _next_attempt(backend, rank) if resume else 0
    while True:
        facts = WorkerFacts(rank, attempt, writer_id, dict(mesh or {}))
        if _claim(backend, facts):
            return facts
        if not resume:
            raise _exists(backend)
        attempt += 1


def _dump(data: Any) -> bytes:
    canonical(data)  # raises on NaN before anything is written
    return json.dumps(data, allow_nan=False).encode()


def _claim(backend: Backend, facts: WorkerFacts) -> bool:
    """Put the worker group, create-only; a put whose answer got lost is recognised by our own id."""
    key = worker_key(facts.rank, facts.attempt) + "/zarr.json"
    children = {"steps": _array_json(log_spec(), 0)}
    group = sealed_group(worker_attributes(facts, "running"), children)
    return backend.create(key, _dump(group)) or _written_by(backend, key) == facts.writer_id


def _written_by(backend: Backend, key: str) -> str | None:
    try:
        data = json.loads(backend.get(key))
        return str(data["attributes"]["smdbg"]["writer_id"])
    except (AccessRefused, Missing):
        return None  # a role that may only put cannot look; the conditional put has spoken
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _join(backend: Backend, run: RunFacts, rank: int, writer_id: str, resume: bool) -> None:
    """There is a root group: go on if it is ours, our run's, or to be resumed."""
    try:
        data = json.loads(backend.get("zarr.json"))
    except AccessRefused:
        if run.world_size > 1:
            return  # we may only put; another rank made it, and the worker group will be the guard
        raise _exists(backend) from None
    except (ValueError, RecursionError) as error:
        raise NotARun(f"{backend.url}: there is a zarr.json that is not JSON: use another URL") from error
    facts = data.get("attributes", {}).get("smdbg") if isinstance(data, dict) else None
    if not isinstance(facts, dict):
        raise NotARun(f"{backend.url}: there is a Zarr store that is not a run of smdbg: use another URL")
    if facts.get("writer_id") == writer_id or resume:
        return
    same_run = run.world_size > 1 and facts.get("world_size") == run.world_size and rank in facts.get("writers", ())
    if not same_run:
        raise _exists(backend)
    try:
        backend.get(worker_key(rank, 0) + "/zarr.json")
    except (Missing, AccessRefused):
        return
    raise _exists(backend)


def _exists(backend: Backend) -> RunExists:
    return RunExists(f"{backend.url}: a run exists: pass resume=True to continue it, or another URL")


def _next_attempt(backend: Backend, rank: int) -> int:
    found = [parse_worker(item.name) for item in backend.list("workers") if item.folder]
    return max((attempt + 1 for known in found if known for r, attempt in [known] if r == rank), default=0)
