"""Trains cases, each into a folder of its own: the run, and beside it the truth. What is there already is kept."""

from __future__ import annotations

import fnmatch
import logging
import multiprocessing
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.detection import architectures, faults, healthy, training, truth
from benchmarks.detection.recipe import Case, Fault, nothing
from smdbg import open_run

VERSION = "1"  # of the trainings: what was trained under another one is trained anew
RUN = "run"


def all_cases() -> dict[str, Case]:
    """Return every case by its id: faulty ones first, the others seed by seed, even ones first.

    So whoever calibrates while it trains has something of everything early.
    """
    rest = sorted([*architectures.cases(), *healthy.cases()], key=lambda case: (case.seed % 2, case.seed))
    return {case.id: case for case in [*faults.cases(), *rest]}


def chosen(pattern: str = "*", half: str = "both") -> list[Case]:
    """Return the cases whose id matches a glob, of one half of the seeds or both."""
    return [c for c in all_cases().values() if fnmatch.fnmatch(c.id, pattern) and half in ("both", c.half)]


def trained(case: Case, root: Path) -> bool:
    """Tell whether a case is there, as this version would train it."""
    folder = root / case.id
    return (folder / truth.FILE).is_file() and truth.read(folder).get("version") == version(case)


def version(case: Case) -> str:
    """Return what a stored case must have been made by: the version, its recipe and its kind of fault."""
    return f"{VERSION} {case.recipe}"


def train(case: Case, root: Path) -> dict[str, Any]:
    """Train one case and return what really happened, with its label: faulty, healthy or '' for neither."""
    folder = root / case.id
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    course = training.run(case, folder / RUN)
    found = verdict(case, course)
    truth.write(folder, course, found)
    return found


def verdict(case: Case, course: truth.Truth) -> dict[str, Any]:
    """Return what a case amounts to, from its course: its label, and what a rule should say of it and when."""
    label, why = _label(case, course)
    fault = case.fault
    return {
        "id": case.id,
        "family": case.family,
        "seed": case.seed,
        "half": case.half,
        "version": version(case),
        "label": label,
        "why": why,
        "expected": list(case.expected) if label == "faulty" else [],
        "level": fault.level if fault else "error",
        "layers": list(fault.layers) if fault else [],
        "first_faulty_step": course.positions[_start(fault, course)] if label == "faulty" else None,
        "steps": course.positions[-1] + 1,
    }


def _start(fault: Fault | None, course: truth.Truth) -> int:
    """Return the first training step that shows the fault: what is done after an update shows in the next one."""
    if fault is None:
        return 0
    if fault.onset:
        return fault.onset(course)
    return fault.start + (fault.after_update is not nothing)


def _label(case: Case, course: truth.Truth) -> tuple[str, str]:
    if case.architecture:
        return truth.outcome(course, architectures.BATCHES), f"loss {course.ratio():.3g} of its first"
    if case.fault:
        shown = case.fault.shown(course)
        return ("faulty" if shown else ""), shown or "the fault does not show"
    well = truth.healthy(course, case.recipe.goal, case.recipe.goal_by)
    bad = f"loss ratio {course.ratio():.3g}, score {course.last_score():.3g}, overfits by {course.overfits():.2g}"
    return ("healthy" if well else ""), well or bad


def train_all(cases: Sequence[Case], root: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """Train what is not there yet in several processes; yield each verdict as it comes."""
    waiting = [case.id for case in cases if not trained(case, root)]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _quiet) as pool:
        running = [pool.submit(_by_id, name, root) for name in waiting]
        for done in as_completed(running):
            yield done.result()


def _quiet() -> None:
    """Say nothing of what a faulty training makes the hook warn of."""
    logging.getLogger("smdbg").setLevel(logging.ERROR)


def _by_id(name: str, root: Path) -> dict[str, Any]:
    case = all_cases()[name]
    try:
        return train(case, root)
    except Exception as error:
        return {"id": name, "label": "", "why": f"failed: {type(error).__name__}: {error}"}


def stored(root: Path) -> list[dict[str, Any]]:
    """Return the verdicts of all cases below a folder, by id, as they are defined now; others are passed over."""
    cases = all_cases()
    found = []
    for path in sorted(root.glob(f"*/{truth.FILE}")):
        kept = truth.read(path.parent)
        case = cases.get(kept["id"])
        if case is not None and kept["version"] == version(case):
            course = truth.Truth(**kept["course"])
            now = verdict(case, course)
            if any(kept.get(key) != value for key, value in now.items()):
                truth.write(path.parent, course, now)
            found.append(now)
    return found


def last_logged(folder: Path) -> int:
    """Return the last step that a case's run logged: a check on the positions that the trainer counted."""
    return int(open_run(folder / RUN).step_table(0).step[-1])
