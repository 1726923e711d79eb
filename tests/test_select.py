"""Selectors, step ranges and indices, compared with Python's and NumPy's own reading of them."""

import fnmatch
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from smdbg.errors import BadSelection
from smdbg.select import Selector, StepList, StepRange, check_index, parse_index, parse_steps, select, unmatched

NAMES = ["loss/loss:0", "layer1.weight", "layer1.bias", "gradient/layer1.weight", "w[0]", "w0", "Layer1.weight"]
SAVED = np.arange(0, 500, 10)

names_lists = st.lists(st.text("ab/:[]0*", min_size=1, max_size=6), unique=True, max_size=8)
patterns = st.text("ab/:[]0*?!", min_size=1, max_size=6)
small = st.integers(-12, 12)
maybe = st.none() | small


def text_of(start: int | None, stop: int | None, step: int | None) -> str:
    head = f"{'' if start is None else start}:{'' if stop is None else stop}"
    return head if step is None else f"{head}:{step}"


# tensors


@pytest.mark.parametrize(
    ("patterns", "exclude", "wanted"),
    [
        ([], [], NAMES),
        (["loss/loss:0"], [], ["loss/loss:0"]),
        (["*weight"], [], ["layer1.weight", "gradient/layer1.weight", "Layer1.weight"]),
        (["layer1.*"], [], ["layer1.weight", "layer1.bias"]),
        (["re:^[lg].*weight$"], [], ["layer1.weight", "gradient/layer1.weight"]),
        (["re:loss"], [], ["loss/loss:0"]),
        (["w[0]"], [], ["w[0]"]),
        (["w?"], [], ["w0"]),
        (["w[1-9]", "w[[]0]"], [], ["w[0]"]),
        (["*bias", "*weight"], ["gradient/*"], ["layer1.weight", "layer1.bias", "Layer1.weight"]),
        ([], ["re:layer1", "w[0]"], ["loss/loss:0", "w0", "Layer1.weight"]),
        (["nothing"], [], []),
    ],
)
def test_select(patterns: list[str], exclude: list[str], wanted: list[str]) -> None:
    assert select(NAMES, patterns, exclude) == wanted
    assert Selector(tuple(patterns), tuple(exclude)).apply(NAMES) == wanted


def test_an_exact_name_wins_over_glob_and_expression() -> None:
    assert select(["re:a", "a", "[a]"], ["re:a"]) == ["re:a"]
    assert select(["a", "[a]"], ["[a]"]) == ["[a]"]
    assert select(["a"], ["[a]"]) == ["a"]


def test_one_string_is_one_pattern() -> None:
    assert select(NAMES, "w0") == ["w0"]
    assert select(NAMES, exclude="*") == []


@given(names_lists, patterns)
def test_globs_agree_with_fnmatch(names: list[str], pattern: str) -> None:
    assume(not pattern.startswith("re:"))
    wanted = [pattern] if pattern in names else [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    assert select(names, [pattern]) == wanted


@given(names_lists, st.lists(patterns, max_size=3), st.lists(patterns, max_size=3))
def test_union_minus_exclusions_in_given_order(names: list[str], include: list[str], exclude: list[str]) -> None:
    chosen = {name for pattern in include for name in select(names, [pattern])} if include else set(names)
    dropped = {name for pattern in exclude for name in select(names, [pattern])}
    assert select(names, include, exclude) == [name for name in names if name in chosen - dropped]


def test_unmatched_names_the_patterns_that_select_nothing() -> None:
    assert unmatched(NAMES, ["*weight", "x*", "re:zzz", "w[0]"]) == ["x*", "re:zzz"]


def test_bad_expression_says_where() -> None:
    with pytest.raises(BadSelection, match=r"'re:ab\(c' .* at character 3 of 'ab\(c'"):
        select(NAMES, ["re:ab(c"])
    with pytest.raises(BadSelection, match="too large"):
        select(NAMES, ["re:a{99999999999999999999}"])


def test_empty_selector_is_refused() -> None:
    with pytest.raises(BadSelection, match="empty"):
        select(NAMES, [""])


# steps


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (":", SAVED),
        ("100:200", np.arange(100, 200, 10)),
        ("100:200:50", [100, 150]),
        ("::20", np.arange(0, 500, 20)),
        ("5::15", [20, 50, 80, 110, 140, 170, 200, 230, 260, 290, 320, 350, 380, 410, 440, 470]),
        ("17:21", [20]),
        ("-5:", [450, 460, 470, 480, 490]),
        ("-5:-2", [450, 460, 470]),
        (":-48", [0, 10]),
        ("-1000:20", [0, 10]),
        ("-1", [490]),
        ("17", None),
        ("20", [20]),
        (" 30, 20,20 ", [20, 30]),
        ("-1,0", [0, 490]),
        ("0,17", None),
        ("-51", None),
        ("500:", None),
        ("11:20", None),
        ("200:100", None),
        (":0", None),
    ],
)
def test_steps(text: str, wanted: object) -> None:
    if wanted is None:
        with pytest.raises(BadSelection, match="saved steps run from 0 to 490, 50 of them"):
            parse_steps(text).apply(SAVED)
    else:
        chosen = parse_steps(text).apply(SAVED)
        assert chosen.dtype == np.int64
        np.testing.assert_array_equal(chosen, wanted)


@pytest.mark.parametrize(
    "text", ["", " ", "a", "1.5", "1:2:3:4", "::0", "::-1", "1,,2", "1,2:3", "1_0", "٣", "9" * 30, "0x1", "1 2", ","]
)
def test_steps_that_cannot_be_read(text: str) -> None:
    with pytest.raises(BadSelection, match="START:STOP:EVERY") as caught:
        parse_steps(text)
    assert repr(text) in str(caught.value)


