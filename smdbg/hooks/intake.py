"""Taking values into the open step: which are due, what is kept of them, and the one copy that is made of each.

This is what a training thread spends its time on, so what is known of a name is worked out once and then looked up.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smdbg import stats as statistics
from smdbg.hooks.config import BY_DEFAULT, KNOWN, CollectionConfig, ModeConfig, Plan, ReductionConfig, own_configs, plan
from smdbg.hooks.convert import to_elements
from smdbg.hooks.guard import Guard
from smdbg.hooks.step import OpenRow, OpenStep
from smdbg.select import matcher
from smdbg.store.compress import prepare
from smdbg.store.dtypes import decode, zarr_dtype
from smdbg.store.format import MODES, ZARR_ITEMSIZE, ArraySpec, TensorInfo, plain_info, product, valid_collection
from smdbg.store.item import Item, Number
from smdbg.store.writer import Writer

log = logging.getLogger("smdbg")

RECORD_BYTES = 1024  # what an item takes in memory beside its elements, about
SMALL = 1 << 20  # a statistics-only tensor up to this size is copied rather than reduced in the training thread
BUFFERED = 16 << 10  # bytes; a smaller value is not worth looking up its place in a wide row
MANY = 1024  # recordings of one scalar in a step, after which room is asked for the next so many
NUMBER_BYTES = 32  # what a recording takes in memory
_UNKNOWN: tuple[TensorInfo, tuple[str, ...]] = (TensorInfo("", ""), ())
UNPLACED = ("str", "bytes")  # dtypes whose width changes from value to value

Place = tuple[int, int, ArraySpec]  # slot, offset, array


class Direct(NamedTuple):
    """A tensor whose place is known: an array of the same dtype and shape is copied there without further questions."""

    item: Item
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    path: str  # of the array
    offset: int


class Intake(Guard):
    """What a hook knows of names and collections, and the step that is open."""

    world_size = 1

    def __init__(
        self,
        save_config: ModeConfig | None,
        reduction_config: ReductionConfig | None,
        collections: Sequence[str | CollectionConfig] | None,
        raw_budget: int,
    ) -> None:
        """Take the configuration. Raises TypeError, ValueError."""
        super().__init__()
        self._writer: Writer | None = None
        self._mode = "global"
        self._mode_steps = dict.fromkeys(MODES, 0)
        self._now: OpenStep | None = None
        self._named: dict[str, str] = {}
        self._warned: set[str] = set()
        self._catalogued: dict[tuple[str, str], TensorInfo] = {}
        self._places: dict[tuple[str, str], tuple[TensorInfo, Place]] = {}
        self._direct: dict[str, Direct] = {}
        self._names: dict[tuple[str, str], tuple[str, ...]] = {}
        self._numbers: dict[str, tuple[TensorInfo, tuple[str, ...]]] = {}  # scalars, as recorded the last time
        self._expected: dict[tuple[str, bool], int] = {}  # collection, raw -> room that its last row took
        self._raw_left = raw_budget
        self._save_config, self._reduction = save_config, reduction_config
        self._own = own_configs(collections)
        if any(config.compression != "none" for config in self._own.values()):
            prepare()  # here, where no thread of ours is at work yet
        self._listed = None if collections is None else frozenset(self._own)
        self._plans: dict[str, Plan] = {}
        self._include: list[tuple[Callable[[str], bool], str]] = []
        self._read_patterns()

    # --- names and collections ---

    def _plan(self, collection: str) -> Plan:
        found = self._plans.get(collection)
        if found is None:
            if not isinstance(collection, str) or not valid_collection(collection):
                raise ValueError(f"{collection!r} cannot name a collection: 1 to 64 of A-Z a-z 0-9 _ -, not 'steps'")
            found = plan(collection, self._own.get(collection), self._save_config, self._reduction)
            self._plans[collection] = found
        return found

    def _wanted(self, collection: str) -> bool:
        """Tell whether a collection is saved at all: all of one's own are, and of the known ones those asked for."""
        if collection not in KNOWN:
            return True
        return collection in (BY_DEFAULT if self._listed is None else self._listed)

    def _collection_of(self, name: str, collection: str | None) -> str:
        """Return the one home of a name: where it was first saved, else as given, else by pattern."""
        found = self._named.get(name)
        if found is None:
            if not isinstance(name, str):
                raise TypeError(f"a tensor's name is text, not {name!r}")
            by_pattern = (home for matches, home in self._include if matches(name))
            found = self._named[name] = collection or next(by_pattern, "tensors")
        if collection not in (None, found) and name not in self._warned:
            self._warned.add(name)
            log.warning("smdbg: %r belongs to collection %r; it stays there, not in %r", name, found, collection)
        return found

    def _read_patterns(self) -> None:
        """Collect which names go where: what the user configured comes before the patterns of the known ones.

        Known ones that are left out keep their patterns: what belongs to them is not saved elsewhere instead.
        """
        for config in self._own.values():
            self._include += [(matcher(pattern), config.name) for pattern in config.include]
        for name, default in KNOWN.items():
            self._include += [(matcher(pattern), name) for pattern in default.patterns]

    def _statistics(self, found: Plan, dtype: str) -> tuple[str, ...]:
        """Return the names of the statistics to keep of a tensor."""
        key = (found.name, dtype)
        names = self._names.get(key)
        if names is None:
            wanted = found.reduction
            hashed = wanted.hash if wanted.hash is not None else self.world_size > 1 and found.name == "weights"
            names = (*statistics.ALWAYS, *wanted.statistics)
            names += statistics.HASH if hashed else ()
            names += statistics.QUANTILES if wanted.quantiles else ()
            names += statistics.HISTOGRAM if wanted.histogram else ()
            names += statistics.exponent_histogram_names(dtype) if wanted.exponent_histogram else ()
            self._names[key] = names
        return names

    def _described(self, info: TensorInfo, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
        """Return what the catalogue is to say; the same object as last time while dtype and shape stay."""
        if info.dtype == dtype and info.shape == shape and info.role:
            return info
        key = (info.collection, info.name)
        known = self._catalogued.get(key)
        if known is None or known.dtype != dtype or known.shape != shape:
            role = info.role or self._plan(info.collection).role
            known = self._catalogued[key] = plain_info(replace(info, dtype=dtype, shape=shape, role=role))
        return known

    # --- the open step ---

    def _open_step(self) -> OpenStep:
        """Return the current step, opened if it was not."""
        if self._now is None:
            self._now = OpenStep(self._mode, self._mode_steps[self._mode], self._named)
        return self._now

    def _row(self, collection: str) -> OpenRow:
        """Return what the current step holds of a collection. Asking opens the step."""
        now = self._now or self._open_step()
        row = now.rows.get(collection)
        if row is None:
            found = self._plan(collection)
            due = self._wanted(collection) and found.due(now.mode, now.mode_step)
            row = now.rows[collection] = OpenRow(found, due, due and found.raw_due(now.mode_step))
        return row

    def _due(self, collection: str) -> bool:
        return self._row(collection).due

    def _save(self, info: TensorInfo, value: Any, owned: bool = False) -> None:
        """Put a tensor into the open step; its collection is due.

        Copies it, within the writer's room, unless the caller says that nobody will change it: `owned`.
        """
        row = self._row(info.collection)
        now = self._now
        if row.dropped or now is None:
            return
        try:
            elements, dtype, shape, copied = to_elements(value)
        except TypeError as error:
            raise TypeError(f"{info.name!r}: {error}") from error
        owned = owned or copied
        info = self._described(info, dtype, shape)
        found = row.plan
        names = self._statistics(found, dtype)
        features = info.feature_axis is not None and _keeps_features(found)
        if not row.raw and not features and elements.nbytes > SMALL:
            # Statistics of a large tensor: one pass here costs less than a copy that waits in memory.
            now.add(row, Item(info, None, names, statistics.compute(decode(elements, dtype, shape), names)))
            return
        if row.raw and not owned and elements.nbytes >= BUFFERED and self._save_in_place(now, row, info, elements):
            return
        if row.dropped or not self._take_room(now, row, elements.nbytes, row.raw):
            self._drop(row)
            return
        now.add(row, Item(info, elements if owned else elements.copy(), names, None, features=features))

    def _save_in_place(self, now: OpenStep, row: OpenRow, info: TensorInfo, elements: NDArray[Any]) -> bool:
        """Copy a value to where it will be stored, if that is known. False if it is not, or there is no room."""
        place = self._place(row, info, elements.size)
        writer = self._writer
        if place is None or writer is None or info.name in row.items or now.homes.get(info.name) != info.collection:
            return False
        slot, offset, spec = place
        buffer = row.buffers.get(spec.path)
        if buffer is None:
            if not self._reserve(now, row, writer.row_cost(spec)):
                self._drop(row)
                return False
            buffer = row.buffers[spec.path] = writer.row_buffer(spec)
        buffer.write(offset, elements)
        features = info.feature_axis is not None and _keeps_features(row.plan)
        names = self._statistics(row.plan, info.dtype)
        item = Item(info, None, names, None, None, features, slot)
        now.add(row, item)
        if info.dtype == elements.dtype.name:
            self._direct[info.name] = Direct(item, elements.dtype, info.shape, spec.path, offset)
        return True

    def _save_directly(self, name: str, value: Any, collection: str | None) -> bool:
        """Copy an array to where it lay the last time. False if anything is not as it was then."""
        known, now = self._direct.get(name), self._now
        if known is None or now is None or type(value) is not np.ndarray:
            return False
        item, dtype, shape, path, offset = known
        home = item.info.collection
        row = now.rows.get(home)
        if row is None or not row.raw or name in row.items or name in row.numbers or collection not in (None, home):
            return False
        buffer = row.buffers.get(path)
        if buffer is None or value.dtype is not dtype or value.shape != shape or not value.flags.c_contiguous:
            return False
        buffer.write(offset, value.reshape(-1))
        row.items[name] = item
        return True

    def _place(self, row: OpenRow, info: TensorInfo, size: int) -> Place | None:
        """Return where the tensor was stored the last time, None if that is no wide row or it never was."""
        key = (info.collection, info.name)
        known = self._places.get(key)
        if known is not None and known[0] is info:
            return known[1]
        writer = self._writer
        if writer is None or row.plan.cast or info.dtype in UNPLACED:
            return None
        found = writer.place(info.collection, info.name, info.dtype, size)
        if found is not None:
            self._places[key] = (info, found)
        return found

    def _record(self, info: TensorInfo, value: float | complex) -> None:
        """Record a scalar in the open step; its collection is due."""
        row = self._row(info.collection)
        now = self._now
        if row.dropped or now is None:
            return
        dtype = "complex128" if isinstance(value, complex) else "float64"
        info = self._described(info, dtype, ())
        names = self._statistics(row.plan, dtype)
        held = row.numbers.get(info.name)
        if held is not None and len(held.values) % MANY == 0 and not self._reserve(now, row, MANY * NUMBER_BYTES):
            self._drop(row)
            return
        now.record(row, info, value, names)
        self._numbers[info.name] = info, names

    def _add_number(self, name: str, value: float, collection: str) -> bool:
        """Record a float under a known name: the short way for what a training does most. False: take the long one."""
        if not self._active():  # before the lock, which a fork may have left held for ever
            return False
        start = time.perf_counter_ns()
        with self._guard_lock:
            try:
                now = self._now
                row = None if now is None else now.rows.get(collection)
                if now is None or row is None:
                    return False
                held = row.numbers.get(name)
                if held is not None:
                    if len(held.values) % MANY == 0:
                        return False
                    held.values.append(value)
                else:
                    info, names = self._numbers.get(name, _UNKNOWN)
                    if info.collection != collection or info.dtype != "float64" or name in row.items:
                        return False
                    if row.due and not row.dropped:
                        row.numbers[name] = Number(info, [value], names)
            except Exception:  # the long way says what is wrong
                return False
            now.hook_time += time.perf_counter_ns() - start
        return True

    # --- room ---

    def _take_room(self, now: OpenStep, row: OpenRow, nbytes: int, raw: bool) -> bool:
        writer = self._writer
        return writer is not None and self._reserve(now, row, writer.cost(nbytes, raw))

    def _reserve(self, now: OpenStep, row: OpenRow, size: int) -> bool:
        """Take bytes of room for a row; at first as many as its last one took, so that the room is asked but once."""
        writer = self._writer
        if writer is None:
            return False
        if row.credit >= size:
            row.credit -= size
            return True
        if not row.taken:
            expected = self._expected.get((row.plan.name, row.raw), 0)
            if expected > size and writer.room.take_now(expected):
                row.taken, row.credit = expected, expected - size
                return True
        if not writer.room.take(size, now.reserved):
            return False
        row.taken += size
        return True

    def _drop(self, row: OpenRow) -> None:
        if self._writer is not None:
            self._writer.room.give(row.drop(), stored=False)

    def _expect(self, now: OpenStep) -> None:
        """Remember what the rows of a step took, for those of the next."""
        for name, row in now.rows.items():
            if row.taken:
                self._expected[name, row.raw] = row.taken - row.credit

    def _within_budget(self, found: Plan, items: Sequence[Item]) -> bool:
        """Tell whether full values of a default schedule still fit the budget; what does not is left out."""
        if not found.budgeted:
            return True
        size = sum(map(_nbytes, items))
        if size > self._raw_left:
            if self._writer is not None:
                self._writer.left_out[found.name] = self._writer.left_out.get(found.name, 0) + 1
            return False
        self._raw_left -= size
        return True


def _keeps_features(found: Plan) -> bool:
    wanted = found.reduction.features
    return wanted if wanted is not None else found.name in ("inputs", "outputs")


def _nbytes(item: Item) -> int:
    if item.elements is not None:
        return item.elements.nbytes
    return 0 if item.computed is not None else product(item.info.shape) * ZARR_ITEMSIZE[zarr_dtype(item.info.dtype)]


