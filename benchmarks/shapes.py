"""The large runs of scale.py, written and read in processes of their own. Each prints what it took as JSON.

All arguments are texts, as they come from a command line.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

import numpy as np
from child import Watch
from numpy.typing import NDArray

from smdbg import Hook, ReductionConfig, SaveConfig
from smdbg.analysis.run import open_run

HUGE_COLUMNS = 1024
BLOCK_BYTES = 1 << 26


def _watch(url: str) -> Watch:
    """Return a watch started now; what takes long to import is there already."""
    if url.startswith("s3://"):
        import s3fs  # noqa: F401
    return Watch()


def _tell(watch: Watch, **more: Any) -> None:
    print(json.dumps({**watch.found(), **more}))


def _require(hook: Hook) -> None:
    """Raise RuntimeError if anything was left out: a figure without its data is none."""
    writer = hook._writer
    if not hook.flush(300.0) or writer is None or writer.dropped_rows or any(writer._skipped):
        raise RuntimeError("the store did not take everything")


def tensors(url: str, tensors: str, steps: str, side: str, values: str) -> None:
    """Save float32 tensors [side, side] at each step: their statistics, and with `values` '1' themselves."""
    block = np.random.default_rng(0).standard_normal((int(tensors), int(side), int(side)), np.float32)
    names = [f"layer{number}/value" for number in range(len(block))]
    watch = _watch(url)
    reduction = ReductionConfig(save_raw_tensor=values == "1")
    with Hook(url, reduction_config=reduction, when_full="block") as hook:
        for _ in range(int(steps)):
            for name, tensor in zip(names, block, strict=True):
                hook.save_tensor(name, tensor)
            hook.end_step()
        _require(hook)
    _tell(watch, given=block.nbytes * int(steps))


def training(url: str, layers: str, steps: str, side: str, values: str) -> None:
    """Save what a healthy training of so many layers would: statistics of its weights, gradients, updates and outputs.

    Beside them a loss that falls, a learning rate and a gradient norm. With `values` '1' full values too.
    """
    random = np.random.default_rng(0)
    shape = (int(layers), int(side), int(side))
    weights, noise = random.standard_normal(shape, np.float32) / 8, random.standard_normal((64, *shape), np.float32)
    names = [f"layer{number}.weight" for number in range(len(weights))]
    watch = _watch(url)
    reduction = ReductionConfig(save_raw_tensor=values == "1")
    collections = ["losses", "metrics", "weights", "gradients", "updates", "outputs"]
    with Hook(url, SaveConfig(), reduction, collections, when_full="block") as hook:
        hook.set_mode("train")
        for step in range(int(steps)):
            scale = np.float32(1e-3 + 0.1 / (1 + step / 50))
            for number, name in enumerate(names):
                draw = noise[(step + number) % len(noise), number]
                of = {"of": name, "module_class": "Linear", "forward_order": number}
                hook.save_tensor(name, weights[number], "weights", role="weight", module_class="Linear")
                hook.save_tensor(f"gradient/{name}", scale * draw, "gradients", role="gradient", **of)
                hook.save_tensor(f"update/{name}", np.float32(-1e-3) * draw, "updates", role="update", **of)
                hook.save_tensor(f"layer{number}/output", draw, "outputs", role="output", **of)
            weights -= np.float32(1e-3) * noise[step % len(noise)]
            hook.save_scalar("loss", 2.3 / (1 + step / 100) + 0.05 * random.random(), "losses")
            hook.save_tensor("sgd/lr/0", np.float64(0.1), "metrics", role="lr")
            hook.save_scalar("sgd/grad_norm", float(scale) * 10 * (1 + 0.1 * random.random()))
            hook.end_step()
        _require(hook)
    _tell(watch, given=4 * weights.nbytes * int(steps))


def scalars(url: str, scalars: str, steps: str) -> None:
    """Save scalars at each step."""
    names = [f"metric{number}" for number in range(int(scalars))]
    watch = _watch(url)
    with Hook(url, when_full="block") as hook:
        for step in range(int(steps)):
            for name in names:
                hook.save_scalar(name, 1 / (step + 1))
            hook.end_step()
        _require(hook)
    _tell(watch, given=8 * len(names) * int(steps))


def ranks(url: str, first: str, count: str, world: str, steps: str, side: str) -> None:
    """Be some ranks of a training: each saves five tensors and ten scalars at each step."""
    block = np.random.default_rng(int(first)).standard_normal((5, int(side), int(side)), np.float32)
    watch = _watch(url)
    with ExitStack() as stack:
        mine = range(int(first), int(first) + int(count))
        hooks = [stack.enter_context(Hook(url, rank=rank, world_size=int(world), when_full="block")) for rank in mine]
        for _ in range(int(steps)):
            for hook in hooks:
                for number, tensor in enumerate(block):
                    hook.save_tensor(f"layer{number}/value", tensor)
                for number in range(10):
                    hook.save_scalar(f"metric{number}", float(number))
                hook.end_step()
        for hook in hooks:
            _require(hook)
    _tell(watch, given=len(mine) * int(steps) * (block.nbytes + 80))


def read(url: str) -> None:
    """Open a run and read one statistic of all tensors of all workers."""
    watch = _watch(url)
    run = open_run(url)
    found = [run.stats("l2", worker=worker) for worker in run.workers()]
    _tell(watch, workers=len(found), steps=len(found[0].steps), tensors=len(found[0].names))


def huge_value(nbytes: int) -> NDArray[np.float32]:
    """Return float32 [rows, 1024] of so many bytes; no two rows close by are equal."""
    block = np.random.default_rng(0).standard_normal(min(nbytes, BLOCK_BYTES) // 4, np.float32)
    value = np.empty(nbytes // 4, np.float32)
    for start in range(0, value.size, block.size):
        part = value[start : start + block.size]
        np.add(block[: part.size], np.float32(start // block.size), out=part)
    return value.reshape(-1, HUGE_COLUMNS)


def huge(url: str, nbytes: str) -> None:
    """Save one tensor once."""
    value = huge_value(int(nbytes))
    watch = Watch()
    with Hook(url, when_full="block", buffer_bytes=4 * value.nbytes) as hook:
        hook.save_tensor("embedding", value)
        hook.end_step()
        _require(hook)
        writer = hook._writer
        room = writer.room.peak if writer is not None else 0
    _tell(watch, room=room)


def huge_raw(path: str, nbytes: str) -> None:
    """Write the same bytes into one file."""
    value = huge_value(int(nbytes))
    watch = Watch()
    with open(path, "wb") as file:
        file.write(memoryview(value).cast("B"))
    _tell(watch)
