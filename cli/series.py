"""The records that `smdbg inspect` prints: one a step, worker and attempt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from smdbg.analysis.run import Run, Tensor
from smdbg.errors import BadSelection, OnlyStatistics
from smdbg.select import Index, StepList, StepRange, check_index, saved_range
from smdbg.stats import DEFAULT, HASH, HISTOGRAM, STATISTICS, VALUES, exponent_histogram_names, reduce, required

Steps = np.ndarray[Any, np.dtype[np.int64]]
BATCH = 64 << 20  # bytes of values that are read at once
SMALL = 6  # elements of a value that fits on one line
BINS = frozenset((*HISTOGRAM, *exponent_histogram_names()))
WHOLE = frozenset((*HASH, *(name for name, row in STATISTICS.items() if row.unit == "elements")))  # printed as such


@dataclass(frozen=True)
class Source:
    """What one worker saved of a tensor: of one attempt alone, or (None) what is shown of all of them together."""

    tensor: Tensor
    worker: int
    attempt: int | None = None


@dataclass(frozen=True)
class Request:
    """What to show of one tensor; None and empty mean all of it. `reduce` holds names of statistics.

    `attempts` holds the tensor as each attempt alone saved it, where repeated steps are all to be shown. Without
    `bins` the counts of histograms are left out.
    """

    run: Run
    tensor: Tensor
    workers: list[int]
    mode: str | None = None
    steps: StepRange | StepList | None = None
    index: Index | None = None
    reduce: tuple[str, ...] = ()
    axis: int | None = None
    values: bool = False
    bins: bool = True
    attempts: Mapping[int, Tensor] = field(default_factory=dict)

    def sources(self) -> list[Source]:
        """Return what the records come from. No two sources mix: a step has one record of each."""
        if not self.attempts:
            return [Source(self.tensor, worker) for worker in self.workers]
        parts = [(worker, number, tensor) for worker in self.workers for number, tensor in self.attempts.items()]
        return [Source(tensor, worker, number) for worker, number, tensor in parts if worker in tensor.workers()]


FLOAT_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Found:
    """The records in order (step, worker, attempt), what to tell the user of them, and how many were not read."""

    records: list[dict[str, Any]]
    remarks: list[str] = field(default_factory=list)
    left_out: int = 0


def read(request: Request, shown: int = 0) -> Found:
    """Return the statistics, the reductions or the values that are asked for.

    With `shown`, only so many records of large values are read, the first and the last ones. Raises BadSelection where
    nothing is selected, and OnlyStatistics where values are wanted and none were kept.
    """
    if request.reduce and request.index is None and request.axis is None and _in_statistics(request):
        return Found(
            _in_order(record for source in request.sources() for record in _reduced_statistics(request, source))
        )
    if request.reduce or request.values or request.index is not None or request.tensor.dtype == "str":
        return _read_values(request, shown)
    return Found(_in_order(record for source in request.sources() for record in _statistics(request, source)))


def _read_values(request: Request, shown: int) -> Found:
    """Return the records of values, or of what they are reduced to."""
    sources = request.sources()
    keys = sorted((int(step), number) for number, source in enumerate(sources) for step in value_steps(request, source))
    wanted = sum(len(_present(request, source)) for source in sources)
    if not keys:
        raise only_statistics(request)
    remarks = []
    if len(keys) < wanted:
        remarks.append(f"Values were kept at {len(keys)} of the {wanted} selected steps; else only statistics.")
    stored, given = request.tensor.stored_dtype, request.tensor.dtype
    if FLOAT_BYTES.get(stored, 8) < FLOAT_BYTES.get(given, 0):
        remarks.append(
            f"Values were {given} and are kept as {stored}, rounded; what was too large for that is infinite here. The "
            "kept statistics are of the values before."
        )
    left_out = 0
    if shown and not request.reduce and len(keys) > shown and _elements(request) > SMALL:
        left_out = len(keys) - shown
        keys = keys[: shown // 2] + keys[-(shown - shown // 2) :]
    records = []
    for number, source in enumerate(sources):
        records += _values(request, source, np.array([step for step, of in keys if of == number], np.int64))
    return Found(_in_order(records), remarks, left_out)


def _in_order(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records in the order of step, worker and attempt."""
    return sorted(records, key=lambda record: (record["step"], record["worker"], record["attempt"]))


