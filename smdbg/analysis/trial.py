"""A run as people used to smdebug know it: a trial with tensors, asked step by step.

Names and meanings are those of smdebug's documented Trial and Tensor; underneath are the statistics and values of a
Run. Nothing after the step that a rule is being invoked at can be seen, so that following a training and looking at it
afterwards give one answer. Reductions are NumPy's: NaN and infinities in a tensor show in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from smdbg.analysis.reductions import REDUCTIONS, STATISTICS, from_statistics, from_value
from smdbg.analysis.view import View
from smdbg.errors import BadSelection, OnlyStatistics, SmdbgError, StepNotSaved, TensorNotFound, near
from smdbg.store.format import MODES


class ModeKeys(StrEnum):
    """The modes by smdebug's names. GLOBAL stands for all of them: then steps are global ones."""

    GLOBAL = "global"
    TRAIN = "train"
    EVAL = "eval"
    PREDICT = "predict"


modes = ModeKeys
TensorUnavailable = TensorNotFound


class TensorUnavailableForStep(StepNotSaved, OnlyStatistics):
    """The tensor was not saved at the step, or not what was asked of it, or the step has not been reached."""


class StepUnavailable(StepNotSaved):
    """There is no such step."""


class RuleEvaluationConditionMet(SmdbgError):
    """Raised by a rule, it says what returning True says; `end_of_rule` ends the rule at this step."""

    def __init__(self, rule_name: str = "", step: int | None = None, end_of_rule: bool = False) -> None:
        """Take what smdebug takes."""
        super().__init__(f"{rule_name}: the condition is met at step {step}")
        self.end_of_rule = end_of_rule


@dataclass(frozen=True)
class Collection:
    """A named group of tensors."""

    name: str
    tensor_names: tuple[str, ...]


@dataclass(frozen=True)
class Page:
    """The statistics of the tensors of a collection, on one worker and in one mode."""

    steps: npt.NDArray[np.int64]
    columns: Mapping[str, int]
    present: npt.NDArray[np.bool_]
    matrices: Mapping[str, npt.NDArray[np.float64]]

    def steps_of(self, name: str) -> list[int]:
        """Return the global steps at which a tensor was saved."""
        found: list[int] = self.steps[self.present[:, self.columns[name]]].tolist() if name in self.columns else []
        return found

    def row(self, name: str, step: int) -> dict[str, float] | None:
        """Return the statistics of a tensor at a step, None where it was not saved."""
        at, column = int(np.searchsorted(self.steps, step)), self.columns.get(name)
        if column is None or at == len(self.steps) or self.steps[at] != step or not self.present[at, column]:
            return None
        return {statistic: float(matrix[at, column]) for statistic, matrix in self.matrices.items()}


