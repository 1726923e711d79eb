"""Rules that compare a tensor with itself, and rules on the units of a layer: what a YAML case cannot express."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import smdbg
from smdbg.analysis.checker import check
from smdbg.analysis.findings import Fold
from smdbg.analysis.idle_units import Pool, Working, bounds_of_share, judge_layer
from smdbg.analysis.measuring import measure_all
from smdbg.analysis.rule import Rule, Sample, State, build, find_rule
from smdbg.analysis.run import Run
from smdbg.analysis.table import Table
from smdbg.analysis.view import View
from smdbg.rules.activation_collapse import in_a_row
from smdbg.rules.saturated_activation import mean_derivative
from smdbg.stats import features
from smdbg.store.format import TensorInfo

STEPS = 60


def rule(name: str, instance: str = "", **parameters: Any) -> Rule:
    return build(find_rule(name), parameters, instance=instance)


# blocks

CUT_RULES = [
    rule("tensor_variance", max_threshold=0.5, min_threshold=0.01),
    rule("unchanged_tensor"),
    rule("unchanged_tensor", "loose", num_steps=5, rtol=0.5, atol=0.1, equal_nan=True),
    rule("weight_update_ratio", large_threshold=0.5, small_threshold=1e-3),
    rule("weight_update_ratio", "far", num_steps=7, large_threshold=0.5, small_threshold=1e-3),
]


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of weights that come and go, stand still, jump and turn NaN; values and updates are kept now and then."""
    random = np.random.default_rng(3)
    raw = smdbg.SaveConfig(end_step=0, save_steps=np.flatnonzero(random.random(STEPS) < 0.6).tolist())
    url = tmp_path_factory.mktemp("values") / "run"
    reduction = smdbg.ReductionConfig(save_raw_tensor=raw)
    weights = {f"w{index}": random.normal(size=3) for index in range(8)}
    with smdbg.Hook(
        url, save_config=smdbg.SaveConfig(), reduction_config=reduction, collections=["weights", "updates"]
    ) as hook:
        hook.set_mode("train")
        for _ in range(STEPS):
            for index, (name, weight) in enumerate(weights.items()):
                update = random.choice([0.0, 1e-4, 0.1, 2.0], p=[0.6, 0.1, 0.2, 0.1]) * random.normal(size=3)
                if index == 7 and random.random() < 0.1:
                    update = update * np.nan
                moment = "after" if index == 6 else ""
                if random.random() < (0.5, 0.9, 1.0)[index % 3]:
                    value = weight + update if moment else weight
                    hook.save_tensor(name, value.astype(np.float32), "weights", moment=moment)
                if index % 2 == 0 and random.random() < 0.9:
                    hook.save_tensor(f"update/{name}", update.astype(np.float32), "updates", of=name)
                weights[name] = np.nan_to_num(weight) + update
            hook.end_step()
    return smdbg.open_run(str(url))


def measured(view: View, one: Rule, names: list[str]) -> dict[tuple[int, int], Any]:
    if not one.needs().values:
        return {}
    with ThreadPoolExecutor(1) as pool:
        assert list(measure_all(pool, view, [(one, names, [(0, "train")], view)], lambda *_: None)) == []
    return {
        (step, column): found
        for column, name in enumerate(names)
        for step, found in view.measured(one.label, name, "train").items()
    }


@pytest.mark.parametrize("one", CUT_RULES, ids=lambda one: one.label)
def test_the_varied_run_holds_findings_to_lose(varied: Run, one: Rule) -> None:
    report = check(varied, [one])
    assert report.findings
    assert any(finding.violations < finding.judged for finding in report.findings)


@pytest.fixture(scope="module")
def tables(varied: Run) -> list[tuple[Rule, Table, dict[tuple[int, int], Any]]]:
    """Each rule with what it reads, read once."""
    view = View(varied, {name: varied.tensor(name).info for name in varied.tensors()})
    found = []
    for one in CUT_RULES:
        names = one.select(view.catalogue)
        table = view.table(names, one.needs().statistics, "train")
        found.append((one, table, measured(view, one, names)))
    return found


def folded(one: Rule, table: Table, measures: dict[tuple[int, int], Any], starts: list[int]) -> str:
    fold = Fold(len(table.infos), one.kinds())
    state: State = {}
    for block in table.blocks(starts, one.needs().look_back, False, measures):
        judgement, state = one.evaluate(block, state)
        state = json.loads(json.dumps(state))
        fold.add(block.steps, judgement, block.first)
    return repr((fold.results(), fold.judged.tolist(), fold.judged_rows))


@given(cuts=st.sets(st.integers(1, STEPS - 1)))
@settings(max_examples=20, deadline=None)
def test_results_do_not_depend_on_where_blocks_are_cut(tables: list[Any], cuts: set[int]) -> None:
    for one, table, measures in tables:
        starts = sorted({0, *(cut for cut in cuts if cut < len(table.steps))})
        assert folded(one, table, measures, starts) == folded(one, table, measures, [0]), one.label


@pytest.mark.parametrize("block_rows", [1, 7])
def test_findings_do_not_depend_on_the_size_of_blocks(varied: Run, block_rows: int) -> None:
    assert repr(check(varied, CUT_RULES)) == repr(check(varied, CUT_RULES, block_rows=block_rows))


# the change of a value


def change(earlier: Any, now: Any, **parameters: Any) -> float:
    info = TensorInfo("x", "tensors")
    sample = Sample(info, 1, np.asarray(now), ((0, np.asarray(earlier)),))
    found = rule("unchanged_tensor", **parameters).measure(sample)
    assert found is not None and found[0] == 0
    return float(found[1])


