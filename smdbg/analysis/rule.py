"""What a rule is, what it is given, and what it answers.

A rule is a frozen dataclass in a file of its own under smdbg.rules: its fields are its parameters, `needs` says what
to read, `evaluate` judges a block of consecutive saved steps at once. The checker (smdbg.analysis.checker) reads,
cuts the blocks and folds the judgements into findings; a rule never reads or counts by itself.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from smdbg import select
from smdbg.analysis.findings import (
    NO_STEP,
    Bools,
    Facts,
    Finding,
    Floats,
    Ints,
    Kind,
    Outcome,
    Severity,
)
from smdbg.analysis.parameters import Parameter, build, parameter, parameters_of
from smdbg.errors import RuleNotFound, SmdbgError, near
from smdbg.store.format import MODES, TensorInfo

if TYPE_CHECKING:
    from smdbg.analysis.course import Course

__all__ = [
    "NO_STEP",
    "Block",
    "Bools",
    "Facts",
    "Finding",
    "Floats",
    "Ints",
    "Judgement",
    "Kind",
    "Needs",
    "Outcome",
    "Parameter",
    "Rule",
    "Sample",
    "Severity",
    "State",
    "all_rules",
    "build",
    "find_rule",
    "parameter",
    "parameters_of",
    "persistent",
    "summary_of",
]

State = dict[str, Any]  # what a rule keeps from block to block: JSON-able


@dataclass(frozen=True)
class Needs:
    """What a rule reads: statistics by name, or values; of tensors with these roles or in these collections.

    A statistic of a tensor that belongs to the judged one is written with its role: `gradient.l2`, `update.zeros`,
    `parameter.l2` (of the parameter that a gradient or update belongs to). `values`: the rule's `measure` is given the
    full values, with `history` earlier ones; a rule without one reads them itself, by `Block.value`. `tensors` is
    False for a rule that judges none (but the log). `look_back` is how many earlier rows a block brings along, and
    `minimum` how many saved steps a verdict takes.
    """

    statistics: tuple[str, ...] = ()
    values: bool = False
    history: int = 0
    tensors: bool = True
    roles: tuple[str, ...] = ()
    collections: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    look_back: int = 0
    minimum: int = 1

    def record(self) -> dict[str, Any]:
        """Return the fields as JSON-able data."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}


@dataclass(frozen=True)
class Sample:
    """The full value of one tensor at one saved step, and up to `Needs.history` earlier (step, value), oldest first.

    Only values that were kept count, of one worker and mode; `first` tells that there are no earlier ones at all.
    """

    info: TensorInfo
    step: int
    value: npt.NDArray[Any]
    earlier: tuple[tuple[int, npt.NDArray[Any]], ...] = ()

    @property
    def first(self) -> bool:
        """Tell whether this is the first value that was kept."""
        return not self.earlier


@dataclass(frozen=True)
class Block:
    """Consecutive rows of the selected tensors on one worker in one mode.

    steps, mode_steps: int64[rows]; present: bool[rows, tensors]; rows before `first` are look-back, judged already.
    `measures` holds what the rule's `measure` made of the full values, by (step, column).
    """

    worker: int
    mode: str
    names: tuple[str, ...]
    infos: tuple[TensorInfo, ...]
    steps: Ints
    mode_steps: Ints
    present: Bools
    first: int
    statistics: Mapping[str, Floats]
    measures: Mapping[tuple[int, int], Floats] = field(default_factory=dict)
    read: Callable[[str, int], Any] | None = None

    def stat(self, name: str) -> Floats:
        """Return a statistic as float64[rows, tensors]: NaN where absent, and where it has no value."""
        if name not in self.statistics:
            raise SmdbgError(f"The rule asks for the statistic {name!r} and does not name it in its needs().")
        return self.statistics[name]

    def value(self, row: int, tensor: int) -> Any:
        """Return the full value (ndarray) of one tensor at one row, read now; OnlyStatistics where none was kept."""
        if self.read is None:
            raise SmdbgError("The rule asks for values and does not say so in its needs().")
        return self.read(self.names[tensor], int(self.steps[row]))

    def measured(self, row: int, column: int) -> Floats | None:
        """Return what `measure` made of the value at a row and column; None where no value was kept."""
        return self.measures.get((int(self.steps[row]), column))


