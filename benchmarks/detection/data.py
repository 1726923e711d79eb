"""The data sets: those that scikit-learn ships, and generated ones; features are scaled, a quarter validates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import datasets

CENTRES = ((-1.3, -9.6), (1.0, -1.45), (-1.45, -3.6))  # three overlapping blobs of deviation 2
VOCABULARY, LENGTH = 16, 12


@dataclass
class Data:
    """Inputs and targets for training and validation; `classes` is 0 for a regression."""

    x: torch.Tensor
    y: torch.Tensor
    x_val: torch.Tensor
    y_val: torch.Tensor
    classes: int


def load(name: str) -> Data:
    """Return a data set by its name; tensors are fresh copies."""
    x, y, classes = _arrays(name)
    if name == "at_blobs":
        cut = 700
    else:
        order = np.random.default_rng(0).permutation(len(x))
        x, y = x[order], y[order]
        cut = len(x) * 3 // 4
    inputs = torch.tensor(x) if x.dtype == np.int64 else torch.tensor(x, dtype=torch.float32)
    targets = torch.tensor(y) if classes else torch.tensor(y, dtype=torch.float32)
    return Data(inputs[:cut].clone(), targets[:cut].clone(), inputs[cut:].clone(), targets[cut:].clone(), classes)


@cache
def _arrays(name: str) -> tuple[NDArray[np.generic], NDArray[np.generic], int]:
    """Return inputs, targets (int64 for classes) and the number of classes."""
    random = np.random.default_rng(7)
    if name == "at_blobs":
        y = random.integers(0, 3, 1000)
        return np.array(CENTRES)[y] + random.normal(0, 2, (1000, 2)), y, 3
    if name in ("digits", "images"):
        x, y = datasets.load_digits(return_X_y=True)
        x = x / 16
        return (x.reshape(-1, 1, 8, 8) if name == "images" else x), y.astype(np.int64), 10
    if name in ("wine", "breast_cancer", "iris"):
        x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
        return _scaled(x), y.astype(np.int64), int(y.max()) + 1
    if name in ("raw_wine", "raw_breast_cancer"):
        x, y = getattr(datasets, f"load_{name[4:]}")(return_X_y=True)
        return x, y.astype(np.int64), int(y.max()) + 1
    if name == "diabetes":
        x, y = datasets.load_diabetes(return_X_y=True)
        return _scaled(x), _scaled(y[:, None]), 0
    if name == "friedman":
        x, y = datasets.make_friedman1(1200, noise=0.5, random_state=3)
        return _scaled(x), _scaled(y[:, None]), 0
    if name == "linear":
        x, y = datasets.make_regression(800, 12, n_informative=8, noise=5, random_state=5)
        return _scaled(x), _scaled(y[:, None]), 0
    if name == "moons":
        x, y = datasets.make_moons(1000, noise=0.2, random_state=3)
        return _scaled(x), y.astype(np.int64), 2
    if name == "circles":
        x, y = datasets.make_circles(1000, noise=0.08, factor=0.45, random_state=3)
        return _scaled(x), y.astype(np.int64), 2
    if name == "classes":
        x, y = datasets.make_classification(1500, 20, n_informative=10, n_classes=4, class_sep=1.6, random_state=3)
        return _scaled(x), y.astype(np.int64), 4
    if name == "counting":  # is one kind of token more frequent than the other?
        x = random.integers(0, VOCABULARY, (1600, LENGTH))
        gap = (x < 5).sum(1) - (x >= 11).sum(1)
        x, gap = x[gap != 0], gap[gap != 0]
        return x, (gap > 0).astype(np.int64), 2
    if name == "chain":  # the next token of a Markov chain that mostly keeps to one successor
        return _chain(random)
    raise ValueError(f"no data set {name!r}")


def _chain(random: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    successor = random.permutation(VOCABULARY)
    tokens = np.zeros((1200, LENGTH + 1), np.int64)
    tokens[:, 0] = random.integers(0, VOCABULARY, 1200)
    for at in range(LENGTH):
        stray = random.random(1200) < 0.12
        tokens[:, at + 1] = np.where(stray, random.integers(0, VOCABULARY, 1200), successor[tokens[:, at]])
    return tokens[:, :-1].copy(), tokens[:, 1:].copy(), VOCABULARY


def _scaled(x: NDArray[np.floating]) -> NDArray[np.floating]:
    scaled: NDArray[np.floating] = (x - x.mean(0)) / x.std(0)
    return scaled
