"""nlp_sequence_ratio: token sequences that are mostly padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.rule import Block, Bools, Facts, Floats, Judgement, Kind, Needs, Rule, Sample, State, parameter
from smdbg.rules._evaluations import compiled
from smdbg.store.format import TensorInfo


@dataclass(frozen=True, kw_only=True)
class NlpSequenceRatio(Rule):
    """Too many tokens of a batch are one and the same, such as padding.

    What it does
    ------------
    Counts, in the tokens that go into an embedding, those equal to each of `token_values`, and fires when their share
    is above the percentage at the same place of `token_thresholds_percent`. It reads full values; where only statistics
    were kept, the number of zeros tells the share of token 0, and others cannot be judged.

    Why it matters
    --------------
    Padding costs as much to compute as text does, and a share of unknown tokens means that the vocabulary does not fit.

    Parameters
    ----------
    tensor_regex (default `.*embedding.*input_0`): names of tensors with tokens.
    token_values (tokens, default 0): the tokens to count, such as `0, 1`.
    token_thresholds_percent (%, default 50): for each of them, fire when its share is larger.

    Example output
    --------------
    73.4 % of the 4,096 tokens of embedding_input_0 are 0 at step 10, more than 50 % (12 of 14 saved steps).

    How to fix
    ----------
    Sort or bucket sequences by length, pack short ones together, or cut the longest; for unknown tokens, check the
    tokenizer.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule NLPSequenceRatio.
    """

    name: ClassVar[str] = "nlp_sequence_ratio"

    tensor_regex: str = parameter(".*embedding.*input_0", help="names of tensors with tokens")
    token_values: tuple[int, ...] = parameter((0,), unit="tokens", help="the tokens to count")
    token_thresholds_percent: tuple[float, ...] = parameter((50.0,), unit="%", help="fire when a share is larger")

    def needs(self) -> Needs:
        """Read full values, and the zeros where there are none."""
        return Needs(("count", "zeros"), values=True)

    def applicable(self) -> str | None:
        """Ask for one percentage a token."""
        values, percents = len(self.token_values), len(self.token_thresholds_percent)
        if values != percents or not values:
            return f"it needs one of token_thresholds_percent for each of token_values, and has {percents} for {values}"
        return None

    def picks(self, info: TensorInfo) -> bool:
        """Pick by name."""
        return compiled(self.tensor_regex).search(info.name) is not None

    def looked_for(self) -> str:
        """Name the expression."""
        return super().looked_for() if self.include or self.collections else f"names that match {self.tensor_regex}"

    def kinds(self) -> tuple[Kind, ...]:
        """The share of each token."""
        pairs = zip(self.token_values, self.token_thresholds_percent, strict=False)
        return tuple(Kind("token_share", percent / 100, str(value)) for value, percent in pairs)

    def measure(self, sample: Sample) -> Floats | None:
        """Return the share of each token."""
        if not sample.value.size or sample.value.dtype.kind not in "biuf":
            return None
        counts = [np.count_nonzero(sample.value == token) for token in self.token_values]
        return np.array(counts, np.float64) / sample.value.size

    def evaluate(self, block: Block, state: State) -> tuple[Judgement, State]:
        """Judge the share of each token: of its value where that was kept, else of its zeros."""
        shares = np.full((len(self.token_values), *block.present.shape), np.nan)
        count = block.stat("count")
        zeros = block.stat("zeros") / np.where(count > 0, count, np.nan)
        for index, token in enumerate(self.token_values):
            if token == 0:
                shares[index] = zeros
        if block.measures:
            for row, column in np.argwhere(block.present).tolist():
                found = block.measured(row, column)
                if found is not None:
                    shares[:, row, column] = found
        limits = np.array(self.token_thresholds_percent).reshape(-1, 1, 1) / 100
        over: Bools = np.asarray(shares > limits)
        kind = over.argmax(axis=0)
        worst = np.take_along_axis(shares, kind[None], axis=0)[0]
        violated: Bools = np.asarray(over.any(axis=0))
        judged = block.present & (~np.isnan(shares).any(axis=0) | violated)
        notes = {
            (int(row), column): f"{100 * worst[row, column]:.3g} %"
            for column in range(worst.shape[1])
            for row in np.flatnonzero(violated[:, column])[:1]
        }
        return Judgement(judged, violated, worst, kind.astype(np.int64), notes=notes), state

    def message(self, facts: Facts) -> str:
        """Say how many are which token."""
        often = f" ({facts.violations} of {facts.judged} saved steps)" if facts.violations > 1 else ""
        return (
            f"{facts.note} of the {facts.first['count']:,.0f} tokens of {facts.tensor} are {facts.kind.name} at step"
            f" {facts.step}, more than {100 * (facts.kind.threshold or 0.0):g} %{often}."
        )

    def hint(self, facts: Facts) -> str:
        """Say what to do."""
        return "Bucket sequences by length or pack short ones together; for unknown tokens, check the tokenizer."
