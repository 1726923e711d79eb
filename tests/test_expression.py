"""Expressions: what is read and what is refused, and their values against a plain evaluation of the test's own."""

import math
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smdbg.analysis.expression import DEEPEST, LONGEST, parse
from smdbg.analysis.expression_nodes import (
    DOTTED,
    FUNCTIONS,
    Arithmetic,
    Comparison,
    Literal,
    Logic,
    Name,
    Other,
    Over,
    Plain,
    Rolling,
    Statistic,
    Steps,
    Value,
    is_series,
    is_truth,
    walk,
)
from smdbg.analysis.expression_values import Evaluation, Number, Series
from smdbg.errors import BadConfig

NAN = float("nan")

# ---------------------------------------------------------------------------------------------- what is read


def test_the_forms_of_an_expression() -> None:
    loss = Value(Name("loss"))
    norm = Statistic("l2", Name("gradients"))
    assert parse("l2(gradients) > 10 * median(l2(gradients), 64)") == Comparison(
        ">", norm, Arithmetic("*", Literal(10.0), Rolling("median", norm, 64)),
        "l2(gradients)", "10 * median(l2(gradients), 64)",
    )  # fmt: skip
    assert parse("median(loss[180:200]) < 2.1") == Comparison(
        "<", Over("median", Steps(loss, 180, 200)), Literal(2.1), "median(loss[180:200])", "2.1"
    )
    assert parse('"a/b.c".max') == Statistic("max", Name("a/b.c", quoted=True))
    assert parse('l2("*bias")') == Statistic("l2", Name("*bias", quoted=True))
    assert parse("ref(median(loss))") == Other(Over("median", loss))
    assert parse("1 < loss <= 3") == Logic(
        "and", (Comparison("<", Literal(1.0), loss, "1", "loss"), Comparison("<=", loss, Literal(3.0), "loss", "3"))
    )
    assert parse("loss[-20:]") == Steps(loss, -20, None)
    assert parse("quantile(loss, 0.9)") == Over("quantile", loss, 0.9)
    assert parse("-loss") == Arithmetic("*", Literal(-1.0), loss) and parse("-3") == Literal(-3.0)
    assert parse(" ( loss\n ** -2 ) # why") == Arithmetic("**", loss, Literal(-2.0))


def test_min_and_max_roll_over_a_whole_number_and_compare_all_else() -> None:
    loss = Value(Name("loss"))
    assert parse("max(loss)") == Over("max", loss)
    assert parse("max(loss, 64)") == Rolling("max", loss, 64)
    assert parse("max(loss, 64.0)") == Plain("max", (loss, Literal(64.0)))
    assert parse("max(median(loss), 3)") == Plain("max", (Over("median", loss), Literal(3.0)))
    assert parse("min(loss, acc, 2)") == Plain("min", (loss, Value(Name("acc")), Literal(2.0)))


@pytest.mark.parametrize(
    ("text", "series", "truth"),
    [
        ("loss", True, False), ("loss > 3", True, True), ("median(loss)", False, False), ("any(loss > 3)", False, True),
        ("loss > median(loss)", True, True), ("not isnan(loss)", True, True), ("mean(loss > 3)", False, False),
        ("last(loss > 3)", False, True), ("prev(loss > 3)", True, True), ("(loss > 3)[5:]", True, True),
        ("mean(loss > 3, 5)", True, False), ("max(1, 2)", False, False), ("ref(loss) > 1", True, True),
        ("isfinite(last(loss))", False, True), ("a.max", True, False),
    ],
)  # fmt: skip
def test_series_and_truths_are_told_apart(text: str, series: bool, truth: bool) -> None:
    assert (is_series(parse(text)), is_truth(parse(text))) == (series, truth)


