"""A classifier of handwritten digits in PyTorch, watched by smdbg: four lines do it, marked with `<-`.

    pip install '.[torch,examples]'
    python examples/torch_digits.py --run runs/digits
    smdbg check --run runs/digits

`--break` makes one of the usual mistakes, to see what smdbg says of it:

exploding   a learning rate far too high, with weight decay: weights overshoot and grow ninefold a step, until NaN
vanishing   twelve layers with sigmoids: hardly any gradient reaches the first one
dead        biases so low that no ReLU ever lets anything pass: the gradient behind them is exactly zero
frozen      the optimizer was given the last layer only; `smdbg ls` shows no update of the others
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

from smdbg.hooks.torch import Hook

FAULTS = ("none", "exploding", "vanishing", "dead", "frozen")


def model_for(fault: str) -> nn.Sequential:
    """Return the network: 64 pixels in, 10 classes out."""
    if fault == "vanishing":
        hidden = [layer for _ in range(11) for layer in (nn.Linear(64, 64), nn.Sigmoid())]
        return nn.Sequential(*hidden, nn.Linear(64, 10))
    model = nn.Sequential(
        nn.Linear(64, 128),
        nn.ReLU(inplace=True),
        nn.Dropout(0.1),
        nn.Linear(128, 64),
        nn.ReLU(inplace=True),
        nn.Linear(64, 10),
    )
    if fault == "dead":
        nn.init.constant_(model[3].bias, -100.0)
    return model


def optimizer_for(model: nn.Sequential, fault: str) -> torch.optim.Optimizer:
    """Return the optimizer: AdamW, or what the fault asks for."""
    if fault == "exploding":
        return torch.optim.SGD(model.parameters(), lr=1e3, weight_decay=0.01)
    held = model[-1] if fault == "frozen" else model
    return torch.optim.AdamW(held.parameters(), lr=1e-3)


def train(url: str, epochs: int, fault: str = "none", seed: int = 0) -> float:
    """Train, write a run at `url`, and return the share of test images that are recognised."""
    torch.manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(y))
    training, test = order[:1500], order[1500:]
    model, loss_of = model_for(fault), nn.CrossEntropyLoss()
    optimizer = optimizer_for(model, fault)

    with Hook(url, hyperparameters={"epochs": epochs, "fault": fault, "seed": seed}) as hook:  # <-
        hook.register_module(model)  # <-
        hook.register_loss(loss_of)  # <-
        for _ in range(epochs):
            model.train()
            for batch in training[torch.randperm(len(training))].split(64):
                loss = loss_of(model(x[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                found = model(x[test])
                loss_of(found, y[test])
            accuracy = (found.argmax(1) == y[test]).float().mean().item()
            hook.save_scalar("accuracy", accuracy)  # <-
    return accuracy


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train a classifier of digits and write a run.")
    parser.add_argument("--run", required=True, help="folder or URL of the run to write")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--break", dest="fault", choices=FAULTS, default="none", help="make a mistake on purpose")
    arguments = parser.parse_args()
    accuracy = train(arguments.run, arguments.epochs, arguments.fault)
    print(f"{accuracy:.1%} of the test images recognised; look at it: smdbg check --run {arguments.run}")


if __name__ == "__main__":
    main()
