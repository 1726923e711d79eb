"""The training that `smdbg demo` writes: a linear regression in two dimensions, in plain NumPy.

It is also a short example of the neutral hook. The inputs are multiplied by the hyperparameter `scale`. With 1 the
training is healthy. With 100000000000 it is broken from the start: the loss is about 1e24, the squares that Adam keeps
of the gradient exceed what float32 can hold, and two steps later the weights are NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from smdbg import CollectionConfig, Hook, ReductionConfig, SaveConfig

WEIGHT = "initialize/weight1:0"
LOSS = "loss/loss:0"
GRADIENT = "gradients/multiply/MatMul_1_grad/tuple/control_dependency_1:0"

Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Step:
    """One step of the training: the weight [2, 1] before the update, its gradient [2, 1] and the loss, float32."""

    weight: Array
    gradient: Array
    loss: np.float32


def training(scale: float, steps: int, learning_rate: float = 0.01, seed: int = 0) -> Iterator[Step]:
    """Yield the steps of fitting w to the true weights [[1], [1]] from [[10], [10]] with Adam.

    Each step draws ten samples x from [0, 1) times `scale`; the loss is the mean of (x w - x w0) squared.
    """
    rng = np.random.default_rng(seed)
    rate, decay1, decay2, epsilon = (np.float32(v) for v in (learning_rate, 0.9, 0.999, 1e-8))
    one = np.float32(1)
    true = np.ones((2, 1), np.float32)
    weight = np.full((2, 1), 10, np.float32)
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for step in range(1, steps + 1):
        x = (rng.random((10, 2)) * scale).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # the broken run is meant to overflow
            error = x @ weight - x @ true
            loss = np.mean(error * error, dtype=np.float32)
            gradient = (x.T @ error * np.float32(2 / len(x))).astype(np.float32)
            yield Step(weight.copy(), gradient, loss)
            mean += (gradient - mean) * (one - decay1)
            square += (gradient * gradient - square) * (one - decay2)
            correction = np.sqrt(one - decay2**step) / (one - decay1**step)
            weight -= rate * correction * mean / (np.sqrt(square) + epsilon)


def train(url: str, scale: float, steps: int) -> None:
    """Run the training and write its weight, gradient and loss of every step to a new run at `url`.

    Raises RunExists where there is a run already, and StoreError where the store cannot be written.
    """
    every_step = SaveConfig(save_interval=1)
    whole = ReductionConfig(save_raw_tensor=True)
    collections = [
        CollectionConfig(name, save_config=every_step, reduction_config=whole)
        for name in ("weights", "gradients", "losses")
    ]
    hyperparameters = {"scale": scale, "lr": 0.01, "optimizer": "adam", "batch_size": 10, "steps": steps}
    with Hook(url, collections=collections, hyperparameters=hyperparameters) as hook:
        hook.set_mode("train")
        for step in training(scale, steps):
            hook.save_tensor(WEIGHT, step.weight, "weights", role="weight")
            hook.save_tensor(LOSS, step.loss, "losses", role="loss")
            hook.save_tensor(GRADIENT, step.gradient, "gradients", role="gradient", of=WEIGHT)
            hook.end_step()
