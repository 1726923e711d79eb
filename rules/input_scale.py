"""input_scale: inputs far from the scale that training needs, or that carry nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.course import Course
from smdbg.analysis.findings import Bools, Facts, Floats, Ints, Kind, Severity
from smdbg.analysis.rule import Needs, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.training import milder, places, training_mode
from smdbg.analysis.view import View
from smdbg.store.format import TensorInfo

WHOLE = ("mean", "std", "min", "max")
UNITS = ("mean", "standard deviation", "range")


@dataclass(frozen=True, kw_only=True)
class InputScale(RunRule):
    """The inputs of the model are not scaled, or all the same.

    What it does
    ------------
    Looks at what the first module of the model is given (floating numbers only), feature by feature where per-feature
    statistics were kept, else as a whole, and says which. Fires at a saved training step when the mean of a feature is
    further than `limit` from 0, or its standard deviation larger; and when no feature has changed, from sample to
    sample, over the last `constant_steps` saved steps: inputs that are all zero or otherwise constant.

    A finding is a warning; where the run did not learn it has the rule's severity.

    Why it matters
    --------------
    Features that are large make gradients large in proportion and saturate activations: the learning rate that fits one
    feature is far off for another. An input that never changes holds nothing to learn from.

    Parameters
    ----------
    limit (default 100): fire when the mean or the standard deviation of a feature is further from 0.
    constant_steps (saved steps, default 5): fire when nothing has changed over so many.

    Example output
    --------------
    feature 3 of 0_input_0 has a mean of 655 at step 0, beyond 100 (3 of 30 features).

    How to fix
    ----------
    Subtract the mean of each feature and divide by its standard deviation, both taken from the training data; for
    constant inputs, look at the loader and at the preprocessing.

    References
    ----------
    LeCun et al., Efficient BackProp, 1998.
    """

    name: ClassVar[str] = "input_scale"

    limit: float = parameter(100.0, minimum=0, help="fire when a mean or standard deviation is further from 0")
    constant_steps: int = parameter(5, unit="saved steps", minimum=2, help="fire when nothing has changed over so many")

    def needs(self) -> Needs:
        """Read the statistics of whole inputs, for those without per-feature ones."""
        return Needs((*WHOLE, "count"), roles=("input",))

    def picks(self, info: TensorInfo) -> bool:
        """Pick floating inputs of the first module, or of none."""
        floating = info.dtype.startswith(("float", "bfloat"))
        return info.role == "input" and info.forward_order in (0, None) and floating

    def looked_for(self) -> str:
        """Return in words which tensors the rule looks for."""
        named = self.include or self.collections or self.roles
        return super().looked_for() if named else "floating inputs of the first module"

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge the training only."""
        return training_mode(self, present)

    def kinds(self) -> tuple[Kind, ...]:
        """Mean, standard deviation and constant inputs."""
        return (
            Kind("feature_mean", self.limit, "mean"),
            Kind("feature_std", self.limit, "std"),
            Kind("feature_range", 0.0, "constant", lower_is_worse=True),
        )

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each input on each worker."""
        troubles: list[Trouble] = []
        judged: list[str] = []
        steps, wholly = 0, 0
        for name in names:
            for worker, mode in places(self, view):
                at, table, features = self._series(view, name, mode, worker)
                if not len(at):
                    continue
                judged.append(name)
                steps, wholly = max(steps, len(at)), wholly + (not features)
                trouble = self._trouble(at, table, features, (name, worker, mode))
                troubles += [trouble] if trouble is not None else []
        detail = f"{wholly} inputs have no per-feature statistics and were judged as a whole" if wholly else ""
        return Verdicts(troubles=troubles, judged=judged, steps=steps, detail=detail)

    def grade(self, facts: Facts, course: Course) -> Severity:
        """Return a warning, and what is given where the run did not learn."""
        return self.severity if course.learned is False else milder(self.severity)

    def message(self, facts: Facts) -> str:
        """Say which feature, and how large."""
        return facts.note

    def hint(self, facts: Facts) -> str:
        """Say what to do."""
        if facts.kind.name == "constant":
            return "Look at the loader and the preprocessing: nothing can be learnt from an input that never changes."
        return "Subtract the mean of each feature and divide by its standard deviation, as the training data have them."

    def _series(self, view: View, name: str, mode: str, worker: int) -> tuple[Ints, Floats, bool]:
        """Return steps, [steps, features, 4] (mean, std, min, max) and whether those are of features."""
        found = view.features(name, mode, worker)
        if found:
            width = len(found[0][1])
            found = [(step, table) for step, table in found if len(table) == width]
            stacked = np.stack([table[:, 1:] for _, table in found]).astype(np.float64)
            return np.array([step for step, _ in found], np.int64), stacked, True
        table = view.table([name], WHOLE, mode, worker)
        rows = np.flatnonzero(table.present[:, 0])
        whole = np.stack([table.statistics[statistic][rows, 0] for statistic in WHOLE], axis=1)[:, None]
        return table.steps[rows], whole, False

    def _trouble(
        self, steps: Ints, table: Floats, features: bool, place: tuple[str, int, str]
    ) -> Trouble | None:
        """Return what is wrong with an input, the first of it."""
        mean, std = np.abs(table[..., 0]), table[..., 1]
        large = [(values > self.limit).any(axis=1) for values in (mean, std)]
        constant = self._constant(table)
        kinds = np.stack([*large, constant])
        bad = np.flatnonzero(kinds.any(axis=0))
        if not len(bad):
            return None
        row, kind = int(bad[0]), int(kinds[:, bad[0]].argmax())
        same = np.flatnonzero(kinds[kind])
        since = row - (self.constant_steps - 1) * (kind == 2)
        values = (mean, std, table[..., 3] - table[..., 2])[kind]
        worst = 0.0 if kind == 2 else float(np.nanmax(values[same]))
        return Trouble(
            tensor=place[0],
            worker=place[1],
            mode=place[2],
            step=int(steps[row]),
            last_step=int(steps[same[-1]]),
            violations=len(same),
            judged=len(steps),
            worst=worst,
            kind=kind,
            since=int(steps[since]),
            before=int(steps[since - 1]) if since else None,
            note=self._text(place[0], int(steps[row]), table[row], kind, features),
        )

    def _constant(self, table: Floats) -> Bools:
        """Tell at which rows nothing has changed over as many as are asked for."""
        found = np.zeros(len(table), np.bool_)
        if len(table) >= self.constant_steps and table.shape[1]:
            windows = np.lib.stride_tricks.sliding_window_view(table, self.constant_steps, axis=0)
            found[self.constant_steps - 1 :] = (windows[:, :, 2].min(-1) == windows[:, :, 3].max(-1)).all(axis=1)
        return found

    def _text(self, name: str, step: int, row: Floats, kind: int, features: bool) -> str:
        """Return the message: of what, by how much."""
        if kind == 2:
            what = "zero" if not row[:, 2:].any() else "the same for every sample"
            return f"{name} is all {what} at step {step}, as over the last {self.constant_steps} saved steps."
        values = np.abs(row[:, kind])
        count, at = int((values > self.limit).sum()), int(np.nanargmax(values))
        of, many = (f"feature {at} of {name}", f" ({count} of {len(row)} features)") if features else (name, "")
        return f"{of} has a {UNITS[kind]} of {row[at, kind]:.3g} at step {step}, beyond {self.limit:g}{many}."
