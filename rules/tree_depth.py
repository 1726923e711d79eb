"""tree_depth: trees that are deeper than wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from smdbg.analysis.rule import Facts, Ints, Kind, Needs, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.training import places
from smdbg.analysis.view import View
from smdbg.store.format import TensorInfo

TREE, NODE, YES, NO = COLUMNS = ("Tree", "Node", "Yes", "No")
NONE = -1  # no such node: a leaf has no children


@dataclass(frozen=True, kw_only=True)
class TreeDepth(RunRule):
    """A tree is deeper than it should be.

    What it does
    ------------
    Follows, in the trees saved at each step, the pointers from each node to its children (columns Tree, Node, Yes and
    No: arrays of one element a node, Yes and No as numbers of nodes or as text such as `0-3`) and fires when a leaf
    lies more than `depth` splits below the root. With `heap_ids` the depth is taken from the largest node number
    instead, floor(log2(number + 1)): right only where nodes are numbered like a binary heap, which XGBoost does not do.

    Why it matters
    --------------
    Deep trees learn single samples by heart, and take memory and time.

    Parameters
    ----------
    depth (splits, default 4): fire when a tree is deeper.
    heap_ids (true or false, default false): node numbers are those of a binary heap.

    Example output
    --------------
    trees at step 12: tree 12 is 7 splits deep, more than 4.

    How to fix
    ----------
    Lower max_depth (or num_leaves), raise min_child_weight or gamma.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule TreeDepth.
    """

    name: ClassVar[str] = "tree_depth"

    depth: int = parameter(4, unit="splits", minimum=0, help="fire when a tree is deeper")
    heap_ids: bool = parameter(False, help="node numbers are those of a binary heap")

    def needs(self) -> Needs:
        """Read the columns of the trees."""
        return Needs(values=True, collections=("trees",))

    def picks(self, info: TensorInfo) -> bool:
        """Pick the columns it reads, of the collection trees or by their names."""
        folder, _, column = info.name.rpartition("/")
        return column in COLUMNS and (info.collection == "trees" or folder.rpartition("/")[2] == "trees")

    def kinds(self) -> tuple[Kind, ...]:
        """Splits from the root to the deepest leaf."""
        return (Kind("depth", self.depth),)

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each set of columns, in each mode, on each worker."""
        wanted = (TREE, NODE) if self.heap_ids else COLUMNS
        folders = dict.fromkeys(name.rpartition("/")[0] for name in names)
        whole = [folder for folder in folders if all(f"{folder}/{column}" in names for column in wanted)]
        if names and not whole:
            return Verdicts(not_applicable=f"nothing matched: it needs all of the columns {', '.join(wanted)}")
        troubles: list[Trouble] = []
        judged: list[str] = []
        most, broken = 0, ""
        for worker, mode in places(self, view):
            for folder in whole:
                columns = [f"{folder}/{column}" for column in wanted]
                found, wrong = self._through(view, columns, mode, worker)
                most, broken = max(most, len(found)), broken or wrong
                judged += columns if found else []
                troubles += self._troubles(folder or "trees", mode, worker, found)
        detail = broken or ("" if most else "no step has full values of all the columns it needs")
        return Verdicts(troubles=troubles, judged=sorted(set(judged)), steps=most, detail=detail)

    def message(self, facts: Facts) -> str:
        """Say which tree, and how deep."""
        return f"{facts.tensor} at step {facts.step}: {facts.note}, more than {self.depth}."

    def hint(self, facts: Facts) -> str:
        """Say what to do."""
        return "Lower max_depth, or raise min_child_weight or gamma."

    def _through(
        self, view: View, columns: Sequence[str], mode: str, worker: int
    ) -> tuple[list[tuple[int, int, int]], str]:
        """Return (step, depth, tree) of the deepest tree of each step, and what could not be read."""
        if any(worker not in view.run.tensor(name).workers() for name in columns):
            return [], ""
        steps = sorted(set.intersection(*(set(view.value_steps(name, mode, worker)) for name in columns)))
        found, wrong = [], ""
        for parts in zip(*(view.values(name, mode, worker, steps) for name in columns), strict=True):
            step = parts[0][0]
            tree, *pointers = (numbers(value) for _, value in parts)
            if len({len(tree), *map(len, pointers)}) > 1:
                wrong = f"the columns of step {step} have different lengths"
            elif len(tree):
                depths = heap_depths(pointers[0]) if self.heap_ids else node_depths(tree, *pointers)
                deepest = int(depths.argmax())
                found.append((step, int(depths[deepest]), int(tree[deepest])))
        return found, wrong

    def _troubles(self, folder: str, mode: str, worker: int, found: Sequence[tuple[int, int, int]]) -> list[Trouble]:
        bad = [one for one in found if one[1] > self.depth]
        if not bad:
            return []
        step, depth, tree = bad[0]
        return [
            Trouble(
                tensor=folder,
                worker=worker,
                mode=mode,
                step=step,
                last_step=bad[-1][0],
                violations=len(bad),
                judged=len(found),
                worst=float(max(one[1] for one in bad)),
                before=max((one[0] for one in found if one[0] < step), default=None),
                note=f"tree {tree} is {depth} splits deep",
            )
        ]


def numbers(column: npt.NDArray[Any]) -> Ints:
    """Return node or tree numbers [nodes] from numbers or from text such as '0-3'; NONE where there is none."""
    flat = np.asarray(column).reshape(-1)
    if flat.dtype.kind in "US":
        last = [str(text, "utf-8") if isinstance(text, bytes) else str(text) for text in flat.tolist()]
        digits = [text.rpartition("-")[2].strip() for text in last]
        return np.array([int(text) if text.isdecimal() else NONE for text in digits], np.int64)
    if flat.dtype.kind not in "iuf":
        return np.full(len(flat), NONE, np.int64)
    wide = flat.astype(np.float64)
    return np.where(np.isfinite(wide) & (wide >= 0), wide, NONE).astype(np.int64)


def node_depths(tree: Ints, node: Ints, yes: Ints, no: Ints) -> Ints:
    """Return how many splits each node lies below the root of its tree; a root is nobody's child.

    Children that are not there, and nodes that no root leads to, count for nothing.
    """
    keys = np.stack([tree, node])
    order = np.lexsort(keys[::-1])
    span = int(max(node.max(initial=0), yes.max(initial=0), no.max(initial=0))) + 2
    ranked = (tree * span + node)[order]
    children = []
    for pointers in (yes, no):
        at = np.searchsorted(ranked, tree * span + pointers)
        there = (pointers != NONE) & (at < len(ranked))
        there[there] = ranked[at[there]] == (tree * span + pointers)[there]
        children.append(np.where(there, order[np.where(there, at, 0)], NONE))
    depths = np.zeros(len(tree), np.int64)
    seen = np.ones(len(tree), np.bool_)
    for child in children:
        seen[child[child != NONE]] = False
    level = np.flatnonzero(seen)
    while len(level):
        down = np.unique(np.concatenate([child[level] for child in children]))
        parents_depth = depths[level[0]]
        level = down[(down != NONE) & ~seen[down]]  # one met before would lead in a circle
        seen[level] = True
        depths[level] = parents_depth + 1
    return depths


def heap_depths(node: Ints) -> Ints:
    """Return the depth of each node where they are numbered like a binary heap."""
    return np.frexp(np.maximum(node, 0) + 1.0)[1].astype(np.int64) - 1
