"""Pairs of a training loss and its validation loss, and the evaluations in which the second was taken."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from smdbg.analysis.findings import Floats, Ints
from smdbg.errors import BadSelection

TRAIN = "^(train|training)[-_/]"
VALIDATION = "^(val|valid|validation|eval|test)(_[0-9]+)?[-_/]"


@dataclass(frozen=True)
class Evaluations:
    """Arrays [evaluations]: first and last step of each, the mean loss in it, and that of training since the last."""

    first: Ints
    last: Ints
    validation: Floats
    training: Floats


def compiled(expression: str) -> re.Pattern[str]:
    """Return a regular expression as it is searched for in names; BadSelection when it is none."""
    try:
        return re.compile(expression)
    except re.error as error:
        raise BadSelection(f"{expression!r} is not a regular expression: {error}. Correct it.") from None


def by_name(names: Sequence[str], train: str, validation: str) -> Mapping[str, str]:
    """Return validation loss -> training loss, where both are called alike but for what the expressions match."""
    of_training, of_validation = compiled(train), compiled(validation)
    plain = {of_training.sub("", name, count=1): name for name in names if not of_validation.search(name)}
    rest = {name: of_validation.sub("", name, count=1) for name in names if of_validation.search(name)}
    return {name: plain[bare] for name, bare in rest.items() if bare in plain}


def evaluations(training: tuple[Ints, Floats], validation: tuple[Ints, Floats]) -> Evaluations:
    """Return the evaluations: validation losses with no training loss between them, and the training before each.

    What is not finite is left out, and so is an evaluation with no training loss since the one before. A training loss
    of the same step comes before the evaluation.
    """
    (steps, values), (at, found) = (_finite(*series) for series in (training, validation))
    before = np.searchsorted(steps, at, side="right")
    starts = np.flatnonzero(np.diff(before, prepend=-1))
    ends = np.append(starts[1:], len(before))
    counts = np.diff(before[starts], prepend=0)
    total = np.concatenate([[0.0], np.cumsum(values)])
    keep = counts > 0
    starts, ends, counts = starts[keep], ends[keep], counts[keep]
    sums = np.concatenate([[0.0], np.cumsum(found)])
    return Evaluations(
        first=at[starts],
        last=at[ends - 1],
        validation=(sums[ends] - sums[starts]) / (ends - starts),
        training=(total[before[starts]] - total[before[starts] - counts]) / counts,
    )


def _finite(steps: Ints, values: Floats) -> tuple[Ints, Floats]:
    good = np.isfinite(values)
    return steps[good], values[good]
