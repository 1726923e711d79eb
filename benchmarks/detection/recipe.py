"""What describes a training: the recipe of a healthy one, a fault that is put into it, and the case they make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.detection.training import Training
    from benchmarks.detection.truth import Truth

HALVES = ("calibrate", "report")


@dataclass(frozen=True)
class Recipe:
    """A training that learns: data, model, optimizer and what else makes it the training it is.

    `loss`: ce, bce, mse, nll (of a normal distribution, falls below 0), cosine (-1 at best), clipped_ce.
    `schedule`: constant, warmup_cosine, cosine, step, linear, one_cycle; `warmup` in steps.
    `scaling`: '' or 'loop' or 'wrapper', who skips the steps whose scaled gradients overflow.
    `goal` and `goal_by`: last losses below `goal` times the first ones ('loss'), or a score of at least it ('score').
    `pretrain`: steps before the hook watches, after which `tuning` trains all on, an 'adapter' or a new 'head' only.
    `resume_at`: the step from which a new model, optimizer and hook go on; `replicas`: ranks that train alike.
    """

    data: str
    model: str
    width: int = 32
    depth: int = 2
    activation: str = "relu"
    dropout: float = 0.0
    norm: str = ""
    optimizer: str = "adam"
    lr: float = 3e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup: int = 0
    batch: int = 32
    steps: int = 400
    loss: str = "ce"
    clip: float = 0.0
    label_noise: float = 0.0
    imbalance: float = 1.0
    shuffle: bool = True
    accumulate: int = 1
    dtype: str = "float32"
    scaling: str = ""
    pretrain: int = 0
    tuning: str = ""
    resume_at: int = 0
    replicas: int = 1
    evaluate_every: int = 40
    goal: float = 0.6
    goal_by: str = "loss"


def nothing(training: Training) -> None:
    """Do nothing: where a fault does not act."""


@dataclass(frozen=True)
class Fault:
    """A mistake in a training, as functions that act at its moments; none knows the hook, and no rule knows them.

    kind: what the mistake is; expected: names of the rules that call it by its name; level: the severity that the
    right rule has by its definition; layers: modules at fault, none where all or no single one are; start: the first
    training step at which it acts, which `onset` corrects where only the training tells. `shown` returns what proves
    that the run suffers from it, '' when it does not.
    """

    kind: str
    expected: tuple[str, ...]
    shown: Callable[[Truth], str]
    level: str = "error"
    layers: tuple[str, ...] = ()
    start: int = 0
    prepare: Callable[[Training], None] = nothing
    on_batch: Callable[[Training, Any, Any], tuple[Any, Any]] | None = None
    on_loss: Callable[[Training, Any], Any] | None = None
    before_update: Callable[[Training], None] = nothing
    after_update: Callable[[Training], None] = nothing
    zero_grad: bool = True
    onset: Callable[[Truth], int] | None = None


@dataclass(frozen=True)
class Case:
    """One training to be judged. `family` groups cases in the report; architectures are labelled by outcome."""

    id: str
    family: str
    seed: int
    recipe: Recipe
    fault: Fault | None = None
    architecture: str = ""
    expected: tuple[str, ...] = field(default=())

    @property
    def half(self) -> str:
        """Return which half of the seeds it belongs to: even ones calibrate, odd ones are reported."""
        return HALVES[self.seed % 2]
