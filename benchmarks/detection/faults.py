"""The faulty trainings: one mistake each, put into a training that is healthy without it.

What counts as the right class is settled here by what the mistake is. `level` is the severity that the right rule has
by its definition: where that is a warning, as for overfitting, nobody can ask for an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from benchmarks.detection import mutations as m
from benchmarks.detection import proofs
from benchmarks.detection.healthy import CANCER, CHAIN, CNN, GRU, MLP, REGRESSION
from benchmarks.detection.recipe import Case, Fault, Recipe
from benchmarks.detection.training import Training

SEEDS = range(2)
SGD = replace(MLP, optimizer="sgd", lr=0.1)
MOMENTUM = replace(MLP, optimizer="sgd", lr=0.03, momentum=0.9)
CNN_SGD = replace(CNN, optimizer="sgd", lr=0.05, momentum=0.9)
LINE = Recipe("linear", "linear", optimizer="sgd", lr=0.02, loss="mse", steps=300)

EXPLOSION = ("exploding_tensor", "gradient_explosion", "loss_divergence", "update_scale", "weight_growth", "loss_spike")
DEAD = ("dead_relu", "dead_layer", "activation_collapse", "all_zero")
VANISHING = ("gradient_vanishing_depth", "vanishing_gradient", "activation_collapse", "saturated_activation")
STUCK = ("loss_plateau", "loss_not_decreasing")
UNTRAINED = ("frozen_parameter", "missing_gradient", "unchanged_tensor")

Named = tuple[str, Recipe, Fault]


def _rates() -> Iterator[Named]:
    explodes = Fault("rate too high: explodes", EXPLOSION, proofs.diverged)
    yield "digits-sgd", replace(SGD, lr=1e3, weight_decay=0.01), explodes
    yield "friedman", replace(REGRESSION, optimizer="sgd", lr=2.0, activation="gelu"), explodes
    yield "linear", replace(LINE, lr=1.6), explodes
    high = Fault(
        "rate too high: does not learn",
        (*EXPLOSION, "loss_oscillation", "dead_relu", "dead_layer", "saturated_activation"),
        proofs.above_start,
    )
    yield "digits-adam", replace(MLP, lr=1.0), high
    yield "images-cnn", replace(CNN, lr=0.5), high
    yield "chain-transformer", replace(CHAIN, lr=0.5), high
    yield "counting-gru", replace(GRU, lr=2.0), high
    jump = Fault("rate jumps", EXPLOSION, proofs.hurt(150), start=150, before_update=m.speed_up(1000.0))
    yield "digits-adam", MLP, jump
    yield "digits-momentum", MOMENTUM, replace(jump, before_update=m.speed_up(300.0))
    yield "chain-transformer", CHAIN, jump
    low = Fault("rate too low", ("update_scale", "weight_update_ratio", *STUCK), proofs.no_learning)
    yield "digits-sgd", replace(SGD, lr=1e-7), low
    yield "digits-adam", replace(MLP, lr=1e-9), low
    yield "images-cnn", replace(CNN_SGD, lr=1e-8), low
    yield "counting-gru", replace(GRU, lr=1e-8), low
    momentum = Fault("momentum diverges", (*EXPLOSION, "loss_oscillation"), proofs.diverged)
    yield "linear", replace(LINE, lr=0.05, momentum=0.9999, steps=600), momentum
    yield "digits", replace(MOMENTUM, lr=1.0, momentum=0.99), replace(momentum, shown=proofs.above_start)
    unsteady = ("loss_oscillation", "update_scale", "loss_spike")
    swings = Fault("rate swings", unsteady, proofs.swings, "warning", start=40)
    yield (
        "friedman-sgd",
        replace(REGRESSION, optimizer="sgd", lr=0.02, steps=800),
        replace(swings, before_update=m.alternate_rate(15.0, 40)),
    )
    yield "linear", replace(LINE, batch=8, steps=800), replace(swings, before_update=m.alternate_rate(15.0, 40))
    ascent = Fault("gradient ascent", (*EXPLOSION, *STUCK), proofs.no_learning, prepare=m.ascend)
    yield "digits-adam", replace(MLP, lr=1e-3), ascent
    yield "friedman", replace(REGRESSION, lr=1e-3), ascent
    yield "counting-gru", GRU, ascent


def _initialisation() -> Iterator[Named]:
    zero = Fault(
        "all weights zero",
        ("initial_weights", *DEAD, *STUCK),
        proofs.badly(0.8),
        prepare=m.initialise(nn.init.zeros_, True),
    )
    yield "digits-mlp", MLP, zero
    yield "images-cnn", CNN, zero
    yield "friedman-deep", replace(REGRESSION, depth=4), zero
    constant = Fault(
        "constant weights",
        ("initial_weights", "activation_collapse"),
        proofs.alike,
        prepare=m.initialise(lambda p: nn.init.constant_(p, 0.05), True),
    )
    yield "digits-mlp", MLP, constant
    yield "digits-tanh", replace(MLP, activation="tanh", depth=3), constant
    yield "wine", Recipe("wine", "mlp", lr=1e-3, batch=16, steps=200), constant
    small = Fault(
        "weights too small",
        ("initial_weights", *VANISHING, *DEAD),
        proofs.no_learning,
        prepare=m.initialise(lambda p: nn.init.normal_(p, std=1e-5)),
    )
    yield "digits-deep-sgd", replace(SGD, depth=5), small
    yield "friedman-deep-tanh", replace(REGRESSION, depth=6, activation="tanh", optimizer="sgd", lr=0.02), small
    yield "images-cnn", CNN_SGD, small
    large = Fault(
        "weights too large",
        ("initial_weights", *EXPLOSION, "saturated_activation", "precision_risk"),
        proofs.no_learning,
        prepare=m.initialise(lambda p: nn.init.normal_(p, std=20.0)),
    )
    yield (
        "digits-tanh",
        replace(MLP, activation="tanh"),
        replace(large, shown=proofs.both(proofs.stuck, proofs.badly(0.02))),
    )
    yield "digits-sgd", replace(SGD, depth=3), replace(large, shown=proofs.no_learning)
    yield "friedman-sgd", replace(REGRESSION, optimizer="sgd", lr=0.02), replace(large, shown=proofs.diverged)


def _depth() -> Iterator[Named]:
    deep = Fault("vanishing through depth", VANISHING, proofs.vanished, layers=("0",))
    yield "digits-sigmoid-12", replace(MLP, activation="sigmoid", depth=12), deep
    yield "digits-sigmoid-8-sgd", replace(SGD, activation="sigmoid", depth=8), deep
    yield "friedman-sigmoid-14", replace(REGRESSION, activation="sigmoid", depth=14), deep
    gain = Fault(
        "exploding through depth",
        (*EXPLOSION, "initial_weights", "precision_risk"),
        proofs.no_learning,
        prepare=m.initialise(lambda p: nn.init.kaiming_normal_(p, a=0.0).mul_(3.0)),
    )
    yield "digits-relu-12", replace(SGD, depth=12, lr=0.01), gain
    yield "friedman-relu-10", replace(REGRESSION, depth=10, optimizer="sgd", lr=1e-3), gain


def _activations() -> Iterator[Named]:
    dead = Fault(
        "dead ReLU from the start", DEAD, proofs.silent("3"), layers=("2", "3"), prepare=m.fill_bias("2.bias", -100.0)
    )
    yield "digits-mlp", MLP, dead
    yield "digits-sgd", replace(SGD, depth=3), dead
    yield "friedman", REGRESSION, dead
    yield (
        "images-cnn",
        CNN,
        replace(dead, shown=proofs.silent("4"), layers=("3", "4"), prepare=m.fill_bias("3.bias", -100.0)),
    )
    dies = Fault("ReLU dies", DEAD, proofs.silent("3"), layers=("2", "3"), start=160)
    yield "digits-mlp", MLP, replace(dies, after_update=m.once(m.fill_bias("2.bias", -100.0)))
    yield "digits-momentum", MOMENTUM, replace(dies, after_update=m.once(m.fill_bias("2.bias", -50.0)))
    yield (
        "classes",
        Recipe("classes", "mlp", width=48),
        replace(dies, after_update=m.once(m.fill_bias("2.bias", -200.0))),
    )
    flat = Fault(
        "saturated by unscaled inputs",
        ("saturated_activation", "input_scale"),
        proofs.stuck,
        "warning",
        layers=("0", "1"),
    )
    yield "cancer-tanh", replace(CANCER, data="raw_breast_cancer", activation="tanh"), flat
    yield "digits-sigmoid", replace(MLP, activation="sigmoid"), replace(flat, prepare=_scale_data(300.0))
    yield "digits-tanh", replace(MLP, activation="tanh"), replace(flat, prepare=_scale_data(100.0))
    unit = Fault("softmax of one unit", ("dead_layer", "all_zero", *STUCK), proofs.no_learning)
    yield "cancer", replace(CANCER, loss="softmax_bce"), unit
    yield "counting-gru", replace(GRU, loss="softmax_bce"), unit


def _scale_data(factor: float) -> m.Act:
    def act(training: Training) -> None:
        training.data.x, training.data.x_val = training.data.x * factor, training.data.x_val * factor

    return act


def _parameters() -> Iterator[Named]:
    stale = Fault("optimizer holds other tensors", UNTRAINED, proofs.unmoved(("",)), prepare=m.stale_optimizer)
    yield "digits-mlp", MLP, stale
    yield "chain-transformer", CHAIN, stale
    yield "images-cnn", CNN_SGD, stale
    left = Fault(
        "layer left out of the optimizer",
        UNTRAINED,
        proofs.unmoved(("0",)),
        "warning",
        ("0",),
        prepare=m.leave_out("0"),
    )
    yield "digits-mlp", MLP, left
    yield "images-cnn", CNN, left
    yield (
        "counting-gru",
        GRU,
        replace(left, shown=proofs.unmoved(("rnn",)), layers=("rnn",), prepare=m.leave_out("rnn")),
    )
    cut = Fault("graph cut", UNTRAINED, proofs.unmoved(("0",)), "warning", ("0",), prepare=m.detach_after("1"))
    yield "digits-mlp", MLP, cut
    yield (
        "digits-momentum",
        replace(MOMENTUM, depth=3),
        replace(cut, prepare=m.detach_after("3"), layers=("0", "2"), shown=proofs.unmoved(("0", "2"))),
    )
    yield "images-cnn", CNN, cut
    kept = Fault(
        "gradients not zeroed", ("gradient_leak", *EXPLOSION, "loss_oscillation"), proofs.diverged, zero_grad=False
    )
    yield "digits-sgd", SGD, kept
    yield "digits-adam", MLP, replace(kept, shown=proofs.badly(0.3))
    yield "friedman-sgd", replace(REGRESSION, optimizer="sgd", lr=0.02), kept
    yield "images-cnn", CNN_SGD, kept
    lost = Fault(
        "updates lost to rounding",
        ("update_lost_to_rounding", "update_scale", "frozen_parameter"),
        proofs.badly(0.6),
        "warning",
    )
    half = replace(MLP, dtype="bfloat16")
    yield "digits-adam", replace(half, lr=1e-5), lost
    yield "digits-sgd", replace(half, optimizer="sgd", lr=1e-4), lost
    yield "images-cnn", replace(CNN, dtype="bfloat16", lr=1e-5), lost


def _data() -> Iterator[Named]:
    shuffled = Fault("labels shuffled", STUCK, proofs.no_learning, on_batch=m.shuffle_labels)
    yield "digits-mlp", MLP, shuffled
    yield "counting-gru", GRU, shuffled
    yield "friedman", REGRESSION, shuffled
    yield "images-cnn", CNN, shuffled
    raw = Fault("inputs not scaled", ("input_scale",), proofs.unscaled, "warning", ("0",))
    yield "cancer", replace(CANCER, data="raw_breast_cancer"), raw
    yield "wine", Recipe("raw_wine", "mlp", lr=1e-3, batch=16, steps=200), raw
    yield "digits-sgd", SGD, replace(raw, prepare=_scale_data(1000.0))
    empty = Fault(
        "inputs all zero",
        ("input_scale", "activation_collapse", *STUCK, "dead_layer", "all_zero"),
        proofs.badly(0.8),
        "warning",
        ("0",),
        prepare=_scale_data(0.0),
    )
    yield "digits-mlp", MLP, empty
    yield "friedman", REGRESSION, empty
    poison = Fault(
        "poisoned batch",
        (*EXPLOSION, "input_scale"),
        proofs.hurt(160),
        start=160,
        on_batch=m.scale_inputs(1e5, False, 160),
    )
    yield "digits-sgd", SGD, poison
    yield "friedman", replace(REGRESSION, optimizer="sgd", lr=0.02), replace(poison, on_batch=m.scale_targets(1e6, 160))
    yield "images-cnn", CNN_SGD, poison
    row = Fault("NaN in a row", ("exploding_tensor",), proofs.not_finite, layers=("0",), start=130)
    yield "digits-mlp", MLP, replace(row, on_batch=m.spoil_row(float("nan"), 130))
    yield "images-cnn", CNN, replace(row, on_batch=m.spoil_row(float("nan"), 130))
    yield "friedman-inf", REGRESSION, replace(row, on_batch=m.spoil_row(float("inf"), 130))
    order = Fault(
        "data in the order of classes",
        ("loss_oscillation", "loss_spike"),
        proofs.forgets,
        "warning",
        prepare=m.sort_by_class,
    )
    yield "digits-mlp", replace(SGD, shuffle=False, batch=4, steps=1500), order
    yield "classes", Recipe("classes", "mlp", batch=8, steps=1200, shuffle=False, optimizer="sgd", lr=0.1), order
    few = Fault("overfitting", ("overfit",), proofs.overfitted, "warning", onset=proofs.best_validation)
    yield (
        "classes",
        Recipe("classes", "mlp", width=128, steps=600, batch=16, lr=5e-4, evaluate_every=20),
        replace(few, prepare=m.few_data(60)),
    )
    yield "digits", replace(MLP, width=128, label_noise=0.3, steps=900), replace(few, prepare=m.few_data(300))
    yield (
        "diabetes",
        Recipe("diabetes", "mlp", width=64, loss="mse", lr=1e-3, steps=900, batch=16),
        replace(few, prepare=m.few_data(150)),
    )


def _numbers() -> Iterator[Named]:
    log = Fault("logarithm of 0", ("exploding_tensor", "loss_divergence"), proofs.not_finite, onset=proofs.first_bad)
    yield "cancer", replace(CANCER, loss="naive_bce", lr=0.03, steps=600), log
    yield "moons", Recipe("circles", "mlp", loss="naive_bce", lr=0.05, steps=600), log
    yield "counting-gru", replace(GRU, loss="naive_bce", lr=0.02, steps=600), log
    zero = Fault(
        "division by 0",
        ("exploding_tensor",),
        proofs.not_finite,
        layers=("1",),
        prepare=m.divide_by_spread("1"),
        onset=proofs.first_bad,
    )
    yield "digits-mlp", MLP, zero
    yield "digits-sgd", replace(SGD, width=128), zero
    yield "classes", Recipe("classes", "mlp", width=96, batch=8), zero
    scaled = Fault(
        "loss scale not divided by", EXPLOSION, proofs.diverged, start=0, before_update=m.scale_gradients(65536.0)
    )
    yield "digits-sgd", SGD, scaled
    yield (
        "friedman-late",
        replace(REGRESSION, optimizer="sgd", lr=0.02),
        replace(scaled, start=150, shown=proofs.hurt(150)),
    )
    yield "images-cnn-late", CNN_SGD, replace(scaled, start=150, shown=proofs.hurt(150))
    skipped = Fault(
        "every step skipped",
        ("exploding_tensor", "frozen_parameter", "update_scale", *STUCK),
        proofs.skipping,
        start=120,
        before_update=m.scale_gradients(float("inf")),
    )
    yield "digits-mlp", replace(MLP, scaling="wrapper"), skipped
    yield "images-cnn", replace(CNN_SGD, scaling="wrapper"), skipped
    decay = Fault("weight decay negative", EXPLOSION, proofs.grown)
    yield "digits-sgd", replace(SGD, steps=600), replace(decay, prepare=m.grow_weights(0.3))
    yield "digits-adamw", replace(MLP, optimizer="adamw"), replace(decay, prepare=m.grow_weights(5.0))
    yield (
        "friedman",
        replace(REGRESSION, optimizer="sgd", lr=0.02, steps=600),
        replace(decay, prepare=m.grow_weights(0.5)),
    )
    flip = Fault("bit flip in a weight", EXPLOSION, proofs.hurt(155), start=155)
    yield "digits-mlp", MLP, replace(flip, layers=("2",), after_update=m.once(m.flip_bit("2.weight", 1e30)))
    yield "images-cnn", CNN_SGD, replace(flip, layers=("3",), after_update=m.once(m.flip_bit("3.weight", 1e12)))
    yield (
        "chain-transformer",
        CHAIN,
        replace(flip, layers=("blocks.1.out",), after_update=m.once(m.flip_bit("blocks.1.out.weight", 1e25))),
    )


def _replicas() -> Iterator[Named]:
    drift = Fault("replicas drift", ("replica_desync",), proofs.drifted)
    pair = replace(MLP, replicas=2, width=32, steps=200)
    yield (
        "digits-nudged",
        pair,
        replace(drift, start=82, layers=("2",), after_update=m.on_rank(1, m.once(m.nudge("2.weight", 1e-4)))),
    )
    yield (
        "digits-gradient",
        replace(pair, optimizer="sgd", lr=0.1),
        replace(drift, start=63, layers=("4",), before_update=m.on_rank(1, m.own_gradient("4.weight"))),
    )
    yield "digits-data", pair, replace(drift, start=100, on_batch=_own_data)


def _own_data(training: Training, x: Any, y: Any) -> tuple[Any, Any]:
    """Give the second replica half of the batch alone, and nobody averages the gradients."""
    return (x[: len(x) // 2], y[: len(y) // 2]) if training.rank == 1 else (x, y)


def cases(seeds: Sequence[int] = SEEDS) -> list[Case]:
    """Return every fault at every seed, seed by seed."""
    groups = (_rates, _initialisation, _depth, _activations, _parameters, _data, _numbers, _replicas)
    return [
        Case(
            f"fault-{fault.kind.replace(':', '').replace(' ', '_')}-{name}-{seed}",
            fault.kind,
            seed,
            recipe,
            fault,
            expected=fault.expected,
        )
        for seed in seeds
        for group in groups
        for name, recipe, fault in group()
    ]
