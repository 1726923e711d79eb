"""Who made the first NaN or infinity, and whom it reached: producers and propagators over steps, order and workers.

Every tensor that ever held a value that is not finite is a link. One that went bad while nothing before it in the order
of execution was bad is a producer; any other is a propagator, and names what was bad before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from smdbg.analysis.cause import linear, unsettled
from smdbg.analysis.clock import TRAINING, Clock
from smdbg.analysis.findings import Bools, Floats, Ints
from smdbg.analysis.place import (
    BACKWARD,
    FIRST,
    FORWARD,
    OPTIMIZER,
    UNKNOWN,
    UPDATE,
    Place,
    Places,
    before_update,
    is_gradient_norm,
    phase,
    places_of,
)
from smdbg.analysis.run import Run
from smdbg.analysis.table import Table
from smdbg.analysis.view import View
from smdbg.store.format import FLAG_SKIPPED, TensorInfo

NOT_FINITE = ("nan", "posinf", "neginf")
STATISTICS = (*NOT_FINITE, "count", "abs_max", "l2")
PRODUCER, PROPAGATOR = "producer", "propagator"


@dataclass(frozen=True)
class Sick:
    """One tensor of one worker and mode that was not finite at some saved step.

    `onset`: (last clean saved step or None, first bad one); `interval`: (after step, up to step) in which it was made
    bad; `last`: the last bad step; counts are those of elements at the first bad step.
    """

    info: TensorInfo
    worker: int
    mode: str
    onset: tuple[int | None, int]
    interval: tuple[int, int]
    last: int
    nan: int
    posinf: int
    neginf: int
    count: int
    ever_nan: bool

    @property
    def name(self) -> str:
        """Return the tensor's name."""
        return self.info.name


@dataclass(frozen=True)
class Link:
    """A bad tensor in the chain. `after` is what was bad before it, None for a producer.

    `undecided`: the saved steps cannot tell whether `after` really was bad before it; of a producer, whether really
    nothing was.
    """

    sick: Sick
    after: Sick | None = None
    undecided: bool = False

    @property
    def verdict(self) -> str:
        """Return `producer` or `propagator`."""
        return PRODUCER if self.after is None else PROPAGATOR


@dataclass(frozen=True)
class Chain:
    """All links in causal order; `first` is the producer that everything began with.

    `undecided`: links that may, for all the saved steps tell, have gone bad before `first`; `window`: (after step, up
    to step), the steps that would have to be saved to know. `remarks` say what was left out and why.
    """

    links: tuple[Link, ...] = ()
    first: Link | None = None
    undecided: tuple[Link, ...] = ()
    window: tuple[int, int] | None = None
    remarks: tuple[str, ...] = ()
    places: Places = field(default_factory=lambda: places_of({}))
    clock: Clock = field(default_factory=Clock)

    def back_from(self, link: Link) -> list[Link]:
        """Return the links from the producer to this one."""
        by_sick = {id(one.sick): one for one in self.links}
        found = [link]
        while found[-1].after is not None:
            found.append(by_sick[id(found[-1].after)])
        return found[::-1]


def view_of(run: Run) -> View:
    """Return a view of the run that reads what `chain_of` needs together."""
    view = View(run, {name: run.tensor(name).info for name in run.tensors()})
    for collection in run.collections():
        view.plan(collection, STATISTICS)
    return view


def chain_of(view: View) -> Chain:
    """Return the chain of all that was not finite in a run; empty where everything was finite."""
    run = view.run
    clock = Clock({worker: view.log(worker) for worker in run.workers()})
    places = places_of(view.catalogue)
    found: list[Sick] = []
    remarks: dict[str, None] = {}
    names = [name for name, info in view.catalogue.items() if info.role != "mask"]
    for worker in run.workers():
        for mode in run.modes():
            table = view.table(names, STATISTICS, mode, worker)
            if len(table.steps):
                found += _sick(view, table, clock, remarks)
    keys = [(*_rank(one, places), one.interval[1], _position(one, places), one.worker, one.mode) for one in found]
    sick = [found[index] for index in linear([one.interval for one in found], keys)]
    links = _links(sick, places, _forward_crosses(run))
    return _chain(links, places, clock, tuple(remarks))


