"""What an expression is made of: a closed list of frozen nodes, and the names of the functions they stand for.

A node is a *series* (one number a saved step) or a *number*; either may be a *truth* (0 or 1; NaN: cannot be told).
`smdbg.analysis.expression` makes nodes from text, `smdbg.analysis.expression_values` gives them values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

TENSOR = "tensor"  # the name that stands for each tensor of `each`
LOSS = "loss"  # the name that stands for the main loss

STATISTICS = (
    "l2", "l1", "abs_max", "abs_mean", "nan", "posinf", "neginf", "zeros", "zero_share", "variance", "rms",
    "dynamic_range", "q01", "q05", "q25", "q50", "q75", "q95", "q99",
)  # fmt: skip
DOTTED = (*STATISTICS, "count", "min", "max", "mean", "std", "sum")  # written after a name: gradients.max
OVER = ("median", "mean", "min", "max", "std", "sum", "first", "last", "count", "quantile", "any", "all")
ROLLING = ("median", "mean", "min", "max", "std")
PLAIN = ("abs", "log", "log10", "sqrt", "exp", "isnan", "isfinite")
OF_SEVERAL = ("min", "max")
SHIFTED = ("prev", "diff", "ratio", "finite")
REFERENCE = "ref"
FUNCTIONS = tuple(dict.fromkeys((*STATISTICS, *OVER, *PLAIN, *SHIFTED, REFERENCE)))


@dataclass(frozen=True)
class Name:
    """A tensor, collection or role as it is named in an expression; `quoted`: in quotes, where globs are read."""

    text: str
    quoted: bool = False


@dataclass(frozen=True)
class Literal:
    """A number written out."""

    value: float


@dataclass(frozen=True)
class Value:
    """The value of a tensor that is a single number, at each saved step."""

    name: Name


@dataclass(frozen=True)
class Statistic:
    """A statistic of a tensor, or of several merged, at each saved step."""

    statistic: str
    name: Name


@dataclass(frozen=True)
class Steps:
    """Part of a series: global steps from `start` up to, not including, `stop`; negative: counted from the last."""

    of: Node
    start: int | None
    stop: int | None


@dataclass(frozen=True)
class Arithmetic:
    """Two values and one of + - * / **."""

    operator: str
    left: Node
    right: Node


@dataclass(frozen=True)
class Comparison:
    """Two values and one of < <= > >= == !=, with the two sides as they were written."""

    operator: str
    left: Node
    right: Node
    left_text: str = ""
    right_text: str = ""


@dataclass(frozen=True)
class Logic:
    """Truths joined by `and` or `or`."""

    operator: str
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Not:
    """The opposite of a truth."""

    of: Node


@dataclass(frozen=True)
class Plain:
    """A function that is applied step by step: one of PLAIN to one value, min or max to several."""

    function: str
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Over:
    """One of OVER over all steps of a series; `share` is that of a quantile."""

    function: str
    of: Node
    share: float = 0.5


@dataclass(frozen=True)
class Rolling:
    """One of ROLLING over the `window` steps of a series before the present one."""

    function: str
    of: Node
    window: int


@dataclass(frozen=True)
class Shifted:
    """A series against its own step before (prev, diff, ratio), or its finite steps alone (finite)."""

    function: str
    of: Node


@dataclass(frozen=True)
class Other:
    """The same expression of the reference run."""

    of: Node


_Leaf = Literal | Value | Statistic
Node = _Leaf | Steps | Arithmetic | Comparison | Logic | Not | Plain | Over | Rolling | Shifted | Other


def parts_of(node: Node) -> tuple[Node, ...]:
    """Return the nodes directly below a node, in the order in which they are written."""
    match node:
        case Arithmetic() | Comparison():
            return (node.left, node.right)
        case Logic() | Plain():
            return node.parts
        case Steps() | Not() | Over() | Rolling() | Shifted() | Other():
            return (node.of,)
        case _:
            return ()


def walk(node: Node) -> Iterator[Node]:
    """Yield a node and all nodes below it, in the order in which they are written."""
    yield node
    for part in parts_of(node):
        yield from walk(part)


def is_series(node: Node) -> bool:
    """Tell whether a node has one value a saved step."""
    if isinstance(node, Over):
        return False
    return isinstance(node, Value | Statistic) or any(map(is_series, parts_of(node)))


def is_truth(node: Node) -> bool:
    """Tell whether a node says yes or no."""
    match node:
        case Comparison() | Logic() | Not():
            return True
        case Plain() | Over():
            return node.function in ("isnan", "isfinite", "any", "all") or (
                isinstance(node, Over) and node.function in ("first", "last") and is_truth(node.of)
            )
        case Steps() | Other():
            return is_truth(node.of)
        case Shifted():
            return node.function == "prev" and is_truth(node.of)
        case _:
            return False


def names_in(node: Node, own: bool = False) -> Iterator[Name]:
    """Yield the names in an expression; `own`: not those of the reference run."""
    if isinstance(node, Value | Statistic):
        yield node.name
    if not (own and isinstance(node, Other)):
        for part in parts_of(node):
            yield from names_in(part, own)


def comparisons_in(node: Node) -> Iterator[Comparison]:
    """Yield the comparisons that the answer is made of, not those that a function goes over."""
    if isinstance(node, Comparison):
        yield node
    elif not isinstance(node, Over | Rolling | Shifted | Other):
        for part in parts_of(node):
            yield from comparisons_in(part)
