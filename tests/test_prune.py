"""Pruning: what goes is gone, all else is as it was, whatever comes in between."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.analysis.run import list_runs
from smdbg.cli import run as cli
from smdbg.cli.exits import Exit
from smdbg.errors import BadSelection, DamagedData, NotARun, OnlyStatistics, RunNotFound
from smdbg.select import StepList, StepRange
from smdbg.store.backend import LocalBackend
from smdbg.store.prune import Choice, Prune, Pruned


def _helpers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("runs_to_keep", Path(__file__).parent / "runs_to_keep.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


kept = _helpers()
SHORT = ("a", "rows", "grows")


def prune(url: Path, *collections: str, **choice: Any) -> list[Pruned]:
    plan = Prune(LocalBackend(str(url)), Choice(collections, **choice))
    before = kept.files(url)
    planned = plan.planned()
    assert kept.files(url) == before, "looking changes nothing"
    done = plan.carry_out()
    assert [(p.objects, p.steps) for p in planned] == [(d.objects, d.steps) for d in done]
    freed = sum(map(len, before.values())) - sum(map(len, kept.files(url).values()))
    told = sum(one.size for one in done)
    assert abs(freed - told) < 20_000, "but for the note in the worker's zarr.json, what was told is what was freed"
    return done


def without_values(truth: Any, names: tuple[str, ...], steps: Any = None) -> Any:
    return {k: None if k[0] in names and (steps is None or k[1] in steps) else v for k, v in truth.items()}


def without(truth: Any, names: tuple[str, ...]) -> Any:
    return {key: value for key, value in truth.items() if key[0].split(" of ")[-1] not in names}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody changes, of two attempts."""
    url = tmp_path_factory.mktemp("runs") / "mine"
    kept.write_run(url)
    kept.write_run(url, 3, wide=False, resume=True)
    return url


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_values_of_a_collection(run: Path) -> None:
    truth = kept.held(run)
    (long,) = prune(run, "long")
    assert (long.collection, long.what, long.steps, long.objects, long.shared) == ("long", "values", 2, 2, 0)
    assert long.size > 2 * (4 << 20) and not list((run / "workers/00000/long/float32/c").glob("**/0"))
    kept.assert_same(kept.held(run), without_values(truth, ("big",)))
    (short,) = prune(run, "short")
    assert short.steps == 12 and short.shared == 0
    kept.assert_same(kept.held(run), without_values(truth, ("big", *SHORT)))
    assert prune(run, "short", "long") == []
    facts = json.loads((run / "workers" / "00000" / "zarr.json").read_text())["attributes"]["smdbg"]
    assert {name: about["what"] for name, about in facts["pruned"].items()} == {"long": "values", "short": "values"}
    assert not any("pending" in about for about in facts["pruned"].values())
    assert smdbg.open_run(run).status == "completed"


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("steps", [StepRange(2, 7), StepRange(None, None, 2), StepRange(5), StepList((0, 11, 4))])
def test_values_of_some_steps(run: Path, steps: Any, keep: bool) -> None:
    truth = kept.held(run)
    named = set(steps.apply(np.arange(12)).tolist())
    gone = set(range(12)) - named if keep else named
    prune(run, "short", "tight", steps=steps, keep=keep)
    kept.assert_same(kept.held(run), without_values(truth, (*SHORT, "t"), gone))


