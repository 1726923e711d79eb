"""Any framework's tensor as elements in host memory that nobody else will change."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smdbg.store.dtypes import encode

_TORCH_BITS = {1: "uint8", 2: "int16"}


def to_elements(value: Any) -> tuple[NDArray[Any], str, tuple[int, ...], bool]:
    """Return (elements, dtype name, shape, owned) of anything with `__array__` or DLPack, of numbers and text.

    `owned` is False where the elements may share memory with the value: copy them before anybody changes it. Raises
    TypeError for what no array holds.
    """
    if type(value).__module__.split(".", 1)[0] == "torch" and hasattr(value, "detach"):
        return _from_torch(value)
    if not hasattr(value, "__array__") and hasattr(value, "__dlpack__"):
        array = np.from_dlpack(value)
    else:
        array = np.asarray(value)
    if array.dtype.char in "gG" and array.dtype.itemsize > (8 if array.dtype.char == "g" else 16):
        fits = "float64" if array.dtype.char == "g" else "complex128"
        raise TypeError(
            f"a value of dtype {array.dtype} cannot be kept bit for bit, as its bits differ between machines: "
            f"save it as {fits}"
        )
    elements, dtype, shape = encode(array)
    return elements, dtype, shape, not np.may_share_memory(elements, array)


def to_number(name: str, value: Any) -> float | complex:
    """Return a single number of any framework as Python's float or complex. Raises TypeError for more than one."""
    if type(value) is float or type(value) is int:
        return float(value)
    # By way of Python numbers: NumPy takes no bfloat16, and nothing of a device.
    found = np.asarray(value.detach().tolist() if hasattr(value, "detach") else value)
    if found.size != 1:
        raise TypeError(f"{name!r} is not one number but {found.size}: use save_tensor")
    single = found.reshape(-1)[0]
    return complex(single) if found.dtype.kind == "c" else float(single)


def _from_torch(tensor: Any) -> tuple[NDArray[Any], str, tuple[int, ...], bool]:
    plain = tensor.detach()
    if hasattr(plain, "to_local"):  # a sharded tensor: what this worker holds
        plain = plain.to_local()
    plain = _strided(plain)
    on_host = plain.device.type == "cpu"
    plain = plain.cpu().resolve_conj().resolve_neg()
    name = str(plain.dtype).removeprefix("torch.")
    if name == "bfloat16" or name.startswith("float8"):
        import torch

        # NumPy has no such type: the bits travel as integers. A 0-d tensor cannot be viewed at another width in all
        # versions, so give it an axis first.
        bits = plain.contiguous().reshape(-1).view(getattr(torch, _TORCH_BITS[plain.element_size()])).numpy()
        unsigned = bits.view(f"uint{8 * bits.dtype.itemsize}")
        return unsigned, name, tuple(plain.shape), not on_host
    elements, dtype, shape = encode(plain.numpy())
    return elements, dtype, shape, not on_host


def _strided(tensor: Any) -> Any:
    """Return a PyTorch tensor as one dense block of numbers. Raises TypeError where there is no such thing."""
    if getattr(tensor, "is_nested", False):
        raise TypeError(
            "a nested tensor cannot be kept, for its parts differ in shape: save the parts one by one, or padded"
        )
    if str(tensor.dtype) == "torch.complex32":
        raise TypeError("a tensor of dtype complex32 cannot be kept, for NumPy has no such type: save it as complex64")
    if str(tensor.layout) != "torch.strided":  # COO, CSR, CSC, BSR, BSC, MKL-DNN
        tensor = tensor.to_dense()
    return tensor.dequantize() if tensor.is_quantized else tensor
