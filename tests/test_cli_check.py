"""`smdbg check`: its statuses, one by one, and its formats."""

from __future__ import annotations

import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smdbg import CollectionConfig, Hook, ReductionConfig, SaveConfig
from smdbg.analysis.findings import Finding, Outcome, Severity
from smdbg.analysis.report import Report, RuleResult, Summary
from smdbg.cli import run
from smdbg.cli.check import judge
from smdbg.cli.check_page import steps_text
from smdbg.cli.exits import Exit

RAW = ReductionConfig(save_raw_tensor=True)
EVERY = SaveConfig(save_interval=1)
FINDING_FIELDS = (
    "run rule severity worker attempt mode tensor first_step last_step first_mode_step onset violations judged worst "
    "threshold statistic message hint fingerprint"
).split()


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def write(hook: Hook, bad: bool, steps: int = 20) -> None:
    """Save a loss, a weight and its gradient for some steps; when bad, the gradient is NaN from step 7 on."""
    rng = np.random.default_rng(0)
    for step in range(steps):
        hook.set_mode("train")
        hook.save_tensor("loss", np.float32(1 / (step + 1)), "losses", role="loss")
        hook.save_tensor("w", rng.normal(size=(2, 2)).astype(np.float32), "weights", role="weight")
        gradient = rng.normal(size=(2, 2)).astype(np.float32)
        if bad and step >= 7:
            gradient[0, 0] = np.nan
        hook.save_tensor("g", gradient, "gradients", role="gradient", of="w")
        hook.end_step()


def opened(url: str) -> Hook:
    names = ("losses", "weights", "gradients")
    return Hook(url, collections=[CollectionConfig(n, save_config=EVERY, reduction_config=RAW) for n in names])


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A clean run, a bad one, and one that failed without a finding."""
    folder = tmp_path_factory.mktemp("check")
    urls = {name: str(folder / name) for name in ("clean", "bad", "failed", "failed-bad")}
    for name in ("clean", "bad"):
        with opened(urls[name]) as hook:
            write(hook, name == "bad")
    for name in ("failed", "failed-bad"):
        with pytest.raises(RuntimeError), opened(urls[name]) as hook:
            write(hook, name == "failed-bad")
            raise RuntimeError("out of memory")
    return urls


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Callable[[bool], str]]:
    """Begin a run that does not end before the test does."""
    hooks = []

    def begin(bad: bool) -> str:
        hook = opened(str(tmp_path / "running"))
        hooks.append(hook)
        write(hook, bad)
        assert hook.flush()
        return hook.url

    yield begin
    for hook in hooks:
        hook.close()


def check(url: str, *args: str) -> int:
    return int(run(["--run", url, "check", *args]))


def jsonl(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        pytest.fail(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in capsys.readouterr().out.splitlines()]


def breaking(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the rule all_zero raise when it judges."""
    from smdbg.analysis.rule import find_rule

    def evaluate(*_: object) -> None:
        raise error

    monkeypatch.setattr(find_rule("all_zero"), "evaluate", evaluate)


# ------------------------------------------------------------------------------------------ statuses, end to end

NAN, VANISHING = ["--rules", "exploding_tensor"], ["--rules", "vanishing_gradient"]
AS_WARNING = ["--set", "exploding_tensor.severity=warning"]