@dataclass(frozen=True)
class Judgement:
    """A rule's answer for every row and tensor of a block: arrays [rows, tensors].

    judged: a verdict was possible; violated: and it is bad; worst: the value that is compared; kind: index into the
    rule's kinds(). Where trouble begins before the row that proves it, `since` is the step at which it did and
    `before` the last clean step (NO_STEP: none); without them it is the row's own step and the last clean row.
    notes: (row, column) -> text for the message.
    """

    judged: Bools
    violated: Bools
    worst: Floats
    kind: Ints | None = None
    since: Ints | None = None
    before: Ints | None = None
    notes: Mapping[tuple[int, int], str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Base of all rules; the fields are the parameters that every rule has."""

    name: ClassVar[str] = ""

    instance: str = ""
    include: tuple[str, ...] = parameter(
        (), help="tensors to judge (globs, re: expressions), instead of those the rule picks; adds to collections"
    )
    exclude: tuple[str, ...] = parameter((), help="tensors to leave out (globs, re: expressions)")
    collections: tuple[str, ...] = parameter(
        (), help="collections to judge, instead of the tensors the rule picks; adds to include"
    )
    roles: tuple[str, ...] = parameter(
        (), help="roles to judge, instead of the tensors the rule picks; adds to include and collections"
    )
    exclude_roles: tuple[str, ...] = parameter(
        (), help="roles to leave out, also as the role of the parameter that a gradient or update belongs to"
    )
    mode: str | None = parameter(None, choices=MODES, help="judge this mode only; none: each mode by itself")
    workers: tuple[int, ...] = parameter((), help="ranks to judge; empty: all")
    start_step: int = parameter(0, unit="steps", minimum=0, help="first global step to judge")
    end_step: int | None = parameter(None, unit="steps", minimum=0, help="judge global steps before this one")
    severity: Severity = parameter(Severity.ERROR, help="how bad a finding is")

    @property
    def label(self) -> str:
        """Return the name that findings carry: the instance's, or else the rule's."""
        return self.instance or self.name

    def needs(self) -> Needs:
        """Return what the rule reads."""
        return Needs()

    def kinds(self) -> tuple[Kind, ...]:
        """Return the ways in which the rule can be violated."""
        return (Kind(""),)

    def applicable(self) -> str | None:
        """Return why the rule cannot judge with its parameters, None when it can."""
        return None

    def modes(self, present: Sequence[str]) -> list[str]:
        """Return the modes to judge, of those that are present in the run."""
        return [mode for mode in present if self.mode in (None, mode)]

    def select(self, catalogue: Mapping[str, TensorInfo]) -> list[str]:
        """Return the names of the tensors to judge, in catalogue order."""
        chosen = {name for name, info in catalogue.items() if self.picks(info)}
        if self.include or self.collections or self.roles:
            chosen = {
                name
                for name, info in catalogue.items()
                if info.role in self.roles or _in_collections(info, self.collections)
            }
            chosen.update(select.select(catalogue, self.include) if self.include else ())
        return [
            name
            for name in select.select(catalogue, (), self.exclude)
            if name in chosen and not self._excluded_role(catalogue[name], catalogue)
        ]

    def picks(self, info: TensorInfo) -> bool:
        """Tell whether the rule judges a tensor when the user names none: by role or collection, else all."""
        needs = self.needs()
        if not needs.roles and not needs.collections:
            return True
        return info.role in needs.roles or _in_collections(info, needs.collections)

    def looked_for(self) -> str:
        """Return in words which tensors the rule looks for."""
        needs = self.needs()
        if self.include or self.collections or self.roles:
            parts = [*self.include, *(f"collection {name}" for name in self.collections)]
            parts += [f"role {name}" for name in self.roles]
        else:
            parts = [f"role {name}" for name in needs.roles] + [f"collection {name}" for name in needs.collections]
        return " or ".join(parts) or "any tensor"

    def evaluate(self, block: Block, state: State) -> tuple[Judgement, State]:
        """Judge a block, given the state left by the block before ({} at first), and return the next state."""
        raise NotImplementedError(f"The rule {self.name} has no evaluate().")

    def measure(self, sample: Sample) -> Floats | None:
        """Return the few numbers (float64[n]) that the rule wants to know of one full value; it may run in any thread.

        Only asked where `needs().values` is set, and once for each value that was kept.
        """
        raise NotImplementedError(f"The rule {self.name} has no measure().")

    def grade(self, facts: Facts, course: Course) -> Severity:
        """Return how bad a finding is, given how the training as a whole went; the parameter `severity` by default."""
        return self.severity

    def message(self, facts: Facts) -> str:
        """Return one or two sentences with tensor, step and figures."""
        return f"{facts.tensor} violates {self.label} at step {facts.step}."

    def hint(self, facts: Facts) -> str:
        """Return what to do about a finding, in a sentence."""
        return ""

    def _excluded_role(self, info: TensorInfo, catalogue: Mapping[str, TensorInfo]) -> bool:
        """Tell whether the tensor, or the parameter it belongs to, has a role that is left out."""
        roles = {info.role}
        if info.of in catalogue:
            roles.add(catalogue[info.of].role)
        elif "Embedding" in info.module_class:
            roles.add("embedding")
        return not roles.isdisjoint(self.exclude_roles)


def _in_collections(info: TensorInfo, collections: Sequence[str]) -> bool:
    """Tell whether a tensor lives in one of the collections or is tagged with one."""
    return info.collection in collections or not set(info.tags).isdisjoint(collections)


def persistent(block: Block, now: Judgement, repeats: int, within: int, state: State) -> tuple[Judgement, State]:
    """Demand that a symptom show at `repeats` of a tensor's last `within` judged steps, this one among them.

    Onset is where those began. The state holds, per tensor, the last judged steps with 1 for a symptom.
    """
    if within <= 1:
        return now, state
    first, steps = block.first, block.steps[block.first :]
    held = [state.get(name, []) for name in block.names]
    judged, bad = now.judged[first:], now.judged[first:] & now.violated[first:]
    rank = np.cumsum(judged, axis=0, dtype=np.int32) + np.array([len(past) for past in held], np.int32)
    enough, violated = np.zeros_like(now.judged), np.zeros_like(now.violated)
    enough[first:] = judged & (rank >= within)
    since, before = np.full(violated.shape, NO_STEP, np.int64), np.full(violated.shape, NO_STEP, np.int64)
    # Where nothing is wrong, which is the rule, columns are not looked at one by one.
    whole = judged.all(axis=0) & ~bad.any(axis=0) & np.array([not any(hit for _, hit in past) for past in held], bool)
    quiet = [[step, 0] for step in steps[-within - 1 :].tolist()]
    later: State = {}
    for column, name in enumerate(block.names):
        if whole[column] and len(quiet) > within:
            later[name] = quiet
            continue
        rows = np.flatnonzero(judged[:, column])
        past = np.array(held[column], np.int64).reshape(-1, 2)
        known = np.concatenate([past[:, 0], steps[rows]])
        hit = np.concatenate([past[:, 1], bad[rows, column]])
        total = np.concatenate([[0], np.cumsum(hit)])
        ends = np.arange(len(past), len(hit)) + 1
        found = (total[ends] - total[np.maximum(ends - within, 0)] >= repeats) & (hit[len(past) :] > 0)
        violated[first + rows, column] = found
        enough[first + rows[found], column] = True
        for row, end in zip(first + rows[found], ends[found], strict=True):
            start = max(end - within, 0)
            began = start + int(hit[start:end].argmax())
            since[row, column] = known[began]
            if began and not hit[began - 1]:
                before[row, column] = known[began - 1]
        later[name] = np.stack([known, hit], axis=1)[-within - 1 :].tolist()
    return Judgement(enough, violated, now.worst, now.kind, since, before, now.notes), later


def all_rules() -> list[str]:
    """Return the names of the rules that come with smdbg, sorted; none is imported."""
    package = importlib.import_module("smdbg.rules")
    return sorted(
        module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg and module.name[0] != "_"
    )


def find_rule(name: str, extra: Mapping[str, type[Rule]] | None = None) -> type[Rule]:
    """Return the class of the rule called `name`, also of those in `extra` (smdbg.analysis.plugins.known_rules).

    Raises RuleNotFound with near names when there is none.
    """
    known = all_rules()
    if name not in known:
        if extra is not None and name in extra:
            return extra[name]
        hint = near(name.lower(), [*known, *(extra or ())])
        raise RuleNotFound(f"There is no rule {name!r}.{hint} `smdbg rules` lists them all.")
    module = importlib.import_module(f"smdbg.rules.{name}")
    for item in vars(module).values():
        if isinstance(item, type) and issubclass(item, Rule) and item.name == name:
            return item
    raise RuleNotFound(f"The file of rule {name!r} holds no rule class of that name.")


def summary_of(rule_class: type[Rule]) -> str:
    """Return the first line of a rule's docstring."""
    return (inspect.getdoc(rule_class) or "").partition("\n")[0]
