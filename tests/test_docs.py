"""The documentation holds: its pages are up to date, its sessions print what they show, its Python runs."""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from smdbg.analysis.rule import all_rules, find_rule
from smdbg.cli.root import COMMANDS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(ROOT).as_posix() for page in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")])


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sessions() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sessions", DOCS / "sessions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------ generated pages


def generate(script: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)


def test_generated_pages_are_up_to_date() -> None:
    done = generate(DOCS / "generate.py")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stale_page_is_found(tmp_path: Path) -> None:
    copy = tmp_path / "docs"
    (copy / "rules").mkdir(parents=True)
    by_hand = ("generate.py", "sessions.py", "cli.md", "rules.md", "pack.schema.json")
    for name in (*by_hand, *(f"rules/{rule}.md" for rule in all_rules())):
        (copy / name).write_text((DOCS / name).read_text(encoding="utf-8"), encoding="utf-8")
    assert generate(copy / "generate.py").returncode == 0
    (copy / "cli.md").write_text(text_of("docs/cli.md").replace("--fail-on [", "--fail-at ["), encoding="utf-8")
    (copy / "rules" / "gone.md").write_text("a rule that is no more", encoding="utf-8")
    done = generate(copy / "generate.py")
    assert done.returncode == 1
    assert sorted(line.split()[0] for line in done.stderr.splitlines()) == ["docs/cli.md", "docs/rules/gone.md"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_stands_in_the_page(name: str) -> None:
    done = subprocess.run([sys.executable, "-m", "smdbg", name, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and COMMANDS[name].help in done.stdout
    part = text_of("docs/cli.md").partition(f"\n## smdbg {name}\n")[2]
    assert f"Usage: smdbg {name} " in part.partition("\n## ")[0]


@pytest.mark.parametrize("name", all_rules())
def test_a_rule_page_holds_the_docstring(name: str) -> None:
    page = text_of(f"docs/rules/{name}.md").replace("`", "")
    for line in (inspect.getdoc(find_rule(name)) or "").splitlines():
        assert set(line) == {"-"} or line.replace("`", "") in page
    assert f"(rules/{name}.md)" in text_of("docs/rules.md")


# ------------------------------------------------------------------------------------- sessions and examples


def test_the_sessions_of_the_readme_print_what_they_show(sessions: ModuleType, tmp_path: Path) -> None:
    found = sessions.blocks(text_of("README.md"))
    assert found
    for calls in found:
        printed = sessions.printed(calls, tmp_path)
        for call, text in zip(calls, printed, strict=True):
            assert sessions.normal(text).strip() == sessions.normal(call.shown).strip(), f"$ {call.line} (make docs?)"


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in text_of(page)])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path) -> None:
    parts = re.findall(r"^```python\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)
    script = tmp_path / "page.py"
    script.write_text("\n".join(parts), encoding="utf-8")
    done = subprocess.run([sys.executable, "-W", "error", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_python_of_the_pages_that_must_have_some() -> None:
    for page in ("README.md", "docs/hook.md", "docs/reading.md", "docs/rules.md", "docs/format.md"):
        assert "```python" in text_of(page)


def test_the_packs_of_a_page_load(tmp_path: Path) -> None:
    from smdbg.analysis.pack import load_pack
    from smdbg.config import load_config

    (pack,) = re.findall(r"^```yaml\n(.*?)^```$", text_of("docs/rules.md"), re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.yaml").write_text(pack, encoding="utf-8")
    labels = [rule.label for rule in load_pack(str(tmp_path / "mine.yaml")).rules]
    assert {"exploding_outputs", "low_loss", "dead_layer"} <= set(labels)
    (config,) = re.findall(r"^```yaml\n(.*?)^```$", text_of("docs/cli.md"), re.MULTILINE | re.DOTALL)
    (tmp_path / "smdbg.yaml").write_text(config, encoding="utf-8")
    assert load_config(tmp_path / "smdbg.yaml").storage_options == {"anon": True}


# -------------------------------------------------------------------------------------------------- links


def anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)):
        if "://" in target:
            continue
        path, _, part = target.partition("#")
        place = (ROOT / page).parent / path if path else ROOT / page
        assert place.exists(), f"{page}: {target}"
        if part:
            titles = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            assert part in [anchor(title) for title in titles], f"{page}: {target}"
