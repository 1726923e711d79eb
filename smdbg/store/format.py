"""The on-disk format, version 1, as data: names, columns, flags, shapes and the JSON that describes them.

Nothing here touches a file. The writer and the reader both work from these definitions, so that what is written and
what is looked for cannot drift apart. docs/format.md tells the same story in prose.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

FORMAT = 1
MODES = ("global", "train", "eval", "predict")

LOG = "steps"
LOG_ROWS = 4096
LOG_COLUMNS = (
    "step",
    "mode",
    "mode_step",
    "end_time",
    "duration",
    "hook_time",
    "saved",
    "raw",
    "flags",
    "catalogue_version",
)
# A row that was never written is all zeros; a written one always has an end time.
END_TIME = LOG_COLUMNS.index("end_time")
# In the first column of the row behind the last, if the last chunk has one.
LOG_RUNNING, LOG_ENDED = 1, 2

FLAG_SKIPPED = 1  # the optimizer step was skipped (loss scaling overflow)
FLAG_TRIGGERED = 2  # saved because a trigger asked for it
FLAG_DROPPED = 4  # rows of this step were dropped, since the store was away and the buffer full

MAX_COLLECTIONS = 63  # bits of a signed 64-bit mask that leave it positive

# Compression of an array's inner chunks, by the name users give it, as a Zarr codec.
COMPRESSIONS = ("lz4", "zstd")

MIB = 1 << 20
WIDE_ROW = 4 * MIB  # a row of at least this many bytes is put at once, in shards of its own
NARROW_SHARD = 4 * MIB
NARROW_CHUNK = 64 << 10
NARROW_ROWS = 4096  # as many as the log has in a chunk, so that a scalar's shard stays small to rewrite
WIDE_SHARD = 64 * MIB
WIDE_CHUNK = 256 << 10
CAPACITY_ROWS = 4096  # arrays grow by this many rows

TABLES = ("stats", "layout", "features")  # kinds of arrays [rows, tensors, last]
MOST_ACROSS = 1 << 23  # inner chunks of one row of values, 2 TiB; metadata that says more is not believed

LAYOUT_DIMS = 8  # sizes kept per row in `layout`; a tensor of higher rank gets a wider array

_COLLECTION = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


def valid_collection(name: str) -> bool:
    """Tell whether `name` may name a collection: 1 to 64 of A-Z a-z 0-9 _ -, and not `steps`."""
    return bool(_COLLECTION.match(name)) and name != LOG


def worker_key(rank: int, attempt: int) -> str:
    """Return the key of a worker group, below the run: `workers/00000`, after a resume `workers/00000.1`."""
    return f"workers/{rank:05d}" + (f".{attempt}" if attempt else "")


_WORKER = re.compile(r"(\d{5,9})(?:\.([1-9]\d{0,6}))?\Z")


def parse_worker(name: str) -> tuple[int, int] | None:
    """Return (rank, attempt) of a worker group's name, None when it is not one."""
    match = _WORKER.match(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


@dataclass(frozen=True)
class TensorInfo:
    """What the catalogue knows of a tensor, apart from where its bytes are.

    `shape` and `dtype` are those of the first save; `of` names the parameter that a gradient or update belongs to;
    orders count from 0; `moment` is 'after' where a hook could only see the value after the update.
    """

    name: str
    collection: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    role: str = ""
    of: str = ""
    module: str = ""
    module_class: str = ""
    forward_order: int | None = None
    backward_order: int | None = None
    feature_axis: int | None = None
    requires_grad: bool | None = None
    optimizer_group: int | None = None
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    global_shape: tuple[int, ...] | None = None
    global_offset: tuple[int, ...] | None = None
    placement: str = ""
    source: str = ""
    moment: str = ""


@dataclass(frozen=True)
class ValueSlot:
    """A place for values: elements [offset, offset + capacity) of an array's rows, and their logical dtype."""

    array: str
    offset: int
    capacity: int
    dtype: str


@dataclass(frozen=True)
class Place:
    """A place in an array of statistics, layouts or features: its index (features: first index and how many)."""

    array: str
    index: int
    count: int = 1


@dataclass
class Entry:
    """A catalogue entry: the tensor and its places. A new place is added at the end; old ones keep their rows.

    `since`: the collection's row in which it was first saved. A catalogue is written before the rows that need it, so
    that row may not be there. `whole`: it is in every row from there on, which is told when the worker has ended.
    """

    info: TensorInfo
    slots: list[ValueSlot] = field(default_factory=list)
    stats: list[Place] = field(default_factory=list)
    layout: list[Place] = field(default_factory=list)
    features: list[Place] = field(default_factory=list)
    since: int = 0
    whole: bool = False


def plain_info(info: TensorInfo) -> TensorInfo:
    """Return the info with plain numbers and text, as JSON needs them. Raises TypeError for what is neither."""
    out: dict[str, Any] = {}
    for spec in dataclasses.fields(TensorInfo):
        value = getattr(info, spec.name)
        if isinstance(value, str | bool | None):
            out[spec.name] = value
        elif hasattr(value, "__index__"):
            out[spec.name] = value.__index__()
        elif isinstance(value, list | tuple):
            out[spec.name] = tuple(v if isinstance(v, str) else v.__index__() for v in value)
        else:
            raise TypeError(f"{spec.name} of {info.name!r} must be a number or text, not {value!r}")
    return TensorInfo(**out)


_TUPLES = ("shape", "aliases", "tags", "global_shape", "global_offset")
_PLACES = ("stats", "layout", "features")
_JSON_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int | None": int,
    "bool | None": bool,
    "tuple[int, ...]": list,
    "tuple[str, ...]": list,
    "tuple[int, ...] | None": list,
}
# Name, types in JSON and default of each field; of name and collection None, for they are always told.
_FIELDS = tuple(
    (spec.name, _JSON_TYPES[str(spec.type)], None if spec.default is dataclasses.MISSING else spec.default)
    for spec in dataclasses.fields(TensorInfo)
)


