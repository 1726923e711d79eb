"""The open step: what has been saved of it so far, until it is closed and handed to the writer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from smdbg.hooks.config import Plan
from smdbg.store.format import TensorInfo
from smdbg.store.item import Group, Item, Number, renamed
from smdbg.store.rows import RowBuffer


@dataclass(slots=True)
class OpenRow:
    """What an open step holds of one collection. `raw`: its full values are kept; `taken`: bytes of writer's room.

    `credit`: of these, what is not used yet; `buffers`: array -> the row that some of the items lie in.
    """

    plan: Plan
    due: bool
    raw: bool
    items: dict[str, Item] = field(default_factory=dict)
    numbers: dict[str, Number] = field(default_factory=dict)
    buffers: dict[str, RowBuffer] = field(default_factory=dict)
    dropped: bool = False
    taken: int = 0
    credit: int = 0

    def drop(self) -> int:
        """Leave this collection out of the step, since there is no room for it; return the bytes that it had taken."""
        self.dropped = True
        self.items.clear()
        self.numbers.clear()
        for buffer in self.buffers.values():
            buffer.done()
        self.buffers.clear()
        taken, self.taken, self.credit = self.taken, 0, 0
        return taken


@dataclass(slots=True)
class OpenStep:
    """A step being recorded. `hook_time`: ns spent inside the hook; `homes`: name -> collection, of the whole run."""

    mode: str
    mode_step: int
    homes: dict[str, str]
    started: int = field(default_factory=time.perf_counter_ns)
    hook_time: int = 0
    flags: int = 0
    rows: dict[str, OpenRow] = field(default_factory=dict)
    for_record: int = 0  # bytes of room for the record itself

    @property
    def reserved(self) -> int:
        """Bytes of writer's room that this step has taken."""
        return self.for_record + sum(row.taken for row in self.rows.values())

    def add(self, row: OpenRow, item: Item) -> None:
        """Add a tensor; one that was saved already in this step gets an index behind its name."""
        name = item.info.name
        free = self.free_name(row, name, item.info.collection)
        row.items[free] = item if free == name else renamed(item, free)

    def free_name(self, row: OpenRow, name: str, collection: str) -> str:
        """Return `name`, or `name_1`, `name_2`, ... if that is taken in this step, or the name of another's tensor."""
        found, index = name, 0
        while found in row.items or found in row.numbers or self.homes.get(found, collection) != collection:
            index += 1
            found = f"{name}_{index}"
        self.homes[found] = collection
        return found

    def record(self, row: OpenRow, info: TensorInfo, value: float | complex, statistics: tuple[str, ...]) -> None:
        """Record a scalar, once more if it is there already."""
        if info.name in row.items:
            info = replace(info, name=self.free_name(row, info.name, info.collection))
        held = row.numbers.get(info.name)
        if held is None:
            row.numbers[info.name] = Number(info, [value], statistics)
        else:
            held.values.append(value)

    def groups(self, budget: Callable[[Plan, Sequence[Item]], bool]) -> tuple[Group, ...]:
        """Return what the step saved, a group a collection; `budget` tells whether full values still may be kept."""
        out = []
        for name, row in self.rows.items():
            if row.items or row.numbers:
                plan, items = row.plan, list(row.items.values())
                raw = row.raw and budget(plan, items)
                numbers = list(row.numbers.values())
                out.append(
                    Group(name, items, raw, plan.always_raw, numbers, row.buffers, plan.cast, plan.compression)
                )
        return tuple(out)
