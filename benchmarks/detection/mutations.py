"""What faults do to a training: functions to be called when it begins, or at one of its moments."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.detection import parts
from benchmarks.detection.training import Training

Act = Callable[[Training], None]
OnBatch = Callable[[Training, Any, Any], tuple[Any, Any]]


def weights_of(training: Training) -> list[nn.Parameter]:
    """Return the parameters with two axes or more."""
    return [p for p in training.model.parameters() if p.ndim >= 2]


def parameter(training: Training, name: str) -> nn.Parameter:
    """Return a parameter by its name."""
    return training.model.get_parameter(name)


def initialise(fill: Callable[[torch.Tensor], Any], biases: bool = False) -> Act:
    """Return what fills all weights (and biases) anew."""

    def act(training: Training) -> None:
        with torch.no_grad():
            for p in training.model.parameters():
                if p.ndim >= 2 or biases:
                    fill(p)

    return act


def fill_bias(name: str, value: float) -> Act:
    """Return what sets a bias to one value."""

    def act(training: Training) -> None:
        with torch.no_grad():
            parameter(training, name).fill_(value)

    return act


def once(act: Act) -> Act:
    """Return what acts at the first call of each training alone: faults are asked at every step from their start."""
    done: set[int] = set()

    def acted(training: Training) -> None:
        if id(training) not in done:
            done.add(id(training))
            act(training)

    return acted


def stale_optimizer(training: Training) -> None:
    """Give the optimizer the parameters of a copy, as happens when the model is replaced after it was made."""
    training.optimizer = parts.optimizer_for(copy.deepcopy(training.model).parameters(), training.recipe)


def leave_out(prefix: str) -> Act:
    """Return what forgets some parameters in the optimizer."""

    def act(training: Training) -> None:
        held = [p for name, p in training.model.named_parameters() if not name.startswith(prefix)]
        training.optimizer = parts.optimizer_for(held, training.recipe)

    return act


def detach_after(module: str) -> Act:
    """Return what cuts the graph behind a module, as a stray detach() does."""

    def act(training: Training) -> None:
        part = training.model.get_submodule(module)
        plain = part.forward
        part.forward = lambda *args: plain(*args).detach()

    return act


def divide_by_spread(module: str, floor: float = 0.0) -> Act:
    """Return what makes a module divide its output by its deviation over the batch: 0/0 where a unit is constant."""

    def act(training: Training) -> None:
        part = training.model.get_submodule(module)
        plain = part.forward

        def forward(*args: Any) -> Any:
            out = plain(*args)
            return out / (out.std(0, keepdim=True, correction=0) + floor)

        part.forward = forward

    return act


def speed_up(factor: float) -> Act:
    """Return what multiplies the learning rate from now on."""

    def act(training: Training) -> None:
        training.set_rate(factor)

    return act


def ascend(training: Training) -> None:
    """Turn the sign of the update."""
    for group in training.optimizer.param_groups:
        group["maximize"] = True


def grow_weights(decay: float) -> Act:
    """Return what turns weight decay into growth; optimizers refuse a negative one only when they are made."""

    def act(training: Training) -> None:
        for group in training.optimizer.param_groups:
            group["weight_decay"] = -decay

    return act


def alternate_rate(factor: float, every: int) -> Act:
    """Return what multiplies the learning rate in every other stretch of steps."""

    def act(training: Training) -> None:
        training.set_rate(factor if training.step // every % 2 else 1.0)

    return act


def scale_gradients(factor: float) -> Act:
    """Return what multiplies the gradients, as a loss scale does that nobody divides by."""

    def act(training: Training) -> None:
        for p in training.trained():
            if p.grad is not None:
                p.grad.mul_(factor)

    return act


def shuffle_labels(training: Training, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give every input another one's label."""
    return x, y[torch.randperm(len(y), generator=training.random)]


def scale_inputs(factor: float, every: bool = True, at: int = 0) -> OnBatch:
    """Return what multiplies the inputs, of every batch or of the one at a training step."""

    def change(training: Training, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x * factor if every or training.step == at else x), y

    return change


def scale_targets(factor: float, at: int) -> OnBatch:
    """Return what multiplies the targets of one batch."""

    def change(training: Training, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, (y * factor if training.step == at else y)

    return change


def spoil_row(value: float, at: int) -> OnBatch:
    """Return what puts a value into one feature of one row of one batch."""

    def change(training: Training, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if training.step == at:
            x = x.clone()
            x[0].flatten()[0] = value
        return x, y

    return change


def sort_by_class(training: Training) -> None:
    """Put the data in the order of their classes."""
    order = training.data.y.argsort()
    training.data.x, training.data.y = training.data.x[order], training.data.y[order]


def flip_bit(name: str, value: float) -> Act:
    """Return what overwrites the largest element of a weight, as a fault of memory would."""

    def act(training: Training) -> None:
        with torch.no_grad():
            flat = parameter(training, name).view(-1)
            flat[flat.abs().argmax()] = value

    return act


def on_rank(rank: int, act: Act) -> Act:
    """Return what acts on one replica alone."""

    def acted(training: Training) -> None:
        if training.rank == rank:
            act(training)

    return acted


def nudge(name: str, size: float) -> Act:
    """Return what changes one parameter a little."""

    def act(training: Training) -> None:
        with torch.no_grad():
            parameter(training, name).add_(size)

    return act


def own_gradient(name: str) -> Act:
    """Return what adds a gradient of its own to a parameter, as a replica has that missed an all-reduce."""

    def act(training: Training) -> None:
        found = parameter(training, name).grad
        if found is not None:
            found.mul_(1.05)

    return act


def few_data(n: int) -> Act:
    """Return what keeps only a few examples for training."""

    def act(training: Training) -> None:
        training.data.x, training.data.y = training.data.x[:n], training.data.y[:n]

    return act
