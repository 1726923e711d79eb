"""A reader of runs in folders, written from docs/format.md alone: it uses the standard library and NumPy, not smdbg."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def _table() -> list[int]:
    out = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        out.append(value)
    return out


TABLE = _table()


def checksum(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def checked(data: bytes) -> bytes:
    """Return data without the checksum behind it."""
    assert int.from_bytes(data[-4:], "little") == checksum(data[:-4])
    return data[:-4]


class Worker:
    """One worker group: its catalogue, its log and the rows of its arrays."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: dict[tuple[Path, int], bytes] = {}  # chunks whose checksum was right
        group = json.loads((folder / "zarr.json").read_text())
        self.facts = group["attributes"]["smdbg"]
        rest = {key: value for key, value in self.facts.items() if key != "crc32c"}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        assert self.facts["crc32c"] == checksum(text.encode())
        self.arrays = group["consolidated_metadata"]["metadata"]
        text = json.dumps(self.arrays, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        assert self.facts["arrays"] == checksum(text.encode())
        self.entries = {entry["name"]: entry for entry in self.facts["catalogue"]}
        if self.facts["status"] == "completed":
            chunks = -(-self.arrays["steps"]["shape"][0] // 4096)
        else:
            chunks = len(list((folder / "steps/c").iterdir()))
        log = [checked((folder / f"steps/c/{i}/0").read_bytes()) for i in range(chunks)]
        self.log = np.frombuffer(b"".join(log), "<i8").reshape(-1, 10)
        if (self.log[:, 3] == 0).any():
            self.log = self.log[: int((self.log[:, 3] == 0).argmax())]

    def row(self, collection: str, log_row: int) -> int | None:
        """Return the collection's row of a row of the log."""
        saved = (self.log[:, 6] >> self.facts["collections"][collection]["bit"]) & 1
        return int(saved[:log_row].sum()) if saved[log_row] else None

    def line(self, path: str, row: int) -> NDArray[Any]:
        """Return one whole row of an array, put together from its inner chunks."""
        meta = self.arrays[path]
        shard = meta["chunk_grid"]["configuration"]["chunk_shape"]
        chunk = meta["codecs"][0]["configuration"]["chunk_shape"]
        dtype, tail = np.dtype(meta["data_type"]).newbyteorder("<"), meta["shape"][1:]
        if row < meta["attributes"]["smdbg"].get("first_row", 0):
            return np.full(tail, np.nan if dtype.kind in "fc" else 0, dtype)
        size = int(np.prod(chunk)) * dtype.itemsize
        across, inside = shard[1] // chunk[1], row % shard[0]
        total = int(np.prod([s // c for s, c in zip(shard, chunk, strict=True)]))
        parts = []
        for j in range(-(-tail[0] // chunk[1])):
            zeros = ["0"] * (len(tail) - 1)
            file = self.folder.joinpath(path, "c", str(row // shard[0]), str(j // across), *zeros)
            k = inside // chunk[0] * across + j % across
            if (file, k) not in self.held:
                data = file.read_bytes()
                index = np.frombuffer(checked(data[-16 * total - 4 :]), "<u8").reshape(total, 2)
                assert index[k].tolist() == [k * (size + 4), size + 4]
                self.held[file, k] = checked(data[k * (size + 4) : (k + 1) * (size + 4)])
            parts.append(np.frombuffer(self.held[file, k], dtype).reshape(chunk)[inside % chunk[0]])
        return np.concatenate(parts)


class Run:
    """All workers of a run; a step of a worker is in its newest attempt that has not been superseded there."""

    def __init__(self, folder: Path) -> None:
        assert json.loads((folder / "zarr.json").read_text())["attributes"]["smdbg"]["format"] == 1
        self.workers: dict[int, list[Worker]] = {}
        groups = [path.parent for path in (folder / "workers").glob("*/zarr.json")]
        for group in sorted(groups, key=lambda g: [int(part) for part in g.name.split(".")]):
            self.workers.setdefault(int(group.name.split(".")[0]), []).append(Worker(group))

    def find(self, rank: int, step: int) -> tuple[Worker, int] | None:
        """Return the attempt and the row of its log that hold a step."""
        for number, worker in enumerate(self.workers[rank]):
            later = [int(w.log[:, 0].min()) for w in self.workers[rank][number + 1 :] if len(w.log)]
            rows = np.flatnonzero(worker.log[:, 0] == step)
            if rows.size and step < min(later, default=step + 1):
                last = int(rows[-1])
                if not (worker.log[last + 1 :, 0] <= step).any():
                    return worker, last
        return None

    def statistics(self, name: str, step: int, rank: int = 0) -> dict[str, float] | None:
        """Return what is kept of a tensor; None where it is absent."""
        found = self.find(rank, step)
        if found is None or name not in found[0].entries:
            return None
        worker, log_row = found
        entry = worker.entries[name]
        row = worker.row(entry["collection"], log_row)
        for array, index, _ in entry.get("stats", ()) if row is not None else ():
            path = f"{entry['collection']}/{array}"
            line = worker.line(path, row)[index].tolist()
            if not np.isnan(line[0]):
                return dict(zip(worker.arrays[path]["attributes"]["smdbg"]["statistics"], line, strict=True))
        return None

    def value(self, name: str, step: int, rank: int = 0) -> Any:
        """Return the value; None where it is absent or only statistics were kept."""
        found = self.find(rank, step)
        if found is None or self.statistics(name, step, rank) is None:
            return None
        worker, log_row = found
        entry = worker.entries[name]
        home = entry["collection"]
        if not worker.log[log_row, 7] >> worker.facts["collections"][home]["bit"] & 1:
            return None
        row = worker.row(home, log_row)
        assert row is not None
        slot, shape = 0, entry.get("shape", [])
        for array, index, _ in entry.get("layout", ()):
            line = worker.line(f"{home}/{array}", row)[index].tolist()
            if line[0]:
                slot, shape = line[0] - 1, line[2 : 2 + line[1]]
        array, offset, _, dtype = entry["slots"][slot]
        flat = worker.line(f"{home}/{array}", row)[offset : offset + int(np.prod(shape, dtype=int))]
        return _decoded(flat, dtype, shape)

    def features(self, name: str, step: int, rank: int = 0) -> NDArray[Any] | None:
        """Return [features, 5]: active share, mean, std, min, max."""
        found = self.find(rank, step)
        if found is None:
            return None
        worker, log_row = found
        entry = worker.entries[name]
        row = worker.row(entry["collection"], log_row)
        for array, index, count in entry.get("features", ()) if row is not None else ():
            lines = worker.line(f"{entry['collection']}/{array}", row)[index : index + count]
            if not np.isnan(lines).all():
                return lines
        return None


def _decoded(flat: NDArray[Any], dtype: str, shape: list[int]) -> Any:
    if dtype == "bfloat16":
        return (flat.astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(shape)
    if dtype == "str":
        raw, width = flat.tobytes(), shape[-1]
        texts = [raw[i * width : (i + 1) * width] for i in range(int(np.prod(shape[:-1], dtype=int)))]
        if len(shape) > 1:
            texts = [text.rstrip(b"\0") for text in texts]
        return np.array([text.decode("utf-8", "surrogatepass") for text in texts]).reshape(shape[:-1])
    if dtype.startswith(("M8", "m8")):
        return flat.view(dtype).reshape(shape)
    return flat.reshape(shape)
