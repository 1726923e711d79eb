"""Rules that look at a run step by step, as those of smdebug do.

The fields of the class are its parameters; `invoke_at_step` is called for each saved step in turn and returns True
where the step violates the rule. Such a rule reads tensor by tensor and is slower than one that judges blocks
(smdbg.analysis.rule), and much less is asked of who writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from smdbg.analysis.reductions import STATISTICS
from smdbg.analysis.rule import Facts, Kind, Needs
from smdbg.analysis.run import Run
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.trial import (
    ModeKeys,
    RuleEvaluationConditionMet,
    StepUnavailable,
    Tensor,
    TensorUnavailable,
    TensorUnavailableForStep,
    Trial,
    modes,
)
from smdbg.analysis.view import View
from smdbg.errors import OnlyStatistics, SmdbgError, StepNotSaved, TensorNotFound

__all__ = [
    "ModeKeys",
    "RuleEvaluationConditionMet",
    "StepRule",
    "StepUnavailable",
    "TensorUnavailable",
    "TensorUnavailableForStep",
    "modes",
]

UNNAMED = "the run"  # stands for the tensor where a step is violated and none was read at it

_NOT_THERE = (TensorNotFound, StepNotSaved, OnlyStatistics)
_Read = tuple[str, int]  # tensor and rank


class RequiredTensors:
    """What a rule said in `set_required_tensors` that it reads at a step; where a part is missing it is not invoked."""

    def __init__(self, trial: Trial) -> None:
        """Require nothing yet."""
        self._trial = trial
        self._steps: dict[str, list[int]] = {}

    def add(self, name: str, steps: Sequence[int], should_match_regex: bool = False) -> None:
        """Require a tensor, or those in whose name a regular expression is found, at some steps."""
        names = self._trial.tensor_names(regex=name) if should_match_regex else [self._trial.tensor(name).name]
        for one in names:
            self._steps.setdefault(one, []).extend(steps)

    def get(self) -> list[Tensor]:
        """Return the tensors."""
        return [self._trial.tensor(name) for name in self._steps]

    def get_names(self) -> list[str]:
        """Return their names."""
        return list(self._steps)

    def get_tensor_steps(self, name: str) -> list[int]:
        """Return the steps at which a tensor is required."""
        return self._steps[name]

    def demand(self) -> None:
        """Raise TensorUnavailableForStep for what is not there."""
        for name, steps in self._steps.items():
            for step in steps:
                if not self._trial.tensor(name).saved_at(step):
                    raise TensorUnavailableForStep(f"{name!r} was not saved at step {step}")

    def clear(self) -> None:
        """Require nothing again."""
        self._steps.clear()


@dataclass(frozen=True)
class Scene:
    """What a rule sees while it judges one run."""

    run: Run
    trial: Trial
    required: RequiredTensors
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StepRule(RunRule):
    """Base of the rules that look at a run step by step.

    Of a step that returns True the finding is about the tensor that was read last: a loop over tensors that returns at
    the first bad one names that one. A step at which a tensor that is asked for was not saved is not judged.
    """

    scene: Scene | None = field(default=None, repr=False, compare=False)

    def invoke_at_step(self, step: int) -> bool:
        """Return True where the step (a global one) violates the rule."""
        raise NotImplementedError(f"The rule {self.name} has no invoke_at_step().")

    def set_required_tensors(self, step: int) -> None:
        """Say what is read at a step by `self.req_tensors.add(name, steps=[step])`; may be left out."""

    @property
    def base_trial(self) -> Trial:
        """Return the run as smdebug shows it, up to the current step."""
        return self._scene.trial

    @property
    def run(self) -> Run:
        """Return the run as smdbg shows it."""
        return self._scene.run

    @property
    def req_tensors(self) -> RequiredTensors:
        """Return what set_required_tensors asked for."""
        return self._scene.required

    @property
    def state(self) -> dict[str, Any]:
        """Return a dict for what the rule keeps from step to step; empty at the first."""
        return self._scene.state

    @property
    def _scene(self) -> Scene:
        if self.scene is None:
            raise SmdbgError(f"The rule {self.name} sees a run only while it is being checked.")
        return self.scene

    def needs(self) -> Needs:
        """Have the statistics read together that most reductions are made of."""
        return Needs(statistics=STATISTICS)

    def kinds(self) -> tuple[Kind, ...]:
        """Count steps: one violates the rule or not."""
        return (Kind("violated steps"),)

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Invoke the rule at each saved step, and put together what it said of each tensor."""
        ranks = [rank for rank in view.run.workers() if not self.workers or rank in self.workers]
        trial = Trial(view, names, ranks)
        rule = replace(self, scene=Scene(view.run, trial, RequiredTensors(trial)))
        steps = [step for step in trial.all_steps() if self.mode in (None, trial.mode(step))]
        tally, why, judged, skipped = _Tally(min(ranks, default=0)), "", 0, 0
        for step, answer, reason, end in _answers(rule, trial, steps):
            if answer is None:
                why, skipped = why or reason, skipped + 1
            else:
                judged += 1
                tally.add(step, str(trial.mode(step)), answer, list(trial.read))
            if end:
                break
        detail = f"{skipped} of {len(steps)} steps could not be judged: {why}" if skipped else ""
        if not steps:
            detail = "saw no saved step"
        return Verdicts(troubles=tally.troubles(), judged=tally.names(), steps=judged, seen=len(steps), detail=detail)

    def message(self, facts: Facts) -> str:
        """Say where, and how often."""
        often = f"{facts.violations} of {facts.judged} judged steps"
        return f"{facts.tensor} violates {self.label} at step {facts.step} ({often})."