def _elements(request: Request) -> int:
    """Return how many elements one value has, after --index, as far as the first shape tells."""
    whole = np.broadcast_to(np.int8(0), request.tensor.shape)
    try:
        return int(np.size(whole if request.index is None else whole[request.index]))
    except IndexError:
        return 0


def _in_statistics(request: Request) -> bool:
    """Return whether the kept statistics hold all the reductions, so that no value need be read."""
    kept = set(request.tensor.statistics())
    known = [name for name in request.reduce if name in STATISTICS and name not in VALUES]
    return len(known) == len(request.reduce) and all(kept.issuperset(required(name)) for name in known)


def value_steps(request: Request, source: Source) -> Steps:
    """Return the selected steps (int64 [n]) at which the source kept full values."""
    kept = source.tensor.value_steps(mode=request.mode, worker=source.worker)
    return np.intersect1d(_selected(request), kept)


def arrays(request: Request, source: Source, steps: Steps) -> Iterator[Any]:
    """Yield the value of each step, after --index, reading about 64 MiB at a time."""
    at_once = max(1, BATCH // max(1, 8 * _elements(request)))
    for start in range(0, len(steps), at_once):
        yield from _batch(request, source, steps[start : start + at_once])


def _batch(request: Request, source: Source, steps: Steps) -> Iterable[Any]:
    """Return the values of the steps, after --index; raises BadSelection where it takes nothing from one of them.

    A shape is looked up only where the index failed or left nothing: to look up each would take longer than to read.
    """
    tensor, index = source.tensor, request.index
    try:
        values = tensor.values(steps, worker=source.worker, index=index)
    except IndexError:
        _check(request, source, steps.tolist())
        raise
    empty = [step for step, value in zip(steps.tolist(), values, strict=True) if not np.size(value)]
    _check(request, source, empty)
    return values


def _check(request: Request, source: Source, steps: Sequence[int]) -> None:
    """Raise BadSelection unless --index takes something from the tensor at each step that is not empty there."""
    if request.index is None:
        return
    for step in steps:
        check_index(request.index, source.tensor.shape_at(step, source.worker), source.tensor.name)


def _selected(request: Request) -> Steps:
    """Return the steps (int64 [n], ascending) that are asked for, of those that any of the workers saved."""
    tensor = request.tensor
    saved = np.unique(np.concatenate([tensor.steps(mode=request.mode, worker=w) for w in request.workers]))
    if not len(saved):
        where = f" in mode {request.mode}" if request.mode else ""
        raise BadSelection(
            f"'{tensor.name}' was never saved{where} in {request.run.url}: {saved_range(tensor.steps())}."
        )
    return saved if request.steps is None else request.steps.apply(saved)


def _present(request: Request, source: Source) -> Steps:
    """Return the selected steps at which the source saved the tensor."""
    return np.intersect1d(_selected(request), source.tensor.steps(mode=request.mode, worker=source.worker))


def _rows(known: Steps, steps: Steps) -> Steps:
    """Return where the steps are in the known ones (ascending); of a step that an attempt repeated, the last time."""
    return np.searchsorted(known, steps, side="right") - 1


def _begun(source: Source, steps: Steps) -> list[dict[str, Any]]:
    """Return the records of the steps with what tells the step."""
    table = source.tensor.run.step_table(source.worker)
    return [
        {
            "step": int(table.step[row]),
            "mode": str(table.mode[row]),
            "mode_step": int(table.mode_step[row]),
            "worker": source.worker,
            "attempt": int(table.attempt[row]),
        }
        for row in _rows(table.step, steps)
    ]


def _statistics(request: Request, source: Source) -> list[dict[str, Any]]:
    """Return the kept statistics of every selected step; scalars have their value before them."""
    tensor, worker, steps = source.tensor, source.worker, _present(request, source)
    records = _begun(source, steps)
    if not request.tensor.shape:
        kept = np.intersect1d(steps, tensor.value_steps(mode=request.mode, worker=worker))
        values = dict(zip(kept.tolist(), tensor.values(kept, worker=worker), strict=True)) if len(kept) else {}
        for record in records:
            value = values.get(record["step"])
            record["value"] = value if value is None or np.ndim(value) == 0 else None
    _add_statistics(request, source, records, _kept(request))
    return records


def _kept(request: Request) -> list[str]:
    """Return the names of the statistics to show, the same for all records: first those that most tensors have."""
    kept = [name for name in request.tensor.statistics() if request.bins or name not in BINS]
    return [name for name in DEFAULT if name in kept] + [name for name in kept if name not in DEFAULT]


def _reduced_statistics(request: Request, source: Source) -> list[dict[str, Any]]:
    """Return the reductions that the statistics already hold, at every selected step."""
    records = _begun(source, _present(request, source))
    _add_statistics(request, source, records, request.reduce)
    return records


def _values(request: Request, source: Source, steps: Steps) -> list[dict[str, Any]]:
    """Return the values of the steps, or their reductions."""
    records = _begun(source, steps)
    for record, value in zip(records, arrays(request, source, steps), strict=True):
        if not request.reduce:
            record["value"] = value
        for name in request.reduce:
            record[name] = reduced(request, value, name)
    return records


def reduced(request: Request, value: Any, name: str) -> Any:
    """Return one reduction of one value: a number, or an array with --axis."""
    ndim = np.ndim(value)
    if request.axis is not None and not -ndim <= request.axis < ndim:
        axes = "a single number" if ndim == 0 else f"of {ndim} axes, 0 to {ndim - 1}"
        raise BadSelection(f"--axis {request.axis} does not exist: '{request.tensor.name}' is {axes} here.")
    return reduce(np.asarray(value), name, axis=request.axis)


def _add_statistics(request: Request, source: Source, records: list[dict[str, Any]], names: Sequence[str]) -> None:
    """Put the statistics into the records of the source's steps; NaN where a tensor has no finite element."""
    known, found = source.tensor.stat_table(names, mode=request.mode, worker=source.worker)
    rows = _rows(known, np.array([record["step"] for record in records], np.int64))
    for name in names:
        for record, value in zip(records, found[name][rows].tolist(), strict=True):
            record[name] = _number(name, value)


def _number(name: str, value: float) -> float | int | None:
    """Return a statistic as a plain number; counts and hashes are whole."""
    if name in WHOLE:
        return None if np.isnan(value) else int(value)
    return value


def only_statistics(request: Request) -> OnlyStatistics:
    """Return the error for values that were not kept, which names the steps where they were."""
    tensor = request.tensor
    kept = np.unique(np.concatenate([tensor.value_steps(mode=request.mode, worker=w) for w in request.workers]))
    shown = ", ".join(map(str, kept[:8])) + (f", … ({len(kept)} steps in all)" if len(kept) > 8 else "")
    steps = "steps" if len(kept) > 1 else "step"
    where = f"values were kept at {steps} {shown}" if len(kept) else "no values of it were kept in this run"
    advice = "" if len(kept) else " Leave out --values for the statistics, or let the hook save this collection whole."
    if tensor.pruned is not None:
        advice = f" Some values of '{tensor.collection}' were taken out by `smdbg prune`."
    return OnlyStatistics(
        f"Only statistics of '{tensor.name}' were kept at the selected steps of {request.run.url}; {where}.{advice}"
    )
