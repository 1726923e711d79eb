"""The checker on runs written by the real hook: what is judged, what a broken rule does, where blocks are cut."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import smdbg
from smdbg.analysis.cause import ordered, phase, precedes, undecided
from smdbg.analysis.checker import check
from smdbg.analysis.findings import Fold, fingerprint
from smdbg.analysis.report import Report
from smdbg.analysis.rule import Block, Judgement, Needs, Rule, State, build, find_rule, parameter
from smdbg.analysis.run import Run
from smdbg.analysis.view import View
from smdbg.errors import BadConfig, BadSelection
from smdbg.store.format import TensorInfo

EVERY = smdbg.SaveConfig()
VALUES = smdbg.ReductionConfig(save_raw_tensor=True)


def rule(name: str, instance: str = "", **parameters: Any) -> Rule:
    return build(find_rule(name), parameters, instance=instance)


def write(url: Path, tensors: dict[str, list[Any]], **hook: Any) -> Run:
    """Write `collection:name` -> a value per step (None: not saved), and open the run."""
    with smdbg.Hook(url, save_config=EVERY, **hook) as saver:
        for row in range(max(map(len, tensors.values()))):
            for key, values in tensors.items():
                collection, _, name = key.partition(":")
                if row < len(values) and values[row] is not None:
                    saver.save_tensor(name, np.asarray(values[row], np.float32), collection)
            saver.end_step()
    return smdbg.open_run(str(url))


# rules of the tests' own


@dataclass(frozen=True, kw_only=True)
class Raises(Rule):
    """Raises what it is told to."""

    name: ClassVar[str] = "raises"
    what: str = parameter("", help="what to raise")
    from_step: int = parameter(0, help="at which step")

    def evaluate(self, block: Block, state: State) -> tuple[Judgement, State]:
        if block.steps[-1] >= self.from_step:
            raise {
                "exit": SystemExit(3),
                "value": ValueError("no good"),
                "interrupt": KeyboardInterrupt(),
            }[self.what]
        bad = block.present
        return Judgement(bad, bad, np.zeros(bad.shape)), state


@dataclass(frozen=True, kw_only=True)
class LookBack(Rule):
    """Fires when the mean has risen over three rows in a row; asks for two earlier rows."""

    name: ClassVar[str] = "look_back"

    def needs(self) -> Needs:
        return Needs(("mean",), look_back=2, minimum=3)

    def evaluate(self, block: Block, state: State) -> tuple[Judgement, State]:
        mean = block.stat("mean")
        assert block.first == min(2, state.get("rows", 0))
        rising = np.zeros(mean.shape, np.bool_)
        rising[2:] = (mean[2:] > mean[1:-1]) & (mean[1:-1] > mean[:-2])
        judged = np.zeros(mean.shape, np.bool_)
        judged[2:] = True
        return Judgement(judged, rising, mean), {"rows": state.get("rows", 0) + len(mean) - block.first}


@dataclass(frozen=True, kw_only=True)
class Values(Rule):
    """Fires where the first element is 7; reads values."""

    name: ClassVar[str] = "values"
    undeclared: bool = parameter(False, help="ask for a statistic that needs() does not name")

    def needs(self) -> Needs:
        return Needs(values=True)

    def evaluate(self, block: Block, state: State) -> tuple[Judgement, State]:
        if self.undeclared:
            block.stat("mean")
        first = np.array(
            [[block.value(r, t).flat[0] for t in range(len(block.names))] for r in range(len(block.steps))]
        )
        return Judgement(block.present, first == 7, first), state


# outcomes


def test_a_rule_that_raises_is_failed_and_the_others_go_on(tmp_path: Path) -> None:
    run = write(tmp_path / "run", {"tensors:x": [1, np.nan]})
    rules = [Raises(what="exit"), Raises(what="value", instance="second"), rule("exploding_tensor")]
    report = check(run, [*rules, Values(instance="third", undeclared=True)])
    assert [result.outcome.value for result in report.rules] == ["failed", "failed", "violated", "failed"]
    assert [result.detail for result in report.rules[:2]] == ["SystemExit: 3", "ValueError: no good"]
    assert "'mean'" in report.rules[3].detail and "needs()" in report.rules[3].detail
    assert report.failed == ("raises", "second", "third")
    assert report.judged == ("exploding_tensor",)
    assert [finding.tensor for finding in report.findings] == ["x"]
    assert report.summary.rules_judged == 1 and report.summary.text() == "1 of 4 rules judged, 2 of 2 steps"


def test_an_interrupt_goes_through(tmp_path: Path) -> None:
    run = write(tmp_path / "run", {"tensors:x": [1]})
    with pytest.raises(KeyboardInterrupt):
        check(run, [Raises(what="interrupt")])


def test_what_a_failed_rule_found_on_another_worker_stays(tmp_path: Path) -> None:
    write(tmp_path / "run", {"tensors:x": [1]}, rank=0, world_size=2)
    run = write(tmp_path / "run", {"tensors:x": [1, 1, 1]}, rank=1, world_size=2)
    report = check(run, [Raises(what="value", from_step=2)])
    assert report.failed == ("raises",)
    assert [finding.worker for finding in report.findings] == [0]


def test_two_rules_of_one_name_and_a_bad_selector_are_refused(tmp_path: Path) -> None:
    run = write(tmp_path / "run", {"tensors:x": [1]})
    with pytest.raises(BadConfig, match="exploding_tensor"):
        check(run, [rule("exploding_tensor"), rule("exploding_tensor", only_nan=True)])
    check(run, [rule("exploding_tensor"), rule("exploding_tensor", "other", only_nan=True)])
    with pytest.raises(BadSelection, match="re:"):
        check(run, [rule("exploding_tensor", include=["re:("])])


# what is judged


def test_workers_are_judged_apart_and_share_a_fingerprint(tmp_path: Path) -> None:
    write(tmp_path / "run", {"tensors:x": [1, np.nan]}, rank=0, world_size=2)
    run = write(tmp_path / "run", {"tensors:x": [1, 1, np.inf]}, rank=1, world_size=2)
    found = check(run, [rule("exploding_tensor")]).findings
    assert [(one.worker, one.first_step, one.onset) for one in found] == [(0, 1, (0, 1)), (1, 2, (1, 2))]
    assert found[0].fingerprint == found[1].fingerprint
    report = check(run, [rule("exploding_tensor", workers="1"), rule("exploding_tensor", "none", workers=[5])])
    assert [one.worker for one in report.findings] == [1]
    assert report.not_judged == ("none",) and report.result("none").detail == "the run has no worker 5"
    assert report.summary.workers == (0, 1)


def test_a_mode_the_run_does_not_have_is_not_applicable(tmp_path: Path) -> None:
    run = write(tmp_path / "run", {"tensors:x": [np.nan]})
    result = check(run, [rule("exploding_tensor", mode="eval")]).rules[0]
    assert (result.outcome.value, result.detail) == ("not applicable", "the run has no step in mode eval")


def test_collections_saved_out_of_phase(tmp_path: Path) -> None:
    run = write(tmp_path / "run", {"a:x": [1, None, 1, None, np.nan], "b:y": [None, 1, None, np.nan, None], "c:z": [1]})
    found = {one.tensor: one for one in check(run, [rule("exploding_tensor")]).findings}
    assert (found["x"].onset, found["x"].judged) == ((2, 4), 3)
    assert (found["y"].onset, found["y"].judged) == ((1, 3), 2)
    assert "step 2" in found["x"].message and "step 1" in found["y"].message


def test_a_resumed_run_tells_the_attempt(tmp_path: Path) -> None:
    write(tmp_path / "run", {"tensors:x": [1, 1, np.nan, np.nan]})
    with smdbg.Hook(tmp_path / "run", save_config=EVERY, resume=True) as hook:
        hook.set_step(2)
        for value in (1, 1, np.nan):
            hook.save_tensor("x", np.float32(value), "tensors")
            hook.end_step()
    found = check(smdbg.open_run(str(tmp_path / "run")), [rule("exploding_tensor")]).findings
    assert [(one.attempt, one.first_step, one.onset, one.judged) for one in found] == [(1, 4, (3, 4), 5)]


def test_values_are_read_where_a_rule_says_so(tmp_path: Path) -> None:
    run = write(tmp_path / "run", {"tensors:x": [[1, 2], [7, 2], [1, 2]]}, reduction_config=VALUES)
    found = check(run, [Values()]).findings
    assert [(one.first_step, one.violations, one.judged) for one in found] == [(1, 1, 3)]


def test_each_matrix_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write(tmp_path / "run", {"gradients:g": [[1], [2]], "weights:w": [[1], [2]], "losses:loss": [2, 1]})
    calls: Counter[tuple[Any, ...]] = Counter()
    stats = Run.stats_of

    def counted(self: Run, statistics: list[str], collection: str, mode: str, **named: Any) -> Any:
        calls.update((statistic, collection, mode, named["worker"]) for statistic in statistics)
        return stats(self, statistics, collection, mode, **named)

    monkeypatch.setattr(Run, "stats_of", counted)
    rules = [rule("exploding_tensor"), rule("exploding_tensor", "again"), rule("vanishing_gradient")]
    check(run, [*rules, rule("all_zero", collections="gradients")])
    assert calls["count", "gradients", "global", 0] == 1 and set(calls.values()) == {1}


def test_progress_is_told_to_the_end(tmp_path: Path) -> None:
    run = write(tmp_path / "run", {"tensors:x": [1]})
    told: list[tuple[int, int, str]] = []
    rules = [rule("exploding_tensor"), rule("vanishing_gradient"), rule("all_zero", include="x")]
    check(run, rules, progress=lambda *said: told.append(said))
    assert told == [(0, 2, "exploding_tensor"), (1, 2, "all_zero"), (2, 2, "")]


def test_summary_of_a_run_that_failed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), smdbg.Hook(tmp_path / "run", save_config=EVERY) as hook:
        hook.save_tensor("x", np.ones(2), "tensors")
        hook.end_step()
        hook.save_scalar("loss", 1.0, "losses")
        hook.end_step()
        raise RuntimeError("out of memory")
    summary = check(smdbg.open_run(str(tmp_path / "run")), [rule("exploding_tensor", include=["x"])]).summary
    assert summary.incomplete and summary.status.startswith("failed") and not summary.switched_off
    assert (summary.steps_seen, summary.steps, summary.dropped_steps, summary.dropped_rows) == (1, 2, 0, 0)
    assert json.loads(json.dumps(summary.record()))["workers"] == [0]


def test_report_helpers(tmp_path: Path) -> None:
    run = write(tmp_path / "run", {"tensors:x": [np.nan], "gradients:g": [[1e-9]]})
    rules = [rule("exploding_tensor", severity="info"), rule("vanishing_gradient", severity="WARNING")]
    report = check(run, rules)
    assert report.worst is smdbg.Severity.WARNING
    assert [one.rule for one in report.at_least(smdbg.Severity.WARNING)] == ["vanishing_gradient"]
    assert len(report.at_least(smdbg.Severity.INFO)) == 2
    assert Report((), report.rules, report.summary).worst is None
    with pytest.raises(KeyError):
        report.result("nothing")


def test_record_of_a_finding_has_the_contract_s_fields_in_their_order(tmp_path: Path) -> None:
    run = write(tmp_path / "run", {"gradients:g": [1, np.nan]})
    record = check(run, [rule("exploding_tensor", "mine")]).findings[0].record()
    assert list(record) == [
        "rule", "severity", "run", "worker", "attempt", "mode", "tensor", "first_step", "last_step", "first_mode_step",
        "onset", "violations", "judged", "worst", "threshold", "statistic", "message", "hint", "fingerprint",
    ]  # fmt: skip
    assert record["rule"] == "mine" and record["run"] == run.url and record["onset"] == [0, 1]
    assert record["fingerprint"] == fingerprint("mine", "g", "global") and len(record["fingerprint"]) == 16
    assert fingerprint("exploding_tensor", "gradient/x", "train") == "312aaea0191d9e9b"
    json.dumps(record)


# blocks


CUT_RULES = [
    rule("exploding_tensor"),
    rule("vanishing_gradient", collections="tensors"),
    rule("vanishing_gradient", "persistent", collections="tensors", repeats=2, within=4),
    rule("all_zero", include=["*"], repeats=3, within=3),
    LookBack(),
]


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 60 steps: tensors that come and go, with zeros, tiny values, NaN and infinities; two losses."""
    random = np.random.default_rng(5)
    kinds = np.array([1.0, 0.0, 1e-9, np.nan, np.inf, -1.0])
    tensors: dict[str, list[Any]] = {}
    for index, weights in enumerate(random.dirichlet(np.full(len(kinds), 0.4), size=12)):
        rows = [kinds[random.choice(len(kinds), size=3, p=weights)] for _ in range(60)]
        saved = random.random(60) < random.choice([0.3, 0.9, 1.0])
        tensors[f"tensors:x{index}"] = [row if keep else None for row, keep in zip(rows, saved, strict=True)]
    tensors["losses:falls"] = list(3 - np.arange(60) / 20 + random.normal(size=60) / 4)
    tensors["losses:stands"] = list(2 + random.normal(size=60) / 10)
    return write(tmp_path_factory.mktemp("varied") / "run", tensors)


