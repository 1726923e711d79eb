"""Shards and the commit log: the bytes are those of plain Zarr, and only what the log lists exists."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import smdbg
from smdbg.errors import DamagedData, StepNotSaved
from smdbg.store.format import (
    ArraySpec,
    Entry,
    Place,
    TensorInfo,
    ValueSlot,
    array_json,
    entry_from_json,
    entry_to_json,
    parse_worker,
    spec_from_json,
    table_spec,
    valid_collection,
    values_spec,
    worker_key,
)
from smdbg.store.pool import ShardPool
from smdbg.store.rows import Narrow, Wide
from smdbg.store.shard import CRC, Shard, index_bytes, intact

# --- shards ---


def zarr_array(spec: ArraySpec, rows: int, objects: dict[str, bytes], folder: Path) -> Any:
    """Return an array of zarr-python over these objects."""
    import zarr

    place = folder / spec.path
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    (place / "zarr.json").write_text(json.dumps(array_json(spec, rows)))
    for key, data in objects.items():
        target = folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return zarr.open_array(str(place), mode="r+")


def test_a_shard_is_what_zarr_writes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Byte for byte, on grids along one axis, where no chunk is all fill (Zarr leaves those out)."""
    import zarr

    folder = tmp_path_factory.mktemp("same")

    @given(chunks=st.integers(1, 7), size=st.integers(1, 40), seed=st.integers(0, 99))
    @settings(max_examples=40)
    def same(chunks: int, size: int, seed: int) -> None:
        content = np.random.default_rng(seed).integers(1, 256, (1, chunks * size), dtype=np.uint8)
        spec = ArraySpec("a", "values", "uint8", (chunks * size,), (1, chunks * size), (1, size), ("row", "e"))
        shard = Shard(size, chunks)
        shard.write(0, content.reshape(-1))
        ours = bytes(shard.seal())
        array = zarr_array(spec, 1, {}, folder)
        array[:] = content
        theirs = (folder / "a/c/0/0").read_bytes()
        assert ours == theirs
        assert len(ours) == chunks * (size + CRC) + 16 * chunks + CRC
        # and zarr reads ours
        assert np.array_equal(zarr_array(spec, 1, {"a/c/0/0": ours}, folder)[:], content)

    same()
    assert zarr.__version__.startswith("3")


@given(data=st.data(), size=st.integers(1, 24), total=st.integers(1, 8))
def test_writing_in_parts_is_writing_at_once(data: st.DataObject, size: int, total: int) -> None:
    content = np.arange(size * total, dtype=np.uint64).astype(np.uint8)
    cuts = sorted(data.draw(st.sets(st.integers(0, content.size), max_size=6)) | {0, content.size})
    shard = Shard(size, total)
    for start, stop in data.draw(st.permutations(list(zip(cuts, cuts[1:], strict=False)))):
        shard.write(start, content[start:stop])
    sealed = bytes(shard.seal())
    for i in range(total):
        chunk = sealed[i * (size + CRC) : (i + 1) * (size + CRC)]
        assert intact(memoryview(chunk)) and chunk[:size] == content[i * size : (i + 1) * size].tobytes()
        assert int.from_bytes(chunk[size:], "little") == google_crc32c.value(chunk[:size])
    assert sealed[total * (size + CRC) :] == index_bytes(size, total, total)
    present = data.draw(st.integers(0, total))
    assert bytes(shard.seal(present)) == sealed[: present * (size + CRC)] + index_bytes(size, present, total)


