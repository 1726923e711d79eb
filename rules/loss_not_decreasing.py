"""loss_not_decreasing: a loss that stands still or rises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.rule import NO_STEP, Block, Facts, Floats, Ints, Judgement, Kind, Needs, Rule, State, parameter
from smdbg.store.format import TensorInfo

START_POINTS = 5  # the median of the first points is where the loss started
STANDARD_ERRORS = 2.0


@dataclass(frozen=True, kw_only=True)
class LossNotDecreasing(Rule):
    """The loss does not decrease, or increases.

    What it does
    ------------
    Every `num_steps` steps it compares the loss with the newest one saved at least `num_steps` steps earlier, and fires
    when it has decreased by less than `diff_percent` or increased by more than `increase_threshold_percent` (both in
    per cent of the earlier loss). It judges scalars that are finite; in mode eval if losses were saved there, else in
    train, else in global.

    Single losses are noisy, and most healthy runs have pairs that do not decrease. With `window` above 1 the medians
    of adjacent windows of that many points are compared instead, in train, else global, else eval: it fires when the
    median has dropped by less than `diff_percent`, or by less than two standard errors, `patience` times in a row, and
    stops looking once the loss has fallen by `until_fallen` from where it started.

    Why it matters
    --------------
    A loss that never falls is the plainest sign that nothing is learnt: a learning rate far off, labels that do not
    belong to the inputs, parameters the optimizer does not hold.

    Parameters
    ----------
    use_losses_collection (true or false, default true): judge the tensors of the collection `losses`; those that
    `include` or `collections` name are judged instead.
    num_steps (steps, default 10): compare with a loss at least that old, and as seldom.
    diff_percent (%, default 0.1): fire when the decrease is smaller.
    increase_threshold_percent (%, default 5): an increase above it is reported as such.
    window (points, default 1): compare medians of windows; 1 compares single losses.
    patience (windows, default 1): fire when it is so this often in a row.
    until_fallen (%, default none): stop once the loss has fallen by this share of its start.

    Example output
    --------------
    loss has not decreased: 0.3 at step 12 against 0.3 at step 0 (a decrease of 0 %, at least 0.1 % was expected).

    How to fix
    ----------
    Try learning rates ten times larger and smaller, overfit one batch on purpose, check that the optimizer holds the
    model's parameters and that labels and inputs are in the same order.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule LossNotDecreasing.
    """

    name: ClassVar[str] = "loss_not_decreasing"

    use_losses_collection: bool = parameter(True, help="judge the collection losses, if no tensors are named")
    num_steps: int = parameter(10, unit="steps", minimum=1, help="compare with a loss at least this old, and as seldom")
    diff_percent: float = parameter(0.1, unit="%", help="fire when the decrease is smaller")
    increase_threshold_percent: float = parameter(5.0, unit="%", minimum=0, help="report an increase above it as such")
    window: int = parameter(1, unit="points", minimum=1, help="compare medians of windows; 1 compares single losses")
    patience: int = parameter(1, unit="windows", minimum=1, help="fire when it is so this often in a row")
    until_fallen: float | None = parameter(None, unit="%", minimum=0, help="stop once it has fallen by so much")

    def needs(self) -> Needs:
        """Read scalars of losses (the mean of one element is its value)."""
        points = 2 if self.window == 1 else self.window * (self.patience + 1)
        return Needs(("count", "mean"), roles=("loss",), collections=("losses",), minimum=points)

    def applicable(self) -> str | None:
        """Ask for tensors when the collection is not to be used."""
        named = self.use_losses_collection or self.include or self.collections or self.roles
        return None if named else "use_losses_collection is off and none of include, collections and roles is set"

    def picks(self, info: TensorInfo) -> bool:
        """Pick losses by role or collection."""
        return self.use_losses_collection and super().picks(info)

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge one mode only."""
        order = ("eval", "train", "global") if self.window == 1 else ("train", "global", "eval")
        return [mode for mode in ([self.mode] if self.mode else order) if mode in present][:1]

    def kinds(self) -> tuple[Kind, ...]:
        """A decrease that is too small, and an increase that is too large."""
        return (
            Kind("decrease_percent", self.diff_percent, "decrease", lower_is_worse=True),
            Kind("increase_percent", self.increase_threshold_percent, "increase"),
        )

    def evaluate(self, block: Block, state: State) -> tuple[Judgement, State]:
        """Go through the points of each loss; the state is per loss, so that blocks can be cut anywhere."""
        value = block.stat("mean")
        # Of a loss recorded several times in a step, `count` says how often; it is one number all the same.
        single = (block.stat("count") == 1) | np.array([info.shape == () for info in block.infos], bool)
        usable = block.present & single & np.isfinite(value)
        answer = _Answer(block.steps, value.shape)
        later: State = {}
        for column, name in enumerate(block.names):
            rows = np.flatnonzero(usable[:, column])
            judge = self._points if self.window == 1 else self._windows
            later[name] = judge(answer, column, rows, value[rows, column], dict(state.get(name, {})))
        return answer.judgement(onsets=self.window > 1), later

    def message(self, facts: Facts) -> str:
        """Say what was compared."""
        word = "increased" if facts.kind.name == "increase" else "not decreased"
        return f"{facts.tensor} has {word}: {facts.note}."

    def hint(self, facts: Facts) -> str:
        """Say what to try."""
        return "Try another learning rate, and check that the optimizer holds the parameters and the labels fit."

    def _points(self, answer: _Answer, column: int, rows: Ints, values: Floats, kept: State) -> State:
        """Compare single losses. Kept: the points from the last one checked on."""
        steps = np.concatenate([np.array(kept.get("steps", []), np.int64), answer.steps[rows]])
        values = np.concatenate([np.array(kept.get("values", []), np.float64), values])
        if not len(steps):
            return kept
        old, last = len(steps) - len(rows), 0
        while (now := int(np.searchsorted(steps, steps[last] + self.num_steps))) < len(steps):
            then = int(np.searchsorted(steps, steps[now] - self.num_steps, side="right")) - 1
            drop = _percent(values[then], values[now])
            rising = -drop > self.increase_threshold_percent
            bad = rising or drop < self.diff_percent
            note = f"{values[now]:.4g} at step {steps[now]} against {values[then]:.4g} at step {steps[then]}"
            answer.put(int(rows[now - old]), column, bad, drop, rising, self._expected(note, drop, rising))
            last = now
        return {"steps": steps[last:].tolist(), "values": values[last:].tolist()}

    def _windows(self, answer: _Answer, column: int, rows: Ints, values: Floats, kept: State) -> State:
        """Compare windows. Kept: the start, the open window, the median and spread of the last, and the quiet time."""
        steps, points = kept.pop("steps", []), kept.pop("values", [])
        for row, value in zip(rows.tolist(), values.tolist(), strict=True):
            steps.append(int(answer.steps[row]))
            points.append(value)
            if len(kept.setdefault("start", [])) < START_POINTS:
                kept["start"].append(value)
            if len(points) == self.window:
                self._close(answer, column, row, steps, points, kept)
                steps, points = [], []
        return kept | {"steps": steps, "values": points}

    def _close(
        self, answer: _Answer, column: int, row: int, steps: list[int], points: list[float], kept: State
    ) -> None:
        """Judge a full window against the one before, at its last row."""
        now, spread = _median_and_spread(points)
        start = float(np.median(kept["start"]))
        if self.until_fallen is not None and start - now >= abs(start) * self.until_fallen / 100:
            kept["fallen"] = True
        if kept.get("fallen"):
            answer.put(row, column, False, _percent(start, now), False, "")
            return
        if "median" in kept:
            drop = _percent(kept["median"], now)
            noise = STANDARD_ERRORS * 1.2533 * float(np.hypot(spread, kept["spread"])) / self.window**0.5
            progress = drop >= self.diff_percent and kept["median"] - now >= noise
            if not kept.get("quiet"):
                kept["since"], kept["before"] = kept["first"], kept["last_before"]
            kept["quiet"] = 0 if progress else kept.get("quiet", 0) + 1
            kept["compared"] = kept.get("compared", 0) + 1
            if kept["compared"] >= self.patience:
                rising = -drop > self.increase_threshold_percent
                note = (
                    f"its median over steps {steps[0]} to {steps[-1]} is {now:.4g}, and {kept['median']:.4g} over the "
                    f"{self.window} points before"
                )
                bad = kept["quiet"] >= self.patience
                answer.since[row, column], answer.before[row, column] = kept["since"], kept["before"]
                answer.put(row, column, bad, drop, rising, self._expected(note, drop, rising))
        kept.update(median=now, spread=spread, first=steps[0], last_before=kept.get("last", NO_STEP), last=steps[-1])

    def _expected(self, note: str, drop: float, rising: bool) -> str:
        """Return the note with the change and what was expected."""
        if rising:
            return f"{note} (an increase of {-drop:.3g} %, above {self.increase_threshold_percent:g} %)"
        word, size = ("a decrease", drop) if drop >= 0 else ("an increase", -drop)
        return f"{note} ({word} of {size:.3g} %, a decrease of at least {self.diff_percent:g} % was expected)"


