"""`smdbg verify`: a flipped bit, a cut or a deletion anywhere is found and named; repair deletes orphans alone."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg.cli import run as command_line
from smdbg.errors import BadSelection, NotARun, RunNotFound
from smdbg.store import verify_repair, verify_root
from smdbg.store.backend import Listed, LocalBackend, open_backend
from smdbg.store.verify import verify
from smdbg.store.verify_report import Report
from smdbg.store.verify_values import verify_values
from smdbg.store.worker_group import with_checksum

STEPS = 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every kind of array, and a second attempt of its worker."""
    path = tmp_path_factory.mktemp("verify") / "run"
    rng = np.random.default_rng(0)
    compressed = {"packed": "zstd", "lz": "lz4"}
    collections = [smdbg.CollectionConfig(name, compression=codec) for name, codec in compressed.items()]
    with smdbg.Hook(path) as hook:
        hook.save_scalar("loss", 1.0, "losses")
        hook.end_step()
    with smdbg.Hook(path, collections=collections, resume=True) as hook:
        for step in range(STEPS):
            hook.save_tensor("w", rng.normal(size=(3, 4)).astype("float32"))
            hook.save_tensor("grows", np.ones(2 + step))
            hook.save_tensor("text", np.array(["a", "bc" * (step + 1)]))
            hook.save_tensor("packed/x", np.round(rng.normal(size=(40, 50))), "packed")
            hook.save_tensor("lz/x", np.arange(2000) + step, "lz")
            if step < 2:
                hook.save_tensor("big", rng.normal(size=550_000), "wide")
            hook.save_scalar("loss", float(step), "losses")
            hook.end_step()
    return path


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def check(path: Path, **options: Any) -> Report:
    return verify(open_backend(path), **options)


def keys(path: Path) -> list[str]:
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def named(report: Report) -> set[str]:
    return {one.object for one in report.damage}


def test_a_whole_run_is_clean(whole: Path) -> None:
    report = check(whole)
    assert report.damage == [] and report.orphans == [] and report.unchecked == []
    run = smdbg.open_run(whole, attempt="all")
    assert report.objects == len(keys(whole)) and report.run_id == run.run_id
    run = smdbg.open_run(whole, attempt="all")
    counts = [len(run.tensor(name).value_steps()) for name in run.tensors()]
    assert report.values == sum(counts) > 6 * STEPS - 10
    kinds = {path.split("/")[-1] for path in keys(whole)}
    assert "zarr.json" in kinds and any("wide/float64/c/1/0" in key for key in keys(whole))
    assert any("layout/c" in key for key in keys(whole))
    assert verify_values(open_backend(whole), report) > 0 and report.damage == []


