"""The part of peer.py that runs beside smdebug 1.0.34, in smdebug's own environment: it imports nothing of smdbg.

Reads a line of JSON for each thing to do and answers with a line of JSON: what it took, in seconds.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from smdebug.core.collection_manager import CollectionManager
from smdebug.core.hook import CallbackHook
from smdebug.core.modes import ModeKeys
from smdebug.core.reduction_config import ReductionConfig
from smdebug.core.reductions import get_numpy_reduction
from smdebug.core.save_config import SaveConfig
from smdebug.core.utils import FRAMEWORK
from smdebug.profiler.profiler_config_parser import ProfilerConfigParser
from smdebug.trials import create_trial

# Not its norms: of a matrix they are the matrix norms, the l2 of each a singular value decomposition, 90 ms of it.
REDUCTIONS = ReductionConfig(
    reductions=["min", "max", "mean", "std"], abs_reductions=["max", "mean"], save_raw_tensor=True
)
VALUES = ReductionConfig(save_raw_tensor=True)
LOSS = "scalar/loss"  # what its save_scalar makes of `loss`


class NeutralHook(CallbackHook):
    """smdebug's hook for plain arrays: what its hooks for frameworks do in a step, and nothing of a framework."""

    def __init__(self, out_dir: str, reductions: ReductionConfig) -> None:
        """Save all, at every step."""
        super().__init__(
            CollectionManager(),
            [],
            ProfilerConfigParser(FRAMEWORK.PYTORCH),
            out_dir=out_dir,
            reduction_config=reductions,
            save_config=SaveConfig(save_interval=1),
            save_all=True,
        )
        self.worker = self._get_worker_name()
        self._prepare_collections()
        self.export_collections()
        self.exported_collections = True

    def save(self, tensors: dict[str, Any], scalars: dict[str, float]) -> None:
        """Save one step; everything of it is in its files when this returns."""
        self._close_writers()
        self._increment_step()
        self._initialize_writers()
        for name, value in tensors.items():
            self._save_for_tensor(name, value)
        for name, number in scalars.items():
            self.save_scalar(name, number)
        self._close_writers()

    def _get_worker_name(self) -> str:
        return "worker_0"

    def _get_num_workers(self) -> int:
        return 1

    def _is_not_supported(self) -> bool:
        return False

    def _get_default_collections(self) -> list[str]:
        return ["all", "default"]

    def _export_model(self) -> None:
        pass

    @staticmethod
    def _make_numpy_array(tensor_value: Any) -> Any:
        return np.asarray(tensor_value)

    @staticmethod
    def _get_reduction_of_data(reduction_name: str, tensor_value: Any, tensor_name: str, abs: bool) -> Any:
        return get_numpy_reduction(reduction_name, tensor_value, abs)


