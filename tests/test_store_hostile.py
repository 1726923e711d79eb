"""Metadata that lies: whatever a run says of itself, reading it ends in a plain error, soon and in little memory."""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.analysis.run import open_run
from smdbg.errors import DamagedData, NotARun
from smdbg.store import chunks as chunk_reader
from smdbg.store import reader
from smdbg.store.chunks import Chunk, read_elements, read_rows
from smdbg.store.dtypes import MOST_EMPTY, decode, encode, zarr_dtype
from smdbg.store.format import LOG_ROWS, ArraySpec, entry_from_json, values_spec
from smdbg.store.worker_group import with_checksum

Json = dict[str, Any]

HUGE = 1 << 40


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "run"
    with smdbg.Hook(path) as hook:
        for step in range(5):
            hook.save_tensor("x", np.arange(4.0) + step)
            hook.save_tensor("text", np.array(["a", "bc"]))
            hook.save_tensor("when", np.array(["2024-01-01"], "M8[s]"))
            hook.save_tensor("grows", np.ones(2 + step))
            hook.save_scalar("number", 1.0)
            hook.end_step()
    read_everything(path)
    return path


def read_everything(path: Path) -> None:
    """Ask all that a reader asks of a run."""
    run = open_run(path)
    assert run.status == "completed" and run.created >= 0 and run.world_size == 1
    assert isinstance((run.hyperparameters, run.versions, run.argv, run.attempts()), tuple)
    for name in run.tensors():
        run.stats("mean", tensors=[name])
        run.tensor(name).values(index=None)
        run.tensor(name).features()
    run.stats("rms")


def refused(path: Path, *errors: type[Exception]) -> str:
    """Read, and return the message it is refused with, which must come soon and take little memory."""
    tracemalloc.start()
    begun = time.monotonic()
    try:
        with pytest.raises(errors or DamagedData) as caught:
            read_everything(path)
        assert time.monotonic() - begun < 3
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value) or "workers/00000" in str(caught.value)
    return str(caught.value)


def change(honest: Path, to: Path, lie: Callable[[Json], object]) -> Path:
    """Copy the run and let `lie` change its worker's zarr.json, whose checksum is then made anew."""
    shutil.copytree(honest, to)
    file = to / "workers" / "00000" / "zarr.json"
    group = json.loads(file.read_text())
    lie(group)
    group["attributes"]["smdbg"] = with_checksum(group["attributes"]["smdbg"])
    file.write_text(json.dumps(group))
    return to


def facts_of(group: Json) -> Json:
    facts: Json = group["attributes"]["smdbg"]
    return facts


def entry(group: Json, name: str) -> Json:
    return next(e for e in facts_of(group)["catalogue"] if e["name"] == name)


def array(group: Json, path: str) -> Json:
    found: Json = group["consolidated_metadata"]["metadata"][path]
    return found


def chunk_shape(group: Json, path: str) -> list[int]:
    found: list[int] = array(group, path)["codecs"][0]["configuration"]["chunk_shape"]
    return found


def shard_shape(group: Json, path: str) -> list[int]:
    found: list[int] = array(group, path)["chunk_grid"]["configuration"]["chunk_shape"]
    return found


MISSING = object()


@pytest.mark.parametrize(
    "key, value",
    [
        (key, value)
        for key, bad in {
            "status": (MISSING, 3, None),
            "catalogue_version": (MISSING, "a", -1, 1.5, True),
            "mesh": (MISSING, 3, [["a", 1]]),
            "dropped_steps": (MISSING, "many", -1),
            "dropped_rows": (MISSING, None, 1e300),
            "collections": (MISSING, [1], {"tensors": 3}, {"tensors": {"bit": True}}, {"../x": {"bit": 0}}),
            "catalogue": (MISSING, {}, [3], ["x"]),
        }.items()
        for value in bad
    ],
)
def test_facts_of_a_worker(honest: Path, tmp_path: Path, key: str, value: Any) -> None:
    def lie(group: Json) -> None:
        facts_of(group).pop(key)
        if value is not MISSING:
            facts_of(group)[key] = value

    message = refused(change(honest, tmp_path / "run", lie))
    assert str(tmp_path / "run") in message and "workers/00000" in message