def test_a_flipped_bit_anywhere_is_found(whole: Path, run: Path) -> None:
    rng = random.Random(7)
    for key in keys(run):
        data = (run / key).read_bytes()
        # Often at the start and the end, where headers and indexes lie; and anywhere.
        ends = [0, rng.randrange(max(1, len(data) * 8 - 800), len(data) * 8)]
        for bit in (*ends, *(rng.randrange(len(data) * 8) for _ in range(2 if len(data) < 1 << 20 else 0))):
            bad = bytearray(data)
            bad[bit // 8] ^= 1 << bit % 8
            (run / key).write_bytes(bad)
            report = check(run)
            assert key in named(report), (key, bit)
            # Of two copies of metadata that both make sense, it cannot be told which is right.
            assert len(named(report)) == 1 or (key.endswith("zarr.json") and len(named(report)) == 2), (key, bit)
        (run / key).write_bytes(data)
    assert check(run).damage == []


def test_every_bit_of_the_metadata(run: Path) -> None:
    rng = random.Random(3)
    for key in ("zarr.json", "control/zarr.json", "workers/00000.1/zarr.json", "workers/00000.1/wide/step/zarr.json"):
        data = (run / key).read_bytes()
        bits = range(len(data) * 8)
        for bit in rng.sample(bits, 25):
            bad = bytearray(data)
            bad[bit // 8] ^= 1 << bit % 8
            (run / key).write_bytes(bad)
            assert key in named(check(run, quick=True)), (key, bit)
        (run / key).write_bytes(data)


@pytest.mark.parametrize("quick", [False, True])
def test_what_is_gone_or_cut_short_is_found(run: Path, quick: bool) -> None:
    rng = random.Random(5)
    for key in keys(run):
        data = (run / key).read_bytes()
        os.remove(run / key)
        assert not quick or key in named(check(run, quick=True)), key
        cuts = {rng.choice((len(data) - 1, rng.randrange(1, len(data))))}
        for size in sorted(cuts):
            (run / key).write_bytes(data[:size])
            compressed = "/packed/float" in key or "/lz/int" in key
            if not (quick and compressed):  # how long these should be is told by their index alone
                assert key in named(check(run, quick=quick)), (key, size)
        if not quick and rng.random() < 0.3:
            (run / key).write_bytes(data + b"\0")
            assert key in named(check(run)), key
        (run / key).write_bytes(data)


def test_it_says_which_values_are_lost(run: Path) -> None:
    file = run / "workers/00000.1/wide/float64/c/1/0"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    (one,) = check(run).damage
    assert (one.tensors, one.first_step, one.last_step, one.steps, one.values) == (("big",), 2, 2, 1, 1)
    assert one.worker == (0, 1) and "checksum" in one.what
    with pytest.raises(smdbg.errors.DamagedData):
        smdbg.open_run(run, attempt=1).tensor("big").value(2)
    assert smdbg.open_run(run, attempt=1).tensor("big").value(1).size == 550_000


def test_damage_to_an_index_alone_loses_nothing_that_is_not_compressed(run: Path) -> None:
    for key, lost in (("workers/00000.1/wide/float64/c/0/0", 0), ("workers/00000.1/packed/float64/c/0/0", STEPS)):
        data = bytearray((run / key).read_bytes())
        data[-10] ^= 1
        (run / key).write_bytes(data)
        found = [one for one in check(run).damage if one.object == key]
        assert [one.values for one in found] == [lost] and "index" in found[0].what


def test_a_lost_log_is_never_taken_for_orphans(run: Path) -> None:
    for key in ("workers/00000.1/zarr.json", "workers/00000.1/steps/c/0/0"):
        data = (run / key).read_bytes()
        for bad in (None, data[:-1]):
            os.remove(run / key) if bad is None else (run / key).write_bytes(bad)
            report = check(run)
            assert key in named(report) and not report.orphans
            assert verify_repair.repairable(report, force=True) == []
            (run / key).write_bytes(data)


def orphans(path: Path) -> dict[str, bool]:
    """Put what no commit refers to into a run: key -> whether repair deletes it."""
    wide = (path / "workers/00000.1/wide/float64/c/1/0").read_bytes()
    added = {
        "workers/00000.1/wide/float64/c/2/0": True,
        "workers/00000.1/wide/float64/c/1/1": True,
        "workers/00000.1/nothing/float32/c/0/0": True,
        "workers/00000.1/nothing/float32/zarr.json": True,
        f"workers/00000.1/wide/.zarr.json.{'0' * 32}.partial": True,
        "workers/00000.1/notes.txt": False,
        "workers/00000.1/wide/float64/c/2/0.bak": False,
        f"workers/00000.1/.secret.{'0' * 32}.partial": False,
        "README": False,
        "mine/float32/c/0/0": False,
        f"control/.zarr.json.{'0' * 32}.partial": False,  # too young: of no worker that is known to have ended
    }
    for key in added:
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        (path / key).write_bytes(wide[:100])
    return added


def test_repair_deletes_orphans_alone(whole: Path, run: Path) -> None:
    added = orphans(run)
    before = {key: (run / key).read_bytes() for key in keys(run)}
    report = check(run)
    assert report.damage == [] and {one.object for one in report.orphans} == set(added)
    assert command_line(["verify", str(run), "--repair", "--dry-run"]) == 0
    assert {key: (run / key).read_bytes() for key in keys(run)} == before
    for _ in range(2):
        assert command_line(["verify", str(run), "--repair"]) == 0
        kept = {key: data for key, data in before.items() if not added.get(key)}
        assert {key: (run / key).read_bytes() for key in keys(run)} == kept


def test_a_running_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hook = smdbg.Hook(tmp_path / "run")
    for step in range(3):
        hook.save_tensor("big", np.ones(600_000) * step)
        hook.end_step()
    hook.flush()
    (tmp_path / "run/workers/00000/tensors/float64/c/3").mkdir()
    (tmp_path / "run/workers/00000/tensors/float64/c/3/0").write_bytes(b"not committed yet")
    report = check(tmp_path / "run")
    assert report.damage == [] and len(report.orphans) == 1 and report.values == 3
    with pytest.raises(BadSelection):
        verify_repair.repairable(report)
    assert verify_repair.repairable(report, force=True) == []
    assert command_line(["verify", str(tmp_path / "run"), "--repair"]) == 2
    assert "still being written" in capfd.readouterr().err
    hook.close()


KILLED = """
import sys, time, numpy as np, smdbg
hook = smdbg.Hook(sys.argv[1])
for step in range(10**6):
    hook.save_tensor("big", np.ones(600_000) * step, "wide")
    hook.save_tensor("x", np.arange(5) + step)
    hook.end_step()
    if step == 3:
        hook.flush()
        print("go", flush=True)
"""


def test_a_killed_run_is_clean_and_can_be_repaired(tmp_path: Path) -> None:
    path = tmp_path / "run"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "go\n"
    time.sleep(0.3)
    child.send_signal(signal.SIGKILL)
    child.wait()
    report = check(path)
    assert report.damage == [] and report.values >= 8
    long_ago = time.time() - 3600
    for file in path.rglob("*"):
        os.utime(file, (long_ago, long_ago))
    assert command_line(["verify", str(path), "--repair"]) == 0
    again = check(path)
    assert again.damage == [] and again.orphans == [] and again.values == report.values


def test_statistics_of_other_values(run: Path) -> None:
    from smdbg.store.shard import with_crc

    file = run / "workers/00000.1/wide/float64/c/1/0"
    data = bytearray(file.read_bytes())
    size = json.loads((run / "workers/00000.1/wide/float64/zarr.json").read_text())
    chunk = size["codecs"][0]["configuration"]["chunk_shape"][1] * 8
    data[: chunk + 4] = with_crc(np.full(chunk // 8, 1e6).tobytes())
    file.write_bytes(data)
    report = check(run)
    assert report.damage == []
    verify_values(open_backend(run), report)
    (one,) = report.damage
    assert one.tensors == ("big",) and one.first_step == one.last_step == 2 and "statistics" in one.what


@pytest.mark.parametrize(
    "path, change",
    [
        ("wide/float64", lambda meta: meta.update(shape=[1 << 40, *meta["shape"][1:]])),
        ("wide/float64", lambda meta: meta["chunk_grid"]["configuration"].update(chunk_shape=[1 << 50, 1 << 40])),
        ("tensors/stats", lambda meta: meta["attributes"]["smdbg"].update(first_row=-1)),
        ("steps", lambda meta: meta.update(shape=[1 << 31, 10])),
        ("wide/float64", lambda meta: meta.clear()),
    ],
)
def test_metadata_that_lie(run: Path, path: str, change: Any) -> None:
    file = run / "workers/00000.1/zarr.json"
    group = json.loads(file.read_text())
    change(group["consolidated_metadata"]["metadata"][path])
    file.write_text(json.dumps(group, separators=(",", ":")))
    assert check(run).damage and command_line(["verify", str(run)]) == 1


def test_masks_and_versions_that_lie(run: Path) -> None:
    file = run / "workers/00000.1/zarr.json"
    group = json.loads(file.read_text())
    facts = group["attributes"]["smdbg"]
    group["attributes"]["smdbg"] = with_checksum({**facts, "catalogue_version": 0})
    file.write_text(json.dumps(group, separators=(",", ":")))
    assert any("newer catalogue" in one.what for one in check(run).damage)


def test_what_cannot_be_checked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunNotFound):
        check(tmp_path / "nothing")
    (tmp_path / "zarr.json").write_text("{}")
    with pytest.raises(NotARun):
        check(tmp_path)
    assert command_line(["verify", str(tmp_path)]) == 2
    assert command_line(["verify", str(tmp_path), "--force"]) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_the_command(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command_line(["verify", str(run), "--format", "jsonl"]) == 0
    (summary,) = map(json.loads, capfd.readouterr().out.splitlines())
    assert summary["version"] == 1 and summary["type"] == "summary" and summary["clean"] is True
    os.remove(run / "workers/00000.1/wide/float64/c/1/0")
    (run / "README").write_text("mine")
    assert command_line(["verify", str(run), "--format", "jsonl"]) == 1
    damage, orphan, summary = map(json.loads, capfd.readouterr().out.splitlines())
    assert damage["tensors"] == ["big"] and damage["first_step"] == 2 and summary["values_lost"] == 1
    assert orphan["type"] == "orphan" and orphan["object"] == "README"
    assert command_line(["verify", str(run), "--format", "table", "--worker", "0"]) == 1
    out = capfd.readouterr().out
    assert "wide/float64/c/1/0" in out and "1 of 6" not in out and "The rest is good." in out
    assert command_line(["verify", str(run), "--format", "tsv"]) == 1
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 2 and "damaged" in err
    assert command_line(["verify", str(run), "--worker", "7"]) == 2


def test_a_catalogue_that_says_too_much(tmp_path: Path) -> None:
    """Readers do not look for a tensor that is said to be in every row: so that must be true."""
    url = tmp_path / "run"
    with smdbg.Hook(url) as hook:
        for step in range(4):
            hook.save_tensor("always", np.zeros(3), "c")
            if step != 2:
                hook.save_tensor("mostly", np.zeros(3), "c")
            hook.end_step()
    path = url / "workers/00000/zarr.json"
    group = json.loads(path.read_text())
    facts = group["attributes"]["smdbg"]
    told = {entry["name"]: entry for entry in facts["catalogue"]}
    assert told["always"]["whole"] is True and "whole" not in told["mostly"]
    told["mostly"]["whole"] = True
    group["attributes"]["smdbg"] = with_checksum(facts)
    path.write_text(json.dumps(group, separators=(",", ":")))
    found = [one for one in verify(open_backend(url)).damage if "every row" in one.what]
    assert [(one.object, one.tensors, one.first_step, one.steps) for one in found] == [
        ("workers/00000/zarr.json", ("mostly",), 2, 1)
    ]


class Forgetful(LocalBackend):
    """A store whose listings leave out every third object."""

    def walk(self, prefix: str) -> Iterator[Listed]:
        """Walk, and leave out."""
        return (item for n, item in enumerate(super().walk(prefix)) if n % 3 or item.name.count("/") < 4)


@pytest.mark.parametrize("quick", [False, True])
def test_a_listing_that_leaves_out_what_is_there(run: Path, quick: bool) -> None:
    """Stores promise less of listings than of reads, so what a listing lacks is asked for before it is called lost."""
    assert len(list(Forgetful(str(run)).walk(""))) < len(list(LocalBackend(str(run)).walk("")))
    assert not verify(Forgetful(str(run)), quick=quick).damage


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run of three workers: of each, `w` in every step, `some` in two of five, and `b` apart."""
    path = tmp_path_factory.mktemp("verify") / "three"
    hooks = [smdbg.Hook(path, rank=rank, world_size=3) for rank in range(3)]
    for step in range(STEPS):
        for hook in hooks:
            hook.save_tensor("w", np.ones(7) * step)
            hook.save_tensor("b", np.ones(300_000), "wide")
            if step % 2:
                hook.save_tensor("some", np.ones(3))
            hook.end_step()
    for hook in hooks:
        hook.close()
    return path


@pytest.fixture
def multi(three: Path, tmp_path: Path) -> Path:
    shutil.copytree(three, tmp_path / "multi")
    return tmp_path / "multi"


def grow_old(path: Path, seconds: float = 120.0) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def summary_of(path: Path, capfd: pytest.CaptureFixture[str], *options: str) -> str:
    """Return what a person is told at the end."""
    capfd.readouterr()
    assert command_line(["verify", str(path), "--format", "table", *options]) == 1
    return capfd.readouterr().out.splitlines()[-1]


def test_a_worker_of_which_nothing_is_there(multi: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(multi / "workers/00001")
    report = check(multi)
    assert not report.damage and ["worker 1" in text for text in report.unchecked] == [True]  # it may be about to begin
    grow_old(multi / "zarr.json")
    (one,) = check(multi).damage
    assert (one.object, one.worker) == ("workers/00001/zarr.json", (1, 0)) and "nothing of it is here" in one.what
    assert check(multi, ranks=(0,)).damage == [] and named(check(multi, ranks=(1,))) == {one.object}
    assert command_line(["verify", str(multi), "--worker", "1"]) == 1
    assert command_line(["verify", str(multi), "--worker", "5"]) == 2
    said = summary_of(multi, capfd)
    assert "1 of 51 objects" in said and "damaged or missing" in said and "others are lost is not known" in said
    shutil.rmtree(multi / "workers")
    assert {f"workers/0000{rank}/zarr.json" for rank in range(3)} <= named(check(multi))
    assert "how many full values are lost is not known" in summary_of(multi, capfd)


def test_a_young_copy_of_an_old_run_is_not_being_begun(multi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(multi / "workers/00001")
    grow_old(multi / "zarr.json", -600)
    now = time.time() + 600
    monkeypatch.setattr(verify_root, "time", SimpleNamespace(time=lambda: now))
    assert named(check(multi)) == {"workers/00001/zarr.json"}


def test_how_many_values_are_lost_is_said_only_where_it_is_known(
    multi: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = check(multi)
    assert (kept.values, kept.unknown) == (36, False)
    (multi / "workers/00000/wide/stats/c/0/0/0").unlink()
    report = check(multi)
    assert (report.values, report.lines, report.values_lost, report.unknown) == (36, kept.lines, 0, False)
    assert "1 of 73 objects" in summary_of(multi, capfd)
    assert smdbg.open_run(multi).tensor("b").value(1).size == 300_000
    (multi / "workers/00000/tensors/stats/c/0/0/0").unlink()
    report = check(multi)
    assert (report.values, report.unknown) == (34, True)  # of `some`, nothing else tells where it is
    assert "of the 34 full values that could be counted, 0 cannot be read" in summary_of(multi, capfd)
    for key in ("steps/c/0/0", "zarr.json"):
        file = multi / "workers/00002" / key
        data = file.read_bytes()
        file.write_bytes(data[:-1])
        assert check(multi, ranks=(2,)).unknown
        assert "how many full values are lost is not known" in summary_of(multi, capfd, "--worker", "2")
        file.write_bytes(data)
    assert not check(multi, ranks=(2,)).unknown


def test_quickly_no_more_is_said_than_is_known(multi: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = multi / "workers/00000/wide/float64/c/1/0"
    file.write_bytes(file.read_bytes()[:-100])  # of its index alone, without which places can be computed
    full, quick = check(multi).values_lost, check(multi, quick=True).values_lost
    assert (full, quick) == (0, 1)
    assert f"; up to {quick} of 36" in summary_of(multi, capfd, "--quick")
    assert f"; {full} of 36" in summary_of(multi, capfd)


def test_quickly_steps_are_checked(multi: Path) -> None:
    file = multi / "workers/00000/wide/step/c/0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    assert named(check(multi, quick=True)) == {"workers/00000/wide/step/c/0"}


@pytest.mark.parametrize("doing, again", [("copy", "smdbg cp"), ("delete", "smdbg prune"), ("?", "smdbg cp")])
def test_half_a_copy(multi: Path, doing: str, again: str, capfd: pytest.CaptureFixture[str]) -> None:
    (multi / "zarr.json").unlink()
    (multi / "unfinished.json").write_text(json.dumps({"smdbg": 1, "run_id": "a", "doing": doing}))
    report = check(multi)
    assert report.damage[0].object == "zarr.json" and f"`{again}` " in report.damage[0].what
    assert command_line(["verify", str(multi), "--format", "tsv"]) == 1
    assert capfd.readouterr().err.startswith("This is an unfinished ")
    shutil.rmtree(multi / "workers")
    with pytest.raises(NotARun, match=again):
        check(multi)


def test_what_a_running_worker_is_writing(tmp_path: Path) -> None:
    hook = smdbg.Hook(tmp_path / "run")
    hook.save_tensor("x", np.ones(3), "c")
    hook.end_step()
    hook.flush()
    partial = tmp_path / f"run/workers/00000/c/.zarr.json.{'0' * 32}.partial"
    partial.write_text("{")
    assert [one.what for one in check(tmp_path / "run").orphans] == ["being written"]
    grow_old(partial, 700)
    assert [one.what for one in check(tmp_path / "run").orphans] == ["left by a writer that died"]
    grow_old(partial, 0)
    hook.close()
    assert [one.what for one in check(tmp_path / "run").orphans] == ["left by a writer that died"]


class Terminal(io.StringIO):
    """Text that says that it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


def test_in_a_narrow_terminal(multi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (multi / "workers/00000/wide/float64/c/3/0").unlink()
    (multi / "workers/00001/wide/stats/c/0/0/0").unlink()
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    for name, value in {"TERM": "xterm", "COLUMNS": "60", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    assert command_line(["verify", str(multi), "--format", "table"]) == 1
    lines = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue()).splitlines()
    assert lines[0].split() == ["damaged", "object", "worker", "steps"] and lines[2].endswith("1  0 – 4")
    assert max(map(len, lines)) <= 60 and lines[-1].endswith("The rest is good.")
    words = "2 of 73 objects damaged or missing; 1 of 36 full values cannot".split()
    assert set(words) <= {word for text in lines for word in text.split()}


def test_what_is_refused(multi: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for url in ("", "  "):
        assert command_line(["verify", url]) == 2 and "RUN is empty" in capfd.readouterr().err
    for value in ("0", "x"):
        monkeypatch.setenv("SMDBG_CONCURRENCY", value)
        assert command_line(["verify", str(multi)]) == 2 and "SMDBG_CONCURRENCY" in capfd.readouterr().err
    monkeypatch.setenv("SMDBG_CONCURRENCY", "2")
    assert command_line(["verify", str(multi)]) == 0


def test_words_of_a_json_reader_are_not_passed_on(multi: Path) -> None:
    for key in ("zarr.json", "control/zarr.json", "workers/00000/zarr.json", "workers/00001/wide/step/zarr.json"):
        (multi / key).write_text('{"a": ')
    (multi / "control/stop.json").write_bytes(b"\xff")
    found = check(multi).damage
    assert len(found) == 5
    for one in found:
        assert one.what.startswith("is no JSON"), one


def test_places_are_said_as_readers_say_them(multi: Path) -> None:
    file = multi / "workers/00000/wide/float64/c/1/0"
    data = bytearray(file.read_bytes())
    data[-100_000] ^= 1
    file.write_bytes(data)
    (one,) = check(multi).damage
    with pytest.raises(smdbg.errors.DamagedData) as caught:
        smdbg.open_run(multi).tensor("b").value(1)
    span = re.search(r"bytes \d+ to \d+", one.what)
    assert span and span[0] in str(caught.value)


def test_a_writer_killed_between_its_catalogue_and_the_commit(tmp_path: Path) -> None:
    """The catalogue and the arrays' own zarr.json are put together, before the log: without a commit none is missed."""
    url = tmp_path / "run"
    hook = smdbg.Hook(url)
    base = url / "workers/00000"
    assert hook.flush()
    begun = {path: path.read_bytes() for path in url.rglob("*") if path.is_file()}
    hook.save_tensor("x", np.zeros(3), "c")
    hook.end_step()
    assert hook.flush()
    newest = (base / "zarr.json").read_bytes()
    committed = (base / "steps/c/0/0").read_bytes()
    hook.close()
    for path in [path for path in url.rglob("*") if path.is_file()]:
        path.unlink()
    for path, data in begun.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (base / "zarr.json").write_bytes(newest)
    (base / "steps/zarr.json").unlink()
    assert not verify(open_backend(url)).damage
    (base / "steps/c/0").mkdir(parents=True, exist_ok=True)
    (base / "steps/c/0/0").write_bytes(committed)
    assert {one.object for one in verify(open_backend(url)).damage} >= {"workers/00000/c/stats/zarr.json"}
