"""overfit: a validation loss that leaves the training loss behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.course import is_number
from smdbg.analysis.rule import Bools, Facts, Floats, Ints, Kind, Needs, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.view import View
from smdbg.rules._evaluations import TRAIN, VALIDATION, Evaluations, by_name, evaluations

Pair = tuple[str, str, str, str]  # training loss and its mode, validation loss and its mode
NOISE = 1.4826 / 2**0.5  # from the median of absolute differences to a standard deviation


@dataclass(frozen=True, kw_only=True)
class Overfit(RunRule):
    """The validation loss leaves the training loss behind.

    What it does
    ------------
    Pairs each evaluation with the training losses since the one before, and fires when (mean validation loss - mean
    training loss) / mean training loss is above `ratio_threshold` at `patience` evaluations in a row. An evaluation is
    what was saved in mode eval between two training losses. Where both losses are saved in one mode, they are told by
    name (`loss` and `val_loss`, `train-rmse` and `validation-rmse`). Training losses of zero or less are not judged.

    Many healthy models have a gap between the two losses. With `reference` set to minimum, the median of the last
    `window` validation losses is compared with the lowest such median so far: it fires when it is above that by more
    than `ratio_threshold`, and by more than `spreads` standard deviations of the validation loss between neighbouring
    evaluations (taken robustly), while the median of the training losses is lower than it was there.

    Why it matters
    --------------
    From there on the model learns its training data by heart: each further step makes it worse on all other data.

    Parameters
    ----------
    ratio_threshold (default 0.1): the validation loss may be above the other by this share.
    patience (evaluations, default 1): fire when it is so this often in a row.
    reference (default train): compare with the training loss (train) or with the lowest validation loss (minimum).
    window (evaluations, default 1): with minimum, compare medians of that many.
    spreads (default 0): with minimum, demand also this many standard deviations.
    evaluations (default 1): judge from this number of evaluations on.
    train_regex (default `^(train|training)[-_/]`): what a name of a training loss has that the other has not; it may
    have nothing.
    validation_regex (default `^(val|valid|validation|eval|test)(_[0-9]+)?[-_/]`): what a name of a validation loss has
    that the other has not.

    Example output
    --------------
    loss in mode eval is 0.82 at step 400, 15 % above its lowest, 0.713 at step 250, while the training loss fell from
    0.6 to 0.41.

    How to fix
    ----------
    Stop at the lowest validation loss and keep the weights from there. For more: weight decay, dropout, augmentation,
    more data or a smaller model.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule Overfit. L. Prechelt, Early Stopping - But When?, 1998.
    """

    name: ClassVar[str] = "overfit"

    ratio_threshold: float = parameter(0.1, minimum=0, help="the validation loss may be above by this share")
    patience: int = parameter(1, unit="evaluations", minimum=1, help="fire when it is so this often in a row")
    reference: str = parameter("train", choices=("train", "minimum"), help="what the validation loss is compared with")
    window: int = parameter(1, unit="evaluations", minimum=1, help="with minimum, compare medians of that many")
    spreads: float = parameter(0.0, minimum=0, help="with minimum, demand also this many standard deviations")
    evaluations: int = parameter(1, minimum=1, help="judge from this number of evaluations on")
    train_regex: str = parameter(TRAIN, help="what only the name of a training loss has")
    validation_regex: str = parameter(VALIDATION, help="what only the name of a validation loss has")

    def needs(self) -> Needs:
        """Read scalars of losses (the mean of one element is its value)."""
        return Needs(("mean",), roles=("loss",), collections=("losses",), minimum=self._enough)

    @property
    def _enough(self) -> int:
        window = self.window if self.reference == "minimum" else 1
        return max(self.evaluations, window + self.patience - 1)

    def modes(self, present: Sequence[str]) -> list[str]:
        """Read all modes: `mode` is that of the validation."""
        return list(present)

    def kinds(self) -> tuple[Kind, ...]:
        """The share by which the validation loss is above."""
        return (Kind("loss_ratio", self.ratio_threshold),)

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each pair of losses on each worker."""
        troubles: list[Trouble] = []
        judged: set[str] = set()
        steps = seen = pairs = 0
        for worker in view.run.workers():
            if self.workers and worker not in self.workers:
                continue
            for pair in self._pairs(view, names, worker):
                pairs += 1
                train, train_mode, validation, mode = pair
                found = evaluations(view.series(train, train_mode, worker), view.series(validation, mode, worker))
                ratio, bad, usable, since = self._compare(found)
                enough = usable & (np.arange(len(usable)) >= self._enough - 1)
                seen, steps = max(seen, len(usable)), max(steps, int(enough.sum()))
                if enough.any():
                    judged.add(validation)
                    troubles += self._troubles(pair, worker, found, ratio, bad & usable, enough, since)
        if not pairs:
            return Verdicts(not_applicable=f"nothing matched: {self._looked_for(view)}")
        detail = "" if steps else f"saw {seen} of the {self._enough} evaluations with a positive loss that it needs"
        return Verdicts(troubles=troubles, judged=sorted(judged), steps=steps, seen=seen, detail=detail)

    def message(self, facts: Facts) -> str:
        """Say what was compared."""
        return facts.note

    def hint(self, facts: Facts) -> str:
        """Say what to do."""
        return "Stop at the lowest validation loss; try weight decay, dropout, more data or a smaller model."

    def _looked_for(self, view: View) -> str:
        if not view.catalogue:
            return "the run has saved nothing yet"
        return f"it looks for losses in mode {self.mode or 'eval'} beside those of training, or for names in pairs"

    def _pairs(self, view: View, names: Sequence[str], worker: int) -> Iterator[Pair]:
        """Yield the pairs of losses: of one name in two modes, or of two names in one."""
        numbers = [name for name in names if is_number(view.catalogue[name])]
        validation = self.mode or "eval"
        training = [mode for mode in ("train", "global") if mode != validation]
        paired = by_name(numbers, self.train_regex, self.validation_regex)
        for name in numbers:
            there = {mode for mode in (validation, *training) if len(view.series(name, mode, worker)[0])}
            mode = next((mode for mode in training if mode in there), "")
            if validation in there and mode:
                yield name, mode, name, validation
            elif name in paired:
                for mode in there:
                    if len(view.series(paired[name], mode, worker)[0]):
                        yield paired[name], mode, name, mode

    def _compare(self, found: Evaluations) -> tuple[Floats, Bools, Bools, Ints]:
        """Return [evaluations]: the share above the reference, too much or not, usable or not, and the reference."""
        own = np.arange(len(found.first))
        usable = found.training > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.reference == "train":
                ratio = found.validation / found.training - 1
                return ratio, ratio > self.ratio_threshold, usable, own
            level, training = (_medians(series, self.window) for series in (found.validation, found.training))
            usable &= (found.validation > 0) & ~np.isnan(level)
            lowest = np.fmin.accumulate(level) if len(level) else level
            at = np.maximum.accumulate(np.where(level == lowest, own, 0)) if len(level) else own
            ratio = level / lowest - 1
            limit = max(self.ratio_threshold, self.spreads * _noise(found.validation))
            return ratio, (ratio > limit) & (training < training[at]), usable, at

    def _troubles(
        self, pair: Pair, worker: int, found: Evaluations, ratio: Floats, bad: Bools, judged: Bools, at: Ints
    ) -> list[Trouble]:
        """Return what is wrong with one pair of losses, if anything."""
        index = np.arange(len(bad))
        start = np.maximum.accumulate(np.where(bad, -1, index)) + 1  # of the streak that is still on
        violated = np.flatnonzero(bad & judged & (index - start + 1 >= self.patience))
        if not len(violated):
            return []
        first = int(violated[0])
        began = int(start[first])
        if self.reference == "minimum":  # it began to rise after the lowest one of the lowest median
            lowest = max(int(at[first]) - self.window + 1, 0)
            began = lowest + int(found.validation[lowest : at[first] + 1].argmin()) + 1
        return [
            Trouble(
                tensor=pair[2],
                worker=worker,
                mode=pair[3],
                step=int(found.last[first]),
                last_step=int(found.last[violated[-1]]),
                violations=len(violated),
                judged=int(judged.sum()),
                worst=float(ratio[violated].max()),
                since=int(found.first[began]),
                before=int(found.last[began - 1]) if began else None,
                note=self._note(pair, found, ratio, first, int(at[first])),
            )
        ]

    def _note(self, pair: Pair, found: Evaluations, ratio: Floats, now: int, at: int) -> str:
        where = f" in mode {pair[3]}" if pair[3] != pair[1] else ""
        share = f"{100 * ratio[now]:.3g} %"
        if self.reference == "train":
            return (
                f"{pair[2]}{where} is {found.validation[now]:.3g} at step {found.last[now]}, {share} above the training"
                f" loss since the evaluation before, {found.training[now]:.3g}."
            )
        level, training = (_medians(series, self.window) for series in (found.validation, found.training))
        return (
            f"{pair[2]}{where} is {level[now]:.3g} at step {found.last[now]}, {share} above its lowest,"
            f" {level[at]:.3g} at step {found.last[at]}, while the training loss fell from {training[at]:.3g} to"
            f" {training[now]:.3g}."
        )


def _medians(values: Floats, window: int) -> Floats:
    """Return the median of the last `window` values at each; NaN where there are fewer."""
    result = np.full(len(values), np.nan)
    if len(values) >= window:
        result[window - 1 :] = np.median(np.lib.stride_tricks.sliding_window_view(values, window), axis=1)
    return result


def _noise(values: Floats) -> float:
    """Return the standard deviation from one value to the next, as a share of their median, a trend taken out."""
    if len(values) < 3:
        return 0.0
    jumps = np.diff(values)
    return NOISE * float(np.median(np.abs(jumps - np.median(jumps)))) / float(np.median(values))