@pytest.mark.parametrize(
    ("text", "at", "said"),
    [
        ("medain(loss) > 3", 1, "there is no function 'medain'. Did you mean median"),
        ("loss > L2(gradients)", 8, "there is no function 'L2'. Did you mean l2"),
        ("1 + zzzz(loss)", 5, "There are: l2, l1"),
        ("gradients.lmax > 3", 1, "none 'lmax'. Did you mean"),
        ("layer1.weight > 3", 1, "goes in quotes"),
        ("l2(layer1.weight)", 4, "give its name, in quotes"),
        ("l2(l2(loss))", 4, "of a tensor, a collection or a role"),
        ("l2(3)", 4, "of a tensor, a collection or a role"),
        ("l2(loss, 3)", 1, "it takes 1 argument, and has 2"),
        ("median()", 1, "median takes plain arguments"),
        ("median(x=loss)", 1, "median takes plain arguments"),
        ("median(*loss)", 1, "median takes plain arguments"),
        ("median(loss, 0)", 14, "from 1 to 100,000"),
        ("median(loss, 1.5)", 14, "from 1 to 100,000"),
        ("median(loss, n)", 14, "written out"),
        ("max(loss, 0)", 11, "max(x, 0.0)"),
        ("median(3)", 8, "a series (one number a saved step) is needed"),
        ("median(loss, 3, 4)", 1, "it takes 2 arguments, and has 3"),
        ("sum(loss, 3)", 1, "it takes 1 argument, and has 2"),
        ("quantile(loss, 2)", 16, "from 0 to 1"),
        ("quantile(loss)", 1, "it takes 2 arguments"),
        ("any(loss)", 5, "any needs a comparison"),
        ("diff(loss > 3)", 6, "a number is needed"),
        ("(loss > 3) + 1", 2, "a number is needed"),
        ("max(loss > 3, 1.0)", 5, "max needs numbers"),
        ("loss and acc > 3", 1, "need a comparison"),
        ("not loss", 5, "need a comparison"),
        ("~loss", 1, "write 'not'"),
        ("loss % 3", 1, "only + - * / **"),
        ("loss // 3", 1, "only + - * / **"),
        ("(loss > 3) & (loss < 5)", 1, "'and' and 'or' join comparisons"),
        ("loss in acc", 1, "only < <= > >= == !="),
        ("loss is acc", 1, "only < <= > >= == !="),
        ("2 ** loss", 6, "of at most 16"),
        ("2 ** 17", 6, "of at most 16"),
        ("2 ** 2 ** 2", 6, "of at most 16"),
        ("loss[3]", 1, "a range of steps"),
        ("loss[1:10:2]", 1, "a range of steps"),
        ("loss[1:2, 3]", 1, "a range of steps"),
        ("loss[a:b]", 1, "whole numbers written out"),
        ("loss[0.5:]", 1, "whole numbers written out"),
        ("loss[:9999999999999999999]", 1, "too large"),
        ("loss > True", 8, "numbers, names and functions"),
        ("loss > None", 8, "numbers, names and functions"),
        ("loss > 2j", 8, "numbers, names and functions"),
        ("loss > ...", 8, "numbers, names and functions"),
        ("loss > b'a'", 8, "numbers, names and functions"),
        ("loss > 1e999", 8, "too large"),
        ("loss > 1" + "0" * 400, 8, "too large"),
        ("median > 3", 1, "median is a function"),
        ("l2('re:(') > 3", 4, "not a regular expression"),
        ("'' > 3", 1, "empty"),
        ("ref(ref(loss))", 1, "within ref"),
        ("ref(3)", 1, "ref needs something of a run"),
        ("ref(loss, acc)", 1, "it takes 1 argument"),
        ("f'{loss}' > 3", 1, "an f-string"),
        ("lambda: 3", 1, "lambda"),
        ("loss if loss else 3", 1, "if ... else"),
        ("[x for x in loss]", 1, "a loop"),
        ("[1, 2]", 1, "a list"),
        ("{1: 2}", 1, "a dict"),
        ("loss, acc", 1, "a comma"),
        ("(y := 3)", 2, "':='"),
        ("loss.__class__", 1, "none '__class__'"),
        ("().__class__.__bases__", 1, "none '__bases__'"),
        ("__import__('os').system('x')", 1, "only these functions can be called"),
        ("__import__('os')", 1, "no function '__import__'"),
        ("(\n1,\n  zzz(3))", 1, "a comma"),
        ("(loss +\n  zzz(3))", 11, "no function 'zzz'"),
        ("é > zzz(1)", 5, "no function 'zzz'"),
    ],
)  # fmt: skip
def test_what_is_refused_shows_its_place_and_the_nearest(text: str, at: int, said: str) -> None:
    with pytest.raises(BadConfig) as caught:
        parse(text)
    assert said in str(caught.value) and f"at character {at} (" in str(caught.value)


