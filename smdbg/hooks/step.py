"""The open step: what has been saved of it so far, until it is closed and handed to the writer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smdbg.hooks.config import Plan
from smdbg.store.format import TensorInfo
from smdbg.store.rows import Item, renamed
from smdbg.store.writer import Group


@dataclass
class Recorded:
    """A scalar recorded any number of times in a step: its mean is the value, count and last are kept beside it."""

    info: TensorInfo
    values: list[float | complex] = field(default_factory=list)

    def add(self, value: float | complex) -> None:
        """Record once more."""
        self.values.append(value)

    def item(self, statistics: tuple[str, ...]) -> Item:
        """Return the mean as an item (float64 or complex128)."""
        mean = self.values[0] if len(self.values) == 1 else sum(self.values) / len(self.values)
        dtype = "complex128" if isinstance(mean, complex) else "float64"
        elements: NDArray[Any] = np.array([mean], dtype)
        info = self.info
        if info.dtype != dtype or info.shape != ():
            info = replace(info, dtype=dtype, shape=())
        return Item(info, elements, statistics, recorded=np.array(self.values) if len(self.values) > 1 else None)


@dataclass
class OpenStep:
    """A step being recorded. `taken`: bytes of writer's room by collection; `hook_time`: ns spent inside the hook."""

    mode: str
    mode_step: int
    started: int = field(default_factory=time.perf_counter_ns)
    hook_time: int = 0
    flags: int = 0
    items: dict[str, dict[str, Item]] = field(default_factory=dict)
    scalars: dict[str, dict[str, Recorded]] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    taken: dict[str, int] = field(default_factory=dict)
    homes: dict[str, str] = field(default_factory=dict)  # name -> collection, of all tensors of the run so far

    @property
    def reserved(self) -> int:
        """Bytes of writer's room that this step has taken."""
        return sum(self.taken.values())

    def add(self, item: Item) -> None:
        """Add a tensor; one that was saved already in this step gets an index behind its name."""
        held = self.items.setdefault(item.info.collection, {})
        name = self.free_name(item.info.collection, item.info.name)
        held[name] = item if name == item.info.name else renamed(item, name)

    def free_name(self, collection: str, name: str) -> str:
        """Return `name`, or `name_1`, `name_2`, ... if that is taken in this step, or the name of another's tensor."""
        held, scalars = self.items.get(collection, {}), self.scalars.get(collection, {})
        found, index = name, 0
        while found in held or found in scalars or self.homes.get(found, collection) != collection:
            index += 1
            found = f"{name}_{index}"
        self.homes[found] = collection
        return found

    def record(self, info: TensorInfo, value: float | complex) -> None:
        """Record a scalar, once more if it is there already."""
        if info.name in self.items.get(info.collection, {}):
            info = replace(info, name=self.free_name(info.collection, info.name))
        held = self.scalars.setdefault(info.collection, {})
        held.setdefault(info.name, Recorded(info)).add(value)

    def drop(self, collection: str) -> int:
        """Leave a collection out of this step, since there is no room for it; return the bytes that it had taken."""
        self.dropped.add(collection)
        self.items.pop(collection, None)
        return self.taken.pop(collection, 0)

    def groups(self, plans: dict[str, Plan], statistics: Any, budget: Any) -> tuple[Group, ...]:
        """Return what the step saved, a group a collection."""
        out = []
        for name in {**self.items, **self.scalars}:
            plan = plans[name]
            items = [*self.items.get(name, {}).values()]
            items += [r.item(statistics(plan, r.info)) for r in self.scalars.get(name, {}).values()]
            if items and name not in self.dropped:
                raw = plan.raw_due(self.mode_step) and budget(plan, items)
                out.append(Group(name, tuple(items), raw, plan.always_raw))
        return tuple(out)
