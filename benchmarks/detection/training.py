"""The training loop: one for all cases, healthy and faulty, watched by the hook as any user would have it."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.detection import architectures, data, models, parts
from benchmarks.detection.recipe import Case, Fault, Recipe
from benchmarks.detection.truth import Truth, Watch
from smdbg.hooks.config import BY_DEFAULT, CollectionConfig, SaveConfig
from smdbg.hooks.torch import Hook

SHORT, SHORT_INTERVAL = 300, 5  # shorter runs are saved more often than the default of every 10 steps


@dataclass
class Training:
    """A training under way: what faults may lay hands on. `step` counts training steps, `rank` replicas."""

    recipe: Recipe
    seed: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: data.Data
    random: torch.Generator
    rank: int = 0
    step: int = 0
    position: int = 0
    rate_factor: float = 1.0

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the model makes of a batch, in float32."""
        if x.is_floating_point():
            x = x.to(next(self.model.parameters()).dtype)
        found: torch.Tensor = self.model(x)
        return found.float()

    def set_rate(self, factor: float) -> None:
        """Multiply the learning rates that the recipe has, from this step on."""
        for group in self.optimizer.param_groups:
            group["lr"] *= factor / self.rate_factor
        self.rate_factor = factor

    def trained(self) -> list[torch.Tensor]:
        """Return the parameters that the optimizer holds."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def begin(case: Case, rank: int = 0) -> Training:
    """Return a training before its first step: made from the seed, so alike on all ranks, and with its fault in it."""
    recipe, seed = case.recipe, zlib.crc32(case.id.encode())
    torch.manual_seed(seed)
    loaded = data.load(recipe.data)
    _spoil(loaded, recipe, seed)
    if case.architecture:
        model: nn.Module = architectures.build(case.architecture)
    else:
        model = models.build(recipe, loaded)
    model.to(getattr(torch, recipe.dtype))
    random = torch.Generator().manual_seed(seed + 1)
    training = Training(recipe, seed, model, parts.optimizer_for(model.parameters(), recipe), loaded, random, rank)
    if recipe.pretrain:
        _pretrain(training)
    if case.fault:
        case.fault.prepare(training)
    return training


def _spoil(loaded: data.Data, recipe: Recipe, seed: int) -> None:
    """Put in what real data have and learn well with: wrong labels, and classes of unlike size."""
    random = torch.Generator().manual_seed(seed + 2)
    if recipe.label_noise:
        wrong = torch.rand(len(loaded.y), generator=random) < recipe.label_noise
        loaded.y[wrong] = torch.randint(0, loaded.classes, (int(wrong.sum()),), generator=random)
    if recipe.imbalance > 1:
        keep = (loaded.y == 0) | (torch.rand(len(loaded.y), generator=random) < 1 / recipe.imbalance)
        loaded.x, loaded.y = loaded.x[keep], loaded.y[keep]


def _pretrain(training: Training) -> None:
    """Train unseen on half of the data, then leave trainable what the recipe tunes."""
    recipe, whole = training.recipe, training.data
    half = len(whole.x) // 2
    training.data = replace(whole, x=whole.x[:half], y=whole.y[:half])
    training.recipe = replace(recipe, steps=recipe.pretrain, schedule="constant", warmup=0, lr=3e-3, optimizer="adam")
    training.optimizer = parts.optimizer_for(training.model.parameters(), training.recipe)
    for x, y in batches(training):
        _descend(training, x, y, None)
        training.optimizer.step()
    training.data, training.recipe = whole, recipe
    if recipe.tuning and isinstance(training.model, nn.Sequential):
        {"adapter": models.adapt, "head": models.freeze_base}[recipe.tuning](training.model)
    trainable = [p for p in training.model.parameters() if p.requires_grad]
    training.optimizer = parts.optimizer_for(trainable, recipe)


def batches(training: Training, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield one batch per forward pass, epoch after epoch in a new order, from a training step on."""
    recipe = training.recipe
    total, made = recipe.steps * recipe.accumulate, 0
    while made < total:
        n = len(training.data.x)
        order = torch.randperm(n, generator=training.random) if recipe.shuffle else torch.arange(n)
        for chosen in torch.split(order, recipe.batch or n):
            if made < total and made >= start * recipe.accumulate:
                yield training.data.x[chosen], training.data.y[chosen]
            made += 1


def _descend(training: Training, x: torch.Tensor, y: torch.Tensor, fault: Fault | None, scale: float = 1.0) -> Any:
    """Run forward and backward on a batch and return the loss as the training sees it."""
    recipe = training.recipe
    if fault is None or fault.zero_grad:
        training.optimizer.zero_grad()
    loss = parts.loss_for(recipe.loss)(training.outputs(x), y, x)
    if fault is not None and fault.on_loss is not None:
        loss = fault.on_loss(training, loss)
    torch.autograd.backward(loss * (scale / recipe.accumulate))
    return loss


def hook_for(case: Case, url: Path, rank: int = 0, resume: bool = False) -> Hook:
    """Return the hook: default collections, inputs and outputs. The run is told its seed and nothing else."""
    names = (*BY_DEFAULT, "inputs", "outputs")
    often = SaveConfig(save_interval=SHORT_INTERVAL)
    dense = ("weights", "biases", "gradients", "updates", "inputs", "outputs") if case.recipe.steps < SHORT else ()
    return Hook(
        url,
        collections=[CollectionConfig(n, save_config=often) if n in dense else n for n in names],
        hyperparameters={"seed": case.seed},
        rank=rank,
        world_size=case.recipe.replicas,
        workers="all" if case.recipe.replicas > 1 else "auto",
        resume=resume,
        host=False,
    )


