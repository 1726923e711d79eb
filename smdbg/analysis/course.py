"""How a training went as a whole, on one worker: its loss, learning rate and gradient norm, step by step.

Rules use it to tell a symptom from a fault: a gradient that grows while the loss falls is no reason for alarm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from smdbg.analysis.findings import Floats, Ints

if TYPE_CHECKING:
    from smdbg.analysis.view import View

FEW = 5  # losses that a start or an end is the median of, at least
SHARE = 0.05  # of the losses, for the same
FALLEN = 0.9  # the loss has fallen when its end is below this share of its start
GRADIENT_NORM = "grad_norm"  # how the hooks call the norm of all gradients, after the optimizer's name and a slash


def _none() -> tuple[Ints, Floats]:
    return np.zeros(0, np.int64), np.zeros(0)


@dataclass(frozen=True)
class Course:
    """Series of (steps int64[n], values float64[n]) in mode train, else global; empty where they were not saved.

    `loss` is the main loss, by name `loss_name`: the first one of the catalogue that is a scalar. `lr`: the largest of
    the learning rates; `gradient_norm`: as the hook recorded it, else from the saved gradients. `non_finite` is the
    first step with a non-finite loss or weight, None if there is none; `skipped` the steps whose update was skipped.
    """

    loss_name: str = ""
    loss: tuple[Ints, Floats] = field(default_factory=_none)
    lr: tuple[Ints, Floats] = field(default_factory=_none)
    gradient_norm: tuple[Ints, Floats] = field(default_factory=_none)
    non_finite: int | None = None
    skipped: frozenset[int] = frozenset()
    steps: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    def level(self, start: int | None = None, end: int | None = None) -> float:
        """Return the median of the finite losses from step `start` up to, not including, `end`; NaN for none."""
        steps, values = self.loss
        inside = np.isfinite(values)
        inside &= (steps >= start) if start is not None else True
        inside &= (steps < end) if end is not None else True
        return float(np.median(values[inside])) if inside.any() else float("nan")

    @property
    def start_level(self) -> float:
        """Return the median of the first losses (5, or 5 % of them), NaN without any."""
        values = self.loss[1][np.isfinite(self.loss[1])]
        return float(np.median(values[: _few(len(values))])) if len(values) else float("nan")

    @property
    def end_level(self) -> float:
        """Return the median of the last losses (5, or 5 % of them), NaN without any."""
        values = self.loss[1][np.isfinite(self.loss[1])]
        return float(np.median(values[-_few(len(values)) :])) if len(values) else float("nan")

    @property
    def learned(self) -> bool | None:
        """Tell whether the loss ended well below its start, and finite; None where there are too few losses to tell."""
        values = self.loss[1]
        if len(values) < 4 * FEW:
            return None
        if not np.isfinite(values[-_few(len(values)) :]).all():
            return False
        start, end = self.start_level, self.end_level
        if start > 0:
            return end < FALLEN * start
        spread = 1.4826 * float(np.median(np.abs(np.diff(values[np.isfinite(values)])))) + 1e-12
        return start - end > max((1 - FALLEN) * abs(start), 2 * spread)

    def rises_after(self, step: int, window: int = 50) -> bool:
        """Tell whether the loss stands higher after a step than before it, or is not finite at any time after it."""
        steps, values = self.loss
        before, after = values[steps < step][-window:], values[steps >= step][:window]
        if len(values[steps >= step]) and not np.isfinite(values[steps >= step]).all():
            return True
        before = before[np.isfinite(before)]
        if len(before) < FEW or len(after) < FEW:
            return False
        was, spread = np.median(before), 1.4826 * np.median(np.abs(before - np.median(before)))
        return bool(np.median(after) > was + max(2 * spread, 0.1 * abs(was)))

    def lr_at(self, steps: Ints) -> Floats:
        """Return the learning rate that holds at each of these steps; NaN where none was recorded by then."""
        known, values = self.lr
        at = np.searchsorted(known, steps, side="right") - 1
        found = np.full(len(steps), np.nan)
        found[at >= 0] = values[at[at >= 0]]
        return found

    @property
    def peak_lr(self) -> float:
        """Return the largest learning rate, NaN without any."""
        return float(np.nanmax(self.lr[1])) if np.isfinite(self.lr[1]).any() else float("nan")


def course_of(view: View, worker: int) -> Course:
    """Return the course of one worker; reads the losses, learning rates, norms and the counts of bad weights."""
    mode = next((mode for mode in ("train", "global") if mode in view.run.modes()), None)
    if mode is None:
        return Course()
    log = view.log(worker)
    mine = log.mode == mode
    losses = [n for n, info in view.catalogue.items() if info.role == "loss" or info.collection == "losses"]
    name, loss = _first_series(view, losses, mode, worker)
    rates = [view.series(n, mode, worker) for n, info in view.catalogue.items() if info.role == "lr"]
    norms = [n for n in view.catalogue if n.rsplit("/", 1)[-1] == GRADIENT_NORM]
    _, norm = _first_series(view, norms, mode, worker)
    if not len(norm[0]):
        norm = _norm_of_gradients(view, mode, worker)
    return Course(
        loss_name=name,
        loss=loss,
        lr=_largest(rates),
        gradient_norm=norm,
        non_finite=_non_finite(view, loss, mode, worker),
        skipped=frozenset(log.step[(log.flags & 1).astype(bool)].tolist()),
        steps=log.step[mine],
    )


def _few(count: int) -> int:
    return max(FEW, int(SHARE * count))


def _first_series(view: View, names: list[str], mode: str, worker: int) -> tuple[str, tuple[Ints, Floats]]:
    """Return the first of the tensors that is a series of numbers in this mode."""
    for name in names:
        steps, values = view.series(name, mode, worker)
        if len(steps) and view.catalogue[name].shape in ((), (1,)):
            return name, (steps, values)
    return "", _none()


def _largest(series: list[tuple[Ints, Floats]]) -> tuple[Ints, Floats]:
    """Return the largest value of several series at each step of any."""
    if not series:
        return _none()
    steps = np.unique(np.concatenate([at for at, _ in series]))
    largest = np.full(len(steps), -np.inf)
    for at, values in series:
        np.fmax.at(largest, np.searchsorted(steps, at), values)
    return steps, largest


def _norm_of_gradients(view: View, mode: str, worker: int) -> tuple[Ints, Floats]:
    """Return the norm over all gradients, from their l2, at the steps where each that was ever saved is present."""
    names = [n for n, info in view.catalogue.items() if info.role == "gradient" or info.collection == "gradients"]
    if not names:
        return _none()
    table = view.table(names, ("l2",), mode, worker)
    rows = table.present.any(axis=1)
    with np.errstate(over="ignore"):
        return table.steps[rows], np.sqrt(np.nansum(table.statistics["l2"][rows] ** 2, axis=1))


def _non_finite(view: View, loss: tuple[Ints, Floats], mode: str, worker: int) -> int | None:
    """Return the first step with a loss or weight that is not finite."""
    found = loss[0][~np.isfinite(loss[1])][:1].tolist()
    weights = [n for n, info in view.catalogue.items() if info.role in ("weight", "bias", "norm", "embedding")]
    if weights:
        table = view.table(weights, ("nan", "posinf", "neginf"), mode, worker)
        bad = sum(np.nan_to_num(matrix) for matrix in table.statistics.values())
        found += table.steps[np.asarray(bad > 0).any(axis=1)][:1].tolist()
    return min(found, default=None)