class Trial:
    """A run up to the step `now`. `read` holds the (tensor, rank) that were asked for, in order, since it was cleared.

    `names` are the tensors that `tensor_names` lists; others can be asked for by name.
    """

    def __init__(self, view: View, names: Sequence[str], workers: Sequence[int]) -> None:
        """Show a view of a run, of these workers."""
        self.now = -1
        self.read: dict[tuple[str, int], None] = {}
        self._view, self._names, self._ranks = view, list(names), list(workers)
        self._tensors: dict[str, Tensor] = {}
        self._pages: dict[tuple[str, int], list[Page]] = {}
        self._where: dict[int, tuple[str, int]] = {}
        self._saved: set[int] = set()
        for rank in self._ranks:
            log = view.log(rank)
            inside = view.inside(log.step)
            columns = (log.step[inside].tolist(), log.mode[inside].tolist(), log.mode_step[inside].tolist())
            self._where.update({step: (mode, number) for step, mode, number in zip(*columns, strict=True)})
            self._saved.update(view.run.steps(worker=rank)[view.inside(view.run.steps(worker=rank))].tolist())
        self._global = {place: step for step, place in self._where.items()}

    @property
    def name(self) -> str:
        """Return where the run is."""
        return self._view.run.url

    def tensor_names(
        self,
        *,
        step: int | None = None,
        mode: str = ModeKeys.GLOBAL,
        regex: str | Sequence[str] | None = None,
        collection: str | Collection | None = None,
    ) -> list[str]:
        """Return names of tensors: those in a collection, those in whose name a regular expression is found."""
        if regex is not None and collection is not None:
            raise BadSelection("tensor_names takes regex or collection, not both.")
        names = list(self._names)
        if collection is not None:
            names = list(self.collection(collection if isinstance(collection, str) else collection.name).tensor_names)
        if regex is not None:
            patterns = [re.compile(one) for one in ([regex] if isinstance(regex, str) else regex)]
            names = [name for name in names if any(one.search(name) for one in patterns)]
        if step is not None:
            at = self.global_step(mode, step)
            return [name for name in names if self.tensor(name).saved_at(at)]
        return [name for name in names if _is_all(mode) or self.tensor(name).steps(mode)]

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by its name. Raises TensorUnavailable."""
        if name not in self._tensors:
            if name not in self._view.catalogue:
                raise TensorUnavailable(f"{self.name}: no tensor {name!r}.{near(name, self._view.catalogue)}")
            ranks = [rank for rank in self._ranks if self._view.readable(name, rank)]
            self._tensors[name] = Tensor(self, self._view, name, ranks)
        return self._tensors[name]

    def has_tensor(self, name: str) -> bool:
        """Tell whether there is a tensor of that name."""
        return name in self._view.catalogue

    def steps(self, mode: str | None = None) -> list[int]:
        """Return the steps so far at which anything was saved, those of a mode counted in that mode."""
        return self.counted(sorted(step for step in self._saved if step <= self.now), mode)

    def all_steps(self) -> list[int]:
        """Return the global steps at which anything was saved, also those that are still to come."""
        return sorted(self._saved)

    def counted(self, steps: Iterable[int], mode: str | None) -> list[int]:
        """Return global steps as steps of a mode, without those of other modes."""
        if _is_all(mode):
            return list(steps)
        return [self._where[step][1] for step in steps if self._where[step][0] == str(mode)]

    def modes(self) -> list[ModeKeys]:
        """Return the modes that have steps."""
        found = {mode for mode, _ in self._where.values()}
        return [ModeKeys(mode) for mode in MODES if mode in found]

    def mode(self, global_step: int) -> ModeKeys:
        """Return the mode of a step."""
        return ModeKeys(self._at(global_step)[0])

    def mode_step(self, global_step: int) -> int:
        """Return a step's number in its mode."""
        return self._at(global_step)[1]

    def global_step(self, mode: str, mode_step: int) -> int:
        """Return the global number of a mode's step. Raises StepUnavailable."""
        if _is_all(mode):
            return mode_step
        if (str(mode), mode_step) not in self._global:
            raise StepUnavailable(f"{self.name}: {mode!s} has no step {mode_step}.")
        return self._global[str(mode), mode_step]

    def note(self, name: str, rank: int) -> None:
        """Note that a tensor was read, and that it was the last one."""
        self.read.pop((name, rank), None)
        self.read[name, rank] = None

    def row(self, name: str, rank: int, step: int) -> dict[str, float] | None:
        """Return the statistics of a tensor at a global step, None where it was not saved."""
        if step not in self._where:
            return None
        return next((row for page in self.pages(name, rank) if (row := page.row(name, step))), None)

    def pages(self, name: str, rank: int) -> list[Page]:
        """Return the statistics of a tensor's collection, one page a mode; they are read once for all rules."""
        key = (self._view.catalogue[name].collection, rank)
        if key not in self._pages:
            self._pages[key] = [self._page(key[0], mode, rank) for mode in self._view.run.modes()]
        return self._pages[key]

    def _page(self, collection: str, mode: str, rank: int) -> Page:
        found = {one: self._view.matrix(collection, one, mode, rank) for one in STATISTICS}
        base = found["count"]
        rows = self._view.inside(base.steps)
        columns = {name: index for index, name in enumerate(base.names)}
        matrices = {one: matrix.matrix if rows.all() else matrix.matrix[rows] for one, matrix in found.items()}
        return Page(base.steps[rows], columns, base.present[rows], matrices)

    def _at(self, step: int) -> tuple[str, int]:
        if step not in self._where:
            raise StepUnavailable(f"{self.name}: there is no step {step}.")
        return self._where[step]

    def workers(self) -> list[str]:
        """Return the names of the workers, such as worker_0."""
        return [f"worker_{rank}" for rank in self._ranks]

    def collections(self) -> dict[str, Collection]:
        """Return the collections by name."""
        return {name: self.collection(name) for name in self._view.run.collections()}

    def collection(self, name: str) -> Collection:
        """Return the tensors of a collection; none where there is no such collection."""
        infos = [self._view.catalogue[one] for one in self._names]
        return Collection(name, tuple(info.name for info in infos if info.collection == name or name in info.tags))


