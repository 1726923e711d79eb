"""The 20 published feed-forward networks for three-class points (11 known faulty, 9 known healthy), as a table.

All have layers of 5 units and a last one of 3 with a sigmoid; kernels start from a uniform distribution scaled for 2
by the number of inputs (He), biases at zero, unless the table says otherwise. They come from AutoTrainer's models as
DeepDiagnosis and others used them; the points are made here and are like the published ones: three overlapping blobs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.detection.models import ACTIVATIONS
from benchmarks.detection.recipe import Case, Recipe

UNITS, CLASSES, INPUTS = 5, 3, 2
SEEDS = range(5)
BATCHES = 6  # an epoch: 700 points in batches of 128
RECIPE = Recipe(
    "at_blobs", "mlp", lr=1e-3, batch=128, steps=300 * BATCHES, loss="clipped_ce", evaluate_every=10 * BATCHES
)

_DEAD = ("dead_relu", "dead_layer", "activation_collapse", "gradient_vanishing_depth", "all_zero")
_VANISHING = ("gradient_vanishing_depth", "vanishing_gradient", "activation_collapse", "saturated_activation")
_EXPLODING = ("exploding_tensor", "gradient_explosion", "saturated_activation", "loss_divergence", "precision_risk")
EXPECTED = {  # activation -> the rules that call its trouble by its name
    "exponential": (*_EXPLODING, "activation_collapse", "dead_layer", "all_zero"),
    "relu": _DEAD,
    "sigmoid": _VANISHING,
    "tanh": _VANISHING,
    "relu small": (*_DEAD, "vanishing_gradient", "initial_weights"),
}


@dataclass(frozen=True)
class Architecture:
    """Hidden layers and their activation; how kernels of hidden layers, the last kernel and the last bias start."""

    name: str
    faulty: bool
    hidden: int
    activation: str
    kernel: str = "he_uniform"
    last_kernel: str = "he_uniform"
    last_bias: str = "zeros"

    @property
    def expected(self) -> tuple[str, ...]:
        """Return the rules of the right class, should it turn out faulty."""
        return EXPECTED["relu small" if self.kernel == "uniform_0.05" else self.activation]


TABLE = (
    Architecture("0b6f114d", True, 9, "exponential"),
    Architecture("9b8bdaab", True, 9, "exponential"),
    Architecture("84c77206", True, 15, "relu"),
    Architecture("0448d813", True, 8, "exponential"),
    Architecture("661b4e86", True, 10, "exponential"),
    Architecture("2569b90f", True, 11, "sigmoid"),
    Architecture("384108d9", True, 8, "relu", "uniform_0.05"),
    Architecture("bd4e58b7", True, 12, "sigmoid"),
    Architecture("e706e7cd", True, 11, "sigmoid"),
    Architecture("e73037c2", True, 8, "exponential"),
    Architecture("f7e7b91b", True, 9, "relu", "uniform_0.05"),
    Architecture("mi_7", False, 5, "tanh", last_kernel="zeros", last_bias="lecun_uniform"),
    Architecture("al_13", False, 11, "tanh"),
    Architecture("simplednn_blob", False, 5, "tanh"),
    Architecture("mi_al_10", False, 8, "tanh", last_kernel="zeros"),
    Architecture("al_19", False, 17, "tanh"),
    Architecture("ma_mi_7", False, 5, "tanh", last_kernel="he_normal", last_bias="he_normal"),
    Architecture("mi_al_19", False, 17, "tanh", last_kernel="lecun_normal", last_bias="glorot_normal"),
    Architecture("mi_al_13", False, 11, "tanh", last_kernel="ones", last_bias="uniform_0.05"),
    Architecture("mi_al_16", False, 14, "tanh", last_kernel="glorot_uniform", last_bias="he_normal"),
)


def cases() -> list[Case]:
    """Return every architecture at every seed; what is faulty is settled by the outcome."""
    return [
        Case(f"arch-{one.name}-{seed}", "architecture", seed, RECIPE, architecture=one.name, expected=one.expected)
        for one in TABLE
        for seed in SEEDS
    ]


def find(name: str) -> Architecture:
    """Return the architecture of that name."""
    return next(one for one in TABLE if one.name == name)


def build(name: str) -> nn.Sequential:
    """Return the model of an architecture, freshly initialised from torch's generator."""
    one = find(name)
    layers: list[nn.Module] = []
    for index in range(one.hidden + 1):
        last = index == one.hidden
        linear = nn.Linear(INPUTS if index == 0 else UNITS, CLASSES if last else UNITS)
        _fill(linear.weight, one.last_kernel if last else one.kernel)
        _fill(linear.bias, one.last_bias if last else "zeros")
        layers += [linear, nn.Sigmoid() if last else ACTIVATIONS[one.activation]()]
    return nn.Sequential(*layers)


@torch.no_grad()
def _fill(tensor: torch.Tensor, how: str) -> None:
    """Initialise a tensor as Keras does; of a bias, inputs and outputs both count its elements."""
    inputs, outputs = tensor.shape[-1], tensor.shape[0]
    if how in ("zeros", "ones"):
        tensor.fill_(float(how == "ones"))
    elif how == "uniform_0.05":
        tensor.uniform_(-0.05, 0.05)
    else:
        scheme, _, distribution = how.partition("_")
        variance = {"he": 2 / inputs, "lecun": 1 / inputs, "glorot": 2 / (inputs + outputs)}[scheme]
        if distribution == "uniform":
            tensor.uniform_(-math.sqrt(3 * variance), math.sqrt(3 * variance))
        else:
            spread = math.sqrt(variance) / 0.87962566103423978  # of a normal distribution cut at 2 deviations
            nn.init.trunc_normal_(tensor, std=spread, a=-2 * spread, b=2 * spread)