def _answers(rule: StepRule, trial: Trial, steps: Sequence[int]) -> Iterator[tuple[int, bool | None, str, bool]]:
    """Yield (step, what the rule said of it, why it could say nothing, whether it said that this is the end)."""
    for step in steps:
        trial.now = step
        trial.read.clear()
        rule.req_tensors.clear()
        try:
            rule.set_required_tensors(step)
            rule.req_tensors.demand()
            yield step, bool(rule.invoke_at_step(step)), "", False
        except RuleEvaluationConditionMet as met:
            yield step, True, "", met.end_of_rule
        except _NOT_THERE as error:
            yield step, None, str(error), False


@dataclass
class _Tally:
    """Counts, for each mode, tensor and worker, the steps at which it was read and those at which it was to blame."""

    rank: int  # that a step is told of at which no tensor was read
    judged: dict[tuple[str, _Read], list[int]] = field(default_factory=dict)
    blamed: dict[tuple[str, _Read], list[int]] = field(default_factory=dict)

    def add(self, step: int, mode: str, violated: bool, read: Sequence[_Read]) -> None:
        """Take in one step: the tensors that were read at it, in order, and if it violates the rule."""
        read = read or [(UNNAMED, self.rank)]
        for one in read:
            self.judged.setdefault((mode, one), []).append(step)
        if violated:
            self.blamed.setdefault((mode, read[-1]), []).append(step)

    def names(self) -> list[str]:
        """Return the names of the tensors that were read."""
        return list(dict.fromkeys(name for _, (name, _) in self.judged if name != UNNAMED))

    def troubles(self) -> list[Trouble]:
        """Return one for each tensor that was to blame."""
        found = []
        for (mode, (name, rank)), steps in self.blamed.items():
            judged = self.judged[mode, (name, rank)]
            found.append(
                Trouble(
                    tensor=name,
                    worker=rank,
                    mode=mode,
                    step=steps[0],
                    last_step=steps[-1],
                    violations=len(steps),
                    judged=len(judged),
                    worst=float(len(steps)),
                    before=max((step for step in judged if step < steps[0]), default=None),
                )
            )
        return found
