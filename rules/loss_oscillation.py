"""loss_oscillation: a loss that swings up and down over long stretches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.findings import Floats
from smdbg.analysis.losses import Loss, blocks_of, losses_of, noise_of, too_few, training_mode
from smdbg.analysis.rule import Facts, Kind, Needs, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.view import View

BLOCKS = 10  # so many a verdict takes: fewer do not tell
SETTLED = 0.25  # of the run: what comes before is the fall that every training begins with
CERTAIN = 1.8  # standard errors of a correlation: of white noise with n blocks it is 1 / sqrt(n)
ABOVE_NOISE = 2.5  # times what the noise within blocks lets their means differ by
SHORT = 8  # losses: blocks for the search for a period
PERIODS = 24  # of these blocks: fewer have no room for three periods
PERIOD = 0.6, 7.0  # correlation of losses one period apart, in itself and in standard errors
SMOOTH = 0.4  # correlation of each loss with the next: where the same batches come in the same order, it is near 0
LARGE = 0.5  # swing of the logarithms with a period


@dataclass(frozen=True, kw_only=True)
class LossOscillation(RunRule):
    """The loss swings: stretches of high and of low losses follow each other.

    What it does
    ------------
    Leaves out the first quarter and takes the trend out of the rest; of losses above 0 it takes the logarithm, since
    swings get smaller as the loss does. It fires in two cases.

    Blocks of `block` losses (and of more, up to a tenth of them) alternate: the correlation of each mean with the
    next is below `correlation`, clearly so for their number, and the swing is above `amplitude` per cent of the loss
    and 2.5 times what the noise within the blocks explains.

    Or the losses repeat themselves with a period: they rise and fall smoothly, by half of their size and more, and at a
    distance of one period are alike. That is what data sorted by class do.

    Why it matters
    --------------
    Losses jump from batch to batch in every healthy training; that whole stretches do is the sign of a learning rate or
    momentum at its limit, or of data that come sorted instead of shuffled.

    Parameters
    ----------
    block (losses, default 32): so many are averaged, at least.
    correlation (default -0.5): fire below this correlation of neighbouring blocks.
    amplitude (%, default 10): and when blocks differ from their trend by more than this share of the mean loss.

    Example output
    --------------
    loss swings: means over 40 losses rise and fall by 38 % in turn, from step 205 to 819 (correlation of neighbours
    -0.97 over 15 blocks).

    How to fix
    ----------
    Lower the learning rate or the momentum, and shuffle the data anew in every epoch.

    References
    ----------
    Zhang et al., AutoTrainer (ICSE 2021), on oscillating losses.
    """

    name: ClassVar[str] = "loss_oscillation"

    block: int = parameter(32, unit="losses", minimum=2, help="so many are averaged, at least")
    correlation: float = parameter(-0.5, minimum=-1, maximum=0, help="fire below this correlation of neighbours")
    amplitude: float = parameter(10.0, unit="%", minimum=0, help="and above this share of the mean loss")

    def needs(self) -> Needs:
        """Read losses: ten blocks after the first quarter."""
        least = math.ceil(BLOCKS * self.block / (1 - SETTLED))
        return Needs(("count", "mean"), roles=("loss",), collections=("losses",), minimum=least)

    def kinds(self) -> tuple[Kind, ...]:
        """The correlation of neighbouring blocks, and losses with a period."""
        return Kind("correlation", self.correlation, "in turn", lower_is_worse=True), Kind("period", None, "period")

    def modes(self, present: Sequence[str]) -> list[str]:
        """Judge the training only."""
        return training_mode(self, present)

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each loss of each worker."""
        losses = losses_of(self, view, names)
        long = [loss for loss in losses if loss.finite.sum() >= self.needs().minimum]
        if not long:
            return too_few(losses, self.needs().minimum)
        found = [trouble for loss in long if (trouble := self._one(loss)) is not None]
        return Verdicts(
            troubles=found, judged=[loss.name for loss in long], steps=max(len(loss.steps) for loss in long)
        )

    def _one(self, loss: Loss) -> Trouble | None:
        """Judge one loss."""
        rows = np.flatnonzero(loss.finite)
        rows = rows[int(SETTLED * len(rows)) :]
        values, steps = loss.values[rows], loss.steps[rows]
        kind, found = 1, _periodic(values)
        if found is None:
            kind, found = 0, self._in_turn(values)
        if found is None:
            return None
        worst, note = found
        return Trouble(
            tensor=loss.name,
            worker=loss.worker,
            mode=loss.mode,
            step=int(steps[0]),
            last_step=int(steps[-1]),
            violations=len(rows),
            judged=len(loss.steps),
            worst=worst,
            kind=kind,
            note=note.format(first=steps[0], last=steps[-1]),
            severity=loss.severity(self.severity),
        )

    def _in_turn(self, values: Floats) -> tuple[float, str] | None:
        """Return the correlation of neighbouring blocks that alternate, with a note; None where none do."""
        scaled, width = _scaled(values), self.block
        while len(values) >= BLOCKS * width:
            for shift in (0, width // 2):  # blocks that are half a swing off show nothing
                found = self._swing(blocks_of(scaled[: len(scaled) - shift], width))
                if found is not None:
                    return found[0], (
                        f"means over {width} losses rise and fall by {100 * found[1]:.3g} % in turn, from step "
                        f"{{first}} to {{last}} (correlation of neighbours {found[0]:.2f} over {found[2]} blocks)"
                    )
            width += max(width // 4, 1)
        return None

    def _swing(self, blocks: Floats) -> tuple[float, float, int] | None:
        """Return (correlation, swing as a share of the loss, blocks) of blocks [n, width] that swing, else None."""
        means = blocks.mean(axis=1)
        residue = _detrended(means)
        total = float((residue**2).sum())
        if total <= 0 or len(means) < BLOCKS:
            return None
        correlation, size = float((residue[1:] * residue[:-1]).sum()) / total, float(residue.std())
        if correlation >= min(self.correlation, -CERTAIN / len(means) ** 0.5) or size <= self.amplitude / 100:
            return None
        noise = float(np.median([noise_of(block) for block in blocks])) / blocks.shape[1] ** 0.5
        return (correlation, size, len(means)) if size > ABOVE_NOISE * noise else None

    def message(self, facts: Facts) -> str:
        """Say how much and how long."""
        return f"{facts.tensor} swings: {facts.note}."

    def hint(self, facts: Facts) -> str:
        """Say what to try."""
        return "Lower the learning rate or the momentum, and shuffle the data anew in every epoch."


def _scaled(values: Floats) -> Floats:
    """Return logarithms of positive values, so that a share of the loss is a distance; others over their usual size."""
    if (values > 0).all():
        return np.log(values)
    return np.asarray(values / max(float(np.median(np.abs(values))), 1e-12), np.float64)


def _detrended(values: Floats) -> Floats:
    """Return values less a cubic through them."""
    at = np.linspace(-1, 1, len(values))
    return np.asarray(values - np.polyval(np.polyfit(at, values, 3), at), np.float64)


def _correlations(values: Floats) -> Floats:
    """Return float64[n]: the correlation of values with those at each distance."""
    count = len(values)
    power = np.abs(np.fft.rfft(values, 2 * count)) ** 2
    found = np.fft.irfft(power)[:count]
    return np.asarray(found / max(float(found[0]), 1e-300) * count / (count - np.arange(count)), np.float64)


def _periodic(values: Floats) -> tuple[float, str] | None:
    """Return the period, in losses, of those that rise and fall smoothly and repeat themselves, with a note."""
    scaled = _scaled(values)
    if len(scaled) < PERIODS * SHORT:
        return None
    residue = _detrended(blocks_of(scaled, SHORT).mean(axis=1))
    found = _correlations(residue)[: len(residue) // 3]
    below = np.flatnonzero(found < 0)
    if not len(below) or residue.std() < LARGE:
        return None
    peak = int(below[0]) + int(found[below[0] :].argmax())
    if found[peak] < PERIOD[0] or found[peak] * len(residue) ** 0.5 < PERIOD[1]:
        return None
    if _correlations(_detrended(scaled))[1] < SMOOTH:
        return None
    return float(peak * SHORT), (
        f"from step {{first}} to {{last}} it rises and falls with a period of about {peak * SHORT} losses (correlation "
        f"{found[peak]:.2f}), as when data come sorted by class"
    )
