"""Requests, objects, bytes and dollars of a run on S3, worked out on paper from the format's own layout.

`python benchmarks/paper.py` prints the tables of docs/scale.md; tests hold that they are the same. What a commit puts
is what the benchmarks count at a real server: see `scale.py`, whose line of the default configuration compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from smdbg import stats
from smdbg.store.format import (
    CAPACITY_ROWS,
    LOG_COLUMNS,
    LOG_ROWS,
    WIDE_ROW,
    WIDE_SHARD,
    ArraySpec,
    step_spec,
    table_spec,
    values_spec,
)

DOLLARS_PUT, DOLLARS_GET, DOLLARS_GB_MONTH = 5e-6, 0.4e-6, 0.023  # a LIST costs as much as a PUT
PREFIX_PUTS, PREFIX_GETS = 3500, 5500  # a second and prefix, before S3 answers 503 SlowDown
LISTED = 1000  # names in the answer to one LIST
COMMIT_SECONDS = 1.0
HEARTBEAT_SECONDS = 30.0  # how often a worker looks, with one GET, whether a later attempt has taken its place


@dataclass(frozen=True)
class Kept:
    """A collection as one rank saves it. `values`: elements of float64 (scalars) or float32 kept at each saved step."""

    name: str
    tensors: int
    interval: int = 1
    scalars: bool = False
    raw_steps: int = 0  # saved steps at which full values are kept too
    raw_elements: int = 0

    def tables(self) -> list[ArraySpec]:
        """Return the arrays that get a row at each saved step."""
        names = ("count",) if self.scalars else stats.DEFAULT
        dims = ("tensor_stats", "statistic")
        out = [table_spec(self.name, "stats", "stats", "float64", self.tensors, len(names), dims, names)]
        return [*out, values_spec(self.name, "float64", "float64", self.tensors)] if self.scalars else out


@dataclass(frozen=True)
class Job:
    """What some ranks save alike. `seconds`: of a training step; `commit`: seconds between commits at least."""

    ranks: int
    steps: int
    seconds: float
    kept: tuple[Kept, ...]
    commit: float = COMMIT_SECONDS


@dataclass(frozen=True)
class Bill:
    """What it comes to, all ranks together. `rate`: PUTs a second on average; `burst`: PUTs of a commit of all."""

    puts: float = 0.0
    gets: float = 0.0
    objects: float = 0.0
    nbytes: float = 0.0
    rate: float = 0.0
    burst: float = 0.0

    def __add__(self, other: Bill) -> Bill:
        """Return both together."""
        return Bill(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def dollars(self) -> float:
        """Price of the requests."""
        return self.puts * DOLLARS_PUT + self.gets * DOLLARS_GET

    @property
    def monthly(self) -> float:
        """Price of keeping it for a month."""
        return self.nbytes / 1e9 * DOLLARS_GB_MONTH


def bill(job: Job) -> Bill:
    """Work out one kind of rank, times how many there are.

    A commit puts one shard of each array that got rows since the last, then the chunk of the log. It happens once in
    `commit` seconds at most, if anything was saved, and whenever a shard is full; else every 30 s. Full values in wide
    rows are put at once, a shard each.
    """
    steps, saved = job.steps, min(kept.interval for kept in job.kept)
    idle = math.ceil(HEARTBEAT_SECONDS / job.seconds)
    each = min(idle, max(saved, math.ceil(job.commit / job.seconds - 1e-9)))
    full = [spec.shard[0] * kept.interval for kept in job.kept for spec in kept.tables()]
    commits = math.ceil(steps / min(each, *full))
    puts, objects, nbytes, burst = float(commits), math.ceil(steps / LOG_ROWS), steps * 8.0 * len(LOG_COLUMNS), 1.0
    arrays = 1
    for kept in job.kept:
        rows = math.ceil(steps / kept.interval)
        for spec in kept.tables():
            puts += min(commits, rows)
            objects += math.ceil(rows / spec.shard[0])
            nbytes += rows * math.prod(spec.tail) * 8
            burst += 1
        chunks = math.ceil(rows / step_spec(kept.name).shard[0])
        wide = kept.raw_steps * _wide(kept.raw_elements)
        puts, objects = puts + chunks + wide, objects + chunks + wide
        nbytes += 8 * rows + 4 * kept.raw_elements * kept.raw_steps
        arrays += len(kept.tables()) + 1 + (kept.raw_steps > 0)
    # Metadata: a group each and arrays, told anew as they grow, the worker with them; the root and its three groups.
    grown = math.ceil(steps / CAPACITY_ROWS)
    objects += arrays + len(job.kept) + 1
    puts += (arrays + 1) * (grown + 1) + len(job.kept) + 1
    gets = steps * job.seconds // HEARTBEAT_SECONDS
    one = Bill(puts, gets, objects, nbytes, puts / (steps * job.seconds), burst)
    return Bill(*(getattr(one, name) * job.ranks for name in Bill.__dataclass_fields__))


def _wide(elements: int) -> int:
    """Return how many objects the full values of one row are."""
    nbytes = 4 * elements
    if nbytes and nbytes < WIDE_ROW:
        raise ValueError("worked out here are full values of 4 MiB a row and more")
    return math.ceil(nbytes / WIDE_SHARD)


def opening(ranks: int, steps: int) -> tuple[int, int]:
    """Return (GETs, LISTs) of opening a closed run: the root, the workers' names, of each its group and its log."""
    return 1 + ranks * (1 + math.ceil(steps / LOG_ROWS)), math.ceil(ranks / LISTED)


