"""smdbg.testing: what a test of a training is told."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import smdbg
from smdbg import CollectionConfig, Hook, SaveConfig
from smdbg.analysis.rule import build, find_rule
from smdbg.cli import run as command
from smdbg.errors import BadConfig, RuleNotFound, RunNotFound
from smdbg.testing import MOST_SHOWN, assert_clean


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def written(url: str, bad: int = 0, fails: bool = False) -> str:
    everything = CollectionConfig("gradients", save_config=SaveConfig(save_interval=1))
    try:
        with Hook(url, collections=[everything]) as hook:
            for step in range(6):
                hook.set_mode("train")
                for number in range(max(1, bad)):
                    value = np.full(2, np.nan if number < bad and step >= 4 else 1.0)
                    hook.save_tensor(f"g{number}", value, "gradients", role="gradient")
                hook.end_step()
            if fails:
                raise RuntimeError("out of memory")
    except RuntimeError:
        pass
    return url


def said(*args: object, **more: object) -> str:
    with pytest.raises(AssertionError) as caught:
        assert_clean(*args, **more)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_clean_run_gives_its_report() -> None:
    report = assert_clean(written("run"))
    assert report.findings == () and "exploding_tensor" in report.judged
    assert assert_clean(Path("run")).judged == assert_clean(smdbg.open_run("run")).judged == report.judged


def test_findings_are_told_in_words() -> None:
    text = said(written("run", 2))
    assert text.splitlines()[0] == "run: 2 findings"
    assert "  error exploding_tensor: nan in 2 of 2 elements of g0 at step 4" in text
    assert "rules judged, 6 of 6 steps" in text.splitlines()[-1]


def test_of_many_findings_the_first_are_told() -> None:
    text = said(written("run", MOST_SHOWN + 5))
    assert text.count("exploding_tensor: nan") == MOST_SHOWN and "  and 5 more" in text


def test_rules_by_name_glob_or_made() -> None:
    written("run", 1)
    quiet = build(find_rule("exploding_tensor"), {"end_step": 4})
    assert assert_clean("run", rules=[quiet]).judged == ("exploding_tensor",)
    assert "g0" in said("run", rules=["exploding_*"])
    assert "g0" in said("run", rules=["exploding_tensor"])
    assert_clean("run", rules=["vanishing_gradient"])
    Path("pack.yaml").write_text("rules:\n  - {rule: exploding_tensor, severity: warning}\n")
    assert_clean("run", pack="./pack.yaml")
    assert "  warning exploding_tensor" in said("run", pack="./pack.yaml", fail_on="warning")
    with pytest.raises(RuleNotFound, match="Did you mean exploding_tensor"):
        assert_clean("run", rules=["exploding_tensr"])


def test_no_verdict_is_no_pass() -> None:
    written("failed", fails=True)
    text = said("failed")
    assert "No verdict: nothing was found, but the run is failed: RuntimeError" in text
    assert "allow_incomplete=True accepts" in text
    assert_clean("failed", allow_incomplete=True)
    idle = build(find_rule("exploding_tensor"), {"include": "nothing*"})
    text = said(written("run"), rules=[idle])
    assert "had nothing to judge" in text and "exploding_tensor: not applicable: nothing matched" in text


def test_known_findings_do_not_fail() -> None:
    written("run", 2)
    assert command(["--run", "run", "check", "--write-baseline", "known.yaml"]) == 0
    assert_clean("run", baseline="known.yaml")
    assert said(written("other", 3), baseline="known.yaml").splitlines()[0] == "other: 1 finding"


def test_what_is_wrong_with_the_call_is_no_assertion() -> None:
    with pytest.raises(RunNotFound):
        assert_clean("nowhere")
    with pytest.raises(BadConfig, match="Did you mean error"):
        assert_clean(written("run"), fail_on="eror")
    with pytest.raises(BadConfig, match="gone.yaml"):
        assert_clean("run", baseline="gone.yaml")


def test_the_test_of_the_page_passes(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "ci-check.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    Path("test_page.py").write_text(text)
    runpy.run_path("test_page.py")["test_the_training_is_healthy"](tmp_path)


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, smdbg.testing; print(sorted({'numpy', 'yaml', 'click', 'pytest'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
