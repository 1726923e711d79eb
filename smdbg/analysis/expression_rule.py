"""Rules written as expressions in a pack: `when` judges every saved step, `expect` a run as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from smdbg.analysis.expression import parse
from smdbg.analysis.expression_nodes import (
    LOSS,
    TENSOR,
    Comparison,
    Literal,
    Name,
    Node,
    Other,
    Statistic,
    Value,
    comparisons_in,
    is_series,
    is_truth,
    names_in,
    walk,
)
from smdbg.analysis.expression_source import Reference, RunSource, resolve, statistics_of
from smdbg.analysis.expression_values import Evaluation, Number
from smdbg.analysis.findings import Facts, Ints, Kind
from smdbg.analysis.parameters import parameter
from smdbg.analysis.rule import Needs, Rule
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.view import View
from smdbg.errors import BadConfig, BadSelection
from smdbg.select import matcher
from smdbg.store.format import TensorInfo

__all__ = ["ExpressionRule", "with_reference"]

_MOST_FIGURES = 4


@dataclass(frozen=True, kw_only=True)
class ExpressionRule(RunRule):
    """A rule of a pack that is an expression: `when` is violated where it is true, `expect` where it is not.

    Raises BadConfig for an expression that cannot be read.
    """

    name: ClassVar[str] = "expression"

    when: str = parameter("", help="violated at each saved step where it is true")
    expect: str = parameter("", help="violated when it is not true of the run")
    each: tuple[str, ...] = parameter(
        (), help="tensors, collections, roles or globs: one verdict for each tensor, which is called tensor"
    )
    text: str = ""
    reference: Reference | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Read the expression, so that a wrong one is found when the pack is."""
        if bool(self.when) == bool(self.expect):
            raise BadConfig("an expression rule has either 'when' or 'expect'.")
        key = "when" if self.when else "expect"
        tree = self.tree
        if not is_truth(tree):
            raise BadConfig(f"'{key}' must say yes or no; write a comparison, such as x > 3.")
        if self.when and not is_series(tree):
            raise BadConfig("'when' judges every saved step, and this is one answer for the whole run; use 'expect'.")
        if self.expect and is_series(tree):
            raise BadConfig("'expect' needs one answer for the whole run, and this has one a step; write all(...).")
        names = list(names_in(tree))
        if not names:
            raise BadConfig(f"'{key}' names no tensor, collection or role.")
        if bool(self.each) != (Name(TENSOR) in names):
            raise BadConfig(f"'each' and the name {TENSOR!r} in the expression go together; one of them is missing.")
        for pattern in self.each:
            try:
                matcher(pattern)
            except BadSelection as error:
                raise BadConfig(str(error)) from None

    @cached_property
    def tree(self) -> Node:
        """The expression as nodes."""
        key, text = ("when", self.when) if self.when else ("expect", self.expect)
        try:
            return parse(text)
        except BadConfig as error:
            raise BadConfig(f"'{key}': {error}") from None

    def needs(self) -> Needs:
        """Ask for the statistics that the expression names."""
        return Needs(statistics=statistics_of(self.tree))

    def kinds(self) -> tuple[Kind, ...]:
        """Name what is compared, if it is one thing with one threshold."""
        first = next(iter(comparisons_in(self.tree)), None)
        if first is None:
            return (Kind(""),)
        left, right, operator = _sides(first)
        threshold = right.value if isinstance(right, Literal) else None
        return (Kind(left, threshold, lower_is_worse=("<" in operator) == bool(self.when)),)

    def applicable(self) -> str | None:
        """Say so where another run is needed."""
        if self.reference is None and any(isinstance(node, Other) for node in walk(self.tree)):
            return "it compares with another run: give --reference RUN"
        return None

    def select(self, catalogue: Mapping[str, TensorInfo]) -> list[str]:
        """Return the tensors that the names in the expression stand for."""
        allowed = set(self._allowed(catalogue))
        chosen: set[str] = set()
        for name in names_in(self.tree):
            chosen.update(() if name == Name(TENSOR) else resolve(name, catalogue, allowed))
        chosen.update(self._targets(catalogue) if self.each else ())
        return [name for name in catalogue if name in chosen]

    def looked_for(self) -> str:
        """Return the names in the expression."""
        names = [name.text for name in names_in(self.tree) if name != Name(TENSOR)]
        return " or ".join(dict.fromkeys([*names, *self.each]))

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each worker and mode by itself, and within it each tensor of `each`."""
        if not names:
            return Verdicts()
        answer = _Answer()
        try:
            for source in self._sources(view):
                self._judge(source, answer)
        except BadSelection as error:
            return Verdicts(not_applicable=str(error))
        return Verdicts(
            troubles=answer.troubles,
            judged=sorted(answer.judged),
            steps=max(map(len, answer.steps.values()), default=0),
            seen=max(map(len, answer.seen.values()), default=0),
            detail=answer.detail("is one that the expression needs" if self.expect else "had a value on both sides"),
        )

    def message(self, facts: Facts) -> str:
        """Say what was found, with the figures of both sides."""
        said = f"{self.text.rstrip('.')}: " if self.text else ""
        if self.expect:
            where = f"{facts.tensor}, up to step {facts.step}"
            return f"{said}{where}: {self.expect.strip()} was expected, and {facts.note}."
        found = facts.note or f"{self.when.strip()} holds"
        often = f"{facts.violations} of {facts.judged} judged steps"
        return f"{said}{facts.tensor} at step {facts.step}: {found} ({often})."

    def hint(self, facts: Facts) -> str:
        """Say where to look."""
        if facts.info.collection:
            return f"See `smdbg inspect {facts.tensor}`; if it is as it should be, change the expression in the pack."
        return f"See the tensors of {facts.tensor}; if they are as they should be, change the expression in the pack."

    def _allowed(self, catalogue: Mapping[str, TensorInfo]) -> list[str]:
        """Return the tensors that collections, roles and globs may stand for, as include, exclude, ... say."""
        return super().select(catalogue)

    def _targets(self, catalogue: Mapping[str, TensorInfo]) -> list[str]:
        """Return the tensors of `each`."""
        allowed = set(self._allowed(catalogue))
        found = {one for pattern in self.each for one in resolve(Name(pattern, quoted=True), catalogue, allowed)}
        return [name for name in catalogue if name in found]

    def _sources(self, view: View) -> Iterator[RunSource]:
        """Yield where to read, for each worker, mode and tensor."""
        allowed = set(self._allowed(view.catalogue))
        targets = self._targets(view.catalogue) if self.each else [""]

        def other(mode: str, worker: int, tensor: str) -> RunSource:
            return self._other(view, mode, worker, tensor)

        for worker in view.run.workers():
            if self.workers and worker not in self.workers:
                continue
            for mode in self.modes(view.run.modes()):
                for target in targets:
                    yield RunSource(view, mode, worker, allowed, target, other)

    def _other(self, view: View, mode: str, worker: int, tensor: str) -> RunSource:
        """Return the same worker, or else the first one, in the same mode of the reference run."""
        if self.reference is None:
            raise BadSelection("it compares with another run: give --reference RUN")
        other = self.reference.view().between(view.start, view.end)
        for collection in {other.catalogue[name].collection for name in self.select(other.catalogue)}:
            other.plan(collection, self.needs().statistics)
        workers = other.run.workers()
        rank = worker if worker in workers else min(workers, default=0)
        return RunSource(other, mode, rank, set(self._allowed(other.catalogue)), tensor, is_reference=True)

    def _judge(self, source: RunSource, answer: _Answer) -> None:
        """Judge one worker, mode and tensor."""
        evaluation = Evaluation(source)
        result = evaluation.of(self.tree)
        name = self._subject(source)
        involved = [one for name in names_in(self.tree, own=True) for one in source.names(name)]
        if isinstance(result, Number):
            used = _used(evaluation, self.tree)
            answer.see(source.worker, used)
            if result.missing or not len(used):
                return
            answer.judge(source.worker, used, involved)
            if result.value != 1:
                answer.troubles.append(self._trouble(evaluation, source, name, used[-1:], 1, None))
            return
        known = ~np.isnan(result.values)
        answer.see(source.worker, result.steps)
        if not known.any():
            return
        answer.judge(source.worker, result.steps[known], involved)
        bad = result.steps[result.values == 1]
        if len(bad):
            clean = result.steps[(result.values == 0) & (result.steps < bad[0])]
            before = int(clean[-1]) if len(clean) else None
            answer.troubles.append(self._trouble(evaluation, source, name, bad, int(known.sum()), before))

    def _subject(self, source: RunSource) -> str:
        """Return what a finding is about: the first name of the expression, as the tensor if it stands for one."""
        if self.each:
            return source.tensor
        first = next(names_in(self.tree, own=True), None) or next(names_in(self.tree))
        found = resolve(first, source.view.catalogue, source.allowed)
        if first == Name(LOSS) and len(found) > 1:
            return source.view.course(source.worker).loss_name or first.text
        return found[0] if len(found) == 1 else first.text

    def _trouble(
        self, evaluation: Evaluation, source: RunSource, name: str, bad: Ints, judged: int, before: int | None
    ) -> Trouble:
        """Return what was found: `bad` are the steps, the last one alone for a run as a whole."""
        return Trouble(
            tensor=name,
            worker=source.worker,
            mode=source.mode,
            step=int(bad[0]),
            last_step=int(bad[-1]),
            violations=len(bad),
            judged=judged,
            worst=self._worst(evaluation, bad),
            before=before,
            note=self._figures(evaluation, int(bad[0])),
        )

    def _worst(self, evaluation: Evaluation, bad: Ints) -> float:
        """Return the value of what is compared first, where it is furthest on the wrong side."""
        first = next(iter(comparisons_in(self.tree)), None)
        if first is None:
            return math.nan
        value = evaluation.of(first.right if isinstance(first.left, Literal) else first.left)
        if isinstance(value, Number):
            return value.value
        values = value.values[np.isin(value.steps, bad)]
        values = values[~np.isnan(values)]
        if not len(values):
            return math.nan
        return float(values.min() if self.kinds()[0].lower_is_worse else values.max())

    def _figures(self, evaluation: Evaluation, step: int) -> str:
        """Return the values on both sides of each comparison, in words."""
        found: dict[str, str] = {}
        for one in comparisons_in(self.tree):
            for node, text in ((one.left, one.left_text), (one.right, one.right_text)):
                if not isinstance(node, Literal):
                    found[text] = f"{text} is {_at(evaluation, node, step)}"
        if not found and self.expect:
            return "that is not so"
        return _listed(list(found.values())[:_MOST_FIGURES])


class _Answer:
    """What comes of the workers, modes and tensors of a run, in the making; steps are kept by worker."""

    def __init__(self) -> None:
        self.troubles: list[Trouble] = []
        self.judged: set[str] = set()
        self.steps: dict[int, set[int]] = {}
        self.seen: dict[int, set[int]] = {}

    def see(self, worker: int, steps: Ints) -> None:
        """Note steps that there were."""
        self.seen.setdefault(worker, set()).update(steps.tolist())

    def judge(self, worker: int, steps: Ints, names: Sequence[str]) -> None:
        """Note steps and tensors that were judged."""
        self.steps.setdefault(worker, set()).update(steps.tolist())
        self.judged.update(names)

    def detail(self, lack: str) -> str:
        """Say why nothing could be judged, '' if something was."""
        if any(self.steps.values()):
            return ""
        seen = max(map(len, self.seen.values()), default=0)
        return f"of {seen} saved steps none {lack}"


def with_reference(
    rules: Sequence[Rule], url: str, storage_options: Mapping[str, Any] | None = None
) -> list[Rule]:
    """Return the rules with a run to compare with, which `ref(...)` in expressions stands for.

    It is opened when the first of them needs it.
    """
    reference = Reference(url, storage_options)
    return [replace(rule, reference=reference) if isinstance(rule, ExpressionRule) else rule for rule in rules]


def _used(evaluation: Evaluation, tree: Node) -> Ints:
    """Return the steps that functions went over; where they found none, those that there were."""
    used = np.unique(np.concatenate([np.zeros(0, np.int64), *evaluation.used]))
    if len(used):
        return used
    leaves = [evaluation.series(node).steps for node in walk(tree) if isinstance(node, Value | Statistic)]
    return np.unique(np.concatenate(leaves))


def _sides(one: Comparison) -> tuple[str, Node, str]:
    """Return the text of what is compared, what with, and how, with a number written out on the right."""
    if not isinstance(one.left, Literal):
        return one.left_text, one.right, one.operator
    turned = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}.get(one.operator, one.operator)
    return one.right_text, one.left, turned


def _at(evaluation: Evaluation, node: Node, step: int) -> str:
    """Return the value of a node at a step, as text."""
    value = evaluation.of(node)
    return f"{value.value if isinstance(value, Number) else value.at(step):.4g}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
