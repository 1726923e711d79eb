"""check_input_images: images whose channels are not centred on zero."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.rule import Facts, Floats, Kind, Needs, Sample, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.training import places
from smdbg.analysis.view import View
from smdbg.rules._evaluations import compiled
from smdbg.stats import FEATURES
from smdbg.store.format import TensorInfo


@dataclass(frozen=True, kw_only=True)
class CheckInputImages(RunRule):
    """The channels of input images are not centred on zero.

    What it does
    ------------
    Adds up each channel of the images over the saved steps and fires when, after `threshold_samples` images or more,
    the mean of a channel is further than `threshold_mean` from zero. It reads full values; where only the statistics
    per feature were kept, of the same axis, it takes their means and says so.

    Why it matters
    --------------
    Networks are built and initialised for inputs around zero. With others the first layer learns the offset first, and
    gradients of one sign slow the rest.

    Parameters
    ----------
    threshold_mean (default 0.2): fire when the mean of a channel is further from zero.
    threshold_samples (images, default 500): judge from this number of images on.
    regex (default `.*input_image.*`): names of tensors with images, one image per index of the first axis.
    channel (axis, default 1): the axis of the channels.

    Example output
    --------------
    input_image: channel 2 has a mean of 117 over 512 images at step 15, further from 0 than 0.2.

    How to fix
    ----------
    Subtract the mean of each channel over the training set, and divide by its standard deviation, both in training and
    in evaluation.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule CheckInputImages.
    """

    name: ClassVar[str] = "check_input_images"

    threshold_mean: float = parameter(0.2, minimum=0, help="fire when the mean of a channel is further from zero")
    threshold_samples: int = parameter(500, unit="images", minimum=1, help="judge from this number of images on")
    regex: str = parameter(".*input_image.*", help="names of tensors with images")
    channel: int = parameter(1, unit="axis", help="the axis of the channels")

    def needs(self) -> Needs:
        """Read full values, and the number of elements where there are none."""
        return Needs(("count",), values=True)

    def picks(self, info: TensorInfo) -> bool:
        """Pick by name."""
        return compiled(self.regex).search(info.name) is not None

    def looked_for(self) -> str:
        """Name the expression."""
        return super().looked_for() if self.include or self.collections else f"names that match {self.regex}"

    def kinds(self) -> tuple[Kind, ...]:
        """The mean of a channel."""
        return (Kind("channel_mean", self.threshold_mean),)

    def measure(self, sample: Sample) -> Floats | None:
        """Return the number of images, then the sum and then the number of finite elements of each channel."""
        value = sample.value
        if not -value.ndim <= self.channel < value.ndim or value.ndim < 2 or value.dtype.kind not in "biuf":
            return None
        flat = np.moveaxis(value, self.channel, 0).reshape(value.shape[self.channel], -1)
        if value.dtype.kind != "f":
            return np.concatenate([[len(value)], flat.sum(axis=1, dtype=np.float64), np.full(len(flat), flat.shape[1])])
        finite = np.isfinite(flat)
        sums = flat.sum(axis=1, dtype=np.float64, where=finite)
        return np.concatenate([[len(value)], sums, finite.sum(axis=1)])

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each tensor in each mode on each worker."""
        troubles: list[Trouble] = []
        judged: set[str] = set()
        steps = 0
        most, by_features = 0.0, set()
        for worker, mode in places(self, view):
            for name in names:
                measured = view.measured(self.label, name, mode, worker)
                found = sorted(measured.items()) or list(self._features(view, name, mode, worker))
                by_features.update([name] if found and not measured else [])
                images, count, trouble = self._through(found, name, mode, worker)
                most, steps = max(most, images), max(steps, count)
                judged.update([name] if count else [])
                troubles += [trouble] if trouble is not None else []
        detail = f"statistics per feature used instead of full values: {', '.join(sorted(by_features))}"
        if not steps:
            detail = f"saw {most:.0f} of the {self.threshold_samples} images it needs, with axis {self.channel} theirs"
        return Verdicts(
            troubles=troubles,
            judged=sorted(judged),
            steps=steps,
            seen=int(most),
            detail=detail if by_features or not steps else "",
        )

    def message(self, facts: Facts) -> str:
        """Say which channel, and how far."""
        return f"{facts.tensor}: {facts.note}, further from 0 than {self.threshold_mean:g}."

    def hint(self, facts: Facts) -> str:
        """Say what to do."""
        return "Subtract the mean of each channel over the training set, and divide by its standard deviation."

    def _features(self, view: View, name: str, mode: str, worker: int) -> Iterator[tuple[int, Floats]]:
        """Yield what `measure` would, from statistics per feature of the same axis."""
        info = view.catalogue[name]
        axis, ndim = info.feature_axis, len(info.shape)
        if axis is None or ndim < 2 or axis % ndim != self.channel % ndim or not all(info.shape):
            return
        counts = dict(zip(*(part.tolist() for part in view.series(name, mode, worker, "count")), strict=True))
        for step, table in view.features(name, mode, worker):
            means = table[:, FEATURES.index("mean")].astype(np.float64)
            each = counts[step] / len(means)
            images = counts[step] / np.prod(info.shape[1:])
            yield step, np.concatenate([[images], np.nan_to_num(means) * each, np.where(np.isnan(means), 0, each)])

    def _through(
        self, found: Sequence[tuple[int, Floats]], name: str, mode: str, worker: int
    ) -> tuple[float, int, Trouble | None]:
        """Add up the images step by step; return how many, the number of steps judged, and what is wrong."""
        width = len(found[0][1]) if found else 0
        alike = [one for one in found if len(one[1]) == width]  # with as many channels as the first
        if not alike:
            return 0.0, 0, None
        steps = [step for step, _ in alike]
        total = np.cumsum([one for _, one in alike], axis=0)
        channels = (width - 1) // 2
        means = total[:, 1 : 1 + channels] / np.maximum(total[:, 1 + channels :], 1)
        farthest = np.abs(means).max(axis=1, initial=0.0)
        enough = total[:, 0] >= self.threshold_samples
        bad = np.flatnonzero(enough & (farthest > self.threshold_mean))
        if not len(bad):
            return float(total[-1, 0]), int(enough.sum()), None
        row = int(bad[0])
        at = int(np.abs(means[row]).argmax())
        trouble = Trouble(
            tensor=name,
            worker=worker,
            mode=mode,
            step=steps[row],
            last_step=steps[int(bad[-1])],
            violations=len(bad),
            judged=int(enough.sum()),
            worst=float(farthest[bad].max()),
            before=steps[row - 1] if row and enough[row - 1] else None,
            note=(
                f"channel {at} has a mean of {means[row, at]:.3g} over {total[row, 0]:.0f} images at step {steps[row]}"
            ),
        )
        return float(total[-1, 0]), int(enough.sum()), trouble
