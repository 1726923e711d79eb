"""A tensor of a run: its values, shapes and statistics, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from smdbg import stats as statistics
from smdbg.errors import BadSelection, OnlyStatistics, StepNotSaved, StepNotYet
from smdbg.store.attempt import Attempt
from smdbg.store.dtypes import zarr_dtype
from smdbg.store.format import ZARR_ITEMSIZE, product

if TYPE_CHECKING:
    from smdbg.analysis.run import Run

Steps = NDArray[np.int64]
Place = tuple[Attempt, int]  # and a row of the tensor's collection

EACH_BYTES = 32 << 20  # of values that `each` reads at a time
EACH_STEPS = 4096  # whose shapes it looks up at a time


class Tensor:
    """A named series of values in a run."""

    def __init__(self, run: Run, name: str) -> None:
        """Point at a tensor; use `Run.tensor`."""
        self.run = run
        self.name = name
        self.info = run._info(name)

    def __repr__(self) -> str:
        """Say what tensor it is."""
        return f"Tensor({self.name!r}, {self.collection}, {self.dtype}, shape {self.shape})"

    @property
    def collection(self) -> str:
        """The collection it belongs to."""
        return self.info.collection

    @property
    def role(self) -> str:
        """Its role: weight, gradient, loss, ...; '' if unknown."""
        return self.info.role

    @property
    def dtype(self) -> str:
        """The dtype of its first save, by NumPy's name (bfloat16 and float8 too)."""
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its first save; `shape_at` knows the others."""
        return _shown_shape(self.info.dtype, self.info.shape)

    @property
    def stored_dtype(self) -> str:
        """The dtype its full values are stored as; narrower than `dtype` where the hook was told to cast them."""
        names = [slot.dtype for entry in self.run._entries[self.name].values() for slot in entry.slots]
        return names[-1] if names else self.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the full values that were kept, over all workers."""
        total = 0
        for rank in self.workers():
            for one, _, rows, _ in self.run._parts((), self, None, rank):
                entry = one.entries[self.name]
                home = entry.info.collection
                kept = rows[one.raw_at(home, one.rows_of(home)[rows])]
                sizes = [ZARR_ITEMSIZE[zarr_dtype(slot.dtype)] for slot in entry.slots]
                if entry.layout:
                    shapes = self.run._stored.shapes(one, entry, kept)
                    total += sum(product(shape) * sizes[slot] for slot, shape in shapes)
                elif sizes:
                    total += kept.size * product(entry.info.shape) * sizes[0]
        return total

    @property
    def pruned(self) -> float | None:
        """When values of its collection were last taken out (`smdbg prune`), unix seconds; None if never."""
        notes = [one.facts.get("pruned") for one in self.run._attempts()]
        found = [note.get(self.collection) for note in notes if isinstance(note, dict)]
        times = [about.get("time") for about in found if isinstance(about, dict)]
        return max((t for t in times if isinstance(t, int | float) and 0 <= t < 1 << 34), default=None)

    def workers(self) -> list[int]:
        """Return the ranks that saved it."""
        return sorted({rank for rank, _ in self.run._entries[self.name]})

    def steps(self, mode: str | None = None, worker: int | None = None) -> Steps:
        """Return the steps where it is present (its statistics at least), ascending."""
        ranks = self.workers() if worker is None else [self.run._rank(worker)]
        parts = [self.run._series((), self, mode, rank)[0] for rank in ranks]
        if len(parts) == 1 and (np.diff(parts[0]) > 0).all():
            return parts[0]
        return np.unique(np.concatenate([np.zeros(0, np.int64), *parts]))

    def value_steps(self, mode: str | None = None, worker: int = 0) -> Steps:
        """Return the steps where its full value was kept, ascending."""
        return np.sort(np.array([step for step, _, _ in self._value_rows(mode, worker)], np.int64))

    def _value_rows(
        self, mode: str | None, worker: int, only: Sequence[int] | None = None
    ) -> list[tuple[int, Attempt, int]]:
        out = []
        for one, steps, rows, _ in self.run._parts((), self, mode, self.run._rank(worker), only, kept=True):
            out += [(int(s), one, int(r)) for s, r in zip(steps, rows, strict=True)]
        return out

    def shape_at(self, step: int, worker: int = 0) -> tuple[int, ...]:
        """Return its shape at a step where it is present. Raises StepNotSaved."""
        for one, _, here, _ in reversed(self.run._parts((), self, None, self.run._rank(worker), [step])):
            if here.size:
                slot, shape = self.run._stored.shapes(one, one.entries[self.name], here[-1:])[0]
                slots = one.entries[self.name].slots
                return _shown_shape(slots[slot].dtype if slot < len(slots) else self.dtype, shape)
        raise self._not_at(step, worker)

    def value(self, step: int, worker: int = 0, index: Any = None) -> NDArray[Any]:
        """Return its value at a step, or the part that `index` (NumPy basic indexing) selects.

        Raises StepNotSaved, StepNotYet, OnlyStatistics, DamagedData; IndexError for an index out of range.
        """
        return np.asarray(self.values([step], worker, index)[0])

    def values(
        self, steps: Iterable[int] | None = None, worker: int = 0, index: Any = None
    ) -> NDArray[Any] | list[NDArray[Any]]:
        """Return its values at many steps in one bulk read, in the order of `steps`.

        [steps, *shape]; a list of arrays where the shape changes between them. None: at every step whose value was
        kept. Errors as of `value`.
        """
        wanted, places = self._places(steps, None, self._worker(worker))
        return self._read(wanted, places, _as_tuple(index))

    def each(
        self,
        steps: Iterable[int] | None = None,
        mode: str | None = None,
        worker: int = 0,
        index: Any = None,
    ) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield (step, value) in the order of `steps`, in bounded memory; errors as of `value`.

        None: every step, of one mode or of all, where the value was kept. About 32 MiB of values are in memory, and as
        much again that is being read while the caller works with the first; more if a single value is larger.
        """
        wanted, places = self._places(steps, mode, self._worker(worker))
        part = _as_tuple(index)
        batches = self._batches(wanted, places)

        def read(batch: list[int] | None) -> NDArray[Any] | list[NDArray[Any]]:
            return self._read(batch, places, part) if batch else []

        with ThreadPoolExecutor(1) as ahead:
            batch = next(batches, None)
            coming = ahead.submit(read, batch)
            while batch is not None:
                found, now = coming.result(), batch
                batch = next(batches, None)
                coming = ahead.submit(read, batch)
                for i, step in enumerate(now):
                    yield step, np.asarray(found[i])
                del found

    def _batches(self, wanted: list[int], places: Mapping[int, Place]) -> Iterator[list[int]]:
        """Cut steps into batches whose values, read whole, are of some size together."""
        batch: list[int] = []
        left = EACH_BYTES
        for start in range(0, len(wanted), EACH_STEPS):
            block = wanted[start : start + EACH_STEPS]
            for step, size in zip(block, self._sizes(block, places), strict=True):
                if batch and size > left:
                    yield batch
                    batch, left = [], EACH_BYTES
                batch.append(step)
                left -= size
        if batch:
            yield batch

    def _sizes(self, wanted: list[int], places: Mapping[int, Place]) -> list[int]:
        """Return how many bytes the value of each step takes."""
        sizes: dict[int, int] = {}
        for one in {id(places[s][0]): places[s][0] for s in wanted}.values():
            mine = sorted((places[s][1], s) for s in set(wanted) if places[s][0] is one)
            rows = np.array([row for row, _ in mine], np.int64)
            found = self.run._stored.bytes_of(one, one.entries[self.name], rows)
            sizes.update(zip([s for _, s in mine], found, strict=True))
        return [sizes[s] for s in wanted]

    def _places(self, steps: Iterable[int] | None, mode: str | None, worker: int) -> tuple[list[int], dict[int, Place]]:
        """Return the steps that are wanted, and where the value of each is. Raises for one that has none."""
        asked = None if steps is None else [int(step) for step in steps]
        places = {step: (one, row) for step, one, row in self._value_rows(mode, worker, asked)}
        wanted = sorted(places) if asked is None else asked
        for step in wanted:
            if step not in places:
                raise self._not_at(step, worker)
        return wanted, places

    def _read(
        self, wanted: list[int], places: Mapping[int, Place], part: tuple[Any, ...] | None
    ) -> NDArray[Any] | list[NDArray[Any]]:
        out: list[NDArray[Any]] = [np.empty(0)] * len(wanted)
        for one in {id(places[s][0]): places[s][0] for s in wanted}.values():
            mine = [i for i, s in enumerate(wanted) if places[s][0] is one]
            rows = np.array([places[wanted[i]][1] for i in mine], np.int64)
            order = np.argsort(rows, kind="stable")
            got = self.run._stored.values(one, one.entries[self.name], rows[order], part)
            if len(mine) == len(wanted) and isinstance(got, np.ndarray) and (np.diff(order) == 1).all():
                return got
            for position, value in zip(order, got, strict=True):
                out[mine[position]] = value
        alike = len({(v.shape, v.dtype) for v in out}) == 1
        return np.stack(out) if alike else out

    def stat(self, name: str, mode: str | None = None, worker: int = 0) -> tuple[Steps, NDArray[np.float64]]:
        """Return (steps, values) of one statistic, stored or derived, where the tensor is present.

        Raises BadSelection for a statistic that does not exist, or that was not kept of this tensor.
        """
        kept = self.statistics()
        if name not in kept and not set(statistics.required(name)) <= set(kept):
            raise BadSelection(f"{self.run.url}: {name!r} of {self.name!r} was not kept; {', '.join(kept)} were")
        steps, found = self.run._series((name,), self, mode, self._worker(worker))
        return steps, found[name]

    def _worker(self, worker: int) -> int:
        """Return the rank. Raises BadSelection for a worker that is not there or never saved this tensor."""
        if self.run._rank(worker) not in self.workers():
            saved = listing(self.workers())
            raise BadSelection(f"{self.run.url}: worker {worker} never saved {self.name!r}; of workers: {saved}")
        return worker

    def stat_table(
        self, names: Sequence[str], mode: str | None = None, worker: int = 0
    ) -> tuple[Steps, dict[str, NDArray[np.float64]]]:
        """Return (steps, statistic -> values) of several statistics at once."""
        return self.run._series(tuple(names), self, mode, self._worker(worker))

    def features(
        self, mode: str | None = None, worker: int = 0
    ) -> tuple[Steps, NDArray[np.float32] | list[NDArray[np.float32]]]:
        """Return (steps, per-feature statistics [steps, features, 5]) where they were kept.

        The five are those of `smdbg.stats.FEATURES`: active share, mean, std, min, max over all axes but the feature
        axis. A list of [features, 5] where the number of features changes between steps.
        """
        found: list[tuple[int, NDArray[np.float32]]] = []
        for one, steps, rows, _ in self.run._parts((), self, mode, self._worker(worker)):
            entry = one.entries[self.name]
            axis = entry.info.feature_axis
            if not entry.features or axis is None:
                continue
            shapes = [shape for _, shape in self.run._stored.shapes(one, entry, rows)]
            sizes = np.array([shape[axis] if -len(shape) <= axis < len(shape) else -1 for shape in shapes])
            for place in entry.features:
                here = sizes == place.count
                columns = np.arange(place.index, place.index + place.count)
                table = self.run._stored.table(one, f"{entry.info.collection}/{place.array}", rows[here], columns)
                found += zip(steps[here].tolist(), table, strict=True)
        found.sort(key=lambda pair: pair[0])
        tables = [table for _, table in found]
        alike = len({len(table) for table in tables}) == 1
        return np.array([step for step, _ in found], np.int64), np.stack(tables) if alike else tables

    def statistics(self) -> list[str]:
        """Return the names of the statistics that were kept; of single numbers all, since the value is there."""
        kept: dict[str, None] = {}
        for one in self.run._attempts():
            entry = one.entries.get(self.name)
            if entry is None:
                continue
            for place in entry.stats:
                names = one.specs[f"{entry.info.collection}/{place.array}"].statistics
                kept.update(dict.fromkeys(statistics.DEFAULT if "min" not in names else names))
                kept.update(dict.fromkeys(names))
        return list(kept)

    def _not_at(self, step: int, worker: int) -> Exception:
        steps = self.steps(worker=worker)
        name = f"{self.run.url}: {self.name!r}"
        if step in steps:
            kept = self.value_steps(worker=worker)
            where = f"full values are kept at {listing(kept)}" if kept.size else "no full value was kept at any step"
            told = f". Some values of {self.collection!r} were taken out by `smdbg prune`"
            gone = "" if self.pruned is None else told
            return OnlyStatistics(f"{name} has only statistics at step {step}; {where}{gone}")
        last = int(self.run.steps().max(initial=-1))
        if step > last and self.run.status == "running":
            return StepNotYet(f"{name}: step {step} is not written yet; the run is at step {last}")
        return StepNotSaved(f"{name} was not saved at step {step}; it was at {listing(steps)}")


def _as_tuple(index: Any) -> tuple[Any, ...] | None:
    return index if index is None or isinstance(index, tuple) else (index,)


def _shown_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the value: text is stored with one axis more, of bytes."""
    return shape[:-1] if dtype in ("str", "bytes") else shape


def listing(numbers: Iterable[int]) -> str:
    """Return numbers in short: all of a few, of many the first, the last and how many."""
    found = [int(n) for n in numbers]
    if not found:
        return "none"
    if len(found) <= 8:
        return ", ".join(map(str, found))
    return f"{found[0]}, {found[1]}, ... {found[-1]} ({len(found)} of them)"
