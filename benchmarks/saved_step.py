"""What a saved step costs, against writing the same bytes raw: on S3 and in a folder, alone and back to back.

Every round writes a run of its own, whose first step, which makes arrays and catalogue, is not measured.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from s3_server import S3Server
from setting import Setting, folder
from timing import Action, Cost, Line, compare, compare_processor, interleaved, timed
from workload import Step, stored

from smdbg import Hook

LATENCY_ROUNDS, ROUNDS, STEPS = 31, 5, 10
COUNTED_SECONDS = 0.1  # the server counts a request a moment after it has answered
GOAL_S3 = 1.5


class Place(Protocol):
    """Where steps and raw bytes go. `verb`: what writing raw is called; `goal`: of the ratio to it."""

    verb: str
    goal: float | None
    url: str

    def write(self, name: str, data: bytes) -> None:
        """Write an object, once, as plainly as it can be done."""

    def clear(self) -> None:
        """Take away what was written, where that gives memory back for the next round."""


class Bucket:
    """An S3 bucket; raw PUTs go through the very client that hooks use."""

    verb: str = "PUT"
    goal: float | None = GOAL_S3

    def __init__(self, url: str) -> None:
        """Take the client that a hook has made."""
        import s3fs

        self.url = url
        with Hook(f"{url}/first"):
            self._client = s3fs.S3FileSystem.current()

    def write(self, name: str, data: bytes) -> None:
        """One PUT."""
        self._client.pipe_file(f"{self.url}/{name}", data)

    def clear(self) -> None:
        """Nothing: the server frees no space, and needs none back."""


class Folder:
    """A folder; a raw write is written beside its place and renamed, so that readers see it whole."""

    verb: str = "write"
    goal: float | None = None

    def __init__(self, root: Path) -> None:
        """Take an empty folder."""
        self.url = str(root)
        self._root = root

    def write(self, name: str, data: bytes) -> None:
        """One write and one rename."""
        path = self._root / name
        part = path.with_name(path.name + ".part")
        with open(part, "wb") as file:
            file.write(data)
        os.replace(part, path)

    def clear(self) -> None:
        """Remove everything. Memory that was never used before costs far more than memory that comes back."""
        for found in self._root.iterdir():
            shutil.rmtree(found) if found.is_dir() else found.unlink()


@dataclass
class Requests:
    """Requests that a server answered while the hook was at work, by type, failed ones too; over `steps` steps."""

    server: S3Server | None
    steps: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def during(self, steps: int, action: Action) -> Cost:
        """Do `action`, counting the requests in the meantime."""
        before = self._now()
        cost = action()
        for kind, count in self._now().items():
            self.counts[kind] = self.counts.get(kind, 0) + count - before.get(kind, 0)
        self.steps += steps
        return cost

    def _now(self) -> dict[str, int]:
        out: dict[str, int] = {}
        if self.server is None:
            return out
        time.sleep(COUNTED_SECONDS)
        for (_, kind), count in self.server.request_counts().items():
            out[kind] = out.get(kind, 0) + count
        return out

    def text(self) -> str:
        """Return the requests per step, such as '3.2 PUT, 0 GET, 0 LIST ...', or nothing without a server."""
        if self.server is None:
            return ""
        kinds = {"PUT": 0, "GET": 0, "LIST": 0, **self.counts}
        shares = ", ".join(f"{count / self.steps:.3g} {kind}" for kind, count in kinds.items())
        return f"{shares} a step, by the server's own count"


def on_s3(setting: Setting) -> list[Line]:
    """Return the lines for S3."""
    place = Bucket(setting.s3_url())
    return _alone(setting, place) + _back_to_back(setting, place)


def in_folder(setting: Setting) -> list[Line]:
    """Return the lines for a folder."""
    with folder() as root:
        place = Folder(root)
        return _alone(setting, place) + _back_to_back(setting, place)


def _alone(setting: Setting, place: Place) -> list[Line]:
    """One step until it is committed, nothing else on its way."""
    number = itertools.count()
    requests = Requests(setting.server if isinstance(place, Bucket) else None)
    saved = setting.step()
    raw = saved.as_bytes()
    costs = interleaved(
        setting.rounds(LATENCY_ROUNDS),
        {
            "raw": _then_clear(place, timed(lambda: place.write(f"alone-{next(number)}", raw))),
            "ours": _then_clear(place, lambda: _run(place, f"alone-{next(number)}", saved, 1, requests)),
        },
    )
    name, ours, base = f"one step until committed, against one raw {place.verb}", costs["ours"], costs["raw"]
    return [
        compare(name, ours, base, place.goal, 1, requests.text()),
        compare_processor("of it, processor time of this process", ours, base),
    ]


def _back_to_back(setting: Setting, place: Place) -> list[Line]:
    """Some steps at full speed, then a flush."""
    steps, number = 2 if setting.quick else STEPS, itertools.count()
    requests = Requests(setting.server if isinstance(place, Bucket) else None)
    saved = setting.step()
    raw = saved.as_bytes()

    def write(_: int) -> None:
        place.write(f"raw-{next(number)}", raw)

    def one_thread() -> None:
        for turn in range(steps):
            write(turn)

    def two_threads() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(write, range(steps)))

    costs = interleaved(
        setting.rounds(ROUNDS),
        {
            "one": _then_clear(place, timed(one_thread)),
            "two": _then_clear(place, timed(two_threads)),
            "ours": _then_clear(place, lambda: _run(place, f"run-{next(number)}", saved, steps, requests)),
        },
    )
    start = f"{steps} steps back to back, each, against raw {place.verb}s from"
    ours = costs["ours"]
    return [
        compare(f"{start} one thread", ours, costs["one"], place.goal, steps, requests.text()),
        compare(f"{start} two threads", ours, costs["two"], place.goal, steps),
        compare_processor("of it, processor time of this process", ours, costs["two"], steps),
    ]


def _run(place: Place, name: str, saved: Step, steps: int, requests: Requests) -> Cost:
    """Write a run, and return what `steps` of its steps and the flush after them took."""
    with Hook(f"{place.url}/{name}") as hook:

        def save(number: int) -> None:
            for _ in range(number):
                saved.save(hook)
            stored(hook)

        save(1)
        return requests.during(steps, timed(lambda: save(steps)))


def _then_clear(place: Place, action: Callable[[], Cost]) -> Action:
    def run() -> Cost:
        cost = action()
        place.clear()
        return cost

    return run
