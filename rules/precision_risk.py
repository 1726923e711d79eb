"""precision_risk: values that would not survive in half precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from smdbg.analysis.rule import Bools, Facts, Floats, Ints, Kind, Needs, Severity, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.training import places, training_mode
from smdbg.analysis.view import View
from smdbg.stats import exponent_histogram_names, overflow_share, underflow_share
from smdbg.store.format import TensorInfo

FORMATS = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
LARGEST = 65504.0  # the largest finite float16
PROBE = "exponent_pos_0"  # a bucket that every exponent histogram has
NAMES = exponent_histogram_names()
READ_BYTES = 64 << 20  # of exponent histograms at a time
ROLES = ("weight", "bias", "norm", "embedding", "gradient", "update", "input", "output")
OVER, UNDER = 0, 1


@dataclass(frozen=True, kw_only=True)
class PrecisionRisk(RunRule):
    """Values would overflow or underflow in a narrower format.

    What it does
    ------------
    Reads the exponent histograms that tensors have in training and fires when a larger share of the non-zero values
    than `overflow` would become infinite, or a larger share than `underflow` zero, in one of `formats`. Where no
    exponent histogram was kept it can only tell that the largest absolute value is above 65504, the end of float16, and
    says so. Scaling, as of losses or of float8 tensors, is not taken into account. A finding is at most an info unless
    a tensor of the run has the format itself: then it is at most a warning.

    Why it matters
    --------------
    A gradient that becomes zero in float16 is lost without a trace, and one value that overflows makes a whole step
    unusable.

    Parameters
    ----------
    formats (default float16, bfloat16, float8_e4m3fn, float8_e5m2): the formats to judge.
    overflow (%, default 0): fire when a larger share of the values would become infinite.
    underflow (%, default 10): fire when a larger share of the values would become zero.

    Example output
    --------------
    gradient/layer1.weight at step 40: 37 % of its values would become zero in float16.

    How to fix
    ----------
    Train in bfloat16 or with loss scaling, keep weights and their updates in float32, or scale what is so small or so
    large.

    References
    ----------
    P. Micikevicius et al., Mixed Precision Training, ICLR 2018, and FP8 Formats for Deep Learning, 2022.
    """

    name: ClassVar[str] = "precision_risk"

    formats: tuple[str, ...] = parameter(FORMATS, help="the formats to judge")
    overflow: float = parameter(0.0, unit="%", minimum=0, maximum=100, help="share that may become infinite")
    underflow: float = parameter(10.0, unit="%", minimum=0, maximum=100, help="share that may become zero")

    def needs(self) -> Needs:
        """Read the largest value, and whether there are exponent histograms."""
        return Needs(("abs_max", PROBE), roles=ROLES)

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge the training, where precision matters; without one what there is."""
        return training_mode(self, present) or super().modes(present)

    def applicable(self) -> str | None:
        """Refuse formats that are not known."""
        unknown = [name for name in self.formats if name not in FORMATS]
        return f"formats must be among {', '.join(FORMATS)}, and has {', '.join(unknown)}" if unknown else None

    def picks(self, info: TensorInfo) -> bool:
        """Pick floating-point tensors by role."""
        return super().picks(info) and "float" in info.dtype

    def kinds(self) -> tuple[Kind, ...]:
        """Too much that overflows, too much that underflows, and a largest value beyond float16."""
        return (
            Kind("overflow_share", self.overflow / 100, "become infinite"),
            Kind("underflow_share", self.underflow / 100, "become zero"),
            Kind("abs_max", LARGEST, "largest value"),
        )

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each tensor in each mode on each worker."""
        troubles: list[Trouble] = []
        judged: set[str] = set()
        steps = plain = whole = 0
        own = {info.dtype for info in view.catalogue.values()}
        for worker, mode in places(self, view):
            table = view.table(names, ("abs_max", PROBE), mode, worker)
            place = _Place(view, names, mode, worker, table.steps, own)
            kept = ~np.isnan(table.statistics[PROBE])
            usable = table.present & (kept | ~np.isnan(table.statistics["abs_max"]))
            steps = max(steps, int(usable.any(axis=1).sum()))
            judged.update(names[column] for column in np.flatnonzero(usable.any(axis=0)).tolist())
            without = usable & ~kept
            whole, plain = whole + int(kept.any(axis=0).sum()), plain + int(without.any(axis=0).sum())
            troubles += self._by_histogram(place, kept)
            if "float16" in self.formats:
                troubles += self._by_largest(place, without, table.statistics["abs_max"])
        detail = f"{plain} of {whole + plain} tensors judged by their largest value: no exponent histograms were kept"
        detail = (detail if plain else "") if steps else "no value that was saved is finite"
        return Verdicts(troubles=troubles, judged=sorted(judged), steps=steps, detail=detail)

    def message(self, facts: Facts) -> str:
        """Say how much, and in which formats."""
        return f"{facts.tensor} at step {facts.step}: {facts.note}."

    def hint(self, facts: Facts) -> str:
        """Say what to do."""
        return "Train in bfloat16 or with loss scaling, and keep weights and updates in float32."

    def _by_histogram(self, place: _Place, kept: Bools) -> list[Trouble]:
        """Judge the tensors whose exponents were kept: bool[rows, tensors]."""
        found = []
        columns = np.flatnonzero(kept.any(axis=0)).tolist()
        width = max(1, READ_BYTES // max(1, 8 * len(NAMES) * len(place.steps)))
        for start in range(0, len(columns), width):
            part = columns[start : start + width]
            counts = place.exponents(part)
            for index, column in enumerate(part):
                rows = np.flatnonzero(kept[:, column])
                shares = {
                    (kind, one): share(NAMES, counts[rows, index], one)
                    for one in self.formats
                    for kind, share in ((OVER, overflow_share), (UNDER, underflow_share))
                }
                found += self._worst_of(place, column, rows, shares)
        return found

    def _worst_of(
        self, place: _Place, column: int, rows: Ints, shares: dict[tuple[int, str], Floats]
    ) -> list[Trouble]:
        """Return the finding for one tensor, given each share at these rows, if one is too large."""
        limits = {OVER: self.overflow / 100, UNDER: self.underflow / 100}
        bad = {key: values > limits[key[0]] for key, values in shares.items()}
        every = np.logical_or.reduce(list(bad.values())) if bad else np.zeros(len(rows), np.bool_)
        if not every.any():
            return []
        at = int(every.argmax())
        parts = {key: values[at] for key, values in shares.items() if bad[key][at]}
        kind = min(key[0] for key in parts)
        words = {OVER: "become infinite", UNDER: "become zero"}
        texts = [f"{100 * part:.3g} % of its values would {words[how]} in {one}" for (how, one), part in parts.items()]
        concerned = {one for (_, one), mask in bad.items() if mask.any()}
        worst = max(float(shares[key][mask].max()) for key, mask in bad.items() if key[0] == kind and mask.any())
        return [self._trouble(place, column, rows, every, worst, kind, "; ".join(texts), concerned)]

    def _by_largest(self, place: _Place, usable: Bools, largest: Floats) -> list[Trouble]:
        """Judge the other tensors by their largest value, both [rows, tensors]."""
        over = usable & (largest > LARGEST)
        found = []
        for column in np.flatnonzero(over.any(axis=0)).tolist():
            rows = np.flatnonzero(usable[:, column])
            bad = over[rows, column]
            first = largest[rows[bad.argmax()], column]
            worst = float(largest[rows[bad], column].max())
            note = f"its largest value, {first:.3g}, would become infinite in float16 (no exponent histogram was kept)"
            found.append(self._trouble(place, column, rows, bad, worst, 2, note, {"float16"}))
        return found

    def _trouble(
        self, place: _Place, column: int, rows: Ints, bad: Bools, worst: float, kind: int, note: str, formats: set[str]
    ) -> Trouble:
        steps, first = place.steps[rows], int(bad.argmax())
        most = Severity.WARNING if formats & place.dtypes else Severity.INFO
        return Trouble(
            tensor=place.names[column],
            worker=place.worker,
            mode=place.mode,
            step=int(steps[first]),
            last_step=int(steps[bad][-1]),
            violations=int(bad.sum()),
            judged=len(rows),
            worst=worst,
            kind=kind,
            before=int(steps[first - 1]) if first else None,
            note=note,
            severity=min(self.severity, most, key=lambda one: one.rank),
        )


@dataclass(frozen=True)
class _Place:
    """The tensors of one worker in one mode, the steps of their table, and the dtypes that the run uses."""

    view: View
    names: Sequence[str]
    mode: str
    worker: int
    steps: Ints
    dtypes: set[str] = field(default_factory=set)

    def exponents(self, columns: Sequence[int]) -> Floats:
        """Return the exponent histograms [steps, columns, buckets] of some tensors; 0 where there is none."""
        names = [self.names[column] for column in columns]
        # There are hundreds of buckets: too many for the view to keep.
        found = self.view.run.stats_of(NAMES, mode=self.mode, tensors=names, worker=self.worker)
        counts = np.zeros((len(self.steps), len(columns), len(NAMES)))
        _, rows, source = np.intersect1d(self.steps, found[PROBE].steps, return_indices=True)
        for bucket, name in enumerate(NAMES):
            counts[rows, :, bucket] = np.nan_to_num(found[name].matrix[source])
        return counts
