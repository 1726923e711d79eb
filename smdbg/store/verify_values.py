"""Are the statistics that are kept those of the values that are kept? Beyond what checksums tell."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from smdbg import stats as statistics
from smdbg.errors import DamagedData, MissingExtra
from smdbg.store.attempt import Attempt
from smdbg.store.backend import Backend
from smdbg.store.format import Entry, product, worker_key
from smdbg.store.reader import StoredRun
from smdbg.store.verify_report import Report, damage_of

BATCH = 32 << 20  # bytes of values held at once
COMPARED = ("count", "nan", "min", "max")


def verify_values(backend: Backend, report: Report, ranks: tuple[int, ...] = ()) -> int:
    """Hold each value that is kept against its statistics; return how many were compared.

    Values that were cast to another dtype, texts and numbers recorded several times a step have others by nature.
    """
    run, compared = StoredRun(backend, "all"), 0
    for one in run.attempts:
        for entry in one.entries.values():
            if (not ranks or one.rank in ranks) and _comparable(entry):
                compared += _entry(run, one, entry, report)
    return compared


def _comparable(entry: Entry) -> bool:
    text = entry.info.dtype.startswith(("str", "bytes", "M8", "m8"))
    return bool(entry.slots) and not text and all(slot.dtype == entry.slots[0].dtype for slot in entry.slots)


def _entry(run: StoredRun, one: Attempt, entry: Entry, report: Report) -> int:
    home = entry.info.collection
    log_rows = one.rows_of(home)
    rows = np.flatnonzero(one.raw_at(home, log_rows))
    rows = rows[rows >= entry.since]
    item = one.specs[f"{home}/{entry.slots[0].array}"].itemsize
    step = max(1, BATCH // max(1, item * max(slot.capacity for slot in entry.slots)))
    compared = 0
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        try:
            compared += _rows(run, one, entry, part, log_rows, report)
        except (DamagedData, MissingExtra):
            continue  # what is damaged was reported already
    return compared


def _rows(
    run: StoredRun, one: Attempt, entry: Entry, rows: NDArray[np.int64], log_rows: NDArray[np.int64], report: Report
) -> int:
    compared = 0
    for names, table in run.statistic_tables(one, entry, rows):
        wanted = [name for name in COMPARED if name in names]
        if "last" in names or len(wanted) < 2:
            continue
        there = np.flatnonzero(~np.isnan(table[:, 0]))
        if not there.size or (entry.slots[0].dtype != entry.info.dtype):
            continue
        columns = [names.index(name) for name in wanted]
        bad = []
        for at, value in zip(there, run.values(one, entry, rows[there]), strict=True):
            if product(value.shape) == 0:
                continue
            found = statistics.compute(value, tuple(wanted))
            compared += 1
            if not np.array_equal(found, table[at, columns], equal_nan=True):
                bad.append(int(one.log[log_rows[rows[at]], 0]))
        if bad:
            key = f"{worker_key(one.rank, one.attempt)}/{entry.info.collection}/{entry.slots[0].array}"
            what = "values are not those that the statistics were made of"
            report.broken(damage_of(key, what, (one.rank, one.attempt), [entry.info.name], np.array(bad)))
    return compared
