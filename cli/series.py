"""The records that `smdbg inspect` prints: one a step and worker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from smdbg.analysis.run import Run, Tensor
from smdbg.errors import BadSelection, OnlyStatistics
from smdbg.select import Index, StepList, StepRange, check_index, saved_range
from smdbg.stats import DEFAULT, STATISTICS, VALUES, reduce, required

Steps = np.ndarray[Any, np.dtype[np.int64]]
BATCH = 64 << 20  # bytes of values that are read at once
SMALL = 6  # elements of a value that fits on one line
COUNTS = ("count", "nan", "posinf", "neginf", "zeros")  # whole numbers, printed as such


@dataclass(frozen=True)
class Request:
    """What to show of one tensor; None and empty mean all of it. `reduce` holds names of statistics."""

    run: Run
    tensor: Tensor
    workers: list[int]
    mode: str | None = None
    steps: StepRange | StepList | None = None
    index: Index | None = None
    reduce: tuple[str, ...] = ()
    axis: int | None = None
    values: bool = False


@dataclass(frozen=True)
class Found:
    """The records, in the order of step and worker, what the user should know of them, and how many were not read."""

    records: list[dict[str, Any]]
    remarks: list[str] = field(default_factory=list)
    left_out: int = 0


def read(request: Request, shown: int = 0) -> Found:
    """Return the statistics, the reductions or the values that are asked for.

    With `shown`, only so many records of large values are read, the first and the last ones. Raises BadSelection where
    nothing is selected, and OnlyStatistics where values are wanted and none were kept.
    """
    if request.reduce and request.index is None and request.axis is None and _in_statistics(request):
        return Found(_in_order(record for worker in request.workers for record in _reduced_statistics(request, worker)))
    if request.reduce or request.values or request.index is not None or request.tensor.dtype == "str":
        return _read_values(request, shown)
    return Found(_in_order(record for worker in request.workers for record in _statistics(request, worker)))


def _read_values(request: Request, shown: int) -> Found:
    """Return the records of values, or of what they are reduced to."""
    keys = sorted((int(step), worker) for worker in request.workers for step in value_steps(request, worker))
    wanted = sum(len(_present(request, worker)) for worker in request.workers)
    if not keys:
        raise only_statistics(request)
    remarks = []
    if len(keys) < wanted:
        remarks.append(f"Values were kept at {len(keys)} of the {wanted} selected steps; else only statistics.")
    left_out = 0
    if shown and not request.reduce and len(keys) > shown and _elements(request) > SMALL:
        left_out = len(keys) - shown
        keys = keys[: shown // 2] + keys[-(shown - shown // 2) :]
    records = []
    for worker in request.workers:
        records += _values(request, worker, np.array([step for step, rank in keys if rank == worker], np.int64))
    return Found(_in_order(records), remarks, left_out)


def _in_order(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records in the order of step and worker."""
    return sorted(records, key=lambda record: (record["step"], record["worker"]))


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


def value_steps(request: Request, worker: int) -> Steps:
    """Return the selected steps (int64 [n]) at which the worker kept full values."""
    kept = request.tensor.value_steps(mode=request.mode, worker=worker)
    return np.intersect1d(_selected(request), kept)


def arrays(request: Request, worker: int, steps: Steps) -> Iterator[Any]:
    """Yield the value of each step, after --index, reading about 64 MiB at a time."""
    tensor = request.tensor
    if request.index is not None:
        for step in steps:
            check_index(request.index, tensor.shape_at(int(step), worker), tensor.name)
    at_once = max(1, BATCH // max(1, 8 * _elements(request)))
    for start in range(0, len(steps), at_once):
        yield from tensor.values(steps[start : start + at_once], worker=worker, index=request.index)


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


def _present(request: Request, worker: int) -> Steps:
    """Return the selected steps at which the worker saved the tensor."""
    return np.intersect1d(_selected(request), request.tensor.steps(mode=request.mode, worker=worker))


def _begun(request: Request, worker: int, steps: Steps) -> list[dict[str, Any]]:
    """Return the records of the steps with what tells the step."""
    table = request.run.step_table(worker)
    rows = np.searchsorted(table.step, steps)
    return [
        {"step": int(step), "mode": str(table.mode[row]), "mode_step": int(table.mode_step[row]), "worker": worker}
        for step, row in zip(steps, rows, strict=True)
    ]


def _statistics(request: Request, worker: int) -> list[dict[str, Any]]:
    """Return the kept statistics of every selected step; scalars have their value before them."""
    tensor, steps = request.tensor, _present(request, worker)
    records = _begun(request, worker, steps)
    if not tensor.shape:
        kept = np.intersect1d(steps, tensor.value_steps(mode=request.mode, worker=worker))
        values = dict(zip(kept.tolist(), tensor.values(kept, worker=worker), strict=True)) if len(kept) else {}
        for record in records:
            value = values.get(record["step"])
            record["value"] = value if value is None or np.ndim(value) == 0 else None
    _add_statistics(request, worker, records, [name for name in DEFAULT if name in tensor.statistics()])
    return records


def _reduced_statistics(request: Request, worker: int) -> list[dict[str, Any]]:
    """Return the reductions that the statistics already hold, at every selected step."""
    steps = _present(request, worker)
    records = _begun(request, worker, steps)
    _add_statistics(request, worker, records, request.reduce)
    return records


def _values(request: Request, worker: int, steps: Steps) -> list[dict[str, Any]]:
    """Return the values of the steps, or their reductions."""
    records = _begun(request, worker, steps)
    for record, value in zip(records, arrays(request, worker, steps), strict=True):
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


def _add_statistics(request: Request, worker: int, records: list[dict[str, Any]], names: Sequence[str]) -> None:
    """Put the statistics into the records of the worker's steps; NaN where a tensor has no finite element."""
    known, found = request.tensor.stat_table(names, mode=request.mode, worker=worker)
    rows = np.searchsorted(known, [record["step"] for record in records])
    for name in names:
        for record, value in zip(records, found[name][rows].tolist(), strict=True):
            record[name] = _number(name, value)


def _number(name: str, value: float) -> float | int | None:
    """Return a statistic as a plain number; counts are whole."""
    if name in COUNTS:
        return None if np.isnan(value) else int(value)
    return value


def only_statistics(request: Request) -> OnlyStatistics:
    """Return the error for values that were not kept, which names the steps where they were."""
    tensor, worker = request.tensor, request.workers[0]
    kept = tensor.value_steps(mode=request.mode, worker=worker)
    shown = ", ".join(map(str, kept[:8])) + (f", … ({len(kept)} steps in all)" if len(kept) > 8 else "")
    steps = "steps" if len(kept) > 1 else "step"
    where = f"values were kept at {steps} {shown}" if len(kept) else "no values of it were kept in this run"
    advice = "" if len(kept) else " Leave out --values for the statistics, or let the hook save this collection whole."
    return OnlyStatistics(
        f"Only statistics of '{tensor.name}' were kept at the selected steps of {request.run.url}; {where}.{advice}"
    )