# --- the runs of docs/scale.md ---

# The parameters of a ResNet-50: 54 weights of 25.5 million elements, and 107 biases and scales.
WEIGHTS, BIASES, ELEMENTS = 54, 107, 25_500_000
LOSSES = (Kept("losses", 1, scalars=True), Kept("metrics", 4, scalars=True))
DEFAULT = (
    *LOSSES,
    Kept("weights", WEIGHTS, 10, raw_steps=4, raw_elements=ELEMENTS),
    Kept("biases", BIASES, 10),
    Kept("gradients", WEIGHTS + BIASES, 10, raw_steps=4, raw_elements=ELEMENTS),
    Kept("updates", WEIGHTS + BIASES, 10),
)


def default(ranks: int, seconds: float, all_ranks: bool, commit: float = COMMIT_SECONDS) -> Bill:
    """Return the bill of 1,000 steps of the default configuration; not `all_ranks`: rank 0 writes what is replicated.

    Replicated parameters are written by rank 0 alone; the others write losses and metrics.
    """
    first = Job(ranks if all_ranks else 1, 1000, seconds, DEFAULT, commit)
    found = bill(first)
    return found if all_ranks else found + bill(Job(ranks - 1, 1000, seconds, LOSSES, commit))


LARGE = Job(1024, 100_000, 1.0, (*LOSSES, Kept("tensors", 10_000)))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _row(name: str, found: Bill) -> list[str]:
    return [
        name,
        _number(found.puts),
        _number(found.gets),
        _number(found.objects),
        _bytes(found.nbytes),
        f"${found.dollars:,.2f}",
        f"${found.monthly:,.2f}",
        f"{found.rate:,.0f}",
        f"{found.burst:,.0f}",
    ]


def _number(value: float) -> str:
    return f"{value / 1e6:,.1f} million" if value >= 1e6 else f"{value:,.0f}"


def _bytes(value: float) -> str:
    unit, size = next((u, s) for u, s in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if value >= s)
    return f"{value / size:,.1f} {unit}"


HEAD = ("", "PUTs", "GETs", "objects", "kept", "requests", "a month", "PUT/s", "PUTs at once")


def tables() -> dict[str, str]:
    """Return the tables of docs/scale.md by name."""
    rows = []
    for all_ranks, who in ((False, "replicated"), (True, "sharded, all write")):
        for seconds in (0.1, 1.0):
            rows.append(_row(f"{who}, steps of {seconds:g} s", default(64, seconds, all_ranks)))
    *few, many = LARGE.kept

    def large(name: str, interval: int, few_interval: int = 1, ranks: int = LARGE.ranks) -> list[str]:
        """All of it on some ranks; the others save scalars alone, every 100 steps."""
        scalars = tuple(replace(one, interval=few_interval) for one in few)
        found = bill(replace(LARGE, kept=(*scalars, replace(many, interval=interval)), ranks=ranks))
        if ranks < LARGE.ranks:
            rare = tuple(replace(one, interval=100) for one in few)
            found += bill(replace(LARGE, kept=rare, ranks=LARGE.ranks - ranks))
        return _row(name, found)

    large_rows = [
        large("everything at every step, all ranks", 1),
        large("tensors every 10 steps, scalars at every step, all ranks", 10),
        large("everything every 10 steps, all ranks", 10, 10),
        large("everything every 100 steps, all ranks", 100, 100),
        large("8 ranks: tensors every 10 steps, scalars at every step; the others: scalars every 100", 10, 1, 8),
        large("8 ranks: tensors every 100 steps, scalars at every step; the others: scalars every 100", 100, 1, 8),
    ]
    readers = []
    for ranks, steps in ((1, 1_000), (64, 1_000), (64, 100_000), (1024, 100_000)):
        gets, lists = opening(ranks, steps)
        price = gets * DOLLARS_GET + lists * DOLLARS_PUT
        readers.append([f"{ranks:,}", f"{steps:,}", f"{gets:,}", f"{lists:,}", f"${price:.5f}"])
    return {
        "default": table(HEAD, rows),
        "large": table(HEAD, large_rows),
        "opening": table(("ranks", "steps", "GETs", "LISTs", "price"), readers),
    }


if __name__ == "__main__":
    for name, text in tables().items():
        print(f"{name}\n\n{text}\n")
