"""How long the training waits for the hook at a saved step, against one memory copy of the same bytes."""

from __future__ import annotations

import time

import numpy as np
from setting import Setting
from timing import Cost, Line, compare, compare_processor, interleaved, timed
from workload import stored

from smdbg import Hook

ROUNDS = 20
GOAL = 1.3


def measure(setting: Setting) -> list[Line]:
    """Return the lines for S3 while the store keeps up: each step is committed before the next begins."""
    saved = setting.step()
    target = np.empty_like(saved.block)

    with Hook(setting.s3_url()) as hook:
        save = timed(lambda: saved.save(hook), time.thread_time)

        def keeping_up() -> Cost:
            cost = save()
            stored(hook)
            return cost

        costs = interleaved(
            setting.rounds(ROUNDS),
            {
                "copy": timed(lambda: np.copyto(target, saved.block), time.thread_time),
                "fresh": timed(lambda: [tensor.copy() for tensor in saved.block], time.thread_time),
                "ours": keeping_up,
            },
        )
    name = "a saved step, against a copy into memory in use"
    return [
        compare(name, costs["ours"], costs["copy"], GOAL),
        compare_processor("of it, processor time of the training thread", costs["ours"], costs["copy"]),
        compare("the same, against a copy of each tensor", costs["ours"], costs["fresh"]),
    ]