def entry_to_json(entry: Entry) -> dict[str, Any]:
    """Return an entry as JSON-able data; fields that hold their default are left out."""
    out: dict[str, Any] = {}
    for name, _, default in _FIELDS:
        value = getattr(entry.info, name)
        if value != default:
            out[name] = list(value) if isinstance(value, tuple) else value
    if entry.since:
        out["since"] = entry.since
    if entry.whole:
        out["whole"] = True
    out["slots"] = [[s.array, s.offset, s.capacity, s.dtype] for s in entry.slots]
    for kind in _PLACES:
        places: list[Place] = getattr(entry, kind)
        if places:
            out[kind] = [[p.array, p.index, p.count] for p in places]
    return out


def entry_from_json(data: Mapping[str, Any]) -> Entry:
    """Read what `entry_to_json` wrote. Fields of later versions are ignored. Raises KeyError, TypeError, ValueError."""
    if not isinstance(data["name"], str) or not isinstance(data["collection"], str):
        raise TypeError("name and collection are text")
    fields: dict[str, Any] = {}
    for name, types, _ in _FIELDS:
        value = data.get(name)
        if isinstance(value, types):
            fields[name] = value  # any other is as good as not told: it only describes
    for key in _TUPLES:
        if key in fields:
            fields[key] = tuple(str(v) if key in ("aliases", "tags") else _natural(v) for v in fields[key])
    if "shape" not in fields and "shape" in data:
        raise TypeError(f"the shape of {data['name']!r} is no list")
    entry = Entry(TensorInfo(**fields), since=_natural(data.get("since", 0)), whole=data.get("whole") is True)
    for array, offset, capacity, dtype in data.get("slots", ()):
        entry.slots.append(ValueSlot(str(array), _natural(offset), _natural(capacity), str(dtype)))
    for kind in _PLACES:
        for array, index, count in data.get(kind, ()):
            getattr(entry, kind).append(Place(str(array), _natural(index), _natural(count)))
    return entry


def _natural(value: object) -> int:
    """Return a stored size as an int; sizes come from outside and are not trusted."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0 or value >= 1 << 62:
        raise ValueError(f"not a size: {value!r}")
    return value


def canonical(data: object) -> bytes:
    """Return the one JSON text of `data` that checksums are made over: sorted keys, no spaces, ASCII."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


# --- arrays -------------------------------------------------------------------------------------------------------

