"""Shared by all tests: a clean environment, hypothesis settings, and one real S3 server a session."""

from __future__ import annotations

import importlib.util
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).parent.parent

# No deadline: the first call of a test may import torch. Under CI the same examples every time.
hypothesis.settings.register_profile("smdbg", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("smdbg")

# What of the caller's environment would change an outcome.
_FOREIGN = ("CI", "GITHUB_ACTIONS", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES")


def _module_at(path: Path) -> ModuleType:
    """Import a file that is in no package, once."""
    if path.stem in sys.modules:
        return sys.modules[path.stem]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use the S3 server, so that `-m 'not s3'` leaves them out."""
    for item in items:
        if "s3_session" in getattr(item, "fixturenames", ()):
            item.add_marker("s3")


@pytest.fixture(scope="session", autouse=True)
def clean_environment() -> Iterator[None]:
    """Hide what the caller has set: variables of smdbg, of S3, of continuous integration and of terminals."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name in _FOREIGN or name.startswith(("SMDBG_", "AWS_")):
                patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


@pytest.fixture(scope="session")
def s3_session() -> Iterator[Any]:
    """The server of this session (S3Server of examples/s3_server.py), started when the first test needs it."""
    with _module_at(ROOT / "examples" / "s3_server.py").s3_server() as server:
        yield server


@pytest.fixture
def s3(s3_session: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The server, with the environment of this test, and of processes it starts, set to reach it."""
    _forget_connections()
    for name, value in s3_session.environment().items():
        monkeypatch.setenv(name, value)
    yield s3_session
    _forget_connections()


@pytest.fixture
def bucket_url(s3: Any) -> str:
    """A URL that nothing else uses: s3://<bucket>/<unique>."""
    return f"s3://{s3.bucket}/{uuid.uuid4().hex[:12]}"


def _forget_connections() -> None:
    """s3fs keeps a file system for every set of options and does not see a changed environment."""
    if "s3fs" in sys.modules:
        sys.modules["s3fs"].S3FileSystem.clear_instance_cache()
