"""replica_desync: parameters that should be the same on several workers, and are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from smdbg.analysis.rule import Bools, Facts, Floats, Ints, Kind, Needs, Severity, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.table import Table
from smdbg.analysis.view import View
from smdbg.store.format import TensorInfo

HASH = ("hash_hi", "hash_lo")
SIZES = ("min", "max", "mean", "std", "l2")
ROLES = ("weight", "bias", "norm", "embedding")
BY_HASH, BY_STATISTICS = 0, 1
HEALED = 2  # times that a difference may go away again before it is taken for a method of training


@dataclass(frozen=True, kw_only=True)
class ReplicaDesync(RunRule):
    """Parameters of data-parallel replicas are not the same.

    What it does
    ------------
    Compares the hashes of each parameter between the workers of a replica group, at the same step of the same attempt,
    and fires when they differ. A group are the workers whose place in the mesh is the same but for the data-parallel
    axis; without a mesh, all. Where no hashes were kept it compares the statistics, with a tolerance of `tolerance` *
    l2, and the finding is a warning at most. Buffers (such as the running statistics of batch normalisation), sharded
    parameters and experts are left out, and so is a parameter that becomes the same again and again (local SGD between
    its synchronisations).

    A hook writes replicated parameters on one worker only, unless it is told otherwise (workers="all").

    Why it matters
    --------------
    Replicas that drift apart average gradients of different models. The loss seldom shows it, and the checkpoint holds
    just one of them.

    Parameters
    ----------
    tolerance (share of l2, default 1e-6): without hashes, how far statistics may differ.
    parallel_axes (default dp): the axes of the mesh along which parameters are replicated.

    Example output
    --------------
    layer1.weight on worker 3 is not that of its replicas at step 120: l2 differs by 0.002 % (4 workers compared by
    hash).

    How to fix
    ----------
    Look for what one worker does alone: a step that it skips, another seed or initial state, a parameter that is not
    registered with the wrapper, gradients changed after they were averaged, or faulty memory on that machine.

    References
    ----------
    S. Li et al., PyTorch Distributed, VLDB 2020.
    """

    name: ClassVar[str] = "replica_desync"

    tolerance: float = parameter(1e-6, unit="share of l2", minimum=0, help="how far statistics may differ, no hashes")
    parallel_axes: tuple[str, ...] = parameter(("dp",), help="axes of the mesh along which parameters are replicated")

    def needs(self) -> Needs:
        """Read the hashes, and the statistics for where there are none and for the magnitude."""
        return Needs((*HASH, *SIZES), roles=ROLES)

    def select(self, catalogue: Mapping[str, TensorInfo]) -> list[str]:
        """Leave out what is not replicated."""
        return [name for name in super().select(catalogue) if not _is_local(catalogue[name])]

    def kinds(self) -> tuple[Kind, ...]:
        """Hashes that differ, statistics that differ by too much."""
        return Kind("l2_difference", 0.0, "hash"), Kind("l2_difference", self.tolerance, "statistics")

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each replica group in each mode."""
        workers = [w for w in view.run.workers() if not self.workers or w in self.workers]
        groups = self._groups(view, workers)
        if len(workers) < 2 or not groups:
            return Verdicts(not_applicable="there are no two workers with the same place but for data parallelism")
        troubles: list[Trouble] = []
        judged: set[str] = set()
        steps, periodic = 0, 0
        for ranks in groups:
            for mode in self.modes(view.run.modes()):
                group = _Group.of(view, names, mode, ranks)
                apart, by_hash, compared = group.differences(self.tolerance)
                steps = max(steps, int(compared.any(axis=1).sum()))
                judged.update(names[column] for column in np.flatnonzero(compared.any(axis=0)).tolist())
                for column in np.flatnonzero(apart.any(axis=0)).tolist():
                    rows = np.flatnonzero(compared[:, column])
                    if int((np.diff(apart[rows, column].astype(np.int8)) == -1).sum()) >= HEALED:
                        periodic += 1
                        continue
                    troubles.append(self._trouble(group, column, rows, apart[:, column], by_hash[:, column]))
        detail = f"{periodic} parameters become the same again and again: synchronised in intervals" if periodic else ""
        if not steps:
            detail = "no two workers saved a parameter at the same step: a hook with workers='all' does"
        return Verdicts(troubles=troubles, judged=sorted(judged), steps=steps, detail=detail)

    def message(self, facts: Facts) -> str:
        """Say which worker, and how far."""
        return f"{facts.tensor} {facts.note}."

    def hint(self, facts: Facts) -> str:
        """Say where to look first."""
        return "Look for what one worker does alone: a skipped step, another seed, a parameter outside the wrapper."

    def _groups(self, view: View, workers: Sequence[int]) -> list[list[int]]:
        """Return the workers that hold the same parameters, two or more each."""
        groups: dict[tuple[tuple[str, Any], ...], list[int]] = {}
        for worker in workers:
            mesh = view.run.attempts(worker)[-1].mesh
            place = tuple(sorted((axis, at) for axis, at in mesh.items() if axis not in self.parallel_axes))
            groups.setdefault(place, []).append(worker)
        return [ranks for ranks in groups.values() if len(ranks) > 1]

    def _trouble(self, group: _Group, column: int, rows: Ints, apart: Bools, by_hash: Bools) -> Trouble:
        """Return what is wrong with one parameter; `rows` are those at which it was compared."""
        bad = rows[apart[rows]]
        row, last = int(bad[0]), int(bad[-1])
        hashed = bool(by_hash[row])
        others, odd = group.minority(row, column, hashed)
        sizes = [group.distance(int(one), column) for one in bad]
        clean = rows[rows < row]
        who = f"worker {odd[0]}" if len(odd) == 1 else f"workers {', '.join(map(str, odd))}"
        how = f"l2 differs by {100 * sizes[0]:.2g} %" if sizes[0] > 0 else "with the same l2"
        both = "" if len(odd) != len(others) else "; which of them is right cannot be told"
        return Trouble(
            tensor=group.names[column],
            worker=odd[0],
            mode=group.mode,
            step=int(group.steps[row]),
            last_step=int(group.steps[last]),
            violations=len(bad),
            judged=len(rows),
            worst=max(sizes),
            kind=BY_HASH if hashed else BY_STATISTICS,
            before=int(group.steps[clean[-1]]) if len(clean) else None,
            note=(
                f"on {who} is not that of its replicas at step {group.steps[row]}: {how} ({len(odd) + len(others)}"
                f" workers compared by {'hash' if hashed else 'statistics, for no hashes were kept'}{both})"
            ),
            severity=self.severity if hashed else min(self.severity, Severity.WARNING, key=lambda one: one.rank),
        )


