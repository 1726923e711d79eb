"""Rules on gradients, updates and weights, where tests/rules cannot say it: real trainings, cuts, series, resumed runs.

The trainings are small, seeded and saved at every step; each fault is one line beside the healthy training.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn

import smdbg
from smdbg.analysis.checker import check
from smdbg.analysis.course import Course
from smdbg.analysis.findings import NO_STEP, Fold
from smdbg.analysis.rule import Rule, build, find_rule
from smdbg.analysis.run import Run
from smdbg.analysis.streaks import in_a_row
from smdbg.analysis.training import earlier_medians, fan_in, hurts, least_size
from smdbg.analysis.view import View
from smdbg.store.format import TensorInfo

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from smdbg.hooks.torch import Hook  # noqa: E402

NAMES = (
    "gradient_explosion", "gradient_vanishing_depth", "dead_layer", "frozen_parameter", "missing_gradient",
    "gradient_leak", "update_scale", "update_lost_to_rounding", "weight_growth", "initial_weights",
)  # fmt: skip
torch.set_num_threads(1)
STEPS = 60
EVERY = smdbg.SaveConfig()


def rule(name: str, **parameters: Any) -> Rule:
    return build(find_rule(name), parameters)


def found_in(run: Run, *names: str, **parameters: Any) -> dict[str, dict[str, str]]:
    """Return rule -> tensor -> severity."""
    out: dict[str, dict[str, str]] = {}
    report = check(run, [rule(name, **parameters) for name in names or NAMES])
    assert not report.failed
    for one in report.findings:
        out.setdefault(one.rule, {})[one.tensor] = one.severity.value
    return out


# trainings


def model_of(*widths: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    parts = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), act())]
    return nn.Sequential(*parts[:-1])


def sgd(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def trained(
    url: Path,
    model: nn.Module,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    *,
    held: Any = None,
    zero_grad: bool = True,
    steps: int = STEPS,
    before_step: Callable[[int], None] = lambda step: None,
    hook: dict[str, Any] | None = None,
) -> Run:
    """Train on a small classification task and return the run."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(256, 8, generator=random)
    y = (x[:, 0] * x[:, 1] > 0).long() + 2 * (x[:, 2] > 0).long()
    stepping = (optimizer or sgd(0.1))(list(model.parameters() if held is None else held))
    loss_of = nn.CrossEntropyLoss()
    dtype = next(model.parameters()).dtype
    with Hook(url, save_config=EVERY, **(hook or {})) as saver:
        saver.register_module(model)
        for step in range(steps):
            batch = torch.randint(0, 256, (32,), generator=random)
            loss = loss_of(model(x[batch].to(dtype)).float(), y[batch])
            if zero_grad:
                model.zero_grad()
            loss.backward()
            before_step(step)
            saver.record("loss", loss)
            stepping.step()
    return smdbg.open_run(str(url))


def test_a_healthy_training_is_quiet(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", model_of(8, 32, 32, 4))
    assert found_in(run) == {}
    outcomes = {one.name: one.outcome.value for one in check(run, [rule(name) for name in NAMES]).rules}
    assert outcomes.pop("update_lost_to_rounding") == "not applicable"
    assert set(outcomes.values()) == {"clean"}


def test_a_rate_far_too_high(tmp_path: Path) -> None:
    found = found_in(trained(tmp_path / "run", model_of(8, 32, 32, 4), sgd(1e4)))
    assert set(found["gradient_explosion"].values()) == {"error"}


def test_a_rate_that_jumps_late(tmp_path: Path) -> None:
    model, made = model_of(8, 32, 32, 4), []

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(parameters, lr=0.05))
        return made[0]

    def jump(step: int) -> None:
        made[0].param_groups[0]["lr"] = 0.05 if step < 40 else 30.0

    run = trained(tmp_path / "run", model, optimizer, before_step=jump)
    report = check(run, [rule("gradient_explosion")])
    assert [one.severity.value for one in report.findings] == ["error"]
    assert 40 <= report.findings[0].onset[1] <= 43 and "grew most" in report.findings[0].message


def test_a_rate_far_too_low(tmp_path: Path) -> None:
    found = found_in(trained(tmp_path / "run", model_of(8, 32, 32, 4), sgd(1e-7)))
    assert found == {"update_scale": {f"update/{n}.weight": "error" for n in (0, 2, 4)}}


