"""What is saved in all measurements: a step of 13 MB, 50 float32 tensors of 256 x 256 and 200 scalars."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smdbg import Hook

TENSORS, SIDE, SCALARS = 50, 256, 200


@dataclass(frozen=True)
class Step:
    """One step's values. `block` float32 [tensors, side, side] holds all tensors, `scalars` float64 [scalars]."""

    block: NDArray[np.float32]
    scalars: NDArray[np.float64]

    def save(self, hook: Hook) -> None:
        """Hand the step to the hook and close it; full values and the default statistics are kept."""
        for number, tensor in enumerate(self.block):
            hook.save_tensor(f"layer{number}/value", tensor)
        for number, value in enumerate(self.scalars):
            hook.save_scalar(f"metric{number}", value)
        hook.end_step()

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self.block.nbytes + self.scalars.nbytes

    def as_bytes(self) -> bytes:
        """Return the same bytes in one piece: what a raw write writes."""
        return self.block.tobytes() + self.scalars.tobytes()


def step(tensors: int = TENSORS, side: int = SIDE, scalars: int = SCALARS) -> Step:
    """Return a step of random normal values."""
    random = np.random.default_rng(0)
    return Step(random.standard_normal((tensors, side, side), np.float32), random.standard_normal(scalars))


def stored(hook: Hook) -> None:
    """Wait until everything handed over is committed. Raises RuntimeError: a figure without its data is none."""
    if not hook.flush(120.0):
        raise RuntimeError("the store did not take the steps")
