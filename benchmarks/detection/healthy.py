"""The healthy trainings: plain ones, and at least as many awkward ones that cautious rules must not take for faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.detection.recipe import Case, Recipe

SEEDS = (0, 2, 4, 6, 8, *range(1, 18, 2))  # more odd ones: a bound of 1 % takes hundreds of runs to show
PLAIN = "plain"

MLP = Recipe("digits", "mlp", width=64, batch=64)
CNN = Recipe("images", "cnn", width=16, batch=64, steps=300)
GRU = Recipe("counting", "gru", width=24, lr=5e-3)
CHAIN = Recipe("chain", "transformer", width=32, depth=2, lr=3e-3)
REGRESSION = Recipe("friedman", "mlp", width=32, loss="mse")
CANCER = Recipe("breast_cancer", "mlp", width=32, loss="bce", steps=300, lr=1e-3)
TUNED = replace(MLP, pretrain=300, lr=5e-4, goal_by="score", goal=0.85)


def warm(recipe: Recipe) -> Recipe:
    """Return a recipe with a warm-up of 40 steps and a cosine after it."""
    return replace(recipe, schedule="warmup_cosine", warmup=40)


RECIPES: dict[str, tuple[str, Recipe]] = {
    # --- plain ---
    "digits-mlp": (PLAIN, MLP),
    "digits-tanh": (PLAIN, replace(MLP, activation="tanh")),
    "digits-gelu-deep": (PLAIN, replace(MLP, activation="gelu", depth=4, width=48)),
    "digits-sgd": (PLAIN, replace(MLP, optimizer="sgd", lr=0.2)),
    "digits-momentum": (PLAIN, replace(MLP, optimizer="sgd", lr=0.02, momentum=0.9)),
    "digits-adamw": (PLAIN, replace(MLP, optimizer="adamw", weight_decay=0.01)),
    "digits-rmsprop": (PLAIN, replace(MLP, optimizer="rmsprop", lr=1e-3)),
    "digits-batchnorm": (PLAIN, replace(MLP, norm="batch", depth=3, lr=1e-3)),
    "digits-layernorm": (PLAIN, replace(MLP, norm="layer", activation="silu")),
    "images-cnn": (PLAIN, CNN),
    "images-cnn-batchnorm": (PLAIN, replace(CNN, norm="batch", lr=2e-3)),
    "images-cnn-momentum": (PLAIN, replace(CNN, optimizer="sgd", lr=0.05, momentum=0.9)),
    "wine-mlp": (PLAIN, Recipe("wine", "mlp", lr=1e-3, batch=16, steps=200)),
    "cancer-mlp": (PLAIN, CANCER),
    "iris-tanh": (PLAIN, Recipe("iris", "mlp", activation="tanh", batch=16, lr=1e-3, steps=300)),
    "moons-mlp": (PLAIN, Recipe("moons", "mlp", width=24, lr=5e-3)),
    "circles-elu": (PLAIN, Recipe("circles", "mlp", activation="elu", width=24, lr=5e-3)),
    "classes-leaky": (PLAIN, Recipe("classes", "mlp", activation="leaky_relu", width=48, lr=2e-3)),
    "friedman-mlp": (PLAIN, REGRESSION),
    "friedman-momentum": (PLAIN, replace(REGRESSION, optimizer="sgd", lr=0.02, momentum=0.9, activation="tanh")),
    "linear-regression": (PLAIN, Recipe("linear", "linear", optimizer="sgd", lr=0.02, loss="mse", steps=300)),
    "logistic": (PLAIN, Recipe("breast_cancer", "linear", optimizer="sgd", lr=0.1, loss="bce", steps=300)),
    "counting-gru": (PLAIN, GRU),
    "counting-lstm": (PLAIN, replace(GRU, model="lstm")),
    "chain-transformer": (PLAIN, CHAIN),
    "counting-transformer": (PLAIN, replace(CHAIN, data="counting", depth=1)),
    # --- awkward ---
    "warmup-cosine-mlp": ("warm-up and cosine", warm(replace(MLP, optimizer="adamw", lr=5e-3))),
    "warmup-cosine-transformer": ("warm-up and cosine", warm(replace(CHAIN, clip=1.0, steps=500))),
    "cosine-to-zero": ("warm-up and cosine", replace(CNN, schedule="cosine", steps=500)),
    "one-cycle": ("warm-up and cosine", replace(MLP, schedule="one_cycle", optimizer="sgd", lr=0.3, steps=500)),
    "long-warmup": ("warm-up and cosine", replace(MLP, schedule="warmup_cosine", warmup=250, steps=600)),
    "dropout-half": ("dropout", replace(MLP, dropout=0.5, width=128)),
    "dropout-cnn": ("dropout", replace(CNN, dropout=0.4)),
    "dropout-transformer": ("dropout", replace(CHAIN, dropout=0.2)),
    "label-noise": ("label noise", replace(MLP, label_noise=0.2, goal=0.8, lr=1e-3, goal_by="score")),
    "label-noise-heavy": (
        "label noise",
        replace(MLP, label_noise=0.4, goal=0.75, lr=1e-3, goal_by="score", steps=300, weight_decay=1e-3),
    ),
    "embedding-bag": ("embedding", replace(GRU, model="bag", lr=0.01)),
    "embedding-sgd": ("embedding", replace(CHAIN, optimizer="sgd", lr=0.3, momentum=0.9, clip=1.0)),
    "imbalance-digits": ("class imbalance", replace(MLP, imbalance=8, goal_by="score", goal=0.7)),
    "imbalance-cancer": ("class imbalance", replace(CANCER, imbalance=6, goal_by="score", goal=0.85)),
    "finetune": ("fine-tuning", TUNED),
    "finetune-warmup": ("fine-tuning", warm(replace(TUNED, optimizer="adamw", lr=3e-4))),
    "frozen-base": ("fine-tuning", replace(TUNED, tuning="head", lr=3e-3)),
    "adapter": ("adapter", replace(TUNED, tuning="adapter", lr=2e-3)),
    "adapter-cosine": ("adapter", warm(replace(TUNED, tuning="adapter", lr=3e-3))),
    "batch-small": ("small batch", replace(MLP, batch=4, steps=900, lr=1e-3)),
    "batch-one": ("batch of one", replace(MLP, batch=1, steps=1500, optimizer="sgd", lr=0.02, width=32)),
    "batch-one-regression": ("batch of one", replace(REGRESSION, batch=1, steps=1200, optimizer="sgd", lr=3e-3)),
    "full-batch": ("full batch", replace(MLP, batch=0, steps=300, lr=5e-3)),
    "full-batch-sgd": (
        "full batch",
        Recipe("breast_cancer", "mlp", batch=0, optimizer="sgd", lr=0.3, loss="bce", steps=250),
    ),
    "resumed": ("resumed", replace(MLP, resume_at=200)),
    "resumed-transformer": ("resumed", warm(replace(CHAIN, resume_at=155))),
    "scaling-loop": ("loss scaling", replace(MLP, scaling="loop", steps=500)),
    "scaling-wrapper": ("loss scaling", replace(MLP, scaling="wrapper", steps=500)),
    "scaling-wrapper-cnn": ("loss scaling", replace(CNN, scaling="wrapper", clip=1.0)),
    "negative-nll": ("loss below 0", replace(REGRESSION, loss="nll", goal=0.7, goal_by="score", steps=500, lr=2e-3)),
    "negative-cosine": ("loss below 0", replace(MLP, model="autoencoder", loss="cosine", goal=0.85, goal_by="score")),
    "converged": ("converged before", replace(TUNED, pretrain=800, lr=3e-3, optimizer="sgd", goal=0.9)),
    "converged-cancer": (
        "converged before",
        replace(CANCER, pretrain=300, lr=1e-4, weight_decay=1e-3, goal_by="score", goal=0.92),
    ),
    "tiny-rate-end": ("warm-up and cosine", replace(MLP, schedule="step", lr=5e-3, steps=900)),
    "bfloat16": ("bfloat16", replace(MLP, dtype="bfloat16", optimizer="sgd", lr=0.1, momentum=0.9)),
    "bfloat16-adam": ("bfloat16", replace(MLP, dtype="bfloat16", lr=3e-3)),
    "weight-decay": ("weight decay", replace(MLP, optimizer="adamw", weight_decay=0.3, lr=3e-3)),
    "tied-autoencoder": (
        "tied weights",
        replace(MLP, model="autoencoder", loss="cosine", width=24, goal=0.8, goal_by="score"),
    ),
    "accumulation": ("accumulation", replace(MLP, batch=16, accumulate=4, steps=300)),
    "clipping": ("clipping", replace(GRU, clip=0.5)),
    "residual-zero": ("zero-initialised blocks", replace(MLP, model="residual", depth=3, width=48, lr=2e-3)),
    "replicas": ("replicas", replace(MLP, replicas=2, width=32, steps=200)),
    "diabetes": (
        "noisy regression",
        Recipe("diabetes", "linear", loss="mse", lr=5e-3, goal_by="score", goal=0.35, steps=300),
    ),
}


def cases(seeds: Sequence[int] = SEEDS) -> list[Case]:
    """Return every recipe at every seed, seed by seed."""
    return [
        Case(f"healthy-{name}-{seed}", family, seed, recipe)
        for seed in seeds
        for name, (family, recipe) in RECIPES.items()
    ]
