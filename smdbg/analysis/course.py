"""How a training went as a whole, on one worker: its loss, learning rate and gradient norm, step by step.

Rules use it to tell a symptom from a fault: a gradient that grows while the loss falls is no reason for alarm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from smdbg.analysis.findings import Bools, Floats, Ints
from smdbg.store.format import FLAG_SKIPPED, TensorInfo

if TYPE_CHECKING:
    from smdbg.analysis.view import View

TRAINING = ("train", "global")  # modes in which models are trained, the likelier one first
FEW = 5  # losses that a start or an end is the median of, at least
SHARE = 0.05  # of the losses, for the same
FALLEN = 0.9  # the loss has fallen when its end is below this share of its start
GRADIENT_NORM = "grad_norm"  # how the hooks call the norm of all gradients, after the optimizer's name and a slash
PARAMETERS = ("weight", "bias", "norm", "embedding")
WARM = 0.9  # of its peak: where a learning rate is warmed up
MANY = 64  # elements that show the shape of their distribution
FRESH_SHARE = 1 / 3  # of the parameters must look freshly made: others, drawn from a normal distribution, do not show


def _none() -> tuple[Ints, Floats]:
    return np.zeros(0, np.int64), np.zeros(0)


@dataclass(frozen=True)
class Course:
    """Series of (steps int64[n], values float64[n]) in mode train, else global; empty where they were not saved.

    `loss` is the main loss, by name `loss_name` (see `main_loss`). `lr`: the largest of the learning rates;
    `gradient_norm`: as the hook recorded it, else from the saved gradients, NaN where it is not finite. `non_finite` is
    the first step with a non-finite loss or weight, None if there is none; `skipped` the steps whose update was
    skipped. `fresh` tells whether the parameters were freshly initialised at the first step: False for a resumed or
    fine-tuned model, None where nothing shows it. `steps`: the logged steps of the training.
    """

    loss_name: str = ""
    loss: tuple[Ints, Floats] = field(default_factory=_none)
    lr: tuple[Ints, Floats] = field(default_factory=_none)
    gradient_norm: tuple[Ints, Floats] = field(default_factory=_none)
    non_finite: int | None = None
    skipped: frozenset[int] = frozenset()
    steps: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    fresh: bool | None = None

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
        """Tell whether the loss ended well below its start, and finite; None where that cannot be told.

        It cannot from fewer than 20 losses, nor where the loss stands still and the model was not made afresh: it may
        have been as good before. Where losses at the end are mostly not finite, the answer is False in any case.
        """
        values = self.loss[1]
        last = values[-_few(len(values)) :]
        if len(values) and np.isfinite(last).mean() < 0.5:
            return False
        if len(values) < 4 * FEW:
            return None
        start, end = self.start_level, self.end_level
        finite = values[np.isfinite(values)]
        if (finite > 0).all():
            fallen, risen = end < FALLEN * start, end > start / FALLEN
        else:  # no ratio means anything
            noise = 2 * 1.4826 * float(np.median(np.abs(np.diff(finite)))) + 1e-12
            least = max((1 - FALLEN) * abs(start), noise)
            fallen, risen = start - end > least, end - start > least
        return True if fallen else None if self.fresh is False and not risen else False

    def rises_after(self, step: int, window: int = 50) -> bool:
        """Tell whether the loss stands higher after a step (or at the end) than before, or is not finite after it.

        Before the first losses there is nothing to compare with: then the first ones stand for what was before.
        """
        steps, values = self.loss
        later = values[steps >= step]
        if len(later) and not np.isfinite(later).all():
            return True
        before = values[steps < step][-window:]
        before = before[np.isfinite(before)]
        if len(before) < FEW:
            before, later = values[:FEW], values[FEW:]
        if len(before) < FEW or len(later) < FEW:
            return False
        was = float(np.median(before))
        bar = was + max(2 * 1.4826 * float(np.median(np.abs(before - was))), 0.1 * abs(was))
        return bool(np.median(later[:window]) > bar or np.median(later[-_few(len(values)) :]) > bar)

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

    @property
    def warm_from(self) -> int | None:
        """Return the first step at which the learning rate is close to its peak; None where none was recorded."""
        steps, values = self.lr
        if not np.isfinite(values).any():
            return None
        return int(steps[np.nan_to_num(values, nan=-np.inf) >= WARM * self.peak_lr][0]) if self.peak_lr > 0 else None

    @property
    def warming(self) -> bool:
        """Tell whether the learning rate still rises at the end: the last one is the highest, well above the first."""
        values = self.lr[1][np.isfinite(self.lr[1])]
        return len(values) > 1 and bool(values[-1] == self.peak_lr > 2 * values[0] and values[-2] < values[-1])

    def skips_too_often(self, row: int = 5, within: int = 100, share: float = 0.1, first: int = 16) -> bool:
        """Tell whether `row` steps in a row were skipped, or more than a share of any `within` steps.

        Skips before the first step that was made do not count, up to `first`: that is how a loss scale finds its size
        (from 65,536 it can be halved 16 times).
        """
        skipped = np.isin(self.steps, np.fromiter(self.skipped, np.int64, len(self.skipped)))
        opening = int(np.argmin(skipped)) if len(skipped) and not skipped.all() else len(skipped)
        if opening > first:
            return True
        total = np.concatenate([[0], np.cumsum(skipped[opening:])])
        in_row = total[row:] - total[: max(len(total) - row, 0)]
        among = total[within:] - total[: max(len(total) - within, 0)] if len(total) > within else total[-1:]
        return bool((in_row >= row).any() or (among > share * within).any())


def course_of(view: View, worker: int) -> Course:
    """Return the course of one worker; reads the losses, learning rates, norms and the state of the weights."""
    modes = training_modes(view)
    if not modes:
        return Course()
    log = view.log(worker)
    name, loss = main_loss(view, worker)
    rates = [_series(view, n, worker) for n, info in view.catalogue.items() if info.role == "lr"]
    norms = [n for n in view.catalogue if n.rsplit("/", 1)[-1] == GRADIENT_NORM]
    norm = next((found for n in norms if len((found := _series(view, n, worker))[0])), _none())
    if not len(norm[0]):
        norm = _norm_of_gradients(view, modes[0], worker)
    weights = _Weights.read(view, modes[0], worker)
    bad = [*loss[0][~np.isfinite(loss[1])][:1].tolist(), *weights.steps[weights.bad][:1].tolist()]
    mode = next((mode for mode in modes if len(loss[0]) and log.mode[log.step == loss[0][0]][:1] == mode), modes[0])
    inside = view.inside(log.step)
    flagged = log.step[inside & ((log.flags & FLAG_SKIPPED) > 0)].tolist()
    return Course(
        loss_name=name,
        loss=loss,
        lr=_largest(rates),
        gradient_norm=norm,
        non_finite=min(bad, default=None),
        skipped=frozenset(flagged) | _skipped(norm, loss, weights),
        steps=log.step[(log.mode == mode) & inside],
        fresh=weights.fresh(view, log.step[(log.mode == modes[0])][:1].tolist()),
    )


def training_modes(view: View) -> list[str]:
    """Return the modes of the run in which a model may be trained: evaluation alone shows no course."""
    present = view.run.modes()
    return [mode for mode in TRAINING if mode in present]


def is_number(info: TensorInfo) -> bool:
    """Tell whether a tensor is a single number."""
    return info.shape in ((), (1,))


def main_loss(view: View, worker: int) -> tuple[str, tuple[Ints, Floats]]:
    """Return the loss that is trained on, as far as one can tell, by name and series; '' where there is none.

    Of several losses it is one that was recorded at least half as often as any; among these the one that is called
    `loss`, or has `total` in its name, else the first of the catalogue. Losses per sample count, by their mean, where
    there are no single numbers.
    """
    losses = {n: info for n, info in view.catalogue.items() if info.role == "loss" or info.collection == "losses"}
    found = {n: _series(view, n, worker) for n, info in losses.items() if is_number(info)}
    found = {n: series for n, series in found.items() if len(series[0])}
    if not found:
        found = {n: series for n in losses if len((series := _series(view, n, worker))[0])}
    most = max((len(steps) for steps, _ in found.values()), default=0)
    often = [n for n, (steps, _) in found.items() if 2 * len(steps) >= most]
    name = min(often, key=_rank, default="")
    return name, found.get(name, _none())


def _rank(name: str) -> int:
    """Return 0 for a loss called so, 1 for a total, 2 for the rest."""
    last = name.lower().rsplit("/", 1)[-1].partition(":")[0]
    return 0 if last in ("loss", "train_loss", "training_loss") else 1 if "total" in last else 2


def _few(count: int) -> int:
    return max(FEW, int(SHARE * count))


def _series(view: View, name: str, worker: int) -> tuple[Ints, Floats]:
    """Return a tensor's series in the first training mode that has one; empty for none."""
    for mode in training_modes(view):
        steps, values = view.series(name, mode, worker)
        if len(steps):
            return steps, values
    return _none()


