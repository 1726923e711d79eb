"""What `verify` finds: damage, objects that nothing refers to, and counts of what is good."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

MOST_KEPT = 100_000  # findings of a kind that are kept; more are only counted
MOST_NAMES = 20  # tensors named in one finding
SILENT_SECONDS = 600.0  # without a sign of life, before what a lost writer did not commit is taken from it

Worker = tuple[int, int]  # rank and attempt


@dataclass(frozen=True)
class Damage:
    """One damaged or missing object, and what cannot be read because of it.

    `tensors`: the first few names of `tensor_count`. `steps`: how many, from `first_step` to `last_step`. `values`:
    full values that are lost; `lines`: lines of statistics.
    """

    object: str
    what: str
    worker: Worker | None = None
    tensors: tuple[str, ...] = ()
    tensor_count: int = 0
    first_step: int | None = None
    last_step: int | None = None
    steps: int = 0
    values: int = 0
    lines: int = 0


@dataclass(frozen=True)
class Orphan:
    """An object that nothing refers to. `ours`: its name is one that only a writer of runs gives."""

    object: str
    what: str
    size: int
    modified: float
    worker: Worker | None = None
    ours: bool = True


@dataclass
class WorkerState:
    """What repairing has to know of an attempt: who may still write it, and whether its metadata could be read."""

    status: str = ""
    readable: bool = False
    newest: float = 0.0  # when an object of it was last put, unix seconds by the store's clock


@dataclass
class Report:
    """All that was found. Sizes in bytes; `values` and `lines` (of statistics) are those that the logs list.

    `objects` are those that are there; `missing` ones come on top. `unknown`: more values are lost than `values_lost`,
    and it cannot be told how many, nor are they in `values`. `unfinished`: what is to be done about a copy or a
    deletion that was not ended.
    """

    url: str
    run_id: str = ""
    damage: list[Damage] = field(default_factory=list)
    orphans: list[Orphan] = field(default_factory=list)
    damage_count: int = 0
    orphan_count: int = 0
    orphan_bytes: int = 0
    objects: int = 0
    missing: int = 0
    bytes: int = 0
    values: int = 0
    values_lost: int = 0
    unknown: bool = False
    lines: int = 0
    lines_lost: int = 0
    workers: dict[Worker, WorkerState] = field(default_factory=dict)
    unfinished: str = ""
    unchecked: list[str] = field(default_factory=list)
    damaged_objects: set[str] = field(default_factory=set)

    def broken(self, one: Damage) -> None:
        """Note a damage; of an object that is named several times, the first reasons count."""
        self.damage_count += 1
        self.values_lost += one.values
        self.lines_lost += one.lines
        if one.object not in self.damaged_objects and len(self.damaged_objects) < MOST_KEPT:
            self.missing += one.what.startswith("is missing")
            self.damaged_objects.add(one.object)
        if len(self.damage) < MOST_KEPT:
            self.damage.append(one)

    def left(self, one: Orphan) -> None:
        """Note an object that nothing refers to."""
        self.orphan_count += 1
        self.orphan_bytes += one.size
        if len(self.orphans) < MOST_KEPT:
            self.orphans.append(one)


def damage_of(
    key: str, what: str, worker: Worker, names: Iterable[str], steps: np.ndarray, values: int = 0, lines: int = 0
) -> Damage:
    """Return the damage of an object that holds these tensors at these steps."""
    told = list(dict.fromkeys(names))
    unique = np.unique(steps)
    first, last = (int(unique[0]), int(unique[-1])) if unique.size else (None, None)
    return Damage(key, what, worker, tuple(told[:MOST_NAMES]), len(told), first, last, int(unique.size), values, lines)