@pytest.mark.parametrize("dtype", ["float32", "complex64", "int16", "bool"])
@pytest.mark.parametrize("rows", [1, 3, 8, 11])
def test_zarr_reads_unfinished_shards(tmp_path: Path, dtype: str, rows: int) -> None:
    """Chunks that are not there yet are fill; so are the places in a row where nothing was written."""
    spec = ArraySpec("a", "values", dtype, (6,), (8, 6), (2, 6), ("row", "e"))
    narrow, objects = Narrow(spec), {}
    content = np.arange(rows * 6).reshape(rows, 6).astype(dtype)
    for row in range(rows):
        narrow.write(row, 1, content[row, 1:5])
        if narrow.full_after(row):
            narrow.flush(lambda key, data: objects.update({key: bytes(data)}))
    narrow.flush(lambda key, data: objects.update({key: bytes(data)}))
    got = zarr_array(spec, 16, objects, tmp_path)[:]
    assert np.array_equal(got[:rows, 1:5], content[:, 1:5])
    empty = np.concatenate([got[:rows, 0], got[:rows, 5], got[rows:].reshape(-1)])
    assert np.isnan(empty).all() if dtype in ("float32", "complex64") else not empty.any()
    assert len(objects) == -(-rows // 8)


def test_zarr_reads_wide_rows_with_holes(tmp_path: Path) -> None:
    spec = ArraySpec("a", "values", "float32", (40,), (1, 16), (1, 8), ("row", "e"))
    objects: dict[str, bytes] = {}
    wide, memory = Wide(spec, ShardPool(1 << 20)), []

    def put(key: str, data: bytes | bytearray, done: Callable[[], None] | None = None) -> None:
        objects[key] = bytes(data)
        memory.append(id(data))
        assert done is not None
        done()

    other = [np.full(16, 9, np.float32), np.full(24, 9, np.float32)]
    wide.write_row(1, [0, 16], other, [], put)  # its memory is used again, and none of it may show
    objects.clear()
    parts = [np.arange(3, dtype=np.float32), np.arange(7, dtype=np.float32)]
    wide.write_row(0, [2, 33], parts, [(0, 2), (5, 33)], put)
    assert set(memory[3:]) < set(memory[:3])
    assert sorted(objects) == ["a/c/0/0", "a/c/0/2"]
    row = zarr_array(spec, 1, objects, tmp_path)[0]
    assert row[2:5].tolist() == [0, 1, 2] and row[33:40].tolist() == list(range(7)) and np.isnan(row).sum() == 30


@given(
    elements=st.integers(0, 1 << 36),
    dtype=st.sampled_from(["bool", "int16", "float32", "float64", "complex128"]),
)
def test_layouts_of_values(elements: int, dtype: str) -> None:
    """Rows fit; chunks divide shards; nothing is larger than it may be; inner chunks in C order are rows in order."""
    spec = values_spec("c", "a", dtype, elements)
    assert spec.tail[0] >= max(1, elements) and spec.tail[0] <= elements * 1.2 + 64
    assert all(s % c == 0 for s, c in zip(spec.shard, spec.chunk, strict=True))
    assert spec.chunk_bytes <= (256 << 10) + 16 * 8 and spec.chunk[0] * spec.shard[1] in (
        spec.shard[1],
        spec.chunk[1] * spec.chunk[0],
    )
    assert np.prod([int(n) for n in spec.shard], dtype=object) * spec.itemsize <= (64 << 20) + 16 * 8
    if spec.tail[0] * spec.itemsize >= 4 << 20:
        assert spec.shard[0] == 1
    else:
        assert spec.shard[1] == spec.tail[0] and spec.shards_across == 1
    assert spec_from_json(spec.path, array_json(spec, 3)) == spec
    assert spec.chunk[0] == 1 or spec.chunk[1] == spec.tail[0]


@given(tensors=st.integers(1, 100_000), last=st.integers(1, 60))
def test_layouts_of_tables(tensors: int, last: int) -> None:
    spec = table_spec("c", "stats", "stats", "float64", tensors, last, ("t", "s"), ("count",) * last, 7)
    assert spec.tail[0] >= tensors and spec.shard[1:] == spec.chunk[1:] == spec.tail
    assert spec.shard[0] % spec.chunk[0] == 0 and spec.shard[0] <= 4096
    assert spec_from_json(spec.path, json.loads(json.dumps(array_json(spec, 9)))) == spec


def test_names() -> None:
    assert worker_key(3, 0) == "workers/00003" and worker_key(12, 4) == "workers/00012.4"
    assert (
        parse_worker("00003") == (3, 0) and parse_worker("00012.4") == (12, 4) and parse_worker("123456") == (123456, 0)
    )
    assert all(
        parse_worker(n) is None for n in ("", "zarr.json", "0003", "00003.0", "00003.", "00003.1.2", "x", "٠٠٠٠٣x")
    )
    assert all(valid_collection(n) for n in ("a", "A-Z_9", "x" * 64))
    assert not any(valid_collection(n) for n in ("", "steps", "x" * 65, "a/b", "..", "a b", "é", "a\n"))


infos = st.builds(
    TensorInfo,
    name=st.text(),
    collection=st.just("c"),
    dtype=st.sampled_from(["float32", "str"]),
    shape=st.lists(st.integers(0, 2**40), max_size=4).map(tuple),
    role=st.sampled_from(["", "weight"]),
    forward_order=st.none() | st.integers(0, 9),
    requires_grad=st.none() | st.booleans(),
    aliases=st.lists(st.text(), max_size=2).map(tuple),
    global_shape=st.none() | st.lists(st.integers(0, 9), max_size=2).map(tuple),
)


@given(info=infos, slots=st.lists(st.builds(ValueSlot, st.text(), st.integers(0, 99), st.integers(0, 99), st.text())))
def test_catalogue_entries_come_back(info: TensorInfo, slots: list[ValueSlot]) -> None:
    entry = Entry(info, slots, [Place("stats", 1)], [], [Place("features", 2, 5)])
    data = json.loads(json.dumps(entry_to_json(entry)))
    assert entry_from_json(data) == entry
    assert entry_from_json({**data, "of_a_later_version": 1}) == entry


# --- the commit log ---

COLUMNS = "step mode mode_step end_time duration hook_time saved raw flags catalogue_version".split()


def log_of(url: Path) -> dict[str, list[int]]:
    import zarr

    rows = zarr.open_group(str(url), mode="r")["workers/00000/steps"][:]
    return {name: rows[:, i].tolist() for i, name in enumerate(COLUMNS)}


def worker(url: Path) -> dict[str, Any]:
    return json.loads((url / "workers/00000/zarr.json").read_text())["attributes"]["smdbg"]


def test_columns_of_the_log(tmp_path: Path) -> None:
    url = tmp_path / "run"
    only = smdbg.CollectionConfig("reduced", reduction_config=smdbg.ReductionConfig(save_raw_tensor=False))
    with smdbg.Hook(url, collections=[only]) as hook:
        for step, mode in enumerate(["global", "train", "eval", "predict", "train"]):
            hook.set_mode(mode)
            if step != 2:
                hook.save_tensor("a", [1.0, 2.0], "full")
            if step != 3:
                hook.save_tensor("b", [1.0] * (step + 1), "reduced")
            if step == 3:
                hook.should_save("nothing")
            hook.end_step()
    log, facts = log_of(url), worker(url)
    bits = {name: 1 << about["bit"] for name, about in facts["collections"].items()}
    assert log["step"] == [0, 1, 2, 3, 4] and log["mode"] == [0, 1, 2, 3, 1] and log["mode_step"] == [0, 0, 0, 0, 1]
    both, full, reduced = bits["full"] | bits["reduced"], bits["full"], bits["reduced"]
    assert log["saved"] == [both, both, reduced, full, both]
    assert log["raw"] == [full, full, 0, full, full] and log["flags"] == [0] * 5
    assert log["catalogue_version"][0] >= 1 and log["catalogue_version"] == sorted(log["catalogue_version"])
    assert log["catalogue_version"][1] > log["catalogue_version"][0], "`b` changed its shape: a layout appeared"
    assert log["catalogue_version"][2:] == [facts["catalogue_version"]] * 3
    assert all(0 < h <= d for h, d in zip(log["hook_time"], log["duration"], strict=True))
    assert min(log["end_time"]) > 1.6e18 and log["end_time"] == sorted(log["end_time"])
    assert facts["dropped_steps"] == facts["dropped_rows"] == 0 and facts["status"] == "completed"


def test_every_object_carries_its_checksum_and_nothing_is_empty(tmp_path: Path) -> None:
    url = tmp_path / "run"
    with smdbg.Hook(url) as hook:
        for step in range(40):
            hook.save_tensor("wide", np.full(1_100_000, step, np.float32), "big") if step % 20 == 0 else None
            hook.save_tensor("x", np.full((3, step % 5), step), "small")
            hook.save_scalar("loss", step, "losses")
            hook.end_step()
            if step == 20:
                assert hook.flush()
    files = [p for p in url.rglob("*") if p.is_file()]
    group = json.loads((url / "workers/00000/zarr.json").read_text())["consolidated_metadata"]["metadata"]
    checked = 0
    for path in files:
        data = path.read_bytes()
        assert data, path
        if path.name == "zarr.json":
            assert json.loads(data)["zarr_format"] == 3
            continue
        relative = str(path.relative_to(url / "workers/00000"))
        spec = spec_from_json(name := relative.split("/c/")[0], group[name])
        if not spec.sharded:
            assert len(data) == spec.chunk_bytes + CRC and intact(memoryview(data))
        else:
            total = int(np.prod(spec.grid))
            tail = data[-(16 * total + CRC) :]
            index = np.frombuffer(tail[:-CRC], "<u8").reshape(total, 2)
            there = index[index[:, 1] != 2**64 - 1]
            assert intact(memoryview(tail)) and len(data) == int(there[:, 1].sum()) + 16 * total + CRC
            for start, size in there.tolist():
                assert size == spec.chunk_bytes + CRC and intact(memoryview(data)[start : start + size])
        checked += 1
    assert checked >= 8 and not [p for p in files if p.suffix == ".partial" or p.name.startswith(".")]
    arrays = {
        str(p.parent.relative_to(url / "workers/00000")): json.loads(p.read_text())
        for p in files
        if p.name == "zarr.json" and p.is_relative_to(url / "workers/00000") and p.parent.name != "00000"
    }
    assert arrays == group, "inline metadata is that of the nodes themselves"


def test_metadata_is_consistent_while_running(tmp_path: Path) -> None:
    """Arrays of a collection have one length, so that xarray opens a run that is being written."""
    import xarray

    url = tmp_path / "run"
    hook = smdbg.Hook(url)
    for step in range(3):
        hook.save_tensor("x", np.full(step + 1, step), "c")
        hook.save_tensor("y", np.full(3, step, np.int8), "c")
        hook.end_step()
    assert hook.flush()
    opened = xarray.open_zarr(url / "workers/00000/c", consolidated=False)
    assert opened.sizes["row"] == 4096 and {"stats", "int64", "int8", "layout", "step"} <= {*opened.variables}
    hook.close()
    opened = xarray.open_zarr(url / "workers/00000/c", consolidated=False)
    assert opened.sizes["row"] == 3 and opened["step"].values.tolist() == [0, 1, 2]


def test_only_what_the_log_lists_exists(tmp_path: Path) -> None:
    url, n = tmp_path / "run", 4200
    hook = smdbg.Hook(url)
    for step in range(n):
        hook.save_scalar("x", step)
        if step >= 4150:
            hook.save_tensor("new", [step], "later")
        hook.end_step()
        if step == 4149:
            assert hook.flush()
            shutil.copytree(url / "workers/00000/steps", tmp_path / "log-before")
    assert hook.flush()
    shutil.copytree(url, tmp_path / "crashed")
    hook.close()
    crashed = tmp_path / "crashed"
    log = crashed / "workers/00000/steps/c"

    # A crash after the data and before the log: the log is older than everything else.
    shutil.copyfile(tmp_path / "log-before/c/1/0", log / "1/0")
    (crashed / "workers/00000/metrics/float64/c/0/.0.abc.partial").write_bytes(b"half")
    (crashed / "workers/00000/.zarr.json.abc.partial").write_bytes(b"{")
    (crashed / "workers/00007").mkdir()
    (crashed / "workers/00000/metrics/float64/c/9").mkdir()
    (crashed / "workers/00000/metrics/float64/c/9/0").write_bytes(b"orphan")
    run = smdbg.open_run(crashed)
    assert run.steps().tolist() == list(range(4150)) and run.tensor("x").values().tolist() == list(range(4150))
    assert run.workers() == [0] and run.tensors(step=4149) == ["x"]
    assert run.tensor("new").steps().size == 0 if "new" in run.tensors() else True
    with pytest.raises(StepNotSaved):
        run.tensor("x").value(4150)

    # A crash before the newest chunk of the log was put at all.
    shutil.rmtree(log / "1")
    run = smdbg.open_run(crashed)
    assert run.steps().tolist() == list(range(4096)) and run.tensor("x").values().tolist() == list(range(4096))
    shutil.rmtree(log)
    with pytest.raises(DamagedData, match="chunk 0: missing"):  # the log had gone beyond it
        smdbg.open_run(crashed)

    # Of a completed run nothing may be missing.
    shutil.rmtree(url / "workers/00000/steps/c/1")
    with pytest.raises(DamagedData, match="steps, chunk 1: missing"):
        smdbg.open_run(url)
