"""Errors inside the hook, objects that are damaged, a writer that is killed."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.errors import SmdbgError


def save(hook: smdbg.Hook, step: int, size: int = 1000) -> None:
    hook.save_tensor("x", np.full(size, step, np.float32))
    hook.save_scalar("loss", step, "losses")
    hook.end_step()


# --- what the hook never does ---


def raising(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("injected\nfault")


@pytest.mark.parametrize("where", ["convert", "in_training_thread", "in_writer", "collections"])
def test_an_error_inside_never_reaches_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    url = tmp_path / "run"
    hook = smdbg.Hook(url)
    for step in range(3):
        save(hook, step)
    assert hook.flush()
    if where == "convert":
        monkeypatch.setattr("smdbg.hooks.intake.to_elements", raising)
    elif where == "in_training_thread":
        monkeypatch.setattr("smdbg.hooks.step.OpenStep.groups", raising)
    elif where == "in_writer":
        monkeypatch.setattr("smdbg.store.collection.statistics.compute_many", raising)
    for step in range(3, 80):
        if where == "collections":
            for number in range(70):
                hook.save_scalar(f"x{number}", step, f"c{number}")
        save(hook, step)
        time.sleep(0.01)
        hook.should_save("losses")
    assert hook.flush(1) is False and hook.should_stop is False
    hook.set_mode("eval")
    hook.close()
    hook.close()
    monkeypatch.undo()
    run = smdbg.open_run(url)
    assert run.status.startswith("failed: hook switched off: "), run.status
    assert ("63" if where == "collections" else "RuntimeError: injected") in run.status
    assert run.attempts()[0].switched_off
    assert run.tensor("x").values()[:, 0].tolist() == [0, 1, 2]
    assert run.tensor("loss").values().tolist() == [0, 1, 2]
    logged = [r for r in caplog.records if r.exc_info]
    assert len(logged) == 1 and logged[0].levelname == "ERROR"


def test_values_nobody_can_keep(tmp_path: Path) -> None:
    for number, value in enumerate([object(), np.array([{}]), np.zeros(2, "i4,f4"), [[1], [2, 3]]]):
        with smdbg.Hook(tmp_path / str(number)) as hook:
            hook.save_scalar("x", 1)
            hook.end_step()
            hook.save_tensor("bad", value)
            hook.save_scalar("x", 1)
        run = smdbg.open_run(tmp_path / str(number))
        assert run.status.startswith("failed: hook switched off: ") and run.steps().tolist() == [0]


# --- damage ---


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("damage") / "run"
    with smdbg.Hook(url) as hook:
        for step in range(3):
            hook.save_tensor("a", np.arange(4, dtype=np.int16) + step, "a")
            hook.save_tensor("b", np.arange(5.0) + step, "b")
            hook.end_step()
    return url


def objects(url: Path) -> list[Path]:
    return sorted(p for p in url.rglob("*") if p.is_file() and p.name != "zarr.json")


def test_damage_is_found_and_named(small_run: Path) -> None:
    """Every bit of every small object: the value is right, or the error names the object; others stay readable."""
    rng = np.random.default_rng(0)
    found = 0
    for path in objects(small_run):
        good = path.read_bytes()
        name = str(path.relative_to(small_run / "workers/00000"))
        cuts = [b"", *(good[:n] for n in {1, 3, 4, 5, len(good) // 2, len(good) - 5, len(good) - 4, len(good) - 1})]
        places = (
            range(len(good)) if len(good) < 400 else [*range(0, 64, 3), *rng.integers(0, len(good), 20), len(good) - 1]
        )
        flips = [good[:at] + bytes([good[at] ^ 1 << int(rng.integers(8))]) + good[at + 1 :] for at in places]
        for bad in (*cuts, *flips, None):
            path.write_bytes(bad) if bad is not None else path.unlink()
            found += _right_or_named(small_run, name)
        path.write_bytes(good)
    assert found > 100
    assert _right_or_named(small_run, "") == 0


def _right_or_named(url: Path, name: str) -> int:
    """Read everything. Return 1 if damage was found; assert that it was named and that nothing was wrong."""
    try:
        run = smdbg.open_run(url)
    except SmdbgError as error:
        assert name.startswith("steps/") and "steps" in str(error) and isinstance(error, OSError), error
        return 1
    damaged = 0
    for tensor in "ab":
        try:
            for step in (2, 0):
                want = (np.arange(4) if tensor == "a" else np.arange(5.0)) + step
                assert np.array_equal(run.tensor(tensor).value(step), want)
                assert run.tensor(tensor).stat("max")[1].tolist() == [want.max() - step + s for s in range(3)]
        except smdbg.errors.DamagedData as error:
            assert name.startswith(f"{tensor}/") and name in str(error), (name, str(error))
            damaged = 1
    return damaged


def test_damage_of_the_worker_group_is_found(small_run: Path) -> None:
    path = small_run / "workers/00000/zarr.json"
    good = path.read_bytes()
    start = good.index(b'"catalogue"')
    try:
        for at in range(start, start + 200, 3):
            path.write_bytes(good[:at] + bytes([good[at] ^ 2]) + good[at + 1 :])
            with pytest.raises(smdbg.errors.DamagedData, match=r"workers/00000.*zarr.json"):
                smdbg.open_run(small_run)
        for n in range(0, len(good), 97):
            path.write_bytes(good[:n])
            with pytest.raises(smdbg.errors.DamagedData):
                smdbg.open_run(small_run)
    finally:
        path.write_bytes(good)


# --- killed ---


def killed_writer() -> Any:
    path = Path(__file__).with_name("killed_writer.py")
    spec = importlib.util.spec_from_file_location("killed_writer", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_killed_twenty_times(tmp_path: Path) -> None:
    committed = killed_writer().kill_many([str(tmp_path / f"run{i}") for i in range(20)], tmp_path)
    assert sum(steps > 0 for steps in committed) > 10
