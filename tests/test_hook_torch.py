"""The PyTorch hook against what the training did, captured independently of it."""

from __future__ import annotations

import copy
import gc
import io
import json
import logging
import pickle
import runpy
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from smdbg import open_run
from smdbg.hooks import torch_events, torch_saving
from smdbg.hooks.config import CollectionConfig, ReductionConfig, SaveConfig
from smdbg.hooks.torch import Hook
from smdbg.hooks.torch_model import modules_of
from smdbg.hooks.torch_taps import gradient_norm

EXAMPLES = Path(__file__).parent.parent / "examples"
RAW = ReductionConfig(save_raw_tensor=True)
EVERY = SaveConfig(1)
PARAMETERS = ("weights", "biases", "gradients", "updates")
ALL = (*PARAMETERS, "losses", "metrics", "inputs", "outputs", "optimizer_state")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def watching(path: Path, collections: Any = ALL, **kwargs: Any) -> Hook:
    """A hook that keeps the full values of everything at every step."""
    return Hook(path / "run", EVERY, RAW, collections, **kwargs)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(True), nn.Dropout(0.2), nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 10)
    )


def named(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.detach().clone().numpy() for name, p in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: p.grad.detach().clone().numpy() for name, p in model.named_parameters() if p.grad is not None}


def batches(digits: Any, steps: int, size: int = 32) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    order = np.random.default_rng(0)
    for _ in range(steps):
        rows = order.integers(0, len(digits[1]), size)
        yield digits[0][rows], digits[1][rows]


def train_digits(digits: Any, hook: Hook | None, steps: int = 25) -> nn.Sequential:
    model = mlp()
    loss_of = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if hook is not None:
        hook.register_module(model)
        hook.register_loss(loss_of)
    for images, labels in batches(digits, steps):
        optimizer.zero_grad()
        loss_of(model(images), labels).backward()
        optimizer.step()
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_every_row_holds_what_its_step_used(tmp_path: Path, digits: Any) -> None:
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[3:].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.3, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    truth = []
    with watching(tmp_path) as hook:
        hook.register_module(model)
        for images, labels in batches(digits, 5):
            before = named(model)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.step()
            hook.record("loss", loss)  # after the update, and still of this step
            schedule.step()
            truth.append((before, gradients(model), named(model), rates, loss.item()))
    run = open_run(tmp_path / "run")
    assert run.status == "completed" and run.framework == "pytorch" and "torch" in run.versions
    assert run.steps("train").tolist() == list(range(5)) and run.modes() == ["train"]
    for step, (before, grads, after, rates, loss_value) in enumerate(truth):
        assert set(grads) == set(before)
        for name, value in before.items():
            np.testing.assert_array_equal(run.tensor(name).value(step), value)
            np.testing.assert_array_equal(run.tensor(f"gradient/{name}").value(step), grads[name])
            np.testing.assert_array_equal(run.tensor(f"update/{name}").value(step), after[name] - value)
        assert [run.tensor(f"optimizer/lr/{i}").value(step) for i in (0, 1)] == rates
        assert run.tensor("loss").value(step) == loss_value
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
        assert run.tensor("optimizer/grad_norm").value(step) == pytest.approx(norm, rel=1e-5)


def test_the_catalogue_knows_roles_orders_and_places(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 3)  # made first, used last
            self.words = nn.Embedding(5, 8)
            self.norm = nn.LayerNorm(8)
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            self.unused = nn.Linear(2, 2)
            self.tied = nn.Linear(8, 5, bias=False)
            self.tied.weight = self.words.weight
            self.head.bias.requires_grad_(False)

        def forward(self, words: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(self.norm(self.words(words)))[0])

    model = Net()
    inner = [p for name, p in model.named_parameters() if not name.startswith("head")]
    optimizer = torch.optim.AdamW([{"params": inner}, {"params": model.head.parameters()}])
    with watching(tmp_path) as hook:
        hook.register_module(model)
        model(torch.tensor([[1, 2, 3]])).sum().backward()
        optimizer.step()
    run = open_run(tmp_path / "run")
    info = {name: run.tensor(name).info for name in run.tensors()}
    roles = {name: info[name].role for name in dict(model.named_parameters())}
    assert roles["words.weight"] == "embedding" and roles["norm.weight"] == roles["norm.bias"] == "norm"
    assert roles["head.weight"] == "weight" and roles["head.bias"] == roles["lstm.bias_ih_l0"] == "bias"
    assert info["norm.bias"].collection == info["lstm.bias_ih_l0"].collection == "biases"
    assert info["norm.weight"].collection == "weights"
    assert info["words.weight"].aliases == ("tied.weight",) and "tied.weight" not in info
    assert (info["head.weight"].module, info["head.weight"].module_class) == ("head", "Linear")
    assert [info[f"{m}.weight"].forward_order for m in ("words", "norm", "head", "unused")] == [0, 1, 3, None]
    assert info["gradient/head.weight"].backward_order == 0 and info["gradient/words.weight"].backward_order == 3
    assert info["gradient/head.weight"].of == info["update/head.weight"].of == "head.weight"
    assert (info["gradient/head.weight"].role, info["update/head.weight"].role) == ("gradient", "update")
    assert info["words.weight"].optimizer_group == 0 and info["head.weight"].optimizer_group == 1
    assert info["head.bias"].requires_grad is False and info["head.weight"].requires_grad is True
    # No gradient reached these, so there is none, and yet their weights are there.
    for name in ("head.bias", "unused.weight"):
        assert name in info and f"gradient/{name}" not in info
    assert info["lstm_output_0"].feature_axis == 2 and info["words_input_0"].feature_axis == 1
    assert info["lstm_output_1"].role == info["lstm_output_2"].role == "output"  # hidden and cell state


