"""A few rounds of tests/chaos.py; `make chaos` runs a hundred."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import chaos
from faulty_proxy import FaultyProxy


@pytest.mark.parametrize(("place", "seed"), [("s3", 2), ("s3", 3), ("s3", 8), ("folder", 15), ("folder", 55)])
def test_chaos(s3: Any, place: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyProxy("127.0.0.1", s3.ports["s3"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        here = chaos.Place(str(tmp_path / "run"))
        if place == "s3":
            here = chaos.Place(f"s3://{s3.bucket}/chaos-{seed}", s3, proxy, restarts=False)
        done = chaos.run_round(here, seed, tmp_path)
    assert done.lives and done.steps
