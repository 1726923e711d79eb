"""gradient_explosion: gradients that grow out of all proportion while the loss suffers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from smdbg.analysis.course import Course
from smdbg.analysis.rule import Bools, Facts, Floats, Ints, Kind, Needs, Severity, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.streaks import often
from smdbg.analysis.table import Table
from smdbg.analysis.training import earlier_medians, milder, places, training_mode
from smdbg.analysis.view import View

UNKNOWN, CERTAIN = 100.0, 1000.0  # growth that is a warning, and an error, where the loss is not known
AROUND, SOON = 50, 20  # steps before and after the beginning whose losses are compared
WORSE = 3.0  # times the loss before


@dataclass(frozen=True)
class _Large:
    """Norms that are too large: all arrays over the same steps; `begin` is where it began, an index like the kind."""

    steps: Ints
    norms: Floats
    ratio: Floats
    bad: Bools
    begin: int
    kind: int


@dataclass(frozen=True, kw_only=True)
class GradientExplosion(RunRule):
    """The norm of all gradients grows far above what it was, and the training suffers.

    What it does
    ------------
    Judges the global gradient norm, as the hook records it at every step, else from the saved gradients. It fires when
    the norm is above `factor` times the median of its last `window` values, and above `beyond` times every such median
    before, at `repeats` of `within` steps; or when the medians of consecutive stretches of `stretch` steps at least
    double `doublings` times in a row, above all that was before. Non-finite norms right after large ones count as
    large. Steps that the optimizer skipped, as loss scaling does, are left out. The finding stands at the gradient that
    grew most at that time; the message has the norm of the first layer over that of the last.

    A large norm alone is no fault: it grows when a plateau ends and when a fitted model meets a hard batch. So it is
    an error when something is not finite afterwards, or when the loss (its median over the next 20 or 50 steps) is
    three times what it was before and above where it began; a warning when it is three times what it was before, and
    nothing else. Where the loss is not known, it takes a hundredfold growth of the norm for a warning and a
    thousandfold one for an error.

    Why it matters
    --------------
    One step with a gradient a thousand times too large throws away what was learned, kills ReLU units for good, or ends
    in NaN. The norm shows it before the loss does.

    Parameters
    ----------
    factor (default 10): fire when the norm is above so many times the median of the last ones.
    beyond (default 3): and above so many times the largest such median before.
    window (steps, default 64): length of the running median.
    repeats, within (steps, default 3 and 5): at so many of the last so many steps.
    stretch (steps, default 20): length of the stretches that are compared for steady growth.
    doublings (stretches, default 3): fire when the norm doubles from each to the next, so often in a row.

    Example output
    --------------
    the gradient norm is 8.1e+03 at step 154, 2.1e+04 times its median over the 64 steps before, since step 152;
    gradient/layer2.weight grew most (3 of 400 steps).

    How to fix
    ----------
    Lower the learning rate, warm it up, or clip the gradients. If it comes at a single step, look at the data of that
    step; if at the start, at the initialisation and the scale of the inputs.

    References
    ----------
    Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks, ICML 2013. Zhang et al.:
    AutoTrainer, ICSE 2021.
    """

    name: ClassVar[str] = "gradient_explosion"

    factor: float = parameter(10.0, minimum=1, help="fire above so many times the median of the last norms")
    beyond: float = parameter(3.0, minimum=0, help="and above so many times the largest such median before")
    window: int = parameter(64, unit="steps", minimum=1, help="length of the running median")
    repeats: int = parameter(3, unit="steps", minimum=1, help="fire when it is so this often")
    within: int = parameter(5, unit="steps", minimum=1, help="among this many last steps")
    stretch: int = parameter(20, unit="steps", minimum=2, help="length of the stretches compared for steady growth")
    doublings: int = parameter(3, unit="stretches", minimum=1, help="fire when the norm doubles so often in a row")

    def needs(self) -> Needs:
        """Read the norms of gradients."""
        return Needs(("l2",), roles=("gradient",), modes=("train", "global"), minimum=self.within)

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge training steps."""
        return training_mode(self, present)

    def applicable(self) -> str | None:
        """Refuse a persistence that can never be reached."""
        return "repeats is larger than within, so it could never fire" if self.repeats > self.within else None

    def kinds(self) -> tuple[Kind, ...]:
        """A jump of the norm, and steady growth."""
        return (
            Kind("norm_over_median", self.factor, "jump"),
            Kind("norm_over_median", 2.0**self.doublings, "growth"),
        )

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge the course of each worker's norm."""
        troubles, most, seen = [], 0, 0
        for worker, mode in places(self, view):
            course = view.course(worker)
            steps, norms = course.gradient_norm
            keep = np.array([step not in course.skipped for step in steps.tolist()], bool)
            steps, norms = steps[keep], norms[keep]
            seen = max(seen, len(steps))
            if np.isfinite(norms).sum() < 2 or len(steps) < self.within:
                continue
            most = max(most, len(steps))
            found = self._jump(steps, norms) or self._growth(steps, norms)
            harm = _harm(course, found) if found is not None else None
            if found is not None and harm is not None:
                trouble = self._trouble(view, names, worker, mode, found)
                troubles.append(replace(trouble, severity=milder(self.severity, harm)))
        return Verdicts(troubles=troubles, judged=names if most else (), steps=most, seen=seen)

    def message(self, facts: Facts) -> str:
        """Say how large, beside what, and where."""
        return f"{facts.note} ({often(facts).replace('saved ', '')})."

    def hint(self, facts: Facts) -> str:
        """Say what to try."""
        return "Lower or warm up the learning rate, or clip the gradients; look at the data of the first bad step."

    def _jump(self, steps: Ints, norms: Floats) -> _Large | None:
        """Find norms far above their median."""
        median = earlier_medians(norms, self.window)
        level = np.fmax.accumulate(np.where(np.isnan(median), 0, median))
        with np.errstate(all="ignore"):
            ratio = norms / median
            large = (ratio > self.factor) & (norms > self.beyond * level)
        large |= ~np.isfinite(norms) & np.concatenate([[False], (large | ~np.isfinite(norms))[:-1]]) & large.any()
        total = np.concatenate([np.zeros(self.within, np.int64), np.cumsum(large)])
        bad = large & (total[self.within :] - total[: -self.within] >= self.repeats)
        if not bad.any():
            return None
        first = int(bad.argmax())
        start = max(first - self.within + 1, 0)
        return _Large(steps, norms, ratio, bad, start + int(large[start : first + 1].argmax()), 0)

    def _growth(self, steps: Ints, norms: Floats) -> _Large | None:
        """Find norms whose medians keep doubling."""
        count = len(norms) // self.stretch
        if count <= self.doublings:
            return None
        parts = norms[: count * self.stretch].reshape(count, self.stretch)
        levels = np.nan_to_num(np.median(parts, axis=1), posinf=0)  # 0 where one is not finite: not judged
        doubled = (levels[1:] >= 2 * levels[:-1]) & (levels[:-1] > 0)
        above = levels[1:] > np.fmax.accumulate(levels)[:-1]
        run = 0
        for index, one in enumerate((doubled & above).tolist()):
            run = run + 1 if one else 0
            if run >= self.doublings:
                begin = (index - run + 1) * self.stretch
                base = levels[index - run + 1]
                bad = (np.arange(len(norms)) >= (index + 1) * self.stretch) & (norms > base * 2**self.doublings)
                return _Large(steps, norms, norms / base, bad, begin, 1) if bad.any() else None
        return None

    def _trouble(self, view: View, names: Sequence[str], worker: int, mode: str, found: _Large) -> Trouble:
        """Return what is wrong, at the gradient that grew most."""
        first = int(found.bad.argmax())
        rows = np.flatnonzero(found.bad)
        step, since = int(found.steps[first]), int(found.steps[found.begin])
        tensor, share = _grown_most(view.table(names, ("l2", "abs_max"), mode, worker), since, step)
        worst = found.ratio[found.bad & np.isfinite(found.ratio)]
        over = "its level before" if found.kind else f"its median over the {self.window} steps before"
        note = (
            f"the gradient norm is {found.norms[first]:.2g} at step {step}, {found.ratio[first]:.2g} times {over}, "
            f"since step {since}; {tensor} grew most{share}"
        )
        return Trouble(
            tensor=tensor,
            worker=worker,
            mode=mode,
            step=step,
            last_step=int(found.steps[rows[-1]]),
            violations=len(rows),
            judged=len(found.steps),
            worst=float(worst.max()) if len(worst) else np.inf,
            kind=found.kind,
            since=since,
            before=int(found.steps[found.begin - 1]) if found.begin else None,
            note=note,
        )