def test_a_rate_too_high_shows_in_the_updates(tmp_path: Path) -> None:
    found = found_in(trained(tmp_path / "run", model_of(8, 32, 4, act=nn.Tanh), sgd(10.0)), "update_scale")
    assert "error" in found["update_scale"].values()


def test_vanishing_through_depth_names_the_early_layers(tmp_path: Path) -> None:
    found = found_in(trained(tmp_path / "run", model_of(8, *[32] * 10, 4, act=nn.Sigmoid)))
    early = found["gradient_vanishing_depth"]
    assert early["gradient/0.weight"] == "error" and "gradient/18.weight" not in early


def test_a_dead_layer_is_told_from_those_behind_it(tmp_path: Path) -> None:
    model = model_of(8, 32, 32, 32, 4)
    nn.init.constant_(model[2].bias, -100.0)
    found = found_in(trained(tmp_path / "run", model))
    assert found["dead_layer"] == {"gradient/0.weight": "error", "gradient/2.weight": "error"}


def test_weights_of_zero_and_constants(tmp_path: Path) -> None:
    zero, same = model_of(8, 32, 32, 4), model_of(8, 32, 32, 4)
    for p in zero.parameters():
        nn.init.zeros_(p)
    for p in same.parameters():
        nn.init.constant_(p, 0.1)
    weights = {f"{n}.weight": "error" for n in (0, 2, 4)}
    assert found_in(trained(tmp_path / "zero", zero), "initial_weights") == {"initial_weights": weights}
    assert found_in(trained(tmp_path / "same", same), "initial_weights") == {"initial_weights": weights}


