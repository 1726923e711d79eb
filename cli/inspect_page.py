"""What `smdbg inspect` shows to people: the facts of a tensor, its course as a line, and a table of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from smdbg.cli.output import Column, Record, console, counted, data, facts, line, number, printable, shape, table
from smdbg.cli.series import SMALL, WHOLE, Found, Request, Steps
from smdbg.cli.sparkline import sparkline
from smdbg.stats import HASH

ROWS = 20  # steps shown unless --steps asks for more
STEP_FIELDS = ("step", "mode", "mode_step", "worker", "attempt")


def show(request: Request, found: Found) -> None:
    """Print the page."""
    records = found.records
    facts([*_facts(request), *_course(request, records)])
    data("")
    total = len(records) + found.left_out
    short = _ends(records) if request.steps is None else records
    gap = ROWS // 2 - 1 if len(short) < total else -1
    if any(_is_array(record.get("value")) and np.size(record["value"]) > SMALL for record in short):
        _blocks(short, gap)
    else:
        table(short, _columns(records), gap)
    if len(short) < total:
        line(f"{total - len(short):,} of {total:,} left out; --steps : shows all", "dim")


def _is_array(value: Any) -> bool:
    """Return whether a value has axes."""
    return value is not None and np.ndim(value) > 0


def _facts(request: Request) -> list[tuple[str, str]]:
    """Return what is known of the tensor."""
    tensor = request.tensor
    kept = [step for worker in request.workers for step in tensor.value_steps(mode=request.mode, worker=worker)]
    return [
        ("tensor", tensor.name),
        ("collection", tensor.collection),
        ("role", tensor.role + (f" of {tensor.info.of}" if tensor.info.of else "")),
        ("dtype", tensor.dtype),
        ("shape", shape(tensor.shape)),
        ("steps", _span(tensor.steps(mode=request.mode))),
        ("values", _span(np.unique(kept)) if kept else "none, statistics only"),
        ("workers", ", ".join(map(str, request.workers)) if len(request.workers) > 1 else ""),
    ]


def _span(steps: Sequence[int] | Steps) -> str:
    """Return `200 steps, 0 to 199`."""
    if not len(steps):
        return "none"
    between = f", {steps[0]} to {steps[-1]}" if len(steps) > 1 else f", {steps[0]}"
    return counted(len(steps), "step") + between


def _course(request: Request, records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the series of the first worker as a line of blocks with its ends; of a repeated step the last attempt."""
    first = {record["step"]: record for record in records if record["worker"] == records[0]["worker"]}
    title, values = _series(request, list(first.values()))
    if len(values) < 2:
        return []
    drawn = sparkline(values, max(10, min(60, console().width - 60)))
    finite = [value for value in values if np.isfinite(value)]
    text = f"{number(min(finite))} to {number(max(finite))}" if finite else "no finite value"
    odd = len(values) - len(finite)
    text += f", {odd} not finite" if odd else ""
    return [(title, f"{drawn.text}  {text}{', log scale' if drawn.logarithmic else ''}")]


def _series(request: Request, records: list[dict[str, Any]]) -> tuple[str, list[float]]:
    """Return the name and the numbers of what to draw: a scalar's value, a reduction, else l2."""
    if "l2" in records[0] and "count" in records[0]:
        name = "mean" if not request.tensor.shape else "l2"
        return ("value" if name == "mean" else "l2"), [_marked(record, name) for record in records]
    name = request.reduce[0] if request.reduce else "value"
    values = [record.get(name) for record in records]
    if any(value is None or _is_array(value) or np.asarray(value).dtype.kind not in "fiub" for value in values):
        return name, []
    return name, [float(value) for value in values if value is not None]


def _marked(record: Record, name: str) -> float:
    """Return a statistic of a step, or NaN or an infinity where the tensor held one."""
    if record["nan"]:
        return np.nan
    if record["posinf"] or record["neginf"]:
        return np.inf if record["posinf"] else -np.inf
    return float(record[name])