class Work:
    """What can be asked for."""

    def __init__(self, tensors: int, side: int, scalars: int) -> None:
        """Make the step to save."""
        random = np.random.default_rng(0)
        block = random.standard_normal((tensors, side, side), np.float32)
        self.tensors = {f"layer{number}/value": tensor for number, tensor in enumerate(block)}
        self.scalars = {f"metric{number}": float(value) for number, value in enumerate(random.standard_normal(scalars))}

    def write(self, folder: str, steps: int, reductions: bool) -> float:
        """Save steps back to back, after one that is not measured."""
        hook = NeutralHook(folder, REDUCTIONS if reductions else VALUES)
        hook.save(self.tensors, self.scalars)
        start = time.perf_counter()
        for _ in range(steps):
            hook.save(self.tensors, self.scalars)
        took = time.perf_counter() - start
        hook.close()
        return took

    def scalar_steps(self, folder: str, steps: int) -> float:
        """Save steps of scalars alone, after one that is not measured."""
        hook = NeutralHook(folder, VALUES)
        hook.save({}, self.scalars)
        start = time.perf_counter()
        for _ in range(steps):
            hook.save({}, self.scalars)
        took = time.perf_counter() - start
        hook.close()
        return took

    def list(self, folder: str) -> float:
        """Open a run and list its tensors and steps."""
        start = time.perf_counter()
        trial = _opened(folder)
        assert len(trial.tensor_names()) >= len(self.tensors)
        assert trial.steps()
        return time.perf_counter() - start

    def series(self, folder: str, name: str, steps: int) -> float:
        """Read one tensor at all steps."""
        trial = _opened(folder)
        trial.tensor_names()  # which reads the index
        start = time.perf_counter()
        tensor = trial.tensor(name)
        found = [tensor.value(step, mode=ModeKeys.GLOBAL) for step in tensor.steps()]
        took = time.perf_counter() - start
        assert len(found) == steps
        assert np.array_equal(found[-1], self.tensors[name])
        return took

    def deviations(self, folder: str, steps: int) -> float:
        """Read the standard deviation of all tensors at all steps."""
        trial = _opened(folder)
        trial.tensor_names()  # which reads the index
        start = time.perf_counter()
        found = [
            [trial.tensor(name).reduction_value(step, "std") for step in trial.tensor(name).steps()]
            for name in self.tensors
        ]
        took = time.perf_counter() - start
        assert len(found[0]) == steps
        return took

    def write_many(self, folder: str, tensors: int, side: int, steps: int) -> float:
        """Save values and reductions of many small tensors, and a loss."""
        random = np.random.default_rng(0)
        block = random.standard_normal((tensors, side, side), np.float32)
        hook = NeutralHook(folder, REDUCTIONS)
        start = time.perf_counter()
        for step in range(steps):
            saved = {f"layer{number}/value": tensor for number, tensor in enumerate(block)}
            hook.save(saved, {"loss": 2.0 / (1 + step)})
        took = time.perf_counter() - start
        hook.close()
        return took

    def rules(self, folder: str, tensors: int, steps: int) -> float:
        """Judge by five rules, as plainly as the API lets one: open the run, ask for each tensor at each step."""
        start = time.perf_counter()
        trial = _opened(folder)
        names = [name for name in trial.tensor_names() if name != LOSS]
        found = [rule(trial, names) for rule in (_exploding, _vanishing, _all_zero, _variance, _not_decreasing)]
        took = time.perf_counter() - start
        assert len(names) == tensors and len(trial.steps()) == steps
        assert not any(found[:4])
        return took


def _each(trial: Any, names: list[str]) -> Any:
    for name in names:
        tensor = trial.tensor(name)
        for step in tensor.steps():
            yield tensor, step


def _exploding(trial: Any, names: list[str]) -> bool:
    return any([not np.isfinite(tensor.value(step)).all() for tensor, step in _each(trial, names)])


def _vanishing(trial: Any, names: list[str]) -> bool:
    return any([tensor.reduction_value(step, "mean", abs=True) < 1e-7 for tensor, step in _each(trial, names)])


def _all_zero(trial: Any, names: list[str]) -> bool:
    return any([np.mean(tensor.value(step) == 0) >= 1 for tensor, step in _each(trial, names)])


def _variance(trial: Any, names: list[str]) -> bool:
    return any([tensor.reduction_value(step, "std") ** 2 > 1e6 for tensor, step in _each(trial, names)])


def _not_decreasing(trial: Any, names: list[str]) -> bool:
    tensor = trial.tensor(LOSS)
    values = [float(tensor.value(step)) for step in tensor.steps()]
    return any([now > 0.999 * then for then, now in zip(values, values[10:], strict=False)])


def _opened(folder: str) -> Any:
    trial = create_trial(folder)
    trial._training_end_delay_refresh = 0  # it waits a second, once, to see whether more comes: not to be measured
    return trial


def main() -> None:
    """Do what each line says, until there are no more lines."""
    logging.disable(logging.WARNING)
    work: Work | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        name = asked.pop("do")
        if name == "begin":
            work, took = Work(**asked), 0.0
        else:
            action: Callable[..., float] = getattr(work, name)
            took = action(**asked)
        print(json.dumps({"seconds": took}), flush=True)


if __name__ == "__main__":
    sys.path[:] = [part for part in sys.path if Path(part or ".").resolve() != Path(__file__).resolve().parent]
    main()
