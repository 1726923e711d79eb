"""Where each tensor's numbers go: arrays are made as they are needed, and a place once given stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from smdbg.store.dtypes import zarr_dtype
from smdbg.store.format import (
    WIDE_ROW,
    ZARR_ITEMSIZE,
    ArraySpec,
    Entry,
    Place,
    ValueSlot,
    product,
    table_spec,
    values_spec,
)
from smdbg.store.pool import ShardPool
from smdbg.store.rows import SHORT_ROW, Narrow, Wide

LATE_WIDTH = 32  # a further array leaves room for more latecomers, and for as many as came before
_AXIS = {"stats": "statistic", "features": "feature_statistic", "layout": "layout"}
_DTYPE = {"stats": "float64", "features": "float32", "layout": "int64"}


class Places:
    """The arrays of a collection, and the tensors' places in them."""

    def __init__(self, name: str, pool: ShardPool, compression: str = "") -> None:
        """Start without arrays. `compression`: that of arrays of full values."""
        self.name = name
        self.compression = compression
        self.entries: dict[str, Entry] = {}
        self.values: dict[str, Narrow | Wide] = {}
        self.tables: dict[str, Narrow] = {}
        self.version = 0  # counts changes of entries and arrays
        self._pool = pool
        self._used: dict[str, int] = {}  # array -> elements or tensors handed out

    def specs(self) -> Iterator[ArraySpec]:
        """Yield the layouts of all arrays, in order of creation."""
        for held in (*self.tables.values(), *self.values.values()):
            yield held.spec

    def narrow(self) -> Iterator[Narrow]:
        """Yield the arrays that are buffered."""
        yield from self.tables.values()
        yield from (held for held in self.values.values() if isinstance(held, Narrow))

    def table_room(
        self, kind: str, names: tuple[str, ...], counts: Sequence[int], row: int, last: int = 0
    ) -> list[Place]:
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
            self._make_table(array, kind, width, names, last, row)
        places, at = [], self._used[array]
        for count in counts:
            places.append(Place(array, at, count))
            at += count
        self._used[array] = at
        self.version += 1
        return places

    def _make_table(self, array: str, kind: str, width: int, names: tuple[str, ...], last: int, row: int) -> None:
        # Plain readers join arrays by their dimension names: the last axis shares one only where it means the same.
        axis = _AXIS[kind]
        first = [h.spec for h in self.tables.values() if h.spec.kind == kind]
        alike = not first or (first[0].statistics == names and first[0].tail[1] == last)
        dims = (f"{'feature' if kind == 'features' else 'tensor'}_{array}", axis if alike else f"{axis}_{array}")
        self.tables[array] = Narrow(table_spec(self.name, array, kind, _DTYPE[kind], width, last, dims, names, row))
        self._used[array] = 0
        self.version += 1

    def value_room(self, dtype: str, wanted: Sequence[tuple[Entry, int, str]]) -> None:
        """Give each (entry, elements, logical dtype) a new slot in an array of the Zarr data type `dtype`."""
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
            spec = values_spec(self.name, array, dtype, need, self.compression)
            is_wide = product(spec.tail) * spec.itemsize >= WIDE_ROW
            self.values[array] = Wide(spec, self._pool) if is_wide else Narrow(spec)
            self._used[array] = 0
        at = self._used[array]
        for entry, size, name in wanted:
            # Added last: the training thread looks for slots while this runs.
            entry.slots.append(ValueSlot(array, at, size, name))
            at += _padded(size)
        self._used[array] = at
        self.version += 1

    def give_slots(self, wanted: Sequence[tuple[Entry, int, str]]) -> None:
        """Give a slot to each (entry, elements, logical dtype); those of one kind lie side by side in one array."""
        of_dtype: dict[str, list[tuple[Entry, int, str]]] = {}
        for entry, size, dtype in wanted:
            if entry.slots:
                size = max(size, 2 * max(s.capacity for s in entry.slots))
            of_dtype.setdefault(zarr_dtype(dtype), []).append((entry, size, dtype))
        for dtype, found in of_dtype.items():
            self.value_room(dtype, found)


def _padded(size: int) -> int:
    """Return the room a slot takes: an empty tensor still gets an element, so that slots never share an offset."""
    return max(1, size)


def slot_for(entry: Entry, dtype: str, size: int) -> int | None:
    """Return the index of the newest slot that takes `size` elements of `dtype`."""
    for index in range(len(entry.slots) - 1, -1, -1):
        if entry.slots[index].dtype == dtype and entry.slots[index].capacity >= size:
            return index
    return None
