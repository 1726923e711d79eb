"""What the hook was given is what smdbg, plain Zarr, xarray and Dask give back, bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import smdbg
from smdbg.store.format import WIDE_ROW, WIDE_SHARD

NATIVE = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128".split()
OTHER = {name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")}
DATES = ("datetime64[ns]", "timedelta64[ms]")
SHAPES = ((), (1,), (7,), (3, 5), (2, 3, 4), (0,), (3, 0, 2), (1, 1, 1, 2))
ROWS = 3


def bits(array: Any) -> bytes:
    """Return the bytes of an array, C order, little-endian."""
    array = np.asarray(array)
    if array.dtype.kind != "V":
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return array.tobytes()


def noise(dtype: Any, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return an array of random bits: NaN of every payload, infinities and subnormal numbers among them."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape))
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    raw = rng.integers(0, 256, size * dtype.itemsize, dtype=np.uint8)
    return raw.view(dtype).reshape(shape) if size else np.empty(shape, dtype)


def values_of(dtype: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return the values of one step: every shape, then layouts in memory that are not plain."""
    out = {f"shape{i}": noise(dtype, shape, rng) for i, shape in enumerate(SHAPES)}
    big = noise(dtype, (6, 8), rng)
    out |= {"transposed": big.T, "strided": big[::2, ::-3], "fortran": np.asfortranarray(big), "slice": big[2:4, 5]}
    if np.dtype(dtype).kind != "V" and np.dtype(dtype).itemsize > 1:
        out["swapped"] = big.astype(np.dtype(dtype).newbyteorder(">"))
    return out