@pytest.mark.parametrize("text", ["loss > 3 +", "loss >\n 3", "loss = 3", "(loss", "loss > 3; acc > 4", "import os"])
def test_what_python_cannot_read_shows_its_place(text: str) -> None:
    with pytest.raises(BadConfig, match=r"cannot be read at character \d"):
        parse(text)


def test_size_is_bounded() -> None:
    longest = "loss" + "\t" * (LONGEST - 9) + " > 3"
    assert parse(longest[:4] + longest[5:]) and parse("1" + "+1" * (DEEPEST - 1))
    for text, said in (
        ("loss >" + " " * LONGEST + "3", "at most 2,000"),
        ("", "is empty"),
        ("  \n ", "is empty"),
        ("1" + "+1" * DEEPEST, "nested more than 50 deep"),
        ("not " * 400 + "loss > 3", "nested"),
        ("-" * 1900 + "1", "nested"),
        ("(" * 900 + "1" + ")" * 900, "cannot be read"),
        ("max(" * 60 + "a" + ",1.0)" * 60, "nested more than 50 deep"),
        ("loss > 3\0", "cannot be read"),
        ("loss > \ud800", "cannot be read"),
    ):
        with pytest.raises(BadConfig, match=said):
            parse(text)


def test_reading_takes_time_in_proportion() -> None:
    """Each part is read once: a chain of max(..., 1) would otherwise take 2 ** 45 readings."""
    node = parse("max(" * 45 + "loss" + ", 1)" * 45)
    assert sum(1 for _ in walk(node)) == 46


TOKENS = [*FUNCTIONS, *DOTTED, "loss", "gradients", "tensor", "'a/b'", '"*"', "(", ")", "[", "]", ":", ",", ".", "+",
          "-", "*", "/", "**", "<", ">", "==", "!=", "and", "or", "not", "3", "1e3", "0", " ", "\n", "lambda", "if",
          "for", "in", "await", "yield", "=", ":=", "@", "~", "#", "\\", "True", "\ud800", "\0", "é"]  # fmt: skip
LETTERS = st.text(st.characters(), max_size=60) | st.text(string.printable, max_size=60)


@settings(max_examples=600, deadline=None)
@given(st.one_of(LETTERS, st.lists(st.sampled_from(TOKENS), max_size=25).map("".join)))
@example("\\")
@example("'" * 3)
@example("0777")
@example("1_0_")
@example("loss > 3;import os")
def test_any_text_is_an_expression_or_a_bad_one(text: str) -> None:
    try:
        node = parse(text)
    except BadConfig as error:
        assert str(error)
    else:
        assert isinstance(is_series(node) or is_truth(node), bool)


# ------------------------------------------------------------------------- values, against a plain evaluation


@dataclass(frozen=True)
class Given:
    """A source that has the series of a test; statistics are those of the name with the statistic before it."""

    series: dict[str, dict[int, float]]
    reference: "Given | None" = None

    def value(self, name: Name) -> Series:
        return self._of(name.text)

    def statistic(self, statistic: str, name: Name) -> Series:
        return self._of(f"{statistic} {name.text}")

    def other(self) -> "Given":
        assert self.reference is not None
        return self.reference

    def _of(self, key: str) -> Series:
        found = self.series[key]
        return Series(np.array(list(found), np.int64), np.array(list(found.values()), np.float64))


