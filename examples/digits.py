"""A real classifier, healthy or broken: a two-layer network on scikit-learn's digits, in NumPy, with the neutral hook.

    python examples/digits.py --run runs/digits
    python examples/digits.py --run runs/digits-broken --break overflow
    smdbg --run runs/digits-broken check

Broken on purpose: `overflow` scales the pixels the wrong way (to 0..256) and computes the softmax without care, so that
exp overflows and the weights become NaN; `zero-init` starts all weights at zero, so that the layers' gradients stay so.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import smdbg

Array = NDArray[np.float32]


@dataclass
class Network:
    """64 pixels, one hidden layer of ReLU units, 10 logits."""

    w1: Array
    b1: Array
    w2: Array
    b2: Array

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Return (hidden [n, units], logits [n, 10])."""
        hidden = np.maximum(x @ self.w1 + self.b1, 0)
        return hidden, hidden @ self.w2 + self.b2


def initial(units: int, zero: bool, rng: np.random.Generator) -> Network:
    """Return a network with He initialisation, or one whose weights are all zero."""
    scale = 0.0 if zero else 1.0
    w1 = rng.normal(0, scale * np.sqrt(2 / 64), (64, units)).astype(np.float32)
    w2 = rng.normal(0, scale * np.sqrt(1 / units), (units, 10)).astype(np.float32)
    return Network(w1, np.zeros(units, np.float32), w2, np.zeros(10, np.float32))


def loss_and_slope(logits: Array, y: NDArray[np.int64], careless: bool = False) -> tuple[np.float32, Array]:
    """Return the mean cross-entropy (nats) and its gradient with respect to the logits [n, 10]."""
    shifted = logits if careless else logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    loss = -log_p[np.arange(len(y)), y].mean()
    slope = np.exp(log_p)
    slope[np.arange(len(y)), y] -= 1
    return loss, (slope / len(y)).astype(np.float32)


def train(url: str | None, broken: str = "none", steps: int = 400, seed: int = 0) -> str:
    """Train, write the run, and return its URL. Every tenth step is kept as statistics, every loss as it is."""
    careless, rate = broken == "overflow", 0.1
    rng = np.random.default_rng(seed)
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels * (16 if careless else 1 / 16)).astype(np.float32)
    x, x_val, y, y_val = train_test_split(pixels, labels, random_state=seed)
    net = initial(64, broken == "zero-init", rng)
    parameters = {"hidden.weight": net.w1, "hidden.bias": net.b1, "out.weight": net.w2, "out.bias": net.b2}
    with smdbg.Hook(url, hyperparameters={"lr": rate, "batch": 64, "seed": seed, "broken": broken}) as hook:
        hook.set_mode("train")
        for step in range(steps):
            rows = rng.integers(0, len(x), 64)
            with np.errstate(all="ignore"):  # the broken variants overflow, and that is the point
                hidden, logits = net.forward(x[rows])
                loss, slope = loss_and_slope(logits, y[rows], careless)
                back = (slope @ net.w2.T) * (hidden > 0)
                gradients = {
                    "hidden.weight": x[rows].T @ back,
                    "hidden.bias": back.sum(axis=0),
                    "out.weight": hidden.T @ slope,
                    "out.bias": slope.sum(axis=0),
                }
            hook.save_scalar("loss", loss, "losses")
            for name, value in parameters.items():
                hook.save_tensor(name, value)
                hook.save_tensor(f"gradient/{name}", gradients[name], of=name)
            hook.end_step()
            with np.errstate(all="ignore"):
                for name, value in parameters.items():
                    value -= np.float32(rate) * gradients[name]
            if step % 100 == 99:
                evaluate(hook, net, x_val, y_val)
    return hook.url


def evaluate(hook: smdbg.Hook, net: Network, x: Array, y: NDArray[np.int64]) -> None:
    """Save loss and accuracy on the held-out digits, as a step of mode eval."""
    hook.set_mode("eval")
    with np.errstate(all="ignore"):
        logits = net.forward(x)[1]
        hook.save_scalar("val_loss", loss_and_slope(logits, y)[0], "losses")
    hook.save_scalar("accuracy", float((logits.argmax(axis=1) == y).mean()))
    hook.set_mode("train")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="folder or URL of the run (default: a new one under ./runs)")
    parser.add_argument("--break", dest="broken", default="none", choices=("none", "overflow", "zero-init"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(train(given.run, given.broken, given.steps, given.seed))


if __name__ == "__main__":
    main()
