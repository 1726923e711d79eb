"""The commit log of one attempt and its `step` coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smdbg.errors import DamagedData
from smdbg.store.attempt import Attempt, parse_log
from smdbg.store.backend import Backend
from smdbg.store.format import LOG_COLUMNS, LOG_ROWS, MODES, step_spec
from smdbg.store.shard import CRC, intact
from smdbg.store.verify_report import Damage, Report, Worker, damage_of
from smdbg.store.verify_shards import fetched, size_problem, unlisted

Log = NDArray[np.int64]
_COLUMN = {name: i for i, name in enumerate(LOG_COLUMNS)}


def read_log(
    backend: Backend, worker: Worker, base: str, chunks: Mapping[int, int], least: int, report: Report
) -> tuple[Log, bool]:
    """Return the rows of the log up to the first damage, and whether that is all of it.

    `chunks`: number -> size of those that are there; `least`: how many there must be, by the metadata.
    """
    parts: list[Log] = []
    whole = True
    count = max(least, max(chunks, default=-1) + 1)
    for number in range(min(count, len(chunks) + 1)):
        if number not in chunks:
            report.broken(Damage(f"{base}/steps/c/{number}/0", "is missing: the steps it lists are lost", worker))
            whole = False
            break
    wanted = ((f"{base}/steps/c/{i}/0", chunks[i]) for i in range(count) if i in chunks)
    if count > len(chunks) + 1 and whole:
        whole = False
    for number, (key, data) in enumerate(fetched(backend, wanted)):
        try:
            if data is None:
                raise DamagedData(f"{key}: is missing")
            rows, _ = parse_log(key, data)
            if len(rows) < LOG_ROWS and number < len(chunks) - 1:
                raise DamagedData(f"{key}: ends before the next one begins")
        except DamagedData as error:
            what = str(error).split(": ", 1)[-1]
            report.broken(Damage(key, f"{what}: the steps from here on are lost", worker))
            whole = False
            continue
        if whole:
            parts.append(rows)
    return (np.concatenate(parts) if parts else np.zeros((0, len(LOG_COLUMNS)), np.int64)), whole


def check_log(one: Attempt, worker: Worker, report: Report) -> None:
    """Note rows of the log that no writer makes."""
    log = one.log
    known = 0
    for bit in one.bits.values():
        known |= 1 << bit
    pruned = one.facts.get("pruned")
    left = isinstance(pruned, dict) and any(isinstance(a, dict) and a.get("what") == "all" for a in pruned.values())
    saved, raw = log[:, _COLUMN["saved"]], log[:, _COLUMN["raw"]]
    versions = log[:, _COLUMN["catalogue_version"]]
    bad = {
        "have a step below 0": (log[:, 0] < 0) | (log[:, _COLUMN["mode_step"]] < 0),
        "have an unknown mode": (log[:, 1] < 0) | (log[:, 1] >= len(MODES)),
        "have an end time below 0": log[:, _COLUMN["end_time"]] < 0,
        "name a collection that there is not": ((saved & ~known) != 0) & (not left),
        "have values of what was not saved": (raw & ~saved) != 0,
        "need a newer catalogue than there is": versions > int(one.facts["catalogue_version"]),
    }
    for what, rows in bad.items():
        at = np.flatnonzero(rows)
        for chunk in np.unique(at // LOG_ROWS):
            inside = at[at // LOG_ROWS == chunk]
            key = f"{one.base}/steps/c/{chunk}/0"
            report.broken(damage_of(key, f"{len(inside)} rows {what}", worker, (), log[inside, 0]))


def check_coordinate(
    backend: Backend,
    one: Attempt,
    worker: Worker,
    collection: str,
    there: Mapping[tuple[int, ...], int],
    ended: bool,
    report: Report,
) -> set[tuple[int, ...]]:
    """Hold a collection's `step` array against the log. Return the chunks that the log refers to."""
    spec = step_spec(collection)
    steps = one.log[one.rows_of(collection), 0]
    full = len(steps) // LOG_ROWS
    count = -(-len(steps) // LOG_ROWS) if ended else full
    used: set[tuple[int, ...]] = {(i,) for i in range(-(-len(steps) // LOG_ROWS))}
    wanted = []
    for i in range(count):
        key, part = f"{one.base}/{spec.path}/c/{i}", steps[i * LOG_ROWS : (i + 1) * LOG_ROWS]
        if (i,) not in there and not unlisted(backend, [key]):
            report.broken(damage_of(key, "is missing (plain Zarr readers take steps from it)", worker, (), part))
        else:
            size = there.get((i,), spec.chunk_bytes + CRC)
            problem = size_problem(spec, size, 1)
            if problem:
                report.broken(damage_of(key, problem, worker, (), part))
            else:
                wanted.append((key, size))
    for key, data in fetched(backend, wanted):
        number = int(key.rsplit("/", 1)[-1])
        part = steps[number * LOG_ROWS : (number + 1) * LOG_ROWS]
        problem = _coordinate_problem(data, part)
        if problem:
            report.broken(damage_of(key, problem, worker, (), part))
    return used


def _coordinate_problem(data: bytes | None, steps: NDArray[Any]) -> str:
    if data is None:
        return "is missing (plain Zarr readers take steps from it)"
    if len(data) != LOG_ROWS * 8 + CRC or not intact(memoryview(data)):
        return "does not match its checksum (plain Zarr readers take steps from it)"
    same = np.array_equal(np.frombuffer(data, "<i8", len(steps)), steps)
    return "" if same else "its steps are not those of the log"
