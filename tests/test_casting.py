"""Casting floats down for storing: every rounding case against exact arithmetic, ml_dtypes and torch."""

from __future__ import annotations

import warnings

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from smdbg import CollectionConfig
from smdbg.hooks.config import KNOWN, plan
from smdbg.store.dtypes import CASTS, cast, decode

WIDTH = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def _numbers(name: str) -> NDArray[np.float64]:
    """Return all finite numbers of a 16-bit float that are not negative, ascending, and the first that is too large."""
    bits = np.arange(0x8000, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        values = bits.view(np.float16 if name == "float16" else ml_dtypes.bfloat16).astype(float)
    values = values[np.isfinite(values)]
    return np.append(values, 2 * values[-1] - values[-2])


@pytest.mark.parametrize("target", ["float16", "bfloat16"])
@pytest.mark.parametrize("source", ["float32", "float64"])
@pytest.mark.parametrize("sign", [1, -1])
def test_every_number_and_every_tie_with_its_neighbours(source: str, target: str, sign: int) -> None:
    numbers = _numbers(target)
    middle = ((numbers[:-1] + numbers[1:]) / 2).astype(source)  # exact in float32 too
    order = np.arange(numbers.size, dtype=np.uint16)  # is the number's bits; the last one those of infinity
    even = np.where(order[:-1] % 2 == 0, order[:-1], order[1:])
    cases = [
        (numbers[:-1].astype(source), order[:-1]),
        (middle, even),
        (np.nextafter(middle, np.asarray(0, source)), order[:-1]),
        (np.nextafter(middle, np.asarray(np.inf, source)), order[1:]),
    ]
    for values, bits in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found, name = cast(values * np.asarray(sign, source), source, target)
        assert name == target
        assert np.array_equal(found.view(np.uint16), bits | (0x8000 if sign < 0 else 0))


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200))
def test_float32_as_ml_dtypes_and_torch_do(bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    nan = np.isnan(values)
    for target, torch_type in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        found, name = cast(values, "float32", target)
        got = decode(found, name, found.shape).astype(np.float32)
        with np.errstate(all="ignore"):
            theirs = values.astype(ml_dtypes.bfloat16 if target == "bfloat16" else np.float16)
        torchs = torch.from_numpy(values.copy()).to(torch_type)
        assert np.array_equal(np.isnan(got), nan)
        assert np.array_equal(found.view(np.uint16)[~nan], theirs.view(np.uint16)[~nan])
        assert np.array_equal(found.view(np.uint16)[~nan], torchs.view(torch.uint16).numpy()[~nan])
        assert np.array_equal(np.signbit(got), np.signbit(values))


@pytest.mark.parametrize("source", ["float32", "float64"])
@pytest.mark.parametrize("target", CASTS)
def test_nan_of_every_payload_stays_nan_and_infinity_stays(source: str, target: str) -> None:
    whole, exponent, places = (np.uint32, 0xFF, 23) if source == "float32" else (np.uint64, 0x7FF, 52)
    top = exponent << places
    payloads = [1 << k for k in range(places)] + [(1 << places) - 1, (1 << places) - 2, (1 << 16) - 1]
    bits = np.array([sign << (8 * WIDTH[source] - 1) | top | p for p in payloads for sign in (0, 1)], whole)
    mixed = np.concatenate((bits.view(source), np.array([np.inf, -np.inf, 1.5, -0.0], source)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, name = cast(mixed, source, target)
    with np.errstate(invalid="ignore"):
        got = decode(found, name, found.shape).astype(np.float64)
    assert np.isnan(got[:-4]).all()
    assert np.array_equal(got[-4:], [np.inf, -np.inf, 1.5, 0]) and np.signbit(got[-1])


@given(st.lists(st.floats(), max_size=50), st.sampled_from(sorted(WIDTH)), st.sampled_from(CASTS))
def test_only_wider_floats_are_cast(values: list[float], source: str, target: str) -> None:
    with np.errstate(all="ignore"):
        array = np.array(values, float)
        given = array.astype(ml_dtypes.bfloat16).view(np.uint16) if source == "bfloat16" else array.astype(source)
    before = given.copy()
    found, name = cast(given, source, target)
    assert np.array_equal(given.view(np.uint8), before.view(np.uint8)), "the value itself was changed"
    if WIDTH[source] <= WIDTH[target]:
        assert found is given and name == source
    else:
        assert name == target and found.size == given.size and found.itemsize == WIDTH[target]


def test_blocks_do_not_show() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(200_001).astype(np.float32)
    values[[0, 32767, 32768, 65536, 200_000]] = np.nan
    found, _ = cast(values, "float32", "bfloat16")
    assert np.array_equal(found, values.astype(ml_dtypes.bfloat16).view(np.uint16))
    assert np.array_equal(cast(values.astype(float), "float64", "bfloat16")[0], found)


def test_what_is_no_float_stays() -> None:
    for values, name in (
        (np.arange(5), "int64"),
        (np.ones(3, bool), "bool"),
        (np.ones(3, np.complex128), "complex128"),
        (np.arange(4, dtype=np.uint8), "float8_e4m3fn"),
        (np.frombuffer(b"text", np.uint8), "str"),
        (np.arange(4), "M8[ns]"),
    ):
        found, kept = cast(values, name, "bfloat16")
        assert found is values and kept == name


def test_the_plan_says_what_was_configured() -> None:
    for name in ("mine", *KNOWN):
        default = plan(name, CollectionConfig(name), None, None)
        assert (default.compression, default.cast) == ("", "")
        assert plan(name, None, None, None).compression == ""
        own = plan(name, CollectionConfig(name, compression="zstd", dtype="bfloat16"), None, None)
        assert (own.compression, own.cast) == ("zstd", "bfloat16")
    assert plan("mine", CollectionConfig("mine", compression="lz4"), None, None).compression == "lz4"


@pytest.mark.parametrize(
    ("options", "error", "hint"),
    [
        ({"compression": "lz5"}, ValueError, "Did you mean lz4?"),
        ({"compression": "zst"}, ValueError, "Did you mean zstd?"),
        ({"compression": None}, TypeError, "'none', 'lz4', 'zstd'"),
        ({"compression": ""}, ValueError, "'none', 'lz4', 'zstd'"),
        ({"dtype": "bfloat"}, ValueError, "Did you mean bfloat16"),
        ({"dtype": "float64"}, ValueError, "'float32', 'float16', 'bfloat16'"),
        ({"dtype": np.float32}, TypeError, "'float32', 'float16', 'bfloat16'"),
    ],
)
def test_bad_options_are_refused_with_a_hint(options: dict[str, str], error: type[Exception], hint: str) -> None:
    with pytest.raises(error, match=hint.replace("?", r"\?")):
        CollectionConfig("mine", **options)