@pytest.mark.parametrize("one", CUT_RULES, ids=lambda one: one.label)
def test_the_varied_run_holds_findings_to_lose(varied: Run, one: Rule) -> None:
    assert check(varied, [one]).findings


@given(cuts=st.sets(st.integers(1, 59)))
@settings(max_examples=40)
def test_results_do_not_depend_on_where_blocks_are_cut(varied: Run, cuts: set[int]) -> None:
    view = View(varied, {name: varied.tensor(name).info for name in varied.tensors()})
    for one in CUT_RULES:
        table = view.table(one.select(view.catalogue), one.needs().statistics, "global")
        folds = []
        for starts in ([0], sorted({0, *(cut for cut in cuts if cut < len(table.steps))})):
            fold, state = Fold(len(table.infos), one.kinds()), {}
            for block in table.blocks(starts, one.needs().look_back, False, {}):
                judgement, state = one.evaluate(block, state)
                state = json.loads(json.dumps(state))
                fold.add(block.steps, judgement, block.first)
            folds.append((fold.results(), fold.judged.tolist(), fold.judged_rows))
        assert repr(folds[0]) == repr(folds[1]), one.label


@given(block_rows=st.integers(1, 70))
@settings(max_examples=15)
def test_findings_do_not_depend_on_the_size_of_blocks(varied: Run, block_rows: int) -> None:
    whole, cut = check(varied, CUT_RULES), check(varied, CUT_RULES, block_rows=block_rows)
    assert repr(whole) == repr(cut)