class Residual(nn.Module):
    """A residual block and a head, both of which start at zero, as some recipes have it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(8, 32), nn.Linear(32, 4)
        self.block = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        nn.init.zeros_(self.block[2].weight)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        found: torch.Tensor = self.head(x + self.block(x))
        return found


def test_outputs_that_start_at_zero_are_healthy(tmp_path: Path) -> None:
    assert found_in(trained(tmp_path / "run", Residual(), sgd(0.3))) == {}


def test_an_optimizer_that_holds_other_tensors(tmp_path: Path) -> None:
    model, other = model_of(8, 32, 4), model_of(8, 32, 4)
    found = found_in(trained(tmp_path / "run", model, held=other.parameters()), "frozen_parameter", "missing_gradient")
    assert found == {"frozen_parameter": {f"{n}.{p}": "error" for n in (0, 2) for p in ("weight", "bias")}}


def test_a_layer_that_was_left_out(tmp_path: Path) -> None:
    model = model_of(8, 32, 32, 4)
    held = [p for name, p in model.named_parameters() if not name.startswith("2.")]
    found = found_in(trained(tmp_path / "run", model, held=held))
    assert found == {"frozen_parameter": {"2.weight": "error", "2.bias": "error"}}


def test_layers_frozen_on_purpose(tmp_path: Path) -> None:
    model = model_of(8, 32, 32, 4)
    for p in model[0].parameters():
        p.grad = torch.ones_like(p)  # left over from a training before
        p.requires_grad_(False)
    assert found_in(trained(tmp_path / "run", model)) == {}
    rest = [p for p in model.parameters() if p.requires_grad]
    assert found_in(trained(tmp_path / "rest", model, held=rest)) == {}


def test_a_graph_that_is_cut(tmp_path: Path) -> None:
    class Cut(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for index, part in enumerate(self):
                x = part(x).detach() if index == 1 else part(x)
            return x

    found = found_in(trained(tmp_path / "run", Cut(*model_of(8, 32, 32, 4))))
    assert found == {"missing_gradient": {"0.weight": "error", "0.bias": "error"}}


def test_a_part_that_is_never_called_is_a_warning(tmp_path: Path) -> None:
    class Spare(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in list(self)[:-1]:
                x = part(x)
            return x

    model = Spare(*model_of(8, 32, 4), nn.Linear(4, 4))
    assert found_in(trained(tmp_path / "run", model)) == {
        "missing_gradient": {"3.weight": "warning", "3.bias": "warning"}
    }


def test_gradients_that_are_not_zeroed(tmp_path: Path) -> None:
    raw = {"reduction_config": smdbg.ReductionConfig(save_raw_tensor=True)}
    run = trained(tmp_path / "run", model_of(8, 32, 32, 4), sgd(0.01), zero_grad=False, hook=raw)
    for values, how in ((False, "norms alone"), (True, "cosine 0.")):
        (one,) = check(run, [rule("gradient_leak", values=values, smooth=0.08)]).findings
        assert how in one.message and one.severity.value == "error" and one.onset == (0, 1)
    assert not check(run, [rule("gradient_leak", values=True, smooth=0.08, cosine=1.0)]).findings


def test_updates_lost_in_bfloat16(tmp_path: Path) -> None:
    found = found_in(trained(tmp_path / "run", model_of(8, 32, 32, 4).bfloat16(), sgd(1e-3)))
    assert found["update_lost_to_rounding"] == {f"update/{n}.weight": "error" for n in (0, 2, 4)}
    assert "frozen_parameter" not in found


def test_a_weight_decay_with_the_wrong_sign(tmp_path: Path) -> None:
    model = model_of(8, 32, 32, 4)

    def grow(step: int) -> None:
        for p in model.parameters():
            p.grad = p.grad - 1.0 * p.detach()

    report = check(trained(tmp_path / "run", model, sgd(0.1), before_step=grow), [rule("weight_growth")])
    assert {one.tensor for one in report.findings} == {"0.weight", "2.weight", "4.weight"}
    assert {one.severity.value for one in report.findings} == {"error"}
    assert max(one.onset[1] for one in report.findings) <= 3


def test_initial_weights_of_resumed_runs_are_none(tmp_path: Path) -> None:
    model = model_of(8, 32, 4)
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[2].weight)
    trained(tmp_path / "run", model, steps=10)
    run = trained(tmp_path / "run", model, steps=10, hook={"resume": True})
    result = check(run, [rule("initial_weights")]).rules[0]
    assert (result.outcome.value, result.detail) == ("not applicable", "the run was resumed")


# series written by hand


def written(url: Path, norms: list[float], losses: list[float]) -> Run:
    """Write the norm and the loss of each step, with one gradient."""
    with smdbg.Hook(url, save_config=EVERY) as hook:
        for norm, loss in zip(norms, losses, strict=True):
            hook.set_mode("train")
            hook.save_scalar("optimizer/grad_norm", norm)
            hook.save_scalar("loss", loss, "losses", role="loss")
            hook.save_tensor("gradient/w", np.full(2, norm, np.float32), "gradients", role="gradient")
            hook.end_step()
    return smdbg.open_run(str(url))


def test_norms_that_are_not_finite_count_where_large_ones_lead_to_them(tmp_path: Path) -> None:
    norms = [1.0] * 10 + [1e3, math.inf, math.nan, math.nan]
    losses = [1.0] * 11 + [math.inf, math.nan, math.nan]
    (one,) = check(written(tmp_path / "run", norms, losses), [rule("gradient_explosion")]).findings
    assert (one.onset, one.severity.value, one.worst) == ((9, 10), "error", math.inf)
    alone = [1.0] * 10 + [math.inf] * 4
    assert not check(written(tmp_path / "alone", alone, [1.0] * 14), [rule("gradient_explosion")]).findings


def test_the_parameter_severity_is_never_exceeded(tmp_path: Path) -> None:
    run = written(tmp_path / "run", [1.0] * 10 + [1e3] * 5, [1.0] * 10 + [99.0] * 5)
    for severity in ("error", "warning", "info"):
        found = check(run, [rule("gradient_explosion", severity=severity)]).findings
        assert [one.severity.value for one in found] == [severity]


# where blocks are cut


CUT_RULES = [rule("dead_layer", repeats=3), rule("gradient_vanishing_depth", repeats=3)]


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 50 steps: gradients of four modules that come and go, with zeros, tiny values and NaN."""
    random = np.random.default_rng(3)
    sizes = np.array([1.0, 0.0, 1e-9, np.nan])
    with smdbg.Hook(tmp_path_factory.mktemp("varied") / "run", save_config=EVERY) as hook:
        hook.set_mode("train")
        shares = random.dirichlet(np.full(4, 0.5), size=8)
        for _ in range(50):
            for index, weights in enumerate(shares):
                if random.random() < 0.8 or index == 7:
                    size = 1.0 if index == 7 else sizes[random.choice(4, p=weights)]
                    info = {"role": "gradient", "module": f"m{index // 2}", "forward_order": index}
                    hook.save_tensor(f"g{index}", np.full((2, 2), size, np.float32), "gradients", **info)
            hook.end_step()
        url = hook.url
    return smdbg.open_run(str(url))