@pytest.mark.parametrize(
    ("name", "args", "status"),
    [
        # 1: findings at or above --fail-on
        ("bad", NAN, 1),
        ("bad", ["--rules", "exploding_tensor,vanishing_gradient"], 1),
        ("bad", [*NAN, *AS_WARNING, "--fail-on", "warning"], 1),
        ("bad", [*NAN, *AS_WARNING, "--fail-on", "info"], 1),
        ("failed-bad", NAN, 1),
        ("bad", [*NAN, "--allow-incomplete"], 1),
        ("bad", ["--pack", "default"], 1),
        # 0: none, and everything is as it should be
        ("clean", NAN, 0),
        ("clean", ["--rules", "exploding_*,vanishing_gradient"], 0),
        ("bad", [*NAN, *AS_WARNING], 0),
        ("bad", VANISHING, 0),
        ("bad", [*NAN, "--exit-zero"], 0),
        ("failed", [*NAN, "--allow-incomplete"], 0),
        ("bad", ["--rules", "exploding_tensor", "--set", "exploding_tensor.end_step=7"], 0),
        # 2: a rule that the user named was not applicable, or saw too little
        ("clean", ["--rules", "exploding_tensor", "--set", "exploding_tensor.include=nothing*"], 2),
        ("clean", [*VANISHING, "--mode", "eval"], 2),
        ("bad", ["--rules", "exploding_tensor,vanishing_gradient", "--set", "vanishing_gradient.include=no*"], 2),
        ("clean", [*NAN, "--exit-zero", "--set", "exploding_tensor.include=nothing*"], 2),
        # 2: an incomplete run without findings
        ("failed", NAN, 2),
        ("failed", [*NAN, "--exit-zero"], 2),
        ("failed-bad", [*NAN, *AS_WARNING], 2),
        # 2: usage
        ("clean", ["--rules", "exploding_tensr"], 2),
        ("clean", ["--rules", "nothing_like*"], 2),
        ("clean", [*NAN, "--ignore", "exploding_tensor"], 2),
        ("clean", ["--ignore", "no_such_rule"], 2),
        ("clean", [*NAN, "--set", "exploding_tensor.only_nam=true"], 2),
        ("clean", [*NAN, "--set", "exploding_tensor.only_nan=maybe"], 2),
        ("clean", [*NAN, "--set", "vanishing_gradient.threshold=1"], 2),
        ("clean", [*NAN, "--set", "nonsense"], 2),
        ("clean", ["--pack", "no_such_pack"], 2),
        ("clean", ["--pack", "no/such/pack.yaml"], 2),
        ("clean", ["--pack", "sagemaker", "--rules", "no_such_rule"], 2),
        ("clean", ["--fail-on", "nothing"], 2),
        ("clean", ["--format", "xml"], 2),
        ("clean", [*NAN, "--worker", "7"], 2),
        ("nowhere", NAN, 2),
    ],
)
def test_status(runs: dict[str, str], name: str, args: list[str], status: int) -> None:
    assert check(runs.get(name, name), *args) == status


def test_a_run_that_is_still_written(running: Callable[[bool], str]) -> None:
    url = running(False)
    assert check(url, *NAN) == 2
    assert check(url, *NAN, "--allow-incomplete") == 0


def test_findings_in_a_run_that_is_still_written(running: Callable[[bool], str]) -> None:
    assert check(running(True), *NAN) == 1


@pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit(1), SystemExit(0)])
@pytest.mark.parametrize("name", ["clean", "bad"])
def test_a_rule_that_fails_is_2_even_with_findings(
    runs: dict[str, str], name: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, error)
    rules = ["--rules", "exploding_tensor,all_zero", "--set", "all_zero.include=w"]
    assert check(runs[name], *rules) == 2
    assert check(runs[name], *rules, "--exit-zero", "--allow-incomplete") == 2


def test_a_pack_of_which_nothing_judged_is_2(runs: dict[str, str]) -> None:
    Path("idle.yaml").write_text("rules:\n  - rule: exploding_tensor\n    include: [nothing]\n")
    assert check(runs["clean"], "--pack", "./idle.yaml") == 2


