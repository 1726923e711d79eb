"""What really happened in a training, as the trainer itself saw it: kept beside the run, and never read by a rule."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

FILE = "truth.json"
TAIL = 0.1  # the share of the steps that counts as the end, and as the beginning at most


@dataclass
class Truth:
    """The course of a training by training steps, and how the model was left.

    `positions`: the run's global step of each training step; `validation`: (training step, loss, score);
    `moved`: parameter -> how far it went relative to its size at first (absolutely where that was 0);
    `silent`: module -> share of ReLU units that are never active on the validation data; `stuck`: the same for tanh
    and sigmoid units on their plateau; `slopes`: parameter -> root mean square of the gradient at the end;
    `alike`: parameter -> True where all units hold the same weights at the end; `bad_step`: the first with anything
    not finite; `skipped`: steps that loss scaling skipped; `input_scale`: the largest mean or deviation of a feature.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    validation: list[tuple[int, float, float]] = field(default_factory=list)
    moved: dict[str, float] = field(default_factory=dict)
    grown: dict[str, float] = field(default_factory=dict)
    silent: dict[str, float] = field(default_factory=dict)
    stuck: dict[str, float] = field(default_factory=dict)
    slopes: dict[str, float] = field(default_factory=dict)
    alike: dict[str, bool] = field(default_factory=dict)
    bad_step: int | None = None
    drifted: bool = False
    skipped: int = 0
    input_scale: float = 0.0

    def first_loss(self) -> float:
        """Return the mean loss of the beginning: a twentieth of the steps, at most 20."""
        return _mean(self.losses[: max(min(len(self.losses) // 20, 20), 1)])

    def last_loss(self) -> float:
        """Return the mean loss of the last tenth."""
        return _mean(self.losses[-max(int(len(self.losses) * TAIL), 1) :])

    def ratio(self) -> float:
        """Return the last losses over the first."""
        return self.last_loss() / self.first_loss()

    def last_score(self) -> float:
        """Return the last score on the validation data."""
        return self.validation[-1][2]

    def overfits(self) -> float:
        """Return by how much the last validation losses (median of 3) lie above the best such median, relatively."""
        losses = [loss for _, loss, _ in self.validation]
        medians = [sorted(losses[i : i + 3])[1] for i in range(len(losses) - 2)]
        if not medians or not all(map(math.isfinite, losses)):
            return 0.0
        best = min(medians)
        return (medians[-1] - best) / max(abs(best), 1e-3)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def healthy(truth: Truth, goal: float, goal_by: str) -> str:
    """Return what shows that a training went well, '' when it did not: it learned, is finite and does not overfit."""
    if truth.bad_step is not None or truth.overfits() > 0.1:
        return ""
    if goal_by == "score":
        return f"score {truth.last_score():.3f}" if truth.last_score() >= goal else ""
    return f"loss {truth.ratio():.3f} of its first" if truth.ratio() < goal else ""


def outcome(truth: Truth, batches: int) -> str:
    """Return 'faulty' or 'healthy' by the mean losses of the first and last epoch, '' for what lies between."""
    if truth.bad_step is not None:
        return "faulty"
    ratio = _mean(truth.losses[-batches:]) / _mean(truth.losses[:batches])
    return "faulty" if ratio > 0.9 else "healthy" if ratio < 0.6 else ""


class Watch:
    """Fills a Truth while a training goes on."""

    def __init__(self, model: nn.Module) -> None:
        """Remember the weights as they are."""
        self.truth = Truth()
        self._before = {name: p.detach().double().clone() for name, p in model.named_parameters()}

    def step(self, position: int, loss: torch.Tensor, model: nn.Module) -> None:
        """Take note of a training step, before its update."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = float(torch.stack(torch._foreach_norm(gradients)).double().norm()) if gradients else 0.0
        value = float(loss.detach())
        truth = self.truth
        truth.positions.append(position)
        truth.losses.append(value)
        truth.norms.append(norm)
        if truth.bad_step is None and not (math.isfinite(value) and math.isfinite(norm)):
            truth.bad_step = len(truth.losses) - 1

    def end(self, model: nn.Module, forward: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> Truth:
        """Look at the model as it was left; `forward` makes a loss on validation data, nobody else listening."""
        truth = self.truth
        for name, p in model.named_parameters():
            value, before = p.detach().double(), self._before.get(name)
            if before is not None and before.shape == value.shape:
                size = float(before.norm())
                truth.moved[name] = float((value - before).norm()) / (size or 1.0)
                truth.grown[name] = float(value.norm()) / (size or 1.0)
            if p.ndim == 2 and len(p) > 1:
                truth.alike[name] = bool((value == value[:1]).all())
        self._probe(model, forward)
        return truth

    def _probe(self, model: nn.Module, forward: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> None:
        truth, handles = self.truth, []

        def listen(name: str) -> Callable[..., None]:
            def note(part: nn.Module, args: Any, out: torch.Tensor) -> None:
                flat = out.detach().transpose(1, -1).reshape(-1, out.shape[1]) if out.ndim > 2 else out.detach()
                if isinstance(part, nn.ReLU):
                    truth.silent[name] = float((flat <= 0).all(0).float().mean())
                else:
                    slope = 1 - flat.square() if isinstance(part, nn.Tanh) else 4 * flat * (1 - flat)
                    truth.stuck[name] = float(((slope < 0.01).float().mean(0) > 0.95).float().mean())

            return note

        for name, part in model.named_modules():
            if isinstance(part, nn.ReLU | nn.Tanh | nn.Sigmoid):
                handles.append(part.register_forward_hook(listen(name)))
        model.zero_grad()
        loss, _ = forward()
        if loss.requires_grad:
            torch.autograd.backward(loss)
        for name, p in model.named_parameters():
            if p.grad is not None:
                truth.slopes[name] = float(p.grad.double().square().mean().sqrt())
        for handle in handles:
            handle.remove()


def write(folder: Path, truth: Truth, verdict: Mapping[str, Any]) -> None:
    """Write the truth and what it amounts to, beside the run; NaN and infinities as JSON extensions."""
    text = json.dumps({**verdict, "course": asdict(truth)})
    (folder / FILE).write_text(text, encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """Return what `write` wrote."""
    found: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return found
