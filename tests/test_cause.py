"""Causal order of findings, the first cause among them, and how `check` tells of it."""

from __future__ import annotations

import random
import shlex
import subprocess
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smdbg.analysis.cause import explain, interval, linear, ordered, unsettled
from smdbg.analysis.clock import Clock
from smdbg.analysis.findings import Finding, Outcome, Severity
from smdbg.analysis.kinship import Trouble, may_lead_to, trouble
from smdbg.analysis.place import places_of
from smdbg.analysis.report import Report, RuleResult, Summary
from smdbg.analysis.run import StepTable
from smdbg.cli import check_page
from smdbg.cli.cause_text import Story, cannot_tell, inspect_words, tell
from smdbg.cli.output import Format
from smdbg.cli.shellwords import folded
from smdbg.store.format import TensorInfo

CATALOGUE = {
    info.name: info
    for info in [
        TensorInfo("x", "inputs", role="input"),
        TensorInfo("out1", "outputs", role="output", module="net.1", forward_order=1),
        TensorInfo("out2", "outputs", role="output", module="net.2", forward_order=2),
        TensorInfo("net", "outputs", role="output", module="net", forward_order=0),
        TensorInfo("accuracy", "metrics", role="metric"),
        TensorInfo("loss", "losses", role="loss"),
        TensorInfo("g1", "gradients", role="gradient", of="w1", backward_order=1),
        TensorInfo("g2", "gradients", role="gradient", of="w2", backward_order=0),
        TensorInfo("optimizer/grad_norm", "metrics", role="metric"),
        TensorInfo("w1", "weights", role="weight"),
        TensorInfo("w2", "weights", role="weight"),
    ]
}


def finding(tensor: str, onset: tuple[int | None, int], rule: str = "exploding_tensor", **changes: Any) -> Finding:
    base = Finding(
        rule=rule, severity=Severity.ERROR, run="r", worker=0, attempt=0, mode="train", tensor=tensor,
        first_step=onset[1], last_step=onset[1] + 5, first_mode_step=onset[1], onset=onset, violations=1, judged=9,
        worst=1.0, threshold=0.0, statistic="nan" if rule == "exploding_tensor" else "l2", message=f"about {tensor}",
        hint="", fingerprint="",
    )  # fmt: skip
    return replace(base, **changes)


def log(modes: str) -> StepTable:
    """Return the log of a worker whose steps have these modes: t or e."""
    steps = np.arange(len(modes))
    counts = [modes[:at].count(mode) for at, mode in enumerate(modes)]
    names = np.array([{"t": "train", "e": "eval"}[mode] for mode in modes])
    return StepTable(steps, names, np.array(counts), steps, steps, steps, 0 * steps, 0 * steps)


# ------------------------------------------------------------------------------------------ order


def test_a_module_with_parts_ends_after_the_last_of_them() -> None:
    found = ordered([finding(name, (3, 4)) for name in ("net", "out2", "out1", "x")], CATALOGUE)
    assert [one.tensor for one in found] == ["x", "out1", "out2", "net"]


def test_metrics_come_after_the_loss_and_the_norm_of_gradients_after_the_gradients() -> None:
    found = ordered([finding(name, (3, 4)) for name in ("optimizer/grad_norm", "accuracy", "g2", "loss")], CATALOGUE)
    assert [one.tensor for one in found] == ["loss", "accuracy", "g2", "optimizer/grad_norm"]


def test_among_equals_the_most_serious_comes_first() -> None:
    rules = ["step_outlier", "loss_plateau", "saturated_activation", "vanishing_gradient", "dead_layer"]
    rules += ["gradient_explosion", "exploding_tensor"]
    found = ordered([finding("out1", (3, 4), rule) for rule in rules], CATALOGUE)
    assert [one.rule for one in found] == rules[::-1]
    renamed = [finding("out1", (3, 4), "b"), finding("out1", (3, 4), "a")]
    assert [one.rule for one in ordered(renamed, CATALOGUE, rules={"b": "dead_relu", "a": "overfit"})] == ["b", "a"]


