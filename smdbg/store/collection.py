"""A collection being written: each step that saves it becomes a row of its arrays.

What a row needs (places, offsets, gaps) is worked out once for a set of tensors, and used again as long as steps save
the same ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smdbg import stats as statistics
from smdbg.store.dtypes import cast, decode
from smdbg.store.format import LAYOUT_DIMS, ArraySpec, Entry, Place, TensorInfo, product
from smdbg.store.item import Group, Item
from smdbg.store.places import Places, slot_for
from smdbg.store.pool import ShardPool
from smdbg.store.rows import Narrow, Put, RowBuffer, Span, Wide

COUNT_ONLY = ("count",)
FROM_VALUE = frozenset(statistics.ALWAYS + statistics.EXTRA)  # what the value of a single number tells by itself
PLANS = 8  # of rows; training, evaluation and steps with full values have one each


@dataclass(frozen=True)
class ValuePart:
    """What of a row goes into one array: which items, at which offsets, and the gaps they leave, all ascending."""

    array: str
    items: tuple[int, ...]
    offsets: list[int]
    gaps: tuple[Span, ...]


@dataclass(frozen=True)
class TablePart:
    """Which items' statistics go into one table, and to which lines."""

    array: str
    items: tuple[int, ...]
    lines: NDArray[np.int64]
    names: tuple[str, ...]


class Signature(NamedTuple):
    """What the plan of a row follows from, item by item but for the first two."""

    raw: bool
    scalars: bool
    infos: list[TensorInfo]
    statistics: list[tuple[str, ...]]
    slots: list[int | None]
    recorded_once: list[bool]
    without_elements: list[bool]


@dataclass(frozen=True)
class RowPlan:
    """All that a row needs besides the values; good for every row of items with the same signature."""

    signature: Signature
    slots: tuple[int | None, ...]
    values: tuple[ValuePart, ...]
    tables: tuple[TablePart, ...]
    layouts: tuple[tuple[str, int, NDArray[np.int64]], ...]  # (array, tensor, its line)


