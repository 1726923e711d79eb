"""Rows of a tensor across blocks: what a rule needs of the rows before, for tensors that come and go.

A rule that compares a saved step with the one before it cannot count rows: a tensor is absent in some. The last rows at
which each tensor was present are carried over in the rule's state, so that it is the same where blocks are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smdbg.analysis.rule import NO_STEP, Block, Floats, Ints, State

STEPS, MODE_STEPS = "step", "mode step"


@dataclass(frozen=True)
class Rows:
    """The rows of a block behind `carried` earlier ones, which are each tensor's own; [carried + rows, tensors].

    An index of a row counts from the first carried one; NO_STEP stands for none. `earlier` holds the index of the
    newest row before each, and before the end, at which the tensor is present: [carried + rows + 1, tensors].
    """

    block: Block
    carried: int
    steps: Ints
    mode_steps: Ints
    earlier: Ints
    kept: dict[str, Floats]

    @property
    def own(self) -> Ints:
        """Return the index of each row of the block, int64[rows, 1]."""
        return np.arange(self.carried, len(self.steps), dtype=np.int64)[:, None]

    def stat(self, name: str, rows: Ints, columns: Ints) -> Floats:
        """Return a statistic at rows and columns that broadcast together; NaN for NO_STEP."""
        table = self.block.stat(name)
        if not len(table):
            return np.full(np.broadcast_shapes(rows.shape, columns.shape), np.nan)
        found: Floats = table[np.maximum(rows - self.carried, 0), columns]
        early = rows < self.carried
        if early.any():
            found = np.where(early, self.kept[name][np.clip(rows, 0, self.carried - 1), columns], found)
        return np.where(rows == NO_STEP, np.nan, found)

    def before(self, rows: Ints) -> Ints:
        """Return, for one index per tensor or a table of them, the newest row before at which the tensor is present."""
        columns = np.broadcast_to(np.arange(rows.shape[-1]), rows.shape)
        return np.where(rows == NO_STEP, NO_STEP, self.earlier[np.maximum(rows, 0), columns])

    def present_rows(self, column: int) -> Ints:
        """Return the indexes of the rows at which one tensor is present, ascending."""
        return np.flatnonzero(self.earlier[1:, column] == np.arange(len(self.steps)))

    def steps_at(self, rows: Ints, table: Ints | None = None) -> Ints:
        """Return the steps (or what else is in `table`) of a table of rows; NO_STEP for none."""
        columns = np.broadcast_to(np.arange(rows.shape[-1]), rows.shape)
        found = (self.steps if table is None else table)[np.maximum(rows, 0), columns]
        return np.where(rows == NO_STEP, NO_STEP, found)

    def state(self, keep: int) -> State:
        """Return what the next block needs of these rows: the last `keep` of each tensor."""
        rows = np.full((keep, self.steps.shape[1]), NO_STEP, np.int64)
        at = np.full(self.steps.shape[1], len(self.steps), np.int64)
        for index in range(keep - 1, -1, -1):
            rows[index] = at = self.before(at)
            if (at == NO_STEP).all():
                break
        columns = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
        state: State = {STEPS: self.steps_at(rows).tolist(), MODE_STEPS: self.steps_at(rows, self.mode_steps).tolist()}
        return state | {name: self.stat(name, rows, columns).tolist() for name in self.kept}


def with_earlier(block: Block, names: Sequence[str], keep: int, state: State) -> Rows:
    """Put the rows that `Rows.state` left before those of a block; `names` are the statistics they bring along."""
    shape = (keep, len(block.names))
    empty = [[NO_STEP] * shape[1]] * keep
    steps = np.array(state.get(STEPS, empty), np.int64).reshape(shape)
    mode_steps = np.array(state.get(MODE_STEPS, empty), np.int64).reshape(shape)
    wide = (len(block.steps), shape[1])
    present = np.concatenate([steps != NO_STEP, block.present])
    index = np.arange(len(present), dtype=np.int64)[:, None]
    newest = np.maximum.accumulate(np.where(present, index, NO_STEP))
    return Rows(
        block=block,
        carried=keep,
        steps=np.concatenate([steps, np.broadcast_to(block.steps[:, None], wide)]),
        mode_steps=np.concatenate([mode_steps, np.broadcast_to(block.mode_steps[:, None], wide)]),
        earlier=np.concatenate([np.full((1, shape[1]), NO_STEP, np.int64), newest]),
        kept={name: np.array(state.get(name, np.full(shape, np.nan)), np.float64).reshape(shape) for name in names},
    )