def test_a_missing_step_names_its_neighbours() -> None:
    with pytest.raises(BadSelection, match="Step 17 was not saved: .*; the nearest are 10 and 20"):
        parse_steps("17").apply(SAVED)


def test_few_or_no_saved_steps() -> None:
    with pytest.raises(BadSelection, match="step 7 is the only one saved"):
        parse_steps("8:").apply(np.array([7]))
    for text in (":", "-1", "-1:", "0"):
        with pytest.raises(BadSelection, match="no step is saved"):
            parse_steps(text).apply(np.array([], dtype=np.int64))


@given(st.integers(0, 15) | st.none(), st.integers(0, 15) | st.none(), st.integers(1, 5) | st.none())
def test_ranges_of_dense_steps_are_slices(start: int | None, stop: int | None, every: int | None) -> None:
    saved = np.arange(12)
    wanted = saved[start:stop:every]
    reading = parse_steps(text_of(start, stop, every))
    assert reading == StepRange(start, stop, every or 1)
    if len(wanted):
        np.testing.assert_array_equal(reading.apply(saved), wanted)
    else:
        with pytest.raises(BadSelection):
            reading.apply(saved)


@given(st.lists(st.integers(0, 99), min_size=1, unique=True), maybe, maybe, st.integers(1, 7))
def test_ranges_follow_their_definition(saved: list[int], start: int | None, stop: int | None, every: int) -> None:
    saved.sort()
    low = 0 if start is None else start if start >= 0 else saved[start:][0]
    high = 1000 if stop is None else stop if stop >= 0 else (saved[stop:][0])
    wanted = [step for step in range(low, high, every) if step in saved]
    reading = parse_steps(str(StepRange(start, stop, every)))
    if wanted:
        assert reading.apply(np.array(saved)).tolist() == wanted
    else:
        with pytest.raises(BadSelection):
            reading.apply(np.array(saved))


@given(st.lists(st.integers(0, 30), min_size=1, unique=True), st.lists(st.integers(-5, 30), min_size=1))
def test_lists_are_the_listed_steps(saved: list[int], listed: list[int]) -> None:
    saved.sort()
    reading = parse_steps(str(StepList(tuple(listed))))
    assert reading == StepList(tuple(listed))
    try:
        wanted = sorted({saved[step] if step < 0 else saved[saved.index(step)] for step in listed})
    except (IndexError, ValueError):
        with pytest.raises(BadSelection):
            reading.apply(np.array(saved))
    else:
        assert reading.apply(np.array(saved)).tolist() == wanted


# parts of a tensor

parts = small.map(str) | st.builds(text_of, maybe, maybe, maybe) | st.just("...")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0", (0,)),
        ("-1,", (-1,)),
        ("0, :, ::2", (0, slice(None), slice(None, None, 2))),
        ("..., -1", (..., -1)),
        ("Ellipsis,1:2", (..., slice(1, 2))),
        ("::-1", (slice(None, None, -1),)),
    ],
)
def test_index(text: str, wanted: tuple[object, ...]) -> None:
    assert parse_index(text) == wanted


@pytest.mark.parametrize(
    "text", ["", ",", "0,,1", "None", "newaxis,0", "a", "1.0", "1:2:3:4", "::0", "...,...", "[0]", "True"]
)
def test_index_that_cannot_be_read(text: str) -> None:
    with pytest.raises(BadSelection, match="NumPy") as caught:
        parse_index(text)
    assert repr(text) in str(caught.value)


@given(st.lists(st.integers(0, 4), max_size=3), st.lists(parts, min_size=1, max_size=4))
def test_index_agrees_with_numpy(shape: list[int], texts: list[str]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    text = ", ".join(texts)
    try:
        index = parse_index(text)
    except BadSelection:
        assert texts.count("...") > 1 or re.search(r":0$", text.replace(", ", "\n"), re.MULTILINE)
        return
    try:
        taken = array[index]
    except IndexError:
        fine = False
    else:
        fine = array.size == 0 or np.size(taken) > 0
        assume(array.size > 0)  # the axes of an empty tensor are checked one by one below
    if fine:
        check_index(index, shape, "t")
    else:
        with pytest.raises(BadSelection):
            check_index(index, shape, "t")


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("3", (3, 2), "The index 3 is outside axis 0 of 'w:0', which has size 3 (shape 3 x 2). Give a number"),
        ("..., -3", (3, 2), "The index -3 is outside axis 1 of 'w:0', which has size 2 (shape 3 x 2)."),
        ("0,0,0", (3, 2), "The index has 3 parts, but 'w:0' has 2 axes (shape 3 x 2)."),
        ("0", (), "The index has 1 part, but 'w:0' is a single number."),
        (":, 5:9", (3, 2), "The slice '5:9' selects nothing from axis 1 of 'w:0', which has size 2 (shape 3 x 2)."),
        ("2:1:1", (3,), "The slice '2:1:1' selects nothing from axis 0"),
        ("0", (0,), "The index 0 is outside axis 0 of 'w:0', which has size 0 (shape 0). The tensor is empty."),
    ],
)
def test_check_index_names_axis_and_size(text: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(BadSelection) as caught:
        check_index(parse_index(text), shape, "w:0")
    assert message in str(caught.value)


def test_an_empty_axis_may_be_sliced() -> None:
    check_index(parse_index(":, 1:2, 0"), (0, 3, 2), "t")
    check_index(parse_index("..."), (), "t")


def test_selecting_needs_no_numpy() -> None:
    code = "import sys, smdbg.select as s; s.parse_steps('1:2'); s.parse_index('0'); sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
