"""What a worker's zarr.json says of it, and the checksum that stands beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from smdbg.store.format import FORMAT, canonical, group_json
from smdbg.store.shard import crc32c


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker group says of its worker."""

    rank: int
    attempt: int
    writer_id: str
    mesh: Mapping[str, int] = field(default_factory=dict)


def worker_attributes(
    facts: WorkerFacts,
    status: str,
    version: int = 0,
    drops: tuple[int, int] = (0, 0),
    collections: Mapping[str, Any] | None = None,
    catalogue: list[Any] | None = None,
) -> dict[str, Any]:
    """Return attributes.smdbg of a worker group, with the checksum over its canonical JSON."""
    out: dict[str, Any] = {
        "format": FORMAT,
        "rank": facts.rank,
        "attempt": facts.attempt,
        "mesh": dict(facts.mesh),
        "writer_id": facts.writer_id,
        "status": status,
        "dropped_steps": drops[0],
        "dropped_rows": drops[1],
        "catalogue_version": version,
        "collections": dict(collections or {}),
        "catalogue": catalogue or [],
    }
    return with_checksum(out)


def with_checksum(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a worker's facts with the checksum over all other keys."""
    out = {key: value for key, value in facts.items() if key != "crc32c"}
    return {**out, "crc32c": crc32c(canonical(out))}


def sealed_group(facts: Mapping[str, Any], children: Mapping[str, Any]) -> dict[str, Any]:
    """Return a worker's zarr.json, whose facts have a checksum of the metadata of its arrays too."""
    return group_json({"smdbg": with_checksum({**facts, "arrays": crc32c(canonical(children))})}, children)