def _harm(course: Course, found: _Large) -> Severity | None:
    """Return how much the training suffered: by the loss around the beginning, by the growth where it is not known."""
    since = int(found.steps[found.begin])
    if course.non_finite is not None and course.non_finite >= since:
        return Severity.ERROR
    if course.learned is None:
        most = float(np.max(found.ratio[found.bad]))
        return None if most < UNKNOWN else Severity.WARNING if most < CERTAIN else Severity.ERROR
    then = int(found.steps[found.bad.argmax()]) if found.kind else since
    start, before = course.start_level, course.level(since - AROUND, since)
    after = max(course.level(then, then + AROUND), course.level(then, then + SOON))
    if not start > 0 or not before > 0 and found.begin >= SOON:  # levels that may be below 0 have no ratio
        return Severity.WARNING if course.rises_after(since) else None
    before = before if before > 0 else start
    if after > max(WORSE * before, start):
        return Severity.ERROR
    return Severity.WARNING if after > WORSE * before else None


def _grown_most(table: Table, since: int, step: int) -> tuple[str, str]:
    """Return the gradient that grew most from before a step to about another, and the first layer's over the last's."""
    size = np.where(table.statistics["abs_max"] > 0, table.statistics["l2"], np.nan)
    earlier, later = size[table.steps < since], size[table.steps >= since]
    later = later[: max(int((table.steps[table.steps >= since] <= step).sum()), 1)]
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        now = np.nanmax(later, axis=0) if len(later) else np.nanmax(size, axis=0)
        growth = now / np.nanmedian(earlier, axis=0) if len(earlier) else now
    order = [i for i, info in enumerate(table.infos) if len(info.shape) >= 2 and now[i] > 0]
    share = ""
    if len(order) > 1:
        order.sort(key=lambda i: (table.infos[i].forward_order is None, table.infos[i].forward_order or 0, i))
        share = f", the first layer's is {now[order[0]] / now[order[-1]]:.2g} times the last's"
    most = int(np.nanargmax(growth)) if np.isfinite(growth).any() else 0
    return table.infos[most].name, share