# The plain evaluation: a series is a dict of step -> number, a number is a float, None is what is missing.
Plainly = dict[int, float] | float | None
Meaning = Callable[[Given], Any]
Made = tuple[str, Meaning]


def stepwise(function: Callable[..., float], *parts: Plainly) -> Plainly:
    """Apply a function of numbers where all have a value."""
    series = [part for part in parts if isinstance(part, dict)]
    if not series:
        return None if None in parts else float(function(*parts))
    if None in parts:
        return {}
    steps = [step for step in series[0] if all(step in one for one in series)]
    return {step: float(function(*(p[step] if isinstance(p, dict) else p for p in parts))) for step in steps}


def compared(function: Callable[..., Any]) -> Callable[[float, float], float]:
    return lambda a, b: NAN if np.isnan(a) or np.isnan(b) else float(function(a, b))


def joined(word: str, truths: list[float]) -> float:
    """Three-valued and, or."""
    if word == "and":
        return 0.0 if 0.0 in truths else NAN if any(map(np.isnan, truths)) else 1.0
    return 1.0 if 1.0 in truths else NAN if any(map(np.isnan, truths)) else 0.0


def logic(word: str, parts: list[Plainly]) -> Plainly:
    series = [part for part in parts if isinstance(part, dict)]
    if not series:
        found = joined(word, [NAN if part is None else part for part in parts])  # type: ignore[misc]
        return None if np.isnan(found) and None in parts else found
    steps = sorted({step for one in series for step in one})
    row = lambda step: [p.get(step, NAN) if isinstance(p, dict) else NAN if p is None else p for p in parts]  # noqa: E731
    return {step: joined(word, row(step)) for step in steps}


def over(function: Callable[[list[float]], float], part: Any) -> Plainly:
    return float(function(list(part.values()))) if part else None


def rolling(function: Callable[[list[float]], float], part: Any, window: int) -> Plainly:
    steps, values = list(part), list(part.values())
    return {steps[i]: float(function(values[i - window : i])) for i in range(window, len(steps))}


def shifted(function: Callable[[float, float], float], part: Any) -> Plainly:
    steps, values = list(part), list(part.values())
    return {steps[i]: float(function(values[i], values[i - 1])) for i in range(1, len(steps))}


def cut(part: Any, start: int | None, stop: int | None) -> Plainly:
    steps = list(part)
    turn = lambda bound: bound if bound is None or bound >= 0 else steps[max(bound, -len(steps))] if steps else 0  # noqa: E731
    low, high = turn(start), turn(stop)
    return {s: v for s, v in part.items() if (low is None or s >= low) and (high is None or s < high)}


def divided(a: float, b: float) -> float:
    return float(np.divide(np.float64(a), np.float64(0.0 if b == 0 else b)))


def raised(x: float, power: float) -> float:
    return NAN if x < 0 and power == 0.5 else float(np.float64(0.0 if x == 0 else x) ** power)


def quantile(values: list[float], share: float) -> float:
    if np.isfinite(values).all() or np.isnan(values).any():
        return float(np.quantile(values, share))
    below, rest = divmod(share * (len(values) - 1), 1)
    a, *more = sorted(values)[int(below) : int(below) + 2]
    return a if rest == 0 or more == [a] else a * (1 - rest) + more[0] * rest


ONE: dict[str, Callable[[float], float]] = {
    "abs": abs, "log": np.log, "log10": np.log10, "sqrt": np.sqrt, "exp": np.exp,
    "isnan": lambda x: float(np.isnan(x)), "isfinite": lambda x: float(np.isfinite(x)),
}  # fmt: skip
MANY: dict[str, Callable[..., float]] = {
    "median": np.median, "mean": np.mean, "min": np.min, "max": np.max, "std": np.std,
}  # fmt: skip
SYMBOLS: dict[str, Callable[..., Any]] = {
    "+": np.add, "-": np.subtract, "*": np.multiply, "/": divided,
    "<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal, "==": np.equal, "!=": np.not_equal,
}  # fmt: skip
LEAVES = ["loss", "acc", "l2 gradients", "max gradients", "rare"]
TEXTS = dict(zip(LEAVES, ["loss", '"acc"', "l2(gradients)", "gradients.max", "rare"], strict=True))


