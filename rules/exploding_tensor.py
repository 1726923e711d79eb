"""exploding_tensor: NaN and infinities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.rule import Block, Facts, Judgement, Kind, Needs, Rule, State, parameter

_WORDS = {"nan": "nan", "posinf": "+inf", "neginf": "-inf"}


@dataclass(frozen=True, kw_only=True)
class ExplodingTensor(Rule):
    """A tensor holds NaN or an infinity.

    What it does
    ------------
    Looks at the counts of NaN, +Inf and -Inf of every tensor at every saved step, and fires when one of them is not
    zero. All tensors are judged unless `include` or `collections` picks some. The finding says how many elements of
    how many are bad, and how large the finite values were one saved step before.

    Why it matters
    --------------
    NaN spreads: one bad element in a gradient makes every weight NaN within a step or two, and nothing trained after
    that can be used. What matters is the tensor that had it first.

    Parameters
    ----------
    only_nan (true or false, default false): fire for NaN only, not for infinities.

    Example output
    --------------
    nan in 2 of 2 elements of gradients/x at step 2; one saved step before (step 1) the largest finite value was
    1.36e+23.

    How to fix
    ----------
    Look at the first finding. If the finite values grew before it, lower the learning rate, clip the gradients or warm
    up. If they did not, look for log(0), a division by zero, sqrt at 0, an overflow in half precision or a NaN in the
    input data.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule ExplodingTensor.
    """

    name: ClassVar[str] = "exploding_tensor"

    only_nan: bool = parameter(False, help="fire for NaN only, not for infinities")

    def needs(self) -> Needs:
        """Read the counts, and the scale for the message."""
        return Needs(statistics=("count", "nan", "posinf", "neginf", "abs_max"))

    def kinds(self) -> tuple[Kind, ...]:
        """NaN, +Inf and -Inf, each counted in elements."""
        return tuple(Kind(name, 0.0, name) for name in (("nan",) if self.only_nan else _WORDS))

    def evaluate(self, block: Block, state: State) -> tuple[Judgement, State]:
        """Judge wherever a tensor is present, whether or not it has a finite element."""
        counts = np.stack([block.stat(kind.statistic) for kind in self.kinds()])
        judged = block.present & ~np.isnan(counts).any(axis=0)
        kind = (counts > 0).argmax(axis=0)
        worst = np.take_along_axis(counts, kind[None], axis=0)[0]
        return Judgement(judged, worst > 0, worst, kind), state

    def message(self, facts: Facts) -> str:
        """Say how many elements of how many, and the scale before."""
        bad = {word: int(facts.first[name]) for name, word in _WORDS.items() if facts.first[name] > 0}
        first, *rest = [f"{word} in {count}" for word, count in bad.items()]
        also = f" ({', '.join(rest)})" if rest else ""
        # Of a number that was recorded several times in a step, `count` says how often.
        total = 1 if facts.info.shape == () else int(facts.first["count"])
        text = f"{first} of {total} elements{also} of {facts.tensor} at step {facts.step}"
        if facts.previous_step is None:
            return f"{text}, the first saved step."
        scale = facts.previous["abs_max"]
        was = "there was no finite value" if np.isnan(scale) else f"the largest finite value was {scale:.3g}"
        return f"{text}; one saved step before (step {facts.previous_step}) {was}."

    def hint(self, facts: Facts) -> str:
        """Say where to look first."""
        return (
            "If the values grew before this step, lower the learning rate or clip the gradients; if not, look for "
            "log(0), a division by zero, half-precision overflow or bad input data."
        )