@pytest.mark.parametrize(
    "key, value",
    [
        ("created", "yesterday"),
        ("created", 1e300),
        ("created", None),
        ("world_size", "a"),
        ("world_size", -1),
        ("versions", 5),
        ("versions", [["a", "b"]]),
        ("hyperparameters", 7),
        ("argv", 3),
        ("argv", "train.py"),
        ("argv", [1]),
        ("writers", 0),
        ("writers", ["a"]),
    ],
)
def test_facts_of_the_run(honest: Path, tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "run"
    shutil.copytree(honest, path)
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["smdbg"][key] = value
    (path / "zarr.json").write_text(json.dumps(root))
    message = refused(path, NotARun if key == "writers" else DamagedData)
    assert key in message or key == "writers"


def names(*statistics: str) -> Callable[[Json], None]:
    def lie(group: Json) -> None:
        stats = array(group, "tensors/stats")
        stats["attributes"]["smdbg"]["statistics"] = list(statistics)
        stats["shape"][2] = shard_shape(group, "tensors/stats")[2] = len(statistics)
        chunk_shape(group, "tensors/stats")[2] = len(statistics)

    return lie


def wide_array(group: Json) -> None:
    entry(group, "x")["slots"][0][2] = HUGE
    entry(group, "x")["shape"] = [HUGE]
    array(group, "tensors/float64")["shape"][1] = shard_shape(group, "tensors/float64")[1] = 2 * HUGE
    chunk_shape(group, "tensors/float64")[:] = [1, 8]


def wide_chunks(group: Json) -> None:
    wide_array(group)
    chunk_shape(group, "tensors/float64")[:] = [1, 2 * HUGE]


def wide_table(group: Json) -> None:
    array(group, "tensors/stats")["shape"][1] = 1 << 30


def wide_table_and_chunks(group: Json) -> None:
    wide_table(group)
    shard_shape(group, "tensors/stats")[1] = chunk_shape(group, "tensors/stats")[1] = 1 << 30


def text_among_numbers(group: Json) -> None:
    names("count")(group)


LIES: dict[str, Callable[[Json], object]] = {
    "a log of 2^32 steps": lambda g: array(g, "steps")["shape"].__setitem__(0, 1 << 32),
    "a log of 2^60 steps": lambda g: array(g, "steps")["shape"].__setitem__(0, 1 << 60),
    "a log of text": lambda g: array(g, "steps").update(shape=["a"]),
    "no texts, many": lambda g: entry(g, "text").update(shape=[HUGE, 0]),
    "texts, many": lambda g: entry(g, "text").update(shape=[HUGE, 1]),
    "an empty shape that no array has": lambda g: entry(g, "x").update(shape=[0, 1 << 61, 1 << 61]),
    "a shape of 99 sizes": lambda g: entry(g, "x").update(shape=[1] * 99),
    "a shape that is no list": lambda g: entry(g, "x").update(shape="4"),
    "a large shape": lambda g: entry(g, "x").update(shape=[HUGE]),
    "a wide array": wide_array,
    "a wide array of large chunks": wide_chunks,
    "a wide table": wide_table,
    "a wide table of large chunks": wide_table_and_chunks,
    "statistics without count": names("nan"),
    "statistics without count first": names("last", "count"),
    "no statistics": names(),
    "an unknown statistic": names("count", "evil"),
    "a statistic twice": names("count", "count"),
    "some statistics": names("count", "min"),
    "more names than statistics": lambda g: array(g, "tensors/stats")["attributes"]["smdbg"]["statistics"].append("l0"),
    "statistics of a wrong type": lambda g: array(g, "tensors/stats").update(data_type="int64"),
    "statistics among values": lambda g: entry(g, "x")["stats"][0].__setitem__(0, "float64"),
    "statistics nowhere": lambda g: entry(g, "x")["stats"][0].__setitem__(0, "zzz"),
    "statistics in another collection": lambda g: entry(g, "x")["stats"][0].__setitem__(0, "../metrics/stats"),
    "statistics outside": lambda g: entry(g, "x")["stats"][0].__setitem__(1, 99),
    "layout among statistics": lambda g: entry(g, "grows")["layout"][0].__setitem__(0, "stats"),
    "features among statistics": lambda g: entry(g, "x").update(features=[["stats", 0, 1]], feature_axis=0),
    "values among statistics": lambda g: entry(g, "x")["slots"][0].__setitem__(0, "stats"),
    "values outside": lambda g: entry(g, "x")["slots"][0].__setitem__(1, HUGE),
    "text among numbers": text_among_numbers,
    "a unit that is none": lambda g: entry(g, "when")["slots"][0].__setitem__(3, "M8[zz]"),
    "a structure": lambda g: entry(g, "when")["slots"][0].__setitem__(3, "M8[s],i4"),
    "a dtype that is none": lambda g: entry(g, "x")["slots"][0].__setitem__(3, "evil"),
    "a narrower dtype": lambda g: entry(g, "x")["slots"][0].__setitem__(3, "float32"),
    "a wider dtype": lambda g: entry(g, "x")["slots"][0].__setitem__(3, "complex128"),
    "rows that begin late": lambda g: array(g, "tensors/stats")["attributes"]["smdbg"].update(first_row=1 << 50),
    "children that are a list": lambda g: g["consolidated_metadata"].update(metadata=[]),
}


@pytest.mark.parametrize("lie", list(LIES))
def test_catalogue(honest: Path, tmp_path: Path, lie: str) -> None:
    refused(change(honest, tmp_path / "run", LIES[lie]))


def test_facts_that_only_describe_do_no_harm(honest: Path, tmp_path: Path) -> None:
    """An own hook may have written them; the run is readable all the same."""

    def lie(group: Json) -> None:
        entry(group, "x").update(role={"a": 1}, forward_order="x", aliases="x", tags=None, requires_grad=3)

    path = change(honest, tmp_path / "run", lie)
    read_everything(path)
    info = open_run(path).tensor("x").info
    assert (info.role, info.forward_order, info.aliases, info.tags, info.requires_grad) == ("", None, (), (), None)
    with pytest.raises(TypeError):
        entry_from_json({"name": 3, "collection": "a"})


@pytest.mark.parametrize("status", ["completed", "running"])
def test_a_long_log_is_looked_at_before_it_is_asked_for(
    honest: Path, tmp_path: Path, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few objects, and among them the last: no request is made for the million that the metadata tell of."""

    def lie(group: Json) -> None:
        array(group, "steps")["shape"][0] = 1 << 32
        facts_of(group)["status"] = status

    path = change(honest, tmp_path / "run", lie)
    log = path / "workers" / "00000" / "steps" / "c"
    shutil.copytree(log / "0", log / str((1 << 32) // LOG_ROWS - 1))
    monkeypatch.setattr(reader, "log_spec", lambda: pytest.fail("a chunk of the log was asked for"))
    assert "chunk 1 of 1048576" in refused(path)


def test_a_long_log_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The listing finds what a long run wrote, closed or not."""
    monkeypatch.setattr(reader, "FEW_CHUNKS", 1)
    with smdbg.Hook(tmp_path / "run") as hook:
        for step in range(2 * LOG_ROWS + 10):
            if step % 2048 == 0:
                hook.save_scalar("number", step)
            else:
                hook.set_step(step + 1)
            hook.end_step()
        hook.flush()
        assert open_run(tmp_path / "run").tensor("number").steps()[-1] >= 2 * LOG_ROWS - 2048
    assert open_run(tmp_path / "run").status == "completed"


class Empty:
    """A store that has nothing, and counts what it is asked for."""

    url = "nowhere"
    copies = 0

    def __init__(self) -> None:
        self.asked = 0

    def ranges(self, wanted: Any) -> list[None]:
        self.asked += len(wanted)
        return [None] * len(wanted)


def test_rows_are_believed_only_when_they_come() -> None:
    """Neither the memory of the answer nor the list of its chunks is made before the first chunk is there."""
    store: Any = Empty()
    table = ArraySpec("a/stats", "stats", "float64", (1 << 16, 8), (1, 1 << 16, 8), (1, 1 << 16, 8), ("r", "t", "s"))
    values = ArraySpec("a/x", "values", "uint8", (HUGE,), (1, HUGE), (1, 8), ("row", "element"))
    rows = np.arange(100_000)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedData, match="missing"):
            read_rows(store, "w", table, rows)
        with pytest.raises(DamagedData, match="missing"):
            read_elements(store, "w", values, rows, [(0, HUGE)])
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert store.asked <= 33  # a batch each
    asked = store.asked
    for run in ((0, HUGE + 1), (-1, 3), (5, 4)):
        with pytest.raises(DamagedData, match="outside"):
            read_elements(store, "w", values, rows, [run])
    with pytest.raises(DamagedData, match="whole rows"):
        read_rows(store, "w", values, rows)
    assert store.asked == asked


def test_batches_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks come in the order asked for, wherever batches are cut, each once."""
    monkeypatch.setattr(chunk_reader, "BATCH_CHUNKS", 3)
    spec = values_spec("a", "x", "float64", 8)
    batches: list[int] = []

    def fetched(backend: Any, given: ArraySpec, parts: Any) -> Any:
        batches.append(len(parts))
        yield from ((part.chunk, None) for part in parts)

    monkeypatch.setattr(chunk_reader, "_fetch_batch", fetched)
    wanted = [Chunk(n) for n in range(8)]
    store: Any = Empty()
    assert [chunk for chunk, _ in chunk_reader.fetch(store, "w", spec, iter(wanted))] == wanted
    assert batches == [3, 3, 2]


@pytest.mark.parametrize("dtype", ["U1", "S1"])
@pytest.mark.parametrize("count", [0, 3, MOST_EMPTY, MOST_EMPTY + 1])
def test_empty_texts_come_back(dtype: str, count: int) -> None:
    elements, name, shape = encode(np.zeros(count, dtype))
    found = decode(elements, name, shape)
    assert found.shape == (count,) and not found.astype(bool).any()


@pytest.mark.parametrize(
    "name, shape", [("str", (HUGE, 0)), ("bytes", (3, 2)), ("str", ()), ("float64", (3,)), ("uint8", (-1, 2, -1))]
)
def test_shapes_that_the_elements_do_not_have(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(DamagedData, match="stored elements"):
        decode(np.zeros(4, "uint8"), name, shape)


@pytest.mark.parametrize("name", ["M8[zz]", "M8[s],i4", "m8x", "M8[s", "evil", "object", ""])
def test_dtypes_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="unknown dtype"):
        zarr_dtype(name)
    assert zarr_dtype("M8[25us]") == zarr_dtype("m8[D]") == zarr_dtype("M8") == "int64"