def leaf(key: str) -> Made:
    return TEXTS[key], lambda source: dict(source.series[key])


NUMBERS = st.sampled_from([0, 1, 2, 3, 0.5, 1e3]).map(lambda number: (f"{number}", lambda source: float(number)))


@st.composite
def number_expressions(draw: st.DrawFn, depth: int, series: bool, reference: bool = True) -> Made:
    """Draw a text that gives numbers, a series or one alone, and what it means."""
    again = lambda want=series: draw(number_expressions(depth - 1, want, reference))  # noqa: E731
    truth = lambda want: draw(truth_expressions(depth - 1, want, reference))  # noqa: E731
    if depth == 0:
        return leaf(draw(st.sampled_from(LEAVES))) if series else draw(NUMBERS)
    forms = ["leaf", "arithmetic", "plain", "several", "power", "minus"] + ["ref"] * reference
    if series:
        forms += ["rolling", "shares", "shifted", "steps"]
    else:
        forms += ["over", "share", "sum", "ends", "count", "trues", "quantile"]
    form = draw(st.sampled_from(forms))
    if form == "leaf":
        return leaf(draw(st.sampled_from(LEAVES))) if series else draw(NUMBERS)
    if form == "ref":
        text, mean = draw(number_expressions(depth - 1, True, False))
        if not series:
            return f"ref(mean({text}))", lambda source: over(np.mean, mean(source.reference))
        return f"ref({text})", lambda source: mean(source.reference)
    if form == "arithmetic":
        symbol = draw(st.sampled_from("+-*/"))
        (a, mean_a), (b, mean_b) = (again(), again(False)) if draw(st.booleans()) else (again(), again())
        return f"({a} {symbol} {b})", lambda source: stepwise(SYMBOLS[symbol], mean_a(source), mean_b(source))
    if form == "plain":
        name = draw(st.sampled_from(["abs", "log", "log10", "sqrt", "exp"]))
        text, mean = again()
        return f"{name}({text})", lambda source: stepwise(ONE[name], mean(source))
    if form == "power":
        power = draw(st.sampled_from([2, -1, 0.5]))
        text, mean = again()
        return f"({text}) ** {power}", lambda source: stepwise(lambda x: raised(x, power), mean(source))
    if form == "minus":
        text, mean = again()
        return f"-({text})", lambda source: stepwise(lambda x: -1 * x, mean(source))
    if form == "several":
        name = draw(st.sampled_from(["min", "max"]))
        function = np.minimum if name == "min" else np.maximum
        (a, mean_a), (b, mean_b) = again(), again(False)
        return f"{name}({a}, 0 + {b})", lambda source: stepwise(function, mean_a(source), mean_b(source))
    if form in ("rolling", "shares"):
        name, window = draw(st.sampled_from(sorted(MANY))), draw(st.integers(1, 5))
        text, mean = again() if form == "rolling" else truth(True)
        return f"{name}({text}, {window})", lambda source: rolling(MANY[name], mean(source), window)
    if form == "shifted":
        name = draw(st.sampled_from(["prev", "diff", "ratio", "finite"]))
        text, mean = again()
        if name == "finite":
            return f"finite({text})", lambda source: {s: v for s, v in mean(source).items() if np.isfinite(v)}
        function = {"prev": lambda x, y: y, "diff": lambda x, y: x - y, "ratio": divided}[name]
        return f"{name}({text})", lambda source: shifted(function, mean(source))
    if form == "steps":
        start = draw(st.none() | st.integers(-8, 40))
        stop = draw(st.none() | st.integers(-8, 40))
        text, mean = again()
        shown = ":".join("" if bound is None else str(bound) for bound in (start, stop))
        return f"({text})[{shown}]", lambda source: cut(mean(source), start, stop)
    text, mean = truth(True) if form in ("share", "trues") else again(True)
    if form == "trues":
        return f"count({text})", lambda source: float(sum(v == 1 for v in mean(source).values()))
    if form == "count":
        return f"count({text})", lambda source: float(len(mean(source)))
    if form in ("over", "share"):
        name = draw(st.sampled_from(sorted(MANY)))
        return f"{name}({text})", lambda source: over(MANY[name], mean(source))
    if form == "sum":
        return f"sum({text})", lambda source: over(np.sum, mean(source))
    if form == "quantile":
        share = draw(st.sampled_from([0, 0.1, 0.75, 1]))
        return f"quantile({text}, {share})", lambda source: over(lambda values: quantile(values, share), mean(source))
    name = draw(st.sampled_from(["first", "last"]))
    at = 0 if name == "first" else -1
    return f"{name}({text})", lambda source: over(lambda values: values[at], mean(source))


