"""Reads expressions such as `l2(gradients) > 10 * median(l2(gradients), 64)`.

The text is parsed with Python's own parser, and nothing more: of the tree only a closed list of forms is taken over
into nodes (smdbg.analysis.expression_nodes); all else is refused with its place. Nothing is evaluated by Python.
"""

from __future__ import annotations

import ast
import math
import warnings
from typing import NoReturn

from smdbg.analysis.expression_nodes import (
    DOTTED,
    FUNCTIONS,
    OF_SEVERAL,
    PLAIN,
    REFERENCE,
    ROLLING,
    SHIFTED,
    STATISTICS,
    Arithmetic,
    Comparison,
    Literal,
    Logic,
    Name,
    Node,
    Not,
    Other,
    Over,
    Plain,
    Rolling,
    Shifted,
    Statistic,
    Steps,
    Value,
    is_series,
    is_truth,
    walk,
)
from smdbg.errors import BadConfig, BadSelection, near
from smdbg.select import matcher

__all__ = ["LARGEST_POWER", "LARGEST_WINDOW", "LONGEST", "DEEPEST", "parse"]

LONGEST = 2000  # characters
DEEPEST = 50
LARGEST_POWER = 16
LARGEST_WINDOW = 100_000
_ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**"}
_COMPARISONS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}
_IN_WORDS = {
    ast.Attribute: "a name with a dot (put a tensor's name in quotes)", ast.Subscript: "brackets",
    ast.Call: "a call", ast.Lambda: "lambda", ast.IfExp: "if ... else", ast.JoinedStr: "an f-string",
    ast.List: "a list", ast.Tuple: "a comma", ast.Dict: "a dict", ast.Set: "a set", ast.ListComp: "a loop",
    ast.GeneratorExp: "a loop", ast.SetComp: "a loop", ast.DictComp: "a loop", ast.NamedExpr: "':='",
    ast.Starred: "'*'", ast.Await: "await", ast.Yield: "yield", ast.YieldFrom: "yield",
}  # fmt: skip


