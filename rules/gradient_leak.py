"""gradient_leak: gradients that pile up from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.course import Course
from smdbg.analysis.rule import Facts, Floats, Ints, Kind, Needs, Sample, Severity, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.training import hurts, milder, places, training_mode
from smdbg.analysis.view import View

LINEAR = 0.4  # of a norm, at half the steps: one half would be in proportion
BEYOND = 10.0  # growth that leaves no doubt, whatever the loss does
PAIRS = 5  # of kept gradients that a verdict on their cosine takes


@dataclass(frozen=True, kw_only=True)
class GradientLeak(RunRule):
    """Gradients are not set to zero between steps: each holds the sum of all before it.

    What it does
    ------------
    A sum of gradients moves little from step to step, and grows in proportion to the steps. The rule looks at the
    global gradient norm at consecutive steps for the first one at which all of this holds since the start: the norm has
    grown `growth`-fold, the rank correlation of norm and step is above `trend`, the norm was at least 0.4 times as
    large half way, and it changes by less than `smooth` from one step to the next (median of the last `window`).
    Healthy trainings show each of these, and not all: with batches drawn at random the norm jumps, with all data in
    each batch it is smooth and falls. With `values`, the median cosine of full gradients that were kept at consecutive
    steps must be above `cosine` too, if there are five pairs or more; the message says when only norms were used. It is
    an error when the loss rises, does not fall, is not finite or is not known, or when the norm grew tenfold; else a
    warning.

    Why it matters
    --------------
    A missing zero_grad() raises no error. The step grows with every batch and points ever more to where the loss was
    steep long ago: the training overshoots, swings and diverges, or, with Adam, creeps.

    Parameters
    ----------
    window (steps, default 20): judge the smoothness over so many consecutive norms.
    growth (default 5): fire when the norm is above so many times its first.
    trend (default 0.85): and its rank correlation with the step is above this.
    smooth (default 0.05): and its usual change from step to step is below this share.
    cosine (default 0.95): and the cosine of kept gradients of consecutive steps is above this.
    values (true or false, default false): read full gradients where they were kept.

    Example output
    --------------
    gradients pile up: by step 39 the norm of gradient/layer1.weight and all others is 14 times its first, and changes
    by 4.1 % from step to step, since step 1 (judged by norms alone).

    How to fix
    ----------
    Call optimizer.zero_grad() once per step, on the optimizer that holds these parameters. If gradients are accumulated
    on purpose, divide by the number of batches and zero them after each step.

    References
    ----------
    PyTorch, torch.optim.Optimizer.zero_grad.
    """

    name: ClassVar[str] = "gradient_leak"

    window: int = parameter(20, unit="steps", minimum=5, help="judge the smoothness over so many consecutive norms")
    growth: float = parameter(5.0, minimum=1, help="fire when the norm is above so many times its first")
    trend: float = parameter(0.85, minimum=0, maximum=1, help="and its rank correlation with the step is above this")
    smooth: float = parameter(0.05, minimum=0, help="and its usual change from step to step is below this share")
    cosine: float = parameter(0.95, minimum=-1, maximum=1, help="and the cosine of kept gradients is above this")
    values: bool = parameter(False, help="read full gradients where they were kept")

    def needs(self) -> Needs:
        """Read the norms of gradients, and full gradients in pairs."""
        return Needs(
            ("l2",),
            values=self.values,
            history=1,
            roles=("gradient",),
            modes=("train", "global"),
            minimum=self.window + 1,
        )

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge training steps."""
        return training_mode(self, present)

    def kinds(self) -> tuple[Kind, ...]:
        """The norm over the first one."""
        return (Kind("norm_over_first", self.growth),)

    def measure(self, sample: Sample) -> Floats | None:
        """Return the step of the value before, the product with it, and both squared norms."""
        if not sample.earlier or sample.earlier[-1][1].shape != sample.value.shape:
            return None
        step, earlier = sample.earlier[-1]
        now, was = sample.value.ravel().astype(np.float64), earlier.ravel().astype(np.float64)
        return np.array([step, now @ was, was @ was, now @ now])

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge the course of each worker's norm."""
        troubles, most, seen = [], 0, 0
        for worker, mode in places(self, view):
            course = view.course(worker)
            steps, norms = _usable(course)
            seen = max(seen, len(steps))
            if len(steps) <= self.window:
                continue
            most = max(most, len(steps))
            row = self._piled(norms)
            if row is None:
                continue
            pairs = self._cosines(view, names, worker, mode, int(steps[row]))
            if len(pairs) < PAIRS or np.median(pairs) > self.cosine:
                found = self._trouble(view, names, (worker, mode), (steps, norms), row, pairs)
                troubles.append(found)
        return Verdicts(troubles=troubles, judged=names if most else (), steps=most, seen=seen)

    def grade(self, facts: Facts, course: Course) -> Severity:
        """It is an error where the training suffers, or where nobody knows."""
        hurt = course.learned is None or hurts(course, facts.since) or facts.worst >= BEYOND
        return self.severity if hurt else milder(self.severity)

    def message(self, facts: Facts) -> str:
        """Say how much they have grown, and how smoothly."""
        return f"gradients pile up: by step {facts.step} the norm of {facts.tensor} and all others is {facts.note}."

    def hint(self, facts: Facts) -> str:
        """Say what is missing."""
        return "Call zero_grad() once per step, on the optimizer that holds these parameters."

    def _piled(self, norms: Floats) -> int | None:
        """Return the index of the norm by which gradients have piled up since the start, None if they have not."""
        changes = np.abs(np.diff(np.log(norms)))
        usual = np.median(np.lib.stride_tricks.sliding_window_view(changes, self.window), axis=1)
        ends = np.arange(self.window, len(norms))
        start = float(np.median(norms[:3]))
        # A sum of gradients grows in proportion to the steps; what feeds on itself grows faster.
        linear = norms[ends // 2] > LINEAR * norms[ends]
        rows = ends[(usual < self.smooth) & (norms[ends] > self.growth * start) & linear]
        return int(rows[0]) if len(rows) and _trend(norms[: rows[0] + 1]) > self.trend else None

    def _cosines(self, view: View, names: Sequence[str], worker: int, mode: str, end: int) -> list[float]:
        """Return the cosines of all gradients at consecutive training steps up to one, where both were kept."""
        if not self.values:
            return []
        log = view.log(worker)
        trained = log.step[log.mode == mode].tolist()
        before = dict(zip(trained[1:], trained[:-1], strict=True))
        sums: dict[int, Floats] = {}
        for name in names:
            for step, (earlier, *products) in view.measured(self.label, name, mode, worker).items():
                if before.get(step) == earlier and step <= end:
                    sums[step] = sums.get(step, np.zeros(3)) + products
        return [float(dot / np.sqrt(was * now)) for dot, was, now in sums.values() if was > 0 and now > 0]

    def _trouble(
        self,
        view: View,
        names: Sequence[str],
        place: tuple[int, str],
        series: tuple[Ints, Floats],
        row: int,
        pairs: list[float],
    ) -> Trouble:
        (worker, mode), (steps, norms) = place, series
        step = int(steps[row])
        table = view.table(names, ("l2",), mode, worker)
        sizes = table.statistics["l2"][: max(int((table.steps <= step).sum()), 1)]
        largest = names[int(np.nan_to_num(sizes[-1]).argmax())] if len(sizes) else names[0]
        usual = np.median(np.abs(np.diff(np.log(norms[row - self.window : row + 1]))))
        how = f"cosine {min(pairs):.3f} or more in {len(pairs)} pairs" if pairs else "judged by norms alone"
        ratios = norms[row:] / np.median(norms[:3])
        smoothly = f"changes by {usual:.1%} from step to step".replace("%", " %")
        note = f"{ratios[0]:.2g} times its first, and {smoothly}, since step {steps[1]} ({how})"
        large = ratios > self.growth
        return Trouble(
            tensor=largest,
            worker=worker,
            mode=mode,
            step=step,
            last_step=int(steps[row:][large][-1]),
            violations=int(large.sum()),
            judged=len(steps) - self.window,
            worst=float(ratios.max()),
            since=int(steps[1]),
            before=int(steps[0]),
            note=note,
        )


def _usable(course: Course) -> tuple[Ints, Floats]:
    """Return the norms that are finite and above zero, without those of skipped steps."""
    steps, norms = course.gradient_norm
    keep = np.isfinite(norms) & (norms > 0)
    keep &= ~np.isin(steps, np.array(sorted(course.skipped), np.int64))
    return steps[keep], norms[keep]


def _trend(values: Floats) -> float:
    """Return the rank correlation of a series with its index."""
    ranks = values.argsort().argsort()
    return float(np.corrcoef(ranks, np.arange(len(values)))[0, 1])
