"""The benchmarks run, and what they print says what was measured. No figure is judged here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """The modules timing and report, imported as run.py imports them and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import report
    import timing

    yield timing, report
    for name in ("report", "timing"):
        sys.modules.pop(name, None)


def test_they_run_and_print_every_line():
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--quick"]
    only = [word for name in ("folder", "kernel") for word in ("--only", name)]
    done = subprocess.run([*command, *only], capture_output=True, text=True, env={**os.environ}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "## A saved step of 13 MB in a folder" in done.stdout
    assert "## Statistics" in done.stdout
    assert "## Memory of the writer" not in done.stdout
    assert "back to back, each, against raw writes from two threads" in done.stdout


def test_a_part_of_the_figures_is_never_kept():
    results = BENCHMARKS / "RESULTS.md"
    before = results.read_bytes()
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), "--write", "--only", "kernel"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--write" in done.stderr
    assert results.read_bytes() == before


def test_rounds_interleave_and_warm_up_does_not_count(modules):
    timing, _ = modules
    calls = []
    costs = timing.interleaved(4, {n: lambda n=n: calls.append(n) or timing.Cost(len(calls), 0) for n in "ab"})
    assert "".join(calls) == "ba" + "ab" + "ba" + "ab" + "ba"
    assert costs["a"] == [timing.Cost(n, 0) for n in (3, 6, 7, 10)]


@pytest.mark.parametrize(
    ("ratios", "goal", "at_least", "verdict"),
    [
        ([1.0, 1.4, 9.0], 1.5, False, "met"),
        ([1.0, 1.6, 1.7], 1.5, False, "missed"),
        ([1.0, 1.6, 1.7], 1.5, True, "met"),
        ([1.0], None, False, ""),
    ],
)
def test_the_median_is_held_against_the_goal(modules, ratios, goal, at_least, verdict):
    timing, _ = modules
    assert timing.Line("x", "", "", ratios, goal, at_least).verdict == verdict


def test_a_line_shows_median_range_and_goal(modules):
    timing, report = modules
    ours, base = [timing.Cost(s, 0) for s in (0.002, 0.004, 0.012)], [timing.Cost(0.001, 0)] * 3
    text = report.page({"Saving": [timing.compare("a step", ours, base, 5.0, 2, "with a note")]}, "2 cores")
    row = next(line for line in text.splitlines() if line.startswith("| a step"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        "a step", "2.00 ms (1.00 to 6.00)", "0.50 ms (0.50 to 0.50)", "4.00 (2.00 to 12.00)", "<= 5", "met",
    ]  # fmt: skip
    assert "- a step: with a note." in text and "2 cores" in text
