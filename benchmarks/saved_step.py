"""What a saved step costs, against writing the same bytes raw: on S3 and in a folder, alone and back to back.

Every round writes a run of its own, whose first step, which makes arrays and catalogue, is not measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from counting import Requests
from place import Bucket, Folder, Place
from setting import Setting, folder
from timing import Action, Cost, Line, compare, compare_processor, interleaved, timed
from workload import Step, stored

from smdbg import Hook

LATENCY_ROUNDS, ROUNDS, STEPS = 31, 5, 10
MOST_PUTS = 3


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
        compare(name, ours, base, place.alone, 1, requests.text()),
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
    lines = [
        compare(f"{start} one thread", ours, costs["one"], place.one_thread, steps),
        compare(f"{start} two threads", ours, costs["two"], place.two_threads, steps),
        compare_processor("of it, processor time of this process", ours, costs["two"], steps),
    ]
    if requests.server is not None:
        share = requests.found.total / requests.times  # whatever their type: there may be no GET and no LIST at all
        base, note = f"{MOST_PUTS}", requests.text()
        lines.append(Line("requests of each", f"{share:.3g}", base, [share / MOST_PUTS], 1.0, note=note))
    return lines


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
