"""What sort of trouble a finding is, how serious, and what it may lead to.

docs/decisions/010-first-cause.md says why. Rules that stand in no list are told by their severity alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from smdbg.analysis.findings import Finding


class Trouble(IntEnum):
    """Sorts of trouble, the most serious first."""

    NON_FINITE = 0
    EXPLOSION = 1
    DEAD = 2
    VANISHING = 3
    SATURATION = 4
    SET_UP = 5
    OTHER = 6
    NO_LEARNING = 7
    SLOW = 8


_RULES = {
    Trouble.NON_FINITE: "exploding_tensor",
    Trouble.EXPLOSION: "gradient_explosion gradient_leak loss_divergence loss_spike precision_risk replica_desync "
    "weight_growth",
    Trouble.DEAD: "activation_collapse all_zero dead_layer dead_relu frozen_parameter missing_gradient "
    "unchanged_tensor update_lost_to_rounding",
    Trouble.VANISHING: "gradient_vanishing_depth vanishing_gradient",
    Trouble.SATURATION: "saturated_activation",
    Trouble.SET_UP: "check_input_images class_imbalance initial_weights input_scale nlp_sequence_ratio "
    "poor_weight_initialization tensor_variance",
    Trouble.NO_LEARNING: "confusion feature_importance_overweight loss_not_decreasing loss_oscillation loss_plateau "
    "overfit overtraining similar_across_runs tree_depth",
    Trouble.SLOW: "max_initialization_time stalled_training step_outlier",
}
_SORT = {name: sort for sort, names in _RULES.items() for name in names.split()}
_EITHER_WAY = ("update_scale", "weight_update_ratio")  # too large, or too small
_NOT_FINITE = ("nan", "posinf", "neginf")

# What a fault in data, initial values or a value that is not a number may lead to: all but slowness. A layer that is
# dead or hardly gets a gradient hinders learning; it makes nothing large.
_QUIET = (Trouble.DEAD, Trouble.VANISHING, Trouble.NO_LEARNING, Trouble.OTHER)
_ALL_BUT_SLOW = tuple(sort for sort in Trouble if sort != Trouble.SLOW)
_LEADS_TO: Mapping[Trouble, tuple[Trouble, ...]] = {
    Trouble.NON_FINITE: _ALL_BUT_SLOW,
    Trouble.EXPLOSION: _ALL_BUT_SLOW,
    Trouble.SET_UP: _ALL_BUT_SLOW,
    Trouble.OTHER: _ALL_BUT_SLOW,
    Trouble.DEAD: _QUIET,
    Trouble.VANISHING: _QUIET,
    Trouble.SATURATION: (*_QUIET, Trouble.SATURATION),
    Trouble.NO_LEARNING: (Trouble.NO_LEARNING,),
    Trouble.SLOW: (Trouble.SLOW,),
}

OUTCOMES = (Trouble.NO_LEARNING, Trouble.SLOW)  # they say how it went, not what is at fault


def trouble(finding: Finding, rules: Mapping[str, str] | None = None) -> Trouble:
    """Return the sort of trouble that a finding is; `rules` gives the name of the rule behind an instance's."""
    if finding.statistic in _NOT_FINITE:
        return Trouble.NON_FINITE
    rule = (rules or {}).get(finding.rule, finding.rule)
    if rule in _EITHER_WAY:
        small = finding.threshold is not None and finding.worst < finding.threshold
        return Trouble.VANISHING if small else Trouble.EXPLOSION
    return _SORT.get(rule, Trouble.OTHER)


def may_lead_to(first: Trouble, second: Trouble) -> bool:
    """Tell whether one sort of trouble may be what brings about another."""
    return second in _LEADS_TO[first]
