"""Are the zarr.json files those that a writer makes, to the byte?

A checksum covers what attributes.smdbg of a worker, and of the root, says. Of the rest there are two copies, or no
freedom: so it is compared with the copy, or with what a writer would have put.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from smdbg.store.checks import ROOT_KEYS, root_is_intact
from smdbg.store.format import CAPACITY_ROWS, array_json, group_json, spec_from_json

DIFFERS = "it differs from its copy, and it cannot be told which of the two is damaged"
BROKEN = (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)


def as_written(data: bytes) -> Any:
    """Return what a JSON text says. Raises ValueError unless it is, to the byte, one that a writer makes of that."""
    found = json.loads(data)
    if data not in (json.dumps(found, separators=(",", ":")).encode(), json.dumps(found).encode()):
        raise ValueError("its text is not as any writer writes it")
    return found


def plain_group_problem(data: bytes) -> str:
    """Return what is wrong with the zarr.json of a group that says nothing, '' if nothing."""
    try:
        return "" if as_written(data) == group_json({}) else "it is not what a writer puts there"
    except BROKEN as error:
        return _said(error)


def root_problem(data: bytes) -> str:
    """Return what is wrong with the run's zarr.json, '' if nothing. Runs of earlier writers have no checksum there."""
    try:
        found = as_written(data)
        facts = dict(found["attributes"]["smdbg"])
        if not root_is_intact(facts) or not facts.keys() >= ROOT_KEYS:
            return "it does not match its checksum"
        if not isinstance(facts["run_id"], str) or not isinstance(facts["writers"], list):
            return "it does not say which run it is, or who writes it"
        return _frame_problem(found, group_json({"smdbg": {}}))
    except BROKEN as error:
        return _said(error)


def _frame_problem(found: Mapping[str, Any], wanted: dict[str, Any]) -> str:
    frame = {**found, "attributes": {**found["attributes"], "smdbg": {}}}
    return "" if frame == wanted else "around what it says it is not as a writer makes it"


def worker_problem(data: bytes) -> str:
    """Return what is wrong with a worker's zarr.json besides its checksum, '' if nothing."""
    try:
        found = as_written(data)
        children = found["consolidated_metadata"]["metadata"]
        problem = _frame_problem(found, group_json({"smdbg": {}}, children))
        if problem:
            return problem
        for path, meta in children.items():
            if not _is_own(path, meta):
                return f"its copy of the metadata of {path} is not as a writer makes it"
        return ""
    except BROKEN as error:
        return _said(error)


def _is_own(path: str, meta: Mapping[str, Any]) -> bool:
    """Tell whether metadata are exactly those that a writer makes for what they say."""
    if meta["node_type"] == "group":
        return bool(meta == group_json({}))
    return array_json(spec_from_json(path, meta), meta["shape"][0]) == meta


def child_problem(path: str, data: bytes, copy: Mapping[str, Any], rows: int, settled: bool) -> str:
    """Return what is wrong with the zarr.json of an array or a collection, '' if nothing.

    `copy`: what the worker's zarr.json says of it. Not `settled`: the writer may have put this one, and not yet, or no
    more, the worker's; `rows` are the rows there are, by the log.
    """
    try:
        found = as_written(data)
        if found == copy:
            return ""
        if sensible(path, found, rows, settled):
            if not sensible(path, copy, rows, settled) or (not settled and _differs_in_rows(found, copy)):
                return ""  # the copy is the damaged one, or it is older or newer
            return DIFFERS
        return "it differs from its copy in the worker's zarr.json"
    except BROKEN as error:
        return _said(error)


def sensible(path: str, meta: Mapping[str, Any], rows: int, settled: bool) -> bool:
    """Tell whether metadata are such as a writer makes when there are so many rows."""
    try:
        if not _is_own(path, meta):
            return False
        now = rows if meta["node_type"] == "group" else meta["shape"][0]
        return bool(now == rows or (not settled and now % CAPACITY_ROWS == 0 and now >= rows))
    except BROKEN:
        return False


def _differs_in_rows(found: Mapping[str, Any], copy: Mapping[str, Any]) -> bool:
    return {**found, "shape": [0, *found["shape"][1:]]} == {**copy, "shape": [0, *copy["shape"][1:]]}


def _said(error: BaseException) -> str:
    return str(error) if str(error).startswith("its text") else unread(error)


def unread(error: BaseException) -> str:
    """Return what to say of a JSON file that cannot be taken for what it should be, by what its reading raised."""
    no_json = isinstance(error, json.JSONDecodeError | UnicodeDecodeError | RecursionError)
    return "is no JSON" if no_json else "it does not say what it should"