@pytest.mark.parametrize("one", CUT_RULES, ids=lambda one: one.name)
def test_the_varied_run_holds_findings_to_lose(varied: Run, one: Rule) -> None:
    assert check(varied, [one]).findings


@given(cuts=st.sets(st.integers(1, 49)))
@settings(max_examples=40)
def test_results_do_not_depend_on_where_blocks_are_cut(varied: Run, cuts: set[int]) -> None:
    view = View(varied, {name: varied.tensor(name).info for name in varied.tensors()})
    for one in CUT_RULES:
        table = view.table(one.select(view.catalogue), one.needs().statistics, "train")
        folds = []
        for starts in ([0], sorted({0, *cuts})):
            fold, state = Fold(len(table.infos), one.kinds()), {}
            for block in table.blocks(starts, one.needs().look_back, False, {}):
                judgement, state = one.evaluate(block, state)
                state = json.loads(json.dumps(state))
                fold.add(block.steps, judgement, block.first)
            folds.append((fold.results(), fold.judged.tolist(), fold.judged_rows))
        assert repr(folds[0]) == repr(folds[1]), one.name


# what the rules are made of


@given(
    hn.arrays(np.int8, st.tuples(st.integers(1, 14), st.integers(1, 3)), elements=st.integers(0, 2)),
    st.integers(1, 4),
    st.sets(st.integers(1, 13)),
)
def test_in_a_row(kinds: np.ndarray, length: int, cuts: set[int]) -> None:
    """Each element: not judged, clean or bad; compared with going through the steps one by one."""
    steps = 10 * np.arange(len(kinds), dtype=np.int64)
    names, state, parts = [f"t{i}" for i in range(kinds.shape[1])], {}, []
    starts = [0, *sorted(cut for cut in cuts if cut < len(kinds)), len(kinds)]
    for start, end in zip(starts, starts[1:], strict=False):
        part = kinds[start:end]
        *answer, state = in_a_row(steps[start:end], names, part > 0, part == 2, length, state)
        state = json.loads(json.dumps(state))
        parts.append(answer)
    judged, violated, since, before = (np.concatenate(one) for one in zip(*parts, strict=True))
    for column in range(kinds.shape[1]):
        run, seen, began, last = 0, 0, NO_STEP, NO_STEP
        for row, kind in enumerate(kinds[:, column].tolist()):
            seen += kind > 0
            if kind == 2:
                began = int(steps[row]) if run == 0 else began
                run += 1
            elif kind == 1:
                run, last = 0, int(steps[row])
            fires = kind == 2 and run >= length
            assert bool(violated[row, column]) == fires
            assert bool(judged[row, column]) == (kind > 0 and seen >= length)
            if fires:
                assert (since[row, column], before[row, column]) == (began, last)


@given(
    hn.arrays(np.float64, st.integers(0, 40), elements=st.floats(-9, 9) | st.sampled_from([np.nan, np.inf])),
    st.integers(1, 12),
)
def test_earlier_medians(values: np.ndarray, window: int) -> None:
    found = earlier_medians(values, window)
    for index in range(len(values)):
        part = values[max(index - window, 0) : index]
        part = part[np.isfinite(part)]
        assert found[index] == pytest.approx(np.median(part) if len(part) else np.nan, nan_ok=True)


def test_the_usual_size_of_a_weight() -> None:
    convolution, vector = TensorInfo("c", "weights", shape=(8, 4, 3, 3)), TensorInfo("v", "weights", shape=(5,))
    assert (fan_in(convolution), fan_in(vector), fan_in(TensorInfo("n", "weights"))) == (36, 1, 1)
    value = np.random.default_rng(0).normal(size=convolution.shape) / 6
    assert least_size([convolution])[0] == pytest.approx(np.linalg.norm(value), rel=0.1)


def test_a_training_is_hurt_when_its_loss_rises_stands_or_breaks() -> None:
    def course(losses: list[float], bad: int | None = None) -> Course:
        return Course("loss", (np.arange(len(losses)), np.array(losses)), non_finite=bad)

    falls, stands = list(np.linspace(2, 0.1, 40)), [2.0] * 40
    assert not hurts(course(falls), 20) and hurts(course(falls, 30), 20) and not hurts(course(falls, 10), 20)
    assert hurts(course(stands), 5) and hurts(course([*falls[:30], *[9.0] * 10]), 30)
    assert not hurts(course([2.0] * 20 + [1.9] * 20), 20)
    assert not hurts(Course(), 0)
