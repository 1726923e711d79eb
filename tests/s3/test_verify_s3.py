"""Verifying a run on a real S3 server: damage put there by the plain client, orphans, and their deletion."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import smdbg
from smdbg.cli import run as command_line
from smdbg.store.backend import open_backend
from smdbg.store.verify import verify
from smdbg.store.verify_repair import repair, repairable


def test_damage_orphans_and_repair(s3: Any, bucket_url: str) -> None:
    with smdbg.Hook(bucket_url) as hook:
        for step in range(3):
            hook.save_tensor("big", np.arange(600_000.0) + step, "wide")
            hook.save_scalar("loss", 1.0, "losses")
            hook.end_step()
    backend = open_backend(bucket_url)
    before = {item.name for item in backend.walk("")}
    report = verify(backend)
    assert report.damage == [] and report.orphans == [] and report.objects == len(before)
    assert report.values == 6
    shard = "workers/00000/wide/float64/c/1/0"
    data = bytearray(backend.get(shard))
    data[len(data) // 2] ^= 4
    backend.put(shard, bytes(data))
    backend.put("workers/00000/wide/float64/c/7/0", b"never committed")
    backend.put("mine.txt", b"mine")
    report = verify(backend)
    (one,) = report.damage
    assert (one.object, one.tensors, one.first_step, one.last_step) == (shard, ("big",), 1, 1)
    assert {left.object for left in report.orphans} == {"workers/00000/wide/float64/c/7/0", "mine.txt"}
    assert [left.object for left in repair(backend, report, repairable(report))] == ["workers/00000/wide/float64/c/7/0"]
    assert {item.name for item in backend.walk("")} == before | {"mine.txt"}
    assert command_line(["verify", bucket_url]) == 1
    backend.remove([shard, "workers/00000/nothing"])
    (one,) = verify(backend, quick=True).damage
    assert one.object == shard and "missing" in one.what
    assert command_line(["verify", f"{bucket_url}-not"]) == 2


def test_walk_goes_over_many_pages(s3: Any, bucket_url: str) -> None:
    backend = open_backend(bucket_url)
    names = [f"a/{i % 3}/{i}" for i in range(1010)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: backend.put(name, b"x"), names))
    assert sorted(item.name for item in backend.walk("a")) == sorted(names)
    assert [item.name for item in backend.walk("a/1/1")] == []
    backend.remove(names)
    assert list(backend.walk("")) == []