def texts(step: int) -> dict[str, Any]:
    """Return text whose length changes from step to step."""
    return {
        "scalar": "grüße" * step,
        "many": np.array([["a" * step, "é"], ["", "日本" + "x" * (3 * step)]]),
        "raw": np.array([b"ab", b"c" * (step + 1)]),
        "one": b"\x00\xffz",
        "blank": np.array(["", ""]),
        "none": np.empty((0,), "U3"),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """A finished run with three rows of every dtype, and what it was given."""
    url = str(tmp_path_factory.mktemp("roundtrip") / "run")
    rng = np.random.default_rng(7)
    given: list[dict[str, Any]] = []
    with smdbg.Hook(url) as hook:
        for step in range(ROWS):
            values: dict[str, Any] = {}
            for dtype in (*NATIVE, *DATES):
                values |= {f"{dtype}/{k}": v for k, v in values_of(dtype, rng).items()}
            for name, own in OTHER.items():
                values |= {f"{name}/{k}": v for k, v in values_of(own, rng).items()}
            values |= {f"text/{k}": v for k, v in texts(step).items()}
            for name, value in values.items():
                hook.save_tensor(name, value, name.split("/")[0].partition("[")[0])
            hook.end_step()
            given.append(values)
    return url, given


def zarr_arrays(url: str, collection: str) -> Mapping[str, Any]:
    import zarr

    return zarr.open_group(url, mode="r")[f"workers/00000/{collection}"]


def dask_arrays(url: str, collection: str) -> Mapping[str, Any]:
    import dask.array

    class Arrays(dict):
        def __missing__(self, name: str) -> Any:
            return dask.array.from_zarr(f"{url}/workers/00000/{collection}/{name}")

    return Arrays()


def xarray_arrays(url: str, collection: str) -> Mapping[str, Any]:
    import xarray

    return xarray.open_dataset(f"{url}/workers/00000/{collection}", engine="zarr", consolidated=False)


def xarray_zarr(url: str, collection: str) -> Mapping[str, Any]:
    import xarray

    return xarray.open_zarr(f"{url}/workers/00000/{collection}", consolidated=False)


READERS = {"zarr": zarr_arrays, "dask": dask_arrays, "xarray": xarray_arrays, "open_zarr": xarray_zarr}


def catalogue(url: str) -> dict[str, Any]:
    import zarr

    attributes = zarr.open_group(url, mode="r")["workers/00000"].attrs["smdbg"]
    return {entry["name"]: entry for entry in attributes["catalogue"]}


@pytest.mark.parametrize("reader", ["zarr", "dask", "xarray"])
@pytest.mark.parametrize("dtype", [*NATIVE, *OTHER, *DATES])
def test_plain_readers_give_every_dtype(saved: Any, dtype: str, reader: str) -> None:
    url, given = saved
    arrays = READERS[reader](url, dtype.partition("[")[0])
    entries = catalogue(url)
    names = [name for name in given[0] if name.startswith(f"{dtype}/")]
    assert len(names) >= 12
    whole = {array: np.asarray(arrays[array]) for array in {entries[name]["slots"][0][0] for name in names}}
    for step, values in enumerate(given):
        for name in names:
            array, offset, capacity, logical = entries[name]["slots"][0]
            row = whole[array][step]
            value = np.asarray(values[name])
            if not dtype.startswith(("datetime", "timedelta")):
                assert logical == dtype
            assert capacity >= value.size
            assert entries[name].get("shape", []) == list(value.shape)
            assert row[offset : offset + value.size].reshape(value.shape).tobytes() == bits(value), (name, step)


@pytest.mark.parametrize("dtype", [*NATIVE, *OTHER, *DATES])
def test_smdbg_gives_every_dtype(saved: Any, dtype: str) -> None:
    url, given = saved
    run = smdbg.open_run(url)
    names = [name for name in given[0] if name.startswith(f"{dtype}/")]
    assert run.tensors(f"{dtype.partition('[')[0]}*/*") == names
    for name in names:
        tensor = run.tensor(name)
        bulk = tensor.values()
        for step, values in enumerate(given):
            value, back = np.asarray(values[name]), tensor.value(step)
            assert back.dtype == value.dtype.newbyteorder("=") and back.shape == value.shape == tensor.shape
            assert bits(back) == bits(value) == bits(bulk[step]), (name, step)
            assert tensor.stat("count")[1][step] == value.size
    assert run.collections() == [*(d.partition("[")[0] for d in (*NATIVE, *DATES)), *OTHER, "text"]


def test_text_comes_back(saved: Any) -> None:
    url, given = saved
    run = smdbg.open_run(url)
    for step, values in enumerate(given):
        for name in (n for n in values if n.startswith("text/")):
            value, back = np.asarray(values[name]), run.tensor(name).value(step)
            assert back.shape == value.shape and back.dtype.kind == value.dtype.kind, name
            assert back.tolist() == value.tolist(), (name, step)
            assert run.tensor(name).shape_at(step) == value.shape
    assert run.tensor("text/many").value(2, index=(1, 1)) == "日本xxxxxx"


def test_text_is_plain_utf8_for_zarr(saved: Any) -> None:
    url, given = saved
    entries, arrays = catalogue(url), zarr_arrays(url, "text")
    layout = arrays["layout"]
    entry = entries["text/scalar"]
    for step in range(ROWS):
        slot, rank, *sizes = np.asarray(layout[step])[entry["layout"][0][1]].tolist()
        if not slot:  # as the catalogue says
            slot, rank, sizes = 1, 1, entry.get("shape")
        array, offset, _, dtype = entry["slots"][slot - 1]
        assert rank == 1 and dtype == "str"
        got = np.asarray(arrays[array][step])[offset : offset + sizes[0]].tobytes()
        assert got.decode() == given[step]["text/scalar"]


def test_without_ml_dtypes_values_are_exact_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every16 = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    every8 = np.arange(1 << 8, dtype=np.uint8)
    names = [n for n in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3b11fnuz")]
    given = {"bfloat16": every16, **{n: every8.view(getattr(ml_dtypes, n)) for n in names}}
    with smdbg.Hook(tmp_path / "run") as hook:
        for name, value in given.items():
            hook.save_tensor(name, value)
            hook.save_tensor(name + "/0d", value[17])
    expected = {name: value.astype(np.float32) for name, value in given.items()}
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    run = smdbg.open_run(tmp_path / "run")
    for name, want in expected.items():
        got = run.tensor(name).value(0)
        assert got.dtype == np.float32 and run.tensor(name).dtype == name
        np.testing.assert_array_equal(got, want)
        assert (np.signbit(got) == np.signbit(want))[~np.isnan(want)].all()
        assert run.tensor(name + "/0d").value(0) == want[17]
        assert run.tensor(name + "/0d").stat("max")[1].tolist() == [want[17]]


@pytest.mark.parametrize(
    ("elements", "dtype"),
    [
        (600 * 1024 // 4 + 3, "float32"),  # a narrow row in three inner chunks
        (70 * 1024 // 8, "float64"),  # a little more than an inner chunk holds of short rows
        (WIDE_ROW // 4, "float32"),  # just wide
        (WIDE_ROW // 4 - 16, "float32"),  # just not
        (5 * (1 << 20) + 1, "uint8"),
        (700_001, "complex64"),
    ],
)
def test_rows_of_many_chunks(tmp_path: Path, elements: int, dtype: str) -> None:
    rng = np.random.default_rng(elements)
    url = str(tmp_path / "run")
    sizes = {"a": elements // 3, "b": 5, "c": elements - elements // 3 - 5}
    given = [{name: noise(dtype, (size,), rng) for name, size in sizes.items()} for _ in range(ROWS)]
    with smdbg.Hook(url) as hook:
        for values in given:
            for name, value in values.items():
                hook.save_tensor(name, value, "big")
            hook.end_step()
    run, entries = smdbg.open_run(url), catalogue(url)
    for reader in READERS.values():
        arrays = reader(url, "big")
        for step, values in enumerate(given):
            for name, value in values.items():
                array, offset, *_ = entries[name]["slots"][0]
                assert np.asarray(arrays[array][step, offset : offset + value.size]).tobytes() == value.tobytes()
    for name in sizes:
        assert [bits(v) for v in run.tensor(name).values([2, 0])] == [bits(given[2][name]), bits(given[0][name])]
        for index in (0, -1, slice(3, None, 2), slice(None, 1, -2)):
            assert bits(run.tensor(name).value(1, index=index)) == bits(given[1][name][index])


def test_a_row_beyond_one_shard(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    wide = np.arange(WIDE_SHARD // 4 + 1_500_013, dtype=np.int32).reshape(-1, 1)
    small = np.arange(11, dtype=np.int32)
    with smdbg.Hook(url) as hook:
        for step in range(2):
            hook.save_tensor("wide", wide + step if step else wide, "big")
            hook.save_tensor("small", small + step, "big")
            hook.end_step()
    arrays, entries = zarr_arrays(url, "big"), catalogue(url)
    array, offset, *_ = entries["wide"]["slots"][0]
    assert len(list(Path(f"{url}/workers/00000/big/{array}/c/0").iterdir())) == 2
    tensor = smdbg.open_run(url).tensor("wide")
    for step in range(2):
        assert np.array_equal(arrays[array][step, offset : offset + wide.size].reshape(wide.shape), wide + step)
        assert np.array_equal(tensor.value(step), wide + step)
        assert np.array_equal(tensor.value(step, index=slice(-3, None)), wide[-3:] + step)
    assert np.array_equal(smdbg.open_run(url).tensor("small").value(1), small + 1)
    import dask.array

    assert int(dask.array.from_zarr(f"{url}/workers/00000/big/{array}")[1, offset + wide.size - 1]) == wide[-1, 0] + 1
