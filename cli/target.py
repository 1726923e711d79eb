"""Which run a command is about."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from smdbg.cli.output import talk
from smdbg.cli.root import Session
from smdbg.errors import BadConfig, BadSelection, RunNotFound

if TYPE_CHECKING:
    from smdbg.analysis.run import Run

ROOT = "runs"  # where runs go, and are looked for, when nothing is said
HOW_TO_NAME = "Name one with --run URL, with the variable SMDBG_RUN or with `run:` in smdbg.yaml"


def open_target(session: Session, attempt: str | int = "latest") -> Run:
    """Open the run that the options, the environment or the folder name.

    Raises the errors of open_run, and BadSelection for an attempt that no worker has.
    """
    from smdbg.analysis.run import open_run
    from smdbg.config import load_config

    config = load_config()
    run = open_run(target(session), storage_options=config.storage_options, attempt=attempt)
    known = sorted({facts.attempt for facts in run.attempts()})
    if isinstance(attempt, int) and attempt not in known:
        there = ", ".join(map(str, known)) or "none"
        raise BadSelection(
            f"No worker of {run.url} has an attempt {attempt}; there are: {there}. Name one with --attempt."
        )
    return run


def target(session: Session) -> str:
    """Return the URL of the run: --run, else SMDBG_RUN, else smdbg.yaml, else the newest run under ./runs.

    Raises BadConfig where a CI job leaves it open, and RunNotFound where there is none.
    """
    if session.run is not None and not session.run.strip():
        raise BadConfig("--run is empty; a variable in the command may not be set. Give a folder or a URL.")
    url = session.run or os.environ.get("SMDBG_RUN") or _configured()
    if url:
        return url
    if os.environ.get("CI"):
        raise BadConfig(
            f"No run is named, and in a CI job (the variable CI is set) the newest one is not guessed. {HOW_TO_NAME}."
        )
    newest = _newest(ROOT)
    if newest is None:
        raise RunNotFound(f"No run is named, and there is none under ./{ROOT}. {HOW_TO_NAME}, or try `smdbg demo`.")
    talk(f"run: {newest} (the newest under ./{ROOT})", session.quiet)
    return newest


def _configured() -> str | None:
    """Return `run:` of the nearest smdbg.yaml."""
    from smdbg.config import load_config

    return load_config().run


def _newest(root: str) -> str | None:
    """Return the run that was created last under a local folder, by the file that every run begins with."""
    from smdbg.analysis.run import list_runs

    def created(url: str) -> tuple[int, str]:
        try:
            return os.stat(os.path.join(url, "zarr.json")).st_mtime_ns, url
        except OSError:
            return 0, url

    found = list_runs(root) if os.path.isdir(root) else []
    return max(found, key=created, default=None)
