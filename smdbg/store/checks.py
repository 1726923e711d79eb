"""Holding metadata against what any writer makes: types, sizes, places. Whoever wrote them may lie.

Each check raises with the run's URL, before anything is done with what it refuses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from smdbg import stats as statistics
from smdbg.errors import DamagedData
from smdbg.store.dtypes import MOST_EMPTY, zarr_dtype
from smdbg.store.format import (
    LOG,
    MAX_COLLECTIONS,
    TABLES,
    ArraySpec,
    Entry,
    Place,
    canonical,
    product,
    valid_collection,
)
from smdbg.store.shard import crc32c

LATEST = 253402300800.0  # unix seconds of the year 10000, which no date holds
MOST_DIMS = 64
ROOT_KEYS = frozenset(
    (
        "format run_id created world_size writers framework versions hyperparameters argv git_commit seed host "
        "writer_id"
    ).split()
)
_STORED = frozenset((*statistics.STORED, "last"))


def check_root(url: str, facts: Mapping[str, Any]) -> None:
    """Raise DamagedData for facts of a run that are of the wrong kind; one that is not told is no harm."""
    created = facts.get("created", 0.0)
    good = {
        "created": _is_number(created) and 0 <= created < LATEST,
        "world_size": _is_count(facts.get("world_size", 1)),
        "versions": isinstance(facts.get("versions", {}), dict),
        "hyperparameters": isinstance(facts.get("hyperparameters", {}), dict),
        "argv": isinstance(facts.get("argv", []), list) and all(isinstance(a, str) for a in facts.get("argv", [])),
    }
    _refuse_bad(f"{url}: the run's zarr.json", good, facts)
    if not root_is_intact(facts):
        raise DamagedData(f"{url}: the run's zarr.json is damaged: it does not match its checksum")


def root_is_intact(facts: Mapping[str, Any]) -> bool:
    """Tell whether a run's facts match their checksum. Those of earlier writers have none.

    Without one there are no keys but theirs: else it is the word crc32c that is damaged.
    """
    rest = {key: value for key, value in facts.items() if key != "crc32c"}
    if "crc32c" not in facts:
        return rest.keys() <= ROOT_KEYS
    try:
        return bool(facts["crc32c"] == crc32c(canonical(rest)))
    except (ValueError, RecursionError):  # a NaN, which no writer puts there, or lists in lists in lists
        return False


def _refuse_bad(where: str, good: Mapping[str, bool], facts: Mapping[str, Any]) -> None:
    for name, fine in good.items():
        if not fine:
            told = f"has {name} {str(facts[name])[:40]!r}" if name in facts else f"lacks {name}"
            raise DamagedData(f"{where} is damaged: it {told}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def check_worker(name: str, facts: Mapping[str, Any]) -> None:
    """Raise DamagedData for facts of a worker that are missing or of the wrong kind."""
    good = {
        "status": isinstance(facts.get("status"), str),
        "catalogue_version": _is_count(facts.get("catalogue_version")),
        "dropped_steps": _is_count(facts.get("dropped_steps")),
        "dropped_rows": _is_count(facts.get("dropped_rows")),
        "mesh": isinstance(facts.get("mesh"), dict),
        "collections": isinstance(facts.get("collections"), dict),
        "catalogue": isinstance(facts.get("catalogue"), list),
    }
    _refuse_bad(f"{name}: the worker's zarr.json", good, facts)


def check_collections(collections: Mapping[str, Any]) -> None:
    """Raise ValueError unless each collection has a name that makes a key, and a bit of its own."""
    bits = [about["bit"] for about in collections.values()]
    if not all(_is_count(bit) and bit < MAX_COLLECTIONS for bit in bits) or len(set(bits)) < len(bits):
        raise ValueError("collection bits")
    if not all(map(valid_collection, collections)):
        raise ValueError("collection names")


def check_spec(spec: ArraySpec) -> None:
    """Raise ValueError for a table that does not hold what its kind says."""
    names, last = spec.statistics, spec.tail[-1] if spec.tail else 0
    if spec.path != LOG and not (spec.path.count("/") == 1 and all(map(valid_collection, spec.path.split("/")))):
        raise ValueError(f"an array at {spec.path!r}")  # which would become a path, perhaps out of the run
    if spec.kind in TABLES and spec.dtype != {"stats": "float64", "layout": "int64", "features": "float32"}[spec.kind]:
        raise ValueError(f"{spec.path}: {spec.kind} of data type {spec.dtype}")
    if spec.kind == "layout" and not 2 < last <= 2 + MOST_DIMS:
        raise ValueError(f"{spec.path}: shapes of {last - 2} sizes")
    if spec.kind == "features" and names != statistics.FEATURES:
        raise ValueError(f"{spec.path}: unknown features")
    if spec.kind in ("stats", "features") and (len(names) != last or len(set(names)) < len(names)):
        raise ValueError(f"{spec.path}: {len(names)} names for {last} statistics")
    if spec.kind == "stats":
        if names[:1] != ("count",) or ("min" in names and not set(statistics.ALWAYS) <= set(names)):
            raise ValueError(f"{spec.path}: statistics without {'min' if 'count' in names else 'count'} and the like")
        unknown = [name for name in names if name not in _STORED]
        if unknown:
            raise ValueError(f"{spec.path}: unknown statistic {unknown[0]!r}; a newer smdbg may know it")


def check_places(entry: Entry, specs: Mapping[str, ArraySpec]) -> None:
    """Raise ValueError unless every place of a tensor lies in an array of the right kind, and within it."""
    name, home, shape = entry.info.name, entry.info.collection, entry.info.shape
    texts = [slot.dtype in ("str", "bytes") for slot in entry.slots[:1]]
    if len(shape) > MOST_DIMS or product([n for n in shape if n]) * 16 >= 1 << 63:
        raise ValueError(f"{name!r} has a shape that no array has")
    if any(texts) and (not shape or (shape[-1] == 0 and product(shape[:-1]) > MOST_EMPTY)):
        raise ValueError(f"{name!r} has a shape that no text has")
    for kind in TABLES:
        places: list[Place] = getattr(entry, kind)
        for place in places:
            spec = _array_of(specs, home, place.array, kind, name)
            if place.index + place.count > spec.tail[0] or (kind != "features" and place.count != 1):
                raise ValueError(f"{name!r} lies outside of {spec.path}")
            if kind == "stats" and "min" not in spec.statistics and entry.slots:
                if all(slot.dtype.startswith(("str", "bytes", "M8", "m8")) for slot in entry.slots):
                    raise ValueError(f"{name!r} is text and lies in {spec.path}, of numbers")
    for slot in entry.slots:
        spec = _array_of(specs, home, slot.array, "values", name)
        if slot.offset + max(1, slot.capacity) > spec.tail[0]:
            raise ValueError(f"{name!r} lies outside of {spec.path}")
        if zarr_dtype(slot.dtype) != spec.dtype:
            raise ValueError(f"{name!r} is {slot.dtype} and lies in {spec.path}, of {spec.dtype}")


def _array_of(specs: Mapping[str, ArraySpec], home: str, array: str, kind: str, name: str) -> ArraySpec:
    spec = specs.get(f"{home}/{array}")
    if spec is None or "/" in array:
        raise ValueError(f"{name!r} names an array {home}/{array} that the group does not have")
    if spec.kind != kind:
        raise ValueError(f"{name!r} has {kind} in {spec.path}, which holds {spec.kind or 'something else'}")
    return spec
