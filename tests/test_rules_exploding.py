"""exploding_tensor in context: masks and skipped steps, wherever blocks are cut."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import smdbg
from smdbg.analysis.checker import check
from smdbg.analysis.findings import Fold
from smdbg.analysis.rule import Rule, build, find_rule
from smdbg.analysis.run import Run
from smdbg.analysis.view import View

STEPS = 40


def rule(**parameters: object) -> Rule:
    return build(find_rule("exploding_tensor"), parameters)


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with masks that stay and masks that change, skipped steps, and gradients that come and go."""
    random = np.random.default_rng(3)
    url, homes = tmp_path_factory.mktemp("varied") / "run", ("gradients", "updates", "outputs")
    with smdbg.Hook(url, save_config=smdbg.SaveConfig(), collections=homes) as hook:
        for step in range(STEPS):
            hook.set_mode("train")
            skipped = step % 7 == 3
            for name in ("a", "b"):
                gradient = np.array([np.inf if skipped else 1.0, np.nan if step == 30 else 1.0])
                if random.random() < 0.8:
                    hook.save_tensor(f"gradient/{name}", gradient, "gradients", role="gradient", of=name)
                update = np.full(2, 0.0 if skipped else 0.1)
                hook.save_tensor(f"update/{name}", update, "updates", role="update", of=name)
            stays = np.where(random.permutation(4) < 1, -np.inf, 1.0)
            changes = np.where(random.permutation(4) < 1 + (step > 25), -np.inf, 1.0)
            late = np.where(random.permutation(4) < (step > 5), -np.inf, 1.0)
            for name, value in (("stays", stays), ("changes", changes), ("late", late)):
                if random.random() < 0.7:
                    hook.save_tensor(name, value, "outputs", role="output")
            hook.end_step()
    return smdbg.open_run(str(hook.url))


def test_what_is_found_in_context(varied: Run) -> None:
    found = {one.tensor: one for one in check(varied, [rule(in_context=True)]).findings}
    assert set(found) <= {"gradient/a", "gradient/b", "changes", "late"} and {"changes", "late"} <= set(found)
    assert found["changes"].first_step > 25 and found["late"].first_step > 5
    assert all(one.first_step == 30 for name, one in found.items() if name.startswith("gradient"))
    skipped = check(varied, [rule(only_skipped=True)]).findings
    assert {one.tensor for one in skipped} == {"gradient/a", "gradient/b"}
    assert all(one.first_step % 7 == 3 and "skipped" in one.message for one in skipped)


@pytest.mark.parametrize("one", [rule(in_context=True), rule(only_skipped=True)], ids=["in context", "skipped"])
@given(cuts=st.sets(st.integers(1, STEPS - 1)))
@settings(max_examples=30, deadline=None)
def test_results_do_not_depend_on_where_blocks_are_cut(varied: Run, one: Rule, cuts: set[int]) -> None:
    view = View(varied, {name: varied.tensor(name).info for name in varied.tensors()})
    table = view.table(one.select(view.catalogue), one.needs().statistics, "train")
    folds = []
    for starts in ([0], sorted({0, *cuts})):
        fold, state = Fold(len(table.infos), one.kinds()), {}
        for block in table.blocks(starts, 0, False, {}):
            judgement, state = one.evaluate(block, state)
            state = json.loads(json.dumps(state))
            fold.add(block.steps, judgement, block.first)
        folds.append((fold.results(), fold.judged.tolist(), fold.judged_rows))
    assert repr(folds[0]) == repr(folds[1])


def test_the_gradient_norm_speaks_where_no_gradient_was_saved(tmp_path: Path) -> None:
    def run(name: str, losses: list[float]) -> Run:
        with smdbg.Hook(tmp_path / name, save_config=smdbg.SaveConfig()) as hook:
            for loss, norm in zip(losses, [1.0, np.inf, 1.0], strict=True):
                hook.save_tensor("optimizer/grad_norm", np.float64(norm), "metrics", role="metric")
                hook.save_tensor("loss", np.float64(loss), "losses", role="loss")
                hook.end_step()
        return smdbg.open_run(str(tmp_path / name))

    (skipped,) = check(run("a", [3, 2, 1]), [rule(in_context=True)]).findings
    assert (skipped.tensor, skipped.severity.value) == ("optimizer/grad_norm", "info")
    used = check(run("b", [3, 2, np.nan]), [rule(in_context=True)]).findings
    assert {one.tensor: one.severity.value for one in used} == {"optimizer/grad_norm": "error", "loss": "error"}
