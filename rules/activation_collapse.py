"""activation_collapse: layers that answer every sample alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.findings import Bools, Facts, Floats, Ints, Kind
from smdbg.analysis.idle_units import sizes
from smdbg.analysis.rule import Needs, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.training import places, training_mode
from smdbg.analysis.view import View
from smdbg.store.format import TensorInfo

SEVERAL = 8  # observations of a feature at a saved step, to speak of a spread


@dataclass(frozen=True, kw_only=True)
class ActivationCollapse(RunRule):
    """Almost all outputs of a layer are the same for every sample.

    What it does
    ------------
    A feature of a layer's output has collapsed when its standard deviation, over the batch and all other axes, is at
    most `tolerance` times its largest absolute value; one that is all zero, too. Fires when more than
    `threshold_layer` per cent of a layer's features have collapsed at `repeats` saved training steps in a row. It reads
    per-feature statistics. Without them only a layer that is constant as a whole is found, and others are not judged.
    Steps with fewer than 8 observations of each feature are passed over.

    Why it matters
    --------------
    What a layer says of every sample alike holds no information, and nothing behind it can get it back: the model ends
    up answering with a constant.

    Parameters
    ----------
    tolerance (default 1e-5): spread of a feature that is none, relative to its largest absolute value.
    threshold_layer (%, default 95): fire when a larger share of the features has collapsed.
    repeats (saved steps, default 5): fire when it is so this often in a row.

    Example output
    --------------
    64 of 64 features of relu1_output_0 are the same for every sample at step 90, 5 saved steps in a row.

    How to fix
    ----------
    Look at what comes before: inputs that are constant, units that are dead or saturated, weights that started at zero
    or shrank to it.

    References
    ----------
    Jing et al., Understanding dimensional collapse in contrastive self-supervised learning, 2022.
    """

    name: ClassVar[str] = "activation_collapse"

    tolerance: float = parameter(1e-5, minimum=0, help="spread that is none, relative to the largest absolute value")
    threshold_layer: float = parameter(
        95.0, unit="%", minimum=0, maximum=100, help="fire when a larger share of the features has collapsed"
    )
    repeats: int = parameter(5, unit="saved steps", minimum=1, help="fire when it is so this often in a row")

    def needs(self) -> Needs:
        """Read the statistics of whole outputs, for those without per-feature ones."""
        return Needs(("count", "std", "abs_max"), roles=("output",), minimum=self.repeats)

    def picks(self, info: TensorInfo) -> bool:
        """Pick floating outputs."""
        return info.role == "output" and info.dtype.startswith(("float", "bfloat"))

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge the training only."""
        return training_mode(self, present)

    def kinds(self) -> tuple[Kind, ...]:
        """The share of features that have collapsed."""
        return (Kind("collapsed_share", self.threshold_layer / 100),)

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each layer on each worker."""
        troubles: list[Trouble] = []
        judged: list[str] = []
        steps = seen = 0
        for name in names:
            for worker, mode in places(self, view):
                at, share, width = self._series(view, name, mode, worker)
                seen = max(seen, len(at) * (width > 0))
                bad = in_a_row(share > self.threshold_layer / 100, self.repeats)
                if len(at) < self.repeats or not (width or bad.any()):  # one that varies as a whole may still collapse
                    continue
                judged.append(name)
                steps = max(steps, len(at) - self.repeats + 1)
                if bad.any():
                    troubles.append(self._trouble(at, share, bad, width, (name, worker, mode)))
        detail = "" if judged or seen else f"no per-feature statistics over {SEVERAL} observations or more were kept"
        return Verdicts(troubles=troubles, judged=judged, steps=steps, seen=seen, detail=detail)

    def message(self, facts: Facts) -> str:
        """Say how many features of how many."""
        before = f", {self.repeats} saved steps in a row" if self.repeats > 1 else ""
        return f"{facts.note} of {facts.tensor} are the same for every sample at step {facts.step}{before}."

    def hint(self, facts: Facts) -> str:
        """Say where to look first."""
        return "Look at what comes before: constant inputs, dead or saturated units, weights that are zero."

    def _series(self, view: View, name: str, mode: str, worker: int) -> tuple[Ints, Floats, int]:
        """Return steps, the share of features that have collapsed at each, and how many there are (0: taken as one)."""
        counts, known = sizes(view, name, mode, worker), view.features(name, mode, worker)
        found = [(step, table) for step, table in known if counts[step] >= SEVERAL * len(table) > 0]
        if found:
            width = len(found[0][1])
            found = [(step, table) for step, table in found if len(table) == width]
            tables = np.stack([table for _, table in found]).astype(np.float64)
            largest = np.maximum(np.abs(tables[..., 3]), np.abs(tables[..., 4]))
            share: Floats = (tables[..., 2] <= self.tolerance * largest).mean(axis=1)
            return np.array([step for step, _ in found], np.int64), share, width
        if known:
            return np.zeros(0, np.int64), np.zeros(0), 0
        table = view.table([name], ("count", "std", "abs_max"), mode, worker)
        spread, largest = table.statistics["std"][:, 0], table.statistics["abs_max"][:, 0]
        rows = np.flatnonzero(table.statistics["count"][:, 0] >= SEVERAL)
        return table.steps[rows], (spread <= self.tolerance * largest)[rows].astype(np.float64), 0

    def _trouble(self, steps: Ints, share: Floats, bad: Bools, width: int, place: tuple[str, int, str]) -> Trouble:
        """Return what is wrong with a layer."""
        rows = np.flatnonzero(bad)
        first, since = int(rows[0]), int(rows[0]) - self.repeats + 1
        return Trouble(
            tensor=place[0],
            worker=place[1],
            mode=place[2],
            step=int(steps[first]),
            last_step=int(steps[rows[-1]]),
            violations=len(rows),
            judged=len(steps) - self.repeats + 1,
            worst=float(share[rows].max()),
            since=int(steps[since]),
            before=int(steps[since - 1]) if since else None,
            note=f"{round(share[first] * width)} of {width} features" if width else "all elements",
        )


def in_a_row(bad: Bools, repeats: int) -> Bools:
    """Tell where something holds for the `repeats`-th time in a row, or more."""
    index = np.arange(len(bad))
    broken = np.maximum.accumulate(np.where(bad, -1, index))
    held: Bools = index - broken >= repeats
    return held
