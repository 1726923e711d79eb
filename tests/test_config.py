"""smdbg.yaml: where it is found, what it may say, and what is refused."""

from pathlib import Path

import pytest

from smdbg.config import Config, find_config, load_config
from smdbg.errors import BadConfig

FULL = """\
run: s3://bucket/runs/1
pack: default
rules:
  - exploding_tensor
  - vanishing_*
format: jsonl
storage_options:
  anon: true
  client_kwargs:
    endpoint_url: http://127.0.0.1:8333
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one; nothing above it holds a smdbg.yaml."""
    monkeypatch.chdir(tmp_path)
    assert find_config() is None
    return tmp_path


def write(project: Path, text: str) -> Path:
    file = project / "smdbg.yaml"
    file.write_text(text)
    return file


def test_without_a_file(project: Path) -> None:
    assert load_config() == Config()
    assert load_config().source is None


def test_everything(project: Path) -> None:
    file = write(project, FULL)
    assert load_config() == Config(
        run="s3://bucket/runs/1",
        pack="default",
        rules=("exploding_tensor", "vanishing_*"),
        format="jsonl",
        storage_options={"anon": True, "client_kwargs": {"endpoint_url": "http://127.0.0.1:8333"}},
        source=file,
    )


def test_empty_file_and_empty_values(project: Path) -> None:
    file = write(project, "")
    assert load_config() == Config(source=file)
    write(project, "run:\nrules:\nstorage_options:\nformat:\n")
    assert load_config() == Config(source=file)


def test_the_nearest_file_upward_wins(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(project, "run: top")
    inner = project / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert load_config().run == str(project / "top")
    write(project / "a", "run: nearer")
    assert load_config().run == str(project / "a" / "nearer")
    assert find_config(project) == project / "smdbg.yaml"
    (inner / "smdbg.yaml").mkdir()
    assert load_config().run == str(project / "a" / "nearer")


def test_a_given_path_wins(project: Path) -> None:
    write(project, "run: here")
    other = project / "other.yaml"
    other.write_text("run: there")
    assert load_config("other.yaml").run == str(project / "there")
    assert load_config(other).source == other


@pytest.mark.parametrize(
    ("text", "run", "pack"),
    [
        ("run: runs/1\npack: strict", "{here}/runs/1", "strict"),
        ("run: /data/run\npack: ci/strict.yaml", "/data/run", "{here}/ci/strict.yaml"),
        ("run: gs://b/r\npack: strict.yml", "gs://b/r", "{here}/strict.yml"),
        ("run: file:///data/run\npack: https://host/strict.yaml", "file:///data/run", "https://host/strict.yaml"),
    ],
)
def test_paths_count_from_the_file(project: Path, text: str, run: str, pack: str) -> None:
    write(project, text)
    config = load_config()
    assert config.run == run.format(here=project)
    assert config.pack == pack.format(here=project)


def test_home_is_expanded(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(project / "home"))
    write(project, "run: ~/runs/1")
    assert load_config().run == str(project / "home" / "runs" / "1")


def test_rules_as_one_line(project: Path) -> None:
    write(project, "rules: nan_values, 'x'".replace("'", ""))
    assert load_config().rules == ("nan_values", "x")


def test_secrets_are_not_shown(project: Path) -> None:
    write(project, "storage_options: {key: abc, secret: hush}")
    config = load_config()
    assert config.storage_options["secret"] == "hush"
    assert "hush" not in repr(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: a\nformatt: tsv", ":2: unknown key 'formatt'. Did you mean format?"),
        ("colour: red", ":1: unknown key 'colour'. Known are run, pack, rules, format, storage_options."),
        ("3: red", ":1: unknown key '3'. Known are"),
        ("run: 3", ":1: run must be text, not 3."),
        ("run: ''", ":1: run must be text, not ''."),
        ("\nrun: [a]", ":2: run must be text, not a list."),
        ("pack: {a: 1}", ":1: pack must be text, not a mapping."),
        ("rules: 3", ":1: rules must be a list of texts, not 3."),
        ("rules: a,,b", ":1: each of rules must be text, not ''."),
        ("rules:\n- a\n- 3", ":3: each of rules must be text, not 3."),
        ("rules:\n- a\n-", ":3: each of rules must be text, not nothing."),
        ("format: tvs", ":1: format must be one of table, tsv, jsonl, not 'tvs'. Did you mean tsv?"),
        ("format: [tsv]", ":1: format must be one of table, tsv, jsonl, not a list."),
        ("storage_options: x", ":1: storage_options must be a mapping, not 'x'."),
        ("storage_options:\n  1: x", ":2: the names in storage_options must be text, not 1."),
        ("run: a\nrun: b", ":2:1: 'run' is given twice"),
    ],
)
def test_refused(project: Path, text: str, message: str) -> None:
    file = write(project, text)
    with pytest.raises(BadConfig) as caught:
        load_config()
    assert str(caught.value).startswith(f"{file}{message}")


def test_a_named_file_must_exist(project: Path) -> None:
    with pytest.raises(BadConfig, match="absent.yaml cannot be read"):
        load_config("absent.yaml")
