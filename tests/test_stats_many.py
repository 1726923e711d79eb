"""Statistics of many arrays at once, of values in pieces, and of large float32 arrays."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from smdbg import stats, stats_kernel, stats_many
from smdbg.errors import BadSelection
from smdbg.stats_extra import BLOCK

ml_dtypes = pytest.importorskip("ml_dtypes")
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
thorough = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

BRAIN = [np.dtype(name) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")]
REAL = [*(np.dtype(c) for c in "?bBhHiIlLqQefdg"), np.dtype(">f4"), np.dtype(">f8"), np.dtype(">i2"), *BRAIN]
EXACT = ("count", "nan", "posinf", "neginf", "min", "max", "abs_max", "zeros")
OTHERS = (*stats.HASH, *stats.QUANTILES, *stats.HISTOGRAM[::9], *stats.exponent_histogram_names()[::17])


def same(names, got, want, rtol=1e-9):
    """Assert that the columns of `got` are those of `want`: exactly, or to rtol and the rounding of the largest."""
    top = np.nan_to_num(stats_of("abs_max", names, want), nan=0.0)
    for i, name in enumerate(names):
        a, b = got[..., i], want[..., i]
        if name in EXACT or name in OTHERS:
            np.testing.assert_array_equal(a, b, err_msg=name)
            continue
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b), err_msg=name)
        floor = 1e-14 * top if name == "mean" else 0.0  # what cancels to nothing is rounding
        with np.errstate(invalid="ignore"):
            far = ~((np.abs(a - b) <= rtol * np.abs(b) + floor + 1e-322) | (a == b) | np.isnan(b))
        assert not far.any(), (name, a[far], b[far])


def stats_of(name, names, table):
    """Return a column of `table`, 0 where it is not among `names`."""
    return table[..., names.index(name)] if name in names else np.zeros(table.shape[:-1])


def unaligned(array):
    """Return a 1-d array of the same elements four bytes after a place that is aligned to eight."""
    raw = np.zeros(array.nbytes + 16, np.uint8)
    start = (-raw.ctypes.data) % 8 + 4
    place = raw[start : start + array.nbytes].view(array.dtype)
    place[:] = array.reshape(-1)
    assert array.dtype.char != "d" or not array.size or not place.flags.aligned
    return place


@st.composite
def arrays(draw, dtype=None, shapes=None):
    """Numbers of any kind: specks of NaN and infinities, zeros, constants, all scales, large offsets, any layout."""
    dtype = draw(st.sampled_from(REAL)) if dtype is None else dtype
    shape = draw(shapes if shapes is not None else hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 20)))
    scale = draw(st.sampled_from([1.0, 1.0, 1e-3, 1e-30, 1e-44, 1e38, 1e-160, 1e300, 1.7e308, 1e-310]))
    offset = draw(st.sampled_from([0.0, 0.0, 1e3, -1e6]))
    x = np.asarray(
        rng.uniform(-1, 1, shape) * scale + offset * draw(st.sampled_from([1.0, scale if scale < 1e300 else 1.0]))
    )
    if draw(st.booleans()):
        x = np.asarray(np.where(rng.random(shape) < 0.3, draw(st.sampled_from([0.0, -0.0, 1.0, scale])), x))
    if draw(st.integers(0, 3)) == 0:
        x = np.asarray(
            np.where(
                rng.random(shape) < draw(st.sampled_from([0.2, 1.0])), rng.choice([np.nan, np.inf, -np.inf], shape), x
            )
        )
    if draw(st.integers(0, 5)) == 0:
        x = np.full(shape, x.reshape(-1)[0] if x.size else 0.0)
    if dtype.kind in "biu":
        x = np.clip(np.nan_to_num(x), -100 if dtype.kind == "i" else 0, 100)
    with np.errstate(all="ignore"):
        x = np.asarray(x.astype(dtype))
    how = draw(st.sampled_from(["C", "T", "strided", "unaligned"]))
    if how == "unaligned" and x.dtype.itemsize in (4, 8):
        return unaligned(x)
    return x.T if how == "T" else np.repeat(x, 2, axis=-1)[..., ::2] if how == "strided" and x.ndim else x


ODD = st.sampled_from([
    np.array([1 + 2j, complex(np.nan, np.inf)]), np.array(["a", "bc"]), np.array(["2026-01-01"], "M8[D]"),
    np.zeros(stats_many.SMALL + 1, np.float32), np.zeros((3, 0)),
])  # fmt: skip


@thorough
@given(st.lists(st.one_of(arrays(), arrays(), arrays(), ODD), max_size=30), st.data())
def test_many_as_each(held, data):
    """Any mixture of arrays, any choice of names."""
    names = tuple(data.draw(st.one_of(st.just(stats.DEFAULT), st.lists(st.sampled_from(stats.DEFAULT)))))
    got = stats.compute_many(held, names)
    want = np.array([stats.compute(array, names) for array in held]).reshape(len(held), len(names))
    assert got.dtype == np.float64 and got.shape == want.shape
    same(names, got, want)
    assert not np.signbit(got[got == 0]).any()


@thorough
@given(arrays(shapes=st.tuples(st.integers(0, 20))), st.lists(st.integers(0, 20), max_size=5), st.data())
def test_pieces_as_the_whole(array, cuts, data):
    """Any cut, empty pieces too, each piece somewhere else in memory."""
    array = array.reshape(-1)
    if array.dtype.char in "efdbhilq" and data.draw(st.booleans()):
        with np.errstate(all="ignore"):
            array = array.astype(data.draw(st.sampled_from(["c8", "U5"])))
    pieces = np.split(array, sorted(min(cut, array.size) for cut in cuts))
    if array.dtype.itemsize in (4, 8):
        pieces = [unaligned(piece) if data.draw(st.booleans()) else piece for piece in pieces]
    names = (*stats.DEFAULT, *OTHERS)
    same(names, stats.compute_pieces(pieces, names), stats.compute(array, names))


def test_pieces_that_are_none_or_differ():
    """No piece is an empty array; two dtypes are refused; integers in pieces keep their hash."""
    np.testing.assert_array_equal(stats.compute_pieces([]), stats.compute([]))
    with pytest.raises(BadSelection, match="one dtype"):
        stats.compute_pieces([np.zeros(1, "f4"), np.zeros(1)])
    whole = np.arange(3 * BLOCK + 5, dtype=np.float32)
    parts = [unaligned(whole[:7]), whole[7 : BLOCK + 100], whole[BLOCK + 100 :]]
    names = (*stats.DEFAULT, *OTHERS)
    same(names, stats.compute_pieces(parts, names), stats.compute(whole, names), rtol=1e-6)


def test_many_over_many_blocks():
    """More than the buffer holds, NaN in one block alone, segments right up to the largest size that is packed."""
    rng = np.random.default_rng(5)
    sizes = [1, stats_many.SMALL, 3, stats_many.SMALL - 1, stats_many.SMALL, *rng.integers(1, 200, 3000), 2 * BLOCK]
    held = [rng.normal(1000, 0.01, size).astype(rng.choice(["f4", "f8"])) for size in sizes]
    held[2000][0], held[2001][:] = np.nan, -np.inf
    held[2002][-1] = 0
    names = stats.DEFAULT
    same(names, stats.compute_many(held), np.array([stats.compute(array) for array in held]))


def test_small_arrays_are_packed(monkeypatch):
    """What small arrays of numbers cost must not depend on compute."""
    monkeypatch.setattr(stats, "compute", None)
    held = [np.float32([1, 2]), np.ones((2, 2), "f8").T, np.array(3), np.ones(3, "bfloat16"), np.ones(4, ">f4")]
    assert stats.compute_many(held, ["count", "l2"]).tolist() == [
        [2, np.sqrt(5)], [4, 2], [1, 3], [3, np.sqrt(3)], [4, 2],
    ]  # fmt: skip


def test_many_in_other_groups_and_errors():
    """Costlier statistics come from compute; wrong names and objects are refused; nothing gives an empty table."""
    held = [np.arange(i, dtype=np.float32) for i in range(9)]
    names = ("max", *stats.HASH, "q50")
    np.testing.assert_array_equal(stats.compute_many(held, names), [stats.compute(array, names) for array in held])
    assert stats.compute_many([]).shape == (0, 13) and stats.compute_many(held, ()).shape == (9, 0)
    assert stats.compute_many([[1, 2], 3.0], ("max",)).tolist() == [[2], [3]]
    with pytest.raises(BadSelection, match="objects"):
        stats.compute_many([*held, np.array([object()])])
    with pytest.raises(BadSelection, match="meen"):
        stats.compute_many(held, ["meen"])


@pytest.mark.parametrize(
    "values",
    [
        lambda r, n: r.standard_normal(n),
        lambda r, n: np.maximum(r.standard_normal(n), 0),
        lambda r, n: r.normal(1000, 0.01, n),
        lambda r, n: r.normal(3, 1.1, n),
        lambda r, n: r.normal(0, 1e-20, n),
        lambda r, n: r.normal(0, 1e37, n),
        lambda r, n: r.normal(0, 1e-44, n),
        lambda r, n: np.where(np.arange(n) == 77, 1.0, 1e-25),
        lambda r, n: np.where(np.arange(n) % 2, 0.1, -0.1),
        lambda r, n: np.tile([1e6, 3.0, -1e6], n)[:n],
    ],
)
@pytest.mark.parametrize("size", [stats_kernel.NARROW_SIZE, 100_003])
def test_large_float32(values, size):
    """Sums as float32 where nothing can cancel stay within 1e-6 of the formulas in float64, far inside 1e-5."""
    x = values(np.random.default_rng(6), size).astype(np.float32)
    got = dict(zip(stats.DEFAULT, stats.compute(x), strict=True))
    wide = x.astype(np.longdouble)
    want = {"mean": wide.mean(), "std": wide.std(), "l2": np.sqrt((wide * wide).sum()), "l1": abs(wide).sum()}
    for name, value in want.items():
        floor = 1e-14 * got["abs_max"] if name == "mean" else 0.0
        assert abs(got[name] - float(value)) <= 1e-6 * abs(float(value)) + floor, name
    assert (got["min"], got["max"], got["zeros"]) == (x.min(), x.max(), (x == 0).sum())
    twice = stats.compute_pieces([unaligned(x[:5000]), x[5000:]])
    np.testing.assert_allclose(twice, list(got.values()), rtol=1e-6, atol=1e-14 * got["abs_max"])
