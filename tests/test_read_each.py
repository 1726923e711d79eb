"""Many values one after the other, in little memory; only the bytes that are needed; how many requests at a time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.analysis import tensor as tensor_module
from smdbg.errors import BadConfig, BadSelection, OnlyStatistics, StepNotSaved
from smdbg.store.backend import Fill, LocalBackend, Range

RAW = smdbg.ReductionConfig(save_raw_tensor=True)
WIDE = 1_300_000  # float32 elements: a row of more than 4 MiB


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("each") / "run"
    with smdbg.Hook(path, reduction_config=RAW, when_full="block") as hook:
        for step in range(12):
            hook.set_mode("train" if step % 3 else "eval")
            hook.save_tensor("x", np.arange(WIDE, dtype=np.float32) + step, "wide")
            hook.save_tensor("beside", np.full(100_001, step, np.float32), "wide")
            hook.save_tensor("text", np.array(["a" * (step + 1)]), "texts")
            hook.save_tensor("changes", np.full((step % 4, 3), step), "narrow")
            hook.end_step()
    return path


@pytest.mark.parametrize("batch", [1, 3 * WIDE * 4, 1 << 30])
def test_each_is_values(url: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(tensor_module, "EACH_BYTES", batch)
    monkeypatch.setattr(tensor_module, "EACH_STEPS", 5)
    run = smdbg.open_run(url)
    for name in ("x", "beside", "text", "changes"):
        tensor = run.tensor(name)
        for steps in (None, [7, 0, 0, 11], []):
            asked = list(range(12)) if steps is None else steps
            found = list(tensor.each(steps))
            assert [step for step, _ in found] == asked
            for step, value in found:
                assert np.array_equal(value, tensor.value(step)) and value.dtype == tensor.value(step).dtype
    assert [step for step, _ in run.tensor("x").each(mode="eval")] == [0, 3, 6, 9]
    assert [value.tolist() for _, value in run.tensor("x").each([4, 2], index=slice(-2, None))] == [
        [WIDE + 2, WIDE + 3],
        [WIDE, WIDE + 1],
    ]


def test_each_can_be_left_and_raises_at_once(url: Path) -> None:
    tensor = smdbg.open_run(url).tensor("x")
    for step, value in tensor.each():
        if step == 2:
            assert value[0] == 2
            break
    with pytest.raises(StepNotSaved):
        next(tensor.each([3, 99]))


def test_each_of_statistics_only(tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run", reduction_config=smdbg.ReductionConfig(save_raw_tensor=False)) as hook:
        hook.save_tensor("x", np.ones(3))
    tensor = smdbg.open_run(tmp_path / "run").tensor("x")
    assert list(tensor.each()) == []
    with pytest.raises(OnlyStatistics):
        list(tensor.each([0]))


def test_each_takes_bounded_memory(tmp_path: Path) -> None:
    """A run of 300 MB through a process whose own use of memory hardly grows."""
    with smdbg.Hook(tmp_path / "run", reduction_config=RAW, when_full="block") as hook:
        for step in range(75):
            hook.save_tensor("x", np.full(1 << 20, step, np.float32))
            hook.end_step()
    code = (
        "import resource, sys, smdbg\n"
        "tensor = smdbg.open_run(sys.argv[1]).tensor('x')\n"
        "tensor.value(0)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "total = sum(int(value[-1]) for _, value in tensor.each())\n"
        "print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, check=True)
    total, grown = map(int, done.stdout.split())
    assert total == sum(range(75)) and grown < 160 << 10, "KiB"


class Counting(LocalBackend):
    """Counts the bytes that are asked for."""

    bytes = 0

    def ranges(self, wanted: Sequence[Range]) -> list[bytes | None]:
        found = super().ranges(wanted)
        self.bytes += sum(len(data or b"") for data in found)
        return found

    def fill(self, wanted: Sequence[Fill]) -> list[bool | None]:
        self.bytes += sum(w.size for w in wanted)
        return super().fill(wanted)


@pytest.mark.parametrize(
    "index, chunks",
    [
        (5, 1),
        (slice(10, 20), 1),
        (slice(0, 65536), 2),
        (slice(None, None, 400_000), 4),
        (slice(-3, None), 1),
        (slice(0, 0), 0),
    ],
)
def test_a_slice_reads_the_chunks_it_touches(url: Path, index: Any, chunks: int) -> None:
    run = smdbg.open_run(url)
    tensor = run.tensor("x")
    tensor.steps()  # the tables are read now
    backend = run._stored.backend = Counting(str(url))
    found = tensor.value(3, index=index)
    assert np.array_equal(found, (np.arange(WIDE, dtype=np.float32) + 3)[index])
    spec = run._stored.attempts[0].specs["wide/float32"]
    assert spec.chunk_bytes < 300 << 10 and backend.bytes <= chunks * (spec.chunk_bytes + 4)
    assert (backend.bytes > 0) == (chunks > 0)


def test_requests_at_a_time(url: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain = LocalBackend.__init__

    def init(self: Any, path: str, concurrency: int = 8) -> None:
        asked.append(concurrency)
        plain(self, path, concurrency)

    monkeypatch.setattr(LocalBackend, "__init__", init)
    smdbg.open_run(url)
    smdbg.open_run(url, concurrency=3)
    monkeypatch.setenv("SMDBG_CONCURRENCY", "17")
    smdbg.open_run(url)
    smdbg.open_run(url, concurrency=2)
    assert asked == [8, 3, 17, 2]
    for wrong in ("0", "-1", "many", "1000", "1.5", "²"):
        monkeypatch.setenv("SMDBG_CONCURRENCY", wrong)
        with pytest.raises(BadConfig, match="SMDBG_CONCURRENCY must be a number from 1 to"):
            smdbg.open_run(url)
    for bad in (0, True, "8", 2.0, 1000):
        with pytest.raises(BadSelection, match="concurrency must be a number"):
            smdbg.open_run(url, concurrency=bad)  # type: ignore[arg-type]
