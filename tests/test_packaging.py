"""What is installed is what is in the tree, under the one name smdbg, and importing it is cheap."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import smdbg

ROOT = Path(__file__).parent.parent
FOLDERS = {"smdbg": "smdbg", "cli": "smdbg/cli", "rules": "smdbg/rules"}


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built by way of an sdist, from a copy, so that no stale build/ or egg-info takes part."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / file, copy)
    said = run("-m", "build", "--no-isolation", "--outdir", "dist", cwd=copy)
    assert "DeprecationWarning" not in said
    (built,) = (copy / "dist").glob("*.whl")
    return built


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"smdbg-{smdbg.__version__}.dist-info/METADATA").decode())


def test_the_wheel_holds_the_tree(wheel: Path) -> None:
    tree = {
        f"{inside}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, inside in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {name for name in contents(wheel) if ".dist-info/" not in name} == tree
    assert {"smdbg/py.typed", "smdbg/cli/__init__.py", "smdbg/rules/packs/default.yaml"} <= tree


def test_only_the_name_smdbg_is_installed(wheel: Path) -> None:
    assert {name.split("/")[0] for name in contents(wheel)} == {"smdbg", f"smdbg-{smdbg.__version__}.dist-info"}


def test_packages_are_the_folders_with_modules() -> None:
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    found = {
        "/".join([inside, *folder.parent.relative_to(ROOT / name).parts]).replace("/", ".")
        for name, inside in FOLDERS.items()
        for folder in (ROOT / name).rglob("__init__.py")
    }
    assert set(options["options"]["packages"].split()) == found


def test_metadata(wheel: Path) -> None:
    facts = metadata(wheel)
    assert facts["Version"] == smdbg.__version__
    assert facts["License-Expression"] == "Apache-2.0"
    assert facts["Requires-Python"] == ">=3.11"
    needed = [line for line in facts.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(needed) == ["click>=8.2", "numpy>=1.26", "pyyaml", "rich", "s3fs>=2025.3", "zarr>=3"]


def test_the_wheel_works_away_from_the_tree(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = "import smdbg.cli, smdbg.rules; print(smdbg.cli.__file__); print(smdbg.rules.__file__)"
    for place in run("-c", code, cwd=elsewhere, PYTHONPATH=str(tmp_path / "site")).split():
        assert Path(place).is_relative_to(tmp_path / "site" / "smdbg")
    assert smdbg.__version__ in run("-m", "smdbg", "--version", cwd=elsewhere, PYTHONPATH=str(tmp_path / "site"))


def test_importing_smdbg_imports_nothing_heavy(tmp_path: Path) -> None:
    said = run("-X", "importtime", "-c", "import smdbg", cwd=tmp_path)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in said.splitlines()}
    assert "smdbg" in imported
    assert imported.isdisjoint({"numpy", "zarr", "s3fs", "fsspec", "click", "rich", "yaml", "asyncio"})


def test_every_public_name_is_there() -> None:
    for name in smdbg.__all__:
        assert name in dir(smdbg)
        assert getattr(smdbg, name) is not None
    assert smdbg.Hook.__module__ == "smdbg.hooks.base"


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="module 'smdbg' has no attribute 'nothing'"):
        smdbg.nothing  # noqa: B018