class Collection:
    """The next row's number, the places of tensors, and the writing of rows."""

    def __init__(self, name: str, bit: int, pool: ShardPool, compression: str = "") -> None:
        """Start empty."""
        self.name = name
        self.bit = bit
        self.rows = 0
        self.places = Places(name, pool, compression)
        self._plans: list[RowPlan] = []
        self._last: RowPlan | None = None
        self._alike = 0  # rows of that plan, one after the other
        self._present: Counter[str] = Counter()  # tensor -> rows, but for those

    def wide_slot(self, name: str, dtype: str, size: int) -> tuple[int, int, ArraySpec] | None:
        """Return (slot, offset, array) where a value of a tensor would lie, if that is a wide array.

        Called from the training thread: places are added while it looks, but never moved.
        """
        entry = self.places.entries.get(name)
        number = None if entry is None else slot_for(entry, dtype, size)
        if entry is None or number is None:
            return None
        slot = entry.slots[number]
        held = self.places.values[slot.array]
        return (number, slot.offset, held.spec) if isinstance(held, Wide) else None

    def write_row(self, group: Group, put: Put) -> None:
        """Write the next row: every item's statistics, and its value if the group is to keep them."""
        row, items = self.rows, group.all_items()
        stored, dtypes = _stored(items, group)
        plan = self._plan(items, stored, dtypes, group)
        # Values first: wide rows are then on their way to the store while the statistics are computed.
        for part in plan.values:
            held = self.places.values[part.array]
            data = [stored[i] for i in part.items]
            if isinstance(held, Wide):
                held.write_row(row, part.offsets, data, part.gaps, put, group.buffers.get(held.spec.path))
            else:
                held.write_row(row, part.offsets, [one for one in data if one is not None])
        for table in plan.tables:
            self._write_statistics(row, table, items, plan.slots, group.buffers)
        for array, tensor, line in plan.layouts:
            self.places.tables[array].write(row, tensor * line.size, line)
        for number, item in enumerate(items):
            if item.features:
                self._write_features(row, item, plan.slots[number], group.buffers)
        for buffer in group.buffers.values():
            buffer.done()
        for held in self.places.tables.values():
            held.extend(row)
        if plan is not self._last:
            self._count_rows()
        self._last, self._alike = plan, self._alike + 1
        self.rows += 1

    def _count_rows(self) -> None:
        if self._last is not None:
            for info in self._last.signature.infos:
                self._present[info.name] += self._alike
        self._last, self._alike = None, 0

    def end(self) -> None:
        """Note which tensors are in every row since their first: readers then need not look for them in the tables."""
        self._count_rows()
        for name, entry in self.places.entries.items():
            entry.whole = self._present[name] == self.rows - entry.since

    # --- planning ---

    def _plan(
        self, items: Sequence[Item], stored: Sequence[NDArray[Any] | None], dtypes: Sequence[str], group: Group
    ) -> RowPlan:
        # Lists of the same objects compare fast, and steps of a training save the same tensors over and over.
        signature = Signature(
            group.raw,
            group.scalars,
            [item.info for item in items],
            [item.statistics for item in items],
            [item.slot for item in items],
            [item.recorded is None for item in items],
            [one is None for one in stored],
        )
        for known in self._plans:
            if known.signature == signature:
                return known
        made = self._make_plan(items, stored, dtypes, group, signature)
        self._plans = [made, *self._plans[: PLANS - 1]]
        return made

    def _make_plan(
        self,
        items: Sequence[Item],
        stored: Sequence[NDArray[Any] | None],
        dtypes: Sequence[str],
        group: Group,
        signature: Signature,
    ) -> RowPlan:
        kept = [_kept_statistics(item, group.scalars and group.raw) for item in items]
        self._give_places(items, stored, kept, dtypes)
        entries = [self.places.entries[item.info.name] for item in items]
        slots = [item.slot if group.raw else None for item in items]
        for i, one in enumerate(stored):
            if one is not None:
                slots[i] = slot_for(entries[i], dtypes[i], one.size)
        # Where a value lies in a buffer it is known whether or not it is kept: its statistics are taken from there.
        known = [item.slot if slot is None else slot for item, slot in zip(items, slots, strict=True)]
        return RowPlan(
            signature,
            tuple(known),
            tuple(self._value_parts(entries, slots, items)),
            tuple(self._table_parts(entries, kept)),
            tuple(self._layouts(entries, items, slots)),
        )

    def _give_places(
        self,
        items: Sequence[Item],
        stored: Sequence[NDArray[Any] | None],
        kept: Sequence[tuple[str, ...]],
        dtypes: Sequence[str],
    ) -> None:
        """Give a place to what has none yet; all that is new in a row goes side by side into one array of its kind."""
        places = self.places
        tables: dict[tuple[str, ...], list[Entry]] = {}
        values: list[tuple[Entry, int, str]] = []
        for item, one, names, dtype in zip(items, stored, kept, dtypes, strict=True):
            entry = places.entries.get(item.info.name)
            if entry is None:
                entry = places.entries[item.info.name] = Entry(item.info, since=self.rows)
                places.version += 1
            if not any(places.tables[p.array].spec.statistics == names for p in entry.stats):
                tables.setdefault(names, []).append(entry)
            if one is not None and slot_for(entry, dtype, one.size) is None:
                values.append((entry, one.size, dtype))
        for names, entries in tables.items():
            found = places.table_room("stats", names, [1] * len(entries), self.rows)
            for entry, place in zip(entries, found, strict=True):
                entry.stats.append(place)
        places.give_slots(values)

    def _value_parts(
        self, entries: Sequence[Entry], slots: Sequence[int | None], items: Sequence[Item]
    ) -> list[ValuePart]:
        found: dict[str, list[tuple[int, int, int]]] = {}
        for i, number in enumerate(slots):
            if number is not None:
                slot = entries[i].slots[number]
                found.setdefault(slot.array, []).append((slot.offset, product(items[i].info.shape), i))
        out = []
        for array, lines in found.items():
            lines.sort()
            gaps, at = [], 0
            for offset, size, _ in lines:
                if offset > at:
                    gaps.append((at, offset))
                at = offset + size
            end = self.places.values[array].spec.tail[0]
            if at < end:
                gaps.append((at, end))
            out.append(ValuePart(array, tuple(i for *_, i in lines), [o for o, *_ in lines], tuple(gaps)))
        return out

    def _table_parts(self, entries: Sequence[Entry], kept: Sequence[tuple[str, ...]]) -> list[TablePart]:
        found: dict[str, list[tuple[int, int]]] = {}
        for i, (entry, names) in enumerate(zip(entries, kept, strict=True)):
            place = self._stat_place(entry, names)
            found.setdefault(place.array, []).append((place.index, i))
        return [
            TablePart(array, tuple(i for _, i in lines), np.array([n for n, _ in lines]), kept[lines[0][1]])
            for array, lines in found.items()
        ]

    def _stat_place(self, entry: Entry, names: tuple[str, ...]) -> Place:
        return next(p for p in reversed(entry.stats) if self.places.tables[p.array].spec.statistics == names)

    def _layouts(
        self, entries: Sequence[Entry], items: Sequence[Item], slots: Sequence[int | None]
    ) -> list[tuple[str, int, NDArray[np.int64]]]:
        """Return the layout lines of tensors whose slot or shape is not, or was not always, that of the catalogue."""
        out = []
        for entry, item, number in zip(entries, items, slots, strict=True):
            shape, slot = item.info.shape, number or 0
            if slot == 0 and shape == entry.info.shape and not entry.layout:
                continue
            last = 2 + max(LAYOUT_DIMS, len(shape))
            if not entry.layout or self.places.tables[entry.layout[-1].array].spec.tail[1] < 2 + len(shape):
                entry.layout += self.places.table_room("layout", (), [1], self.rows, last)
            place = entry.layout[-1]
            line = np.zeros(self.places.tables[place.array].spec.tail[1], np.int64)
            line[0], line[1], line[2 : 2 + len(shape)] = slot + 1, len(shape), shape
            out.append((place.array, place.index, line))
        return out

    # --- rows ---

    def _write_statistics(
        self,
        row: int,
        part: TablePart,
        items: Sequence[Item],
        slots: Sequence[int | None],
        buffers: Mapping[str, RowBuffer],
    ) -> None:
        table: Narrow = self.places.tables[part.array]
        lines = np.full(table.spec.tail, np.nan)
        if part.names == COUNT_ONLY:
            lines[part.lines] = 1.0
        else:
            found: list[NDArray[np.float64] | None] = [None] * len(part.items)
            plain: list[int] = []
            arrays: list[NDArray[Any]] = []
            for at, i in enumerate(part.items):
                item = items[i]
                if item.recorded is not None:
                    found[at] = _recorded_statistics(item.recorded, part.names)
                elif item.computed is not None:
                    found[at] = item.computed
                else:
                    pieces = self._pieces(item, slots[i], buffers)
                    if len(pieces) == 1:
                        plain.append(at)
                        arrays.append(pieces[0])
                    else:
                        found[at] = statistics.compute_pieces(pieces, part.names)
            if arrays:
                lines[part.lines[plain]] = statistics.compute_many(arrays, part.names)
            rest = [at for at, one in enumerate(found) if one is not None]
            if rest:
                lines[part.lines[rest]] = np.stack([one for one in found if one is not None])
        table.write(row, 0, lines.reshape(-1))

    def _pieces(self, item: Item, slot: int | None, buffers: Mapping[str, RowBuffer]) -> list[NDArray[Any]]:
        """Return the value of an item as arrays of its logical dtype, in one piece unless it lies in a buffer."""
        info = item.info
        if item.elements is not None:
            return [decode(item.elements, info.dtype, info.shape)]
        assert slot is not None
        place = self.places.entries[info.name].slots[slot]
        pieces = buffers[f"{self.name}/{place.array}"].pieces(place.offset, product(info.shape))
        return [decode(piece, info.dtype, piece.shape) for piece in pieces]

    def _write_features(self, row: int, item: Item, slot: int | None, buffers: Mapping[str, RowBuffer]) -> None:
        axis, shape = item.info.feature_axis, item.info.shape
        if axis is None or item.computed is not None or not -len(shape) <= axis < len(shape):
            return
        pieces = self._pieces(item, slot, buffers)
        value = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        table = statistics.features(value.reshape(shape), axis)
        entry = self.places.entries[item.info.name]
        if not any(p.count == len(table) for p in entry.features):
            entry.features += self.places.table_room("features", statistics.FEATURES, [len(table)], self.rows)
        place = next(p for p in reversed(entry.features) if p.count == len(table))
        held = self.places.tables[place.array]
        held.write(row, place.index * len(statistics.FEATURES), table.reshape(-1))


