"""class_imbalance: classes with too few labels, or with too many mispredictions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from smdbg.analysis.rule import Facts, Kind, Needs, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.training import places
from smdbg.analysis.view import View
from smdbg.rules._classes import IGNORED, Array, as_classes, paired, predicted
from smdbg.rules._evaluations import compiled
from smdbg.store.format import TensorInfo

IMBALANCE, MISPREDICTION = 0, 1
NO_CLASSES = "are no classes: it needs whole numbers or text"


@dataclass(frozen=True, kw_only=True)
class ClassImbalance(RunRule):
    """Some classes have far fewer labels than others, or are mostly mispredicted.

    What it does
    ------------
    Counts the labels of each class over the saved steps. From `samples` labels on it fires when the most frequent class
    has more than `threshold_imbalance` times as many as the rarest one, or when more than `threshold_misprediction` of
    the labels of a class were predicted as another. Classes that never occur are not counted; labels of -100 are left
    out. It needs full values of labels, and of predictions for the second part.

    Why it matters
    --------------
    A model trained on such labels learns to name the frequent class, and its accuracy hides it.

    Parameters
    ----------
    threshold_imbalance (default 10): fire when the largest count is more than this many times the smallest.
    threshold_misprediction (default 0.7): fire when a class has a larger share of wrong predictions.
    samples (labels, default 500): judge from this number on.
    argmax (true or false, default false): predictions are scores; the class is the largest along the class axis.
    labels_regex (default `.*labels`): names of labels, beside those of role label.
    predictions_regex (default `.*predictions`): names of predictions, beside those of role prediction.

    Example output
    --------------
    labels at step 3: class 1 has 10 of 1,000 labels and class 0 has 990, 99 times as many.

    How to fix
    ----------
    Sample or weight the rare classes more, collect more of them, and look at figures per class rather than accuracy.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule ClassImbalance.
    """

    name: ClassVar[str] = "class_imbalance"

    threshold_imbalance: float = parameter(10.0, minimum=1, help="largest count to smallest count")
    threshold_misprediction: float = parameter(0.7, minimum=0, maximum=1, help="share of wrong predictions of a class")
    samples: int = parameter(500, unit="labels", minimum=1, help="judge from this number on")
    argmax: bool = parameter(False, help="predictions are scores; the class is the largest along the class axis")
    labels_regex: str = parameter(".*labels", help="names of labels, beside those of role label")
    predictions_regex: str = parameter(".*predictions", help="names of predictions, beside those of role prediction")

    def needs(self) -> Needs:
        """Read full values."""
        return Needs(values=True, roles=("label", "prediction"))

    def picks(self, info: TensorInfo) -> bool:
        """Pick by role or name."""
        return self._is_label(info) or self._is_prediction(info)

    def looked_for(self) -> str:
        """Name the expressions too."""
        return f"{super().looked_for()} or names that match {self.labels_regex}"

    def kinds(self) -> tuple[Kind, ...]:
        """Counts that are too different, and a class that is mispredicted."""
        return (
            Kind("count_ratio", self.threshold_imbalance, "imbalance"),
            Kind("mispredicted_share", self.threshold_misprediction, "misprediction"),
        )

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each tensor of labels, in each mode, on each worker."""
        infos = [view.catalogue[name] for name in names]
        labels = [info.name for info in infos if self._is_label(info)]
        predictions = [info.name for info in infos if self._is_prediction(info) and info.name not in labels]
        if not labels and names:
            return Verdicts(not_applicable=f"nothing matched: it needs labels, and found only {', '.join(names)}")
        parts = []
        for worker, mode in places(self, view):
            for label, prediction in paired(labels, predictions):
                if worker in view.run.tensor(label).workers():
                    parts.append(self._count(view, label, prediction, mode, worker))
        troubles = [trouble for part in parts for trouble in part.troubles()]
        seen = max((part.total for part in parts), default=0)
        why = next((part.why for part in parts if part.why), "")
        short = f"saw {seen} of the {self.samples} labels it needs, as full values"
        return Verdicts(
            troubles=troubles,
            judged=sorted({name for part in parts for name in part.judged}),
            steps=max((part.judged_steps for part in parts), default=0),
            seen=seen,
            detail=why or ("" if any(part.judged for part in parts) else short),
        )

    def message(self, facts: Facts) -> str:
        """Say which classes, and how many."""
        return f"{facts.tensor} at step {facts.step}: {facts.note}."

    def hint(self, facts: Facts) -> str:
        """Say what to do."""
        return "Sample or weight the rare classes more, and look at the figures of each class rather than accuracy."

    def _is_label(self, info: TensorInfo) -> bool:
        return info.role == "label" or compiled(self.labels_regex).search(info.name) is not None

    def _is_prediction(self, info: TensorInfo) -> bool:
        return info.role == "prediction" or compiled(self.predictions_regex).search(info.name) is not None

    def _count(self, view: View, label: str, prediction: str, mode: str, worker: int) -> _Counts:
        """Go through the labels of one tensor step by step, with the predictions of the same step."""
        counts = _Counts(self, label, prediction, mode, worker)
        known: set[int] = set()
        if prediction and worker in view.run.tensor(prediction).workers():
            known = set(view.value_steps(prediction, mode, worker))
        steps = view.value_steps(label, mode, worker)
        answers = view.values(prediction, mode, worker, [step for step in steps if step in known]) if known else None
        for step, value in view.values(label, mode, worker, steps):
            answer = next(answers)[1] if answers is not None and step in known else None
            counts.add(step, value, answer)
        return counts