def test_accumulated_batches_are_one_step(tmp_path: Path, digits: Any) -> None:
    model, loss_of = mlp(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses: list[list[float]] = [[], []]
    with watching(tmp_path) as hook:
        hook.register_module(model)
        hook.register_loss(loss_of)
        for number, (images, labels) in enumerate(batches(digits, 6)):
            loss = loss_of(model(images), labels)
            (loss / 3).backward()
            losses[number // 3].append(loss.item())
            if number % 3 == 2:
                grads = gradients(model)
                optimizer.step()
                optimizer.zero_grad()
    run = open_run(tmp_path / "run")
    loss_tensor = run.tensor("CrossEntropyLoss_output_0")
    assert run.steps().tolist() == [0, 1]
    np.testing.assert_allclose(loss_tensor.values(), [np.mean(part) for part in losses])
    assert loss_tensor.stat("count")[1].tolist() == [3, 3]
    assert loss_tensor.stat("last")[1].tolist() == [part[-1] for part in losses]
    np.testing.assert_array_equal(run.tensor("gradient/0.weight").value(1), grads["0.weight"])
    assert [n for n in run.tensors("0_output_*")] == ["0_output_0", "0_output_1", "0_output_2"]


def test_the_mode_follows_the_model(tmp_path: Path, digits: Any) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(tmp_path) as hook:
        hook.register_module(model)
        for _ in range(2):
            model.train()
            for images, labels in batches(digits, 2):
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                hook.record("loss", loss)
            model.eval()
            with torch.no_grad():
                for images, labels in batches(digits, 3):
                    hook.save_tensor("seen", labels, "labels_seen")
                    hook.record("loss", F.cross_entropy(model(images), labels))
    run = open_run(tmp_path / "run")
    table = run.step_table()
    assert table.mode.tolist() == ["train", "train", "eval", "eval", "eval"] * 2
    assert table.mode_step.tolist() == [0, 1, 0, 1, 2, 2, 3, 3, 4, 5]
    assert run.tensor("loss").steps("eval").tolist() == [2, 3, 4, 7, 8, 9]
    assert run.tensor("gradient/0.weight").steps().tolist() == [0, 1, 5, 6]
    # What is saved before the first forward pass of a mode still belongs to the step that is open.
    assert run.tensor("seen").steps().tolist() == [1, 2, 3, 6, 7, 8]


def test_a_mode_that_was_set_is_not_overruled(tmp_path: Path) -> None:
    model, teacher = nn.Linear(2, 2), nn.Linear(2, 2).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(tmp_path) as hook:
        hook.register_module(model)
        hook.register_module(teacher, "teacher")
        hook.set_mode("train")
        for _ in range(3):
            x = torch.ones(1, 2)
            with torch.no_grad():
                aim = teacher(x)
            F.mse_loss(model(x), aim).backward()
            optimizer.step()
        hook.set_mode("predict")
        model(torch.ones(1, 2))
        model(torch.ones(1, 2))
    run = open_run(tmp_path / "run")
    assert run.step_table().mode.tolist() == ["train"] * 3 + ["predict"] * 2
    # The teacher's parameters are held by no optimizer, and saved all the same.
    assert run.tensor("teacher.weight").steps("train").tolist() == [0, 1, 2]
    np.testing.assert_array_equal(run.tensor("teacher.weight").value(2), teacher.weight.detach().numpy())


def test_what_no_optimizer_holds_is_saved_with_its_gradient(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    held = []
    with watching(tmp_path, PARAMETERS) as hook:
        hook.register_module(model)
        for _ in range(2):
            model.zero_grad()  # also of the forgotten one
            model(torch.ones(1, 2)).sum().backward()
            held.append(gradients(model))
            optimizer.step()
    run = open_run(tmp_path / "run")
    for step in (0, 1):
        np.testing.assert_array_equal(run.tensor("0.weight").value(step), model[0].weight.detach().numpy())
        np.testing.assert_array_equal(run.tensor("gradient/0.weight").value(step), held[step]["0.weight"])
    assert run.tensor("0.weight").info.optimizer_group is None and "update/0.weight" not in run.tensors()


def test_without_any_optimizer_the_weights_are_still_those_of_the_forward_pass(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    truth = []
    with watching(tmp_path, PARAMETERS) as hook:
        hook.register_module(model)
        for _ in range(3):
            before = named(model)
            model(torch.ones(1, 2)).sum().backward()
            truth.append((before, gradients(model)))
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
            hook.end_step()
            model.zero_grad()
    run = open_run(tmp_path / "run")
    assert run.steps().tolist() == [0, 1, 2]
    for step, (before, grads) in enumerate(truth):
        np.testing.assert_array_equal(run.tensor("weight").value(step), before["weight"])
        np.testing.assert_array_equal(run.tensor("gradient/weight").value(step), grads["weight"])


def test_outputs_are_taken_before_the_next_module_changes_them(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    x = torch.randn(5, 4)
    with watching(tmp_path, ["inputs", "outputs"]) as hook:
        hook.register_module(model)
        out = model(x)
        assert model(x).grad_fn is not None
    run = open_run(tmp_path / "run")
    linear = F.linear(x, model[0].weight, model[0].bias).detach()
    np.testing.assert_array_equal(run.tensor("0_input_0").value(0), x.numpy())
    np.testing.assert_array_equal(run.tensor("0_output_0").value(0), linear.numpy())
    np.testing.assert_array_equal(run.tensor("1_input_0").value(0), linear.numpy())
    np.testing.assert_array_equal(run.tensor("1_output_0").value(0), out.detach().numpy())
    assert linear.min() < 0
    assert {n: run.tensor(n).role for n in run.tensors()} == {
        f"{m}_{role}_{i}": role for m in (0, 1) for role in ("input", "output") for i in (0, 1)
    }


def test_inputs_and_outputs_of_any_structure(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, pair: Any, *, extra: torch.Tensor) -> dict[str, Any]:
            return {"sum": pair[0] + pair[1], "more": [extra, {"deep": (extra * 2, "text", None)}]}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.scale = Odd(), nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> Any:
            return self.odd((x, x), extra=self.scale)["more"][1]["deep"][0]

    model = Net()
    with watching(tmp_path, ["inputs", "outputs"]) as hook:
        hook.register_module(model)
        model(torch.ones(2))
    run = open_run(tmp_path / "run")
    values = {name: run.tensor(name).value(0).tolist() for name in run.tensors("odd*")}
    assert values == {
        "odd_input_0": [1, 1], "odd_input_1": [1, 1], "odd_input_2": 1,
        "odd_output_0": [2, 2], "odd_output_1": 1, "odd_output_2": 2,
    }  # fmt: skip
    assert run.tensor("Net_output_0").value(0) == 2  # it has a parameter of its own; the model's own path is empty


def test_recomputed_forward_passes_are_not_saved_again(tmp_path: Path) -> None:
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(checkpoint(self.first, x, use_reentrant=False))

    model = Net()
    with watching(tmp_path, ["outputs"]) as hook:
        hook.register_module(model)
        model(torch.ones(1, 2)).sum().backward()
    assert open_run(tmp_path / "run").tensors() == ["first_output_0", "second_output_0"]


def test_optimizer_state(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with watching(tmp_path, ["optimizer_state"]) as hook:
        hook.register_module(model)
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
    run = open_run(tmp_path / "run")
    state = optimizer.state[model.weight]
    assert set(run.tensors()) == {f"opt/{p}/{k}" for p in ("weight", "bias") for k in ("step", "exp_avg", "exp_avg_sq")}
    for key in ("step", "exp_avg", "exp_avg_sq"):
        np.testing.assert_array_equal(run.tensor(f"opt/weight/{key}").value(1), state[key].numpy())
    assert run.tensor("opt/weight/exp_avg").info.of == "weight"


def test_a_closure_is_inside_the_step(tmp_path: Path, digits: Any) -> None:
    torch.manual_seed(0)
    model, (images, labels) = nn.Linear(64, 10), (digits[0][:200], digits[1][:200])
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")
    truth: list[Any] = []
    evaluations = []
    with watching(tmp_path) as hook:
        hook.register_module(model)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            hook.record("inner", loss)
            evaluations.append(loss.item())
            return loss

        for _ in range(3):
            before, start = named(model), len(evaluations)
            loss = optimizer.step(closure)
            hook.record("loss", loss)
            truth.append((before, gradients(model), named(model), loss.item(), evaluations[start]))
    assert len(evaluations) > 6
    run = open_run(tmp_path / "run")
    assert run.steps().tolist() == [0, 1, 2]
    for step, (before, grads, after, loss_value, first) in enumerate(truth):
        np.testing.assert_array_equal(run.tensor("weight").value(step), before["weight"])
        np.testing.assert_array_equal(run.tensor("gradient/weight").value(step), grads["weight"])
        np.testing.assert_array_equal(run.tensor("update/weight").value(step), after["weight"] - before["weight"])
        # Of the trials inside the step only the first one looks at the weights of this row.
        assert run.tensor("loss").value(step) == run.tensor("inner").value(step) == first == loss_value
    assert run.tensors("*_output_*") == ["Linear_output_0"]
    assert run.tensor("weight").info.forward_order == 0
    assert "opt/weight/d" in run.tensors()


def gan(hook: Hook, rounds: int) -> tuple[list[Any], nn.Module, nn.Module]:
    torch.manual_seed(0)
    generator, critic = nn.Linear(2, 2), nn.Linear(2, 1)
    hook.register_module(generator, "G")
    hook.register_module(critic, "D")
    with_g, with_d = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (generator, critic))
    truth = []
    for _ in range(rounds):
        before_d, before_g = named(critic), named(generator)
        noise = torch.randn(4, 2)
        with_d.zero_grad()
        (critic(torch.randn(4, 2)).mean() - critic(generator(noise)).mean()).backward()
        grads_d = gradients(critic)
        with_d.step()
        with_g.zero_grad()
        critic(generator(noise)).mean().backward()
        grads_g = gradients(generator)
        with_g.step()
        truth.append((before_d, before_g, grads_d, grads_g))
        if hook.mode in hook._manual:
            hook.end_step()
    return truth, generator, critic


def test_two_optimizers_with_steps_ended_by_hand(tmp_path: Path) -> None:
    with watching(tmp_path) as hook:
        hook.set_mode("train")
        hook.end_step()
        truth, _, _ = gan(hook, 3)
    run = open_run(tmp_path / "run")
    assert run.steps().tolist() == [0, 1, 2]
    for step, (before_d, before_g, grads_d, grads_g) in enumerate(truth):
        np.testing.assert_array_equal(run.tensor("D.weight").value(step), before_d["weight"])
        np.testing.assert_array_equal(run.tensor("G.weight").value(step), before_g["weight"])
        np.testing.assert_array_equal(run.tensor("gradient/D.weight").value(step), grads_d["weight"])
        np.testing.assert_array_equal(run.tensor("gradient/G.weight").value(step), grads_g["weight"])
    assert not run.tensors("*weight_1")
    assert run.tensor("optimizer/lr/0").steps().tolist() == run.tensor("optimizer1/lr/0").steps().tolist() == [0, 1, 2]
    assert run.tensor("G.weight").info.optimizer_group == run.tensor("gradient/G.weight").info.optimizer_group == 0


def test_two_optimizers_left_alone_make_two_steps_a_round(tmp_path: Path) -> None:
    with watching(tmp_path) as hook:
        truth, _, _ = gan(hook, 2)
    run = open_run(tmp_path / "run")
    assert run.steps().tolist() == [0, 1, 2, 3]
    for number, (before_d, before_g, grads_d, grads_g) in enumerate(truth):
        np.testing.assert_array_equal(run.tensor("gradient/D.weight").value(2 * number), grads_d["weight"])
        np.testing.assert_array_equal(run.tensor("gradient/G.weight").value(2 * number + 1), grads_g["weight"])
        for step in (2 * number, 2 * number + 1):
            np.testing.assert_array_equal(run.tensor("G.weight").value(step), before_g["weight"])
        np.testing.assert_array_equal(run.tensor("D.weight").value(2 * number), before_d["weight"])


def test_exactly_what_was_configured_is_saved(tmp_path: Path, digits: Any) -> None:
    collections = [
        CollectionConfig("weights", save_config=SaveConfig(3), reduction_config=ReductionConfig(SaveConfig(6))),
        CollectionConfig("gradients", save_config={"train": SaveConfig(1, start_step=2, end_step=4)}),
        CollectionConfig("outputs", save_config=SaveConfig(1, end_step=0, save_steps=[5])),
        CollectionConfig("heads", ["5.*", "gradient/5.*"], SaveConfig(4)),
        "losses",
    ]
    with Hook(tmp_path / "run", collections=collections) as hook:
        train_digits(digits, hook, 8)
    run = open_run(tmp_path / "run")
    saved = {name: run.tensor(name).steps().tolist() for name in run.tensors()}
    expected = {f"{n}.weight": [0, 3, 6] for n in (0, 3, 4)}
    expected |= {f"gradient/{n}.{part}": [2, 3] for n in (0, 3, 4) for part in ("weight", "bias")}
    expected |= {f"{n}_output_0": [5] for n in range(6)}
    expected |= {f"{kind}5.{part}": [0, 4] for kind in ("", "gradient/") for part in ("weight", "bias")}
    expected |= {"CrossEntropyLoss_output_0": list(range(8))}
    assert saved == expected
    assert run.tensor("0.weight").value_steps().tolist() == [0, 6]
    assert run.tensor("5.weight").collection == run.tensor("gradient/5.bias").collection == "heads"


def test_the_default_saves_losses_always_and_parameters_every_ten_steps(tmp_path: Path, digits: Any) -> None:
    with Hook(tmp_path / "run") as hook:
        train_digits(digits, hook, 25)
    run = open_run(tmp_path / "run")
    assert set(run.collections()) == {"losses", "metrics", "weights", "biases", "gradients", "updates"}
    for name in run.tensors():
        kind = run.tensor(name).collection
        steps = run.tensor(name).steps().tolist()
        if kind in ("losses", "metrics"):
            assert steps == list(range(25))
        else:  # full values of weights and gradients at steps 0 and 1 add a row
            assert steps == ([0, 1, 10, 20] if kind in ("weights", "gradients") else [0, 10, 20])


@pytest.mark.parametrize("everything", [False, True])
def test_the_weights_come_out_bit_for_bit_the_same(tmp_path: Path, digits: Any, everything: bool) -> None:
    torch.manual_seed(5)
    bare = train_digits(digits, None, 60)
    after = torch.random.get_rng_state()
    torch.manual_seed(5)
    with watching(tmp_path) if everything else Hook(tmp_path / "run") as hook:
        watched = train_digits(digits, hook, 60)
    assert same(bare, watched) and torch.equal(after, torch.random.get_rng_state())
    assert open_run(tmp_path / "run").status == "completed"


STAGES: list[tuple[Any, str]] = [
    (torch_events.Events, "_follow"),
    (torch_events.Events, "_keep_initial"),
    (torch_events.Events, "_take_values"),
    (torch_events.Events, "_take_loss"),
    (torch_events.Events, "_counts"),
    (torch_events.Events, "_before_one"),
    (torch_events.Events, "_after_one"),
    (torch_events.Events, "_take_metrics"),
    (torch_saving.Saving, "_save_weight"),
    (torch_saving.Saving, "_save_gradient"),
    (torch_saving.Saving, "_save_state"),
    (torch_saving.Saving, "_save_unheld"),
    (torch_saving.Saving, "_save_rest"),
    (Hook, "_listen"),
]


@pytest.mark.parametrize(("owner", "method"), STAGES, ids=[method for _, method in STAGES])
def test_an_error_in_the_hook_stays_in_the_hook(
    tmp_path: Path, digits: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any, owner: Any, method: str
) -> None:
    torch.manual_seed(5)
    bare = train_digits(digits, None, 4)
    torch.manual_seed(5)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ArithmeticError("injected")

    monkeypatch.setattr(owner, method, fail)
    with watching(tmp_path) as hook:
        assert same(bare, train_digits(digits, hook, 4))
    assert open_run(tmp_path / "run").status == "failed: hook switched off: ArithmeticError: injected"
    assert sum("error inside the hook" in r.message for r in caplog.records) == 1


def test_nothing_is_kept_alive(tmp_path: Path) -> None:
    def train(hook: Hook) -> list[weakref.ref[Any]]:
        model, loss_of = mlp(), nn.MSELoss()
        optimizer = torch.optim.AdamW(model.parameters())
        hook.register_module(model)
        hook.register_loss(loss_of)
        out = model(torch.ones(2, 64))
        loss = loss_of(out, torch.zeros(2, 10))
        loss.backward()
        optimizer.step()
        return [weakref.ref(x) for x in (model, optimizer, loss_of, model[0].weight, out, loss)]

    counts = len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)
    gc.collect()
    hook = watching(tmp_path)
    assert len(_global_optimizer_post_hooks) == counts[1] + 1
    refs = train(hook)
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)  # not even while the hook is open
    hook.close()
    assert (len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)) == counts


def test_close_takes_every_handle_away(tmp_path: Path) -> None:
    model, loss_of = mlp(), nn.MSELoss()
    with watching(tmp_path) as hook:
        hook.register_module(model)
        hook.register_loss(loss_of)
        assert any(m._forward_pre_hooks for m in model.modules()) and any(m._forward_hooks for m in model.modules())
    for module in (*model.modules(), loss_of):
        assert not (module._forward_hooks or module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs)


def test_copies_and_saved_models_are_free_of_the_hook(tmp_path: Path) -> None:
    model = mlp().eval()
    x = torch.ones(2, 64)
    with watching(tmp_path, ["inputs", "outputs"]) as hook:
        hook.register_module(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        assert b"smdbg" not in buffer.getvalue() + pickle.dumps(model)
        buffer.seek(0)
        copies = [copy.deepcopy(model), torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model))]
        for twin in copies:
            assert torch.equal(twin(x), model(x))
    run = open_run(tmp_path / "run")
    assert run.steps("eval").tolist() == [0, 1, 2]  # the model's own forward passes alone


def test_a_compiled_model(tmp_path: Path, caplog: Any) -> None:
    inner = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model = torch.compile(inner, backend="eager", fullgraph=True)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    with watching(tmp_path) as hook:
        hook.register_module(model)
        assert any("compiled" in r.message for r in caplog.records)
        for _ in range(3):
            before = named(inner)
            loss = model(torch.ones(1, 2)).sum()
            loss.backward()
            hook.record("loss", loss)
            optimizer.step()
    run = open_run(tmp_path / "run")
    assert run.steps().tolist() == run.tensor("loss").steps().tolist() == [0, 1, 2]
    assert run.tensors(collection="weights") == ["0.weight", "1.weight"]
    np.testing.assert_array_equal(run.tensor("0.weight").value(2), before["0.weight"])


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_compiled_after_registration(tmp_path: Path, in_place: bool) -> None:
    inner = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    with watching(tmp_path, PARAMETERS) as hook:
        hook.register_module(inner)
        model = inner
        if in_place:
            inner.compile(backend="eager", fullgraph=True)  # a graph break would raise
        else:
            model = torch.compile(inner, backend="eager", fullgraph=True)
        for _ in range(3):
            before = named(inner)
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    run = open_run(tmp_path / "run")
    assert run.status == "completed" and run.steps().tolist() == [0, 1, 2]
    np.testing.assert_array_equal(run.tensor("0.weight").value(2), before["0.weight"])


def test_a_model_whose_parts_are_called_one_by_one(tmp_path: Path, caplog: Any) -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(tmp_path, PARAMETERS) as hook:
        hook.register_module(model)
        for _ in range(3):
            before = named(model)
            model["decoder"](model["encoder"](torch.ones(1, 2))).sum().backward()
            optimizer.step()
    run = open_run(tmp_path / "run")
    assert run.steps().tolist() == [0, 1, 2]
    np.testing.assert_array_equal(run.tensor("encoder.weight").value(2), before["encoder.weight"])
    assert run.tensor("decoder.weight").info.forward_order == 1
    assert sum("no registered module was called" in r.message for r in caplog.records) == 1


def test_wrappers_are_no_part_of_names() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(1, 1)  # a name like a wrapper's
            self.body = nn.DataParallel(nn.Linear(1, 1))

    wrapped = nn.DataParallel(Net())
    assert [path for path, _ in modules_of(wrapped)] == ["", "module", "body"]
    assert [path for path, _ in modules_of(torch.compile(wrapped, backend="eager"), "net")] == [
        "net", "net.module", "net.body",
    ]  # fmt: skip


def test_distributed_data_parallel_and_replicas(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        inner = nn.Linear(2, 2)
        model = nn.parallel.DistributedDataParallel(inner)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        # Rank 1 of 2, on paper: what is replicated is left to rank 0.
        with watching(tmp_path, rank=1, world_size=2) as other, Hook(tmp_path / "mine", EVERY, RAW) as hook:
            assert (hook.rank, hook.world_size) == (0, 1)
            for one in (other, hook):
                one.register_module(model)
            for _ in range(2):
                loss = model(torch.ones(1, 2)).sum()
                loss.backward()
                optimizer.step()
                for one in (other, hook):
                    one.record("loss", loss)
    finally:
        torch.distributed.destroy_process_group()
    assert set(open_run(tmp_path / "mine").tensors(collection="weights")) == {"weight"}
    run = open_run(tmp_path / "run")
    assert run.tensor("loss").steps(worker=1).tolist() == [0, 1]
    assert not set(run.collections()) & set(PARAMETERS)


def test_registration(tmp_path: Path, caplog: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with watching(tmp_path) as hook:
        with pytest.raises(TypeError, match="torch.nn.Module"):
            hook.register_module("model")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="record"):
            hook.register_loss(F.cross_entropy)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="no parameters"):
            hook.register_module(nn.ReLU())
        hook.register_module(model)
        for again in (model, model[0], nn.DataParallel(model)):
            caplog.clear()
            hook.register_module(again)
            assert [r.levelno for r in caplog.records] == [logging.WARNING]
        with pytest.raises(ValueError, match="prefix"):
            hook.register_module(nn.Sequential(nn.Linear(3, 3)))
        assert len(model._forward_pre_hooks) == 1
        loss_of = nn.MSELoss()
        hook.register_loss(loss_of)
        hook.register_loss(loss_of)
        hook.register_loss(nn.MSELoss(reduction="none"))
        assert len(loss_of._forward_hooks) == 1
    assert open_run(tmp_path / "run").status == "completed"


def test_a_part_registered_before_the_whole(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with watching(tmp_path, ["losses"]) as hook:
        hook.register_module(model[0], "first")
        hook.register_module(model)
        model.eval()
        for value in range(2):
            model(torch.ones(1, 2))
            hook.record("loss", value)
    assert open_run(tmp_path / "run").steps("eval").tolist() == [0, 1]


def test_losses_of_every_kind(tmp_path: Path) -> None:
    model = nn.Linear(2, 2).eval()
    each, mean = nn.MSELoss(reduction="none"), nn.MSELoss()
    with watching(tmp_path, ["losses"]) as hook:
        hook.register_module(model)
        for loss_of in (each, mean):
            hook.register_loss(loss_of)
        out = model(torch.ones(1, 2))
        values = each(out, out + 1), mean(out, out + 2)
        hook.record("half", torch.tensor(1.5, dtype=torch.bfloat16))
        hook.record("complex", torch.tensor(1 + 2j))
        hook.record("number", 3)
        hook.record("array", np.arange(3))
        hook.save_scalar("neutral", torch.tensor([2.5], dtype=torch.bfloat16), "losses")
    run = open_run(tmp_path / "run")
    assert run.status == "completed"
    got = {name: run.tensor(name).value(0).tolist() for name in run.tensors()}
    assert got == {
        "MSELoss_output_0": values[0].tolist(), "MSELoss_1_output_0": values[1].item(), "half": 1.5,
        "complex": 1 + 2j, "number": 3, "array": [0, 1, 2], "neutral": 2.5,
    }  # fmt: skip
    assert {run.tensor(name).role for name in got} == {"loss"}


def test_a_stale_optimizer_ends_steps_and_changes_nothing(tmp_path: Path) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    foreign = torch.optim.SGD(other.parameters(), lr=0.1)
    with watching(tmp_path) as hook:
        hook.register_module(model)
        for _ in range(3):
            other(model(torch.ones(1, 2))).sum().backward()
            foreign.step()
    run = open_run(tmp_path / "run")
    assert run.steps().tolist() == [0, 1, 2] and not run.tensors("optimizer*")
    values = run.tensor("weight").values()
    assert len(values) > 1 and (values == values[0]).all()


def test_an_optimizer_step_that_fails_is_forgotten(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def broken() -> float:
        raise MemoryError("of the training")

    with watching(tmp_path, PARAMETERS) as hook:
        hook.register_module(model)
        for number in range(4):
            before = named(model)
            model(torch.ones(1, 2)).sum().backward()
            if number == 1:
                with pytest.raises(MemoryError):
                    optimizer.step(broken)
            optimizer.step()
    run = open_run(tmp_path / "run")
    assert run.steps().tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(run.tensor("weight").value(3), before["weight"])


def test_a_disabled_hook_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Any) -> None:
    monkeypatch.setenv("SMDBG_DISABLE", "1")
    with watching(tmp_path) as hook:
        model = train_digits(digits, hook, 2)
        assert not model._forward_pre_hooks
    assert not (tmp_path / "run").exists()


def test_half_precision_sparse_and_empty_parameters(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(6, 2, sparse=True)
            self.low = nn.Linear(2, 2).bfloat16()
            self.empty = nn.Parameter(torch.zeros(0, 3))
            self.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))

        def forward(self, words: torch.Tensor) -> torch.Tensor:
            out = self.low(self.words(words).bfloat16()).float().sum() + self.empty.sum()
            return out + (self.phase * (3 + 4j)).abs().sum()

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with watching(tmp_path) as hook:
        hook.register_module(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(torch.tensor([1, 4, 4])).backward()
        optimizer.step()
    run = open_run(tmp_path / "run")
    assert run.status == "completed"
    assert run.tensor("low.weight").dtype == "bfloat16" and run.tensor("empty").shape == (0, 3)
    np.testing.assert_array_equal(run.tensor("low.weight").value(0), before["low.weight"].float().numpy())
    np.testing.assert_array_equal(run.tensor("phase").value(0), before["phase"].numpy())
    grad = model.words.weight.grad.to_dense().numpy()
    np.testing.assert_array_equal(run.tensor("gradient/words.weight").value(0), grad)
    every = [p.grad.to_dense().abs().double().square().sum() for p in model.parameters()]
    assert run.tensor("optimizer/grad_norm").value(0) == pytest.approx(sum(every).sqrt().item(), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_the_gradient_norm_of_any_size(scale: float) -> None:
    parts = [torch.full((3,), scale), torch.full((2, 2), scale), torch.empty(0)]
    assert gradient_norm(parts) == pytest.approx(scale * np.sqrt(7), rel=1e-5)


def test_the_gradient_norm_of_nothing_and_of_broken_values() -> None:
    assert gradient_norm([]) is None and gradient_norm([torch.zeros(3)]) == 0
    assert not np.isfinite(gradient_norm([torch.tensor([1.0, float("nan")]), torch.ones(2)]))
    assert gradient_norm([torch.tensor([60000.0] * 9, dtype=torch.float16)]) == pytest.approx(180000)


@pytest.mark.skipif(not hasattr(nn.Parameter(torch.ones(1)), "grad_dtype"), reason="gradients have the weights' dtype")
def test_a_gradient_of_another_dtype_that_is_taken_over_is_catalogued_anew(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD([{"params": [model[1].bias]}, {"params": [model[1].weight]}], lr=0.1)
    with watching(tmp_path) as hook:
        hook.register_module(model)
        model(torch.ones(1, 2)).sum().backward()
        for parameter in model.parameters():
            gradient = parameter.grad
            parameter.grad_dtype = None  # any
            parameter.grad = gradient.double()
        first.step()  # nobody is known to hold the second part: it is saved without a group
        second.step()
    run = open_run(tmp_path / "run")
    for name, group in (("1.bias", 0), ("1.weight", 1)):
        info = run.tensor(f"gradient/{name}").info
        assert (info.dtype, info.optimizer_group) == ("float64", group)
        assert run.tensor(name).info.optimizer_group == group


def test_resuming_goes_on_counting(tmp_path: Path, digits: Any) -> None:
    with watching(tmp_path, ["losses", "weights"]) as hook:
        train_digits(digits, hook, 3)
    with watching(tmp_path, ["losses", "weights"], resume=True) as hook:
        hook.set_step(2)
        train_digits(digits, hook, 2)
    run = open_run(tmp_path / "run")
    assert run.steps("train").tolist() == [0, 1, 2, 3] and run.tensor("0.weight").steps().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("fault", "status", "rule"), [("none", 0, ""), ("exploding", 1, "exploding_tensor")])
def test_the_example_is_found_healthy_or_broken(tmp_path: Path, fault: str, status: int, rule: str) -> None:
    runpy.run_path(str(EXAMPLES / "torch_digits.py"))["train"](str(tmp_path / "run"), 5, fault)
    command = [sys.executable, "-m", "smdbg", "check", "--run", str(tmp_path / "run"), "--format", "jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = {r["rule"] for r in map(json.loads, done.stdout.splitlines()) if r["type"] == "finding"}
    assert done.returncode == status, done.stderr
    assert rule in found if rule else not found


def test_an_idle_step_looks_at_no_parameter_and_no_module(
    tmp_path: Path, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[int] = []
    original = torch_saving.parameters_of

    def counting(roots: Any) -> Any:
        walks.append(hook.step)
        return original(roots)

    with Hook(tmp_path / "run", SaveConfig(10)) as hook:
        for module in (torch_saving, torch_events):
            monkeypatch.setattr(module, "parameters_of", counting)
        model = train_digits(digits, hook, 31)
        assert sorted(set(walks)) == [0, 10, 20, 30] and len(walks) <= 8, walks
        assert len(model._forward_pre_hooks) == 1  # the model's own; those that took the order are gone
        assert not any(part._forward_pre_hooks for part in list(model.modules())[1:])