def _chain(links: Sequence[Link], places: Places, clock: Clock, remarks: tuple[str, ...]) -> Chain:
    """Choose the producer that matters: an infinity that nobody took over, while others were, is none."""
    if not links:
        return Chain(remarks=remarks, places=places, clock=clock)
    followed = {id(link.after) for link in links if link.after is not None}
    producers = [link for link in links if link.after is None]
    telling = [link for link in producers if link.sick.ever_nan or id(link.sick) in followed]
    first = (telling or producers)[0]
    open_ones = [one for one in links if one is not first and _unsettled(first.sick, one.sick, places)]
    window = None
    if open_ones:
        window = min(one.sick.interval[0] for one in (first, *open_ones)), first.sick.interval[1]
    return Chain(tuple(links), first, tuple(open_ones), window, remarks, places, clock)


def _unsettled(one: Sick, other: Sick, places: Places) -> bool:
    """Tell whether the saved steps leave open which of two tensors went bad first."""
    return unsettled((*one.interval, _rank(one, places)), (*other.interval, _rank(other, places)))


def _position(one: Sick, places: Places) -> int:
    return places.position.get(one.name, len(places.position))


def _rank(one: Sick, places: Places) -> Place:
    """Return the place in a step. Of tensors with no known order, those saved first are taken to come first."""
    part, unknown, order = places.of(one.name)
    by_saving = part in (FIRST, FORWARD, UNKNOWN) and unknown
    return part, unknown, _position(one, places) if by_saving else order


def _sick(view: View, table: Table, clock: Clock, remarks: dict[str, None]) -> list[Sick]:
    """Return the tensors of one worker and mode that were not finite at some step."""
    numbers = {name: np.nan_to_num(table.statistics[name]) for name in NOT_FINITE}
    bad: Bools = np.asarray(sum(numbers.values()) > 0) & table.present
    bad = _without_skipped(view, table, bad, remarks)
    found = []
    norm = _finite_norms(table, bad)
    for column in np.flatnonzero(bad.any(axis=0)).tolist():
        info = table.infos[column]
        if _by_design(info, table.present[:, column], bad[:, column], {n: m[:, column] for n, m in numbers.items()}):
            text = f"{info.name} holds the same infinities at every saved step, as a mask does"
            remarks[f"{text}: left out."] = None
            continue
        rows = np.flatnonzero(bad[:, column])
        row = int(rows[0])
        earlier = np.flatnonzero(table.present[:row, column])
        onset = (int(table.steps[earlier[-1]]) if len(earlier) else None, int(table.steps[row]))
        interval = clock.interval(table.worker, table.mode, onset, before_update(info))
        if phase(info) == BACKWARD and view.catalogue.get(info.of, info).optimizer_group is not None:
            # The norm over all gradients is often saved at every step; where it is finite, each of them is.
            until = int(norm[norm < onset[1]].max(initial=-1))
            interval = max(interval[0], until), interval[1]
        nan, posinf, neginf = (int(numbers[name][row, column]) for name in NOT_FINITE)
        found.append(
            Sick(
                info=info,
                worker=table.worker,
                mode=table.mode,
                onset=onset,
                interval=interval,
                last=int(table.steps[rows[-1]]),
                nan=nan,
                posinf=posinf,
                neginf=neginf,
                # Of a number that was recorded several times in a step, `count` says how often.
                count=1 if info.shape == () else int(table.statistics["count"][row, column]),
                ever_nan=bool((numbers["nan"][:, column] > 0).any()),
            )
        )
    return found


def _finite_norms(table: Table, bad: Bools) -> Ints:
    """Return the steps at which the norm over all gradients was finite; none where there are several optimizers."""
    columns = [column for column, info in enumerate(table.infos) if is_gradient_norm(info)]
    if len(columns) != 1:
        return np.zeros(0, np.int64)
    return table.steps[table.present[:, columns[0]] & ~bad[:, columns[0]]]