# order by cause


def finding(tensor: str, onset: tuple[int | None, int], **changes: Any) -> smdbg.Finding:
    base = smdbg.Finding(
        rule="exploding_tensor", severity=smdbg.Severity.ERROR, run="r", worker=0, attempt=0, mode="train",
        tensor=tensor, first_step=onset[1], last_step=onset[1], first_mode_step=onset[1], onset=onset, violations=1,
        judged=1, worst=1.0, threshold=0.0, statistic="nan", message="", hint="", fingerprint="",
    )  # fmt: skip
    return replace(base, **changes)


CATALOGUE = {
    info.name: info
    for info in [
        TensorInfo("w1", "weights", role="weight"),
        TensorInfo("after", "weights", role="weight", moment="after"),
        TensorInfo("g1", "gradients", role="gradient", backward_order=1),
        TensorInfo("g2", "gradients", role="gradient", backward_order=0),
        TensorInfo("loss", "losses", role="loss"),
        TensorInfo("out1", "outputs", role="output", forward_order=0),
        TensorInfo("in2", "inputs", role="input", forward_order=1),
        TensorInfo("out2", "outputs", role="output", forward_order=1),
        TensorInfo("data", "inputs", role="input"),
        TensorInfo("adam/v", "optimizer_state"),
        TensorInfo("update/w1", "updates", role="update"),
        TensorInfo("other", "tensors"),
    ]
}