@pytest.mark.parametrize("size", [1, 4096, 4097, 600_000])
def test_a_change_of_the_last_element_alone_is_seen(size: int) -> None:
    before, after = np.ones(size, np.float32), np.ones(size, np.float32)
    assert change(before, after) == 0
    after[-1] = 1.001
    assert np.isnan(change(before, after))
    assert change(before, after, rtol=0.01) == pytest.approx(0.001, rel=1e-3)


def test_other_kinds_of_values_change_too() -> None:
    assert change([1 + 1j], [1 + 1j]) == 0
    assert np.isnan(change([1 + 1j], [1 - 1j]))  # of one modulus
    assert change([True, False], [True, False]) == 0
    assert np.isnan(change([True, False], [False, False]))
    assert change(["a"], ["a"]) == 0
    assert np.isnan(change(["a"], ["b"]))
    assert np.isnan(change(np.zeros((2, 3)), np.zeros((3, 2))))
    assert change(np.zeros(0), np.zeros(0)) == 0


def write_weights(url: Path, values: list[Any], updates: list[Any], moment: str) -> Run:
    config = smdbg.ReductionConfig()
    with smdbg.Hook(
        url, save_config=smdbg.SaveConfig(), reduction_config=config, collections=["weights", "updates"]
    ) as hook:
        for value, update in zip(values, updates, strict=True):
            hook.save_tensor("w", np.array(value, np.float32), "weights", moment=moment)
            hook.save_tensor("update/w", np.array(update, np.float32), "updates", of="w")
            hook.end_step()
    return smdbg.open_run(str(url))


def test_weights_saved_after_their_update_are_shifted_by_one(tmp_path: Path) -> None:
    values, updates = [[3.0, 4.0], [0.0, 5.0], [4.0, 3.0]], [[9.0, 9.0], [-3.0, 1.0], [4.0, -2.0]]
    one = rule("weight_update_ratio", large_threshold=0.8)
    before = check(write_weights(tmp_path / "before", values, [*updates[1:], [0, 0]], ""), [one]).findings
    after = check(write_weights(tmp_path / "after", values, updates, "after"), [one]).findings
    for found in (before, after):
        assert [(one.first_step, one.judged) for one in found] == [(2, 2)]
        assert found[0].worst == pytest.approx(20**0.5 / 5)


# units of a layer


values_of_a_unit = st.lists(st.floats(-12, 12, width=32), min_size=1, max_size=30)


@given(values_of_a_unit, st.floats(-9, 0), st.floats(0.5, 9))
@settings(max_examples=100, deadline=None)
def test_bounds_hold_the_true_share(values: list[float], low: float, high: float) -> None:
    array = np.array(values, np.float64)[:, None]
    least, most = bounds_of_share(features(array, 1), low, high, len(values))
    share = ((array > low) & (array < high)).mean()
    assert least[0] <= share + 1e-5 and most[0] >= share - 1e-5


def test_bounds_are_tight_where_all_values_lie_alike() -> None:
    columns = np.array([[1, 20, -20, 20, 20], [2, 30, -20, -20, 1]], np.float32)
    least, most = bounds_of_share(features(columns, 1), -9, 9, 2)
    assert least.tolist()[:4] == [1, 0, 0, 0] and most.tolist()[:4] == [1, 0, 0, 0]
    assert 0 <= least[4] <= 0.5 <= most[4] < 1


@given(
    st.lists(st.tuples(st.integers(1, 5), st.lists(st.booleans(), min_size=3, max_size=3)), max_size=12),
    st.integers(1, 4),
    st.integers(0, 12),
)
@settings(max_examples=100, deadline=None)
def test_pooling_by_hand(rows: list[tuple[int, list[bool]]], steps: int, observations: int) -> None:
    series = [Working(at, np.array(on, float), np.array(on, float), n) for at, (n, on) in enumerate(rows)]
    layer = judge_layer(series, 0.0, 0.5, Pool(steps, observations))
    expected = []
    for end in range(1, len(rows) + 1):
        for start in range(end - steps, -1, -1):
            if sum(n for n, _ in rows[start:end]) >= observations:
                quiet = sum(not any(on[unit] for _, on in rows[start:end]) for unit in range(3))
                expected.append((end - 1, start, quiet))
                break
    assert [tuple(map(int, row)) for row in zip(layer.steps, layer.begun, layer.idle, strict=True)] == expected
    assert layer.violated.tolist() == [quiet > 1.5 for _, _, quiet in expected]


@given(st.lists(st.floats(-6, 6), min_size=1, max_size=20))
def test_the_mean_derivative_follows_from_mean_and_spread_of_the_outputs(inputs: list[float]) -> None:
    x = np.array(inputs)
    tanh, sigmoid = np.tanh(x), 1 / (1 + np.exp(-x))
    for name, y, slope in (("tanh", tanh, 1 - tanh**2), ("sigmoid", sigmoid, 4 * sigmoid * (1 - sigmoid))):
        found = mean_derivative(name, np.array([y.mean()]), np.array([y.std()]))
        assert found[0] == pytest.approx(slope.mean(), abs=1e-9)


@given(st.lists(st.booleans(), max_size=20), st.integers(1, 4))
def test_in_a_row(bad: list[bool], repeats: int) -> None:
    expected = [at + 1 >= repeats and all(bad[at + 1 - repeats : at + 1]) for at in range(len(bad))]
    assert in_a_row(np.array(bad, bool), repeats).tolist() == expected
