"""Parts of a value by NumPy's basic indexing, and what may be given to the hook as a value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import smdbg
from smdbg.store.chunks import cut


@given(data=st.data())
@settings(max_examples=200)
def test_a_cut_is_what_numpy_selects(data: st.DataObject) -> None:
    """Reading the runs of a cut and indexing what is left gives the same as indexing the whole."""
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6))
    index = data.draw(hnp.basic_indices(shape, allow_newaxis=True))
    index = index if isinstance(index, tuple) else (index,)
    enough = data.draw(st.sampled_from([1, 4, 1 << 20]))
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    plan = cut(shape, index, enough)
    assert all(a <= b for a, b in plan.runs) and list(plan.runs) == sorted(plan.runs)
    flat = whole.reshape(-1)
    read = np.concatenate([flat[a:b] for a, b in plan.runs]) if plan.runs else flat[:0]
    np.testing.assert_array_equal(read.reshape(plan.shape)[plan.rest], whole[index])


@pytest.mark.parametrize(
    "index", [(4,), (-5,), (0, 3), (0, 0, 0), (slice(None), -4), (..., 3), (..., 0, ...), ([0],), True, 1.5]
)
def test_an_index_that_cannot_be_says_so(tmp_path: Path, index: Any) -> None:
    with smdbg.Hook(tmp_path / "run") as hook:
        hook.save_tensor("x", np.zeros((4, 3)))
    with pytest.raises(IndexError) as caught:
        smdbg.open_run(tmp_path / "run").tensor("x").value(0, index=index)
    assert "index" in str(caught.value) or "indices" in str(caught.value)


def sources() -> list[Callable[[], Any]]:
    """Return what people save that is not an array of NumPy."""

    class Arrays:
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return np.arange(4, dtype=np.int16)

    class Capsules:
        _held = np.arange(5, dtype=np.float32)

        def __dlpack__(self, **kwargs: Any) -> Any:
            return self._held.__dlpack__(**kwargs)

        def __dlpack_device__(self) -> Any:
            return self._held.__dlpack_device__()

    return [
        Arrays,
        Capsules,
        lambda: [[1, 2], [3, 4]],
        lambda: 7,
        lambda: 2.5,
        lambda: 1j,
        lambda: True,
        lambda: "text",
    ]


@pytest.mark.parametrize("make", sources())
def test_anything_array_like(tmp_path: Path, make: Callable[[], Any]) -> None:
    value = make()
    expected = np.from_dlpack(value) if hasattr(value, "__dlpack__") else np.asarray(value)
    with smdbg.Hook(tmp_path / "run") as hook:
        hook.save_tensor("x", value)
    back = smdbg.open_run(tmp_path / "run").tensor("x").value(0)
    assert back.dtype == expected.dtype and np.array_equal(back, expected)


def test_values_are_copied_when_saved(tmp_path: Path) -> None:
    value = np.zeros(1000)
    with smdbg.Hook(tmp_path / "run") as hook:
        for step in range(5):
            value[:] = step
            hook.save_tensor("x", value)
            hook.save_tensor("view", value.reshape(10, 100).T)
            value[:] = -1
            hook.end_step()
    run = smdbg.open_run(tmp_path / "run")
    assert run.tensor("x").values().tolist() == [[float(s)] * 1000 for s in range(5)]
    assert run.tensor("view").stat("max")[1].tolist() == [0, 1, 2, 3, 4]


def test_torch_tensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    given = {
        "plain": base.clone().requires_grad_(),
        "transposed": base.T,
        "bfloat16": (base / 3).to(torch.bfloat16),
        "bf16/0d": torch.tensor(1.5, dtype=torch.bfloat16),
        "fp8": base.to(torch.float8_e4m3fn),
        "fp8/T": base.to(torch.float8_e5m2).T,
        "conj": torch.tensor([1 + 2j]).conj(),
        "sparse": base.to_sparse(),
        "int": torch.tensor([1, -2], dtype=torch.int8),
        "bool": torch.tensor(True),
        "parameter": torch.nn.Parameter(base),
        "empty": torch.empty(0, 3),
    }
    with smdbg.Hook(tmp_path / "run") as hook:
        for name, value in given.items():
            hook.save_tensor(name, value)
    run = smdbg.open_run(tmp_path / "run")
    assert run.status == "completed"
    for name, value in given.items():
        back, plain = run.tensor(name).value(0), value.detach()
        plain = plain.to_dense() if plain.is_sparse else plain.resolve_conj()
        assert run.tensor(name).dtype == str(value.dtype).removeprefix("torch.")
        assert back.shape == tuple(plain.shape)
        if plain.dtype.is_floating_point:
            assert np.array_equal(back.astype(np.float64), plain.double().numpy())
        else:
            assert np.array_equal(back, plain.numpy())


def test_bytes_are_counted_with_the_dtype_of_each_step(tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run") as hook:
        for value in (np.zeros(3, np.float32), np.zeros(3, np.float64), np.zeros(5, np.float32)):
            hook.save_tensor("x", value)
            hook.end_step()
    assert smdbg.open_run(tmp_path / "run").tensor("x").nbytes == 12 + 24 + 20


def test_features_read_back(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(4, 8, 3)).astype(np.float32)
    with smdbg.Hook(tmp_path / "run", collections=["outputs"]) as hook:
        for step in range(12):
            hook.save_tensor("relu_output_0", values * step, "outputs", feature_axis=2)
            hook.end_step()
    steps, table = smdbg.open_run(tmp_path / "run").tensor("relu_output_0").features()
    assert steps.tolist() == [0, 10] and table.shape == (2, 3, 5)
    flat = (values * 10).reshape(-1, 3)
    np.testing.assert_allclose(table[1, :, 0], (flat > 0).mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(table[1, :, 1:3].T, [flat.mean(axis=0), flat.std(axis=0)], rtol=1e-5)
    assert np.array_equal(table[1, :, 3:].T, [flat.min(axis=0), flat.max(axis=0)])