def names(onsets: dict[str, tuple[int | None, int]]) -> list[str]:
    return [one.tensor for one in ordered([finding(*item) for item in onsets.items()], CATALOGUE)]


def test_within_a_step_the_order_of_computation_decides() -> None:
    together = {name: (3, 5) if name == "w1" else (2, 4) for name in CATALOGUE}
    assert names(together) == [
        "data", "out1", "in2", "out2", "loss", "g2", "g1", "adam/v", "update/w1", "w1", "after", "other",
    ]  # fmt: skip


def test_what_went_bad_earlier_comes_first_whatever_it_is() -> None:
    assert names({"loss": (9, 10), "g1": (8, 9), "w1": (9, 10)}) == ["g1", "w1", "loss"]


def test_a_row_holds_the_weights_from_before_its_update() -> None:
    # Bad in row 5 means: made bad by step 4, before the loss of step 5, and after the gradient of step 4.
    assert names({"loss": (4, 5), "w1": (4, 5)}) == ["w1", "loss"]
    assert names({"loss": (4, 5), "after": (4, 5)}) == ["loss", "after"]
    assert names({"w1": (4, 5), "g1": (3, 4)}) == ["g1", "w1"]
    assert names({"loss": (None, 0), "w1": (None, 0)}) == ["w1", "loss"]


def test_a_coarse_save_interval_leaves_the_order_to_the_computation_and_says_so() -> None:
    found = ordered([finding("w1", (0, 10)), finding("g1", (0, 10)), finding("loss", (4, 5))], CATALOGUE)
    assert [one.tensor for one in found] == ["loss", "g1", "w1"]
    assert [one.tensor for one in undecided(found, CATALOGUE)] == ["g1", "w1"]
    assert phase(CATALOGUE["in2"]) == phase(CATALOGUE["out2"])


onsets = st.tuples(st.none() | st.integers(0, 6), st.integers(0, 4)).map(
    lambda pair: (pair[0], pair[1] if pair[0] is None else pair[0] + 1 + pair[1])
)


@given(st.lists(st.tuples(st.sampled_from(sorted(CATALOGUE)), onsets), max_size=12), st.randoms())
def test_none_comes_before_one_that_precedes_it(items: list[tuple[str, Any]], random: Any) -> None:
    found = [finding(name, onset, worker=index) for index, (name, onset) in enumerate(items)]
    result = ordered(found, CATALOGUE)
    assert sorted(one.worker for one in result) == list(range(len(items)))
    for index, one in enumerate(result):
        assert not any(precedes(later, one, CATALOGUE) for later in result[index + 1 :])
    random.shuffle(found)
    assert ordered(found, CATALOGUE) == result
