"""confusion: classes that are predicted as others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.rule import Facts, Floats, Kind, Needs, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.training import places
from smdbg.analysis.view import View
from smdbg.rules._classes import IGNORED, Array, as_classes, paired, predicted, together
from smdbg.store.format import TensorInfo

DIAGONAL, OFF_DIAGONAL = 0, 1
MOST_CLASSES = 2000  # a matrix of more is no confusion matrix


@dataclass(frozen=True, kw_only=True)
class Confusion(RunRule):
    """Labels of one class are predicted as another.

    What it does
    ------------
    Makes the confusion matrix of each saved step at which labels and predictions were kept: rows are labels, each
    normalised to 1. Fires when a share on the diagonal is below `min_diag`, or one beside it above `max_off_diag`. Only
    classes that occur in the labels of the step are judged; labels of -100 are left out. Predictions are classes,
    probabilities of class 1, or scores with one more axis, of which the largest counts.

    Why it matters
    --------------
    The accuracy over all classes can be high while one of them is never recognised.

    Parameters
    ----------
    category_no (classes, default none): how many classes there are, counted from 0; labels beyond are left out.
    labels (default labels): name of a tensor or collection of labels.
    predictions (default predictions): name of a tensor or collection of predictions.
    min_diag (default 0.9): fire when less of a class is predicted right.
    max_off_diag (default 0.1): fire when more of a class is predicted as one other class.

    Example output
    --------------
    predictions at step 40: of the 50 labels of class 3, 12 % are predicted right and 80 % as class 5.

    How to fix
    ----------
    Look at examples of both classes: are the labels right, can they be told apart, are there enough of each?

    References
    ----------
    Amazon SageMaker Debugger, built-in rule Confusion.
    """

    name: ClassVar[str] = "confusion"

    category_no: int | None = parameter(None, unit="classes", minimum=1, help="how many classes there are")
    labels: str = parameter("labels", help="name of a tensor or collection of labels")
    predictions: str = parameter("predictions", help="name of a tensor or collection of predictions")
    min_diag: float = parameter(0.9, minimum=0, maximum=1, help="fire when less of a class is predicted right")
    max_off_diag: float = parameter(0.1, minimum=0, maximum=1, help="fire when more is predicted as one other class")

    def needs(self) -> Needs:
        """Read full values."""
        return Needs(values=True, roles=("label", "prediction"))

    def picks(self, info: TensorInfo) -> bool:
        """Pick by the two names."""
        return self.labels in (info.name, info.collection) or self.predictions in (info.name, info.collection)

    def looked_for(self) -> str:
        """Name both."""
        return f"tensors or collections called {self.labels} and {self.predictions}"

    def kinds(self) -> tuple[Kind, ...]:
        """Too little on the diagonal, too much beside it."""
        return (
            Kind("diagonal_share", self.min_diag, "diagonal", lower_is_worse=True),
            Kind("off_diagonal_share", self.max_off_diag, "off diagonal"),
        )

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each pair of labels and predictions, in each mode, on each worker."""
        infos = [view.catalogue[name] for name in names]
        labels = [info.name for info in infos if self.labels in (info.name, info.collection)]
        predictions = [info.name for info in infos if info.name not in labels]
        if names and not (labels and predictions):
            return Verdicts(not_applicable=f"nothing matched: it looks for {self.looked_for()}")
        troubles: list[Trouble] = []
        judged: set[str] = set()
        most, why = 0, ""
        for worker, mode in places(self, view):
            for label, prediction in paired(labels, predictions):
                if prediction and all(worker in view.run.tensor(name).workers() for name in (label, prediction)):
                    found, reason = self._through(view, label, prediction, mode, worker)
                    most, why = max(most, len(found)), why or reason
                    judged.update([label, prediction] if found else [])
                    troubles += self._troubles(prediction, mode, worker, found)
        detail = why if most else why or "no step has full values of both labels and predictions"
        return Verdicts(troubles=troubles, judged=sorted(judged), steps=most, detail=detail)

    def message(self, facts: Facts) -> str:
        """Say which class is taken for which."""
        return f"{facts.tensor} at step {facts.step}: {facts.note}."

    def hint(self, facts: Facts) -> str:
        """Say what to do."""
        return "Look at examples of both classes: whether the labels are right and whether they can be told apart."

    def _through(
        self, view: View, label: str, prediction: str, mode: str, worker: int
    ) -> tuple[list[tuple[int, float, float, str]], str]:
        """Return (step, least on the diagonal, most beside it, note) of each step, and why one was left out."""
        found, why = [], ""
        for step, value, answer in together(view, label, prediction, mode, worker):
            right = as_classes(value)
            guesses = predicted(value, answer, argmax=np.size(answer) != np.size(value))
            if right is None or guesses is None:
                why = f"{prediction} and {label} are no classes that fit each other at step {step}"
                continue
            matrix, classes = self._matrix(right, guesses)
            if len(classes) > MOST_CLASSES:
                why = f"{label} has more than {MOST_CLASSES} classes at step {step}"
            elif len(matrix):
                found.append((step, *self._worst(matrix, classes)))
        return found, why

    def _matrix(self, right: Array, guesses: Array) -> tuple[Floats, Array]:
        """Return counts [classes of the labels, all classes], and all classes, those of the labels first."""
        keep = right != IGNORED if right.dtype.kind == "i" else np.ones(right.shape, np.bool_)
        if self.category_no is not None and right.dtype.kind == "i":
            keep &= (right >= 0) & (right < self.category_no)
        right, guesses = right[keep], guesses[keep]
        own = np.unique(right)
        classes = np.concatenate([own, np.setdiff1d(guesses, own)])
        if len(classes) > MOST_CLASSES:
            return np.zeros((0, 0)), classes
        order = np.argsort(classes)
        rows, columns = (order[np.searchsorted(classes[order], part)] for part in (right, guesses))
        matrix = np.zeros((len(own), len(classes)))
        np.add.at(matrix, (rows, columns), 1)
        return matrix, classes

    def _worst(self, matrix: Floats, classes: Array) -> tuple[float, float, str]:
        """Return the least share on the diagonal, the largest beside it, and both in words."""
        total = matrix.sum(axis=1)
        shares = matrix / total[:, None]
        diagonal = np.diagonal(shares).copy()
        beside = shares.copy()
        np.fill_diagonal(beside, 0.0)
        least, most = float(diagonal.min()), float(beside.max())
        row = int(diagonal.argmin()) if least < self.min_diag else int(beside.max(axis=1).argmax())
        other = int(beside[row].argmax())
        note = (
            f"of the {int(total[row])} labels of class {classes[row]}, {100 * diagonal[row]:.3g} % are predicted right"
            f" and {100 * beside[row, other]:.3g} % as class {classes[other]}"
        )
        return least, most, note

    def _troubles(
        self, tensor: str, mode: str, worker: int, found: Sequence[tuple[int, float, float, str]]
    ) -> list[Trouble]:
        bad = [one for one in found if one[1] < self.min_diag or one[2] > self.max_off_diag]
        if not bad:
            return []
        kind = DIAGONAL if bad[0][1] < self.min_diag else OFF_DIAGONAL
        return [
            Trouble(
                tensor=tensor,
                worker=worker,
                mode=mode,
                step=bad[0][0],
                last_step=bad[-1][0],
                violations=len(bad),
                judged=len(found),
                worst=min(one[1] for one in bad) if kind == DIAGONAL else max(one[2] for one in bad),
                kind=kind,
                before=max((one[0] for one in found if one[0] < bad[0][0]), default=None),
                note=bad[0][3],
            )
        ]
