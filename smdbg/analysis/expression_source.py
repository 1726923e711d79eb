"""Reads from a run what the names in an expression stand for: a tensor, or all of a collection, a role or a glob."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import Any

import numpy as np

from smdbg import stats
from smdbg.analysis.expression_nodes import LOSS, TENSOR, Name, Node, Statistic, Value, walk
from smdbg.analysis.expression_values import Series
from smdbg.analysis.findings import Floats, Ints
from smdbg.analysis.run import open_run
from smdbg.analysis.table import Table
from smdbg.analysis.view import View
from smdbg.errors import BadSelection, near
from smdbg.select import matching
from smdbg.store.format import TensorInfo

LOSSES = "losses"
VALUE = "last"  # of a single number: the number itself, infinities too
_FINITE = ("count", "nan", "posinf", "neginf")
_BESIDE = {"mean": _FINITE, "abs_mean": _FINITE, "std": ("mean", *_FINITE)}  # what merging them takes as well
_ADDED = (*_FINITE, "zeros", "l1", "l2")  # of these every saved tensor has a number, if it was kept


def statistics_of(node: Node) -> tuple[str, ...]:
    """Return the statistics to read for an expression."""
    found: dict[str, None] = {}
    for part in walk(node):
        if isinstance(part, Statistic):
            found.update(dict.fromkeys(_ingredients(part.statistic)))
        elif isinstance(part, Value):
            found[VALUE] = None
    return tuple(found)


def _ingredients(statistic: str) -> tuple[str, ...]:
    """Return the stored statistics that one is merged and derived from."""
    own = stats.required(statistic)
    return tuple(dict.fromkeys([*own, *(beside for one in own for beside in _BESIDE.get(one, ()))]))


def resolve(name: Name, catalogue: Mapping[str, TensorInfo], allowed: Collection[str]) -> list[str]:
    """Return the tensors that a name stands for, in catalogue order.

    The first of these that there is: the tensor of that name; for `loss` the losses; the tensors of that collection
    or with that tag; those of that role; if it was in quotes, those that the glob or regular expression matches.
    Only a tensor named in full may be outside `allowed`.
    """
    if name.text in catalogue:
        return [name.text]
    known = {one: info for one, info in catalogue.items() if one in allowed}
    if name == Name(LOSS):
        losses = [one for one, info in known.items() if _is_loss(info)]
        if losses:
            return losses
    for found in (
        [one for one, info in known.items() if name.text == info.collection or name.text in info.tags],
        [one for one, info in known.items() if name.text == info.role],
    ):
        if found:
            return found
    chosen = matching(known, name.text) if name.quoted else set()
    return [one for one in known if one in chosen]


def unknown(name: Name, catalogue: Mapping[str, TensorInfo]) -> str:
    """Return in a sentence that a name stands for nothing, with those that are most like it."""
    known = {name for name in catalogue} | {info.collection for info in catalogue.values()}
    known |= {info.role for info in catalogue.values() if info.role}
    return f"there is no tensor, collection or role {name.text!r}.{near(name.text, known)}"


def _single(info: TensorInfo) -> bool:
    return prod(info.shape) == 1


def _is_loss(info: TensorInfo) -> bool:
    return _single(info) and (info.role == LOSS or info.collection == LOSSES)


class Reference:
    """Another run to compare with: opened when it is first needed, and once for all rules."""

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        """Take the URL of the run."""
        self.url = url
        self._options = storage_options
        self._lock = Lock()
        self._view: View | None = None

    def view(self) -> View:
        """Return the whole run; raises what `open_run` raises."""
        with self._lock:
            if self._view is None:
                run = open_run(self.url, storage_options=self._options)
                self._view = View(run, {name: run.tensor(name).info for name in run.tensors()})
            return self._view


@dataclass(frozen=True)
class RunSource:
    """Series of one worker in one mode of a run; `allowed`: the tensors that groups are made of; `tensor`: of `each`.

    What cannot be read as it was asked for raises BadSelection.
    """

    view: View
    mode: str
    worker: int
    allowed: Collection[str]
    tensor: str = ""
    reference: Callable[[str, int, str], RunSource] | None = None
    is_reference: bool = False

    def other(self) -> RunSource:
        """Return the same of the reference run."""
        if self.reference is None:
            raise BadSelection("ref(...) needs another run to compare with: give --reference RUN.")
        return self.reference(self.mode, self.worker, self.tensor)

    def names(self, name: Name) -> list[str]:
        """Return the tensors that a name stands for; BadSelection if there are none."""
        catalogue = self.view.catalogue
        if name == Name(TENSOR):
            return [self.tensor] if self.tensor in catalogue else []  # the reference run may lack it
        found = resolve(name, catalogue, self.allowed)
        if not found:
            where = f" (in the reference run {self.view.run.url})" if self.is_reference else ""
            raise BadSelection(unknown(name, catalogue) + where)
        return found

    def value(self, name: Name) -> Series:
        """Return the value of a tensor that is a single number."""
        names = self.names(name)
        single = [one for one in names if _single(self.view.catalogue[one])]
        if names and not single:
            what = "is a tensor" if names == [name.text] else f"stands for {len(names)} tensors"
            shown = f'"{name.text}"' if name.quoted else name.text
            why = f"{name.text!r} {what} of more than one number"
            raise BadSelection(f"{why}; ask for a statistic, such as l2({shown}) or {shown}.max.")
        tables = {one: self.view.table([one], (VALUE,), self.mode, self.worker) for one in single}
        saved = [one for one, table in tables.items() if len(table.steps)]
        if len(saved) > 1 and name == Name(LOSS):
            saved = [one for one in saved if one == self.view.course(self.worker).loss_name] or saved
        if len(saved) > 1:
            several = ", ".join(saved[:5]) + (", ..." if len(saved) > 5 else "")
            raise BadSelection(f"{name.text!r} stands for several tensors; name one of them in quotes: {several}.")
        if not saved:
            return Series(np.zeros(0, np.int64), np.zeros(0))
        table = tables[saved[0]]
        return Series(table.steps, table.statistics[VALUE][:, 0])

    def statistic(self, statistic: str, name: Name) -> Series:
        """Return a statistic of one tensor, or of several merged, at the steps at which all their collections were."""
        names = self.names(name)
        if len(names) > 1 and statistic in stats.QUANTILES:
            why = f"{statistic} of several tensors does not follow from that of each"
            raise BadSelection(f"{why}, and {name.text!r} stands for {len(names)}. Name one, or use 'each'.")
        ingredients = _ingredients(statistic)
        table = self.view.table(names, ingredients, self.mode, self.worker)
        rows = _whole(table)
        present = table.present[rows]
        kept = {one: matrix[rows] for one, matrix in table.statistics.items()}
        if len(names) != 1:
            kept = merged(kept, present)
        else:
            kept = {one: matrix[:, 0] for one, matrix in kept.items()}
        return Series(table.steps[rows], stats.derive(statistic, {one: kept[one] for one in stats.required(statistic)}))


def _whole(table: Table) -> Ints:
    """Return the rows at which every collection is present that was ever saved; of those rules merge what is there."""
    inside = np.ones(len(table.steps), bool)
    homes = np.array([info.collection for info in table.infos], dtype=object)
    for home in dict.fromkeys(homes.tolist()):
        there = table.present[:, homes == home].any(axis=1)
        inside &= there | (not there.any())
    return np.flatnonzero(inside & table.present.any(axis=1))


def merged(parts: Mapping[str, Floats], present: Floats | Any) -> dict[str, Floats]:
    """Return statistics [rows] of tensors taken together, from those of each [rows, tensors].

    Absent tensors (`present` False) count as nothing; one that is there and whose statistic was not kept makes it NaN.
    """
    there = {name: np.where(present, matrix, np.nan) for name, matrix in parts.items()}
    found = {name: _plainly(name, matrix) for name, matrix in there.items() if name not in _BESIDE}
    if any(name in _BESIDE for name in parts):
        found |= _weighted({name: there[name] for name in parts if name in (*_BESIDE, *_FINITE)})
    for name in set(parts) & set(_ADDED):
        lost = (np.isnan(parts[name]) & present).any(axis=1)
        found[name] = np.where(lost, np.nan, found[name])
    return found


def _plainly(name: str, matrix: Floats) -> Floats:
    """Return the sum, root of the sum of squares or extreme of each row [rows, tensors]; NaN counts as nothing."""
    if not matrix.shape[1]:
        return np.full(len(matrix), np.nan)
    if name not in _ADDED:
        least: Floats = (np.fmin if name == "min" else np.fmax).reduce(matrix, axis=1)
        return least
    empty = np.isnan(matrix).all(axis=1)
    if name != "l2":
        return np.where(empty, np.nan, np.nansum(matrix, axis=1))
    scale = np.fmax.reduce(np.abs(matrix), axis=1, initial=0.0)  # squares of large norms do not fit
    scale[(scale == 0) | ~np.isfinite(scale)] = 1.0
    return np.where(empty, np.nan, np.sqrt(np.nansum((matrix / scale[:, None]) ** 2, axis=1)) * scale)


def _weighted(parts: Mapping[str, Floats]) -> dict[str, Floats]:
    """Return means and deviations [rows] of all tensors, from those of each and their counts [rows, tensors]."""
    names: Sequence[str] = tuple(parts)
    together = np.stack([parts[name] for name in names], axis=-1)
    if not together.shape[1]:
        return {name: np.full(len(together), np.nan) for name in names}
    while together.shape[1] > 1:
        half = together.shape[1] // 2
        rest = together[:, 2 * half :]
        together = np.concatenate([stats.merge(names, together[:, :half], together[:, half : 2 * half]), rest], axis=1)
    return {name: together[:, 0, index] for index, name in enumerate(names)}