ZARR_ITEMSIZE = {
    "bool": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array of a run: what its zarr.json says, less the number of rows.

    `tail` is the shape behind the row axis. `shard` is the outer chunk, one object each; `chunk` the inner one, equal
    to `shard` where the array is not sharded (the log and `step`). Both include the row axis. `first_row`: of the
    collection's rows, the first that the array may hold; shards before its own were never written. `compression`: ""
    or one of COMPRESSIONS; compressed chunks differ in length, so that their places are read from the shard's index.
    """

    path: str
    kind: str
    dtype: str
    tail: tuple[int, ...]
    shard: tuple[int, ...]
    chunk: tuple[int, ...]
    dims: tuple[str, ...]
    sharded: bool = True
    statistics: tuple[str, ...] = ()
    first_row: int = 0
    compression: str = ""

    @cached_property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return ZARR_ITEMSIZE[self.dtype]

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of one inner chunk, without its checksum."""
        return product(self.chunk) * self.itemsize

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """How many inner chunks a shard has along each axis."""
        return tuple(s // c for s, c in zip(self.shard, self.chunk, strict=True))

    @cached_property
    def chunks_per_row(self) -> int:
        """How many inner chunks a group of rows takes inside one shard."""
        return product(self.grid[1:])

    @cached_property
    def shards_across(self) -> int:
        """How many shards lie side by side to hold one row."""
        return -(-self.tail[0] // self.shard[1]) if self.tail else 1

    def key(self, row: int, across: int = 0) -> str:
        """Return the object key, below the worker group, of the shard that holds `row`."""
        index = [row // self.shard[0]] + ([across] if self.tail else []) + [0] * (len(self.tail) - 1)
        return f"{self.path}/c/" + "/".join(map(str, index))


def product(sizes: tuple[int, ...] | list[int]) -> int:
    """Return the product of sizes as an unbounded int (NumPy's would wrap)."""
    out = 1
    for size in sizes:
        out *= size
    return out


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def values_spec(collection: str, array: str, dtype: str, elements: int, compression: str = "") -> ArraySpec:
    """Lay out an array for rows of `elements` values of the Zarr data type `dtype`.

    Inner chunks cut a row into equal parts of at most about 256 KiB, or hold several short rows, never both: so the
    chunks of a shard in their C order are the rows' bytes in order, and an offset can be computed.
    """
    item = ZARR_ITEMSIZE[dtype]
    elements = max(8, _up(elements, 8))
    parts = max(1, -(-elements * item // WIDE_CHUNK))
    part = _up(-(-elements // parts), 8)
    width = part * parts
    row = width * item
    if row >= WIDE_ROW:
        fit = max(1, WIDE_SHARD // (part * item))
        shards = -(-parts // fit)
        shard: tuple[int, ...] = (1, part * -(-parts // shards))
        chunk: tuple[int, ...] = (1, part)
    else:
        rows, together = _narrow_rows(row)
        shard, chunk = (rows, width), ((together, width) if parts == 1 else (1, part))
    path, dims = f"{collection}/{array}", ("row", f"element_{array}")
    return ArraySpec(path, "values", dtype, (width,), shard, chunk, dims, compression=compression)


def table_spec(
    collection: str,
    array: str,
    kind: str,
    dtype: str,
    tensors: int,
    last: int,
    dims: tuple[str, str],
    statistics: tuple[str, ...] = (),
    first_row: int = 0,
) -> ArraySpec:
    """Lay out an array [rows, tensors, last]: statistics, layouts or features."""
    tensors = max(8, _up(tensors, 8))
    rows, together = _narrow_rows(tensors * last * ZARR_ITEMSIZE[dtype])
    return ArraySpec(
        f"{collection}/{array}",
        kind,
        dtype,
        (tensors, last),
        (rows, tensors, last),
        (together, tensors, last),
        ("row", *dims),
        True,
        statistics,
        first_row,
    )


def _narrow_rows(row_bytes: int) -> tuple[int, int]:
    """Return (rows in a shard, rows in an inner chunk) for rows of that many bytes."""
    rows = min(NARROW_ROWS, max(1, NARROW_SHARD // row_bytes))
    together = min(rows, max(1, NARROW_CHUNK // row_bytes))
    return rows // together * together, together


def log_spec() -> ArraySpec:
    """Lay out the commit log."""
    shape = (LOG_ROWS, len(LOG_COLUMNS))
    return ArraySpec(LOG, "log", "int64", (len(LOG_COLUMNS),), shape, shape, ("row", "column"), False)


def step_spec(collection: str) -> ArraySpec:
    """Lay out a collection's `step` coordinate."""
    return ArraySpec(f"{collection}/step", "step", "int64", (), (LOG_ROWS,), (LOG_ROWS,), ("row",), False)


def fill_value(dtype: str) -> Any:
    """Return the JSON fill value of a Zarr data type: NaN for float and complex, 0 otherwise."""
    if dtype.startswith("float"):
        return "NaN"
    if dtype.startswith("complex"):
        return ["NaN", "NaN"]
    return False if dtype == "bool" else 0


def array_json(spec: ArraySpec, rows: int) -> dict[str, Any]:
    """Return the zarr.json of an array with `rows` rows (a capacity while the run is being written)."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    plain: list[dict[str, Any]] = [little, {"name": "crc32c"}]
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": list(spec.chunk),
            "codecs": [little, *_compression_json(spec), {"name": "crc32c"}],
            "index_codecs": plain,
            "index_location": "end",
        },
    }
    attributes: dict[str, Any] = {"kind": spec.kind}
    if spec.first_row:
        attributes["first_row"] = spec.first_row
    if spec.statistics:
        attributes["statistics"] = list(spec.statistics)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [rows, *spec.tail],
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.shard)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill_value(spec.dtype),
        "codecs": [sharding] if spec.sharded else plain,
        "attributes": {"smdbg": attributes},
        "dimension_names": list(spec.dims),
        "storage_transformers": [],
    }


def _compression_json(spec: ArraySpec) -> list[dict[str, Any]]:
    if spec.compression == "lz4":
        bitshuffle = {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "typesize": spec.itemsize, "blocksize": 0}
        return [{"name": "blosc", "configuration": bitshuffle}]
    if spec.compression == "zstd":
        return [{"name": "zstd", "configuration": {"level": 1, "checksum": False}}]
    return []


_CODECS = {("bytes", "crc32c"): "", ("bytes", "blosc", "crc32c"): "lz4", ("bytes", "zstd", "crc32c"): "zstd"}


def spec_from_json(path: str, data: Mapping[str, Any]) -> ArraySpec:
    """Read an array's zarr.json. Raises KeyError, TypeError or ValueError when it is not one this version writes."""
    dtype = data["data_type"]
    shape = [_natural(n) for n in data["shape"]]
    shard = tuple(_natural(n) for n in data["chunk_grid"]["configuration"]["chunk_shape"])
    codec = data["codecs"][0]
    sharded = codec["name"] == "sharding_indexed"
    inner = codec["configuration"]["codecs"] if sharded else data["codecs"]
    chunk = tuple(_natural(n) for n in codec["configuration"]["chunk_shape"]) if sharded else shard
    compression = _CODECS.get(tuple(str(c["name"]) for c in inner))
    if dtype not in ZARR_ITEMSIZE or compression is None or (compression and not sharded):
        raise ValueError(f"{path}: unknown data type or codecs")
    if not (len(shape) == len(shard) == len(chunk)) or min(shard) < 1 or min(chunk) < 1:
        raise ValueError(f"{path}: shapes do not agree")
    if any(s % c for s, c in zip(shard, chunk, strict=True)):
        raise ValueError(f"{path}: inner chunks do not divide the shard")
    facts = data.get("attributes", {}).get("smdbg", {})
    kind, first_row = str(facts.get("kind", "")), _natural(facts.get("first_row", 0))
    _check_layout(path, kind, tuple(shape[1:]), shard, chunk)
    if first_row > shape[0]:
        raise ValueError(f"{path}: begins behind its end")
    if product(shape[1:]) * ZARR_ITEMSIZE[dtype] >= 1 << 62:
        raise ValueError(f"{path}: rows of {shape[1:]} elements are not believed")
    return ArraySpec(
        path,
        kind,
        dtype,
        tuple(shape[1:]),
        shard,
        chunk,
        tuple(str(d) for d in data.get("dimension_names") or ()),
        sharded,
        tuple(str(s) for s in facts.get("statistics", ())),
        first_row,
        compression,
    )


def _check_layout(path: str, kind: str, tail: tuple[int, ...], shard: tuple[int, ...], chunk: tuple[int, ...]) -> None:
    """Raise ValueError unless chunks lie as `values_spec` and `table_spec` lay them: offsets are computed from that."""
    if kind in TABLES and not (len(tail) == 2 and chunk[1:] == shard[1:] == tail):
        raise ValueError(f"{path}: a table's chunks are not whole rows")
    if kind == "values":
        if len(tail) != 1 or tail[0] % chunk[1] or shard[1] > tail[0]:
            raise ValueError(f"{path}: chunks do not divide a row")
        if chunk[0] != 1 and chunk[1] != tail[0]:
            raise ValueError(f"{path}: chunks hold parts of several rows")
        if tail[0] // chunk[1] > MOST_ACROSS:
            raise ValueError(f"{path}: rows of {tail[0]} elements are not believed")


def group_json(attributes: Mapping[str, Any], children: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the zarr.json of a group; `children` (path -> zarr.json) becomes inline consolidated metadata."""
    out: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}
    if children is not None:
        out["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": dict(children)}
    return out
