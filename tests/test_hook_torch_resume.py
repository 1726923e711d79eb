"""A PyTorch training that goes on from a checkpoint saves what an uninterrupted one does, step by step."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import smdbg
from smdbg import ReductionConfig, SaveConfig, open_run

COLLECTIONS = ["weights", "biases", "gradients", "updates", "losses", "metrics", "outputs", "optimizer_state"]
EPOCHS, BATCHES, HELD_OUT = 3, 4, 2


class Stopped(Exception):
    """The process that trains is gone."""


def batch(number: int) -> torch.Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(number))


def train(url: Path, moment: str, by_hand: bool, saved: bytes = b"", keep_at: int = -1, die_at: int = -1) -> bytes:
    """Train from the start or from a checkpoint; returns the checkpoint that was kept.

    `keep_at`, `die_at`: numbers of trained batches. `moment`: when a checkpoint is kept, after the optimizer's step or
    after the evaluation that follows the epoch.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Linear(6, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    kept, begin = b"", 0
    hook = smdbg.hooks.torch.Hook(
        url, SaveConfig(1), ReductionConfig(save_raw_tensor=True), COLLECTIONS, resume=bool(saved)
    )
    hook.register_module(model)
    if by_hand:
        for mode in ("eval", "train"):
            hook.set_mode(mode)
            hook.end_step()
    if saved:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        hook.load_state_dict(state["hook"])
        torch.set_rng_state(state["random"])
        begin = state["done"]

    def checkpoint(done: int) -> bytes:
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "hook": hook.state_dict()}
        torch.save({**parts, "random": torch.get_rng_state(), "done": done}, to := io.BytesIO())
        return to.getvalue()

    def evaluate() -> None:
        model.eval()
        with torch.no_grad():
            for number in range(HELD_OUT):
                if by_hand:
                    hook.set_mode("eval")
                hook.record("loss", F.mse_loss(model(batch(-1 - number)), torch.zeros(8, 4)))
                if by_hand:
                    hook.end_step()

    try:
        with hook:
            for number in range(begin, EPOCHS * BATCHES):
                if number == die_at:
                    raise Stopped
                model.train()
                if by_hand:
                    hook.set_mode("train")
                optimizer.zero_grad()
                loss = F.mse_loss(model(batch(number)), torch.ones(8, 4))
                loss.backward()
                optimizer.step()
                if by_hand:
                    hook.end_step()
                if number + 1 == keep_at and moment == "update":
                    kept = checkpoint(number + 1)
                if number % BATCHES == BATCHES - 1:
                    evaluate()
                if number + 1 == keep_at and moment == "evaluation":
                    kept = checkpoint(number + 1)
    except Stopped:
        pass
    return kept


def assert_same(one: Any, other: Any) -> None:
    """Both runs show the same tensors, at the same steps of the same modes, with the same values."""
    a, b = one.step_table(), other.step_table()
    for column in ("step", "mode", "mode_step"):
        assert getattr(a, column).tolist() == getattr(b, column).tolist()
    assert one.tensors() == other.tensors()
    for name in one.tensors():
        steps = one.tensor(name).steps()
        assert steps.tolist() == other.tensor(name).steps().tolist(), name
        assert one.tensor(name).value_steps().tolist() == steps.tolist(), name
        np.testing.assert_array_equal(one.tensor(name).values(), other.tensor(name).values(), name)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize(
    ("moment", "keep_at", "next_step"), [("update", 5, 7), ("update", 6, 8), ("evaluation", 8, 12)]
)
def test_a_resumed_training_saves_what_an_uninterrupted_one_does(
    tmp_path: Path, moment: str, keep_at: int, next_step: int, by_hand: bool
) -> None:
    train(tmp_path / "whole", moment, by_hand)
    kept = train(tmp_path / "torn", moment, by_hand, keep_at=keep_at, die_at=keep_at + 3)
    train(tmp_path / "torn", moment, by_hand, saved=kept)
    whole, torn = open_run(tmp_path / "whole"), open_run(tmp_path / "torn")
    assert whole.steps().tolist() == list(range(EPOCHS * (BATCHES + HELD_OUT)))
    assert_same(torn, whole)
    first, second = torn.attempts(0)
    assert first.first_step == 0 and second.first_step == next_step
    # The attempt by itself: its rows are those that the uninterrupted run has at these steps.
    resumed = open_run(tmp_path / "torn", attempt=second.attempt)
    for name in ("0.weight", "gradient/0.weight", "update/2.bias", "0_output_0", "optimizer/lr/0"):
        steps = [step for step in whole.tensor(name).steps().tolist() if step >= next_step]
        assert [step for step in resumed.tensor(name).steps().tolist() if step >= next_step] == steps
        np.testing.assert_array_equal(resumed.tensor(name).values(steps), whole.tensor(name).values(steps), name)


def test_the_state_names_the_step_to_come_once_the_open_one_is_done(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def state() -> tuple[int, int, int]:
        found = hook.state_dict()
        return found["step"], found["mode_steps"]["train"], found["mode_steps"]["eval"]

    with smdbg.hooks.torch.Hook(tmp_path / "run") as hook:
        hook.register_module(model)
        assert state() == (0, 0, 0)
        for number in range(3):
            for _ in range(2):  # gradients of two batches: the step is not done before its update
                model(torch.ones(1, 2)).sum().backward()
                assert state() == (number, number, 0)
            optimizer.step()
            assert state() == state() == (number + 1, number + 1, 0)
            hook.record("late", 1.0)  # still of the step that is open
            assert state() == (number + 1, number + 1, 0)
        model.eval()
        model(torch.ones(1, 2))
        assert state() == (4, 3, 1)
        model.train()
        hook.end_step()  # from now on the user ends the steps of this mode, which is still eval
        assert state() == (4, 3, 1)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert state() == (5, 4, 1)
        hook.end_step()
        assert state() == (5, 4, 1)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert state() == (5, 4, 1)  # another optimizer may be to come: only end_step() tells
        hook.end_step()
        assert state() == (6, 5, 1)
    assert state() == (6, 5, 1)
    assert open_run(tmp_path / "run").tensor("late").steps().tolist() == [0, 1, 2]


def test_going_back_within_one_process_repeats_the_same_steps(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with smdbg.hooks.torch.Hook(tmp_path / "run") as hook:
        hook.register_module(model)
        for _ in range(3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        state = hook.state_dict()
        hook.load_state_dict(state)
        assert hook.state_dict() == state and hook.step == 3


def test_the_hooks_are_reached_without_an_import_of_their_own(tmp_path: Path) -> None:
    code = (
        "import sys, smdbg\n"
        "assert 'smdbg.hooks' not in sys.modules and {'hooks'} <= set(dir(smdbg))\n"
        "smdbg.hooks\n"
        "assert not {'torch', 'numpy', 'smdbg.hooks.torch', 'smdbg.hooks.base'} & set(sys.modules)\n"
        "assert {'base', 'config', 'torch'} <= set(dir(smdbg.hooks))\n"
        "assert smdbg.hooks.config.SaveConfig is smdbg.SaveConfig and smdbg.hooks.base.Hook is smdbg.Hook\n"
        "assert 'torch' not in sys.modules\n"
        "assert issubclass(smdbg.hooks.torch.Hook, smdbg.Hook) and 'torch' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="module 'smdbg.hooks' has no attribute 'nothing'"):
        _ = smdbg.hooks.nothing  # type: ignore[attr-defined]