class Tensor:
    """A tensor of a trial. Where no worker is named, it is the first that saved it."""

    def __init__(self, trial: Trial, view: View, name: str, ranks: Sequence[int]) -> None:
        """Point at a tensor; use `Trial.tensor`."""
        self.name = name
        self._trial, self._view, self._ranks = trial, view, list(ranks)

    def steps(self, mode: str | None = ModeKeys.GLOBAL, show_incomplete_steps: bool = False) -> list[int]:
        """Return the steps so far at which all its workers saved it, or any of them (show_incomplete_steps)."""
        each = [set(self._saved(rank)) for rank in self._ranks]
        found = (set.union if show_incomplete_steps else set.intersection)(*each) if each else set()
        return self._trial.counted(sorted(step for step in found if step <= self._trial.now), mode)

    def saved_at(self, step: int) -> bool:
        """Tell whether any worker saved it at a global step, so far."""
        return step <= self._trial.now and any(self._trial.row(self.name, rank, step) for rank in self._ranks)

    def prev_steps(self, step: int, n: int, mode: str = ModeKeys.GLOBAL) -> list[int]:
        """Return up to n steps before a step, the nearest first."""
        return [one for one in reversed(self.steps(mode)) if one < step][:n]

    def workers(self, step_num: int, mode: str = ModeKeys.GLOBAL) -> list[str]:
        """Return the workers that saved it at a step."""
        at = self._trial.global_step(mode, step_num)
        there = [rank for rank in self._ranks if at <= self._trial.now and self._trial.row(self.name, rank, at)]
        return [f"worker_{rank}" for rank in there]

    def value(self, step_num: int, mode: str = ModeKeys.GLOBAL, worker: str | None = None) -> npt.NDArray[Any]:
        """Return the full value at a step. Raises TensorUnavailableForStep."""
        at, rank, _ = self._find(step_num, mode, worker)
        try:
            return self._view.run.tensor(self.name).value(at, worker=rank)
        except (OnlyStatistics, StepNotSaved) as error:
            raise TensorUnavailableForStep(str(error)) from None

    def values(self, mode: str = ModeKeys.GLOBAL, worker: str | None = None) -> dict[int, npt.NDArray[Any]]:
        """Return the full values by step, where they were kept."""
        rank = self._rank(worker)
        tensor = self._view.run.tensor(self.name)
        kept = tensor.value_steps(None if _is_all(mode) else str(mode), rank)
        kept = kept[self._view.inside(kept) & (kept <= self._trial.now)]
        self._trial.note(self.name, rank)
        return {self._trial.counted([step], mode)[0]: value for step, value in tensor.each(kept.tolist(), worker=rank)}

    def shape(self, step_num: int, mode: str = ModeKeys.GLOBAL, worker: str | None = None) -> tuple[int, ...]:
        """Return the shape at a step. Raises TensorUnavailableForStep."""
        at, rank, _ = self._find(step_num, mode, worker)
        return self._view.run.tensor(self.name).shape_at(at, worker=rank)

    def reduction_value(
        self,
        step_num: int,
        reduction_name: str,
        mode: str = ModeKeys.GLOBAL,
        worker: str | None = None,
        abs: bool = False,
    ) -> float:
        """Return a reduction at a step, from the statistics that were kept, else from the value.

        Raises TensorUnavailableForStep where neither was kept, BadSelection for an unknown reduction.
        """
        if reduction_name not in REDUCTIONS:
            text = f"there is no reduction {reduction_name!r}.{near(reduction_name, REDUCTIONS)}"
            raise BadSelection(f"{self.name}: {text} There are: {', '.join(REDUCTIONS)}.")
        at, _, row = self._find(step_num, mode, worker)
        found = from_statistics(reduction_name, abs, row)
        return from_value(reduction_name, abs, self.value(at, worker=worker)) if found is None else found

    def reduction_values(
        self, step_num: int, mode: str = ModeKeys.GLOBAL, worker: str | None = None
    ) -> dict[tuple[str, bool], float]:
        """Return the reductions that were kept at a step, by (name, of the absolute values)."""
        _, _, row = self._find(step_num, mode, worker)
        pairs = [(name, absolute) for name in REDUCTIONS for absolute in (False, True)]
        found = {pair: from_statistics(*pair, row) for pair in pairs}
        return {pair: value for pair, value in found.items() if value is not None}

    def _find(self, step_num: int, mode: str, worker: str | None) -> tuple[int, int, Mapping[str, float]]:
        """Return global step, rank and statistics of a row, and note that it was read."""
        at = self._trial.global_step(mode, step_num)
        ranks = self._ranks if worker is None else [self._rank(worker)]
        if at > self._trial.now:
            text = f"{self.name!r} is asked for at step {at}, and the rule is at step {self._trial.now}"
            raise TensorUnavailableForStep(f"{self._trial.name}: {text}")
        for rank in ranks:
            row = self._trial.row(self.name, rank, at)
            if row is not None:
                self._trial.note(self.name, rank)
                return at, rank, row
        raise TensorUnavailableForStep(f"{self._trial.name}: {self.name!r} was not saved at step {at}")

    def _rank(self, worker: str | None) -> int:
        if worker is None and self._ranks:
            return self._ranks[0]
        for rank in self._ranks:
            if str(worker) in (f"worker_{rank}", str(rank)):
                return rank
        raise TensorUnavailableForStep(f"{self._trial.name}: worker {worker!r} did not save {self.name!r}.")

    def _saved(self, rank: int) -> list[int]:
        """Return the global steps at which a worker saved it, also those that are still to come."""
        return sorted(step for page in self._trial.pages(self.name, rank) for step in page.steps_of(self.name))


def _is_all(mode: str | None) -> bool:
    return mode is None or str(mode) == ModeKeys.GLOBAL
