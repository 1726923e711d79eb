"""exploding_tensor: NaN and infinities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.course import GRADIENT_NORM, PARAMETERS, Course
from smdbg.analysis.rule import Block, Bools, Facts, Judgement, Kind, Needs, Rule, Severity, State, parameter
from smdbg.store.format import TensorInfo

_WORDS = {"nan": "nan", "posinf": "+inf", "neginf": "-inf"}
_FATAL = (*PARAMETERS, "gradient", "update", "loss")  # roles in which an infinity cannot be meant
_PASSING = ("input", "output", "prediction")  # roles in which it may be, as in masked scores
_COLLECTIONS = ("weights", "biases", "gradients", "updates", "losses")


@dataclass(frozen=True, kw_only=True)
class ExplodingTensor(Rule):
    """A tensor holds NaN or an infinity.

    What it does
    ------------
    Looks at the counts of NaN, +Inf and -Inf of every tensor at every saved step, and fires when one of them is not
    zero. All tensors are judged unless `include` or `collections` picks some. The finding says how many elements of
    how many are bad, and how large the finite values were one saved step before.

    With `in_context`, what the training made of them counts. Gradients of a step that was not made (all updates of the
    step are zero: that is how scaling the loss in half precision finds its scale) are left to an instance with
    `only_skipped`. Inputs and outputs that hold nothing but zeros and -Inf, or as many -Inf at every saved step from
    their first one on, are masks, and so are inputs of the model with as many infinities at every saved step: they are
    not judged, and count as such. Elsewhere an infinity in weights,
    gradients, updates and losses is of the severity given; in other tensors it is a warning at most, unless the loss,
    the weights or a gradient that was used are not finite at that step or later. So is a NaN in a metric.

    With `only_skipped`, gradients and updates of such steps are all it looks at, to be told only; of the severity given
    they are when 5 steps in a row were skipped, or more than 10 % of any 100. The skips before the first step that was
    made do not count, up to 16.

    Why it matters
    --------------
    NaN spreads: one bad element in a gradient makes every weight NaN within a step or two, and nothing trained after
    that can be used. What matters is the tensor that had it first.

    Parameters
    ----------
    only_nan (true or false, default false): fire for NaN only, not for infinities.
    in_context (true or false, default false): weigh what is found by what the training made of it.
    only_skipped (true or false, default false): look at the gradients of skipped steps only.

    Example output
    --------------
    nan in 2 of 2 elements of gradients/x at step 2; one saved step before (step 1) the largest finite value was
    1.36e+23.

    How to fix
    ----------
    Look at the first finding. If the finite values grew before it, lower the learning rate, clip the gradients or warm
    up. If they did not, look for log(0), a division by zero, sqrt at 0, an overflow in half precision or a NaN in the
    input data. Many skipped steps mean that no loss scale fits: train in bfloat16, or clip what overflows.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule ExplodingTensor. Micikevicius et al., Mixed Precision Training (2018).
    """

    name: ClassVar[str] = "exploding_tensor"

    only_nan: bool = parameter(False, help="fire for NaN only, not for infinities")
    in_context: bool = parameter(False, help="weigh what is found by what the training made of it")
    only_skipped: bool = parameter(False, help="look at the gradients of skipped steps only")

    def needs(self) -> Needs:
        """Read the counts, and the scale for the message."""
        roles = ("gradient", "update") if self.only_skipped else ()
        return Needs(statistics=("count", "nan", "posinf", "neginf", "abs_max"), roles=roles)

    def kinds(self) -> tuple[Kind, ...]:
        """NaN, +Inf and -Inf, each counted in elements."""
        return tuple(Kind(name, 0.0, name) for name in (("nan",) if self.only_nan else _WORDS))

    def evaluate(self, block: Block, state: State) -> tuple[Judgement, State]:
        """Judge wherever a tensor is present, whether or not it has a finite element."""
        counts = [block.stat(kind.statistic) for kind in self.kinds()]
        worst = counts[0] if self.only_nan else counts[0] + counts[1] + counts[2]
        judged, violated, kind = block.present & ~np.isnan(worst), worst > 0, None
        if violated.any():
            kind = (np.stack(counts) > 0).argmax(axis=0)
            worst = np.take_along_axis(np.stack(counts), kind[None], axis=0)[0]
        if (self.in_context or self.only_skipped) and violated.any():
            skipped = _skipped(block)[:, None] & _of_role(block, "gradient")
            violated &= skipped if self.only_skipped else ~skipped
        if self.in_context:
            masks, state = _masks(block, state)
            judged &= ~masks
            if _of_role(block, "gradient").any():  # judged themselves, and at those steps one can tell what was skipped
                judged &= ~np.array([_is_norm(name) for name in block.names], bool)
        return Judgement(judged, violated & judged, worst, kind), state

    def grade(self, facts: Facts, course: Course) -> Severity:
        """Return the severity given, or less where the training could bear what was found."""
        if self.only_skipped:
            return self.severity if course.skips_too_often() else self._at_most(Severity.INFO)
        if not self.in_context:
            return self.severity
        role = _role(facts.info.role, facts.info.collection)
        bad = [] if course.non_finite is None else [course.non_finite]
        norms = course.gradient_norm[0][~np.isfinite(course.gradient_norm[1])]
        bad += [int(step) for step in norms if int(step) not in course.skipped]
        spoilt = any(step >= facts.step for step in bad)
        if role == "gradient" or _is_norm(facts.tensor):
            # Updates that were not saved cannot show that the step was skipped; that the weights stayed sound can.
            if facts.step in course.skipped and not spoilt:
                return self.severity if course.skips_too_often() else self._at_most(Severity.INFO)
            return self.severity
        if role in _FATAL or spoilt or (facts.kind.name == "nan" and role != "metric"):
            return self.severity
        return self._at_most(Severity.WARNING)

    def message(self, facts: Facts) -> str:
        """Say how many elements of how many, and the scale before."""
        bad = {word: int(facts.first[name]) for name, word in _WORDS.items() if facts.first[name] > 0}
        first, *rest = [f"{word} in {count}" for word, count in bad.items()]
        also = f" ({', '.join(rest)})" if rest else ""
        # Of a number that was recorded several times in a step, `count` says how often.
        total = 1 if facts.info.shape == () else int(facts.first["count"])
        text = f"{first} of {total} elements{also} of {facts.tensor} at step {facts.step}"
        if self.only_skipped:
            text += f", which was skipped ({facts.violations} of {facts.judged} saved steps)"
        if facts.previous_step is None:
            return f"{text}, the first saved step."
        scale = facts.previous["abs_max"]
        was = "there was no finite value" if np.isnan(scale) else f"the largest finite value was {scale:.3g}"
        return f"{text}; one saved step before (step {facts.previous_step}) {was}."

    def hint(self, facts: Facts) -> str:
        """Say where to look first."""
        if self.only_skipped:
            return "Some skipped steps are how a loss scale finds its size; many mean that none fits: try bfloat16."
        return (
            "If the values grew before this step, lower the learning rate or clip the gradients; if not, look for "
            "log(0), a division by zero, half-precision overflow or bad input data."
        )

    def _at_most(self, cap: Severity) -> Severity:
        return min(self.severity, cap, key=lambda one: one.rank)


def _role(role: str, collection: str) -> str:
    """Return the role, or that of the collection where a tensor has none."""
    if role or collection not in _COLLECTIONS:
        return role
    return {"losses": "loss", "biases": "bias"}.get(collection, collection.removesuffix("s"))


def _is_norm(name: str) -> bool:
    return name.rsplit("/", 1)[-1] == GRADIENT_NORM


def _of_role(block: Block, role: str) -> Bools:
    return np.array([_role(info.role, info.collection) == role for info in block.infos], bool)


def _skipped(block: Block) -> Bools:
    """Return bool[rows]: whether there are updates at a row, and all of them are exactly zero."""
    updates = _of_role(block, "update")
    present = block.present[:, updates]
    still = block.stat("abs_max")[:, updates] == 0
    for name in _WORDS:
        still &= block.stat(name)[:, updates] == 0
    found: Bools = present.any(axis=1) & (still | ~present).all(axis=1)
    return found


def _masks(block: Block, state: State) -> tuple[Bools, State]:
    """Return bool[rows, tensors] where an input or output is a mask, and the state for the next block.

    The state has, per input and output, [+Inf, -Inf] of its first row; None once a row had others, or where they are no
    mask's.
    """
    found = np.zeros(block.present.shape, np.bool_)
    passing = np.flatnonzero([info.role in _PASSING for info in block.infos])
    counts = np.stack([np.nan_to_num(block.stat(name)[:, passing]) for name in ("posinf", "neginf")], axis=2)
    here = block.present[:, passing]
    clean = np.isin(block.stat("nan")[:, passing], 0)
    bare = clean & (block.stat("abs_max")[:, passing] == 0) & (counts[:, :, 0] == 0) & (counts[:, :, 1] > 0)
    found[:, passing] = bare & here
    new = here[block.first :]
    first = block.first + new.argmax(axis=0)
    later = dict(state)
    for index in np.flatnonzero(new.any(axis=0)).tolist():
        name = block.names[passing[index]]
        if name not in later:
            plus, minus = counts[first[index], index].tolist()
            total = float(block.stat("count")[first[index], passing[index]])
            later[name] = [plus, minus] if _may_mask(block.infos[passing[index]], plus, minus, total) else None
        if later[name] is None:
            continue
        rows = block.first + np.flatnonzero(new[:, index])
        same = (counts[rows, index] == later[name]).all(axis=1)
        end = len(rows) if same.all() else int(same.argmin())
        found[rows[:end], passing[index]] |= clean[rows[:end], index]
        later[name] = later[name] if end == len(rows) else None
    return found, later


def _may_mask(info: TensorInfo, plus: float, minus: float, total: float) -> bool:
    """Tell whether these counts of infinities may be a mask's: none of them all, and +Inf in what enters the model."""
    enters = info.role == "input" and info.forward_order in (None, 0)
    return 0 < plus + minus < total and (plus == 0 or enters)
