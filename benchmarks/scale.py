"""Large runs: many tensors, many steps, many workers, one huge tensor; and whether late steps cost what early ones do.

Each is written by a process of its own, and read by another, so that time and memory are theirs alone. They take long,
so each is measured once.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import child
import numpy as np
import paper
import shapes
from counting import Traffic, traffic
from place import Bucket, Folder, Place
from setting import Setting, folder
from timing import Line, compare, interleaved, timed
from workload import stored

from smdbg import CollectionConfig, Hook, ReductionConfig
from smdbg.analysis.run import open_run

MB = 1e6
RAW_OBJECT = 4 << 20
HUGE = 4 << 30
PROCESSES = 8
SLICE_ROUNDS = 9
EARLY, LATE, WINDOW, EACH_FLUSH = 10, 10_000, 4096, 64
DEFAULT_STEPS, DEFAULT_SECONDS, WEIGHT_ELEMENTS = 300, 0.05, 140_000  # weights of more than 4 MiB together


def measure(setting: Setting) -> list[Line]:
    """Return the lines."""
    place, size = Bucket(setting.s3_url()), setting.sized
    lines = [
        *_run(setting, place, "1,000 tensors x 1,000 steps of statistics", "tensors", size(1000, 5), size(1000), 32, 0),
        *_run(setting, place, "10,000 tensors x 30 steps", "tensors", size(10_000, 20), size(30), 16, 1),
        *_run(setting, place, "100,000 steps of 3 scalars", "scalars", 3, size(100_000)),
        *_workers(setting, place, "64 workers x 10 steps, on S3"),
    ]
    with folder() as root:
        lines += _workers(setting, Folder(root), "64 workers x 10 steps, in a folder")
    return lines


def _run(setting: Setting, place: Place, name: str, kind: str, *words: int) -> list[Line]:
    url = f"{place.url}/{kind}-{'-'.join(map(str, words))}"
    return _written_and_read(setting, place, name, url, lambda: child.run(f"shapes.{kind}", url, *words))


def _workers(setting: Setting, place: Place, name: str) -> list[Line]:
    """Some processes, each of which is some of the ranks."""
    processes, each, steps = (2, 2, 2) if setting.quick else (PROCESSES, 64 // PROCESSES, setting.sized(10))
    url = f"{place.url}/workers"

    def write() -> dict[str, Any]:
        def one(number: int) -> Any:
            return child.run("shapes.ranks", url, number * each, each, processes * each, steps, 64)

        with ThreadPoolExecutor(processes) as pool:
            parts = list(pool.map(one, range(processes)))
        both = {"seconds": max(part["seconds"] for part in parts), "given": sum(part["given"] for part in parts)}
        most = max(parts, key=lambda part: part["peak"] or 0)
        return {**most, **both, "processor": sum(part["processor"] for part in parts)}

    return _written_and_read(setting, place, name, url, write)


def _written_and_read(
    setting: Setting, place: Place, name: str, url: str, write: Callable[[], dict[str, Any]]
) -> list[Line]:
    """Write a run and read it; beside it, the bytes that the run keeps are written and read raw."""
    server = setting.server if isinstance(place, Bucket) else None
    start = traffic(server)
    written = write()
    middle = traffic(server)
    found = child.run("shapes.read", url)
    end = traffic(server)

    objects = place.sizes(url.removeprefix(place.url + "/"))
    kept, key = sum(objects.values()), f"{url.rsplit('/', 1)[-1]}-raw"
    sizes = [min(RAW_OBJECT, kept - at) for at in range(0, kept, RAW_OBJECT)]
    data = np.random.default_rng(0).bytes(min(RAW_OBJECT, kept))

    def put() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda item: place.write(f"{key}-{item[0]}", data[: item[1]]), enumerate(sizes)))

    raw_write = timed(put)().seconds
    read = min((end - middle).sent, kept) if server is not None else kept
    parts = [(f"{key}-{at // RAW_OBJECT}", 0, min(RAW_OBJECT, read - at)) for at in range(0, read, RAW_OBJECT)]
    raw_read = timed(lambda: place.read(parts))().seconds
    text = f"{written['given'] / MB:,.1f} MB given, {kept / MB:,.1f} MB kept in {len(objects):,} objects"
    into = _of_server(middle - start, "received")
    shape = f"{found['workers']:,} workers, {found['steps']:,} steps, {found['tensors']:,} tensors"
    return [
        _line(f"{name}: writing it, against raw {place.verb}s of what is kept", written, raw_write, f"{text}{into}"),
        _line(
            f"{name}: opening it and reading every l2, against raw {place.read_verb}s of as many bytes",
            found,
            raw_read,
            f"{shape}{_of_server(end - middle, 'sent')}",
        ),
    ]


def _of_server(found: Traffic, way: str) -> str:
    if not found.requests:
        return ""
    return f"; {found.text()} and {getattr(found, way) / MB:,.1f} MB {way}, by the server's own count"


def _line(name: str, found: dict[str, Any], base: float, note: str) -> Line:
    seconds = found["seconds"]
    note += f"; {found['processor']:.1f} s of processor time"
    if found["peak"] is not None:
        note += f", {found['peak'] / MB:,.0f} MB of memory at most, {found['before'] / MB:,.0f} MB before"
    return Line(name, f"{seconds:.2f} s", f"{base:.2f} s", [seconds / max(base, 1e-6)], note=note)


def huge(setting: Setting) -> list[Line]:
    """One tensor of 4 GB on disk: written whole, then a few rows of it read."""
    nbytes = 1 << 20 if setting.quick else setting.sized(HUGE // shapes.BLOCK_BYTES) * shapes.BLOCK_BYTES
    name = f"a tensor of {nbytes / 2**30:.3g} GiB"
    root = Path(tempfile.mkdtemp(prefix="smdbg-bench-"))
    try:
        if shutil.disk_usage(root).free < 3 * nbytes or _free_memory() < 4 * nbytes:
            return [Line(name, "", "", [], note="left out: it takes four times its size of memory and three of disk")]
        written = child.run("shapes.huge", root / "run", nbytes)
        raw = child.run("shapes.huge_raw", root / "raw", nbytes)
        place = Folder(root)
        objects = {key: size for key, size in place.sizes("run").items() if "/c/" in key}
        top = shapes.huge_value(1 << 20)[:10]
        run = open_run(root / "run")

        def rows() -> None:
            found = run.tensor("embedding").value(0, index=(slice(0, 10),))
            if not np.array_equal(found, top):
                raise RuntimeError("what was read is not what was saved")

        costs = interleaved(
            setting.rounds(SLICE_ROUNDS),
            {"raw": timed(lambda: place.read([("raw", 0, top.nbytes)])), "ours": timed(rows)},
        )
    finally:
        shutil.rmtree(root, ignore_errors=True)
    kept = sum(objects.values()) / nbytes
    note = f"{kept:.4f} bytes kept for each in {len(objects)} objects; the writer held {written['room'] / MB:,.0f} MB"
    note += f" at most, so buffer_bytes must be {written['room'] / nbytes:.2g} times the tensor or more"
    return [
        _line(f"{name} on disk, against one raw write", written, raw["seconds"], note),
        compare("ten rows of it, against one raw read", costs["ours"], costs["raw"]),
    ]


def _free_memory() -> int:
    """Return the bytes that can be had, with what the system would give up for them; without /proc the unused ones."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def default_configuration(setting: Setting) -> list[Line]:
    """PUTs of the default configuration, in steps that take a while, against what paper.py works out for them."""
    steps, seconds = (10, 0.02) if setting.quick else (DEFAULT_STEPS, DEFAULT_SECONDS)
    server, random = setting.s3(), np.random.default_rng(0)
    weights = random.standard_normal((8, WEIGHT_ELEMENTS), np.float32)
    biases = random.standard_normal((16, 64), np.float32)
    kept = (
        *paper.LOSSES,
        paper.Kept("weights", 8, 10, raw_steps=2, raw_elements=weights.size),
        paper.Kept("biases", 16, 10),
        paper.Kept("gradients", 8, 10, raw_steps=2, raw_elements=weights.size),
        paper.Kept("updates", 8, 10),
    )
    before = traffic(server)
    with Hook(setting.s3_url()) as hook:
        hook.set_mode("train")
        start = time.perf_counter()
        for step in range(steps):
            time.sleep(max(0.0, start + step * seconds - time.perf_counter()))
            hook.save_scalar("loss", 1.0, "losses")
            for number in range(4):
                hook.save_scalar(f"metric{number}", float(number))
            for number, weight in enumerate(weights):
                hook.save_tensor(f"layer{number}.weight", weight)
                hook.save_tensor(f"gradient/layer{number}.weight", weight)
                hook.save_tensor(f"update/layer{number}.weight", weight)
            for number, bias in enumerate(biases):
                hook.save_tensor(f"layer{number}.bias", bias)
            hook.end_step()
    found = traffic(server) - before
    worked_out = paper.bill(paper.Job(1, steps, seconds, kept))
    name = f"requests of {steps} steps of {seconds:g} s in the default configuration, against paper.py"
    note = f"{found.text()}, by the server's own count; paper.py is what the tables of docs/scale.md come from"
    return [Line(name, f"{found.total:,}", f"{worked_out.puts:,.0f}", [found.total / worked_out.puts], 1.1, note=note)]


