"""Copying and pruning on a real S3 server: nothing is sent twice, and what is there is compared by its ETag."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import smdbg
from smdbg.analysis.run import list_runs
from smdbg.errors import NotARun, RunExists, RunNotFound
from smdbg.store.backend import Backend, open_backend
from smdbg.store.copy import Copied, copy_run
from smdbg.store.delete import delete_run, found_runs
from smdbg.store.prune import Choice, Prune
from smdbg.store.verify import verify


def _helpers() -> ModuleType:
    path = Path(__file__).parent.parent / "runs_to_keep.py"
    spec = importlib.util.spec_from_file_location("runs_to_keep", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


kept = _helpers()


@pytest.fixture(params=["s3fs", "obstore"])
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "obstore":
        pytest.importorskip("obstore")
    monkeypatch.setenv("SMDBG_S3_CLIENT", request.param)
    return str(request.param)


def counted(s3: Any, before: dict[Any, int]) -> dict[str, int]:
    out: dict[str, int] = {}
    for key, count in s3.request_counts().items():
        out[key[1]] = out.get(key[1], 0) + count - before.get(key, 0)
    return out


def copy(source: Any, target: Any) -> Copied:
    return copy_run(open_backend(source), open_backend(target))


def test_there_and_back(s3: Any, bucket_url: str, client: str, tmp_path: Path) -> None:
    kept.write_run(tmp_path / "run", 4)
    whole = kept.files(tmp_path / "run")
    done = copy(tmp_path / "run", f"{bucket_url}/a")
    assert done.objects == len(whole) and list_runs(bucket_url) == [f"{bucket_url}/a"]
    copy(f"{bucket_url}/a", f"{bucket_url}/b")
    before = s3.request_counts()
    verify(open_backend(f"{bucket_url}/a"), quick=True)
    checking, before = counted(s3, before), s3.request_counts()
    again = copy(f"{bucket_url}/a", f"{bucket_url}/b")
    assert again.objects == 0 and again.present == len(whole)
    requests = counted(s3, before)
    assert requests.get("PUT", 0) == 0 and requests["GET"] - checking["GET"] < 20, "ETags tell; objects are not read"
    copy(f"{bucket_url}/b", tmp_path / "back")
    assert kept.files(tmp_path / "back") == whole
    kept.write_run(tmp_path / "other", 1)
    with pytest.raises(RunExists):
        copy(tmp_path / "other", f"{bucket_url}/a")
    kept.assert_same(kept.held(f"{bucket_url}/a"), kept.held(tmp_path / "run"))


class Ends:
    """Lets through so many puts of another place, and then ends."""

    def __init__(self, place: Backend, puts: int) -> None:
        self._place, self._left = place, puts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._place, name)

    def put(self, key: str, data: Any) -> None:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt
        self._place.put(key, data)


def test_a_copy_that_was_interrupted_goes_on(s3: Any, bucket_url: str, client: str, tmp_path: Path) -> None:
    kept.write_run(tmp_path / "run", 4)
    objects = len(kept.files(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        copy_run(open_backend(tmp_path / "run"), Ends(open_backend(f"{bucket_url}/run"), 20), threads=1)
    with pytest.raises(NotARun):
        smdbg.open_run(f"{bucket_url}/run")
    assert list_runs(bucket_url) == []
    before = s3.request_counts()
    done = copy(tmp_path / "run", f"{bucket_url}/run")
    assert done.present == 20 and done.objects == objects - 20
    assert counted(s3, before)["PUT"] <= objects - 20 + 2
    kept.assert_same(kept.held(f"{bucket_url}/run"), kept.held(tmp_path / "run"))


def test_prune(bucket_url: str, client: str) -> None:
    url = f"{bucket_url}/run"
    kept.write_run(url, 6)
    truth = kept.held(url)
    Prune(open_backend(url), Choice(("short", "long"))).carry_out()
    names = ("a", "rows", "grows", "big")
    kept.assert_same(kept.held(url), {k: None if k[0] in names else v for k, v in truth.items()})
    Prune(open_backend(url), Choice(("tight", "losses"), whole=True)).carry_out()
    assert smdbg.open_run(url).collections() == ["short", "long"]
    ((found, backend),) = found_runs(bucket_url)
    assert found.url == url and found.status == "completed"
    delete_run(backend, found)
    assert list(open_backend(bucket_url).walk("")) == []
    with pytest.raises((RunNotFound, NotARun)):  # some servers keep empty folders
        smdbg.open_run(url)
    kept.write_run(url, 1, wide=False)