def _largest(series: list[tuple[Ints, Floats]]) -> tuple[Ints, Floats]:
    """Return the largest value of several series at each step of any; NaN where none has a number."""
    if not series:
        return _none()
    steps = np.unique(np.concatenate([at for at, _ in series]))
    largest = np.full(len(steps), np.nan)
    for at, values in series:
        rows = np.searchsorted(steps, at)
        largest[rows] = np.fmax(largest[rows], values)
    return steps, largest


def _norm_of_gradients(view: View, mode: str, worker: int) -> tuple[Ints, Floats]:
    """Return the norm over all gradients, from their l2, at the steps where any is present; NaN if one is not finite.

    Gradients that come and go, as those of experts do, change the norm only by what they are.
    """
    names = [n for n, info in view.catalogue.items() if info.role == "gradient" or info.collection == "gradients"]
    if not names:
        return _none()
    table = view.table(names, ("l2", "nan", "posinf", "neginf"), mode, worker)
    rows = table.present.any(axis=1)
    with np.errstate(over="ignore"):
        norms = np.sqrt(np.nansum(table.statistics["l2"] ** 2, axis=1))
    norms[_bad(table.statistics)] = np.nan
    return table.steps[rows], norms[rows]


def _bad(statistics: Mapping[str, Floats]) -> Bools:
    """Return bool[rows]: whether any tensor has elements that are not finite."""
    bad = (statistics["nan"] > 0) | (statistics["posinf"] > 0) | (statistics["neginf"] > 0)
    return np.asarray(bad.any(axis=1), np.bool_)