@st.composite
def truth_expressions(draw: st.DrawFn, depth: int, series: bool, reference: bool = True) -> Made:
    """Draw a text that says yes or no, at each step or once, and what it means."""
    number = lambda want=series: draw(number_expressions(max(depth - 1, 0), want, reference))  # noqa: E731
    again = lambda want=series: draw(truth_expressions(depth - 1, want, reference))  # noqa: E731
    forms = ["compare", "chain", "plain"] + (["logic", "not"] if depth else [])
    forms += ["any"] if depth and not series else []
    form = draw(st.sampled_from(forms))
    if form == "compare":
        symbol = draw(st.sampled_from(["<", "<=", ">", ">=", "==", "!="]))
        (a, mean_a), (b, mean_b) = number(), number(draw(st.booleans()) and series)
        function = compared(SYMBOLS[symbol])
        return f"({a} {symbol} {b})", lambda source: stepwise(function, mean_a(source), mean_b(source))
    if form == "chain":
        (a, mean_a), (b, mean_b), (c, mean_c) = number(), number(), number(False)
        less, most = compared(np.less), compared(np.less_equal)
        return f"({a} < {b} <= {c})", lambda source: logic(
            "and", [stepwise(less, mean_a(source), mean_b(source)), stepwise(most, mean_b(source), mean_c(source))]
        )
    if form == "plain":
        name = draw(st.sampled_from(["isnan", "isfinite"]))
        text, mean = number()
        return f"{name}({text})", lambda source: stepwise(ONE[name], mean(source))
    if form == "logic":
        word = draw(st.sampled_from(["and", "or"]))
        made = [again(), again(draw(st.booleans()) and series)]
        text = f" {word} ".join(text for text, _ in made)
        return f"({text})", lambda source: logic(word, [mean(source) for _, mean in made])
    if form == "not":
        text, mean = again()
        return f"(not {text})", lambda source: stepwise(lambda truth: 1 - truth, mean(source))
    name = draw(st.sampled_from(["any", "all"]))
    text, mean = again(True)
    word = "or" if name == "any" else "and"
    return f"{name}({text})", lambda source: over(lambda values: joined(word, values), mean(source))


VALUES = np.array([0.0, 1.0, 2.0, 3.0, -1.5, 0.5, 1e-3, 100.0, NAN, np.inf])