def _without_skipped(view: View, table: Table, bad: Bools, remarks: dict[str, None]) -> Bools:
    """Return `bad` without gradients that the optimizer did not use: loss scaling overflows now and then by design."""
    log = view.log(table.worker)
    skipped = np.isin(table.steps, log.step[(log.flags & FLAG_SKIPPED) != 0])
    taken = np.array([phase(info) in (BACKWARD, OPTIMIZER, UPDATE) for info in table.infos], np.bool_)
    out = skipped[:, None] & taken & bad
    if not out.any():
        return bad
    steps = int(out.any(axis=1).sum())
    whose = f" of worker {table.worker}" if len(view.run.workers()) > 1 else ""
    remarks[
        f"At {steps} saved step{'' if steps == 1 else 's'}{whose} the optimizer skipped its update and gradients were "
        "not finite, as loss scaling brings about: left out."
    ] = None
    return bad & ~out


def _by_design(info: TensorInfo, present: Bools, bad: Bools, numbers: dict[str, Floats]) -> bool:
    """Tell whether a tensor of the forward pass holds infinities, the same number of them, whenever it was saved."""
    rows = np.flatnonzero(present)
    if phase(info) not in (FIRST, FORWARD, UNKNOWN) or len(rows) < 2 or not bad[rows].all():
        return False
    same = all(len(np.unique(numbers[name][rows])) == 1 for name in ("posinf", "neginf"))
    return same and not numbers["nan"][rows].any()


def _forward_crosses(run: Run) -> bool:
    """Tell whether one worker's forward pass feeds another's: tensor, pipeline, expert or context parallel."""
    return any(key != "dp" and value for facts in run.attempts() for key, value in facts.mesh.items())


def _links(sick: Sequence[Sick], places: Places, crosses: bool) -> list[Link]:
    """Find for each bad tensor, given in causal order, what was bad before it."""
    if not sick:
        return []
    lo, hi = (np.array([one.interval[end] for one in sick]) for end in (0, 1))
    last = np.array([one.last for one in sick])
    ever_nan = np.array([one.ever_nan for one in sick])
    worker = np.array([one.worker for one in sick])
    modes = np.array([one.mode for one in sick])
    ranks = [_rank(one, places) for one in sick]
    by_rank = {rank: index for index, rank in enumerate(sorted(set(ranks)))}
    order = np.array([by_rank[rank] for rank in ranks])
    training = np.isin(modes, TRAINING)
    links = []
    for index, one in enumerate(sick):
        earlier = hi <= lo[index]
        together = ~earlier & (lo < hi[index]) & (order < order[index])
        if not crosses and ranks[index][0] < BACKWARD:
            together &= worker == one.worker  # workers meet in the backward pass
        # An infinity that had been there for more than a step while this tensor stayed finite did it no harm.
        able = (last >= lo[index]) & (ever_nan | (hi + 1 >= lo[index]))
        chosen = np.flatnonzero((earlier | together) & able & (training | (modes == one.mode)))
        nearest = max(chosen.tolist(), key=lambda at: (*_kin(sick[at], one), at), default=None)
        before = None if nearest is None else sick[nearest]
        # As `unsettled` has it, against all at once.
        it_first = (lo[index] + 1 < hi) | ((lo[index] + 1 == hi) & (order[index] < order))
        other_first = (lo + 1 < hi[index]) | ((lo + 1 == hi[index]) & (order < order[index]))
        open_ones = it_first & other_first
        open_ones[index] = False
        links.append(Link(one, before, bool(open_ones.any() if nearest is None else open_ones[nearest])))
    return links


def _kin(first: Sick, second: Sick) -> tuple[bool, bool]:
    """Tell whether one tensor is made from the other in particular, and whether both are of one worker."""
    part, before = phase(second.info), phase(first.info)
    if part == FORWARD:
        direct = bool(first.info.module) and first.info.module == second.info.module
    else:
        parameters = {first.info.of or first.name, second.info.of or second.name}
        direct = part > BACKWARD and before >= BACKWARD and len(parameters) == 1
    return direct and second.interval[0] - first.interval[1] <= 1, first.worker == second.worker