@dataclass(frozen=True)
class _Weights:
    """The parameters of the model, of one worker: at which rows any is not finite, and how they began."""

    infos: Sequence[TensorInfo]
    steps: Ints
    bad: Bools
    first: Sequence[tuple[float, float]]  # (std, abs_max) of each at the first row

    @classmethod
    def read(cls, view: View, mode: str, worker: int) -> _Weights:
        """Read what is needed; without parameters there are no rows."""
        infos = [info for info in view.catalogue.values() if info.role in PARAMETERS]
        if not infos:
            return cls((), np.zeros(0, np.int64), np.zeros(0, np.bool_), ())
        wanted = ("nan", "posinf", "neginf", "std", "abs_max")
        for home in {info.collection for info in infos}:
            view.plan(home, wanted)
        table = view.table([info.name for info in infos], wanted, mode, worker)
        first = [table.statistics[name][0].tolist() if len(table.steps) else [] for name in ("std", "abs_max")]
        return cls(infos, table.steps, _bad(table.statistics), list(zip(*first, strict=True)))

    def fresh(self, view: View, begin: list[int]) -> bool | None:
        """Tell whether the model was new at the first training step, from the shape of its parameters.

        New parameters are all alike (zeros, ones) or spread evenly over an interval; no training leaves them so. Drawn
        from a normal distribution they look like trained ones; that is why a third of all is enough.
        """
        if not len(self.steps) or any(info.moment == "after" for info in self.infos):
            return None
        if self.steps[:1].tolist() != begin:
            return False if self.steps[0] > begin[0] else None
        votes = [
            _looks_new(info, std, most)
            for info, (std, most) in zip(self.infos, self.first, strict=True)
            if np.isfinite(std) and (std == 0 or math.prod(info.shape) >= MANY)
        ]
        return sum(votes) >= FRESH_SHARE * len(votes) if votes else None


def _looks_new(info: TensorInfo, std: float, most: float) -> bool:
    """Tell whether elements with this deviation and largest modulus are alike, or spread evenly around 0."""
    if std <= 1e-6 * most or most == 0:
        return True
    even = math.sqrt(3)
    return abs(most / std / even - 1) < max(0.03, 0.5 / math.sqrt(math.prod(info.shape)))


def _skipped(norm: tuple[Ints, Floats], loss: tuple[Ints, Floats], weights: _Weights) -> frozenset[int]:
    """Return the steps with gradients that are not finite after which the training went on all the same.

    A step made with them would have spoilt the weights for good; so whoever drives the optimizer left it out.
    """
    suspects = norm[0][~np.isfinite(norm[1])]
    sound = weights.steps[~weights.bad] if len(weights.steps) else loss[0][np.isfinite(loss[1])]
    return frozenset(suspects[suspects < sound[-1]].tolist() if len(sound) else ())