def test_a_step_of_another_mode_is_no_gap() -> None:
    clock = Clock({0: log("tttett")})
    loss, weight = CATALOGUE["loss"], CATALOGUE["w1"]
    assert interval(finding("loss", (2, 4)), loss) == (2, 4)
    assert interval(finding("loss", (2, 4)), loss, clock) == (3, 4)
    assert interval(finding("loss", (None, 3), mode="eval"), loss, clock) == (2, 3)
    assert interval(finding("loss", (1, 4)), loss, clock) == (1, 4)  # step 2 was not saved
    # What is seen of a weight at step 4 was made by the update of step 2, before the evaluation of step 3.
    assert interval(finding("w1", (2, 4)), weight, clock) == (1, 2)
    found = [finding("loss", (None, 3), mode="eval"), finding("w1", (2, 4))]
    assert [one.tensor for one in ordered(found, CATALOGUE, clock)] == ["w1", "loss"]
    assert [one.tensor for one in ordered(found, CATALOGUE)] != ["w1", "loss"]


spans = st.tuples(st.integers(-2, 8), st.integers(1, 5)).map(lambda pair: (pair[0], sum(pair)))


@given(st.lists(st.tuples(spans, st.integers(0, 3)), max_size=14), st.randoms())
def test_the_order_is_a_linear_extension_of_the_partial_one(items: list[Any], shuffler: random.Random) -> None:
    intervals, keys = [span for span, _ in items], [(key, number) for number, (_, key) in enumerate(items)]
    order = linear(intervals, keys)
    assert sorted(order) == list(range(len(items)))
    place = {index: at for at, index in enumerate(order)}
    for one, (_, end) in enumerate(intervals):
        for other, (begin, _) in enumerate(intervals):
            assert not (end <= begin and place[one] > place[other])
    # Each is, of those that nothing left must come before, the one with the least key.
    for at, index in enumerate(order):
        rest = order[at:]
        free = [one for one in rest if not any(intervals[other][1] <= intervals[one][0] for other in rest)]
        assert index == min(free, key=lambda one: keys[one])
    mixed = list(range(len(items)))
    shuffler.shuffle(mixed)
    again = linear([intervals[index] for index in mixed], [keys[index] for index in mixed])
    assert [mixed[index] for index in again] == order


@given(spans, spans, st.integers(0, 2), st.integers(0, 2))
def test_unsettled_is_what_two_ways_of_placing_the_onsets_differ_in(
    one: tuple[int, int], other: tuple[int, int], mine: int, its: int
) -> None:
    ways = set()
    for first in range(one[0] + 1, one[1] + 1):
        for second in range(other[0] + 1, other[1] + 1):
            ways.add(((first, mine) > (second, its)) - ((first, mine) < (second, its)))
    expected = {-1, 1} <= ways
    assert unsettled((*one, (mine, False, 0)), (*other, (its, False, 0))) is expected


# ------------------------------------------------------------------------------------------ first cause


def test_the_first_cause_is_the_first_error_and_a_warning_before_it_is_told_apart() -> None:
    warning = finding("x", (None, 0), "input_scale", severity=Severity.WARNING)
    late = finding("w2", (8, 9))
    cause = explain([late, finding("loss", (7, 8)), warning], CATALOGUE)
    assert cause is not None
    # Row 9 of a weight shows the update of step 8, which comes after the loss of that step.
    assert (cause.first.tensor, cause.before, cause.then) == ("loss", (warning,), (late,))
    assert cause.undecided == () and cause.window is None


def test_what_cannot_have_led_to_it_is_neither_before_nor_after() -> None:
    slow = finding("step time", (1, 2), "step_outlier", severity=Severity.WARNING)
    dead = finding("g1", (2, 3), "dead_layer", severity=Severity.WARNING)
    nan = finding("loss", (7, 8))
    cause = explain([slow, dead, nan], CATALOGUE)
    assert cause is not None and (cause.first, cause.before, cause.then) == (nan, (), ())
    assert set(cause.besides) == {slow, dead}
    assert not may_lead_to(Trouble.DEAD, Trouble.NON_FINITE) and may_lead_to(Trouble.SET_UP, Trouble.NON_FINITE)


