"""Write the values of a tensor to a .npy file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np

from smdbg.cli import series
from smdbg.cli.output import counted, shape
from smdbg.errors import BadSelection, SmdbgError, StoreError

Array = np.ndarray[Any, Any]


def write(path: str, request: series.Request) -> str:
    """Write the values [steps, *shape] of one worker and attempt, after --index and --reduce, and return what was done.

    The file appears whole or not at all. Types that NumPy does not know by itself are written as float32, which holds
    them exactly. Raises BadSelection for several of them or of shapes, StoreError where the file cannot be written.
    """
    if len(request.workers) > 1:
        ranks = ", ".join(map(str, request.workers))
        raise BadSelection(f"'{request.tensor.name}' was saved by the workers {ranks}: choose one with --worker.")
    filled = [(source, found) for source in request.sources() if len(found := series.value_steps(request, source))]
    if not filled:
        raise series.only_statistics(request)
    if len(filled) > 1:
        numbers = ", ".join(str(source.attempt) for source, _ in filled)
        raise BadSelection(f"'{request.tensor.name}' was saved by the attempts {numbers}: choose one with --attempt.")
    ((source, steps),) = filled
    with _placed(path) as file:
        first = _write(file, request, source, steps)
    span = f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else f"{steps[0]}"
    return f"Wrote {path}: {counted(len(steps), 'step')} ({span}), {_form(first)} each."


def _write(file: IO[bytes], request: series.Request, source: series.Source, steps: series.Steps) -> Array:
    """Write the header and then the value of each step, and return the first one.

    Texts, whose longest sets the width of all, are held in memory; of numbers only as much as is read at once.
    """
    values = (_native(request, value) for value in series.arrays(request, source, steps))
    first = next(values)
    if first.dtype.kind in "OUS":
        texts = np.array([first, *values], dtype=str)
        np.save(file, texts, allow_pickle=False)
        return np.asarray(texts[0])
    header = np.lib.format.header_data_from_array_1_0(first)
    header |= {"shape": (len(steps), *first.shape), "fortran_order": False}
    np.lib.format.write_array_header_1_0(file, header)
    file.write(first.tobytes())
    for step, value in zip(steps[1:], values, strict=True):
        if (value.shape, value.dtype) != (first.shape, first.dtype):
            forms = f"{_form(first)} at step {steps[0]}, {_form(value)} at step {step}"
            raise BadSelection(
                f"'{request.tensor.name}' changes ({forms}), so one array cannot hold it. Select other --steps, or "
                "--reduce it."
            )
        file.write(value.tobytes())
    return first


def _form(array: Array) -> str:
    """Return dtype and shape for people."""
    return f"{array.dtype} {shape(array.shape)}"


def _native(request: series.Request, value: Any) -> Array:
    """Return a value, reduced if that is asked for, in a type that NumPy can write."""
    array = np.asarray(series.reduced(request, value, request.reduce[0]) if request.reduce else value)
    return array.astype(np.float32) if array.dtype.kind == "V" else array


@contextmanager
def _placed(path: str) -> Iterator[IO[bytes]]:
    """Give a temporary file next to the path and move it there in the end; after an error nothing is left."""
    temporary = ""
    path = os.path.realpath(path)  # what a link points to, not the link
    if os.path.exists(path) and not os.path.isfile(path):
        raise StoreError(f"{path} is not a regular file, and stays as it is. Give another path with --out.")
    try:
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(os.path.abspath(path)), delete=False) as file:
            temporary = file.name
            yield file
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = ""
    except SmdbgError:
        raise
    except OSError as error:
        raise StoreError(f"Could not write {path}: {error.strerror or error}. Give another path with --out.") from None
    finally:
        if temporary:
            os.unlink(temporary)


def _umask() -> int:
    """Return the permissions that new files lack; a temporary file would be private otherwise."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