def parse(text: str) -> Node:
    """Return an expression as nodes.

    Raises BadConfig, with the character it begins at, for anything that is no expression of the list, an unknown
    function or statistic (with the nearest), a wrong number of arguments, and one that is too long or too deep.
    """
    text = text.strip()
    if len(text) > LONGEST:
        raise BadConfig(f"the expression has {len(text):,} characters; at most {LONGEST:,} are read.")
    if not text:
        raise BadConfig("the expression is empty.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Python thinks of a text that it will not run is of no use
            tree = ast.parse(text, mode="eval")
    except SyntaxError as error:
        line, column = error.lineno or 1, error.offset or 1
        at = sum(len(one) + 1 for one in text.split("\n")[: line - 1]) + column
        raise BadConfig(f"the expression cannot be read at character {min(at, len(text))}: {error.msg}.") from None
    except (ValueError, RecursionError, MemoryError):
        raise BadConfig("the expression cannot be read: it holds odd characters, or is nested too deeply.") from None
    return _Reader(text).node(tree.body, 1)


class _Reader:
    """Takes a tree of Python's parser over into nodes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def refuse(self, at: ast.expr, why: str) -> NoReturn:
        """Raise BadConfig that shows the place."""
        before = self.text.split("\n")[: at.lineno]
        column = len(before[-1].encode()[: at.col_offset].decode(errors="ignore"))
        where = sum(len(line) + 1 for line in before[:-1]) + column + 1
        shown = self.source(at)
        shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
        raise BadConfig(f"at character {where} ({shown!r}): {why}")

    def source(self, at: ast.expr) -> str:
        """Return a part of the text, on one line."""
        return " ".join((ast.get_source_segment(self.text, at) or "").split())

    def node(self, at: ast.expr, depth: int) -> Node:
        """Return any part of an expression as a node."""
        if depth > DEEPEST:
            self.refuse(at, f"the expression is nested more than {DEEPEST} deep; split it into several rules.")
        match at:
            case ast.Constant():
                return self.constant(at)
            case ast.Name():
                return Value(self.name(at))
            case ast.UnaryOp():
                return self.unary(at, depth + 1)
            case ast.BinOp():
                return self.arithmetic(at, depth + 1)
            case ast.BoolOp():
                operator = "and" if isinstance(at.op, ast.And) else "or"
                return Logic(operator, tuple(self.truth(part, depth + 1) for part in at.values))
            case ast.Compare():
                return self.comparison(at, depth + 1)
            case ast.Subscript():
                return self.steps(at, depth + 1)
            case ast.Attribute() if at.attr in DOTTED and isinstance(at.value, ast.Name | ast.Constant):
                return Statistic(at.attr, self.name(at.value))
            case ast.Attribute():
                hint = near(at.attr, DOTTED) or f" There are: {', '.join(DOTTED)}."
                why = f"after a dot stands a statistic, and there is none {at.attr!r}.{hint}"
                self.refuse(at, f"{why} A tensor's name that is more than letters, digits and _ goes in quotes.")
            case ast.Call():
                return self.call(at, depth + 1)
            case _:
                self.refuse(at, f"an expression cannot hold {_IN_WORDS.get(type(at), 'this')}.")

    def number(self, at: ast.expr, depth: int) -> Node:
        """Return a part that must not be a truth."""
        node = self.node(at, depth)
        if is_truth(node):
            self.refuse(at, "this says yes or no, and a number is needed. Join such parts with 'and' or 'or'.")
        return node

    def truth(self, at: ast.expr, depth: int) -> Node:
        """Return a part that must be a truth."""
        node = self.node(at, depth)
        if not is_truth(node):
            self.refuse(at, "this is a number; 'and', 'or' and 'not' need a comparison, such as x > 3.")
        return node

    def series(self, at: ast.expr, depth: int) -> Node:
        """Return a part that must have one value a saved step."""
        node = self.node(at, depth)
        if not is_series(node):
            self.refuse(at, "this is one number, and a series (one number a saved step) is needed.")
        return node

    def constant(self, at: ast.Constant) -> Node:
        """Return a number, or the value of a tensor named in quotes."""
        if isinstance(at.value, str):
            return Value(self.name(at))
        if isinstance(at.value, bool) or not isinstance(at.value, int | float):
            self.refuse(at, "an expression holds numbers, names and functions; write a comparison, such as x > 3.")
        try:
            value = float(at.value)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            self.refuse(at, "the number is too large.")
        return Literal(value)

    def name(self, at: ast.expr) -> Name:
        """Return the name of a tensor, collection or role."""
        if isinstance(at, ast.Constant) and isinstance(at.value, str):
            try:
                matcher(at.value)
            except BadSelection as error:
                self.refuse(at, str(error))
            return Name(at.value, quoted=True)
        if not isinstance(at, ast.Name):
            why = "a statistic is that of a tensor, a collection or a role"
            self.refuse(at, f"{why}; give its name, in quotes where it is more than letters, digits and _.")
        if at.id in FUNCTIONS:
            self.refuse(at, f"{at.id} is a function; write {at.id}(...). A tensor of that name goes in quotes.")
        return Name(at.id)

    def unary(self, at: ast.UnaryOp, depth: int) -> Node:
        """Return -x, +x or not x."""
        if isinstance(at.op, ast.Not):
            return Not(self.truth(at.operand, depth))
        if isinstance(at.op, ast.Invert):
            self.refuse(at, "'~' is not read; write 'not'.")
        node = self.number(at.operand, depth)
        if isinstance(at.op, ast.UAdd):
            return node
        if isinstance(node, Literal):
            return Literal(0.0 - node.value)  # 0 has one sign
        return Arithmetic("*", Literal(-1.0), node)

    def arithmetic(self, at: ast.BinOp, depth: int) -> Node:
        """Return two values and an operator between them."""
        if type(at.op) not in _ARITHMETIC:
            known = " ".join(_ARITHMETIC.values())
            self.refuse(at, f"of the operators only {known} are read; 'and' and 'or' join comparisons.")
        left, right = self.number(at.left, depth), self.number(at.right, depth)
        operator = _ARITHMETIC[type(at.op)]
        if operator == "**" and not (isinstance(right, Literal) and abs(right.value) <= LARGEST_POWER):
            self.refuse(at.right, f"the power must be a number written out, of at most {LARGEST_POWER}.")
        return Arithmetic(operator, left, right)

    def comparison(self, at: ast.Compare, depth: int) -> Node:
        """Return a comparison; a < b < c is a < b and b < c."""
        sides = [at.left, *at.comparators]
        if any(type(one) not in _COMPARISONS for one in at.ops):
            self.refuse(at, f"of the comparisons only {' '.join(_COMPARISONS.values())} are read.")
        nodes, texts = [self.number(side, depth) for side in sides], [self.source(side) for side in sides]
        found = tuple(
            Comparison(_COMPARISONS[type(one)], nodes[i], nodes[i + 1], texts[i], texts[i + 1])
            for i, one in enumerate(at.ops)
        )
        return found[0] if len(found) == 1 else Logic("and", found)

    def steps(self, at: ast.Subscript, depth: int) -> Node:
        """Return part of a series."""
        form = "write loss[180:200] for the steps from 180 up to, not including, 200, and loss[-20:] for the last 20"
        if not isinstance(at.slice, ast.Slice) or at.slice.step is not None:
            self.refuse(at, f"brackets hold a range of steps: {form}.")
        bounds = [None if bound is None else self.node(bound, depth) for bound in (at.slice.lower, at.slice.upper)]
        for bound in bounds:
            if bound is not None and not (isinstance(bound, Literal) and bound.value == int(bound.value)):
                self.refuse(at, f"steps are whole numbers written out: {form}.")
        start, stop = (int(bound.value) if isinstance(bound, Literal) else None for bound in bounds)
        if any(abs(bound) >= 2**53 for bound in (start, stop) if bound is not None):
            self.refuse(at, "the step is too large.")
        return Steps(self.series(at.value, depth), start, stop)

    def call(self, at: ast.Call, depth: int) -> Node:
        """Return a function applied to its arguments."""
        if not isinstance(at.func, ast.Name):
            self.refuse(at, f"only these functions can be called: {', '.join(FUNCTIONS)}.")
        function, given = at.func.id, at.args
        if function not in FUNCTIONS:
            hint = near(function, FUNCTIONS) or f" There are: {', '.join(FUNCTIONS)}."
            self.refuse(at.func, f"there is no function {function!r}.{hint}")
        if at.keywords or not given or any(isinstance(one, ast.Starred) for one in given):
            self.refuse(at, f"{function} takes plain arguments, such as {function}(x).")
        if function in STATISTICS:
            self.count(at, 1)
            return Statistic(function, self.name(given[0]))
        if function == REFERENCE:
            return self.reference(at, depth)
        if function in OF_SEVERAL and len(given) > 1:
            return self.of_several(function, given, depth)
        if function in PLAIN:
            self.count(at, 1)
            return Plain(function, (self.number(given[0], depth),))
        if function in SHIFTED:
            self.count(at, 1)
            node = self.series(given[0], depth)
            if function != "prev" and is_truth(node):
                self.refuse(given[0], "this says yes or no, and a number is needed.")
            return Shifted(function, node)
        if function in ROLLING and len(given) > 1:
            self.count(at, 2)
            return Rolling(function, self.series(given[0], depth), self.window(given[1], depth))
        return self.over(at, function, depth)

    def count(self, at: ast.Call, count: int) -> None:
        """Refuse a call with another number of arguments."""
        if len(at.args) != count:
            self.refuse(at, f"it takes {count} argument{'s' * (count > 1)}, and has {len(at.args)}.")

    def of_several(self, function: str, given: list[ast.expr], depth: int) -> Node:
        """Return min or max of several values; of a series and a whole number written out it is a window."""
        first = self.node(given[0], depth)
        whole = isinstance(given[1], ast.Constant) and type(given[1].value) is int
        if len(given) == 2 and whole and is_series(first):
            return Rolling(function, first, self.window(given[1], depth))
        if is_truth(first):
            self.refuse(given[0], f"this says yes or no, and {function} needs numbers.")
        return Plain(function, (first, *(self.number(one, depth) for one in given[1:])))

    def window(self, at: ast.expr, depth: int) -> int:
        """Return the number of steps of a window."""
        node = self.node(at, depth)
        if isinstance(node, Literal) and 1 <= node.value <= LARGEST_WINDOW and node.value == int(node.value):
            return int(node.value)
        why = f"the number of earlier steps must be a whole number from 1 to {LARGEST_WINDOW:,}, written out"
        self.refuse(at, f"{why}. For the larger or smaller of two, write a number with a point: max(x, 0.0).")

    def over(self, at: ast.Call, function: str, depth: int) -> Node:
        """Return a function over all steps of a series."""
        self.count(at, 2 if function == "quantile" else 1)
        node = self.series(at.args[0], depth)
        if function in ("any", "all") and not is_truth(node):
            self.refuse(at.args[0], f"{function} needs a comparison, such as x > 3.")
        if function != "quantile":
            return Over(function, node)
        share = self.node(at.args[1], depth)
        if not isinstance(share, Literal) or not 0 <= share.value <= 1:
            self.refuse(at.args[1], "the share of a quantile must be a number from 0 to 1, written out.")
        return Over(function, node, share.value)

    def reference(self, at: ast.Call, depth: int) -> Node:
        """Return an expression of the reference run."""
        self.count(at, 1)
        node = self.node(at.args[0], depth)
        if any(isinstance(one, Other) for one in walk(node)):
            self.refuse(at, "ref stands within ref; there is one reference run.")
        if not any(isinstance(one, Value | Statistic) for one in walk(node)):
            self.refuse(at, "ref needs something of a run, such as ref(median(loss)).")
        return Other(node)
