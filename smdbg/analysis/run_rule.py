"""Rules that judge a run as a whole: those that compare modes, workers or runs, or that read the commit log.

Most rules judge blocks of saved steps (smdbg.analysis.rule). One that needs the series from its first to its last
step at once is a `RunRule`: it is given a view of the run and returns its verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smdbg.analysis.findings import Severity
from smdbg.analysis.rule import Block, Judgement, Rule, State
from smdbg.errors import SmdbgError

if TYPE_CHECKING:
    from smdbg.analysis.view import View

__all__ = ["RunRule", "Trouble", "Verdicts"]


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """What a rule found wrong with one tensor on one worker in one mode; steps are global.

    `step` is the first step that violates the rule, `since` the step at which the trouble began (None: `step`),
    `before` the last clean step (None: there is none). `kind` is an index into the rule's kinds(); `severity` stands
    above what `grade` would say. `tensor` is free text where no tensor is meant, such as `step time`.
    """

    tensor: str
    worker: int
    mode: str
    step: int
    last_step: int
    violations: int
    judged: int
    worst: float
    kind: int = 0
    since: int | None = None
    before: int | None = None
    note: str = ""
    severity: Severity | None = None


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """The answer of a run rule.

    `judged`: names of the tensors that a verdict was possible for; `steps`: how many steps were judged, of the worker
    with most. `seen` says how many of the steps it needs there were, where nothing could be judged; `detail` says it in
    words, or what was used in place of what the rule would like; `not_applicable` says why the run is none for it.
    """

    troubles: Sequence[Trouble] = ()
    judged: Sequence[str] = ()
    steps: int = 0
    seen: int = 0
    detail: str = ""
    not_applicable: str = ""


@dataclass(frozen=True, kw_only=True)
class RunRule(Rule):
    """Base of the rules that judge a run as a whole."""

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge the run; `names` are the selected tensors, and the view is bounded by start_step and end_step.

        Everything is read through the view, which reads each thing once for all rules.
        """
        raise NotImplementedError(f"The rule {self.name} has no judge().")

    def evaluate(self, block: Block, state: State) -> tuple[Judgement, State]:
        """Refuse: a run rule does not judge blocks."""
        raise SmdbgError(f"The rule {self.name} judges a whole run, not blocks of it.")
