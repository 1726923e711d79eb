"""Findings: what one rule found wrong with one tensor, folded from its judgements step by step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from smdbg.analysis.rule import Judgement
    from smdbg.store.format import TensorInfo

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NO_STEP = -1  # stands for "none" in arrays of steps and rows


class Severity(StrEnum):
    """How bad a finding is; `check` ends with status 1 from ERROR on, unless told otherwise."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"

    @property
    def rank(self) -> int:
        """Return 2 for an error, 1 for a warning, 0 for an info."""
        return {Severity.ERROR: 2, Severity.WARNING: 1, Severity.INFO: 0}[self]


class Outcome(StrEnum):
    """What became of a rule: only CLEAN says that something was judged and nothing found."""

    VIOLATED = "violated"
    CLEAN = "clean"
    NOT_APPLICABLE = "not applicable"
    INSUFFICIENT = "insufficient"
    FAILED = "failed"


@dataclass(frozen=True)
class Kind:
    """One way to violate a rule: the statistic that is compared, its threshold, and which side of it is worse."""

    statistic: str
    threshold: float | None = None
    name: str = ""
    lower_is_worse: bool = False


@dataclass(frozen=True)
class Facts:
    """What a rule's message is written from: one tensor of one worker and mode.

    `first` holds the statistics the rule needs at `step`, the first one that violates it; `previous` those of the
    same tensor at `previous_step`, one saved step before (None and empty when there is none). `before` is the last
    clean step and `since` the first bad one; `kinds` counts violations per name of kind; `note` is the rule's own.
    """

    tensor: str
    info: TensorInfo
    kind: Kind
    kinds: Mapping[str, int]
    step: int
    last_step: int
    before: int | None
    since: int
    violations: int
    judged: int
    worst: float
    first: Mapping[str, float]
    previous_step: int | None
    previous: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """What a rule found wrong with one tensor on one worker in one mode.

    `rule` is the instance's name; steps are global ones; `onset` is (last clean step or None, first bad step);
    `violations` of `judged` saved steps violated the rule; `worst` is in the unit of `statistic`.
    """

    rule: str
    severity: Severity
    run: str
    worker: int
    attempt: int
    mode: str
    tensor: str
    first_step: int
    last_step: int
    first_mode_step: int
    onset: tuple[int | None, int]
    violations: int
    judged: int
    worst: float
    threshold: float | None
    statistic: str
    message: str
    hint: str
    fingerprint: str

    def record(self) -> dict[str, Any]:
        """Return the fields in their order as plain data; `worst` may be NaN or infinite."""
        record = {item.name: getattr(self, item.name) for item in fields(self)}
        return record | {"severity": self.severity.value, "onset": list(self.onset)}


def fingerprint(rule: str, tensor: str, mode: str) -> str:
    """Return 16 hex digits that name the same complaint in another run, attempt or worker."""
    return hashlib.sha256("\0".join((rule, tensor, mode)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Violated:
    """One tensor's violations, folded; `first_row`, `last_row` count the rows of all blocks from 0."""

    column: int
    kind: int
    kinds: tuple[int, ...]
    first_row: int
    last_row: int
    before: int | None
    since: int
    violations: int
    judged: int
    worst: float
    note: str


@dataclass
class Fold:
    """Folds the judgements of one rule over consecutive blocks of the same tensors; where they are cut is the same."""

    tensors: int
    kinds: Sequence[Kind]
    rows: int = 0
    judged: Ints = field(init=False)
    judged_rows: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Start with nothing judged."""
        self.judged = np.zeros(self.tensors, np.int64)
        self._violations = np.zeros((len(self.kinds), self.tensors), np.int64)
        self._worst = np.full((len(self.kinds), self.tensors), np.nan)
        self._first, self._last, self._clean, self._before, self._since = (
            np.full(self.tensors, NO_STEP, np.int64) for _ in range(5)
        )
        self._kind = np.zeros(self.tensors, np.int64)
        self._notes: dict[int, str] = {}

    def add(self, steps: Ints, judgement: Judgement, first: int = 0) -> None:
        """Take in the next block: steps int64[rows] and its judgement, of which rows before `first` do not count."""
        steps, judged = steps[first:], judgement.judged[first:]
        if not len(steps):
            return
        violated = judgement.violated[first:] & judged
        kind = np.zeros(judged.shape, np.int64) if judgement.kind is None else judgement.kind[first:]
        self.judged += judged.sum(axis=0)
        self.judged_rows += int(judged.any(axis=1).sum())
        columns = np.flatnonzero(violated.any(axis=0))
        rows = violated.argmax(axis=0)
        fresh = columns[self._first[columns] == NO_STEP]
        self._open(steps, judgement, first, judged & ~violated, rows, fresh)
        self._kind[fresh] = kind[rows[fresh], fresh]
        self._first[fresh] = self.rows + rows[fresh]
        self._last[columns] = self.rows + len(steps) - 1 - violated[::-1, columns].argmax(axis=0)
        for index, one in enumerate(self.kinds):
            self._count(index, one, violated & (kind == index), judgement.worst[first:])
        self.rows += len(steps)

    def _open(self, steps: Ints, judgement: Judgement, first: int, clean: Bools, rows: Ints, fresh: Ints) -> None:
        """Settle the onset of the tensors that violate for the first time, and move on the last clean step."""
        until = np.full(self.tensors, len(steps), np.int64)
        until[fresh] = rows[fresh]
        waiting = clean & (np.arange(len(steps))[:, None] < until)
        found = waiting.any(axis=0)
        newest = len(steps) - 1 - waiting[::-1].argmax(axis=0) if len(steps) else until
        self._clean[found] = steps[newest[found]]
        own = rows[fresh] + first
        given = judgement.since is not None and judgement.before is not None
        self._since[fresh] = judgement.since[own, fresh] if given else steps[rows[fresh]]  # type: ignore[index]
        self._before[fresh] = judgement.before[own, fresh] if given else self._clean[fresh]  # type: ignore[index]
        for column, row in zip(fresh.tolist(), own.tolist(), strict=True):
            self._notes[column] = judgement.notes.get((row, column), "")

    def _count(self, index: int, kind: Kind, violated: Bools, worst: Floats) -> None:
        """Count the violations of one kind and keep the worst value."""
        self._violations[index] += violated.sum(axis=0)
        columns = np.flatnonzero(violated.any(axis=0))
        values = np.where(violated[:, columns], worst[:, columns], np.nan)
        fold = np.fmin if kind.lower_is_worse else np.fmax
        self._worst[index, columns] = fold(self._worst[index, columns], fold.reduce(values, axis=0))

    def results(self) -> list[Violated]:
        """Return one entry for each tensor that violated the rule, by column."""
        return [
            Violated(
                column=column,
                kind=(kind := int(self._kind[column])),
                kinds=tuple(self._violations[:, column].tolist()),
                first_row=int(self._first[column]),
                last_row=int(self._last[column]),
                before=None if self._before[column] == NO_STEP else int(self._before[column]),
                since=int(self._since[column]),
                violations=int(self._violations[:, column].sum()),
                judged=int(self.judged[column]),
                worst=float(self._worst[kind, column]),
                note=self._notes[column],
            )
            for column in np.flatnonzero(self._first != NO_STEP).tolist()
        ]
