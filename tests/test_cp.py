"""Copying runs: byte by byte, whole or not at all, whatever comes in between."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg import CollectionConfig, SaveConfig
from smdbg.analysis.run import list_runs
from smdbg.cli import run as cli
from smdbg.cli.exits import Exit
from smdbg.errors import BadSelection, DamagedData, NotARun, RunExists, RunNotFound, StoreError
from smdbg.select import StepList
from smdbg.store.backend import LocalBackend
from smdbg.store.copy import Copied, copy_run
from smdbg.store.keys import parse_key
from smdbg.store.prune import Choice, Prune


def _helpers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("runs_to_keep", Path(__file__).parent / "runs_to_keep.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


kept = _helpers()


def copy(source: Any, target: Any, **options: Any) -> Copied:
    return copy_run(LocalBackend(str(source)), LocalBackend(str(target)), **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody changes: two attempts, a check."""
    url = tmp_path_factory.mktemp("runs") / "mine"
    kept.write_run(url)
    kept.write_run(url, 3, wide=False, resume=True)
    (url / "checks").joinpath("c1.json").write_text('{"verdict": "fine"}')
    return url


def test_every_byte_and_nothing_else(source: Path, tmp_path: Path) -> None:
    run = shutil.copytree(source, tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    (run / "workers" / "00000" / "short" / "c").mkdir()
    (run / "workers" / "00000" / "short" / "c" / "0").write_text("stray")
    (run / "control" / "stop.json").write_text(json.dumps({"run_id": smdbg.open_run(run).run_id}))
    for orphan in ("float64/c/9/0", "float64/c/0/9", "stats/c/9/0/0", "step/c/9"):
        path = run / "workers" / "00000" / "short" / orphan
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("not committed")
    done = copy(run, tmp_path / "copy")
    assert kept.files(tmp_path / "copy") == kept.files(source)
    assert (done.objects, done.present, done.left_out) == (len(kept.files(source)), 0, 2)
    assert done.size == sum(map(len, kept.files(source).values()))
    kept.assert_same(kept.held(tmp_path / "copy"), kept.held(source))
    again = copy(run, tmp_path / "copy")
    assert (again.objects, again.size, again.present) == (0, 0, len(kept.files(source)))


def test_interrupted_at_every_change(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    source = tmp_path_factory.mktemp("runs") / "small"
    kept.write_run(source, 2, wide=False)
    whole = kept.files(source)
    for call in range(1, 10_000):
        target = tmp_path / str(call)
        broken = kept.BreaksAt(target, call)
        try:
            copy_run(LocalBackend(str(source)), broken)
            break
        except KeyboardInterrupt:
            pass
        if "zarr.json" in kept.files(target):
            assert whole.items() <= kept.files(target).items()
        else:
            with pytest.raises((RunNotFound, NotARun)):
                smdbg.open_run(target)
        assert list_runs(tmp_path) in ([], [str(target)])
        before = {name for name in kept.files(target) if name != "unfinished.json"}
        done = copy(source, target)
        assert done.present == len(before) and kept.files(target) == whole
        shutil.rmtree(target)
    assert call == len(whole) + 3, "the note, every object, the note's removal, and one that is not reached"


def test_what_is_half_there_and_no_longer_the_same_is_sent_again(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    with pytest.raises(KeyboardInterrupt):
        copy_run(LocalBackend(str(source)), kept.BreaksAt(target, 20))
    changed = [name for name in kept.files(target) if "/c/" in name][0]
    data = bytearray((target / changed).read_bytes())
    data[0] ^= 1
    (target / changed).write_bytes(data)
    (target / "workers" / "00007").mkdir()
    shutil.copy(source / "workers" / "00000" / "zarr.json", target / "workers" / "00007" / "zarr.json")
    copy(source, target)
    assert kept.files(target) == kept.files(source)


def test_another_run_is_never_mixed_in(source: Path, tmp_path: Path) -> None:
    kept.write_run(tmp_path / "other", 1)
    before = kept.files(tmp_path / "other")
    with pytest.raises(RunExists, match="a run exists: copy to another URL"):
        copy(source, tmp_path / "other")
    assert kept.files(tmp_path / "other") == before
    with pytest.raises(KeyboardInterrupt):
        copy_run(LocalBackend(str(tmp_path / "other")), kept.BreaksAt(tmp_path / "half", 5))
    before = kept.files(tmp_path / "half")
    with pytest.raises(RunExists, match="unfinished copy of another run"):
        copy(source, tmp_path / "half")
    assert kept.files(tmp_path / "half") == before
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(NotARun, match="name a place for the copy itself"):
        copy(source, tmp_path / "home")
    assert kept.files(tmp_path / "home") == {"thesis.tex": b"x"}
    with pytest.raises(NotARun):
        copy(tmp_path / "home", tmp_path / "nowhere")
    with pytest.raises(RunNotFound):
        copy(tmp_path / "no", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_whole_run_only_gets_attempts_and_checks(source: Path, tmp_path: Path) -> None:
    run, target = shutil.copytree(source, tmp_path / "run"), tmp_path / "copy"
    shutil.rmtree(run / "workers" / "00000.1")
    copy(run, target)
    shutil.copytree(source / "workers" / "00000.1", run / "workers" / "00000.1")
    (run / "checks" / "c2.json").write_text("{}")
    done = copy(run, target)
    assert kept.files(target) == kept.files(run) and done.present == len(kept.files(run)) - done.objects
    path = target / "workers" / "00000" / "zarr.json"
    path.write_bytes(path.read_bytes() + b" ")
    before = kept.files(target)
    with pytest.raises(RunExists, match="another state of this run"):
        copy(run, target)
    assert kept.files(target) == before


def test_a_flipped_bit_is_not_copied(source: Path, tmp_path: Path) -> None:
    """Of any object that has a checksum; the copy is then none, and goes on when the object is whole again."""
    rng = np.random.default_rng(0)
    names = [n for n in kept.files(source) if n.startswith("workers/0") and (n.count("/") == 2 or "/c/" in n)]
    assert len(names) > 10
    run = shutil.copytree(source, tmp_path / "run")
    for name in names:
        good = (run / name).read_bytes()
        bad = bytearray(good)
        at = int(rng.integers(len(bad))) if "/c/" in name else good.index(b'"catalogue"') + 3
        bad[at] ^= 1 << int(rng.integers(8))
        (run / name).write_bytes(bad)
        with pytest.raises((DamagedData, StoreError)):
            copy(run, tmp_path / "copy")
        with pytest.raises((NotARun, RunNotFound)):
            smdbg.open_run(tmp_path / "copy")
        (run / name).write_bytes(good)
    for cut in (0, 5):
        name = next(n for n in names if "/long/" in n)
        good = (run / name).read_bytes()
        (run / name).write_bytes(good[:cut])
        with pytest.raises(DamagedData, match=r"long/float32/c.*smdbg verify"):
            copy(run, tmp_path / "copy")
        (run / name).write_bytes(good)
    copy(run, tmp_path / "copy")
    assert kept.files(tmp_path / "copy") == kept.files(source)


def test_a_run_that_lacks_something_is_not_copied(source: Path, tmp_path: Path) -> None:
    """Nor is it said of a whole target that all is well."""
    copy(source, tmp_path / "copy")
    (other := tmp_path / "other").mkdir()
    for lost in (
        "workers/00000.1/zarr.json",
        "workers/00000/zarr.json",
        "workers/00000/short/stats/c/0/0/0",
        "workers/00000/short/step/c/0",
        "workers/00000/long/float32/c/1/0",
        "workers/00000/tight/float32/zarr.json",
        "checks/zarr.json",
    ):
        run = Path(shutil.copytree(source, tmp_path / "run", dirs_exist_ok=True))
        (run / lost).unlink()
        for target in (other, tmp_path / "copy"):
            with pytest.raises(DamagedData, match="not copied.*smdbg verify"):
                copy(run, target)
        assert not kept.files(other)
    run = Path(shutil.copytree(source, tmp_path / "run", dirs_exist_ok=True))
    root = json.loads((run / "zarr.json").read_text())
    root["attributes"]["smdbg"]["crc32c"] ^= 1
    (run / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(DamagedData, match="zarr.json"):
        copy(run, other)


def test_only_what_the_log_lists_is_copied(tmp_path: Path) -> None:
    """A writer that is ahead of its log: what it put is left, and what the log lists is whole."""
    run = tmp_path / "run"
    each = [CollectionConfig("w", save_config=SaveConfig(save_interval=1), reduction_config=kept.RAW)]
    with smdbg.Hook(run, collections=each) as hook:
        for step in range(4):
            hook.save_tensor("wide", np.full(1 << 20, step, "float32"), "w")
            hook.end_step()
    truth = kept.held(run)
    Prune(LocalBackend(str(run)), Choice(("w",), StepList((3,)))).carry_out()
    ahead = run / "workers/00000/w/float32/c/3/0"
    ahead.parent.mkdir(exist_ok=True)
    shutil.copy(run / "workers/00000/w/float32/c/2/0", ahead)
    copy(run, tmp_path / "copy", incomplete=True)
    assert not (tmp_path / "copy" / ahead.relative_to(run)).exists()
    kept.assert_same(kept.held(tmp_path / "copy"), truth | {("wide", 3): None})


def test_a_run_that_is_written(tmp_path: Path) -> None:
    hook = smdbg.Hook(tmp_path / "run", collections=["losses"])
    for step in range(5):
        hook.save_scalar("loss", step, "losses")
        hook.end_step()
    assert hook.flush()
    with pytest.raises(BadSelection, match="still being written.*--allow-incomplete"):
        copy(tmp_path / "run", tmp_path / "copy")
    copy(tmp_path / "run", tmp_path / "copy", incomplete=True)
    hook.save_scalar("loss", 5, "losses")
    hook.close()
    run = smdbg.open_run(tmp_path / "copy")
    assert run.tensor("loss").values().tolist() == [0, 1, 2, 3, 4] and run.status == "running"
    with pytest.raises(RunExists, match="another state"):
        copy(tmp_path / "run", tmp_path / "copy")


def test_a_run_that_grows_all_the_while(tmp_path: Path) -> None:
    import threading

    stop = threading.Event()
    hook = smdbg.Hook(tmp_path / "run", collections=["losses"])

    def train() -> None:
        step = 0
        while not stop.is_set():
            hook.save_tensor("x", np.full(50, step), "losses")
            hook.end_step()
            step += 1
            if step % 20 == 0:
                hook.flush()
            time.sleep(0.002)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        while not smdbg.open_run(tmp_path / "run").steps().size:
            time.sleep(0.01)
        for number in range(5):
            copy(tmp_path / "run", tmp_path / str(number), incomplete=True)
            found = smdbg.open_run(tmp_path / str(number)).tensor("x")
            assert (np.asarray(found.values())[:, 7] == found.steps()).all() and found.steps().size
    finally:
        stop.set()
        thread.join()
        hook.close()


def test_a_source_that_is_pruned_meanwhile(source: Path, tmp_path: Path) -> None:
    """Values that go while they are copied: no copy then says that they are there."""
    run = shutil.copytree(source, tmp_path / "run")

    class Meanwhile(LocalBackend):
        def create(self, key: str, data: Any) -> bool:
            if key == "unfinished.json":
                Prune(LocalBackend(str(run)), Choice(("short",))).carry_out()
            return super().create(key, data)

    with pytest.raises(StoreError, match="copy it again"):
        copy_run(LocalBackend(str(run)), Meanwhile(str(tmp_path / "copy")))
    copy(run, tmp_path / "copy")
    assert kept.files(tmp_path / "copy") == kept.files(run)


@pytest.mark.parametrize(
    "key",
    [
        "../zarr.json",
        "workers/../../x/zarr.json",
        "/etc/passwd",
        "workers/00000/../zarr.json",
        "workers/00000/a\\b/zarr.json",
        "workers/00000/a\0/zarr.json",
        "workers/00000/short/float32/c/0/../0",
        "workers/00000/short/float32/c/00/0",
        "workers/00000/short/float32/c/-1/0",
        "workers/00000/short/float32/c/0/0\n",
        "workers/00000/short/evil/c/0/0",
        "workers/00000/short/float32/c",
        "workers/٠٠٠٠٠/zarr.json",
        "workers/0/zarr.json",
        "checks/../a.json",
        "checks/.json",
        "checks/a/b.json",
        "workers/00000/steps/float32/zarr.json",
        "workers//zarr.json",
        "zarr.json/",
        "",
    ],
)
def test_keys_that_no_writer_makes(key: str) -> None:
    assert parse_key(key) is None


def test_keys_that_a_writer_makes(source: Path) -> None:
    assert all(parse_key(name) for name in kept.files(source))


# --- the command ---


def test_the_command(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli(["cp", str(source), "copy", "--format", "jsonl"]) is Exit.CLEAN
    record = json.loads(capsys.readouterr().out)
    assert record["objects"] == len(kept.files(source)) and record["present"] == record["left_out"] == 0
    assert list(record) == ["version", *"source target run_id objects bytes present left_out seconds".split()]
    assert cli(["cp", str(source), "copy", "--format", "table"]) is Exit.CLEAN
    printed = capsys.readouterr()
    assert "0 objects, 0 B" in printed.out and "were there already" in printed.out and printed.err == ""
    for empty in (["", "copy"], ["copy", " "]):
        assert cli(["cp", *empty]) is Exit.ERROR
        assert "one of them is empty" in capsys.readouterr().err
    assert cli(["cp", "copy", "copy/inside"]) is Exit.ERROR
    assert "lie in each other" in capsys.readouterr().err
    kept.write_run("other", 1)
    assert cli(["cp", str(source), "other"]) is Exit.ERROR
    assert "a run exists" in capsys.readouterr().err


def test_the_command_is_interrupted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "copy"
    broken = kept.BreaksAt(target, 9)
    opened = iter([LocalBackend(str(source)), broken])
    monkeypatch.setattr("smdbg.store.backend.open_backend", lambda *_: next(opened))
    assert cli(["cp", str(source), str(target)]) is Exit.INTERRUPTED
    assert "The same command goes on" in capsys.readouterr().err