def test_a_reader_that_was_opened_before_never_gets_a_wrong_value(run: Path) -> None:
    truth, before = kept.held(run), kept.files(run)
    stale = smdbg.open_run(run, attempt="all")
    (short, tight) = prune(run, "short", "tight", steps=StepRange(0, 6))
    assert (short.objects, tight.objects) == (0, 0) and short.shared > 1 and tight.shared == 1
    assert short.size == tight.size == 0
    changed = {name for name, data in kept.files(run).items() if before[name] != data}
    assert changed == {"workers/00000/zarr.json", "workers/00000/steps/c/0/0"}, "no value is ever put again"
    kept.assert_same(kept.held(run), without_values(truth, (*SHORT, "t"), range(6)))
    assert cli(["verify", str(run), "--values"]) is Exit.CLEAN
    prune(run, "long", steps=StepList((1,)))
    for (name, step), value in truth.items():
        if value is not None and " of " not in name and (name, step) != ("big", 1):
            np.testing.assert_array_equal(stale.tensor(name).value(step), value, err_msg=str((name, step)))
    with pytest.raises(DamagedData):
        stale.tensor("big").value(1)
    # The last steps that an object is kept for take it with them.
    done = prune(run, "short", "tight", steps=StepRange(6, 12))
    assert [one.shared for one in done] == [0, 0] and all(one.objects and one.size for one in done)
    assert not list((run / "workers/00000/short/float64/c").rglob("0"))


def test_all_that_can_lose_values(run: Path) -> None:
    truth = kept.held(run)
    assert [one.collection for one in prune(run)] == ["short", "tight", "long"]
    kept.assert_same(kept.held(run), without_values(truth, (*SHORT, "t", "big")))


def test_whole_collections(run: Path) -> None:
    import zarr

    truth = kept.held(run)
    (done,) = prune(run, "losses", whole=True)
    assert done.what == "all" and done.steps == 12
    kept.assert_same(kept.held(run), without(truth, ("loss",)))
    prune(run, "short", whole=True)
    kept.assert_same(kept.held(run), without(truth, ("loss", *SHORT)))
    found = smdbg.open_run(run)
    assert found.collections() == ["tight", "long"] and found.status == "completed"
    assert not (run / "workers" / "00000" / "short").exists()
    assert sorted(zarr.open_group(run, mode="r")["workers/00000"].group_keys()) == ["long", "tight"]
    assert prune(run, "short", whole=True) == [], "known to have been there"


def test_what_cannot_be_asked_for(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BadSelection, match="no collection 'shrot'.*Did you mean short"):
        Prune(LocalBackend(str(run)), Choice(("shrot",)))
    with pytest.raises(BadSelection, match="single numbers.*--all"):
        Prune(LocalBackend(str(run)), Choice(("losses",)))
    with pytest.raises(BadSelection, match="No saved step"):
        Prune(LocalBackend(str(run)), Choice(("short",), StepRange(100)))
    with pytest.raises(RunNotFound):
        Prune(LocalBackend(str(tmp_path / "no")), Choice())


def test_a_run_that_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hook = smdbg.Hook(tmp_path / "runs" / "run", collections=["losses"])
    hook.save_scalar("loss", 1, "losses")
    hook.end_step()
    assert hook.flush()
    before = kept.files(tmp_path)
    with pytest.raises(BadSelection, match="still being written"):
        Prune(LocalBackend(str(tmp_path / "runs" / "run")), Choice(("losses",), whole=True))
    assert cli(["prune", str(tmp_path / "runs"), "--older-than", "0s", "--yes"]) is Exit.CLEAN
    assert kept.files(tmp_path) == before
    assert "nothing to prune. 1 run is still being written: left out" in capsys.readouterr().err
    hook.close()


