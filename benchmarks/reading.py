"""What reading a run costs, against raw ranged reads of the same bytes: on S3 and from a folder.

Each round opens the run anew, so that nothing is remembered from one to the next.
"""

from __future__ import annotations

import numpy as np
from counting import Requests
from numpy.typing import NDArray
from place import Bucket, Folder, Part, Place
from setting import Setting, folder
from timing import Cost, Line, compare, interleaved, timed
from workload import TENSORS, stored

from smdbg import Hook, ReductionConfig
from smdbg.analysis.run import Run, open_run

ROUNDS, VALUE_STEPS, STATISTIC_STEPS = 9, 20, 1000
VALUES, STATISTICS = "values", "statistics"  # the two runs
WORKER = "workers/00000"
NAME = "layer1/value"
GOAL = 1.3
MOST_TO_OPEN, MOST_FOR_STATISTICS = 5, 8  # to open: 4, and one for each 4,096 steps and worker


def on_s3(setting: Setting) -> list[Line]:
    """Return the lines for S3."""
    return _lines(setting, Bucket(setting.s3_url()))


def in_folder(setting: Setting) -> list[Line]:
    """Return the lines for a folder."""
    with folder() as root:
        return _lines(setting, Folder(root))


def _lines(setting: Setting, place: Place) -> list[Line]:
    steps = 3 if setting.quick else VALUE_STEPS
    many = 20 if setting.quick else STATISTIC_STEPS
    value = _write_values(setting, place, steps)
    _write_statistics(place, many)
    return [
        _values(setting, place, steps, value),
        *_opening(setting, place),
        *_statistics(setting, place, many),
    ]


def _write_values(setting: Setting, place: Place, steps: int) -> NDArray[np.float32]:
    """Write a run of full values, and return what `NAME` is in it."""
    saved = setting.step()
    with Hook(f"{place.url}/{VALUES}") as hook:
        for _ in range(steps):
            saved.save(hook)
        stored(hook)
    return saved.block[1]


def _write_statistics(place: Place, steps: int) -> None:
    block = np.random.default_rng(0).standard_normal((TENSORS, 4, 4), np.float32)
    with Hook(f"{place.url}/{STATISTICS}", reduction_config=ReductionConfig()) as hook:
        for _ in range(steps):
            for number, tensor in enumerate(block):
                hook.save_tensor(f"layer{number}/value", tensor)
            hook.end_step()
        stored(hook)


def _values(setting: Setting, place: Place, steps: int, value: NDArray[np.float32]) -> Line:
    """One tensor at all steps, of a run that is open."""
    shards = [name for name in place.sizes(f"{VALUES}/{WORKER}/tensors/float32").items() if "/c/" in name[0]]
    raw: list[Part] = [(name, 0, min(value.nbytes, size)) for name, size in shards]
    requests = _requests(setting, place)

    def ours() -> Cost:
        run = open_run(f"{place.url}/{VALUES}")
        found: list[NDArray[np.float32]] = []
        cost = requests.during(1, timed(lambda: found.extend(run.tensor(NAME).values())))
        if len(found) != steps or not np.array_equal(found[-1], value):
            raise RuntimeError("what was read is not what was saved")
        return cost

    costs = interleaved(setting.rounds(ROUNDS), {"raw": timed(lambda: place.read(raw)), "ours": ours})
    name = f"one tensor of 256 KiB at {steps} steps, against as many raw {place.read_verb}s"
    return compare(name, costs["ours"], costs["raw"], GOAL, 1, requests.text("for all"))


def _opening(setting: Setting, place: Place) -> list[Line]:
    """Opening a run and listing it."""
    names = ("zarr.json", f"{WORKER}/zarr.json", f"{WORKER}/steps/c/0/0")
    raw = [(f"{VALUES}/{name}", 0, place.sizes(f"{VALUES}/{name.rsplit('/', 1)[0]}").get(f"{VALUES}/{name}", 1 << 20))
           for name in names]  # fmt: skip
    requests = _requests(setting, place)

    def opened() -> None:
        run = open_run(f"{place.url}/{VALUES}")
        assert NAME in run.tensors()

    def one_by_one() -> None:
        for part in raw:
            place.read([part])

    costs = interleaved(
        setting.rounds(ROUNDS),
        {"raw": timed(one_by_one), "ours": lambda: requests.during(1, timed(opened))},
    )
    name = f"opening a run and listing it, against {len(raw)} raw {place.read_verb}s of the same, one after another"
    return [
        compare(name, costs["ours"], costs["raw"]),
        *_count(requests, "requests of opening and listing", MOST_TO_OPEN),
    ]


def _statistics(setting: Setting, place: Place, steps: int) -> list[Line]:
    """One statistic of all tensors at all steps, of a run that is open."""
    found = place.sizes(f"{STATISTICS}/{WORKER}/tensors/stats")
    raw: list[Part] = [(name, 0, size) for name, size in found.items() if "/c/" in name]
    requests = _requests(setting, place)

    def norms(run: Run) -> None:
        matrix = run.stats("l2").matrix
        if matrix.shape != (steps, TENSORS) or np.isnan(matrix).any():
            raise RuntimeError("what was read is not what was saved")

    def ours() -> Cost:
        run = open_run(f"{place.url}/{STATISTICS}")
        return requests.during(1, timed(lambda: norms(run)))

    costs = interleaved(setting.rounds(ROUNDS), {"raw": timed(lambda: place.read(raw)), "ours": ours})
    name = f"l2 of {TENSORS} tensors over {steps:,} steps, against raw {place.read_verb}s of the same objects"
    return [
        compare(name, costs["ours"], costs["raw"]),
        *_count(requests, "requests of these statistics", MOST_FOR_STATISTICS),
    ]


def _requests(setting: Setting, place: Place) -> Requests:
    return Requests(setting.server if isinstance(place, Bucket) else None)


def _count(requests: Requests, name: str, most: int) -> list[Line]:
    """Return the line of how many requests it took, against how many it may take at most."""
    if requests.server is None:
        return []
    each = requests.found.total / requests.times
    return [Line(name, f"{each:.3g}", f"{most}", [each / most], 1.0, note=requests.text("each"))]
