"""`smdbg demo`: the training of the article, and what the command shows of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smdbg import open_run
from smdbg.cli import run
from smdbg.cli.demo_training import GRADIENT, LOSS, WEIGHT, training
from smdbg.cli.exits import Exit


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def test_the_gradient_is_that_of_the_loss() -> None:
    """Against the difference quotient of the loss in float64."""
    step = next(training(1.0, 1))
    x = np.random.default_rng(0).random((10, 2)).astype(np.float32).astype(np.float64)

    def loss(weight: np.ndarray[Any, Any]) -> float:
        return float(np.mean((x @ weight - x @ np.ones((2, 1))) ** 2))

    start = step.weight.astype(np.float64)
    assert step.loss == pytest.approx(loss(start), rel=1e-5) == pytest.approx(101.69, rel=1e-4)
    for row in range(2):
        shift = np.zeros((2, 1))
        shift[row] = 1e-5
        slope = (loss(start + shift) - loss(start - shift)) / 2e-5
        assert step.gradient[row, 0] == pytest.approx(slope, rel=1e-4)


def test_with_scale_1_the_weights_go_to_the_true_ones() -> None:
    steps = list(training(1.0, 3000))
    assert np.array_equal(steps[0].weight, [[10], [10]])
    assert steps[49].weight.ravel() == pytest.approx([9.53, 9.55], abs=0.01)
    assert steps[-1].weight.ravel() == pytest.approx([1, 1], abs=0.05)
    assert {array.dtype for array in (steps[0].weight, steps[0].gradient, steps[0].loss)} == {np.dtype("float32")}


def test_with_the_large_scale_the_weights_become_nan_two_steps_later() -> None:
    steps = list(training(1e11, 10))
    assert steps[0].loss == pytest.approx(1.017e24, rel=1e-3) and steps[0].gradient[0, 0] == pytest.approx(
        1.28e23, 0.01
    )
    assert [bool(np.isnan(step.weight).any()) for step in steps] == [False] * 2 + [True] * 8


def test_one_run_holds_the_training_bit_for_bit(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--scale", "1e11", "--steps", "20", "--run", "here/one", "--no-show"]) == Exit.CLEAN
    assert capsys.readouterr().out == "here/one\n"
    found = open_run("here/one")
    assert found.hyperparameters["scale"] == 1e11 and found.hyperparameters["lr"] == 0.01
    assert found.tensors() == [WEIGHT, LOSS, GRADIENT]
    assert [found.tensor(name).collection for name in found.tensors()] == ["weights", "losses", "gradients"]
    assert [found.tensor(name).role for name in found.tensors()] == ["weight", "loss", "gradient"]
    assert found.tensor(GRADIENT).info.of == WEIGHT
    steps = list(training(1e11, 20))
    for name, expected in ((WEIGHT, "weight"), (LOSS, "loss"), (GRADIENT, "gradient")):
        values = found.tensor(name).values()
        assert np.array_equal(values, np.stack([getattr(step, expected) for step in steps]), equal_nan=True)
    assert run(["demo", "--scale", "1", "--run", "here/one"]) == Exit.ERROR
    err = capsys.readouterr().err
    assert "here/one" in err and "Traceback" not in err


def test_the_demo_shows_the_broken_run_and_the_healthy_one(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["demo"]) == Exit.CLEAN
    out, err = capfd.readouterr()
    assert "Warning" not in err, "NumPy is quiet"
    parts = out.split("\n$ smdbg ")[1:]
    commands = [part.splitlines()[0] for part in parts]
    assert commands[0] == "runs runs" and commands[1].endswith(" ls") and "inspect loss/loss:0" in commands[2]
    assert [command.split()[-1] for command in commands[3:]] == ["check", "check", "blame"]
    assert "scale=100000000000" in parts[0] and all(name in parts[1] for name in (WEIGHT, LOSS, GRADIENT))
    assert "×" in parts[2] and "1.01695e+24" in parts[2]
    broken, healthy, blame = (part.splitlines() for part in parts[3:])
    assert "scale-100000000000" in broken[0] and broken[-1] == "exit status 1"
    first = next(line for line in broken if line.startswith("First cause: "))
    assert first.startswith(f"First cause: {WEIGHT}, exploding_tensor (error) from step 2 on")
    assert "scale-1 " in healthy[0] and healthy[-1] == "exit status 0"
    assert any("producer" in line and WEIGHT in line for line in blame) and blame[-1] == "exit status 0"


def test_a_second_demo_takes_new_names_and_the_broken_run_is_the_newest(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert run(["demo", "--no-show", "--steps", "3"]) == Exit.CLEAN
    urls = capsys.readouterr().out.split()
    assert len(set(urls)) == 4 and all(url.startswith("runs/demo-") for url in urls)
    assert run(["runs", "--format", "tsv"]) == Exit.CLEAN
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert run(["ls"]) == Exit.CLEAN
    assert urls[-1] in capsys.readouterr().err and urls[-1].endswith("scale-100000000000")


def test_the_demo_needs_the_six_packages_alone() -> None:
    """What the demo imports beyond the standard library are those that installing brings along."""
    script = (
        "import sys; from smdbg.cli import run; status = run(['demo', '--steps', '3', '-q']);"
        "print('MODULES', status.value, *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    status, *names = result.stdout.rpartition("MODULES ")[2].split()
    assert status == "0", result.stderr
    assert not {"torch", "sklearn", "zarr", "s3fs", "fsspec", "ml_dtypes", "dask", "xarray"} & set(names)


def test_the_demo_on_s3(bucket_url: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--run", bucket_url, "--steps", "20"]) == Exit.CLEAN, capfd.readouterr().err
    parts = capfd.readouterr().out.split("\n$ smdbg ")[1:]
    assert parts[0].startswith(f"runs {bucket_url}\n") and "scale-100000000000  completed" in parts[0]
    assert [part.splitlines()[-1] for part in parts] == [f"exit status {status}" for status in (0, 0, 0, 1, 0, 0)]
    assert run(["demo", "--run", bucket_url, "--steps", "20"]) == Exit.ERROR
    assert "scale-1" in capfd.readouterr().err
    assert run(["runs", f"{bucket_url}/nothing"]) == Exit.ERROR
    assert run(["--run", "s3://no-such-bucket-here/x", "ls"]) == Exit.ERROR
    err = capfd.readouterr().err
    assert "no-such-bucket-here" in err and "Traceback" not in err and "internal error" not in err