def _stored(items: Sequence[Item], group: Group) -> tuple[list[NDArray[Any] | None], list[str]]:
    """Return elements and dtypes to store; None for elements that lie in a buffer, are not known or not to be kept."""
    dtypes = [item.info.dtype for item in items]
    if not group.raw:
        return [None] * len(items), dtypes
    stored = [item.elements for item in items]
    if group.cast:
        for i, item in enumerate(items):
            one = stored[i]
            if one is not None and item.info.shape:  # single numbers stay: their statistics are derived from them
                stored[i], dtypes[i] = cast(one, dtypes[i], group.cast)
    return stored, dtypes


def _kept_statistics(item: Item, value_kept: bool) -> tuple[str, ...]:
    """Return what to keep of an item: of a single number whose value is kept anyway, only what that does not tell."""
    names = item.statistics
    if value_kept and item.info.shape == () and not item.info.dtype.startswith(("str", "bytes", "M8", "m8")):
        names = ("count", *(name for name in names if name not in FROM_VALUE))
    return names if item.recorded is None else (*names, "last")


def _recorded_statistics(values: NDArray[Any], names: tuple[str, ...]) -> NDArray[np.float64]:
    """Return the statistics of all that was recorded in a step: `count` numbers, the last one apart."""
    last = values[-1]
    return np.append(statistics.compute(values, names[:-1]), abs(last) if np.iscomplex(last) else last.real)