def test_no_learning_is_never_the_cause_of_another_error() -> None:
    flat = finding("loss", (None, 0), "loss_plateau")
    dead = finding("g2", (0, 40), "dead_layer")
    cause = explain([flat, dead], CATALOGUE)
    assert cause is not None and (cause.first, cause.then) == (dead, (flat,))
    alone = explain([flat], CATALOGUE)
    assert alone is not None and alone.first is flat
    # Where no learning is the only error, a warning that is not certainly later may be why.
    faint = replace(dead, severity=Severity.WARNING)
    flat, late = replace(flat, last_step=55), replace(faint, tensor="g1", onset=(50, 60))
    cause = explain([flat, faint, late], CATALOGUE)
    assert cause is not None and (cause.first, cause.before, cause.besides) == (flat, (faint,), (late,))


def test_the_steps_that_would_have_to_be_saved_are_told() -> None:
    found = [finding("g1", (20, 30)), finding("loss", (24, 25)), finding("w1", (30, 40))]
    cause = explain(found, CATALOGUE)
    assert cause is not None and cause.first.tensor == "loss"
    assert [one.tensor for one in cause.undecided] == ["g1"] and cause.window == (20, 25)
    text = cannot_tell(Story(cause, CATALOGUE, Clock()))
    assert "1 finding" in text and "gradients were saved 10 steps apart: within (20, 25]" in text
    assert "save every step between 20 and 25" in text


def test_nothing_is_undecided_where_every_step_was_saved() -> None:
    cause = explain([finding("out1", (4, 5)), finding("loss", (4, 5)), finding("w1", (5, 6))], CATALOGUE)
    assert cause is not None and cause.undecided == () and len(cause.then) == 2
    assert explain([], CATALOGUE) is None


@given(st.lists(st.tuples(st.sampled_from(sorted(CATALOGUE)), spans, st.sampled_from(list(Severity))), min_size=1))
def test_every_finding_has_one_part(items: list[Any]) -> None:
    found = [
        finding(name, (span[0] if span[0] >= 0 else None, max(span[1], 0)), severity=severity, worker=number)
        for number, (name, span, severity) in enumerate(items)
    ]
    cause = explain(found, CATALOGUE)
    assert cause is not None
    parts = [cause.first, *cause.before, *cause.then, *cause.besides]
    assert sorted(one.worker for one in parts) == list(range(len(items)))
    assert cause.first.severity.rank == max(one.severity.rank for one in found)
    assert all(one in cause.before or one in cause.then for one in cause.undecided)


def test_the_sort_of_trouble() -> None:
    assert trouble(finding("w1", (0, 1), "mine", statistic="posinf")) is Trouble.NON_FINITE
    assert trouble(finding("w1", (0, 1), "update_scale", threshold=1e-6, worst=1e-9)) is Trouble.VANISHING
    assert trouble(finding("w1", (0, 1), "update_scale", threshold=0.1, worst=3.0)) is Trouble.EXPLOSION
    assert trouble(finding("w1", (0, 1), "mine")) is Trouble.OTHER


def test_every_rule_that_comes_with_smdbg_has_its_sort() -> None:
    from smdbg.analysis.rule import all_rules

    unknown = {name for name in all_rules() if trouble(finding("w1", (0, 1), name, statistic="")) is Trouble.OTHER}
    assert unknown == set()


def test_a_name_that_is_no_tensor_comes_last_in_its_step() -> None:
    assert places_of(CATALOGUE).of("step time") > max(places_of(CATALOGUE).of(name) for name in CATALOGUE)


# ------------------------------------------------------------------------------------------ the page

SUMMARY = Summary(
    run="r", status="completed", rules_judged=1, rules=1, steps_seen=5, steps=5, workers=(0,), incomplete=False,
    dropped_steps=0, dropped_rows=0, switched_off=False,
)  # fmt: skip


def report(findings: list[Finding]) -> Report:
    result = RuleResult("exploding_tensor", "exploding_tensor", Outcome.VIOLATED, "", len(findings), 1, 1, 1, 1)
    return Report(tuple(findings), (result,), SUMMARY)