def test_a_lost_run_stays_one(tmp_path: Path) -> None:
    """Putting its log again must not look like a sign of life."""
    url = tmp_path / "run"
    kept.write_run(url)
    path = url / "workers" / "00000" / "zarr.json"
    from smdbg.store.worker_group import with_checksum

    group = json.loads(path.read_text())
    group["attributes"]["smdbg"] = with_checksum({**group["attributes"]["smdbg"], "status": "running"})
    path.write_text(json.dumps(group))
    long_ago = time.time() - 1000
    for file in url.rglob("*"):
        os.utime(file, (long_ago, long_ago))
    assert smdbg.open_run(url).status == "lost"
    truth = kept.held(url)
    prune(url, "short")
    assert smdbg.open_run(url).status == "failed: lost"
    kept.assert_same(kept.held(url), without_values(truth, SHORT))
    assert prune(url, "long"), "at once: nobody takes it for a run that is being written"


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        (Choice(("short", "tight", "long"), StepRange(1, 5)), (*SHORT, "t", "big")),
        (Choice(("short",), whole=True), SHORT),
    ],
)
def test_interrupted_at_every_change(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, choice: Choice, names: Any
) -> None:
    source = tmp_path_factory.mktemp("runs") / "small"
    kept.write_run(source, 5)
    truth = kept.held(source)
    pruned = without(truth, names) if choice.whole else without_values(truth, names, (1, 2, 3, 4))
    expected = Path(shutil.copytree(source, tmp_path / "expected"))
    Prune(LocalBackend(str(expected)), choice).carry_out()
    kept.assert_same(kept.held(expected), pruned)
    for call in range(1, 10_000):
        url = Path(shutil.copytree(source, tmp_path / str(call)))
        try:
            Prune(kept.BreaksAt(url, call), choice).carry_out()
            break
        except KeyboardInterrupt:
            pass
        assert smdbg.open_run(url).status == "completed"
        for key, value in kept.held(url).items():
            if value is not None:
                np.testing.assert_array_equal(value, truth[key], err_msg=str(key))
        assert set(pruned) <= set(kept.held(url))
        assert cli(["verify", str(url)]) is Exit.CLEAN, "what is left over is no damage"
        # Even somebody who asks for something else finishes what was begun.
        other = Prune(LocalBackend(str(url)), Choice(("short",), StepList((2,))) if call % 2 else choice)
        other.carry_out()
        Prune(LocalBackend(str(url)), choice).carry_out()
        kept.assert_same(kept.held(url), pruned)
        assert set(kept.files(url)) == set(kept.files(expected))
        assert Prune(LocalBackend(str(url)), choice).planned() == []
        shutil.rmtree(url)
    assert call > 5


# --- whole runs ---


def age(url: Path, days: float) -> None:
    for file in url.rglob("*"):
        os.utime(file, (time.time() - days * 86_400,) * 2)


def test_deleting_a_run_interrupted_at_every_change(tmp_path: Path) -> None:
    from smdbg.store.delete import delete_run, found_runs

    root = tmp_path / "runs"
    kept.write_run(tmp_path / "source", 1, wide=False)
    for call in range(1, 10_000):
        url = Path(shutil.copytree(tmp_path / "source", root / "run"))
        ((found, _),) = found_runs(str(root))
        assert found.status == "completed" and found.objects == len(kept.files(url))
        try:
            delete_run(kept.BreaksAt(url, call), found)
            break
        except KeyboardInterrupt:
            pass
        if (url / "zarr.json").exists():
            assert smdbg.open_run(url).status == "completed" and len(kept.held(url)) > 5
        else:
            with pytest.raises((NotARun, RunNotFound)):
                smdbg.open_run(url)
            assert list_runs(root) == []
        for found, backend in found_runs(str(root)):
            delete_run(backend, found)
        assert not url.exists()
        shutil.rmtree(root, ignore_errors=True)
    assert call > 10


