"""poor_weight_initialization: signs of bad initial weights in the first saved steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.findings import Bools, Facts, Floats, Ints, Kind
from smdbg.analysis.rule import Needs, Sample, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.table import Table
from smdbg.analysis.training import places, training_mode
from smdbg.analysis.view import View
from smdbg.select import matcher
from smdbg.stats_extra import as_float64
from smdbg.store.format import TensorInfo

INPUT, GRADIENT, LOSS = "input", "gradient", "loss"
SPREAD = ("q05", "q95")


@dataclass(frozen=True, kw_only=True)
class PoorWeightInitialization(RunRule):
    """The first steps show signs of badly chosen initial weights.

    What it does
    ------------
    Looks at the first `steps` saved steps of the training for three signs, and each finding says which it is:
    (a) the largest variance among the inputs of activations is more than `threshold` times the smallest; (b) the
    gradient with the smallest spread, from its 5th to its 95th percentile, spreads less than `distribution_range`;
    (c) the loss has not fallen below its lowest for `patience` saved steps.

    The percentiles are those that were kept as statistics, or are taken from values; where there are neither, a whole
    range (smallest to largest element) below `distribution_range` proves (b), and else that gradient is not judged.

    Why it matters
    --------------
    Weights that start too small or too large let signals die out or grow from layer to layer, so that the first layers
    do not learn, or all of them badly.

    Parameters
    ----------
    activation_inputs_regex (default .*relu.*input): names of the inputs of activations.
    threshold (default 10): fire when the variances of two layers are further apart than this factor.
    distribution_range (default 0.001): fire when a gradient spreads less.
    patience (saved steps, default 5): fire when the loss does not fall for so long.
    steps (saved steps, default 10): look at so many from the start.

    Example output
    --------------
    the variance of relu3_input_0 is 0.0012 at step 0 and that of relu0_input_0 is 1.1, 917 times as much (a: variances
    of activation inputs).

    How to fix
    ----------
    Initialise by the number of inputs of each layer: He for ReLU, Glorot for tanh and sigmoid; put normalisation
    layers in.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule PoorWeightInitialization. Glorot and Bengio 2010, He et al. 2015.
    """

    name: ClassVar[str] = "poor_weight_initialization"

    activation_inputs_regex: str = parameter(".*relu.*input", help="names of the inputs of activations")
    threshold: float = parameter(10.0, minimum=1, help="fire when variances are further apart than this factor")
    distribution_range: float = parameter(0.001, minimum=0, help="fire when a gradient spreads less")
    patience: int = parameter(5, unit="saved steps", minimum=1, help="fire when the loss does not fall for so long")
    steps: int = parameter(10, unit="saved steps", minimum=1, help="look at so many from the start")

    def needs(self) -> Needs:
        """Read variances, ranges and percentiles; values of gradients where they were kept."""
        return Needs(("std", "min", "max", "mean", "count", "nan", "posinf", "neginf", *SPREAD), values=True, minimum=1)

    def picks(self, info: TensorInfo) -> bool:
        """Pick inputs of activations by name, gradients and losses by their roles."""
        return self._sign(info) is not None

    def looked_for(self) -> str:
        """Return in words which tensors the rule looks for."""
        if self.include or self.collections or self.roles:
            return super().looked_for()
        return f"names like {self.activation_inputs_regex}, role gradient or role loss"

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge the training only."""
        return training_mode(self, present)

    def kinds(self) -> tuple[Kind, ...]:
        """The three signs."""
        return (
            Kind("variance_ratio", self.threshold, "a"),
            Kind("percentile_range", self.distribution_range, "b", lower_is_worse=True),
            Kind("steps_without_decrease", float(self.patience), "c"),
        )

    def measure(self, sample: Sample) -> Floats | None:
        """Return the spread of a gradient's finite elements from the 5th to the 95th percentile."""
        if self._sign(sample.info) != GRADIENT:
            return None
        values = as_float64(sample.value)
        finite = values[np.isfinite(values)]
        return np.diff(np.percentile(finite, [5, 95])) if finite.size == values.size > 0 else None

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Look for each sign on each worker."""
        signs = {sign: [n for n in names if self._sign(view.catalogue[n]) == sign] for sign in (INPUT, GRADIENT, LOSS)}
        troubles: list[Trouble] = []
        judged: list[str] = []
        steps = seen = 0
        for worker, mode in places(self, view):
            for sign, look in ((INPUT, self._variances), (GRADIENT, self._gradients), (LOSS, self._losses)):
                table = view.table(signs[sign], self.needs().statistics, mode, worker)
                seen = max(seen, min(len(table.steps), self.steps))
                found, done, count = look(view, table)
                troubles += found
                judged += done
                steps = max(steps, count)
        return Verdicts(troubles=troubles, judged=judged, steps=steps, seen=seen, detail=self._detail(judged, signs))

    def message(self, facts: Facts) -> str:
        """Say what was seen."""
        return f"{facts.note}."

    def hint(self, facts: Facts) -> str:
        """Say what to try."""
        return "Initialise by the number of inputs of each layer (He for ReLU, Glorot for tanh), or normalise."

    def _sign(self, info: TensorInfo) -> str | None:
        """Return what a tensor is looked at for."""
        if info.role == GRADIENT or info.collection == "gradients":
            return GRADIENT
        if info.role == LOSS or info.collection == "losses":
            return LOSS
        named = matcher(f"re:{self.activation_inputs_regex}")(info.name)
        return INPUT if named or (info.role == INPUT and self.include) else None

    def _variances(self, view: View, table: Table) -> tuple[list[Trouble], list[str], int]:
        """Compare the variances of the layers at each step (a); the layer further from the others is the culprit."""
        names = [info.name for info in table.infos]
        variance = table.statistics["std"][: self.steps] ** 2
        rows = np.flatnonzero((~np.isnan(variance)).sum(axis=1) > 1)
        if not len(rows):
            return [], [], 0
        done = [names[column] for column in np.flatnonzero(~np.isnan(variance[rows]).all(axis=0))]
        most, least = np.nanmax(variance[rows], axis=1), np.nanmin(variance[rows], axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(most > least, most / least, 1.0)
        bad = np.flatnonzero(ratio > self.threshold)
        if not len(bad):
            return [], done, len(rows)
        row = rows[bad[0]]
        high, low = int(np.nanargmax(variance[row])), int(np.nanargmin(variance[row]))
        middle = np.nanmedian(variance[row])
        culprit = high if most[bad[0]] * least[bad[0]] > middle**2 else low
        text = (
            f"the variance of {names[low]} is {variance[row, low]:.3g} at step {table.steps[row]} and that of "
            f"{names[high]} is {variance[row, high]:.3g}, {ratio[bad[0]]:.3g} times as much (a: variances of "
            "activation inputs)"
        )
        return [self._trouble(0, table, names[culprit], rows, bad, float(ratio[bad].max()), text)], done, len(rows)

    def _gradients(self, view: View, table: Table) -> tuple[list[Trouble], list[str], int]:
        """Look for the gradient that spreads least (b): each that spreads too little at some step is named once."""
        spread, proof = self._spreads(view, table)
        known = ~np.isnan(spread)
        names = [info.name for info in table.infos]
        done = [names[column] for column in np.flatnonzero(known.any(axis=0))]
        least = np.where(known, spread, np.inf).min(axis=1, initial=np.inf)
        rows = np.flatnonzero(known.any(axis=1))
        bad = np.flatnonzero(least[rows] < self.distribution_range)
        if not len(bad):
            return [], done, len(rows)
        row = rows[bad[0]]
        column = int(np.nanargmin(spread[row]))
        how = "its whole range, percentiles were not kept" if proof[row, column] else "5th to 95th percentile"
        text = (
            f"{names[column]} spreads over {spread[row, column]:.3g} at step {table.steps[row]}, less than "
            f"{self.distribution_range:g} ({how}) (b: spread of gradients)"
        )
        worst = float(least[rows[bad]].min())
        return [self._trouble(1, table, names[column], rows, bad, worst, text)], done, len(rows)

    def _spreads(self, view: View, table: Table) -> tuple[Floats, Bools]:
        """Return the spread of each gradient at each step, NaN where unknown, and whether it is the whole range."""
        part = {name: matrix[: self.steps] for name, matrix in table.statistics.items()}
        finite = part["nan"] + part["posinf"] + part["neginf"] == 0
        spread = part["q95"] - part["q05"]
        for column, info in enumerate(table.infos):
            for step, found in view.measured(self.label, info.name, table.mode, table.worker).items():
                row = int(np.searchsorted(table.steps, step))
                if row < len(spread):
                    spread[row, column] = found[0]
        whole = part["max"] - part["min"]
        proof = np.isnan(spread) & (whole < self.distribution_range)
        spread = np.where(finite, np.where(proof, whole, spread), np.nan)
        return spread, proof

    def _losses(self, view: View, table: Table) -> tuple[list[Trouble], list[str], int]:
        """Count for how long each loss has not fallen below its lowest (c)."""
        troubles, done, most = [], [], 0
        for column, info in enumerate(table.infos):
            number = (table.statistics["count"][:, column] == 1) | (info.shape == ())
            rows = np.flatnonzero(table.present[:, column] & number)[: self.steps]
            loss = table.statistics["mean"][rows, column]
            if len(rows) <= self.patience:
                continue
            done.append(info.name)
            lowest = np.minimum.accumulate(np.where(np.isnan(loss), np.inf, loss))
            falls = np.concatenate([[True], lowest[1:] < lowest[:-1]])
            waited = np.arange(len(rows)) - np.maximum.accumulate(np.where(falls, np.arange(len(rows)), 0))
            most = max(most, len(rows) - self.patience)
            bad = np.flatnonzero(waited >= self.patience)
            if len(bad):
                start = int(bad[0]) - self.patience
                text = (
                    f"{info.name} has not fallen below {lowest[start]:.4g} for {self.patience} saved steps, "
                    f"{table.steps[rows[start]]} to {table.steps[rows[bad[0]]]} (c: loss)"
                )
                found = self._trouble(2, table, info.name, rows, bad, float(waited.max()), text)
                troubles.append(found)
        return troubles, done, most

    def _trouble(
        self, kind: int, table: Table, name: str, rows: Ints, bad: Ints, worst: float, text: str
    ) -> Trouble:
        """Return a finding: `bad` are positions in the `rows` that were judged."""
        steps = table.steps[rows]
        first = int(bad[0])
        since = first - self.patience + 1 if kind == 2 else first
        return Trouble(
            tensor=name,
            worker=table.worker,
            mode=table.mode,
            step=int(steps[first]),
            last_step=int(steps[bad[-1]]),
            violations=len(bad),
            judged=len(steps),
            worst=worst,
            kind=kind,
            since=int(steps[since]),
            before=int(steps[since - 1]) if since else None,
            note=text,
        )

    def _detail(self, judged: Sequence[str], signs: Mapping[str, Sequence[str]]) -> str:
        """Return which signs could not be looked for."""
        done = set(judged)
        missing = {
            INPUT: "a: two inputs of activations",
            GRADIENT: "b: percentiles or values of gradients",
            LOSS: f"c: {self.patience + 1} losses",
        }
        left = [text for sign, text in missing.items() if done.isdisjoint(signs[sign])]
        return f"not to be had were {'; '.join(left)}" if left else ""