def late_steps(setting: Setting) -> list[Line]:
    """Requests, bytes and processor time of as many steps as fill every shard once, from step 10 and from step 10,000.

    A shard grows over 4,096 rows at most and is put again with each commit: so long a window has them at all sizes.
    """
    window, late = (2 * EACH_FLUSH, 200) if setting.quick else (WINDOW, LATE)
    server = setting.s3()
    block = np.random.default_rng(0).standard_normal((8, 16, 16), np.float32)
    kept = ["metrics", CollectionConfig("tensors", reduction_config=ReductionConfig())]
    with Hook(setting.s3_url(), collections=kept, when_full="block") as hook:

        def save(steps: int, each: int) -> None:
            for turn in range(steps):
                for number, tensor in enumerate(block):
                    hook.save_tensor(f"layer{number}/value", tensor)
                for number in range(20):
                    hook.save_scalar(f"metric{number}", float(number))
                hook.end_step()
                if turn % each == each - 1:
                    stored(hook)

        def measured() -> tuple[Traffic, float]:
            stored(hook)
            before, used = traffic(server), time.process_time()
            save(window, EACH_FLUSH)
            used = time.process_time() - used
            return traffic(server) - before, used

        save(EARLY, EARLY)
        early, early_used = measured()
        save(late - EARLY - window, 1 << 30)
        last, late_used = measured()
    rows = [
        ("requests", early.total, last.total, "{:,.0f}"),
        ("bytes put", early.received, last.received, "{:,.0f}"),
        ("processor time", early_used, late_used, "{:.3f} s"),
    ]
    notes = [f"of {len(block)} tensors and 20 scalars, with a commit each {EACH_FLUSH} steps", "", ""]
    return [
        Line(f"{what} of {window:,} steps from step {late:,} on, against as many from step {EARLY} on", shown.format(b),
             shown.format(a), [b / max(a, 1e-9)], 1.1, note=note)
        for (what, a, b, shown), note in zip(rows, notes, strict=True)
    ]  # fmt: skip
