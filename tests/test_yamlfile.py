"""YAML files: lines of entries, YAML 1.2 words, and errors that point at the place."""

import json
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smdbg.errors import BadConfig
from smdbg.yamlfile import line_of, load


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pack.yaml"


def test_data_and_lines(file: Path) -> None:
    file.write_text("# c\nextends: default\nrules:\n  - name: nan_values\n    parameters: {limit: 1e3,\n      n: 2}\n")
    data, lines = load(file)
    assert data == {"extends": "default", "rules": [{"name": "nan_values", "parameters": {"limit": 1000, "n": 2}}]}
    assert lines == {
        (): 2,
        ("extends",): 2,
        ("rules",): 3,
        ("rules", 0): 4,
        ("rules", 0, "name"): 4,
        ("rules", 0, "parameters"): 5,
        ("rules", 0, "parameters", "limit"): 5,
        ("rules", 0, "parameters", "n"): 6,
    }


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\ufeff"])
def test_an_empty_file_is_an_empty_mapping(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    assert load(file)[0] == {}


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("yes", "yes"),
        ("on", "on"),
        ("10:20", "10:20"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("=", "="),
        ("'12'", "12"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("12", 12),
        ("-7", -7),
        ("010", 10),
        ("0x1F", 31),
        ("1e-3", 0.001),
        ("1.5E+3", 1500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("-.inf", -math.inf),
    ],
)
def test_words_of_yaml_1_2(file: Path, word: str, value: object) -> None:
    file.write_text(f"key: {word}\n")
    read = load(file)[0]["key"]
    assert read == value
    assert type(read) is type(value)


def test_nan(file: Path) -> None:
    file.write_text("key: .nan\n")
    assert math.isnan(load(file)[0]["key"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", ":1:1: the file must hold 'key: value' lines, not a list."),
        ("word\n", ":1:1: the file must hold 'key: value' lines, not a single value."),
        ("a: 1\nb: 2\na: 3\n", ":3:1: 'a' is given twice (first on line 1); remove one."),
        ("a:\n  b: 1\n  b: 1\n", ":3:3: 'b' is given twice (first on line 2); remove one."),
        ("a: 1\nb: c: d\n", ":2:5: this is not valid YAML: mapping values are not allowed here. Put quotes"),
        ("a:\n\tb: 1\n", ":2:1: this is not valid YAML: .* Indent with spaces, not with tabs."),
        ("a: *bias\n", ":1:4: this is not valid YAML: found undefined alias 'bias'. Put quotes"),
        ("a: [1\n", ":2:1: this is not valid YAML: while parsing a flow sequence"),
        ("a: 1\n---\nb: 2\n", ":2:1: this is not valid YAML: expected a single document"),
        ("a: &x [*x]\n", ":1:4: an alias refers to what it is part of; write it out."),
        ("a: &x {b: *x}\n", ":1:4: an alias refers to what it is part of; write it out."),
        ("a: !!python/object/apply:os.system [ls]\n", ":1:4: tags (words that begin with '!') are not read"),
        ("a: !!int x\n", ":1:4: tags (words that begin with '!') are not read"),
        ("a: 1\n!!str b: 1\nc: !!set {d}\n", ":3:4: tags (words that begin with '!') are not read"),
        ("? [a]\n: 1\n", ":1:3: a key must be a plain word, not a list."),
        ("a: 1\nb: \x00\n", ":2: YAML does not allow the character U+0000. Remove it."),
        ('a: "\\U00110000"\n', ": this is not valid YAML: chr() arg not in range"),
        (f"a: {'1' * 5000}\n", ":1:4: the number is too long."),
        ("[" * 5000, " is nested too deeply to be read."),
    ],
)
def test_errors_point_at_the_place(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(BadConfig) as caught:
        load(file)
    head, _, tail = message.partition(".* ")
    assert str(caught.value).startswith(f"{file}{head}")
    assert str(caught.value).endswith(tail)


def test_merge_keys_merge_nothing(file: Path) -> None:
    file.write_text("a: &a {x: 1}\nb:\n  <<: *a\n")
    assert load(file)[0]["b"] == {"<<": {"x": 1}}


def test_aliases_are_read_and_have_the_line_of_their_place(file: Path) -> None:
    file.write_text("a: &a {x: 1}\n\nb: *a\n")
    data, lines = load(file)
    assert data == {"a": {"x": 1}, "b": {"x": 1}}
    assert line_of(lines, ("a", "x")) == 1
    assert line_of(lines, ("b", "x")) == 3
    assert line_of(lines, ("c", 0)) == 1


def test_nested_aliases_do_not_explode(file: Path) -> None:
    rows = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
    file.write_text("\n".join(rows))
    assert len(load(file)[1]) < 1000


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="No such file"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(BadConfig, match="cannot be read"):
        load(tmp_path)
    binary = tmp_path / "latin.yaml"
    binary.write_bytes(b"a: 1\nb: \xe9\n")
    with pytest.raises(BadConfig, match=r"latin.yaml:2: the file is not UTF-8 text"):
        load(binary)


text = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=6)
scalars = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(scalars | text, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner))


@given(st.dictionaries(text, values, max_size=4))
def test_json_is_yaml(data: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.yaml"
        file.write_text(json.dumps(data, indent=1))
        read, lines = load(file)
        rows = file.read_text().split("\n")
    assert read == data
    for key in data:
        assert rows[lines[(key,)] - 1].startswith(f" {json.dumps(key)}: ")