def story(findings: list[Finding], catalogue: dict[str, TensorInfo] = CATALOGUE, **more: Any) -> Story:
    return Story(explain(findings, catalogue), catalogue, Clock(), **more)


def many(count: int) -> tuple[list[Finding], dict[str, TensorInfo]]:
    infos = [TensorInfo(f"grad{n}", "gradients", role="gradient", backward_order=n) for n in range(count)]
    catalogue = {info.name: info for info in [*infos, CATALOGUE["loss"]]}
    return ordered([finding(name, (6, 7)) for name in catalogue], catalogue), catalogue


def test_hundreds_of_findings_are_a_page_and_jsonl_has_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    found, catalogue = many(400)
    told = story(found, catalogue, options=("--run", "my runs/1"))
    check_page.show(report(found), Format.TABLE, story=told)
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 25
    assert "… and 397 gradients more" in text and "--format jsonl" in text
    assert "First cause: loss, exploding_tensor (error) from step 7 on." in text
    assert "Then: 400 gradients at step 7 (exploding_tensor)." in text
    assert "smdbg inspect loss --steps 3:9 --run 'my runs/1'" in text and "smdbg blame --run 'my runs/1'" in text
    assert text.splitlines()[-1] == "401 errors. 1 of 1 rules judged, 5 of 5 steps"
    check_page.show(report(found), Format.JSONL, story=told)
    assert len(capsys.readouterr().out.splitlines()) == 401 + 1 + 1


def test_a_page_of_twenty_kinds_has_an_end() -> None:
    found = [finding("w1", (1, 2), f"rule{n}", worker=w) for n in range(30) for w in range(9)]
    rows, left = check_page.shortened([one.record() for one in found], {})
    assert len(rows) == 40 and sum(row.get("more", 1) for row in rows) + left == 270
    few = [one.record() for one in found[:20]]
    assert check_page.shortened(few, {}) == (few, 0)


def test_the_summary_names_the_first_cause(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    found = [finding("loss", (6, 7), worker=1), finding("g1", (0, 10))]
    check_page.show(report(found), Format.JSONL, story=story(found))
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["first_cause"] == {
        "tensor": "loss", "rule": "exploding_tensor", "severity": "error", "step": 7, "worker": 1, "mode": "train",
        "consequences": 1, "undecided": 1,
    }  # fmt: skip
    check_page.show(report([]), Format.JSON, story=story([]))
    assert json.loads(capsys.readouterr().out)["summary"]["first_cause"] is None


def test_several_workers_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    found = [finding("loss", (6, 7), worker=3), finding("g1", (7, 8)), finding("g2", (7, 8), worker=1)]
    tell(story(found, several=True))
    text = capsys.readouterr().out
    assert "loss of worker 3" in text and "2 gradients at step 8 (exploding_tensor, 2 workers)" in text
    assert "inspect loss --steps 3:9 --worker 3" in text and "--run" not in text


# ------------------------------------------------------------------------------------------ shells

words = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30), min_size=1)


@given(words, st.integers(30, 60))
def test_a_folded_command_line_is_within_the_width_and_means_the_same(line: list[str], width: int) -> None:
    from rich.cells import cell_len

    lines = folded(line, width)
    assert all(text.isprintable() for text in lines)
    assert max(map(cell_len, lines)) <= width
    if all(word.isprintable() for word in line):
        assert shlex.split("\n".join(lines).replace("\\\n", "")) == line


def test_bash_reads_names_as_they_are() -> None:
    line = ["printf", "%s|", "a b", "it's", "$(x)", "line\nend", "\x1b[31m\\", "ünï", "x" * 90, "-n", "'" * 30]
    for width in (30, 200):
        text = "\n".join(folded(line, width))
        done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
        assert done.stdout == "".join(f"{word}|" for word in line[2:])


def test_a_name_that_looks_like_an_option_goes_behind_them() -> None:
    assert inspect_words("-w", (6, 7), 1, ("--run", "r")) == [
        *("smdbg", "inspect", "--steps", "3:9", "--worker", "1", "--run", "r", "--", "-w")
    ]
    assert inspect_words("w", (20, 30), None, ()) == ["smdbg", "inspect", "w", "--steps", "0:41"]
