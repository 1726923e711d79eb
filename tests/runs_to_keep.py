"""A run that has something of everything, what it holds, and a store that breaks at a chosen call."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import smdbg
from smdbg import CollectionConfig, Hook, ReductionConfig, SaveConfig
from smdbg.errors import OnlyStatistics
from smdbg.store.backend import Data, LocalBackend

RAW = ReductionConfig(save_raw_tensor=True)
EVERY = SaveConfig(save_interval=1)
STEPS = 9

Held = dict[tuple[str, int], Any]


def write_run(url: Any, steps: int = STEPS, wide: bool = True, **options: Any) -> None:
    """Write single numbers, short rows (a growing tensor among them), and at two steps rows of 4 MiB."""
    own = [CollectionConfig(name, save_config=EVERY, reduction_config=RAW) for name in ("short", "long")]
    tight = CollectionConfig("tight", save_config=EVERY, reduction_config=RAW, compression="zstd")
    rng = np.random.default_rng(3)
    with Hook(url, collections=[*own, tight, "losses"], on_error="raise", **options) as hook:
        for step in range(hook.step, hook.step + steps):
            hook.save_tensor("a", rng.normal(size=(3, 2)), "short")
            hook.save_tensor("rows", rng.normal(size=20_000), "short")  # a chunk each
            hook.save_tensor("grows", rng.integers(0, 9, (step + 1, 2)), "short")
            hook.save_tensor("t", rng.integers(0, 3, 500).astype("float32"), "tight")
            if wide and step in (1, 4):
                hook.save_tensor("big", rng.normal(size=1 << 20).astype("float32"), "long")
            hook.save_scalar("loss", rng.random(), "losses")
            hook.end_step()


def held(url: Any, **options: Any) -> Held:
    """Return every value and statistic of a run, None for a value that is not kept."""
    run = smdbg.open_run(url, attempt="all", **options)
    out: Held = {}
    for name in run.tensors():
        tensor = run.tensor(name)
        for step in tensor.steps().tolist():
            try:
                out[name, step] = tensor.value(step)
            except OnlyStatistics:
                out[name, step] = None
        for statistic in ("mean", "max", "count"):
            steps, found = tensor.stat(statistic)
            out |= {(f"{statistic} of {name}", step): value for step, value in zip(steps.tolist(), found, strict=True)}
    return out


def assert_same(found: Held, truth: Held) -> None:
    assert list(found) == list(truth)
    for key, value in truth.items():
        np.testing.assert_array_equal(found[key], value, err_msg=str(key))


def files(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class BreaksAt(LocalBackend):
    """A folder whose k-th change is not made but raises; later ones raise too, as if the process had ended."""

    def __init__(self, path: Any, call: int) -> None:
        super().__init__(str(path))
        self.calls = 0
        self._call = call
        self._counting = threading.Lock()

    def _change(self, action: Any) -> Any:
        with self._counting:
            self.calls += 1
            if self.calls >= self._call:
                raise KeyboardInterrupt
        return action()

    def put(self, key: str, data: Data) -> None:
        self._change(lambda: super(BreaksAt, self).put(key, data))

    def create(self, key: str, data: Data) -> bool:
        return bool(self._change(lambda: super(BreaksAt, self).create(key, data)))

    def remove(self, keys: Sequence[str]) -> None:
        for key in keys:  # one by one, since a removal of many may stop in between
            self._change(lambda key=key: super(BreaksAt, self).remove([key]))
