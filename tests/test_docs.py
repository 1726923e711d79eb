"""The documentation holds: its pages are up to date, its sessions print what they show, its Python runs."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import smdbg
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
    for name in ("generate.py", "sessions.py", "cli.md", "rules.md", *(f"rules/{rule}.md" for rule in all_rules())):
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
    assert "exploding_outputs" in labels and "all_zero" in labels
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


# ------------------------------------------------------------- a reader made from docs/format.md and nothing else


class Reader:
    """Reads one worker of a local run by what docs/format.md says, with NumPy and json alone."""

    def __init__(self, worker: Path) -> None:
        group = json.loads((worker / "zarr.json").read_text())
        self.folder, self.facts = worker, group["attributes"]["smdbg"]
        self.arrays = group["consolidated_metadata"]["metadata"]
        self.entries = {entry["name"]: entry for entry in self.facts["catalogue"]}
        files = sorted((worker / "steps" / "c").iterdir(), key=lambda file: int(file.name))
        log = np.concatenate([np.frombuffer((f / "0").read_bytes()[:-4], "<i8").reshape(4096, 10) for f in files])
        self.log = log[: int((log[:, 3] == 0).argmax())] if (log[:, 3] == 0).any() else log

    def row(self, collection: str, step: int) -> int | None:
        bit = self.facts["collections"][collection]["bit"]
        steps = self.log[(self.log[:, 6] >> bit) & 1 == 1, 0]
        return int(np.flatnonzero(steps == step)[0]) if step in steps else None

    def line(self, path: str, row: int) -> Any:
        """One whole row of an array, put together from its inner chunks."""
        meta = self.arrays[path]
        shard = meta["chunk_grid"]["configuration"]["chunk_shape"]
        chunk = meta["codecs"][0]["configuration"]["chunk_shape"]
        dtype, tail = np.dtype(meta["data_type"]).newbyteorder("<"), meta["shape"][1:]
        if row < meta["attributes"]["smdbg"].get("first_row", 0):
            return np.full(tail, np.nan if dtype.kind in "fc" else 0, dtype)
        size = int(np.prod(chunk)) * dtype.itemsize
        across, inside = shard[1] // chunk[1], row % shard[0]
        parts = []
        for j in range(-(-tail[0] // chunk[1])):
            zeros = ["0"] * (len(tail) - 1)
            data = self.folder.joinpath(path, "c", str(row // shard[0]), str(j // across), *zeros).read_bytes()
            at = (inside // chunk[0] * across + j % across) * (size + 4)
            parts.append(np.frombuffer(data[at : at + size], dtype).reshape(chunk)[inside % chunk[0]])
        return np.concatenate(parts)

    def statistics(self, name: str, step: int) -> dict[str, float] | None:
        entry = self.entries[name]
        row = self.row(entry["collection"], step)
        for array, index, _ in entry.get("stats", ()) if row is not None else ():
            path = f"{entry['collection']}/{array}"
            found = self.line(path, row)[index].tolist()
            if not np.isnan(found[0]):
                return dict(zip(self.arrays[path]["attributes"]["smdbg"]["statistics"], found, strict=True))
        return None

    def value(self, name: str, step: int) -> Any:
        entry = self.entries[name]
        home = entry["collection"]
        row = self.row(home, step)
        raw = self.log[self.log[:, 0] == step, 7][0] >> self.facts["collections"][home]["bit"] & 1
        if row is None or not raw or self.statistics(name, step) is None:
            return None
        slot, shape = 0, entry.get("shape", [])
        for array, index, _ in entry.get("layout", ()):
            found = self.line(f"{home}/{array}", row)[index].tolist()
            if found[0]:
                slot, shape = found[0] - 1, found[2 : 2 + found[1]]
        array, offset, _, dtype = entry["slots"][slot]
        flat = self.line(f"{home}/{array}", row)[offset : offset + int(np.prod(shape, dtype=int))]
        return flat.reshape(shape) if dtype == str(flat.dtype) else (dtype, flat, shape)


def test_the_format_page_is_enough_to_read_a_run(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    every = smdbg.ReductionConfig(save_raw_tensor=True)
    own = [smdbg.CollectionConfig(name, reduction_config=every) for name in ("mine", "wide")]
    seldom = smdbg.CollectionConfig("seldom", save_config=smdbg.SaveConfig(3), reduction_config=smdbg.ReductionConfig())
    truth: dict[tuple[str, int], Any] = {}
    with smdbg.Hook(tmp_path / "run", collections=[*own, seldom, "losses"]) as hook:
        for step in range(12):
            given = {"a": rng.normal(size=(3, 2)), "grows": rng.integers(0, 9, (step + 1, 2)), "b": rng.random() < 0.5}
            if step > 4:
                given["late"] = rng.normal(size=40).astype("float32")
            for name, value in given.items():
                hook.save_tensor(name, value, "mine")
            if step in (2, 7):
                given["big"] = rng.normal(size=(700, 1001))
                hook.save_tensor("big", given["big"], "wide")
            hook.save_tensor("counted", np.full(4, step), "seldom")
            for part in range(step % 3 + 1):
                hook.save_scalar("loss", step + part, collection="losses")
            truth |= {(name, step): value for name, value in given.items()}
            hook.end_step()
    reader = Reader(tmp_path / "run" / "workers" / "00000")
    assert len(reader.log) == 12 and set(reader.entries) >= {name for name, _ in truth}
    for name in ("a", "grows", "b", "late", "big"):
        for step in range(12):
            found = reader.value(name, step)
            if (name, step) in truth:
                np.testing.assert_array_equal(found, truth[name, step])
            else:
                assert found is None
    for step in range(12):
        kept = reader.statistics("counted", step)
        assert (kept is not None and kept["mean"] == step and kept["count"] == 4) if step % 3 == 0 else kept is None
        recorded = reader.statistics("loss", step)
        assert recorded is not None and recorded["count"] == step % 3 + 1
        assert recorded.get("last", step) == step + step % 3
        assert reader.value("loss", step) == step + (step % 3) / 2
    assert reader.value("counted", 3) is None
