"""The models: small ones of the usual families; outputs are [n, classes], or [n, time, classes] for every token."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.detection.data import LENGTH, VOCABULARY, Data
from benchmarks.detection.recipe import Recipe


class Exponential(nn.Module):
    """The exponential as an activation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return e to the x."""
        return x.exp()


ACTIVATIONS = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "exponential": Exponential,
}


def build(recipe: Recipe, data: Data) -> nn.Module:
    """Return the model of a recipe, freshly initialised from torch's generator."""
    outputs = {"bce": 1, "naive_bce": 1, "softmax_bce": 1, "nll": 2, "cosine": data.x.shape[-1]}.get(
        recipe.loss, data.classes or 1
    )
    if recipe.model == "mlp":
        return mlp(data.x.shape[1], outputs, recipe)
    if recipe.model == "linear":
        return nn.Sequential(nn.Linear(data.x.shape[1], outputs))
    if recipe.model == "cnn":
        return cnn(outputs, recipe)
    if recipe.model == "autoencoder":
        return TiedAutoencoder(data.x.shape[1], recipe.width)
    if recipe.model in ("gru", "lstm", "bag"):
        return Sequence(recipe, outputs)
    if recipe.model == "transformer":
        return Transformer(recipe, outputs, per_token=data.y.ndim == 2)
    if recipe.model == "residual":
        return Residual(data.x.shape[1], outputs, recipe)
    raise ValueError(f"no model {recipe.model!r}")


def mlp(inputs: int, outputs: int, recipe: Recipe) -> nn.Sequential:
    """Return Linear, norm, activation and dropout, `depth` times, and a last Linear."""
    layers: list[nn.Module] = []
    for index in range(recipe.depth):
        layers.append(nn.Linear(inputs if index == 0 else recipe.width, recipe.width))
        layers += _norm(recipe.norm, recipe.width)
        layers.append(ACTIVATIONS[recipe.activation]())
        if recipe.dropout:
            layers.append(nn.Dropout(recipe.dropout))
    return nn.Sequential(*layers, nn.Linear(recipe.width if recipe.depth else inputs, outputs))


def _norm(name: str, width: int) -> list[nn.Module]:
    if name == "batch":
        return [nn.BatchNorm1d(width)]
    return [nn.LayerNorm(width)] if name == "layer" else []


def cnn(outputs: int, recipe: Recipe) -> nn.Sequential:
    """Return a convolutional network for images of 8 x 8."""
    half = max(recipe.width // 2, 4)
    norms = recipe.norm == "batch"
    return nn.Sequential(
        nn.Conv2d(1, half, 3, padding=1),
        *([nn.BatchNorm2d(half)] if norms else []),
        ACTIVATIONS[recipe.activation](),
        nn.MaxPool2d(2),
        nn.Conv2d(half, recipe.width, 3, padding=1),
        *([nn.BatchNorm2d(recipe.width)] if norms else []),
        ACTIVATIONS[recipe.activation](),
        nn.MaxPool2d(2),
        nn.Flatten(),
        *([nn.Dropout(recipe.dropout)] if recipe.dropout else []),
        nn.Linear(recipe.width * 4, outputs),
    )


class TiedAutoencoder(nn.Module):
    """Encodes and decodes with one weight."""

    def __init__(self, inputs: int, width: int) -> None:
        """Tie the decoder to the encoder."""
        super().__init__()
        self.encoder, self.decoder = nn.Linear(inputs, width), nn.Linear(inputs, width, bias=False)
        self.decoder.weight = self.encoder.weight
        self.act = nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input as reconstructed."""
        found: torch.Tensor = self.act(self.encoder(x)) @ self.decoder.weight
        return found


class Sequence(nn.Module):
    """Embeds tokens, runs a recurrent layer over them (or takes their mean) and classifies the sequence."""

    def __init__(self, recipe: Recipe, outputs: int) -> None:
        """Build the layers."""
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY if recipe.model != "bag" else VOCABULARY * 8, recipe.width)
        kinds = {"gru": nn.GRU, "lstm": nn.LSTM}
        self.rnn = kinds[recipe.model](recipe.width, recipe.width, batch_first=True) if recipe.model != "bag" else None
        self.drop = nn.Dropout(recipe.dropout)
        self.head = nn.Linear(recipe.width, outputs)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the scores of the classes."""
        x = self.embedding(tokens)
        x = x.mean(1) if self.rnn is None else self.rnn(x)[0][:, -1]
        found: torch.Tensor = self.head(self.drop(x))
        return found


class Block(nn.Module):
    """A block of a transformer, norms first."""

    def __init__(self, width: int, dropout: float, causal: bool) -> None:
        """Build the layers."""
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.drop = nn.Dropout(dropout)
        self.causal = causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x with what attention and the perceptron add."""
        n, time, width = x.shape
        q, k, v = (part.view(n, time, 2, width // 2).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(n, time, width)))
        added: torch.Tensor = x + self.drop(self.mlp(self.norm2(x)))
        return added


class Transformer(nn.Module):
    """A small transformer: one class per token (causal, tied to the embedding) or one for the sequence."""

    def __init__(self, recipe: Recipe, outputs: int, per_token: bool) -> None:
        """Build the layers."""
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, recipe.width)
        self.position = nn.Parameter(torch.randn(LENGTH, recipe.width) * 0.02)
        self.blocks = nn.Sequential(*(Block(recipe.width, recipe.dropout, per_token) for _ in range(recipe.depth)))
        self.norm = nn.LayerNorm(recipe.width)
        self.head = nn.Linear(recipe.width, outputs, bias=not per_token)
        self.per_token = per_token
        nn.init.normal_(self.embedding.weight, std=0.1)
        if per_token:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the scores of the classes."""
        x = self.norm(self.blocks(self.embedding(tokens) + self.position))
        found: torch.Tensor = self.head(x if self.per_token else x.mean(1))
        return found


class Residual(nn.Module):
    """Residual blocks whose last layers start at zero."""

    def __init__(self, inputs: int, outputs: int, recipe: Recipe) -> None:
        """Build the layers."""
        super().__init__()
        self.first = nn.Linear(inputs, recipe.width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(recipe.width),
                nn.Linear(recipe.width, recipe.width),
                ACTIVATIONS[recipe.activation](),
                nn.Linear(recipe.width, recipe.width),
            )
            for _ in range(recipe.depth)
        )
        self.head = nn.Linear(recipe.width, outputs)
        for block in self.blocks:
            last = list(block.children())[-1]
            for p in last.parameters():
                nn.init.zeros_(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores of the classes."""
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        found: torch.Tensor = self.head(x)
        return found


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank adapter beside it, whose second matrix starts at zero."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        """Freeze the layer and add the adapter."""
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the layer and the adapter make of x."""
        found: torch.Tensor = self.base(x) + self.up(self.down(x))
        return found


def adapt(model: nn.Sequential) -> None:
    """Put an adapter beside every linear layer but the last, which stays trainable; all else is frozen."""
    linears = [name for name, part in model.named_children() if isinstance(part, nn.Linear)]
    model.requires_grad_(False)
    for name in linears[:-1]:
        part = model.get_submodule(name)
        assert isinstance(part, nn.Linear)
        setattr(model, name, Adapted(part))
    model.get_submodule(linears[-1]).requires_grad_(True)


def freeze_base(model: nn.Sequential) -> None:
    """Freeze all but the last layer and give that one fresh weights, as is done for a new task."""
    model.requires_grad_(False)
    last = list(model.children())[-1]
    assert isinstance(last, nn.Linear)
    last.reset_parameters()
    last.requires_grad_(True)
