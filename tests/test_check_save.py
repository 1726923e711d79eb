"""`smdbg check --save` leaves its verdict in the run; `smdbg runs` shows the last one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smdbg
from smdbg import CollectionConfig, Hook, SaveConfig
from smdbg.analysis import verdict_store
from smdbg.analysis.checker import check as judge_run
from smdbg.analysis.rule import build, find_rule
from smdbg.analysis.verdict_store import LastVerdict, last_verdict, save_verdict
from smdbg.cli import run as command
from smdbg.errors import AccessRefused
from smdbg.store.backend import LocalBackend


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def written(url: str, bad: int = 0, tensors: int = 2) -> str:
    everything = CollectionConfig("gradients", save_config=SaveConfig(save_interval=1))
    with Hook(url, collections=[everything]) as hook:
        for _ in range(3):
            hook.set_mode("train")
            for number in range(tensors):
                value = np.full(2, np.nan if number < bad else 1.0)
                hook.save_tensor(f"g{number}", value, "gradients", role="gradient")
            hook.end_step()
    return url


RULES = ("--rules", "exploding_tensor")


def check(url: str, *args: str) -> int:
    return int(command(["--run", url, "check", *RULES, *args]))


def saved(url: str) -> list[dict[str, Any]]:
    paths = sorted(path for path in Path(url, "checks").iterdir() if path.name != "zarr.json")
    return [json.loads(path.read_bytes(), parse_constant=pytest.fail) for path in paths]


def listed(capsys: pytest.CaptureFixture[str], where: str = ".") -> dict[str, Any]:
    capsys.readouterr()
    assert command(["runs", where, "--format", "jsonl"]) == 0
    return {record["name"]: record for record in map(json.loads, capsys.readouterr().out.splitlines())}


def test_a_verdict_holds_what_was_found() -> None:
    url = written("bad", 1)
    started = time.time()
    Path("pack.yaml").write_text("rules:\n  - exploding_tensor\n")
    args = ["--pack", str(Path("pack.yaml").absolute()), "--save", "--set", "exploding_tensor.severity=warning"]
    assert command(["--run", url, "check", *args, "--fail-on", "warning"]) == 1
    (found,) = saved(url)
    assert found["version"] == 1 and found["smdbg"] == smdbg.__version__ and found["status"] == 1
    assert started - 1 <= found["time"] <= time.time() and found["reason"] == ""
    assert found["asked"]["pack"] == "pack.yaml" and found["asked"]["fail_on"] == "warning"
    assert found["asked"]["settings"] == ["exploding_tensor.severity=warning"]
    assert found["severities"] == {"error": 0, "warning": 1, "info": 0}
    assert [(rule["name"], rule["outcome"]) for rule in found["rules"]] == [("exploding_tensor", "violated")]
    assert found["summary"]["rules_judged"] == 1 and found["findings_found"] == 1
    (one,) = found["findings"]
    assert (one["tensor"], one["first_step"], one["fingerprint"]) == ("g0", 0, one["fingerprint"])
    assert str(Path.cwd()) not in json.dumps(found)  # where the run was is nobody's business


def test_each_check_leaves_its_own_and_the_last_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    written("bad", 1)
    written("clean")
    written("unchecked")
    assert check("bad", "--save") == 1 and check("clean", "--save") == 0 and check("bad") == 1
    time.sleep(1.1)  # ids tell seconds apart
    assert command(["--run", "bad", "check", *RULES, "--save", "--mode", "eval"]) == 2
    assert len(saved("bad")) == 2
    runs = listed(capsys)
    assert runs["unchecked"]["verdict"] is None
    clean, bad = runs["clean"]["verdict"], runs["bad"]["verdict"]
    assert (clean["status"], clean["errors"], clean["unreadable"]) == (0, 0, "") and 0 <= clean["age"] < 600
    assert bad["status"] == 2 and "nothing to judge" in bad["reason"]
    assert command(["runs", ".", "--format", "table"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert "verdict" in head
    assert ["clean," in row for row in rows if row.startswith("clean")] == [True]
    assert ["no verdict," in row for row in rows if row.startswith("bad")] == [True]
    assert command(["runs", "bad", "--format", "table"]) == 0
    assert "no verdict" in capsys.readouterr().out


def test_without_verdicts_the_list_has_no_column_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    written("one")
    assert command(["runs", ".", "--format", "table"]) == 0
    assert "verdict" not in capsys.readouterr().out


def test_known_findings_are_kept_and_not_counted() -> None:
    written("bad", 1)
    assert check("bad", "--write-baseline", "known.yaml", "--save") == 0
    (found,) = saved("bad")
    assert found["status"] == 0 and found["severities"]["error"] == 0 and found["findings_found"] == 1
    assert found["known"] == [found["findings"][0]["fingerprint"]]


def test_verify_and_cp_know_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    written("bad", 1)
    assert check("bad", "--save") == 1
    assert command(["--run", "bad", "verify"]) == 0
    assert command(["cp", "bad", "copy"]) == 0
    assert saved("copy") == saved("bad")
    assert listed(capsys)["copy"]["verdict"]["errors"] == 1


def test_many_findings_are_bounded_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict_store, "LARGEST", 20_000)
    url = written("bad", 60, 60)
    report = judge_run(smdbg.open_run(url), [build(find_rule("exploding_tensor"), {})])
    key = save_verdict(url, report, status=1)
    assert Path(url, key).stat().st_size <= 20_000
    (found,) = saved(url)
    assert found["findings_found"] == 60 and 0 < len(found["findings"]) < 60
    assert found["severities"]["error"] == 60
    found_last = last_verdict(url)
    assert found_last is not None and found_last.errors == 60


class Counting(LocalBackend):
    """A folder that notes what it is asked."""

    asked: list[str] = []

    def list(self, prefix: str) -> Any:
        self.asked.append(f"LIST {prefix}")
        return super().list(prefix)

    def ranges(self, wanted: Any) -> Any:
        self.asked.extend(f"GET {one.key}" for one in wanted)
        return super().ranges(wanted)


def test_one_listing_and_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    url = written("bad", 1)
    monkeypatch.setattr(verdict_store, "open_backend", lambda url, options: Counting(url))
    monkeypatch.setattr(Counting, "asked", [])
    assert last_verdict(url) is None and Counting.asked == ["LIST checks"]
    report = judge_run(smdbg.open_run(url), [build(find_rule("exploding_tensor"), {})])
    keys = [save_verdict(url, report, status=1) for _ in range(3)]
    Counting.asked.clear()
    found = last_verdict(url)
    assert found is not None and Counting.asked == ["LIST checks", f"GET {max(keys)}"]


# ------------------------------------------------------------------------------------------------- what goes wrong

GOOD = {"version": 1, "time": 1e9, "status": 1, "severities": {"error": 2, "warning": 1, "info": 0}, "reason": "r"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b"[" * 100_000,
        json.dumps({**GOOD, "version": 2}).encode(),
        json.dumps({**GOOD, "status": 7}).encode(),
        json.dumps({**GOOD, "status": True}).encode(),
        json.dumps({**GOOD, "time": 1e300}).encode(),
        json.dumps({**GOOD, "time": -1}).encode(),
        json.dumps({**GOOD, "time": "now"}).encode(),
        json.dumps({**GOOD, "time": None}).encode(),
        json.dumps({**GOOD, "time": float("nan")}).encode(),
        json.dumps({**GOOD, "severities": {"error": -1, "warning": 0, "info": 0}}).encode(),
        json.dumps({**GOOD, "severities": [1, 2]}).encode(),
        json.dumps({**GOOD, "severities": {"error": 1.5, "warning": 0, "info": 0}}).encode(),
        json.dumps({**GOOD, "severities": {"error": 10**30, "warning": 0, "info": 0}}).encode(),
        json.dumps(GOOD).encode() + b" " * (1 << 20),
    ],
)
def test_what_somebody_else_wrote_is_unreadable_and_breaks_nothing(
    content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    written("run")
    Path("run/checks/20260101T000000Z-00000000.json").write_bytes(content)
    found = last_verdict("run")
    assert found is not None and found.unreadable and found.status == 2
    verdict = listed(capsys)["run"]["verdict"]
    assert verdict["unreadable"] and verdict["status"] is None
    for args in (["runs", "."], ["runs", "run"]):
        assert command([*args, "--format", "table"]) == 0
        assert "unreadable" in capsys.readouterr().out


def test_other_names_are_no_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    written("run")
    for name in ("zzz.json", "20260101T000000Z-0000000G.json", "20260101T000000Z-00000000.json.partial"):
        Path("run/checks", name).write_text(json.dumps(GOOD))
    assert last_verdict("run") is None
    text = json.dumps({**GOOD, "reason": "\x1b[31m" + "x" * 9999})
    Path("run/checks/20260101T000000Z-00000000.json").write_text(text)
    found = last_verdict("run")
    assert found is not None and (found.errors, found.warnings, len(found.reason)) == (2, 1, 500)
    assert command(["runs", "run", "--format", "table"]) == 0
    assert "\x1b[31m" not in capsys.readouterr().out


def test_a_store_that_refuses_is_status_2_after_the_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: LocalBackend, key: str, data: Any) -> bool:
        raise AccessRefused(f"{self.url}: permission denied ({key})")

    for url, bad in (("clean", 0), ("bad", 1)):
        written(url, bad)
        with monkeypatch.context() as patch:
            patch.setattr(LocalBackend, "create", refuse)
            assert check(url, "--save") == 2
        out, err = capsys.readouterr()
        assert bool(out) is bool(bad)
        assert "could not be saved" in err and "permission denied" in err


def test_a_listing_that_is_refused_breaks_no_list_of_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written("run")
    plain = LocalBackend.list

    def list_(self: LocalBackend, prefix: str) -> Any:
        if prefix == "checks":
            raise AccessRefused("no")
        return plain(self, prefix)

    monkeypatch.setattr(LocalBackend, "list", list_)
    assert listed(capsys)["run"]["verdict"]["unreadable"] == "no"
    assert last_verdict("run") == LastVerdict("", unreadable="no")


def test_nothing_is_put_behind_a_link(capsys: pytest.CaptureFixture[str]) -> None:
    written("run")
    Path("run/checks/zarr.json").unlink()
    Path("run/checks").rmdir()
    Path("elsewhere").mkdir()
    Path("run/checks").symlink_to(Path("elsewhere").absolute())
    assert check("run", "--save") == 2
    assert "is a link" in capsys.readouterr().err and list(Path("elsewhere").iterdir()) == []


def test_on_s3(bucket_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = written(f"{bucket_url}/runs/bad", 1)
    assert last_verdict(url) is None
    assert check(url, "--save") == 1
    verdict = listed(capsys, f"{bucket_url}/runs")["bad"]["verdict"]
    assert (verdict["status"], verdict["errors"], verdict["unreadable"]) == (1, 1, "")
    assert command(["--run", url, "verify"]) == 0