@dataclass
class _Counts:
    """What has been counted of one tensor of labels, and the steps at which it was too much."""

    rule: ClassImbalance
    label: str
    prediction: str
    mode: str
    worker: int
    total: int = 0
    judged_steps: int = 0
    why: str = ""
    judged: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Start with nothing counted."""
        self._counts: Counter[object] = Counter()
        self._answered: Counter[object] = Counter()
        self._wrong: Counter[object] = Counter()
        self._steps: dict[int, list[int]] = {IMBALANCE: [], MISPREDICTION: []}
        self._bad: dict[int, list[tuple[int, float, str]]] = {IMBALANCE: [], MISPREDICTION: []}

    def add(self, step: int, value: Array, answer: Array | None) -> None:
        """Count the labels of a step, and judge once there are enough."""
        labels = as_classes(value)
        if labels is None:
            self.why = f"{self.label} {NO_CLASSES}"
            return
        valid = labels != IGNORED if labels.dtype.kind == "i" else np.ones(labels.shape, np.bool_)
        _add(self._counts, labels[valid])
        self.total += int(valid.sum())
        guesses = None if answer is None else predicted(value, answer, self.rule.argmax)
        if guesses is not None:
            _add(self._answered, labels[valid])
            _add(self._wrong, labels[valid & (guesses != labels)])
        elif answer is not None:
            self.why = (
                f"{self.prediction} do not fit {self.label}, so only labels were judged: set argmax if they are scores"
            )
        elif not self.prediction:
            self.why = "no predictions were saved, so only labels were judged"
        if self.total >= self.rule.samples:
            self.judged_steps += 1
            self._judge_counts(step)
        if self._answered.total() >= self.rule.samples:
            self._judge_answers(step)

    def _judge_counts(self, step: int) -> None:
        self.judged.add(self.label)
        self._steps[IMBALANCE].append(step)
        (most, largest), (least, smallest) = self._counts.most_common()[0], self._counts.most_common()[-1]
        ratio = largest / smallest
        if ratio > self.rule.threshold_imbalance:
            note = (
                f"class {least} has {smallest:,} of {self.total:,} labels and class {most} has {largest:,},"
                f" {ratio:.3g} times as many"
            )
            self._bad[IMBALANCE].append((step, ratio, note))

    def _judge_answers(self, step: int) -> None:
        self.judged.add(self.prediction)
        self._steps[MISPREDICTION].append(step)
        shares = {one: self._wrong[one] / count for one, count in self._answered.items()}
        worst = max(shares, key=lambda one: shares[one])
        if shares[worst] > self.rule.threshold_misprediction:
            counts = f"{self._wrong[worst]:,} of the {self._answered[worst]:,} labels"
            note = f"{counts} of class {worst} are predicted as another"
            self._bad[MISPREDICTION].append((step, shares[worst], note))

    def troubles(self) -> list[Trouble]:
        """Return what is wrong with the labels, and with the predictions."""
        found = []
        for kind, tensor in ((IMBALANCE, self.label), (MISPREDICTION, self.prediction)):
            bad, steps = self._bad[kind], self._steps[kind]
            if bad:
                first = bad[0][0]
                found.append(
                    Trouble(
                        tensor=tensor,
                        worker=self.worker,
                        mode=self.mode,
                        step=first,
                        last_step=bad[-1][0],
                        violations=len(bad),
                        judged=len(steps),
                        worst=max(worst for _, worst, _ in bad),
                        kind=kind,
                        before=max((step for step in steps if step < first), default=None),
                        note=bad[0][2],
                    )
                )
        return found


def _add(counter: Counter[object], classes: Array) -> None:
    found, counts = np.unique(classes, return_counts=True)
    counter.update(dict(zip(found.tolist(), counts.tolist(), strict=True)))
