"""The statuses of `smdbg check`: a row of the contract each by the real command, and odd runs with the pack default.

tests/test_cli_check.py holds the combinations, the whole table of them and the usage errors; tests/test_plugins.py the
plugins that break; tests/test_cli.py what every command shares: 130, 141, a full disk.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smdbg import CollectionConfig, Hook, ReductionConfig, SaveConfig
from smdbg.cli import run as command

EVERY = SaveConfig(save_interval=1)
RAW = ReductionConfig(save_raw_tensor=True)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def opened(url: str, interval: int = 1, **options: Any) -> Hook:
    every = SaveConfig(save_interval=interval)
    both = {mode: every for mode in ("train", "eval")}
    names = ("losses", "weights", "gradients")
    collections = [CollectionConfig(name, save_config=both, reduction_config=RAW) for name in names]
    return Hook(url, collections=collections, **options)


def step(hook: Hook, at: int, mode: str = "train", fill: float | None = None, seed: int = 0) -> None:
    """Save one step of a small healthy training, or of one in which everything is `fill`."""
    rng = np.random.default_rng((seed, at))
    hook.set_mode(mode)
    loss = np.float32(1 / (at + 1) + 0.01 * rng.normal()) if fill is None else np.float32(fill)
    weight = rng.normal(size=(4, 4)).astype(np.float32) if fill is None else np.full((4, 4), fill, np.float32)
    hook.save_tensor("loss", loss, "losses", role="loss")
    hook.save_tensor("w", weight, "weights", role="weight")
    if mode == "train":
        hook.save_tensor("gradient/w", weight * np.float32(0.1), "gradients", role="gradient", of="w")
    hook.end_step()


def check(url: str, *args: str) -> int:
    return int(command(["--run", url, "check", *args]))


def results(capsys: pytest.CaptureFixture[str], url: str, *args: str) -> tuple[int, dict[str, list[Any]], str]:
    """Return status, records by type and stderr of a check with pack default."""
    capsys.readouterr()
    status = check(url, "--format", "jsonl", *args)
    out, err = capsys.readouterr()
    found: dict[str, list[Any]] = {"finding": [], "rule": [], "summary": []}
    for record in map(json.loads, out.splitlines()):
        found.setdefault(record["type"], []).append(record)
    assert "internal error" not in err and "Traceback" not in err
    assert "failed" not in [record["outcome"] for record in found["rule"]], found["rule"]
    return status, found, err


# ------------------------------------------------------------------------------------------ rows of the contract


def process(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "smdbg", "check", *args], capture_output=True, text=True)


@pytest.mark.parametrize(("fill", "status"), [(None, 0), (np.nan, 1)])
def test_the_shell_is_told_of_clean_and_violated(fill: float | None, status: int) -> None:
    with opened("run") as hook:
        for at in range(4):
            step(hook, at, fill=fill)
    done = process("--run", "run", "--rules", "exploding_tensor")
    assert done.returncode == status and bool(done.stdout) is bool(status)
    assert "1 of 1 rules judged, 4 of 4 steps" in done.stderr


def test_the_shell_is_told_that_there_is_no_verdict() -> None:
    done = process("--run", "nowhere")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("smdbg: ")


def test_a_hook_that_switched_itself_off_is_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    class Odd:
        def __array__(self, *_: Any, **__: Any) -> Any:
            raise ArithmeticError("injected")

    with opened("run") as hook:
        for at in range(5):
            step(hook, at)
        hook.save_tensor("odd", Odd(), "weights")
        hook.end_step()
    status, _, err = results(capsys, "run")
    assert status == 2 and "the hook switched itself off" in err
    assert check("run", "--allow-incomplete") == 2


def test_rows_that_were_dropped_are_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    with opened("run", buffer_bytes=256 << 10) as hook:
        for at in range(5):
            step(hook, at)
        assert hook.flush()
        hook.set_mode("train")
        hook.save_tensor("huge", np.zeros(1 << 17), "weights")  # more than the buffer holds
        hook.end_step()
    status, found, err = results(capsys, "run")
    assert found["summary"][0]["dropped_steps"] > 0
    assert status == 2 and "dropped while the run was written" in err


def test_a_named_rule_that_saw_too_little_is_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    with opened("run") as hook:
        for at in range(3):
            step(hook, at)
    status, found, err = results(capsys, "run", "--rules", "loss_not_decreasing,exploding_tensor")
    assert {record["name"]: record["outcome"] for record in found["rule"]} == {
        "loss_not_decreasing": "insufficient",
        "exploding_tensor": "clean",
    }
    assert status == 2 and "No verdict: the rule loss_not_decreasing had nothing to judge" in err
    assert check("run") == 0  # of the pack others judged, and that is said


def test_check_ends_with_how_much_was_judged(capsys: pytest.CaptureFixture[str]) -> None:
    with opened("run") as hook:
        for at in range(3):
            step(hook, at)
    assert check("run", "--format", "table") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    summary = results(capsys, "run")[1]["summary"][0]
    assert last.endswith(f"{summary['rules_judged']} of {summary['rules']} rules judged, 3 of 3 steps")
    assert 0 < summary["rules_judged"] < summary["rules"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--rules", "exploding_tensr"], "Did you mean exploding_tensor"),
        (["--pack", "defualt"], "Did you mean default"),
        (["--set", "exploding_tensor.only_nam=true"], "Did you mean only_nan"),
        (["--set", "exploding_tensor.only_nan=7"], "only_nan must be true or false, and got '7'"),
        (["--set", "dead_relu.threshold_layer=101"], "from 0 to 100 %, and got '101'"),
        (["--set", "vanishing_gradient.repeats=half"], "repeats must be whole number"),
        (["--rules", "all_zero", "--ignore", "all_zero"], "--ignore leaves out everything"),
        (["--rules", "all_zero", "--set", "all_zero.mode=train", "--mode", "eval"], "bound to another mode"),
        (["--reference", "run"], "--reference has no use here"),
        (["--plugin", "gone.py"], "gone.py: there is no such file"),
    ],
)
def test_what_is_wrong_with_the_options_is_said(args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with opened("run") as hook:
        step(hook, 0)
    assert check("run", *args) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err


def test_a_pack_that_extends_itself(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yaml").write_text("extends: [b.yaml]\n")
    Path("b.yaml").write_text("\nextends: [a.yaml]\n")
    with opened("run") as hook:
        step(hook, 0)
    assert check("run", "--pack", "a.yaml") == 2
    assert "b.yaml:2" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- odd runs, pack default


def test_an_empty_run(capsys: pytest.CaptureFixture[str]) -> None:
    with opened("run"):
        pass
    status, found, err = results(capsys, "run")
    assert status == 2 and found["finding"] == [] and "no rule found anything to judge in run" in err


def test_a_run_with_evaluation_only(capsys: pytest.CaptureFixture[str]) -> None:
    with opened("run") as hook:
        for at in range(30):
            step(hook, at, "eval")
    status, found, _ = results(capsys, "run")
    assert status == 0 and found["finding"] == [] and found["summary"][0]["rules_judged"] >= 1
    outcomes = {record["name"]: record["outcome"] for record in found["rule"]}
    assert outcomes["exploding_tensor"] == "clean" and outcomes["vanishing_gradient"] == "not applicable"


def test_collections_saved_out_of_phase(capsys: pytest.CaptureFixture[str]) -> None:
    """Weights at even steps, gradients at odd ones, losses at every third."""
    due = {"weights": (0, 2), "gradients": (1, 2), "losses": (0, 3)}
    collections = [
        CollectionConfig(name, save_config=SaveConfig(start_step=first, end_step=None, save_steps=range(first, 60, by),
                         save_interval=1 << 30), reduction_config=RAW)
        for name, (first, by) in due.items()
    ]  # fmt: skip
    with Hook("run", collections=collections) as hook:
        for at in range(60):
            step(hook, at)
    status, found, _ = results(capsys, "run")
    assert status == 0 and [one for one in found["finding"] if one["severity"] == "error"] == []
    assert found["summary"][0]["steps_seen"] == found["summary"][0]["steps"]


def test_ragged_workers(capsys: pytest.CaptureFixture[str]) -> None:
    """Three workers of ten, six and no steps, of which the second is bad."""
    for rank, steps in ((0, 10), (1, 6), (2, 0)):
        with opened("run", rank=rank, world_size=3, workers="all", resume=rank > 0) as hook:
            for at in range(steps):
                step(hook, at, fill=np.nan if rank == 1 and at >= 4 else None, seed=rank)
    status, found, _ = results(capsys, "run", "--rules", "exploding_tensor")
    assert status == 1
    assert {(one["worker"], one["first_step"], tuple(one["onset"])) for one in found["finding"]} == {(1, 4, (3, 4))}
    status, found, _ = results(capsys, "run")
    assert status == 1 and ("exploding_tensor", 1) in {(one["rule"], one["worker"]) for one in found["finding"]}


def test_several_attempts(capsys: pytest.CaptureFixture[str]) -> None:
    """The first attempt went bad at step 6 and was repeated from step 5 on, without it."""
    with pytest.raises(RuntimeError), opened("run") as hook:
        for at in range(8):
            step(hook, at, fill=np.nan if at >= 6 else None)
        raise RuntimeError("out of memory")
    with opened("run", resume=True) as hook:
        hook.set_step(5)
        for at in range(5, 12):
            step(hook, at)
    status, found, _ = results(capsys, "run", "--rules", "exploding_tensor")
    assert (status, found["finding"]) == (0, [])
    status, found, _ = results(capsys, "run", "--rules", "exploding_tensor", "--attempt", "0")
    assert status == 1 and {one["first_step"] for one in found["finding"]} == {6}
    assert results(capsys, "run")[0] == 0
    status, found, err = results(capsys, "run", "--attempt", "all")
    assert (status, found["rule"]) == (2, []) and "Check one attempt at a time" in err
    status, _, err = results(capsys, "run", "--attempt", "7")
    assert status == 2 and "an attempt 7" in err


def test_everything_nan_from_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    with opened("run") as hook:
        for at in range(30):
            step(hook, at, fill=np.nan)
    status, found, _ = results(capsys, "run")
    assert status == 1
    exploding = [one for one in found["finding"] if one["rule"] == "exploding_tensor"]
    assert {one["tensor"] for one in exploding} == {"loss", "w", "gradient/w"}
    assert all(one["first_step"] == 0 and one["onset"] == [None, 0] for one in exploding)
    outcomes = {record["name"]: record["outcome"] for record in found["rule"]}
    assert outcomes["vanishing_gradient"] == "insufficient"


@pytest.mark.parametrize(("fill", "status"), [(None, 0), (np.nan, 1)])
def test_one_saved_step_only(fill: float | None, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    with opened("run") as hook:
        step(hook, 0, fill=fill)
    found_status, found, _ = results(capsys, "run")
    assert found_status == status
    assert found["summary"][0]["steps"] == 1
    outcomes = {record["name"]: record["outcome"] for record in found["rule"]}
    assert outcomes["vanishing_gradient"] == "insufficient" and outcomes["loss_not_decreasing"] == "insufficient"


def test_steps_without_anything_saved(capsys: pytest.CaptureFixture[str]) -> None:
    never = [CollectionConfig(name, save_config=SaveConfig(end_step=0)) for name in ("losses", "weights", "gradients")]
    with Hook("run", collections=never) as hook:
        for at in range(5):
            step(hook, at)
    status, found, err = results(capsys, "run")
    assert status == 2 and found["finding"] == [] and "no rule found anything to judge" in err


def test_odd_names_of_tensors_reach_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with opened("run") as hook:
        hook.set_mode("train")
        hook.save_tensor("a\x1b[31m\n\tb", np.full(3, np.nan), "weights", role="weight")
        hook.end_step()
    shown: Callable[[str], int] = lambda form: check("run", "--format", form, "--write-baseline", "known.yaml")  # noqa: E731
    for form in ("table", "tsv", "jsonl", "json"):
        assert shown(form) == 0
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err
    assert check("run", "--baseline", "known.yaml") == 0