def source_of(seed: int) -> Given:
    """Return series of up to 14 of 30 steps, and those of a reference run."""
    random = np.random.default_rng(seed)

    def series(key: str) -> dict[int, float]:
        count = int(random.integers(0, 5 if key == "rare" else 15))
        steps = np.sort(random.permutation(30)[:count])
        return dict(zip(steps.tolist(), random.choice(VALUES, count).tolist(), strict=True))

    return Given({key: series(key) for key in LEAVES}, Given({key: series(key) for key in LEAVES}))


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 4).flatmap(
        lambda depth: st.booleans().flatmap(
            lambda series: st.one_of(number_expressions(depth, series), truth_expressions(depth, series))
        )
    ),
    st.integers(0, 2**32).map(source_of),
)
def test_values_are_those_of_a_plain_evaluation(made: Made, source: Given) -> None:
    text = made[0]
    with np.errstate(all="ignore"):
        expected = made[1](source)
    found = Evaluation(source).of(parse(text))
    if isinstance(expected, dict):
        assert isinstance(found, Series) and found.steps.tolist() == list(expected), text
        np.testing.assert_allclose(found.values, list(expected.values()), rtol=1e-12, err_msg=text)
    else:
        assert isinstance(found, Number) and found.missing == (expected is None), text
        np.testing.assert_allclose(found.value, NAN if expected is None else expected, rtol=1e-12, err_msg=text)


def value_of(text: str, **series: dict[int, float]) -> Any:
    found = Evaluation(Given(series)).of(parse(text))
    return dict(zip(found.steps.tolist(), found.values.tolist(), strict=True)) if isinstance(found, Series) else found


def test_two_series_meet_at_the_steps_that_both_have_and_truths_at_those_of_any() -> None:
    a, b = {0: 1.0, 10: 2.0, 20: 3.0}, {10: 1.0, 15: 9.0, 20: 9.0}
    assert value_of("a + b", a=a, b=b) == {10: 3.0, 20: 12.0}
    found = value_of("a > 2 or b > 5", a=a, b=b)
    assert found[15] == 1 and found[20] == 1 and found[10] == 0 and np.isnan(found[0])


def test_a_window_ends_before_the_present_step() -> None:
    x = dict(enumerate([1.0, 2.0, 3.0, 100.0, 5.0]))
    assert value_of("median(x, 3)", x=x) == {3: 2.0, 4: 3.0}
    assert value_of("x > 10 * median(x, 3)", x=x) == {3: 1.0, 4: 0.0}


def test_nan_goes_through_and_finite_takes_it_out() -> None:
    x = {0: 1.0, 1: NAN, 2: 3.0, 3: 5.0}
    assert np.isnan(value_of("median(x)", x=x).value) and value_of("median(finite(x))", x=x).value == 3
    assert np.isnan(value_of("x > 2", x=x)[1]) and np.isnan(value_of("not x > 2", x=x)[1])
    assert value_of("isnan(x) or x > 10 * median(x, 3)", x=x)[1] == 1


def test_what_is_not_there_is_missing_and_not_nan() -> None:
    x = {0: 1.0}
    assert value_of("median(x[500:]) < 2", x=x).missing and value_of("isfinite(last(x[500:]))", x=x).missing
    assert value_of("x > median(x[500:])", x=x) == {}
    assert value_of("median(x[500:]) < 2 or last(x) > 0", x=x) == Number(1.0)


def test_a_quantile_beside_an_infinity() -> None:
    x = {0: 1.0, 1: math.inf, 2: 3.0}
    assert [value_of(f"quantile(x, {share})", x=x).value for share in (0, 0.25, 0.5, 0.75, 1)] == [
        1, 2, 3, math.inf, math.inf,
    ]  # fmt: skip


def test_a_root_of_a_negative_number_is_nan_and_zero_has_one_sign() -> None:
    x = {0: -math.inf, 1: -2.0, 2: -0.0}
    assert [math.isnan(value) for value in value_of("x ** 0.5", x=x).values()] == [True, True, False]
    assert math.isnan(value_of("first(x) ** 0.5", x=x).value)
    assert value_of("1 / x", x=x)[2] == value_of("x ** -1", x=x)[2] == math.inf


def test_long_windows_are_gone_over_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = {step: float(value) for step, value in enumerate(np.random.default_rng(0).normal(size=100))}
    whole = value_of("median(x, 7)", x=x)
    monkeypatch.setattr("smdbg.analysis.expression_values.AT_ONCE", 30)
    assert value_of("median(x, 7)", x=x) == whole and len(whole) == 93
