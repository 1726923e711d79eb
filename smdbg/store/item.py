"""What one step saved, on its way from the training thread to the writer: values, numbers, and their groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smdbg.store.format import TensorInfo
from smdbg.store.rows import RowBuffer


class Item(NamedTuple):
    """One value.

    `elements`: 1-d, of a Zarr data type, owned by the item; None where only `computed` is known, or where the value
    lies in `slot` of its row's buffer already. `info` carries logical dtype and shape of this very value. `computed`:
    statistics already known, in the order of `statistics`. `recorded`: of a scalar that was recorded several times in
    this step, all its values; the mean is its value.
    """

    info: TensorInfo
    elements: NDArray[Any] | None
    statistics: tuple[str, ...]
    computed: NDArray[np.float64] | None = None
    recorded: NDArray[Any] | None = None
    features: bool = False
    slot: int | None = None


class Number(NamedTuple):
    """A scalar recorded any number of times in a step: its mean is the value, count and last are kept beside it."""

    info: TensorInfo
    values: list[float | complex]
    statistics: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """What one step saved of one collection.

    `scalars`: every value of this collection is kept whenever it is saved. `buffers`: path of an array -> the row that
    items lie in. `cast`: dtype that full values are stored as, "" for their own. `compression`: of arrays made for it.
    """

    name: str
    items: Sequence[Item]
    raw: bool
    scalars: bool = False
    numbers: Sequence[Number] = ()
    buffers: Mapping[str, RowBuffer] = field(default_factory=dict)
    cast: str = ""
    compression: str = ""

    def all_items(self) -> list[Item]:
        """Return the items, numbers among them."""
        numbers = self.numbers
        if not numbers:
            return list(self.items)
        values = np.array([number.values[0] for number in numbers])
        if values.dtype != np.float64 or any(len(number.values) != 1 for number in numbers):
            return [*self.items, *map(_number_item, numbers)]
        return [*self.items, *(Item(n.info, values[i : i + 1], n.statistics) for i, n in enumerate(numbers))]


def _number_item(number: Number) -> Item:
    info, values = number.info, number.values
    mean = values[0] if len(values) == 1 else sum(values) / len(values)
    if not np.isfinite(mean) and np.isfinite(values).all():  # the sum went beyond the largest number
        mean = sum(value / len(values) for value in values)
    dtype = "complex128" if isinstance(mean, complex) else "float64"
    if info.dtype != dtype or info.shape != ():
        info = replace(info, dtype=dtype, shape=())
    recorded = np.array(values) if len(values) > 1 else None
    return Item(info, np.array([mean], dtype), number.statistics, recorded=recorded)


def renamed(item: Item, name: str) -> Item:
    """Return the item under another name."""
    return item._replace(info=replace(item.info, name=name))
