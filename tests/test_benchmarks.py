"""The benchmarks run, and what they print says what was measured. No figure is judged here."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


NAMES = ("counting", "paper", "peer", "place", "report", "s3_server", "setting", "timing", "workload")


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a module as run.py does, forgotten afterwards."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.fixture
def modules(benchmarks) -> tuple[ModuleType, ModuleType]:
    """The modules timing and report."""
    return benchmarks("timing"), benchmarks("report")


def test_they_run_and_print_every_line():
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--quick"]
    only = [word for name in ("folder", "kernel") for word in ("--only", name)]
    done = subprocess.run([*command, *only], capture_output=True, text=True, env={**os.environ}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "## A saved step of 13 MB in a folder" in done.stdout
    assert "## Statistics" in done.stdout
    assert "## Memory of the writer" not in done.stdout
    assert "back to back, each, against raw writes from two threads" in done.stdout


def test_those_of_reading_faults_and_scale_run():
    names = ("read-s3", "read-folder", "lifetime", "scale", "huge", "constant", "default", "check", "peer")
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--quick", *(w for name in names for w in ("--only", name))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = {line.split("|")[1].strip(): line.split("|")[2:] for line in done.stdout.splitlines() if line[:2] == "| "}
    for start in (
        "one tensor of 256 KiB at 3 steps, against as many raw ranged GETs",
        "one tensor of 256 KiB at 3 steps, against as many raw reads",
        "requests of opening and listing",
        "from Hook() until a reader sees step 0, on S3",
        "training lost at SIGKILL, in a folder",
        "1,000 tensors x 1,000 steps of statistics: writing it",
        "100,000 steps of 3 scalars: opening it",
        "64 workers x 10 steps, in a folder: writing it",
        "ten rows of it",
        "`smdbg check` of 12 tensors x 3 steps of statistics, pack default",
        "`smdbg check` of 12 tensors x 3 steps on S3: requests",
        "unchanged_tensor over 0 MB of full values",
        "bytes put of 128 steps",
        "requests of 10 steps of 0.02 s in the default configuration",
    ):
        row = next((cells for name, cells in rows.items() if name.startswith(start)), None)
        assert row is not None and float(row[2].split()[0]) > 0, start
    assert "smdebug 1.0.34: left out with --quick" in done.stdout
    # What is counted at the server is exact, whatever the machine.
    written = "0.0 MB given, 0.0 MB kept" not in done.stdout
    assert written and "1 workers, 3 steps, 20 tensors; 0 PUT" in done.stdout
    assert "4 workers, 2 steps, 15 tensors; 0 PUT" in done.stdout


@pytest.mark.parametrize("words", [["--only", "kernel"], ["--quick"], ["--size", "0.5"]])
def test_a_part_of_the_figures_is_never_kept(words):
    results = BENCHMARKS / "RESULTS.md"
    before = results.read_bytes()
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), "--write", *words], capture_output=True, text=True
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


def test_a_line_without_ratios_has_no_verdict(modules):
    timing, report = modules
    line = timing.Line("smdebug", "", "", [], 1.0, note="left out: no network")
    assert line.verdict == ""
    assert "- smdebug: left out: no network." in report.page({"Beside": [line]}, "2 cores")


def test_traffic_is_what_came_in_between(benchmarks):
    counting = benchmarks("counting")
    before = counting.Traffic({"PUT": 3}, 100, 10)
    between = counting.Traffic({"PUT": 9, "GET": 2}, 150, 30) - before
    assert (dict(between.requests), between.received, between.sent) == ({"PUT": 6, "GET": 2}, 50, 20)
    assert (between + between).total == 16
    assert between.text(4) == "1.5 PUT, 0.5 GET, 0 LIST"


def test_a_folder_is_read_and_measured_as_it_was_written(benchmarks, tmp_path):
    place = benchmarks("place").Folder(tmp_path)
    place.write("one", b"0123456789")
    assert place.read([("one", 2, 5), ("one", 8, 20)]) == [b"234", b"89"]
    assert place.sizes("") == {"one": 10}
    place.clear()
    assert place.sizes("") == {}


def test_the_peer_is_left_out_with_a_reason_where_its_environment_cannot_be_made(benchmarks, monkeypatch, tmp_path):
    peer = benchmarks("peer")
    monkeypatch.setattr(peer, "HOME", tmp_path / "environment")
    monkeypatch.setattr(peer, "PACKAGES", ("no package is called that way",))
    monkeypatch.setattr(peer.sys, "executable", "/bin/false")
    (line,) = peer.measure(benchmarks("setting").Setting(None))
    assert line.note.startswith("left out: no environment with no package is called that way")
    assert not (tmp_path / "environment").exists()


# --- paper ---


def test_the_tables_on_paper_are_those_of_the_page(benchmarks):
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    for name, table in benchmarks("paper").tables().items():
        assert f"<!-- table: {name} -->\n\n{table}\n" in page, f"docs/scale.md: write table {name} anew"


def test_a_bill_worked_out_by_hand(benchmarks):
    paper = benchmarks("paper")
    # 100 steps of a second, 8 tensors every 10 steps: 10 commits of a shard and the log; a coordinate; metadata of
    # three arrays and the worker twice, one collection group, the worker group at first.
    found = paper.bill(paper.Job(2, 100, 1.0, (paper.Kept("tensors", 8, 10),)))
    assert found.puts == 2 * (10 + 10 + 1 + 2 * 4 + 2)
    assert found.gets == 2 * 3
    # Log, statistics and coordinate, three arrays, the collection, the worker.
    assert found.objects == 2 * (1 + 1 + 1 + 3 + 1 + 1)
    assert found.nbytes == 2 * (100 * 80 + 10 * 8 * 13 * 8 + 10 * 8)
    assert found.dollars == pytest.approx(found.puts * 5e-6 + found.gets * 0.4e-6)


def test_nothing_saved_is_committed_with_the_heartbeat_alone(benchmarks):
    paper = benchmarks("paper")
    rare = paper.bill(paper.Job(1, 3000, 1.0, (paper.Kept("tensors", 8, 1000),)))
    often = paper.bill(paper.Job(1, 3000, 1.0, (paper.Kept("tensors", 8),)))
    assert 100 < rare.puts < 130 and 6000 < often.puts < 6030


@pytest.mark.parametrize(("ranks", "steps", "gets", "lists"), [(1, 1, 3, 1), (1, 4097, 4, 1), (1001, 1, 2003, 2)])
def test_requests_to_open_a_run(benchmarks, ranks, steps, gets, lists):
    assert benchmarks("paper").opening(ranks, steps) == (gets, lists)
