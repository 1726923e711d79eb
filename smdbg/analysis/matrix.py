"""Statistics of stored tensors, as they were kept or derived: of one tensor, or of many at once as a matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from smdbg import stats as statistics
from smdbg.store.dtypes import decode
from smdbg.store.format import Entry
from smdbg.store.reader import Attempt, StoredRun

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]

LAST = "last"  # of a scalar that was recorded several times in a step; of one recorded once it is the value
FROM_VALUE = statistics.ALWAYS + statistics.EXTRA


def statistic_matrices(
    stored: StoredRun, one: Attempt, entries: Sequence[Entry], rows: Rows, wanted: Sequence[str]
) -> tuple[dict[str, Floats], Floats]:
    """Return (statistic -> [rows, entries], count [rows, entries]) of tensors of one collection; absent: NaN.

    Whole arrays are taken at once, and each once. Of single numbers only `count` was kept; the others are derived from
    the values.
    """
    by_array: dict[str, list[tuple[int, int]]] = {}
    for number, entry in enumerate(entries):
        for place in entry.stats:
            by_array.setdefault(f"{entry.info.collection}/{place.array}", []).append((number, place.index))
    found: dict[str, Floats] | None = None
    count = np.full((rows.size, len(entries)), np.nan)
    for path, places in by_array.items():
        columns, indexes = np.array(places).T
        here, values = _of_array(stored, one, path, [entries[n] for n in columns], indexes, rows, wanted)
        if len(by_array) == 1 and np.array_equal(columns, np.arange(len(entries))):
            return values, here
        found = found or {name: np.full(count.shape, np.nan) for name in wanted}
        there = ~np.isnan(here)
        for name in wanted:
            found[name][:, columns] = np.where(there, values[name], found[name][:, columns])
        count[:, columns] = np.where(there, here, count[:, columns])
    return found or {name: np.full(count.shape, np.nan) for name in wanted}, count


def _of_array(
    stored: StoredRun,
    one: Attempt,
    path: str,
    entries: Sequence[Entry],
    indexes: NDArray[np.int64],
    rows: Rows,
    wanted: Sequence[str],
) -> tuple[Floats, dict[str, Floats]]:
    """Return (count, statistic -> values), each [rows, entries], of the tensors at `indexes` of one array."""
    names = one.specs[path].statistics
    parts = {name: _kept(names, name) for name in wanted}
    needed = ["count", *(part for kept in parts.values() for part in kept or ())]
    if LAST in wanted and "mean" in names:
        needed.append("mean")
    positions = {name: names.index(name) for name in dict.fromkeys(needed)}
    have = dict(zip(positions, stored.columns(one, path, rows, indexes, list(positions.values())), strict=True))
    count = have["count"]
    there = ~np.isnan(count)
    numbers: Floats | None = None
    values: dict[str, Floats] = {}
    for name, kept in parts.items():
        if kept is not None:
            values[name] = have[name] if name in have else statistics.derive(name, {part: have[part] for part in kept})
        elif "min" not in names:
            numbers = _numbers(stored, one, entries, rows, there) if numbers is None else numbers
            values[name] = _of_numbers(name, numbers)
        else:
            values[name] = have["mean"] if name == LAST else np.full(count.shape, np.nan)
        if name not in have and not there.all():
            values[name] = np.where(there, values[name], np.nan)
    return count, values


def tensor_statistics(
    stored: StoredRun, one: Attempt, entry: Entry, rows: Rows, wanted: Sequence[str]
) -> tuple[dict[str, Floats], Floats]:
    """Return (statistic -> [rows], count [rows]) of one tensor, each place read once; NaN where it is absent."""
    out = {name: np.full(rows.size, np.nan) for name in wanted}
    count = np.full(rows.size, np.nan)
    for names, table in stored.statistic_tables(one, entry, rows):
        columns = {name: table[:, i] for i, name in enumerate(names)}
        there = ~np.isnan(columns["count"])
        count = np.where(there, columns["count"], count)
        numbers: Floats | None = None
        for name in wanted:
            if (kept := _kept(names, name)) is not None:
                have = {part: columns[part] for part in kept}
                values = have[name] if name in have else statistics.derive(name, have)
            elif "min" not in names:
                numbers = _numbers(stored, one, [entry], rows, there[:, None]) if numbers is None else numbers
                values = _of_numbers(name, numbers)[:, 0]
            else:
                values = columns["mean"] if name == LAST else np.full(rows.size, np.nan)
            out[name] = np.where(there, values, out[name])
    return out, count


def _kept(names: Sequence[str], statistic: str) -> tuple[str, ...] | None:
    """Return which kept statistics give the wanted one; None if they do not."""
    if statistic in names:
        return (statistic,)
    if statistic == LAST:
        return None
    needed = statistics.required(statistic)
    return tuple(needed) if set(needed) <= set(names) and "min" in names else None


def _of_numbers(statistic: str, numbers: Floats) -> Floats:
    """Return a statistic of single numbers, each a tensor of one element; NaN for those that do not follow from it."""
    if statistic == LAST:
        return numbers
    needed = statistics.required(statistic)
    if not set(needed) <= set(FROM_VALUE):
        return np.full(numbers.shape, np.nan)
    table = statistics.scalar_stats(FROM_VALUE, numbers.reshape(-1)).reshape(*numbers.shape, len(FROM_VALUE))
    have = {name: table[..., FROM_VALUE.index(name)] for name in needed}
    return have[statistic] if statistic in have else statistics.derive(statistic, have)


def _numbers(stored: StoredRun, one: Attempt, entries: Sequence[Entry], rows: Rows, there: NDArray[np.bool_]) -> Floats:
    """Return the values [rows, entries] of single numbers as float64, complex ones by their modulus; absent: NaN.

    Those that share an array are read together: a row of it is a chunk's part anyway.
    """
    out = np.full((rows.size, len(entries)), np.nan)
    home = entries[0].info.collection
    there = there & one.raw_at(home, one.rows_of(home)[rows])[:, None]
    together: dict[str, list[int]] = {}
    for number, entry in enumerate(entries):
        spec = one.specs.get(f"{home}/{entry.slots[0].array}") if len(entry.slots) == 1 else None
        if spec is not None and not entry.layout and spec.chunk[1:] == spec.tail:
            together.setdefault(spec.path, []).append(number)
        else:
            here = np.flatnonzero(there[:, number])
            values = stored.values(one, entry, rows[here]) if here.size else []
            out[here, number] = [_real(np.asarray(value).reshape(-1))[0] if value.size else np.nan for value in values]
    for path, numbers in together.items():
        here = np.flatnonzero(there[:, numbers].any(axis=1))  # a chunk nobody wrote to is not asked for
        table = stored.number_rows(one, path, rows[here]) if here.size else None
        for number in numbers:
            if table is not None:
                slot = entries[number].slots[0]
                column = np.ascontiguousarray(table[:, slot.offset])
                values_here = _real(decode(column, slot.dtype, (here.size,)))
                out[here, number] = np.where(there[here, number], values_here, np.nan)
    return out


def _real(values: NDArray[np.generic]) -> Floats:
    """Return numbers as the statistics see them: complex ones by their modulus."""
    plain: Floats = (np.abs(values) if values.dtype.kind == "c" else values).astype(np.float64)
    return plain
