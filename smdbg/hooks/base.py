"""The framework-neutral hook: names and values in, steps of a run out. It never disturbs the training it watches."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from smdbg.errors import DamagedData, NotARun, RunNotFound, near
from smdbg.hooks import facts
from smdbg.hooks.config import (
    CollectionConfig,
    ModeConfig,
    ReductionConfig,
    check_choices,
    check_mode_config,
    check_reduction,
    natural,
)
from smdbg.hooks.control import StopWatch
from smdbg.hooks.convert import to_number
from smdbg.hooks.endings import Endings, describe
from smdbg.hooks.guard import quiet
from smdbg.hooks.intake import RECORD_BYTES, Intake
from smdbg.store.backend import Backend, open_backend
from smdbg.store.begin import RunFacts, begin
from smdbg.store.format import MODES, TensorInfo
from smdbg.store.writer import StepRecord, Writer

log = logging.getLogger("smdbg")

CLOSE_SECONDS = 60.0
FLOATS = (float, np.float64)


class Hook(Intake):
    """Saves tensors and scalars of a training into a run.

    url: a folder or a URL such as s3://bucket/runs/1; None makes runs/<UTC time>-<4 hex>. save_config,
    reduction_config: replace the defaults of every collection that has none of its own. collections: names or
    CollectionConfigs to save, instead of the default ones; a collection of your own that you name when saving is
    always saved. hyperparameters: kept in the run (secrets hidden). storage_options: for fsspec. rank, world_size:
    else taken from the launcher's environment. workers: 'auto' and 'all' write from every rank, 'one' from rank 0.
    resume: continue a run that exists. on_error: 'raise' or 'off', what to do when the run cannot be begun.
    buffer_bytes: bound of what waits to be written. when_full: 'drop' (counted and recorded) or 'block'. raw_budget:
    bytes of full values that the default schedule may keep. host: keep the host's name.

    The constructor raises on bad arguments, on a store that is not there or refuses, and on a run that exists. After
    that nothing raises: an error inside the hook is logged once, the hook switches itself off and the run's status
    says so. Environment: SMDBG_DISABLE=1 makes every hook do nothing.
    """

    framework = ""
    packages: tuple[str, ...] = ()

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        save_config: ModeConfig | None = None,
        reduction_config: ReductionConfig | None = None,
        collections: Sequence[str | CollectionConfig] | None = None,
        hyperparameters: Any = None,
        storage_options: Mapping[str, Any] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        workers: str = "auto",
        resume: bool = False,
        on_error: str = "raise",
        *,
        buffer_bytes: int = 512 << 20,
        when_full: str = "drop",
        raw_budget: int = 2 << 30,
        host: bool = True,
        mesh: Mapping[str, int] | None = None,
    ) -> None:
        """Begin the run. Raises TypeError, ValueError, RunExists, StoreError, AccessRefused."""
        check_mode_config(save_config)
        check_choices(workers=workers, on_error=on_error, when_full=when_full)
        check_reduction(reduction_config)
        super().__init__(save_config, reduction_config, collections, raw_budget)
        self.url = ""
        self.step = 0
        self._endings: Endings | None = None
        self._stop: StopWatch | None = None
        self._off = facts.disabled()
        self._last_end: int | None = None
        self._past = np.zeros((0, 3), np.int64)
        found_rank, found_size = facts.rank_and_size()
        self.rank = found_rank if rank is None else natural("rank", rank)
        self.world_size = max(found_size, self.rank + 1) if world_size is None else natural("world_size", world_size)
        if self.rank >= self.world_size:
            raise ValueError(f"rank {self.rank} is not below world_size {self.world_size}")
        if workers == "one" and self.rank != 0:
            self._off = True
        if self._off:
            return
        run = RunFacts(
            world_size=self.world_size,
            writers=(0,) if workers == "one" else tuple(range(self.world_size)),
            framework=self.framework,
            versions=facts.versions(("smdbg", "numpy", "zarr", "s3fs", *self.packages)),
            hyperparameters=facts.hyperparameters(hyperparameters),
            argv=facts.argv(),
            git_commit=facts.git_commit(),
            seed=facts.seed(hyperparameters),
            host=os.uname().nodename if host else "",
        )
        try:
            self._begin(url, run, storage_options, resume, buffer_bytes, when_full == "block", mesh)
        except Exception as error:
            if on_error == "raise":
                raise
            log.warning("smdbg: the run cannot be begun, so nothing is saved: %s", error)
            self._off = True

    def _begin(
        self,
        url: str | os.PathLike[str] | None,
        run: RunFacts,
        storage_options: Mapping[str, Any] | None,
        resume: bool,
        buffer_bytes: int,
        block: bool,
        mesh: Mapping[str, int] | None,
    ) -> None:
        if url is None:
            if run.world_size > 1:
                raise ValueError("several workers write: give them one URL")
            url = time.strftime(f"runs/%Y%m%dT%H%M%SZ-{secrets.token_hex(2)}", time.gmtime())
        backend = open_backend(url, storage_options)
        self.url = backend.url
        if resume:
            self._past = _past_steps(backend, self.rank)
        worker = begin(backend, run, self.rank, resume=resume, mesh=mesh)
        self._backend: Backend = backend
        if len(self._past):
            self.set_step(int(self._past[:, 0].max()) + 1)
        self._writer = Writer(backend, worker, buffer_bytes=buffer_bytes, block=block)
        self._endings = Endings(self._finish)

    # --- saving ---

    @quiet(None)
    def save_tensor(
        self, /, name: str, value: Any, collection: str | None = None, *, role: str = "", of: str = "", **info: Any
    ) -> None:
        """Save a tensor in the current step, if its collection is due.

        `value`: anything with `__array__` or DLPack, of any shape and dtype; it is copied. `collection` None: by the
        name's pattern, else `tensors`. `role`, `of` and further TensorInfo fields go into the catalogue. Saved twice in
        a step, the second gets `_1` behind its name.
        """
        if self._save_directly(name, value, collection):
            return
        found = self._collection_of(name, collection)
        if self._due(found):
            known = self._catalogued.get((found, name))
            self._save(known or TensorInfo(name, found, role=role, of=of, **info), value)

    def save_scalar(self, name: str, value: Any, collection: str = "metrics", *, role: str = "") -> None:
        """Save a number. Recorded n times in one step, its mean is the value; count and last are kept beside it."""
        if type(value) not in FLOATS or not self._add_number(name, value, collection):
            self._save_scalar(name, value, collection, role)

    @quiet(None)
    def _save_scalar(self, name: str, value: Any, collection: str, role: str) -> None:
        collection = self._collection_of(name, collection)
        if self._due(collection):
            known = self._catalogued.get((collection, name))
            self._record(known or TensorInfo(name, collection, role=role), to_number(name, value))

    @quiet(False)
    def should_save(self, collection: str) -> bool:
        """Tell whether a collection is due at the current step. Asking opens the step."""
        return self._due(collection)

    @quiet(None)
    def end_step(self) -> None:
        """Close the current step; does nothing when none is open."""
        self._close_step()

    @quiet(None)
    def set_mode(self, mode: str) -> None:
        """Set the mode of the steps to come: train, eval, predict or global. Closes an open step of another mode."""
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}: modes are {', '.join(MODES)}.{near(str(mode), MODES)}")
        if mode != self._mode:
            self._close_step()
            self._mode = mode

    @quiet(None)
    def set_step(self, step: int) -> None:
        """Set the number of the next step, as after going back to a checkpoint. Closes an open step.

        On a resumed run the mode steps are those that this worker had at that step before.
        """
        self._close_step()
        self.step = natural("step", step)
        if len(self._past):
            for number, mode in enumerate(MODES):
                earlier = self._past[(self._past[:, 0] < self.step) & (self._past[:, 1] == number), 2]
                self._mode_steps[mode] = int(earlier.max(initial=-1)) + 1

    def state_dict(self) -> dict[str, Any]:
        """Return where the hook is, to be kept in a checkpoint."""
        return {"step": self.step, "mode_steps": dict(self._mode_steps)}

    @quiet(None)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where the hook was when `state_dict` was called."""
        self._close_step()
        self.step = natural("step", state["step"])
        self._mode_steps.update({str(k): natural("mode step", v) for k, v in state["mode_steps"].items()})

    def flush(self, timeout: float = 60.0) -> bool:
        """Commit all closed steps; True once the store has them."""
        writer = self._writer
        return writer is not None and self._active() and writer.flush(timeout)

    @property
    def mode(self) -> str:
        """The mode of the current step."""
        return self._mode

    @property
    def mode_step(self) -> int:
        """The number of the current step within its mode."""
        return self._mode_steps[self._mode]

    @property
    def should_stop(self) -> bool:
        """Tell whether somebody asked this run to stop. The first call starts looking, every 2 s, in a thread."""
        return self._is_asked_to_stop()

    @quiet(False)
    def _is_asked_to_stop(self) -> bool:
        if self._off or self._writer is None:
            return False
        if self._stop is None:
            self._stop = StopWatch(self._backend)
        return self._stop.asked

    # --- ending ---

    def close(self) -> None:
        """Close the open step, commit everything and mark the worker completed. Calling it again does nothing."""
        self._finish("completed")

    def __enter__(self) -> Self:
        """Return the hook."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; after an exception the status says which."""
        good = error is None or (isinstance(error, SystemExit) and error.code in (None, 0))
        self._finish("completed" if good or error is None else f"failed: {describe(error)}")

    def _finish(self, status: str) -> None:
        if self._closed or self._forked:
            return
        deadline = time.monotonic() + CLOSE_SECONDS
        if self._writer is not None:
            self._writer.room.end_by(CLOSE_SECONDS / 2)  # whoever waits for room holds what is needed here
        with self._guard_lock:
            self.end_step()
            self._closed = True
            writer, self._writer = self._writer, None
        if self._stop is not None:
            self._stop.end()
        try:
            if writer is not None:
                writer.close(status, max(CLOSE_SECONDS / 2, deadline - time.monotonic()))
            if self._endings is not None:
                self._endings.release()
            self._on_close()
        except Exception:
            log.exception("smdbg: the run could not be closed")

    def _on_close(self) -> None:
        """Let go of the framework: called once, at the end. Derived hooks remove their handles here."""

    # --- inside; derived hooks build on these ---

    def _active(self) -> bool:
        if self._off or self._closed or self._forked:
            return False
        if self._writer is not None and self._writer.failure:
            self._off = True
            return False
        return True

    def _account(self, nanoseconds: int) -> None:
        if self._now is not None:
            self._now.hook_time += nanoseconds

    def _switch_off(self, error: BaseException) -> None:
        log.error("smdbg: an error inside the hook; it saves nothing more", exc_info=error)
        self._off = True
        if self._writer is not None:
            self._writer.end_soon(f"failed: hook switched off: {describe(error)}")

    def _close_step(self) -> None:
        now, writer = self._now, self._writer
        if now is None:
            return
        end = time.perf_counter_ns()
        duration = end - (now.started if self._last_end is None else self._last_end)
        dropped = sum(row.dropped for row in now.rows.values())
        # Records wait in memory too, until the store has what came before them.
        size = RECORD_BYTES * (1 + sum(len(row.items) + len(row.numbers) for row in now.rows.values()))
        has_room = writer is not None and writer.room.take(size, now.reserved)
        now.for_record = size if has_room else 0
        groups = now.groups(self._within_budget) if has_room else ()
        self._expect(now)
        record = StepRecord(
            step=self.step,
            mode=MODES.index(now.mode),
            mode_step=now.mode_step,
            end_time=time.time_ns(),
            duration=duration,
            hook_time=min(now.hook_time, duration),
            groups=groups,
            flags=now.flags,
            dropped_rows=dropped,
            reserved=now.reserved,
        )
        self._now, self._last_end = None, end
        self.step += 1
        self._mode_steps[now.mode] += 1
        if writer is not None and has_room:
            writer.submit(record)
        elif writer is not None:
            saved = sum(bool(row.items or row.numbers) for row in now.rows.values())
            writer.skip(now.reserved, saved + dropped)


def _past_steps(backend: Backend, rank: int) -> NDArray[np.int64]:
    """Return [n, 3]: step, mode and mode step of what this worker logged in earlier attempts, if there is a run."""
    from smdbg.store.reader import StoredRun

    try:
        run = StoredRun(backend)
    except (RunNotFound, NotARun):
        return np.zeros((0, 3), np.int64)
    for damaged, message in run.damaged.items():
        if damaged[0] == rank:
            raise DamagedData(f"{message}; what was saved cannot be continued: use another URL")
    return run.log_rows(rank)[:, :3].copy()