class _Answer:
    """A judgement in the making: arrays [rows, tensors], and for each tensor the note of its first violation."""

    def __init__(self, steps: Ints, shape: tuple[int, ...]) -> None:
        self.steps = steps
        self.judged, self.violated = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
        self.worst, self.kind = np.full(shape, np.nan), np.zeros(shape, np.int64)
        self.since, self.before = np.full(shape, NO_STEP, np.int64), np.full(shape, NO_STEP, np.int64)
        self.notes: dict[int, tuple[int, str]] = {}

    def put(self, row: int, column: int, bad: bool, drop: float, rising: bool, note: str) -> None:
        """Note a verdict on one loss at one row: `drop` is the decrease in per cent."""
        self.judged[row, column], self.violated[row, column] = True, bad
        self.worst[row, column], self.kind[row, column] = -drop if rising else drop, int(rising)
        if bad:
            self.notes.setdefault(column, (row, note))

    def judgement(self, onsets: bool) -> Judgement:
        """Return what was noted; `onsets`: with since and before."""
        notes = {(row, column): note for column, (row, note) in self.notes.items()}
        since, before = (self.since, self.before) if onsets else (None, None)
        return Judgement(self.judged, self.violated, self.worst, self.kind, since, before, notes)


def _percent(then: float, now: float) -> float:
    """Return the decrease in per cent of the earlier value: negative for an increase, infinite from 0."""
    drop = float(then) - float(now)
    return 100 * drop / abs(float(then)) if then else float(np.copysign(np.inf, drop)) if drop else 0.0


def _median_and_spread(points: list[float]) -> tuple[float, float]:
    """Return the median, and the standard deviation as the median absolute deviation estimates it."""
    median = float(np.median(points))
    return median, 1.4826 * float(np.median(np.abs(np.array(points) - median)))
