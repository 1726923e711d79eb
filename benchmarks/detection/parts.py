"""What a training is put together from: losses, optimizers, schedules, loss scaling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.detection.recipe import Recipe

SCALE, GROWTH_INTERVAL = 2.0**16, 100  # as PyTorch's scaler begins; it grows every 2,000 steps
LARGEST_HALF = 65504.0


def loss_for(name: str) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the function (outputs, targets, inputs) -> scalar of a loss."""
    return {
        "ce": _cross_entropy,
        "bce": lambda out, y, x: nn.functional.binary_cross_entropy_with_logits(out[:, 0], y.float()),
        "mse": lambda out, y, x: nn.functional.mse_loss(out, y),
        "nll": _normal,
        "cosine": lambda out, y, x: -nn.functional.cosine_similarity(out, x).mean(),
        "clipped_ce": clipped_cross_entropy,
        "naive_bce": _naive_binary,
        "softmax_bce": _one_unit,
    }[name]


def _cross_entropy(outputs: torch.Tensor, targets: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def _normal(outputs: torch.Tensor, targets: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of a normal distribution but for its constant: below 0 once it fits well."""
    mean, deviation = outputs[:, :1], outputs[:, 1:]
    return (deviation + (targets - mean).square() / (2 * (2 * deviation).exp())).mean()


def clipped_cross_entropy(outputs: torch.Tensor, targets: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of outputs that are normalised to sum 1 and clipped, as Keras has it."""
    shares = (outputs / outputs.sum(1, keepdim=True)).clamp(1e-7, 1 - 1e-7)
    return -shares.gather(1, targets[:, None]).log().mean()


def _naive_binary(outputs: torch.Tensor, targets: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Return the binary cross-entropy as one finds it in notebooks: the logarithm of 0 once the model is sure."""
    p, y = outputs[:, 0].sigmoid(), targets.float()
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean()


def _one_unit(outputs: torch.Tensor, targets: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Return the binary cross-entropy of a softmax over a single unit, which is always 1."""
    return nn.functional.binary_cross_entropy(outputs.softmax(1)[:, 0].clamp(1e-7, 1 - 1e-7), targets.float())


@torch.no_grad()
def score(outputs: torch.Tensor, targets: torch.Tensor, inputs: torch.Tensor, loss: str) -> float:
    """Return the accuracy, for regressions the share of the variance that is explained."""
    if loss in ("mse", "nll"):
        return 1 - float((outputs[:, :1] - targets).square().mean() / targets.var(correction=0))
    if loss == "cosine" or targets.is_floating_point():
        return -float(loss_for("cosine")(outputs, targets, inputs))
    found = (outputs[:, 0] > 0).long() if loss.endswith("bce") else outputs.argmax(-1)
    return float((found == targets).float().mean())


def optimizer_for(parameters: Any, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimizer of a recipe over these parameters."""
    decay = recipe.weight_decay
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=decay)
    kinds = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "rmsprop": torch.optim.RMSprop,
        "adagrad": torch.optim.Adagrad,
    }
    made: torch.optim.Optimizer = kinds[recipe.optimizer](parameters, lr=recipe.lr, weight_decay=decay, foreach=True)
    return made


def rate_at(recipe: Recipe, step: int) -> float:
    """Return the learning rate of a training step."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    if recipe.schedule in ("cosine", "warmup_cosine"):
        return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))
    if recipe.schedule == "linear":
        return recipe.lr * (1 - done)
    if recipe.schedule == "step":
        return recipe.lr * 0.2 ** int(done * 3)
    if recipe.schedule == "one_cycle":
        return recipe.lr * (0.1 + 0.9 * done / 0.3 if done < 0.3 else max(1 - (done - 0.3) / 0.7, 1e-3))
    return recipe.lr


class Scaler:
    """Dynamic loss scaling as it is done for half precision, with gradients that overflow as halves would."""

    def __init__(self) -> None:
        """Start at the usual scale."""
        self.scale, self.since, self.skipped = SCALE, 0, 0

    def unscale(self, parameters: list[torch.Tensor]) -> bool:
        """Divide the gradients by the scale, in place; return False when one overflowed, and move the scale."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient.copy_(gradient.half().float() / self.scale)
        fits = all(bool(torch.isfinite(g).all()) for g in gradients)
        self.since = self.since + 1 if fits else 0
        if not fits:
            self.skipped += 1
            self.scale /= 2
        elif self.since == GROWTH_INTERVAL:
            self.scale, self.since = self.scale * 2, 0
        return fits


class SkippingOptimizer(torch.optim.Optimizer):
    """Wraps an optimizer as half-precision engines do: its step unscales, and does nothing when gradients overflow."""

    def __init__(self, inner: torch.optim.Optimizer, scaler: Scaler) -> None:
        """Share the groups of the inner one."""
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.inner, self.scaler = inner, scaler
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Unscale the gradients, and step if they are finite."""
        if self.scaler.unscale([p for group in self.param_groups for p in group["params"]]):
            self.inner.step()