@dataclass(frozen=True)
class _Group:
    """The workers of one replica group in one mode; `tables` have the same steps and tensors, by worker."""

    names: Sequence[str]
    mode: str
    steps: Ints
    tables: Mapping[int, Mapping[str, Floats]]

    @classmethod
    def of(cls, view: View, names: Sequence[str], mode: str, ranks: Sequence[int]) -> _Group:
        """Read the statistics of each worker and place them at the steps of any."""
        tables = {rank: view.table(names, (*HASH, *SIZES), mode, rank) for rank in ranks}
        steps = np.unique(np.concatenate([table.steps for table in tables.values()]))
        return cls(names, mode, steps, {rank: _placed(table, steps) for rank, table in tables.items()})

    def differences(self, tolerance: float) -> tuple[Bools, Bools, Bools]:
        """Return [steps, tensors]: whether replicas differ, whether hashes tell so, and whether there were two."""
        first, *others = self.tables.values()
        known = {name: matrix.copy() for name, matrix in first.items()}  # of the first worker that has the tensor
        apart, by_hash, compared = (np.zeros(known["l2"].shape, np.bool_) for _ in range(3))
        for other in others:
            same_attempt = known["attempt"] == other["attempt"]
            hashed = same_attempt & ~np.isnan(known["hash_lo"]) & ~np.isnan(other["hash_lo"])
            by_hash |= hashed
            unlike = np.logical_or.reduce([known[name] != other[name] for name in HASH])
            slack = tolerance * np.maximum(known["l2"], other["l2"])
            far = np.logical_or.reduce([np.abs(known[name] - other[name]) > slack for name in SIZES])
            apart |= np.where(hashed, unlike, same_attempt & far)
            compared |= same_attempt
            fresh = np.isnan(known["attempt"])
            for name, matrix in known.items():
                matrix[fresh] = other[name][fresh]
        return apart, by_hash, compared

    def minority(self, row: int, column: int, hashed: bool) -> tuple[list[int], list[int]]:
        """Return the workers that agree with the most others, and the rest; of two equal parts the later."""
        names = HASH if hashed else SIZES
        held = {
            rank: tuple(np.nan_to_num([table[name][row, column] for name in names]).tolist())
            for rank, table in self.tables.items()
            if not np.isnan(table["attempt"][row, column])
        }
        same: dict[tuple[float, ...], list[int]] = {}
        for rank, values in held.items():
            same.setdefault(values, []).append(rank)
        most = max(same.values(), key=len)
        return most, [rank for rank in held if rank not in most]

    def distance(self, row: int, column: int) -> float:
        """Return how far apart the l2 of the workers are, as a share of the largest."""
        found = [table["l2"][row, column] for table in self.tables.values()]
        largest, least = np.nanmax(found), np.nanmin(found)
        return float((largest - least) / largest) if largest > 0 else 0.0


def _placed(table: Table, steps: Ints) -> dict[str, Floats]:
    """Return the statistics, and the attempt, of a worker at these steps; NaN where a tensor is absent."""
    rows = np.searchsorted(steps, table.steps)
    found = {}
    attempts = np.where(table.present, table.attempts[:, None].astype(np.float64), np.nan)
    for name, matrix in {**table.statistics, "attempt": attempts}.items():
        found[name] = np.full((len(steps), matrix.shape[1]), np.nan)
        found[name][rows] = matrix
    return found


def _is_local(info: TensorInfo) -> bool:
    """Tell whether a parameter is one's own by design: a shard, or an expert."""
    sharded = info.global_offset is not None or "Shard" in info.placement
    return sharded or any("expert" in text.lower() for text in (info.module, info.module_class))
