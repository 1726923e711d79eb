"""What a check hands back: findings, an outcome for every rule, and how much of the run was judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from smdbg.analysis.findings import Finding, Outcome, Severity

_NOT_JUDGED = (Outcome.NOT_APPLICABLE, Outcome.INSUFFICIENT)


@dataclass(frozen=True)
class RuleResult:
    """The outcome of one rule instance.

    `name` is the instance's, `rule` the class's; `detail` says why nothing was judged, what failed, or how much could
    not be judged; `tensors` counts the selected ones, `steps_judged` those of the worker with most.
    """

    name: str
    rule: str
    outcome: Outcome
    detail: str
    findings: int
    tensors_judged: int
    tensors: int
    steps_judged: int
    steps_needed: int

    def record(self) -> dict[str, Any]:
        """Return the fields in their order as JSON-able data."""
        return vars(self) | {"outcome": self.outcome.value}


@dataclass(frozen=True)
class Summary:
    """How much was judged, and whether the run is whole.

    `steps` are the steps the run logged and those it dropped; `steps_seen` those at which a rule was given something.
    """

    run: str
    status: str
    rules_judged: int
    rules: int
    steps_seen: int
    steps: int
    workers: tuple[int, ...]
    incomplete: bool
    dropped_steps: int
    dropped_rows: int
    switched_off: bool
    damaged: tuple[str, ...] = ()  # what of the run cannot be read

    def record(self) -> dict[str, Any]:
        """Return the fields in their order as JSON-able data."""
        return vars(self) | {"workers": list(self.workers), "damaged": list(self.damaged)}

    def text(self) -> str:
        """Return the closing line: `14 of 17 rules judged, 200 of 200 steps`."""
        return f"{self.rules_judged} of {self.rules} rules judged, {self.steps_seen} of {self.steps} steps"


@dataclass(frozen=True)
class Report:
    """The result of a check: findings in order of cause, rules in the order they were given."""

    findings: tuple[Finding, ...]
    rules: tuple[RuleResult, ...]
    summary: Summary

    @property
    def failed(self) -> tuple[str, ...]:
        """Return the names of the rules that failed."""
        return tuple(result.name for result in self.rules if result.outcome == Outcome.FAILED)

    @property
    def not_judged(self) -> tuple[str, ...]:
        """Return the names of the rules that were not applicable or saw too little."""
        return tuple(result.name for result in self.rules if result.outcome in _NOT_JUDGED)

    @property
    def judged(self) -> tuple[str, ...]:
        """Return the names of the rules that judged something and did not fail."""
        return tuple(result.name for result in self.rules if result.outcome in (Outcome.VIOLATED, Outcome.CLEAN))

    @property
    def worst(self) -> Severity | None:
        """Return the highest severity found, None without findings."""
        return max((finding.severity for finding in self.findings), key=lambda one: one.rank, default=None)

    def at_least(self, severity: Severity) -> tuple[Finding, ...]:
        """Return the findings of this severity or a higher one."""
        return tuple(finding for finding in self.findings if finding.severity.rank >= severity.rank)

    def result(self, name: str) -> RuleResult:
        """Return the outcome of the rule instance called `name`; KeyError when there is none."""
        for result in self.rules:
            if result.name == name:
                return result
        raise KeyError(name)
