"""What the hook never does to a training, what it keeps to itself, and how a process may end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg import CollectionConfig, ReductionConfig, SaveConfig


def test_bad_arguments_raise_and_write_nothing(tmp_path: Path) -> None:
    url = tmp_path / "run"
    bad: list[dict[str, Any]] = [
        {"save_config": 3},
        {"save_config": {"trian": SaveConfig()}},
        {"reduction_config": SaveConfig()},
        {"collections": [3]},
        {"collections": ["steps"]},
        {"collections": ["a/b"]},
        {"collections": ["a", CollectionConfig("a")]},
        {"workers": "some"},
        {"on_error": "ignore"},
        {"rank": -1},
        {"rank": 2, "world_size": 2},
        {"hyperparameters": 3},
        {"when_full": "wait"},
    ]
    for options in bad:
        with pytest.raises((TypeError, ValueError)):
            smdbg.Hook(url, **options)
    for make in (lambda: SaveConfig(0), lambda: SaveConfig(start_step=-1), lambda: SaveConfig(save_steps=[1.5])):
        with pytest.raises((TypeError, ValueError)):
            make()
    assert not url.exists()


def test_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMDBG_DISABLE", "1")
    monkeypatch.chdir(tmp_path)
    with smdbg.Hook() as hook:
        hook.set_mode("train")
        hook.save_tensor("x", object())
        hook.save_scalar("y", "nonsense")
        hook.end_step()
        hook.set_step(3)
        hook.load_state_dict(hook.state_dict())
        assert not hook.should_save("losses") and not hook.should_stop and not hook.flush()
    assert list(tmp_path.iterdir()) == []


def test_random_state_is_untouched(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    with smdbg.Hook(tmp_path / "run", collections=["weights"], reduction_config=ReductionConfig(hash=True)) as hook:
        hook.save_tensor("a.weight", np.ones(10))
    assert before == (random.getstate(), np.random.get_state()[1].tolist())


def test_secrets_are_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [
        "train.py",
        "--api-key",
        "S3CR3T",
        "--token=S3CR3T",
        "s3://u:S3CR3T@host/x",
        "--lr",
        "0.1",
        "PASSWORD=S3CR3T",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    given = {
        "lr": 0.1,
        "wandb_api_key": "S3CR3T",
        "nested": {"password": "S3CR3T", "n": np.int64(3)},
        "nan": float("nan"),
    }
    smdbg.Hook(tmp_path / "run", hyperparameters=given).close()
    assert "S3CR3T" not in "".join(p.read_text() for p in tmp_path.rglob("zarr.json"))
    run = smdbg.open_run(tmp_path / "run")
    assert run.hyperparameters == {
        "lr": 0.1, "wandb_api_key": "***", "nested": {"password": "***", "n": 3}, "nan": "nan",
    }  # fmt: skip
    assert run.argv[0] == "train.py" and run.argv[5:7] == ["--lr", "0.1"]


def test_stop_is_asked_for(tmp_path: Path) -> None:
    with smdbg.Hook(tmp_path / "run") as hook:
        assert hook.should_stop is False
        wish = {"run_id": smdbg.open_run(tmp_path / "run").run_id, "reason": "rule"}
        (tmp_path / "run/control/stop.json").write_text(json.dumps(wish))
        deadline = time.monotonic() + 6
        while not hook.should_stop and time.monotonic() < deadline:
            time.sleep(0.05)
        assert hook.should_stop is True


# --- how a process ends ---

BODY = """
import os, signal, sys, smdbg
hook = smdbg.Hook(sys.argv[1])
for i in range(5):
    hook.save_scalar("x", i)
    hook.end_step()
hook.save_scalar("x", 5)  # this step is still open
"""


@pytest.mark.parametrize(
    ("end", "status", "code"),
    [
        ("", "completed", 0),
        ("raise ValueError('too\\nbad')", "failed: ValueError: too", 1),
        ("raise KeyboardInterrupt", "failed: KeyboardInterrupt", -signal.SIGINT),
        ("os.kill(os.getpid(), signal.SIGTERM); signal.pause()", "failed: SIGTERM", -signal.SIGTERM),
        (
            "hook.close()\nsignal.signal(signal.SIGTERM, lambda *a: sys.exit(3))\n"
            "hook = smdbg.Hook(sys.argv[1], resume=True)\nos.kill(os.getpid(), signal.SIGTERM)",
            "failed: SIGTERM",
            3,
        ),
        ("del hook; import gc; gc.collect()", "completed", 0),
        (
            "pid = os.fork()\nhook.save_scalar('y', 1); hook.end_step(); hook.flush()\n"
            "if pid == 0: hook.close(); sys.exit(0)\nos.waitpid(pid, 0)",
            "completed",
            0,
        ),
        (
            "import multiprocessing as m\ndef f(n): hook.save_scalar(n, 1); hook.end_step()\n"
            "with m.get_context('fork').Pool(2) as p: p.map(f, ['a', 'b'])",
            "completed",
            0,
        ),
    ],
)  # fmt: skip
def test_endings(tmp_path: Path, end: str, status: str, code: int) -> None:
    env = {k: v for k, v in os.environ.items() if k != "SMDBG_DISABLE"}
    script = tmp_path / "train.py"
    script.write_text(BODY + end)
    start = time.monotonic()
    done = subprocess.run([sys.executable, script, tmp_path / "run"], stderr=subprocess.PIPE, env=env, timeout=60)
    assert done.returncode == code, done.stderr.decode()
    assert time.monotonic() - start < 20
    run = smdbg.open_run(tmp_path / "run")
    assert run.status == status and run.tensor("x").values().tolist() == list(range(6))
    assert run.tensors() == (["x", "y"] if "fork()" in end else ["x"])
    assert len(run.attempts()) == (2 if "resume" in end else 1)
    if "y" in run.tensors():
        assert run.tensor("y").steps().tolist() == [5]
