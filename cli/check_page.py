"""Print the report of a check in every format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, assert_never

from smdbg.cli.cause_text import Story, noun, summary_field, tell
from smdbg.cli.output import (
    VERSION,
    Column,
    Format,
    Record,
    console,
    counted,
    data,
    dump,
    field,
    line,
    number,
    plain,
    table,
    talk,
)

if TYPE_CHECKING:
    from smdbg.analysis.checker import Report

ROWS = 20  # findings that are shown one by one; of more, the first few of each kind
OF_A_KIND = 3
MOST_ROWS = 40
MESSAGE_WIDTH = 60  # where there is less room, the messages go below the table
REST = 65  # what the other columns of the findings need, without the names of the tensors
STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan", "failed": "bold red"}


def show(report: Report, form: Format, quiet: bool = False, story: Story | None = None) -> None:
    """Print the findings, what became of the rules, the first cause if its story is given, and the closing line."""
    match form:
        case Format.TABLE:
            _page(report, story)
        case Format.TSV:
            for finding in report.findings:
                data("\t".join(field(value) for value in finding.record().values()))
            for result in _odd(report):
                talk(f"{result['name']}: {result['outcome']}: {result['detail']}", quiet)
            talk(report.summary.text(), quiet)
        case Format.JSONL:
            for record in records(report, story):
                data(dump(record))
        case Format.JSON:
            data(json.dumps(document(report, story), indent=2, allow_nan=False, ensure_ascii=False))
        case _:
            assert_never(form)


def records(report: Report, story: Story | None = None) -> list[dict[str, Any]]:
    """Return the findings, then the rules, then the summary, each with its type."""
    return [
        *({"type": "finding", **finding.record()} for finding in report.findings),
        *({"type": "rule", **result.record()} for result in report.rules),
        {"type": "summary", **report.summary.record(), **summary_field(story)},
    ]


def document(report: Report, story: Story | None = None) -> dict[str, Any]:
    """Return the same as one JSON object."""
    return {
        "version": VERSION,
        "findings": plain([finding.record() for finding in report.findings]),
        "rules": plain([result.record() for result in report.rules]),
        "summary": plain({**report.summary.record(), **summary_field(story)}),
    }


def _page(report: Report, story: Story | None) -> None:
    """Print the report for people."""
    found = [finding.record() for finding in report.findings]
    roles = {name: info.role for name, info in story.catalogue.items()} if story else {}
    rows, left = shortened(found, roles)
    shown = [record for record in rows if "more" not in record]
    longest = max((len(record["tensor"]) for record in rows), default=0)
    roomy = console().width >= REST + longest + MESSAGE_WIDTH
    table(rows, _columns(len(report.summary.workers), roomy))
    if left:
        line(f"… and {counted(left, 'finding')} more")
    if len(shown) < len(found):
        line("--format jsonl lists every finding", "dim")
    if found and not roomy:
        data("")
        for record in shown:
            line(f"{record['rule']}: {record['message']}")
    hints = dict.fromkeys(record["hint"] for record in shown if record["hint"])
    if hints:
        data("")
        for hint in hints:
            line(f"hint: {hint}")
    odd = _odd(report)
    if odd:
        if found:
            data("")
        table(odd, _rule_columns())
    if found and story is not None:
        data("")
        tell(story)
    if found or odd:
        data("")
    clean = "" if found else "No findings. "
    line(f"{clean}{_tally(found)}{report.summary.text()}")


def shortened(found: Sequence[Record], roles: Mapping[str, str]) -> tuple[list[Record], int]:
    """Return the rows to show, in their order, and how many findings no row stands for.

    Of many findings each kind (rule, severity, role of the tensor, worker) has its first few, and a row for the rest.
    """
    if len(found) <= ROWS:
        return list(found), 0
    kinds: dict[tuple[Any, ...], list[Record]] = {}
    for record in found:
        kind = (record["rule"], record["severity"], roles.get(record["tensor"], ""), record["worker"])
        kinds.setdefault(kind, []).append(record)
    rows: list[Record] = []
    for (_, _, role, _), members in kinds.items():
        one_more = len(members) == OF_A_KIND + 1
        rows += members[: OF_A_KIND + one_more]
        rest = members[OF_A_KIND + one_more :]
        if rest:
            rows.append(_rest(rest, role))
    kept = rows[:MOST_ROWS]
    return kept, sum(record.get("more", 1) for record in rows[MOST_ROWS:])


def _rest(members: Sequence[Record], role: str) -> Record:
    """Return a row that stands for several findings of a kind."""
    first = min(members, key=lambda record: record["first_step"])
    return {
        **first,
        "tensor": f"… and {noun(role, len(members))} more",
        "last_step": max(record["last_step"] for record in members),
        "more": len(members),
        "message": "",
    }


def _tally(found: Sequence[Record]) -> str:
    """Return `3 errors, 1 warning. `, and nothing for no findings."""
    severities = [record["severity"] for record in found]
    parts = [counted(severities.count(word), word) for word in ("error", "warning") if word in severities]
    parts += [f"{severities.count('info')} info"] if "info" in severities else []
    return f"{', '.join(parts)}. " if parts else ""


def _odd(report: Report) -> list[dict[str, Any]]:
    """Return the records of the rules that neither found something nor found it clean."""
    return [
        record
        for record in (result.record() for result in report.rules)
        if record["outcome"] not in ("clean", "violated")
    ]


def steps_text(record: Record) -> str:
    """Return first and last step as a training log has them: `train 300 (step 312 – 500)`."""
    first = f"step {record['first_step']}"
    if record["mode"] != "global":
        same = record["first_mode_step"] == record["first_step"]
        first = f"{record['mode']} {record['first_mode_step']}" + ("" if same else f" ({first})")
    if record["last_step"] == record["first_step"]:
        return first
    if first.endswith(")"):  # both ends in the same count
        return f"{first[:-1]} – {record['last_step']})"
    return f"{first} – {record['last_step']}"


def _columns(workers: int, roomy: bool) -> list[Column]:
    """Return the columns of the findings; the worker only in a run of several."""
    columns = [
        Column("severity", lambda r: r["severity"], style=lambda r: STYLES.get(r["severity"], "")),
        Column("rule", lambda r: r["rule"], drop=1),
        Column("tensor", lambda r: r["tensor"], fold=True),
        Column("steps", steps_text, drop=2),
        Column("violated", _violated, justify="right", drop=3),
        Column("worst", _worst, justify="right", drop=4),
    ]
    if workers > 1:
        columns.insert(3, Column("worker", lambda r: str(r["worker"]), justify="right"))
    if roomy:
        columns.append(Column("message", lambda r: r["message"], fold=True))
    return columns


def _violated(record: Record) -> str:
    """Return `3 of 20` saved steps; nothing for a row that stands for several findings."""
    return "" if "more" in record else f"{record['violations']:,} of {record['judged']:,}"


def _worst(record: Record) -> str:
    """Return the worst value for people, with what it is: `2 × nan` counts elements, others are values."""
    statistic, value = record["statistic"], record["worst"]
    if "more" in record:
        return ""
    if value is None:
        return f"{statistic} -"
    shown = number(float(value)) if math.isfinite(value) else str(float(value))
    return f"{shown} × {statistic}" if statistic in ("nan", "posinf", "neginf") else f"{statistic} {shown}"


def _rule_columns() -> list[Column]:
    """Return the columns of the rules that gave no verdict."""
    return [
        Column("rule", lambda r: r["name"]),
        Column("outcome", lambda r: r["outcome"], style=lambda r: STYLES.get(r["outcome"], "dim")),
        Column("reason", lambda r: r["detail"], fold=True),
    ]
