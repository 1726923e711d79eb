"""Statistics of stored tensors, as they were kept or derived: of one tensor, or of many at once as a matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from smdbg import stats as statistics
from smdbg.store.format import Entry
from smdbg.store.reader import Attempt, StoredRun

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]

LAST = "last"  # of a number recorded several times in a step; where it was recorded once, the number itself
_OF_NUMBERS = statistics.ALWAYS + statistics.EXTRA


def statistic_matrix(
    stored: StoredRun, one: Attempt, entries: Sequence[Entry], rows: Rows, statistic: str
) -> tuple[Floats, Floats]:
    """Return (statistic, count), each [rows, entries], of tensors of one collection; count is NaN where absent.

    Whole arrays are taken at once; only single numbers, whose statistics follow from the value, go one by one.
    """
    found = np.full((rows.size, len(entries)), np.nan)
    count = np.full((rows.size, len(entries)), np.nan)
    by_array: dict[str, list[tuple[int, int]]] = {}
    for number, entry in enumerate(entries):
        for place in entry.stats:
            by_array.setdefault(f"{entry.info.collection}/{place.array}", []).append((number, place.index))
    for path, places in by_array.items():
        names = one.specs[path].statistics if path in one.specs else ()
        wanted = _available(names, statistic)
        if wanted is None:
            for number, _ in places:
                values, counts = tensor_statistics(stored, one, entries[number], rows, (statistic,))
                found[:, number], count[:, number] = values[statistic], counts
            continue
        columns, indexes = np.array(places).T
        have = {name: stored.table(one, path, rows, indexes, names.index(name)) for name in {"count", *wanted}}
        here = have["count"]
        values_here = have[statistic] if statistic in have else statistics.derive(statistic, have)
        there = ~np.isnan(here)
        found[:, columns] = np.where(there, values_here, found[:, columns])
        count[:, columns] = np.where(there, here, count[:, columns])
    return found, count


def _available(names: Sequence[str], statistic: str) -> tuple[str, ...] | None:
    """Return which kept statistics give the wanted one; None if it must come from the value."""
    if "count" not in names:
        return None
    if statistic in names:
        return (statistic,)
    if statistic == LAST:
        return None
    needed = statistics.required(statistic)
    if set(needed) <= set(names):
        return tuple(needed)
    return None


def tensor_statistics(
    stored: StoredRun, one: Attempt, entry: Entry, rows: Rows, wanted: Sequence[str]
) -> tuple[dict[str, Floats], Floats]:
    """Return (statistic -> [rows], count [rows]); NaN where the tensor is absent.

    Where only `count` was kept, the tensor is a single number, and the others are derived from its value.
    """
    out = {name: np.full(rows.size, np.nan) for name in wanted}
    count = np.full(rows.size, np.nan)
    for names, table in stored.statistic_tables(one, entry, rows):
        have = {name: table[:, i] for i, name in enumerate(names)}
        here = np.flatnonzero(~np.isnan(have["count"]))
        count[here] = have["count"][here]
        if "min" not in names and set(wanted) - set(names) and here.size:
            raw = here[one.raw_at(entry.info.collection, one.rows_of(entry.info.collection)[rows[here]])]
            values = [complex(v) for v in stored.values(one, entry, rows[raw])]
            table_of = statistics.scalar_stats(_OF_NUMBERS, _real(values))
            for i, name in enumerate(_OF_NUMBERS):
                if name not in have:
                    have[name] = np.full(rows.size, np.nan)
                    have[name][raw] = table_of[:, i]
        for name in wanted:
            if name in have:
                out[name][here] = have[name][here]
            elif name == LAST and entry.info.shape == ():
                out[name][here] = have["mean"][here]
            elif all(needed in have for needed in statistics.required(name)):
                out[name][here] = statistics.derive(name, {k: v[here] for k, v in have.items()})
    return out, count


def _real(values: Sequence[complex]) -> Floats:
    """Return single numbers as the statistics see them: complex ones by their modulus."""
    array = np.array(values, np.complex128)
    return np.where(array.imag == 0, array.real, np.abs(array))