def run(case: Case, url: Path) -> Truth:
    """Train a case and write its run; return what really happened (on rank 0)."""
    torch.set_num_threads(1)
    truths, marks = [], []
    for rank in range(case.recipe.replicas):
        training = begin(case, rank)
        watch = Watch(training.model)
        hook = hook_for(case, url, rank)
        hook.register_module(training.model)
        _steps(case, training, hook, watch, case.recipe.resume_at or case.recipe.steps)
        if case.recipe.resume_at:
            training, hook = _again(case, training, hook, url)
            _steps(case, training, hook, watch, case.recipe.steps)
        hook.close()
        truths.append(watch.end(training.model, partial(_validation_loss, training)))
        marks.append(_mark(training.model))
    truths[0].input_scale = _input_scale(training.data.x)
    truths[0].drifted = len(set(marks)) > 1
    return truths[0]


def _input_scale(x: torch.Tensor) -> float:
    """Return the largest mean or deviation of a feature, 0 for tokens."""
    flat = x.flatten(1)
    return float(torch.maximum(flat.mean(0).abs(), flat.std(0)).max()) if x.is_floating_point() else 0.0


def _mark(model: nn.Module) -> str:
    """Return a digest of all parameters."""
    found = hashlib.sha256()
    for p in model.parameters():
        found.update(p.detach().float().numpy().tobytes())
    return found.hexdigest()


def _again(case: Case, before: Training, hook: Hook, url: Path) -> tuple[Training, Hook]:
    """Start anew from a checkpoint: a new model, optimizer and hook."""
    kept = hook.state_dict()
    hook.close()
    training = begin(case, before.rank)
    training.model.load_state_dict(before.model.state_dict())
    training.optimizer.load_state_dict(before.optimizer.state_dict())
    training.step, training.position = before.step, before.position
    hook = hook_for(case, url, before.rank, resume=True)
    hook.register_module(training.model)
    hook.load_state_dict(kept)
    return training, hook


def _steps(case: Case, training: Training, hook: Hook, watch: Watch, until: int) -> None:
    """Train up to a step, evaluating now and then."""
    recipe, fault = case.recipe, case.fault
    scaler = parts.Scaler() if recipe.scaling else None
    stepping = training.optimizer
    if scaler and recipe.scaling == "wrapper":
        stepping = parts.SkippingOptimizer(training.optimizer, scaler)
    forwards = batches(training, training.step)
    while training.step < until:
        if training.step % recipe.evaluate_every == 0:
            _evaluate(training, hook, watch)
        for group in training.optimizer.param_groups:
            group["lr"] = parts.rate_at(recipe, training.step) * training.rate_factor
        training.model.train()
        for part in range(recipe.accumulate):
            x, y = next(forwards)
            if fault and fault.on_batch and training.step >= fault.start:
                x, y = fault.on_batch(training, x, y)
            loss = _descend_part(training, x, y, fault, scaler.scale if scaler else 1.0, part)
            hook.record("loss", loss)
        stepped = _update(training, stepping, scaler, fault, watch, loss)
        training.step += 1
        training.position += stepped
    if training.step == recipe.steps:
        _evaluate(training, hook, watch)
    watch.truth.skipped += scaler.skipped if scaler else 0


def _descend_part(
    training: Training, x: torch.Tensor, y: torch.Tensor, fault: Fault | None, scale: float, part: int
) -> torch.Tensor:
    """Descend on one part of an accumulated batch: gradients are zeroed before the first part only."""
    if fault is None and part:
        fault = Fault("", (), lambda truth: "", zero_grad=False)
    found: torch.Tensor = _descend(training, x, y, fault, scale)
    return found


def _update(
    training: Training,
    stepping: torch.optim.Optimizer,
    scaler: parts.Scaler | None,
    fault: Fault | None,
    watch: Watch,
    loss: torch.Tensor,
) -> bool:
    """Clip, let the fault act, and step; return whether the optimizer was asked to."""
    acts = fault is not None and training.step >= fault.start
    if scaler and stepping is training.optimizer and not scaler.unscale(training.trained()):
        watch.step(training.position, loss, nn.Module())
        return False
    if training.recipe.clip:
        nn.utils.clip_grad_norm_(training.trained(), training.recipe.clip)
    if fault and acts:
        fault.before_update(training)
    watch.step(training.position, loss, nn.Module() if scaler else training.model)
    stepping.step()
    if fault and acts:
        fault.after_update(training)
    return True


def _validation_loss(training: Training) -> tuple[torch.Tensor, torch.Tensor]:
    found = training.data
    outputs = training.outputs(found.x_val)
    return parts.loss_for(training.recipe.loss)(outputs, found.y_val, found.x_val), outputs


def _evaluate(training: Training, hook: Hook, watch: Watch) -> None:
    """Evaluate in one forward pass: one step of the run."""
    training.model.eval()
    with torch.no_grad():
        loss, outputs = _validation_loss(training)
    found = parts.score(outputs, training.data.y_val, training.data.x_val, training.recipe.loss)
    hook.record("loss", loss)
    hook.save_scalar("score", found)
    watch.truth.validation.append((training.step, float(loss), found))
    training.position += 1
