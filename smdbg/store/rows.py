"""Arrays under construction: where each tensor's numbers go, row by row.

A collection's arrays share their row numbers. Narrow arrays keep the shard that is being filled in memory and write it
anew at each flush; wide rows become shards of their own at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smdbg import stats as statistics
from smdbg.store.dtypes import decode, zarr_dtype
from smdbg.store.format import (
    LAYOUT_DIMS,
    WIDE_ROW,
    ZARR_ITEMSIZE,
    ArraySpec,
    Entry,
    Place,
    TensorInfo,
    ValueSlot,
    product,
    table_spec,
    values_spec,
)
from smdbg.store.shard import Shard

Put = Callable[[str, bytes | bytearray], None]

Part = tuple[int, NDArray[Any]]  # (element offset in a row, elements)
SHORT_ROW = 64 << 10  # bytes

COUNT_ONLY = ("count",)
FROM_VALUE = frozenset(statistics.ALWAYS + statistics.EXTRA)  # what the value of a single number tells by itself
LATE_WIDTH = 32  # a further array leaves room for more latecomers, and for as many as came before


@dataclass(frozen=True)
class Item:
    """One value on its way to the store.

    `elements`: 1-d, of a Zarr data type, owned by the item (None when only `computed` is known). `info` carries logical
    dtype and shape of this very value. `computed`: statistics already known, in the order of `statistics`.
    `recorded`: of a scalar that was recorded several times in this step, all its values; the mean is its value.
    """

    info: TensorInfo
    elements: NDArray[Any] | None
    statistics: tuple[str, ...]
    computed: NDArray[np.float64] | None = None
    recorded: NDArray[Any] | None = None
    features: bool = False


class Narrow:
    """An array whose rows are short: the shard being filled is kept, and put again at each flush."""

    def __init__(self, spec: ArraySpec) -> None:
        """Start before the first row."""
        self.spec = spec
        self.dirty = False
        self._shard: Shard | None = None
        self._row0 = 0
        self._used = 0
        self._row_bytes = product(spec.tail) * spec.itemsize
        self._fill_count = self._row_bytes // len(_fill_bytes(spec.dtype))

    def write(self, row: int, at: int, data: NDArray[Any]) -> None:
        """Copy `data` to element `at` of `row`. Rows come in order; a full shard has been flushed before."""
        raw = data.view(np.uint8)
        self._at(row).write((row - self._row0) * self._row_bytes + at * self.spec.itemsize, raw)
        self._used = row - self._row0 + 1
        self.dirty = True

    def write_row(self, row: int, parts: Sequence[Part], put: Put) -> None:
        """Copy the parts of a row to their places. Nothing is put before the next flush."""
        if self._row_bytes > SHORT_ROW:
            for at, data in parts:
                self.write(row, at, data)
            return
        # Many small parts, single numbers mostly: gathered first, since each write on its own costs more than a copy.
        line = np.frombuffer(_fill_bytes(self.spec.dtype) * self._fill_count, self.spec.dtype).copy()
        if all(data.size == 1 for _, data in parts):
            line[[at for at, _ in parts]] = np.concatenate([data for _, data in parts])
        else:
            for at, data in parts:
                line[at : at + data.size] = data
        self.write(row, 0, line)

    def extend(self, row: int) -> None:
        """Count `row` in, as fill values where nothing was written: so a reader may ask for every row there is."""
        self._at(row)
        self._used = row - self._row0 + 1
        self.dirty = True

    def _at(self, row: int) -> Shard:
        rows = self.spec.shard[0]
        if self._shard is None or row - self._row0 >= rows:
            self._row0 = row // rows * rows
            total = product(self.spec.grid)
            self._shard = Shard(self.spec.chunk_bytes, total, total)
            self._shard.fill(_fill_bytes(self.spec.dtype))
        return self._shard

    def full_after(self, row: int) -> bool:
        """Tell whether `row` is the last one of its shard."""
        return self._shard is not None and row + 1 == self._row0 + self.spec.shard[0]

    def flush(self, put: Put, rows: int = 0) -> None:
        """Put the shard as it is, if it changed; let go of it once the collection has more `rows` than it holds."""
        if self.dirty and self._shard is not None:
            groups = -(-self._used // self.spec.chunk[0])
            put(self.spec.key(self._row0), self._shard.seal(groups * self.spec.chunks_per_row))
            self.dirty = False
        if rows >= self._row0 + self.spec.shard[0]:
            self._shard = None


@dataclass
class Wide:
    """An array whose rows are put at once, in one or more shards each."""

    spec: ArraySpec

    def write_row(self, row: int, parts: Sequence[Part], put: Put) -> None:
        """Put a row; its parts do not overlap. Shards nobody writes to are left out."""
        spec, item = self.spec, self.spec.itemsize
        width, chunk = spec.shard[1], spec.chunk[1]
        for across in range(spec.shards_across):
            start = across * width
            stop = min(start + width, spec.tail[0])
            inside = [(at, data) for at, data in parts if at < stop and at + data.size > start]
            if not inside:
                continue
            shard = Shard(spec.chunk_bytes, (stop - start) // chunk, product(spec.grid))
            if sum(data.size for _, data in inside) < stop - start:
                shard.fill(_fill_bytes(spec.dtype))
            for at, data in inside:
                first, last = max(at, start), min(at + data.size, stop)
                shard.write((first - start) * item, data[first - at : last - at].view(np.uint8))
            put(spec.key(row, across), shard.seal())


def _fill_bytes(dtype: str) -> bytes:
    if dtype.startswith(("float", "complex")):
        value: complex = complex(np.nan, np.nan) if dtype.startswith("complex") else np.nan
        return np.array(value, dtype).tobytes()
    return b"\0"


class Collection:
    """A collection being written: its arrays, the tensors' places in them, and the next row's number."""

    def __init__(self, name: str, bit: int) -> None:
        """Start empty."""
        self.name = name
        self.bit = bit
        self.rows = 0
        self.entries: dict[str, Entry] = {}
        self.values: dict[str, Narrow | Wide] = {}
        self.tables: dict[str, Narrow] = {}
        self._used: dict[str, int] = {}  # array -> elements or tensors handed out
        self.version = 0  # counts changes of entries and arrays

    def specs(self) -> Iterator[ArraySpec]:
        """Yield the layouts of all arrays, in order of creation."""
        for held in (*self.tables.values(), *self.values.values()):
            yield held.spec

    def narrow(self) -> Iterator[Narrow]:
        """Yield the arrays that are buffered."""
        yield from self.tables.values()
        yield from (held for held in self.values.values() if isinstance(held, Narrow))

    def write_row(self, items: Sequence[Item], raw: bool, scalars: bool, put: Put) -> None:
        """Write the next row: every item's statistics, and its value if `raw`.

        `scalars`: the collection keeps every value it saves, so of a single number only its count need be kept.
        """
        row = self.rows
        kept = [_kept_statistics(item, scalars and raw) for item in items]
        self._give_places(items, kept, raw)
        # Values first: wide rows are then on their way to the store while the statistics are computed.
        slots = self._write_values(row, items, raw, put)
        self._write_statistics(row, items, kept)
        for item, slot in zip(items, slots, strict=True):
            entry = self.entries[item.info.name]
            self._write_layout(row, entry, item, slot)
            if item.features:
                self._write_features(row, entry, item)
        for table in self.tables.values():
            table.extend(row)
        self.rows += 1

    # --- places ---

    def _give_places(self, items: Sequence[Item], kept: Sequence[tuple[str, ...]], raw: bool) -> None:
        """Give a place to what has none yet; all that is new in a row goes side by side into one array of its kind."""
        tables: dict[tuple[str, ...], list[Entry]] = {}
        values: dict[str, list[tuple[Entry, int, str]]] = {}
        for item, names in zip(items, kept, strict=True):
            info = item.info
            entry = self.entries.get(info.name)
            if entry is None:
                entry = self.entries[info.name] = Entry(info, since=self.rows)
                self.version += 1
            if not any(self.tables[p.array].spec.statistics == names for p in entry.stats):
                tables.setdefault(names, []).append(entry)
            if raw and item.elements is not None and _slot_for(entry, info.dtype, item.elements.size) is None:
                size = item.elements.size
                if entry.slots:
                    size = max(size, 2 * max(s.capacity for s in entry.slots))
                values.setdefault(zarr_dtype(info.dtype), []).append((entry, size, info.dtype))
        for names, entries in tables.items():
            for entry, place in zip(entries, self._table_room("stats", names, [1] * len(entries)), strict=True):
                entry.stats.append(place)
        for dtype, wanted in values.items():
            self._value_room(dtype, wanted)

    def _table_room(self, kind: str, names: tuple[str, ...], counts: Sequence[int], last: int = 0) -> list[Place]:
        """Return places for `counts` neighbours each in an array of that kind and statistics; make one if need be."""
        last = last or len(names)
        need = sum(counts)
        for array, held in self.tables.items():
            spec = held.spec
            if spec.kind == kind and spec.statistics == names and spec.tail[1] == last:
                if self._used[array] + need <= spec.tail[0]:
                    break
        else:
            of_kind = [a for a, held in self.tables.items() if held.spec.kind == kind]
            array = kind if not of_kind else f"{kind}-{len(of_kind)}"
            width = need if not of_kind else max(need, LATE_WIDTH, sum(self._used[a] for a in of_kind))
            self._make_table(array, kind, width, names, last, same_names=not of_kind)
        places, at = [], self._used[array]
        for count in counts:
            places.append(Place(array, at, count))
            at += count
        self._used[array] = at
        self.version += 1
        return places

    def _make_table(
        self, array: str, kind: str, width: int, names: tuple[str, ...], last: int, same_names: bool
    ) -> None:
        # Plain readers join arrays by their dimension names: the last axis shares one only where it means the same.
        axis = {"stats": "statistic", "features": "feature_statistic", "layout": "layout"}[kind]
        first = [h.spec for h in self.tables.values() if h.spec.kind == kind]
        alike = same_names or (first[0].statistics == names and first[0].tail[1] == last)
        dims = (f"{'feature' if kind == 'features' else 'tensor'}_{array}", axis if alike else f"{axis}_{array}")
        dtype = {"stats": "float64", "features": "float32", "layout": "int64"}[kind]
        self.tables[array] = Narrow(table_spec(self.name, array, kind, dtype, width, last, dims, names, self.rows))
        self._used[array] = 0
        self.version += 1

    def _value_room(self, dtype: str, wanted: Sequence[tuple[Entry, int, str]]) -> None:
        need = sum(_padded(size) for _, size, _ in wanted)
        for array, held in self.values.items():
            if held.spec.dtype == dtype and self._used[array] + need <= held.spec.tail[0]:
                break
        else:
            of_dtype = [a for a, held in self.values.items() if held.spec.dtype == dtype]
            array = dtype if not of_dtype else f"{dtype}-{len(of_dtype)}"
            if of_dtype:
                # As much again as there is, so that latecomers need few arrays; but no array is made wide by it.
                before = min(sum(self._used[a] for a in of_dtype), SHORT_ROW // ZARR_ITEMSIZE[dtype])
                need = max(need, LATE_WIDTH, before)
            spec = values_spec(self.name, array, dtype, need)
            is_wide = product(spec.tail) * spec.itemsize >= WIDE_ROW
            self.values[array] = Wide(spec) if is_wide else Narrow(spec)
            self._used[array] = 0
        at = self._used[array]
        for entry, size, name in wanted:
            entry.slots.append(ValueSlot(array, at, size, name))
            at += _padded(size)
        self._used[array] = at
        self.version += 1

    def _stat_place(self, entry: Entry, names: tuple[str, ...]) -> Place:
        newest = entry.stats[-1]
        if self.tables[newest.array].spec.statistics == names:
            return newest
        return next(p for p in entry.stats if self.tables[p.array].spec.statistics == names)

    # --- rows ---

    def _write_values(self, row: int, items: Sequence[Item], raw: bool, put: Put) -> list[int]:
        """Write the values of a row, and return the slot of each item."""
        slots = [0] * len(items)
        parts: dict[str, list[Part]] = {}
        for number, item in enumerate(items):
            if raw and item.elements is not None:
                entry = self.entries[item.info.name]
                slot = _slot_for(entry, item.info.dtype, item.elements.size)
                assert slot is not None
                slots[number] = slot
                place = entry.slots[slot]
                parts.setdefault(place.array, []).append((place.offset, item.elements))
        for array, found in parts.items():
            self.values[array].write_row(row, found, put)
        return slots

    def _write_statistics(self, row: int, items: Sequence[Item], kept: Sequence[tuple[str, ...]]) -> None:
        lines: dict[str, NDArray[np.float64]] = {}
        for item, names in zip(items, kept, strict=True):
            place = self._stat_place(self.entries[item.info.name], names)
            line = lines.get(place.array)
            if line is None:
                line = lines[place.array] = np.full(self.tables[place.array].spec.tail, np.nan)
            line[place.index] = _statistics_of(item, names)
        for array, line in lines.items():
            self.tables[array].write(row, 0, line.reshape(-1))

    def _write_layout(self, row: int, entry: Entry, item: Item, slot: int) -> None:
        shape = item.info.shape
        if slot == 0 and shape == entry.info.shape and not entry.layout:
            return
        last = 2 + max(LAYOUT_DIMS, len(shape))
        if not entry.layout or self.tables[entry.layout[-1].array].spec.tail[1] < 2 + len(shape):
            entry.layout += self._table_room("layout", (), [1], last)
        place = entry.layout[-1]
        width = self.tables[place.array].spec.tail[1]
        line = np.zeros(width, np.int64)
        line[0], line[1], line[2 : 2 + len(shape)] = slot + 1, len(shape), shape
        self.tables[place.array].write(row, place.index * width, line)

    def _write_features(self, row: int, entry: Entry, item: Item) -> None:
        axis = item.info.feature_axis
        if axis is None or item.elements is None or not -len(item.info.shape) <= axis < len(item.info.shape):
            return
        table = statistics.features(decode(item.elements, item.info.dtype, item.info.shape), axis)
        if not any(p.count == len(table) for p in entry.features):
            entry.features += self._table_room("features", statistics.FEATURES, [len(table)])
        place = next(p for p in reversed(entry.features) if p.count == len(table))
        self.tables[place.array].write(row, place.index * len(statistics.FEATURES), table.reshape(-1))


def _padded(size: int) -> int:
    """Return the room a slot takes: an empty tensor still gets an element, so that slots never share an offset."""
    return max(1, size)


def _slot_for(entry: Entry, dtype: str, size: int) -> int | None:
    """Return the index of the newest slot that takes `size` elements of `dtype`."""
    for index in range(len(entry.slots) - 1, -1, -1):
        if entry.slots[index].dtype == dtype and entry.slots[index].capacity >= size:
            return index
    return None


def _kept_statistics(item: Item, value_kept: bool) -> tuple[str, ...]:
    """Return what to keep of an item: of a single number whose value is kept anyway, only what that does not tell."""
    names = item.statistics
    if value_kept and item.info.shape == () and not item.info.dtype.startswith(("str", "bytes", "M8", "m8")):
        names = ("count", *(name for name in names if name not in FROM_VALUE))
    return names if item.recorded is None else (*names, "last")


def _statistics_of(item: Item, names: tuple[str, ...]) -> NDArray[np.float64]:
    if names == COUNT_ONLY:
        return np.ones(1)
    if item.recorded is not None:  # of all that was recorded in the step: `count` numbers, the last one apart
        last = item.recorded[-1]
        return np.append(statistics.compute(item.recorded, names[:-1]), abs(last) if np.iscomplex(last) else last.real)
    if item.computed is not None:
        return item.computed
    assert item.elements is not None
    return statistics.compute(decode(item.elements, item.info.dtype, item.info.shape), names)


def renamed(item: Item, name: str) -> Item:
    """Return the item under another name."""
    return replace(item, info=replace(item.info, name=name))
