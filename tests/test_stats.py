"""The statistics against plain formulas, for every kind of array."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from smdbg import stats
from smdbg.errors import BadSelection
from smdbg.stats_extra import BLOCK, FEATURES, row_statistic

ml_dtypes = pytest.importorskip("ml_dtypes")
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
thorough = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))

BRAIN = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
EXACT = ("count", "nan", "posinf", "neginf", "min", "max", "abs_max", "zeros")
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)


def modulus(array):
    """Return the elements as flat float64, by plain NumPy."""
    flat = np.asarray(array).reshape(-1)
    if flat.dtype.kind == "c":
        with np.errstate(over="ignore"):
            size = np.hypot(flat.real.astype(np.float64), flat.imag.astype(np.float64))
        return np.where(np.isnan(flat.real) | np.isnan(flat.imag), np.nan, size)
    return flat.astype(np.float64)


def plain(array):
    """Return every statistic of the default by its formula, in long double, which does not overflow here."""
    all_of_it = modulus(array)
    x = all_of_it[np.isfinite(all_of_it)].astype(np.longdouble)
    some, nan = len(x) > 0, math.nan
    mean = x.sum() / len(x) if some else nan
    return {
        "count": all_of_it.size,
        "nan": sum(map(math.isnan, all_of_it)),
        "posinf": sum(v == math.inf for v in all_of_it),
        "neginf": sum(v == -math.inf for v in all_of_it),
        "min": min(x) if some else nan,
        "max": max(x) if some else nan,
        "mean": mean,
        "std": np.sqrt(((x - mean) ** 2).sum() / len(x)) if some else nan,
        "l2": np.sqrt((x * x).sum()),
        "abs_max": max(abs(x)) if some else nan,
        "zeros": sum(v == 0 for v in x),
        "l1": abs(x).sum(),
        "abs_mean": abs(x).sum() / len(x) if some else nan,
    }


def agree(names, got, want, rtol=1e-5):
    """Assert that `got` is `want` (by name): exactly or to rtol; means also to the rounding of the largest."""
    top = want.get("abs_max", math.nan)
    for name, value in zip(names, np.asarray(got), strict=True):
        with np.errstate(over="ignore"):
            aim = float(want[name])
        if math.isnan(aim) or name in EXACT:
            assert value == aim or (math.isnan(aim) and math.isnan(value)), (name, value, aim)
        elif abs(aim) > 1.797e308:  # rounding decides whether this still fits
            assert abs(value) > 1.79e308 and (value > 0) == (aim > 0), (name, value, aim)
        else:  # a mean or deviation that cancels to nothing is rounding in any formula
            floor = 1e-14 * float(top) if name in ("mean", "std", "variance", "sum") and top == top else 0.0
            assert abs(value - aim) <= rtol * abs(aim) + floor + 1e-323, (name, value, aim)


@st.composite
def arrays(draw, shapes=SHAPES):
    """Any dtype, any layout, with NaN and infinities; scales from subnormal to huge; large offsets."""
    shape = draw(shapes)
    kind = draw(st.sampled_from(["float", "shifted", "brain", "int", "bool", "complex", "long"]))
    if kind in ("float", "complex"):
        width = draw(st.sampled_from([16, 32, 64] if kind == "float" else [64, 128]))
        make = hnp.floating_dtypes if kind == "float" else hnp.complex_number_dtypes
        array = draw(hnp.arrays(draw(make(sizes=width, endianness="?")), shape))
    elif kind == "shifted":
        size = st.floats(-1, 1, width=32)
        base = draw(hnp.arrays(np.float64, shape, elements=size))
        scale, away = draw(st.sampled_from([1e-300, 1e-30, 1e-2, 1e150, 1e307])), draw(st.sampled_from([0, 1e3, 1e-30]))
        with np.errstate(all="ignore"):
            array = (base * scale + away).astype(draw(st.sampled_from([np.float32, np.float64])))
    elif kind == "brain":
        wide = draw(hnp.arrays(np.float32, shape, elements=st.floats(width=32)))
        with np.errstate(all="ignore"):
            array = np.asarray(wide).astype(draw(st.sampled_from(BRAIN)))
    elif kind == "int":
        array = draw(hnp.arrays(draw(st.one_of(hnp.integer_dtypes(), hnp.unsigned_integer_dtypes())), shape))
    elif kind == "bool":
        array = draw(hnp.arrays(bool, shape))
    else:
        array = np.asarray(draw(hnp.arrays(np.float64, shape))).astype(np.longdouble)
    array = np.asarray(array)
    if array.ndim and draw(st.booleans()):
        array = np.repeat(array, 2, axis=-1)[..., ::2]
    return array.T if draw(st.booleans()) else array


@thorough
@given(arrays())
def test_compute_follows_the_formulas(array):
    """Every dtype and layout."""
    agree(stats.DEFAULT, stats.compute(array), plain(array))


@thorough
@given(arrays(), st.lists(st.sampled_from(stats.DEFAULT)))
def test_names_choose_the_columns(array, names):
    """Leaving statistics out does not change the others."""
    whole = dict(zip(stats.DEFAULT, stats.compute(array), strict=True))
    np.testing.assert_array_equal(stats.compute(array, names), [whole[name] for name in names])


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i2", "c8", *BRAIN])
@pytest.mark.parametrize("layout", ["C", "F", "strided"])
def test_more_than_one_block(dtype, layout):
    """200 thousand elements, the second block with NaN and infinities, the third constant."""
    rng = np.random.default_rng(1)
    x = rng.normal(3, 2, 200_000)
    x[2 * BLOCK : 3 * BLOCK] = 0
    if dtype != "i2":
        x[BLOCK + 7 : BLOCK + 17] = [np.nan, np.inf, -np.inf, np.nan, 0, np.nan, np.inf, np.nan, -7, -np.inf]
    x = x.astype(dtype).reshape(400, 500)
    x = np.asfortranarray(x) if layout == "F" else np.repeat(x, 2, axis=1)[:, ::2] if layout == "strided" else x
    agree(stats.DEFAULT, stats.compute(x), plain(x), rtol=1e-7 if x.dtype.char == "f" else 1e-9)
    whole, same = stats.compute(x, stats.HASH), stats.compute(np.ascontiguousarray(x), stats.HASH)
    np.testing.assert_array_equal(whole, same)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (lambda r, n: r.normal(1000, 0.01, n), "f8"),
        (lambda r, n: r.normal(1000, 0.01, n), "f4"),
        (lambda r, n: 1e6 + 1e-9 * r.integers(0, 9, n), "f8"),
        (lambda r, n: r.normal(0, 1e-30, n), "f4"),
        (lambda r, n: r.normal(0, 1e300, n), "f8"),
        (lambda r, n: r.choice([-1.7e308, 1.7e308], n), "f8"),
        (lambda r, n: r.normal(0, 1e-310, n), "f8"),
        (lambda r, n: np.where(np.arange(n) < BLOCK, 1e-200, 1e200) * r.random(n), "f8"),
        (lambda r, n: r.uniform(60000, 65000, n), "f2"),
        (lambda r, n: np.full(n, 0.1), "f4"),
    ],
)
def test_hard_values_over_many_blocks(values, dtype):
    """Cancellation, underflow, overflow, constants: still within 1e-5."""
    x = values(np.random.default_rng(2), 3 * BLOCK + 11).astype(dtype)
    agree(stats.DEFAULT, stats.compute(x), plain(x))
    if (x == x[0]).all():
        assert stats.compute(x, ["std", "mean"]).tolist() == [0.0, float(x[0])]


def test_last_digits_and_parts_of_complex_numbers():
    """A deviation of half an ulp; NaN beats an infinity in either part; bins over the whole of float64."""
    ulp = 2.0**-52
    assert stats.compute(1 + ulp * (np.arange(1000) % 2), ["std"])[0] == pytest.approx(ulp / 2, rel=1e-5, abs=0)
    inf, nan = math.inf, math.nan
    pairs = np.array([complex(inf, nan), complex(nan, -inf), complex(-inf, 1), complex(1, inf), 3 + 4j])
    assert stats.compute(pairs, ["nan", "posinf", "neginf", "max"]).tolist() == [2, 2, 0, 5]
    bins = stats.compute([-1.7e308, 0.0, 1.0, 1.7e308], stats.HISTOGRAM)
    assert (bins[0], bins[32], bins[63]) == (1, 2, 1)


def test_strings_and_objects():
    """Strings have a count only; objects are refused."""
    got = dict(zip(stats.DEFAULT, stats.compute(np.array(["a", "bc"])), strict=True))
    assert got["count"] == 2 and got["nan"] == got["l2"] == got["zeros"] == 0 and math.isnan(got["max"])
    assert stats.from_value("nan", np.array([b"x"])) == 0 and stats.reduce(np.array(["a"]), "nan", 0) == 0
    with pytest.raises(BadSelection, match="objects"):
        stats.compute(np.array([object()]))


def test_unknown_names_are_near():
    """A wrong name is a ValueError that offers the right one; derived ones are not computed."""
    for call in (lambda x: stats.compute([1.0], [x]), lambda x: stats.derive(x, {}), lambda x: stats.reduce([1], x)):
        with pytest.raises(ValueError, match="Did you mean mean"):
            call("meen")
    with pytest.raises(BadSelection, match="not stored"):
        stats.compute([1.0], ["rms"])


def test_table():
    """The table holds every name once, with its definition."""
    named = stats.DEFAULT + stats.HASH + stats.DERIVED + stats.VALUES + stats.QUANTILES + stats.HISTOGRAM
    assert set(named) | set(stats.exponent_histogram_names()) == set(stats.STATISTICS)
    assert all(key == row.name and row.definition and row.merge for key, row in stats.STATISTICS.items())
    assert "-x < twice" in stats.STATISTICS["exponent_neg_-3"].definition


@thorough
@given(arrays(hnp.array_shapes(min_dims=1, max_dims=1, max_side=12)), st.data())
def test_merge_of_parts_is_the_whole(array, data):
    """Any cut, parts stacked along a leading axis, and an absent part."""
    cut = data.draw(st.integers(0, len(array)))
    names = (*data.draw(st.permutations(stats.DEFAULT)), *stats.exponent_histogram_names("bfloat16")[::40])
    a, b, whole = (stats.compute(part, names) for part in (array[:cut], array[cut:], array))
    absent = np.full(len(names), np.nan)
    got = stats.merge(names, np.stack([a, b, absent, whole, absent]), np.stack([b, a, whole, absent, absent]))
    want = {**dict(zip(names, whole, strict=True)), **plain(array)}
    agree(names, got[0], want)
    agree(names, got[1], want)
    np.testing.assert_array_equal(got[2:], [whole, whole, absent])


def test_merge_needs_companions():
    """What cannot be merged says why."""
    for names, why in ((["mean"], "needs count"), (["std"], "mean"), (["q50"], "all values"), (["rms"], "derived")):
        with pytest.raises(BadSelection, match=why):
            stats.merge(names, [1.0], [1.0])
    assert stats.merge(["min", "l2"], [1.0, 3.0], [-1.0, 4.0]).tolist() == [-1.0, 5.0]


@thorough
@given(arrays(hnp.array_shapes(min_dims=1, max_dims=3, max_side=6)), st.data())
def test_hash(array, data):
    """Same for any layout and byte order, additive over parts, changed by one bit and by a swap."""
    whole = stats.hash_bits(array)
    assert all(0 <= half < 2**32 and half == int(half) for half in whole)
    assert stats.hash_bits(np.asfortranarray(array)) == whole
    assert stats.hash_bits(array.astype(array.dtype.newbyteorder())) == whole
    flat = np.ascontiguousarray(array).reshape(-1)
    cut = data.draw(st.integers(0, flat.size))
    parts = [stats.hash_bits(flat[:cut]), stats.hash_bits(flat[cut:], offset=cut)]
    assert tuple(stats.merge(stats.HASH, *parts)) == whole
    if array.dtype.itemsize > 8 and array.dtype.kind == "f":
        return  # long double has padding bits
    raw = flat.copy().view(np.uint8)
    raw[data.draw(st.integers(0, raw.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert stats.hash_bits(raw.view(flat.dtype).astype(flat.dtype.newbyteorder("="))) != whole
    i, j = (data.draw(st.integers(0, flat.size - 1)) for _ in "ij")
    swapped = flat.copy()
    swapped[[i, j]] = swapped[[j, i]]
    assert (stats.hash_bits(swapped) == whole) == (swapped.tobytes() == flat.tobytes())


def test_hash_is_stable():
    """The hash is written to stores, so it may never change."""
    assert stats.hash_bits(np.arange(5, dtype=np.float32)) == (3510832615, 3383251608)
    assert stats.hash_bits(np.array(["ab", "c"])) != stats.hash_bits(np.array(["c", "ab"]))
    fine = np.longdouble(1) + np.finfo(np.longdouble).eps
    assert stats.hash_bits(fine) != stats.hash_bits(np.longdouble(1))
    assert stats.merge(stats.HASH, [2**32 - 1, 2**31], [3, 2**31]).tolist() == [3, 0]
    assert stats.hash_bits(np.zeros(0)) == (0, 0) and stats.hash_bits(np.zeros(3)) != stats.hash_bits(np.zeros(4))


@thorough
@given(arrays())
def test_quantiles_and_histogram(array):
    """np.percentile of the finite elements; bins that add up and lie where they should."""
    x = modulus(array)
    x = x[np.isfinite(x)]
    q = stats.compute(array, stats.QUANTILES)
    bins = stats.compute(array, stats.HISTOGRAM)
    exponent = stats.exponent_histogram_names()
    powers = dict(zip(exponent, stats.compute(array, exponent), strict=True))
    assert bins.sum() == x.size and sum(powers.values()) == np.count_nonzero(x)
    if not x.size:
        assert np.isnan(q).all()
        return
    if abs(x).max() < 1e300:
        want = np.percentile(x, [1, 5, 25, 50, 75, 95, 99])
        np.testing.assert_allclose(q, want, rtol=1e-9, atol=1e-14 * abs(x).max())
    assert bins[0] >= (x == x.min()).sum() and (x.min() == x.max() or bins[-1] >= (x == x.max()).sum())
    for e in (-3, 0, 7):
        assert powers[f"exponent_pos_{e}"] == ((x >= 2.0**e) & (x < 2.0 ** (e + 1))).sum()
        assert powers[f"exponent_neg_{e}"] == ((-x >= 2.0**e) & (-x < 2.0 ** (e + 1))).sum()


def test_histogram_bins():
    """Equal widths, over more than a block."""
    x = np.linspace(-1, 1, 64 * 3000)
    assert np.abs(stats.compute(x, stats.HISTOGRAM) - 3000).max() <= 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_exponent_shares(dtype):
    """Shares agree with the finfo of the type; values of the type itself are inside."""
    info = ml_dtypes.finfo(dtype)
    tiny, huge = float(info.smallest_subnormal), float(info.max)
    x = np.array([tiny, -tiny, tiny * 0.99, tiny / 4, huge, -huge, huge * 2, 0.0, 1.0, np.nan, np.inf])
    names = stats.exponent_histogram_names()
    counts = stats.compute(x, ("zeros", *names))
    assert stats.underflow_share(("zeros", *names), counts, dtype) == 2 / 8
    assert stats.overflow_share(("zeros", *names), counts, dtype) == 1 / 8
    every = np.arange(256 if "8_" in dtype else 65536).astype("u1" if "8_" in dtype else "u2").view(dtype)
    with np.errstate(all="ignore"):
        finite = np.isfinite(every.astype("f8"))
    own = stats.compute(every, stats.exponent_histogram_names(dtype))
    assert own.min() > 0 and own.sum() == finite.sum() - 2
    with pytest.raises(BadSelection):
        stats.overflow_share(names, counts[1:], "float32")


@thorough
@given(arrays(hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5)), st.data())
def test_reduce(array, data):
    """Along any axis each row has the statistic of that row; over all it is the formula."""
    name = data.draw(st.sampled_from([*stats.DEFAULT, *stats.DERIVED, *stats.VALUES, "q25", "hash_lo", "histogram_03"]))
    axis = data.draw(st.integers(-array.ndim, array.ndim - 1))
    got = stats.reduce(array, name, axis)
    rows = np.moveaxis(array, axis, -1)
    assert got.shape == rows.shape[:-1] and got.dtype == np.float64
    for at in np.ndindex(*got.shape):
        want = {**plain(rows[at]), name: stats.from_value(name, rows[at])}
        if name == "rms" and want["l2"] > 1e308:
            continue  # comes from l2, which may round to infinity
        agree([name], [got[at]], want, rtol=1e-9)


@thorough
@given(arrays())
def test_derived_and_value_statistics(array):
    """Against formulas over the elements."""
    want = plain(array)
    x = modulus(array)
    x = x[np.isfinite(x)]
    wide = x.astype(np.longdouble)
    n = len(x) or math.nan
    with np.errstate(all="ignore"):
        want |= {"variance": want["std"] ** 2, "sum": wide.sum(), "rms": want["l2"] / np.sqrt(n)}
        want["prod"] = wide.prod() if wide.all() else 0  # NumPy's would be NaN where it overflows before a zero
        want |= {"zero_share": want["zeros"] / (want["count"] or math.nan), "median": math.nan}
        want["dynamic_range"] = want["max"] - want["min"]
        if len(x):
            half = np.sort(wide)
            want["median"] = (half[(len(x) - 1) // 2] + half[len(x) // 2]) / 2
    names = ("zero_share", "dynamic_range", "median", "prod", *(["rms"] if want["l2"] < 1e308 else []))
    agree(names, [stats.from_value(name, array) for name in names], {k: v for k, v in want.items() if k != "abs_max"})
    if len(x) == 0 or abs(x).max() < 1e150:
        got = [stats.from_value(name, array) for name in ("variance", "sum")]
        room = 1e-13 * (abs(x).max() if len(x) else 0)
        assert got[0] == pytest.approx(float(want["variance"]), rel=3e-5, abs=room**2 + 1e-300, nan_ok=True)
        assert got[1] == pytest.approx(float(want["sum"]), rel=1e-5, abs=room * len(x) + 1e-300)


def test_derive_from_stored():
    """Arrays pass through, absent stays NaN, a statistic that was not kept is named."""
    table = np.stack([stats.compute(x) for x in ([1.0, 2.0, 0.0, np.nan], [], [np.inf])] + [np.full(13, np.nan)])
    have = dict(zip(stats.DEFAULT, table.T, strict=True))
    np.testing.assert_array_equal(stats.derive("sum", have), [3, 0, 0, np.nan])
    np.testing.assert_array_equal(stats.derive("zero_share", have), [0.25, np.nan, 0, np.nan])
    np.testing.assert_array_equal(stats.derive("l2", have), table[:, stats.DEFAULT.index("l2")])
    np.testing.assert_allclose(stats.derive("rms", have), [math.sqrt(5 / 3), np.nan, np.nan, np.nan])
    with pytest.raises(BadSelection, match="zeros"):
        stats.derive("zero_share", {"count": have["count"]})
    with pytest.raises(BadSelection, match="values"):
        stats.required("median")


def test_reduce_errors_and_products():
    """Axes are checked; partial products neither overflow nor vanish."""
    with pytest.raises(BadSelection, match="Axis 1"):
        stats.reduce(np.zeros(3), "mean", 1)
    assert stats.from_value("prod", np.repeat([1e200, 1e-200, 1.0], 3)) == pytest.approx(1)
    assert stats.from_value("prod", [1e300, 1e300, 0.0]) == 0 and stats.from_value("prod", [3, -5, np.nan, 7]) == -105
    assert row_statistic("prod", np.ones((2, 0))).tolist() == [1, 1]


@thorough
@given(hnp.arrays(np.float64, st.integers(0, 8)))
def test_scalar_stats(values):
    """Each row is what compute says of that one element; the hash alone is not known."""
    names = (*stats.DEFAULT, *stats.QUANTILES, *stats.HISTOGRAM[:2], *stats.exponent_histogram_names()[::9])
    got = stats.scalar_stats(names, values)
    assert got.shape == (len(values), len(names))
    for row, value in zip(got, values, strict=True):
        np.testing.assert_allclose(row, stats.compute(value, names), rtol=1e-15)
    assert np.isnan(stats.scalar_stats(stats.HASH, [1.0])).all()


@thorough
@given(arrays(hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5)), st.data())
def test_features(array, data):
    """Each feature's row against the statistics of its slice."""
    axis = data.draw(st.integers(-array.ndim, array.ndim - 1))
    if array.size and np.nanmax(np.where(np.isinf(m := modulus(array)), 0, abs(m)), initial=0) > 1e30:
        return  # float32 cannot hold the result
    got = stats.features(array, axis)
    assert got.dtype == np.float32 and got.shape == (array.shape[axis], len(FEATURES))
    for row, part in zip(got, np.moveaxis(array, axis, 0), strict=True):
        x = modulus(part)
        x = x[np.isfinite(x)]
        want = [(x > 0).mean(), x.mean(), x.std(), x.min(), x.max()] if x.size else [np.nan] * 5
        np.testing.assert_allclose(row, want, rtol=1e-5, atol=1e-12 * (abs(x).max() if x.size else 0) + 1e-45)


def test_features_in_blocks():
    """A batch larger than a block, either side of the axes."""
    x = np.random.default_rng(3).normal(1000, 0.01, (300, 7, 90)).astype("f4")
    wide = x.astype("f8")
    want = np.stack([np.ones(7), *(getattr(wide, name)((0, 2)) for name in ("mean", "std", "min", "max"))], 1)
    np.testing.assert_allclose(stats.features(x, 1), want, rtol=1e-6)
    np.testing.assert_array_equal(stats.features(np.moveaxis(x, 1, 0), 0), stats.features(x, -2))
    with pytest.raises(BadSelection):
        stats.features(np.float32(1), 0)
