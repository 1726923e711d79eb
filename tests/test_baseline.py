"""Known findings: the file, what it takes out of a report, and the options of `smdbg check`."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smdbg import CollectionConfig, Hook, SaveConfig
from smdbg.analysis import baseline
from smdbg.analysis.baseline import Known, compare, read, updated, write
from smdbg.analysis.findings import Finding, Outcome, Severity, fingerprint
from smdbg.analysis.report import Report, RuleResult, Summary
from smdbg.cli import run as command
from smdbg.errors import BadConfig

TODAY = date(2026, 6, 1)
DAY = timedelta(days=1)
SUMMARY = Summary(
    run="r", status="completed", rules_judged=1, rules=1, steps_seen=5, steps=5, workers=(0,), incomplete=False,
    dropped_steps=0, dropped_rows=0, switched_off=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def finding(tensor: str, rule: str = "a", worker: int = 0) -> Finding:
    return Finding(
        rule=rule, severity=Severity.ERROR, run="r", worker=worker, attempt=0, mode="train", tensor=tensor,
        first_step=3, last_step=5, first_mode_step=3, onset=(2, 3), violations=3, judged=20, worst=1.0, threshold=None,
        statistic="nan", message="m", hint="h", fingerprint=fingerprint(rule, tensor, "train"),
    )  # fmt: skip


def known(tensor: str, rule: str = "a", **more: Any) -> Known:
    return Known(fingerprint=fingerprint(rule, tensor, "train"), rule=rule, tensor=tensor, mode="train", **more)


def report(*findings: Finding, **outcomes: Outcome) -> Report:
    states = {"a": Outcome.VIOLATED if findings else Outcome.CLEAN} | outcomes
    return Report(findings, tuple(RuleResult(n, n, o, "", 0, 1, 1, 1, 1) for n, o in states.items()), SUMMARY)


# ---------------------------------------------------------------------------------------------------- comparing


def test_known_findings_do_not_count_whatever_the_worker() -> None:
    compared = compare(report(finding("x"), finding("x", worker=3), finding("y")), [known("x", reason="why")], TODAY)
    assert [f.tensor for f in compared.counted.findings] == ["y"]
    assert [(f.worker, e.reason) for f, e in compared.known] == [(0, "why"), (3, "why")]
    assert compared.expired == compared.fixed == ()


def test_an_entry_holds_through_the_day_on_which_it_expires() -> None:
    full = report(finding("x"))
    for expires, holds in ((TODAY, True), (TODAY + DAY, True), (TODAY - DAY, False)):
        compared = compare(full, [known("x", expires=expires)], TODAY)
        assert bool(compared.known) is holds and bool(compared.expired) is not holds
        assert bool(compared.counted.findings) is not holds


def test_fixed_is_what_was_looked_for_and_not_found() -> None:
    entries = [known("x"), known("y", "b"), known("z", "c")]
    full = report(b=Outcome.INSUFFICIENT)
    assert [entry.tensor for entry in compare(full, entries, TODAY).fixed] == ["x"]
    assert compare(full, entries, TODAY, whole=False).fixed == ()
    for odd in ({"incomplete": True}, {"damaged": ("d",)}, {"dropped_rows": 1}, {"dropped_steps": 1}):
        assert compare(replace(full, summary=replace(SUMMARY, **odd)), entries, TODAY).fixed == ()


def test_updating_keeps_reasons_and_takes_out_what_is_fixed() -> None:
    old = [known("x", reason="why"), known("gone"), known("z", "c"), known("late", expires=TODAY - DAY, reason="then")]
    new = updated(report(finding("x"), finding("y"), finding("late")), old, "first seen", TODAY)
    assert {(e.tensor, e.reason, e.expires) for e in new} == {
        ("x", "why", None),
        ("y", "first seen", None),
        ("z", "", None),
        ("late", "first seen", None),
    }


# ------------------------------------------------------------------------------------------------------ the file

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS, TEXTS, st.none() | st.dates())))
def test_what_is_written_is_read_back_and_sorted(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    entries = {
        fingerprint(rule, tensor, mode): Known(
            fingerprint=fingerprint(rule, tensor, mode), rule=rule, tensor=tensor, mode=mode, reason=why, expires=until
        )
        for rule, tensor, mode, why, until in rows
    }
    path = tmp_path_factory.getbasetemp() / "known.yaml"
    write(path, list(entries.values()))
    first = path.read_bytes()
    assert {entry.fingerprint: entry for entry in read(path)} == entries
    write(path, list(reversed(entries.values())))
    assert path.read_bytes() == first


def test_a_new_entry_changes_its_own_lines_only() -> None:
    write("known.yaml", [known("x", reason="why"), known("z")])
    before = Path("known.yaml").read_text().splitlines()
    write("known.yaml", [known("x", reason="why"), known("y"), known("z")])
    changes = list(difflib.ndiff(before, Path("known.yaml").read_text().splitlines()))
    assert [line for line in changes if line[0] == "-"] == []
    assert sum(line[0] == "+" for line in changes) == 5


ENTRY = f'  - {{fingerprint: "{fingerprint("a", "x", "train")}", rule: a, tensor: x, mode: train'


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("findings:\n" + ENTRY + ", resaon: no}\n", 2, "no key 'resaon'. Did you mean reason?"),
        ("finding: []\n", 1, "no key 'finding'. Did you mean findings?"),
        ("version: 2\n", 1, "version must be 1"),
        ("findings: {}\n", 1, ""),
        ("findings: 7\n", 1, "must be a list"),
        ("findings:\n  - nothing\n", 2, "must be a mapping"),
        ("findings:\n  - rule: a\n    tensor: x\n", 2, "lacks fingerprint, mode"),
        ("findings:\n" + ENTRY + ", expires: 2026-13-01}\n", 2, "expires must be a day"),
        ("findings:\n" + ENTRY + ",\n     expires: tomorrow}\n", 3, "expires must be a day"),
        ("findings:\n" + ENTRY + ", expires: 20260601}\n", 2, "expires must be text"),
        ("findings:\n" + ENTRY + ", reason: 5}\n", 2, "reason must be text"),
        ("findings:\n" + ENTRY + "}\n" + ENTRY + "}\n", 3, "twice"),
        ("findings:\n" + ENTRY.replace("tensor: x", "tensor: y") + "}\n", 2, "fingerprint is not that"),
        ("findings: [\n", 2, "not valid YAML"),
        ("findings: !!python/object/apply:os.system [ls]\n", 1, "tags"),
    ],
)
def test_a_wrong_file_names_the_line(text: str, line: int, said: str) -> None:
    Path("known.yaml").write_text(text)
    if not said:
        assert read("known.yaml") == []
        return
    with pytest.raises(BadConfig) as caught:
        read("known.yaml")
    assert f"known.yaml:{line}" in str(caught.value) and said in str(caught.value)


def test_a_day_needs_no_quotes() -> None:
    Path("known.yaml").write_text("findings:\n" + ENTRY + ", expires: 2026-06-01}\n")
    assert read("known.yaml")[0].expires == date(2026, 6, 1)


# ------------------------------------------------------------------------------------------------------ the command


def written(url: str, bad: tuple[str, ...] = ("x",)) -> str:
    everything = CollectionConfig("gradients", save_config=SaveConfig(save_interval=1))
    with Hook(url, collections=[everything]) as hook:
        for step in range(8):
            hook.set_mode("train")
            for name in ("x", "y"):
                value = np.full(4, np.nan if name in bad and step >= 5 else 1.0)
                hook.save_tensor(name, value, "gradients", role="gradient")
            hook.end_step()
    return url


RULES = ("--rules", "exploding_tensor")


def check(url: str, *args: str) -> int:
    return int(command(["--run", url, "check", *RULES, *args]))


def test_from_writing_to_fixed(capsys: pytest.CaptureFixture[str]) -> None:
    url = written("one")
    assert check(url) == 1
    assert check(url, "--write-baseline", "known.yaml", "--reason", "by design") == 0
    assert "1 known finding in known.yaml: 1 new, 0 fixed and taken out" in capsys.readouterr().err
    assert [(e.tensor, e.reason) for e in read("known.yaml")] == [("x", "by design")]
    assert check(url, "--baseline", "known.yaml") == 0
    out, err = capsys.readouterr()
    assert out == "" and "1 known finding in known.yaml, not counted." in err
    # Another run with the same finding and a new one.
    assert check(written("two", ("x", "y")), "--baseline", "known.yaml") == 1
    (row,) = capsys.readouterr().out.splitlines()
    assert "\ty\t" in row
    # In a run without it, it is fixed; and taken out when the file is brought up to date.
    assert check(written("three", ()), "--baseline", "known.yaml") == 0
    assert "1 fixed: exploding_tensor of x. `--write-baseline known.yaml` takes them out." in capsys.readouterr().err
    assert check("three", "--write-baseline", "known.yaml") == 0
    assert read("known.yaml") == []


def test_an_expired_entry_counts_again_and_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    url = written("run")
    write("known.yaml", [replace(e, expires=date(2020, 1, 31)) for e in _entries(url)])
    assert check(url, "--baseline", "known.yaml") == 1
    out, err = capsys.readouterr()
    assert "\tx\t" in out and "exploding_tensor of x counts again" in err and "expired on 2020-01-31 (why)" in err


def _entries(url: str) -> list[Known]:
    check(url, "--write-baseline", "all.yaml", "--reason", "why")
    return read("all.yaml")


def test_the_formats_tell_known_findings_apart(capsys: pytest.CaptureFixture[str]) -> None:
    url = written("run", ("x", "y"))
    write("known.yaml", [entry for entry in _entries(url) if entry.tensor == "x"])
    capsys.readouterr()
    assert check(url, "--baseline", "known.yaml", "--format", "jsonl") == 1
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["type"] for record in records] == ["finding", "rule", "baseline", "summary"]
    assert records[0]["tensor"] == "y"
    about = records[2]
    assert about["file"] == "known.yaml" and about["expired"] == about["fixed"] == []
    assert [(one["tensor"], one["reason"], one["severity"]) for one in about["known"]] == [("x", "why", "error")]
    assert check(url, "--baseline", "known.yaml", "--format", "json") == 1
    document = json.loads(capsys.readouterr().out)
    assert [one["tensor"] for one in document["findings"]] == ["y"]
    assert {"version": 1, "type": "baseline", **document["baseline"]} == about
    assert check(url, "--baseline", "known.yaml", "--format", "table") == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == ["error", "exploding_tensor", "x"] and "why" in line for line in lines)
    assert lines[-1] == "1 known finding in known.yaml, not counted."


def test_a_baseline_makes_no_verdict_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), Hook("failed") as hook:
        hook.save_tensor("x", np.full(4, np.nan), "gradients", role="gradient")
        hook.end_step()
        raise RuntimeError("out of memory")
    assert check("failed") == 1
    assert check("failed", "--write-baseline", "known.yaml") == 2
    assert check("failed", "--baseline", "known.yaml") == 2
    assert "No verdict: nothing was found, but the run is failed" in capsys.readouterr().err
    assert check("failed", "--baseline", "known.yaml", "--allow-incomplete") == 0
    assert check("failed", "--write-baseline", "known.yaml", "--allow-incomplete") == 0
    assert len(read("known.yaml")) == 1


def test_a_part_of_a_run_fixes_nothing() -> None:
    written("run")
    write("known.yaml", [known("gone", "exploding_tensor")])
    assert check("run", "--write-baseline", "known.yaml", "--mode", "train") == 0
    assert {entry.tensor for entry in read("known.yaml")} == {"x", "gone"}
    assert check("run", "--write-baseline", "known.yaml") == 0
    assert {entry.tensor for entry in read("known.yaml")} == {"x"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--baseline", "gone.yaml"], "gone.yaml cannot be read"),
        (["--baseline", "known.yaml", "--write-baseline", "known.yaml"], "contradict"),
        (["--reason", "why"], "--write-baseline"),
        (["--write-baseline", "no/such/folder/known.yaml"], "cannot be written"),
        (["--write-baseline", "wrong.yaml"], "wrong.yaml:1"),
        (["--exit-zero", "--fail-on", "error"], "contradict"),
    ],
)
def test_wrong_options_are_status_2(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("wrong.yaml").write_text("known: []\n")
    written("run", ())
    assert check("run", *args) == 2
    assert said in capsys.readouterr().err
    assert Path("wrong.yaml").read_text() == "known: []\n"


def test_a_file_that_cannot_be_replaced_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    write("known.yaml", [known("x")])
    before = Path("known.yaml").read_bytes()
    monkeypatch.setattr(baseline.os, "replace", _refuse)
    with pytest.raises(BadConfig, match="cannot be written"):
        write("known.yaml", [])
    assert Path("known.yaml").read_bytes() == before and len(list(Path().iterdir())) == 1


def test_the_file_of_the_page_is_one() -> None:
    page = (Path(__file__).parent.parent / "docs" / "ci-check.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    Path("page.yaml").write_text(text)
    entries = read("page.yaml")
    assert [(e.rule, e.expires) for e in entries] == [("frozen_parameter", date(2027, 1, 31))]
    write("again.yaml", entries)
    assert Path("again.yaml").read_text().endswith(text)  # the page shows what is written


def _refuse(*_: Any) -> None:
    raise PermissionError(13, "Permission denied")
