"""Print the report of a check that was held against a baseline."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from smdbg.cli import check_page
from smdbg.cli.output import Column, Format, counted, data, dump, field, line, plain, table, talk

if TYPE_CHECKING:
    from smdbg.analysis.baseline import Compared
    from smdbg.cli.cause_text import Story


def show(
    compared: Compared, file: str, form: Format, quiet: bool = False, story: Story | None = None
) -> None:
    """Print the findings that count as ever; then, apart, what the baseline `file` says of the others."""
    match form:
        case Format.JSON:
            document = check_page.document(compared.counted, story) | {"baseline": plain(content(compared, file))}
            data(json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False))
        case Format.JSONL:
            *records, summary = check_page.records(compared.counted, story)
            for record in (*records, {"type": "baseline", **content(compared, file)}, summary):
                data(dump(record))
        case Format.TSV:
            check_page.show(compared.counted, form, quiet, story)
            for text in texts(compared, file):
                talk(text, quiet)
        case _:
            check_page.show(compared.counted, form, quiet, story)
            if compared.known:
                data("")
                table(content(compared, file)["known"], _columns())
                data("")
            for text in texts(compared, file):
                line(text)


def content(compared: Compared, file: str) -> dict[str, Any]:
    """Return what the baseline says: the findings that are known, those that count again, and what is fixed."""
    return {
        "file": file,
        "known": [{**finding.record(), **_why(entry.record())} for finding, entry in compared.known],
        "expired": [{**finding.record(), **_why(entry.record())} for finding, entry in compared.expired],
        "fixed": [entry.record() for entry in compared.fixed],
    }


def texts(compared: Compared, file: str) -> list[str]:
    """Return the same in a sentence each, only for what there is; how many are known is always said."""
    found = [f"{counted(len(compared.known), 'known finding')} in {file}, not counted."]
    for finding, entry in compared.expired:
        what = f"{finding.rule} of {finding.tensor} counts again: its entry in {file} expired on {entry.expires}"
        found.append(what + (f" ({entry.reason})." if entry.reason else "."))
    if compared.fixed:
        names = ", ".join(f"{entry.rule} of {entry.tensor}" for entry in compared.fixed)
        found.append(f"{len(compared.fixed)} fixed: {names}. `--write-baseline {file}` takes them out.")
    return found


def _why(entry: dict[str, Any]) -> dict[str, Any]:
    return {"reason": entry["reason"], "expires": entry["expires"]}


def _columns() -> list[Column]:
    """Return the columns of the known findings."""
    return [
        Column("known", lambda r: r["severity"], style=lambda _: "dim"),
        Column("rule", lambda r: r["rule"]),
        Column("tensor", lambda r: r["tensor"], fold=True),
        Column("steps", check_page.steps_text, drop=2),
        Column("reason", lambda r: r["reason"] or "-", fold=True),
        Column("expires", lambda r: field(r["expires"]) or "-", drop=1),
    ]