def test_old_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("old", "young", "mine"):
        kept.write_run(Path("runs") / name, 1, wide=False)
    for name in ("old", "mine"):
        age(Path("runs") / name, 40)
    (Path("runs") / "mine" / "notes.txt").write_text("keep")
    (Path("runs") / "data").mkdir()
    (Path("runs") / "data" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    age(Path("runs") / "data", 400)
    before = kept.files(Path("runs"))
    assert cli(["prune", "runs", "--older-than", "30d", "--format", "jsonl"]) is Exit.CLEAN
    shown = capsys.readouterr()
    records = [json.loads(text) for text in shown.out.splitlines()]
    assert [(r["run"], r["what"], r["deleted"]) for r in records] == [
        ("runs/mine", "run", False),
        ("runs/old", "run", False),
    ]
    assert "Nothing was changed" in shown.err and kept.files(Path("runs")) == before
    assert cli(["prune", "runs", "--older-than", "30d", "--yes"]) is Exit.CLEAN
    assert "freed" in capsys.readouterr().err
    left = {name for name in kept.files(Path("runs")) if not name.startswith("young/")}
    assert left == {"mine/notes.txt", "data/zarr.json"} and not Path("runs/old").exists()
    assert len(kept.held("runs/young")) > 5
    assert cli(["prune", "runs", "--older-than", "30d"]) is Exit.CLEAN
    assert "nothing to prune" in capsys.readouterr().err


def test_values_in_old_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("old", "young"):
        kept.write_run(Path("runs") / name, 2, wide=False)
    age(Path("runs/old"), 40)
    truth, young = kept.held("runs/old"), kept.files(Path("runs/young"))
    assert cli(["prune", "runs", "--older-than", "30d", "--collection", "short", "--yes"]) is Exit.CLEAN
    kept.assert_same(kept.held("runs/old"), without_values(truth, SHORT))
    assert kept.files(Path("runs/young")) == young


def test_the_remains_of_a_copy_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smdbg.store.copy import copy_run

    monkeypatch.chdir(tmp_path)
    kept.write_run("source", 1, wide=False)
    with pytest.raises(KeyboardInterrupt):
        copy_run(LocalBackend("source"), kept.BreaksAt("runs/half", 9))
    assert cli(["prune", "runs", "--older-than", "1h", "--yes"]) is Exit.CLEAN
    assert Path("runs/half").exists(), "somebody may be at it"
    age(Path("runs/half"), 1)
    assert cli(["prune", "runs", "--older-than", "1h", "--yes"]) is Exit.CLEAN
    assert not Path("runs/half").exists()


# --- the command ---


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = kept.files(run)
    assert cli(["prune", str(run), "--collection", "long,short"]) is Exit.CLEAN
    shown = capsys.readouterr()
    assert [line.split("\t")[1:4] for line in shown.out.splitlines()] == [
        ["short", "values", "12"],
        ["long", "values", "2"],
    ]
    assert kept.files(run) == before and "--yes does it" in shown.err
    narrow = ["-r", str(run), "prune", "--collection", "short", "--steps", "3:5", "--format", "table"]
    assert cli(narrow) is Exit.CLEAN
    assert "Nothing can be freed: all lie in " in capsys.readouterr().err
    assert cli(["-r", str(run), "prune", "--steps", "3:5", "--yes", "--format", "table"]) is Exit.CLEAN
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0].split() == ["collection", "what", "steps", "objects", "shared", "bytes"]
    assert "Deleted 1 object; " in shown.err and " that hold values of kept steps too stay" in shown.err
    assert cli([*narrow[:-3], "5:6", "--yes"]) is Exit.CLEAN
    shown = capsys.readouterr()
    assert "Nothing was freed: all lie in " in shown.err and "Deleted" not in shown.err


def test_what_was_pruned_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prune(run, "long")
    with pytest.raises(OnlyStatistics, match="Some values of 'long' were taken out"):
        smdbg.open_run(run, attempt="all").tensor("big").value(1)
    assert cli(["runs", str(run), "--format", "jsonl"]) is Exit.CLEAN
    told = {one["name"]: one["pruned"] for one in json.loads(capsys.readouterr().out)["collections"]}
    assert told.pop("long").endswith("Z") and set(told.values()) == {None}
    assert cli(["runs", str(run), "--format", "table"]) is Exit.CLEAN
    assert "values pruned" in capsys.readouterr().out


