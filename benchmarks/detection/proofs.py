"""What proves that a training suffers from its fault: functions of the truth that answer in words, '' for no."""

from __future__ import annotations

import math
from collections.abc import Callable

from benchmarks.detection.truth import Truth

Proof = Callable[[Truth], str]


def not_finite(truth: Truth) -> str:
    """The loss or the gradients became NaN or infinite."""
    return "" if truth.bad_step is None else f"not finite from training step {truth.bad_step}"


def no_learning(truth: Truth) -> str:
    """The loss ended above 0.9 of its first, or not finite."""
    return not_finite(truth) or (f"loss {truth.ratio():.3g} of its first" if truth.ratio() > 0.9 else "")


def above_start(truth: Truth) -> str:
    """The loss ended above 0.8 of what the untrained model had, or not finite."""
    ratio = truth.last_loss() / truth.validation[0][1]
    return not_finite(truth) or (f"loss {ratio:.3g} times that of the untrained model" if not ratio < 0.8 else "")


def diverged(truth: Truth) -> str:
    """The loss ended at twice its lowest level or more, above where it began, or not finite."""
    if truth.bad_step is not None:
        return not_finite(truth)
    width = max(len(truth.losses) // 20, 1)
    means = [sum(truth.losses[i : i + width]) / width for i in range(0, len(truth.losses) - width, width)]
    ratio = truth.last_loss() / max(min(means), 1e-12)
    return f"last losses {ratio:.3g} times the lowest" if ratio >= 2 else ""


def hurt(start: int) -> Proof:
    """Return a proof that the losses after a step were far above those before it, or not finite."""

    def shown(truth: Truth) -> str:
        if truth.bad_step is not None:
            return not_finite(truth)
        before, after = truth.losses[max(start - 20, 0) : start], truth.losses[start : start + 20]
        ratio = max(after) / (sum(before) / len(before))
        return f"loss {ratio:.3g} times that before" if ratio > 3 else ""

    return shown


def unmoved(prefixes: tuple[str, ...]) -> Proof:
    """Return a proof that the parameters of some modules never changed ('' as a module: any)."""

    def shown(truth: Truth) -> str:
        still = [n for n, far in truth.moved.items() if far == 0 and n.startswith(prefixes)]
        return f"{len(still)} parameters never changed" if still else ""

    return shown


def silent(module: str) -> Proof:
    """Return a proof that nine tenths of a ReLU layer never fire."""
    return lambda truth: (
        f"{truth.silent[module]:.0%} of {module} never fire" if truth.silent.get(module, 0) > 0.9 else ""
    )


def stuck(truth: Truth) -> str:
    """Most units of a layer sat on their plateau, and the model learned badly (loss above half of its first)."""
    worst = max(truth.stuck.values(), default=0.0)
    return f"{worst:.0%} of a layer on its plateau" if worst > 0.5 else ""


def vanished(truth: Truth) -> str:
    """The loss did not fall, and the first weights' gradient is tiny beside the last ones'."""
    slopes = [size for name, size in truth.slopes.items() if name.endswith("weight")]
    if truth.bad_step is not None or truth.ratio() < 0.9 or len(slopes) < 2:
        return ""
    return (
        f"first over last gradient {slopes[0] / (slopes[-1] or math.inf):.1e}" if slopes[0] < 1e-3 * slopes[-1] else ""
    )


def alike(truth: Truth) -> str:
    """All units of a layer still hold the same weights."""
    same = [name for name, equal in truth.alike.items() if equal]
    return f"all units of {same[0]} are alike" if same else ""


def grown(truth: Truth) -> str:
    """The weights grew tenfold and more."""
    most = max(truth.grown.values(), default=0.0)
    return not_finite(truth) or (f"weights {most:.3g} times their first size" if not most < 10 else "")


def overfitted(truth: Truth) -> str:
    """The validation loss rose by a quarter and more from its lowest while the training loss went on falling."""
    rise = truth.overfits()
    return f"validation loss {rise:.0%} above its lowest" if rise > 0.25 and truth.ratio() < 0.3 else ""


def badly(share: float) -> Proof:
    """Return a proof that the loss ended above a share of its first."""
    return lambda truth: (
        not_finite(truth) or (f"loss {truth.ratio():.3g} of its first" if truth.ratio() > share else "")
    )


def swings(truth: Truth) -> str:
    """Whole stretches of 40 steps alternate: their means differ by 0.3 of the level from one to the next."""
    width, losses = 40, truth.losses[len(truth.losses) // 4 :]
    means = [sum(losses[i : i + width]) / width for i in range(0, len(losses) - width, width)]
    if not all(map(math.isfinite, losses)) or len(means) < 4:
        return ""
    jumps = sorted(abs(b - a) for a, b in zip(means, means[1:], strict=False))
    ratio = jumps[len(jumps) // 2] / (sum(means) / len(means))
    return f"stretches of 40 steps differ by {ratio:.0%}" if ratio > 0.3 else ""


def forgets(truth: Truth) -> str:
    """Single losses lie far above the usual ones to the end, and the model recognises few of the validation data."""
    losses = sorted(truth.losses[len(truth.losses) // 4 :])
    high, usual = losses[len(losses) * 19 // 20], losses[len(losses) // 2]
    bad = high > 5 * usual and truth.last_score() < 0.85
    return (
        f"a twentieth of the losses {high / usual:.3g} times the median, score {truth.last_score():.2f}" if bad else ""
    )


def unscaled(truth: Truth) -> str:
    """Some feature has a mean or deviation above 100."""
    return f"a feature of scale {truth.input_scale:.3g}" if truth.input_scale > 100 else ""


def drifted(truth: Truth) -> str:
    """The replicas ended with different parameters."""
    return "replicas differ at the end" if truth.drifted else ""


def skipping(truth: Truth) -> str:
    """Nearly every step was skipped."""
    share = truth.skipped / len(truth.losses)
    return f"{share:.0%} of the steps skipped" if share > 0.5 else ""


def first_bad(truth: Truth) -> int:
    """Return the first training step that was not finite."""
    return truth.bad_step or 0


def best_validation(truth: Truth) -> int:
    """Return the training step of the lowest validation loss."""
    return min(truth.validation, key=lambda one: one[1])[0]


def both(*proofs: Proof) -> Proof:
    """Return a proof that asks for all of these."""

    def shown(truth: Truth) -> str:
        found = [proof(truth) for proof in proofs]
        return "; ".join(found) if all(found) else ""

    return shown