def test_no_verdict_says_why_and_a_verdict_does_not(runs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    check(runs["failed"], *NAN, "-q", "--format", "jsonl")
    err = capsys.readouterr().err
    assert "No verdict" in err and "RuntimeError" in err and "--allow-incomplete" in err
    check(runs["bad"], *NAN, "-q", "--format", "jsonl")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("rules:\n  - rule: exploding_tensor\n    parameters: {only_nam: true}\n", 3),
        ("rules:\n  - exploding_tensr\n", 2),
        ("rules: {a: b: c}\n", 1),
        ("ruels: []\n", 1),
    ],
)
def test_a_malformed_pack_names_file_and_line(
    runs: dict[str, str], text: str, line: int, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("pack.yaml").write_text(text)
    assert check(runs["clean"], "--pack", "./pack.yaml") == 2
    out, err = capsys.readouterr()
    assert out == "" and f"pack.yaml:{line}" in err and "Traceback" not in err


# ------------------------------------------------------------------------------------------ the table of statuses

SUMMARY = Summary(
    run="r", status="completed", rules_judged=1, rules=1, steps_seen=5, steps=5, workers=(0,), incomplete=False,
    dropped_steps=0, dropped_rows=0, switched_off=False,
)  # fmt: skip


def result(name: str, outcome: Outcome) -> RuleResult:
    return RuleResult(name, name, outcome, "", 0, 1, 1, 1, 1)


def finding(severity: Severity) -> Finding:
    return Finding(
        rule="a", severity=severity, run="r", worker=0, attempt=0, mode="train", tensor="t", first_step=312,
        last_step=500, first_mode_step=300, onset=(311, 312), violations=3, judged=20, worst=float("nan"),
        threshold=None, statistic="nan", message="m", hint="h", fingerprint="f",
    )  # fmt: skip


OUTCOMES = list(Outcome)
ODD: list[dict[str, Any]] = [
    {},
    {"dropped_rows": 1},
    {"dropped_steps": 1},
    {"switched_off": True, "incomplete": True, "status": "failed: hook switched off"},
    {"incomplete": True, "status": "running"},
    {"incomplete": True, "status": "lost"},
]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("found", [None, *Severity])
@pytest.mark.parametrize("allow", [False, True])
def test_the_whole_table_of_statuses(odd: dict[str, Any], found: Severity | None, allow: bool) -> None:
    """Every combination against the sentences of the contract, written down once more."""
    findings = () if found is None else (finding(found),)
    for fail_on, outcome, other, named in itertools.product(Severity, OUTCOMES, OUTCOMES, [(), ("a",), ("a", "b")]):
        report = Report(findings, (result("a", outcome), result("b", other)), replace(SUMMARY, **odd))
        verdict = judge(report, named, fail_on.value, allow)
        states = {"a": outcome, "b": other}
        judged = [name for name, state in states.items() if state in (Outcome.CLEAN, Outcome.VIOLATED)]
        unmade = Outcome.FAILED in states.values() or any(name not in judged for name in named)
        bad = found is not None and found.rank >= fail_on.rank
        if unmade:
            expected = Exit.ERROR
        elif bad:
            expected = Exit.VIOLATIONS
        elif not judged or "dropped_rows" in odd or "dropped_steps" in odd or "switched_off" in odd:
            expected = Exit.ERROR
        elif odd and not allow:
            expected = Exit.ERROR
        else:
            expected = Exit.CLEAN
        assert verdict.status is expected, (states, named, fail_on)
        assert bool(verdict.reason) is (expected is Exit.ERROR)


# ------------------------------------------------------------------------------------------ formats


def test_jsonl_has_findings_then_rules_then_the_summary(
    runs: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    rules = "exploding_tensor,vanishing_gradient"
    assert check(runs["bad"], "--rules", rules, "--format", "jsonl") == 1
    records = jsonl(capsys)
    assert [record["type"] for record in records] == ["finding", "rule", "rule", "summary"]
    assert all(record["version"] == 1 for record in records)
    found = records[0]
    assert set(FINDING_FIELDS) | {"type", "version"} == set(found)
    assert (found["rule"], found["severity"], found["tensor"]) == ("exploding_tensor", "error", "g")
    assert (found["worker"], found["mode"], found["first_mode_step"]) == (0, "train", 7)
    assert (found["first_step"], found["last_step"], found["onset"]) == (7, 19, [6, 7])
    assert (found["violations"], found["judged"]) == (13, 20)
    outcomes = {record["name"]: record["outcome"] for record in records[1:3]}
    assert outcomes == {"exploding_tensor": "violated", "vanishing_gradient": "clean"}
    assert records[3]["rules_judged"] == 2 and records[3]["status"] == "completed"


def test_json_is_one_object_with_the_same_content(runs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    check(runs["bad"], *NAN, "--format", "jsonl")
    records = jsonl(capsys)
    check(runs["bad"], *NAN, "--format", "json")
    document = json.loads(capsys.readouterr().out)
    assert document["version"] == 1
    assert [{"version": 1, "type": "finding", **item} for item in document["findings"]] == records[:1]
    assert [{"version": 1, "type": "rule", **item} for item in document["rules"]] == records[1:2]
    assert {"version": 1, "type": "summary", **document["summary"]} == records[2]


def test_nan_in_a_finding_is_a_word_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    from smdbg.cli import check_page
    from smdbg.cli.output import Format

    report = Report((finding(Severity.ERROR),), (result("a", Outcome.VIOLATED),), SUMMARY)
    check_page.show(report, Format.JSONL)
    assert jsonl(capsys)[0]["worst"] == "nan"
    check_page.show(report, Format.JSON)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["findings"][0]["worst"] == "nan"


def test_tsv_is_findings_alone(runs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    check(runs["bad"], *NAN)
    out, err = capsys.readouterr()
    (row,) = out.splitlines()
    assert len(row.split("\t")) == len(FINDING_FIELDS) and "g" in row.split("\t")
    assert "1 of 1 rules judged, 20 of 20 steps" in err
    check(runs["clean"], *NAN)
    out, err = capsys.readouterr()
    assert out == "" and "1 of 1 rules judged" in err


def test_the_table_begins_with_the_findings_and_ends_with_the_closing_line(
    runs: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    check(runs["bad"], "--rules", "exploding_tensor,all_zero", "--set", "all_zero.include=no*", "--format", "table")
    head, first, *rest = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["severity", "rule", "tensor"]
    assert first.split()[:3] == ["error", "exploding_tensor", "g"]
    assert "train 7 – 19" in first and "13 of 20" in first
    assert any(line.startswith("all_zero") and "not applicable" in line for line in rest)
    assert rest[-1].endswith("1 of 2 rules judged, 20 of 20 steps")
    check(runs["clean"], *NAN, "--format", "table")
    assert capsys.readouterr().out.splitlines() == ["No findings. 1 of 1 rules judged, 20 of 20 steps"]


def test_a_narrow_terminal_gets_the_messages_below_the_table(
    runs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {}
    for width in (60, 200):
        stream = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setenv("COLUMNS", str(width))
            patch.setenv("TERM", "xterm")
            assert check(runs["bad"], *NAN) == 1
        texts[width] = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
        assert max(map(len, texts[width].splitlines())) <= width
    assert "message" not in texts[60] and "exploding_tensor: " in texts[60]
    assert "message" in texts[200].splitlines()[0]


def test_progress_goes_to_a_terminal_and_leaves_nothing_behind(
    runs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setenv("TERM", "xterm")
        assert check(runs["bad"], *NAN, "--format", "jsonl") == 1
        assert stream.getvalue().endswith("\r\x1b[K") and "/" in stream.getvalue()
        patch.setattr(sys, "stderr", quiet := Terminal())
        assert check(runs["bad"], *NAN, "--format", "jsonl", "-q") == 1
        assert quiet.getvalue() == ""


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_rules_of_a_pack_keep_their_parameters(runs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("pack.yaml").write_text("rules:\n  - rule: exploding_tensor\n    severity: warning\n  - all_zero\n")
    assert check(runs["bad"], "--pack", "./pack.yaml", "--rules", "exploding*", "--format", "jsonl") == 0
    records = jsonl(capsys)
    assert [record["severity"] for record in records if record["type"] == "finding"] == ["warning"]
    assert [record["name"] for record in records if record["type"] == "rule"] == ["exploding_tensor"]


def test_smdbg_yaml_names_pack_and_rules(runs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("smdbg.yaml").write_text("rules: [exploding_tensor]\n")
    assert check(runs["bad"], "--format", "jsonl") == 1
    assert [record["name"] for record in jsonl(capsys) if record["type"] == "rule"] == ["exploding_tensor"]
    assert check(runs["bad"], "--rules", "vanishing_gradient", "--format", "jsonl") == 0
    assert [record["name"] for record in jsonl(capsys) if record["type"] == "rule"] == ["vanishing_gradient"]


@pytest.mark.parametrize(
    ("mode", "first_mode_step", "last", "text"),
    [
        ("train", 300, 500, "train 300 (step 312 – 500)"),
        ("train", 300, 312, "train 300 (step 312)"),
        ("train", 312, 312, "train 312"),
        ("global", 312, 500, "step 312 – 500"),
    ],
)
def test_steps_are_told_as_a_training_log_does(mode: str, first_mode_step: int, last: int, text: str) -> None:
    record = {"mode": mode, "first_step": 312, "first_mode_step": first_mode_step, "last_step": last}
    assert steps_text(record) == text