def test_interrupted_commands_say_where_they_are(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = kept.BreaksAt(run, 2)
    monkeypatch.setattr("smdbg.store.backend.open_backend", lambda *_: broken)
    monkeypatch.setattr("smdbg.store.delete.open_backend", lambda *_: broken)
    assert cli(["prune", str(run), "--collection", "short", "--yes"]) is Exit.INTERRUPTED
    said = capsys.readouterr().err
    assert "is whole and can be read" in said and "The same command goes on" in said
    broken.calls = 0
    assert cli(["prune", str(run), "--older-than", "0s", "--collection", "short", "--yes"]) is Exit.INTERRUPTED
    assert "is whole" in (said := capsys.readouterr().err) and "--older-than 0s" in said
    assert "short" in smdbg.open_run(run).collections()
    age(run, 40)
    broken.calls = 0
    command = ["prune", str(run), "--older-than", "30d", "--yes"]
    assert cli(command) is Exit.INTERRUPTED
    said = capsys.readouterr().err
    assert "half deleted and no run any more. The same command goes on." in said and "Deleted" not in said
    assert (run / "zarr.json").exists() and (run / "unfinished.json").exists()
    broken.calls = -10_000
    assert cli(command) is Exit.CLEAN and not run.exists(), "the note of it has not made it young"


def test_an_interruption_tells_which_runs_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from smdbg.store import delete

    for name in ("one", "two"):
        kept.write_run(tmp_path / name, 1, wide=False)
    found = list(delete.found_runs(str(tmp_path)))

    def runs(*_: Any) -> Any:
        yield found[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(delete, "found_runs", runs)
    assert cli(["prune", str(tmp_path), "--older-than", "0s", "--yes"]) is Exit.INTERRUPTED
    said = capsys.readouterr().err
    assert "No run is half done. The same command goes on. Done before that: 1 run." in said
    assert cli(["prune", str(tmp_path), "--older-than", "0s"]) is Exit.INTERRUPTED
    assert "half done" not in capsys.readouterr().err, "nothing is changed"


def test_a_collection_that_no_run_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        kept.write_run(tmp_path / name, 1, wide=False)
    command = ["prune", str(tmp_path), "--older-than", "0s", "--collection"]
    assert cli([*command, "nosuch"]) is Exit.ERROR
    assert "none of its runs could be pruned" in " ".join(capsys.readouterr().err.split())
    prune(tmp_path / "one", "short", whole=True)
    with smdbg.Hook(tmp_path / "three") as hook:
        hook.save_scalar("loss", 1, "losses")
        hook.end_step()
    assert cli([*command, "short"]) is Exit.CLEAN, "some have it"
    assert "no collection 'short'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "nothing is guessed"),
        (["RUN"], "Say what is to go"),
        (["RUN", "--all"], "--all needs --collection"),
        (["RUN", "--all", "--collection", "short", "--steps", "3"], "--all takes out whole collections"),
        (["RUN", "--steps", "3", "--keep-steps", "3"], "exclude each other"),
        (["RUN", "--older-than", "soon"], "is no age"),
        (["RUN", "--collection", "losses"], "single numbers"),
        (["ROOT", "--collection", "short"], "give --older-than"),
        (["ROOT/none", "--older-than", "3d"], "there is no run"),
    ],
)
def test_what_the_command_refuses(run: Path, given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = kept.files(run)
    words = [word.replace("RUN", str(run)).replace("ROOT", str(run.parent)) for word in given]
    assert cli(["prune", *words]) is Exit.ERROR
    assert said in " ".join(capsys.readouterr().err.split())
    assert kept.files(run) == before


def test_steps_of_a_removed_collection_alone_are_no_steps_any_more(tmp_path: Path) -> None:
    url = tmp_path / "run"
    with smdbg.Hook(url) as hook:
        for step in range(6):
            hook.save_scalar("loss" if step % 2 else "accuracy", step, "losses" if step % 2 else "metrics")
            hook.end_step()
    assert cli(["prune", str(url), "--collection", "metrics", "--all", "--yes"]) == Exit.CLEAN
    assert smdbg.open_run(url).steps().tolist() == [1, 3, 5]
    assert smdbg.open_run(url).tensor("loss").values().tolist() == [1, 3, 5]