def _ends(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first and the last records where there are many."""
    if len(records) <= ROWS:
        return records
    return records[: ROWS // 2] + records[-(ROWS // 2) :]


def _columns(records: list[dict[str, Any]]) -> list[Column]:
    """Return the columns: the step as the training counts it where that differs, then the numbers."""
    columns = [Column("step", lambda r: str(r["step"]), justify="right")]
    if any(record["mode"] != "global" for record in records):
        plain = all(record["mode_step"] == record["step"] for record in records)
        title = "mode" if plain else "mode step"
        columns.append(Column(title, lambda r: r["mode"] if plain else f"{r['mode']} {r['mode_step']}", drop=50))
    if len({record["worker"] for record in records}) > 1:
        columns.append(Column("worker", lambda r: str(r["worker"]), justify="right"))
    if len({record["attempt"] for record in records}) > 1:
        columns.append(Column("attempt", lambda r: str(r["attempt"]), justify="right"))
    names = [name for name in records[0] if name not in STEP_FIELDS]
    scalar = "value" in names and len(names) > 1
    if scalar:
        names = ["value", *(name for name in names if name == "last")]
        if any(record["value"] is None for record in records):
            names.append("mean")
    if set(HASH) <= set(names):
        names = [name for name in names if name not in HASH] + ["hash"]
    return columns + [_number_column(name, rank) for rank, name in enumerate(names)]


# The statistics that a narrow terminal shows last come first.
LEAST = (
    *("q01", "q99", "q05", "q95", "q25", "q75", "q50", "hash"),
    *("count", "abs_mean", "l1", "zeros", "std", "neginf", "posinf", "min", "max", "mean", "nan", "l2", "abs_max"),
)


def _number_column(name: str, rank: int) -> Column:
    """Return the column of one statistic or value; trouble is red."""
    drop = 40 - LEAST.index(name) if name in LEAST else (0 if rank == 0 else 20)
    trouble = name in ("nan", "posinf", "neginf")
    return Column(
        name.replace("_", " "),
        _hash if name == "hash" else lambda r: _cell(r.get(name), name),
        justify="right",
        drop=drop,
        style=(lambda r: "red" if np.any(np.asarray(r.get(name), float) > 0) else "") if trouble else None,
    )


def _hash(record: Record) -> str:
    """Return the two halves of a hash as one number, in 16 hexadecimal digits."""
    high, low = (record[name] for name in HASH)
    return "-" if high is None or low is None else f"{high:08x}{low:08x}"


def _cell(value: Any, name: str) -> str:
    """Return one number, text or small list for people."""
    if value is None:
        return "-"
    if name in WHOLE and not _is_array(value):
        return number(int(value))
    if _is_array(value):
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype.kind == "V" else array
        text = np.array2string(array, precision=4, threshold=SMALL, max_line_width=10**6)
        return " ".join(text.split())
    scalar = np.asarray(value).item() if hasattr(value, "dtype") and value.dtype.kind != "V" else value
    if isinstance(scalar, bool | str | complex):
        return str(scalar)
    return number(scalar if isinstance(scalar, int) else float(scalar), 6)


def _blocks(records: list[dict[str, Any]], gap: int) -> None:
    """Print whole values, one block a step."""
    several = len({record["worker"] for record in records}) > 1
    repeated = len({record["attempt"] for record in records}) > 1
    for row, record in enumerate(records):
        mode = "" if record["mode"] == "global" else f" ({record['mode']} {record['mode_step']})"
        whose = f" worker {record['worker']}" if several else ""
        whose += f" attempt {record['attempt']}" if repeated else ""
        line(f"step {record['step']}{mode}{whose}", "bold")
        value = np.asarray(record["value"])
        value = value.astype(np.float32) if value.dtype.kind == "V" else value
        width = min(console().width, 120)
        for text in np.array2string(value, max_line_width=width, threshold=200).splitlines():
            data(printable(text))
        if row == gap:
            line("…", "dim")
