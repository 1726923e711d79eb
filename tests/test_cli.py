"""The command line: its boundary, its output, and the commands that list and show."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smdbg import CollectionConfig, Hook, ReductionConfig, SaveConfig, open_run
from smdbg.cli import output, run
from smdbg.cli.exits import Exit
from smdbg.cli.root import COMMANDS, Entry, root
from smdbg.cli.sparkline import BLOCKS, sparkline
from smdbg.errors import BadSelection

SMDBG = [sys.executable, "-m", "smdbg"]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder of its own."""
    monkeypatch.chdir(tmp_path)


RAW = ReductionConfig(save_raw_tensor=True)
EVERY = SaveConfig(save_interval=1)


def make_run(url: str, steps: int = 30, **options: Any) -> None:
    """Write a run of 30 training steps, with an eval step after every tenth.

    A loss (NaN at training step 14, infinite at 15), a weight [3, 2] (values at even steps only), a text, and a metric
    at every 7th step.
    """
    collections = [
        CollectionConfig("losses", save_config=EVERY, reduction_config=RAW),
        CollectionConfig(
            "weights",
            save_config={"train": EVERY},
            reduction_config=ReductionConfig(save_raw_tensor=SaveConfig(save_interval=2)),
        ),
        CollectionConfig("notes", save_config=EVERY, reduction_config=RAW),
        CollectionConfig("metrics", save_config=SaveConfig(save_interval=7), reduction_config=RAW),
    ]
    with Hook(url, collections=collections, hyperparameters={"lr": 0.1, "name": "x[red]y"}, **options) as hook:
        for step in range(steps):
            hook.set_mode("train")
            hook.save_tensor("loss", np.float32({14: np.nan, 15: np.inf}.get(step, 1 / (step + 1))), "losses")
            hook.save_tensor("fc/weight[0]", weight(step), "weights", role="weight")
            hook.save_tensor("note", np.array(f"step {step}"), "notes")
            hook.save_scalar("accuracy", step / 100)
            hook.end_step()
            if step % 10 == 9:
                hook.set_mode("eval")
                hook.save_tensor("loss", np.float32(2.0), "losses")
                hook.end_step()


def weight(step: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.arange(6, dtype=np.float32).reshape(3, 2) + step


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def shell(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SMDBG, *args], capture_output=True, text=True, timeout=60, **options)


# ---------------------------------------------------------------------------------------------------- boundary


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], list[str]]:
    """Make a function a command, and return the arguments that call it."""

    def make(body: Callable[[], object]) -> list[str]:
        module = types.ModuleType("smdbg.cli.fake")
        module.command = click.Command("fake", callback=body)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "smdbg.cli.fake", module)
        monkeypatch.setitem(COMMANDS, "fake", Entry("fake", ""))
        return ["fake"]

    return make


def raising(error: BaseException) -> Callable[[], object]:
    def body() -> object:
        raise error

    return body


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (lambda: None, 0),
        (lambda: Exit.CLEAN, 0),
        (lambda: Exit.VIOLATIONS, 1),
        (lambda: 1, 2),
        (lambda: True, 2),
        (lambda: click.get_current_context().exit(1), 2),
        (lambda: click.get_current_context().exit(0), 0),
        (raising(SystemExit(1)), 2),
        (raising(SystemExit(0)), 2),
        (raising(RuntimeError("boom")), 2),
        (raising(BadSelection("Nothing there.")), 2),
        (raising(click.ClickException("no")), 2),
        (raising(KeyboardInterrupt()), 130),
        (raising(click.Abort()), 130),
        (raising(BrokenPipeError()), 141),
        (raising(MemoryError()), 2),
    ],
)
def test_status_of_whatever_a_command_does(command: Any, body: Callable[[], object], status: int) -> None:
    assert run(command(body)) == status


def test_an_error_of_ours_is_one_paragraph(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run(command(raising(BadSelection("Nothing \x1b[31mthere. Do this."))))
    out, err = capsys.readouterr()
    assert (out, err) == ("", "smdbg: Nothing \\x1b[31mthere. Do this.\n")


@pytest.mark.parametrize("debug", [False, True])
def test_the_traceback_is_shown_with_debug_only(command: Any, debug: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*(["--debug"] if debug else []), *command(raising(RuntimeError("boom")))]) == Exit.ERROR
    err = capsys.readouterr().err
    assert ("Traceback" in err) is debug
    assert ("--debug shows more" in err) is not debug
    assert "smdbg: internal error: RuntimeError('boom')" in err


def test_interruption_and_a_broken_pipe_say_nothing(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run(command(raising(KeyboardInterrupt())))
    run(command(raising(BrokenPipeError())))
    assert capsys.readouterr() == ("", "")


def test_main_ends_the_process_with_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    from smdbg.cli import main as entry

    monkeypatch.setattr(sys, "argv", ["smdbg", "nonsense"])
    with pytest.raises(SystemExit) as stop:
        entry()
    assert stop.value.code == 2


@pytest.mark.parametrize("args", [[], ["nonsense"], ["--nonsense"], ["ls", "--nonsense"], ["inspect"]])
def test_wrong_usage_ends_with_2_and_an_empty_stdout(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(args) == Exit.ERROR
    out, err = capsys.readouterr()
    assert out == "" and "Usage: smdbg" in err


def test_misspelt_commands_and_options_are_answered_with_the_near_ones(capsys: pytest.CaptureFixture[str]) -> None:
    run(["chekc"])
    run(["ls", "--colection", "x"])
    err = capsys.readouterr().err
    assert "Did you mean check?" in err and "--collection" in err


def test_a_dependency_that_breaks_at_import_is_no_finding(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise ImportError('broken')")
    result = shell("ls", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result.returncode == 2 and "ImportError('broken')" in result.stderr


@pytest.mark.parametrize("args", [["--help"], ["rules", "--format", "jsonl"]])
def test_a_full_disk_is_said(args: list[str]) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run([*SMDBG, *args], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith("smdbg: could not write the output: No space left")
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr


@pytest.mark.parametrize("args", [["--help"], ["rules", "--format", "jsonl"]])
def test_a_reader_that_went_away_is_quiet(args: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([*SMDBG, *args], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_leave_the_status_as_it_is(closed: str) -> None:
    for args, status in (("rules", 0), ("nonsense", 2), ("ls", 2)):
        command = f"{sys.executable} -m smdbg {args} {closed}"
        assert subprocess.run(command, shell=True, stdout=subprocess.DEVNULL, timeout=60).returncode == status


def test_completion_knows_the_commands() -> None:
    words = {"_SMDBG_COMPLETE": "bash_complete", "COMP_WORDS": "smdbg in", "COMP_CWORD": "1"}
    result = shell(env={**os.environ, **words})
    assert (result.returncode, result.stdout) == (0, "plain,inspect\n")


def test_ctrl_c_ends_with_130(tmp_path: Path) -> None:
    make_run("run", 1)
    os.mkfifo(tmp_path / "pack.yaml")  # a pack that is never written to its end holds the command
    command = [*SMDBG, "--run", "run", "check", "--pack", "./pack.yaml"]
    # A job in the background of a shell ignores the signal, and so would everything it starts.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with open("pack.yaml", "w"):  # opens when the command does
        for _ in range(15):  # a signal that comes just before a blocking read is seen only at its end: send another
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2)
                break
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "")


# ---------------------------------------------------------------------------------------------------- help


def test_the_help_table_is_that_of_the_commands() -> None:
    context = click.Context(root)
    for name, entry in COMMANDS.items():
        found = root.get_command(context, name)
        assert found is not None and found.name == name
        assert found.short_help == entry.help
        assert (found.help or "").startswith(entry.help), name
        assert "Examples:" in (found.help or "")


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["ls", "--help"], ["check", "--help"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "smdbg", *args], capture_output=True, text=True, timeout=60
    )
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines() if "|" in line}
    assert result.returncode == 0 and "click" in imported
    for name in ("numpy", "zarr", "s3fs", "fsspec", "rich", "yaml", "smdbg.analysis", "smdbg.store"):
        assert name not in imported, name


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_command_has_both_help_flags(name: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*([name] if name else []), flag]) == Exit.CLEAN
    out = capsys.readouterr().out
    assert "Examples:" in out and max(map(len, out.splitlines())) <= 100


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import smdbg

    assert run(["--version"]) == Exit.CLEAN
    assert capsys.readouterr().out == f"smdbg {smdbg.__version__}\n"


# ---------------------------------------------------------------------------------------------------- output


@given(st.text())
def test_a_tsv_field_is_one_field_and_can_be_read_back(text: str) -> None:
    written = output.field(text)
    assert "\t" not in written and len(written.splitlines()) <= 1
    restored = written.encode("ascii", "backslashreplace").decode("unicode_escape")
    assert restored == text


@given(st.text())
def test_nothing_a_terminal_would_obey_is_printed(text: str) -> None:
    safe = output.printable(text)
    assert all(c.isprintable() or c == "\u3000" for c in safe)
    safe.encode("utf-8")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.complex_numbers(),
        lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_every_value_becomes_strict_json(value: Any) -> None:
    text = output.dump({"value": value})
    record = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert record["version"] == 1 and "\n" not in text


def test_nan_and_infinities_are_words_in_json_and_tsv() -> None:
    values = [math.nan, math.inf, -math.inf]
    assert json.loads(output.dump({"v": values}))["v"] == ["nan", "inf", "-inf"]
    assert json.loads(output.dump({"v": np.array(values, np.float32)}))["v"] == ["nan", "inf", "-inf"]
    assert [output.field(value) for value in values] == ["nan", "inf", "-inf"]


@given(st.floats(allow_nan=False))
def test_numbers_in_tsv_are_exact(value: float) -> None:
    assert float(output.field(value)) == value
    assert output.field(np.float64(value)) == output.field(value)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (20 << 20, "20 MiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert output.size(count) == text


def test_an_encoding_without_the_characters_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    output.data("größer ▁")
    sys.stdout.flush()
    assert raw.getvalue() == b"gr\\xf6\\xdfer \\u2581\n"


COLUMNS = [
    output.Column("name", lambda r: r["name"], fold=True),
    output.Column("big", lambda r: "x" * 20, drop=1),
    output.Column("small", lambda r: "y" * 20, drop=2),
]


class Terminal(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self) -> bool:
        return True


Shown = Callable[..., str]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """Return what calls a function with a terminal for stdout, and returns what it printed."""

    def shown(body: Callable[[], object], width: int = 80, **variables: str) -> str:
        with monkeypatch.context() as patch:
            stream = Terminal()
            patch.setattr(sys, "stdout", stream)
            for name, value in {"TERM": "xterm-256color", "COLUMNS": str(width), **variables}.items():
                patch.setenv(name, value)
            body()
            return stream.getvalue()

    return shown


@pytest.mark.parametrize(("width", "shown"), [(100, 3), (60, 2), (30, 1)])
def test_a_narrow_terminal_leaves_out_the_least_important_columns(terminal: Shown, width: int, shown: int) -> None:
    text = terminal(lambda: output.table([{"name": "n" * 40}], COLUMNS), width)
    assert sum(title in text for title in ("name", "big", "small")) == shown
    assert text.replace("name", "").count("n") == 40, "names are folded, never cut"
    assert max(map(len, text.replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines())) <= width


def test_names_are_never_taken_for_markup(terminal: Shown) -> None:
    names = ["w[red]x[/red]", "a[b]c", "w[0]", ":smile:", "\x1b[31mred\x07", "層/重み"]
    text = terminal(lambda: output.table([{"name": name} for name in names], COLUMNS[:1]))
    for name in names[:4] + names[5:]:
        assert name in text
    assert "\\x1b[31mred\\x07" in text and "\x07" not in text


def test_no_color_and_dumb_terminals_get_no_codes(terminal: Shown) -> None:
    red = [output.Column("name", lambda r: r["name"], style=lambda r: "red")]

    def body() -> None:
        output.table([{"name": "x"}], red)

    assert "\x1b[31m" in terminal(body)
    assert "\x1b[31m" in terminal(body, NO_COLOR="")
    assert "\x1b[3" not in terminal(body, NO_COLOR="1")
    assert "\x1b" not in terminal(body, TERM="dumb")


def test_a_table_in_a_pipe_is_plain_and_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    output.table([{"name": "n" * 500}], COLUMNS)
    out = capsys.readouterr().out
    assert "n" * 500 in out and "\x1b" not in out


@given(st.lists(st.floats(), max_size=200), st.integers(1, 80))
def test_sparklines_fit_and_show_what_is_not_finite(values: list[float], width: int) -> None:
    text = sparkline(values, width).text
    assert len(text) == min(len(values), width)
    assert ("×" in text) == any(map(math.isnan, values))
    if values and all(map(math.isfinite, values)):
        assert set(text) <= set(BLOCKS)
        if len(values) <= width and max(values) > min(values):
            assert {BLOCKS[0], BLOCKS[-1]} <= set(text)


def test_a_sparkline_keeps_a_single_spike() -> None:
    values = [0.0] * 1000
    values[517] = 1.0
    assert sparkline(values, 10).text == "▁▁▁▁▁█▁▁▁▁"
    assert sparkline([1.0, 1e3, 1e6], 3) == ("▁▅█", True)


# ---------------------------------------------------------------------------------------------------- which run


def chosen(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Return the one tensor of the run that a command is about."""
    assert run([*args, "ls", "--format", "jsonl"]) == Exit.CLEAN, capsys.readouterr().err
    (record,) = lines(capsys)
    return str(record["name"])


def one(url: str, name: str) -> None:
    with Hook(url) as hook:
        hook.save_scalar(name, 1.0)


def test_the_run_is_the_flag_then_the_variable_then_the_file_then_the_newest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for url in ("runs/b", "runs/a", "env", "file", "before", "after"):
        one(url, url)
    os.utime("runs/b/zarr.json", ns=(1, 1))
    assert chosen(capsys) == "runs/a"
    Path("smdbg.yaml").write_text("run: file\n")
    assert chosen(capsys) == "file"
    monkeypatch.setenv("SMDBG_RUN", "env")
    assert chosen(capsys) == "env"
    assert chosen(capsys, "--run", "before") == "before"
    assert run(["-r", "before", "ls", "-r", "after", "--format", "tsv"]) == Exit.CLEAN
    assert capsys.readouterr().out.startswith("after\t")


def test_the_file_sets_the_format_and_a_broken_file_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    one("a", "x")
    Path("smdbg.yaml").write_text("run: a\nformat: jsonl\n")
    assert run(["ls"]) == Exit.CLEAN
    assert lines(capsys)[0]["name"] == "x"
    assert run(["ls", "--format", "tsv"]) == Exit.CLEAN
    assert capsys.readouterr().out.startswith("x\t")
    Path("smdbg.yaml").write_text("runn: a\n")
    for args in (["ls"], ["runs"], ["rules"], ["check"]):
        assert run(args) == Exit.ERROR
        out, err = capsys.readouterr()
        assert out == "" and "smdbg.yaml:1" in err and "Did you mean run?" in err


def test_the_newest_run_is_named_on_stderr_unless_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    one("runs/a", "a")
    assert run(["ls"]) == Exit.CLEAN
    assert "runs/a" in capsys.readouterr().err
    assert run(["ls", "-q"]) == Exit.CLEAN
    assert capsys.readouterr().err == ""


def test_in_ci_the_run_must_be_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    one("runs/a", "a")
    monkeypatch.setenv("CI", "true")
    assert run(["ls"]) == Exit.ERROR
    out, err = capsys.readouterr()
    assert out == "" and "--run" in err and "SMDBG_RUN" in err
    monkeypatch.delenv("CI")
    assert run(["--run", "", "ls"]) == Exit.ERROR, "an unset variable of a script is not the newest run"
    assert run(["--run", "runs/a", "ls"]) == Exit.CLEAN


@pytest.mark.parametrize("args", [["ls"], ["inspect", "x"], ["check"], ["runs", "nowhere"]])
@pytest.mark.parametrize("url", [None, "nowhere"])
def test_no_run_is_status_2(args: list[str], url: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*(["--run", url] if url else []), *args]) == Exit.ERROR
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("smdbg: ") and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------- ls


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The run that make_run writes."""
    url = str(tmp_path_factory.mktemp("cli") / "run")
    make_run(url)
    return url


def test_ls_gives_every_field(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--run", written, "ls", "--format", "jsonl"]) == Exit.CLEAN
    records = {record["name"]: record for record in lines(capsys)}
    assert list(records) == ["loss", "fc/weight[0]", "note", "accuracy"]
    assert list(records["loss"]) == (
        "version name collection role dtype shape steps first_step last_step workers bytes".split()
    )
    found = records["fc/weight[0]"]
    stored = found.pop("bytes")
    assert found == {
        "version": 1,
        "name": "fc/weight[0]",
        "collection": "weights",
        "role": "weight",
        "dtype": "float32",
        "shape": [3, 2],
        "steps": 30,
        "first_step": 0,
        "last_step": 31,
        "workers": 1,
    }
    assert stored == 15 * 24
    assert records["loss"]["steps"] == 33 and records["accuracy"]["steps"] == 5


def test_ls_in_tsv_has_the_same_fields_and_no_header(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--run", written, "ls", "loss"]) == Exit.CLEAN
    (row,) = capsys.readouterr().out.splitlines()
    assert row.split("\t")[:9] == ["loss", "losses", "loss", "float32", "[]", "33", "0", "32", "1"]


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["fc*", "note"], ["fc/weight[0]", "note"]),
        (["fc/weight[0]"], ["fc/weight[0]"]),
        (["re:^(loss|note)$"], ["loss", "note"]),
        (["--exclude", "re:o"], ["fc/weight[0]", "accuracy"]),
        (["--collection", "losses,notes"], ["loss", "note"]),
        (["--collection", "losses", "--collection", "weights"], ["loss", "fc/weight[0]"]),
        (["--mode", "eval"], ["loss"]),
    ],
)
def test_ls_selects(written: str, args: list[str], names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--run", written, "ls", "--format", "jsonl", *args]) == Exit.CLEAN
    assert [record["name"] for record in lines(capsys)] == names


def test_ls_counts_the_steps_of_the_mode(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(["--run", written, "ls", "loss", "--mode", "eval", "--format", "jsonl"])
    (record,) = lines(capsys)
    assert (record["steps"], record["first_step"], record["last_step"]) == (3, 10, 32)


def test_ls_of_nothing_is_empty_and_says_so(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--run", written, "ls", "nonsense*"]) == Exit.CLEAN
    out, err = capsys.readouterr()
    assert out == "" and "No tensor matches" in err
    assert run(["--run", written, "ls", "--collection", "wieghts"]) == Exit.ERROR
    assert "Did you mean weights" in capsys.readouterr().err


@pytest.mark.parametrize("width", [20, 60, 200])
def test_ls_as_a_table_shows_whole_names_at_every_width(written: str, terminal: Shown, width: int) -> None:
    text = terminal(lambda: run(["--run", written, "ls"]), width)
    assert "fc/weight[0]" in text and "accuracy" in text and "…" not in text
    assert ("3 x 2" in text) is (width != 20)


# ---------------------------------------------------------------------------------------------------- inspect


def inspected(written: str, capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, Any]]:
    assert run(["--run", written, "inspect", "--format", "jsonl", *args]) == Exit.CLEAN, capsys.readouterr().err
    return lines(capsys)


def test_inspect_gives_the_statistics_of_every_step(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    records = inspected(written, capsys, "fc/weight[0]")
    assert len(records) == 30
    twelfth = records[12]
    assert (twelfth["step"], twelfth["mode"], twelfth["mode_step"], twelfth["worker"]) == (13, "train", 12, 0)
    array = weight(12)
    assert (twelfth["count"], twelfth["nan"], twelfth["min"], twelfth["max"]) == (6, 0, 12, 17)
    assert twelfth["l2"] == pytest.approx(np.linalg.norm(array), rel=1e-5)
    assert {"posinf", "neginf", "mean", "std", "abs_max", "zeros", "l1", "abs_mean"} <= set(twelfth)


def test_inspect_of_a_scalar_has_its_value_and_tells_nan_from_absent(
    written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    records = inspected(written, capsys, "loss", "--mode", "train")
    assert len(records) == 30
    assert [record["value"] for record in records[:2]] == [1.0, 0.5]
    assert [records[step]["value"] for step in (14, 15)] == ["nan", "inf"]
    assert (records[14]["nan"], records[15]["posinf"]) == (1, 1)
    assert [record["mode_step"] for record in inspected(written, capsys, "accuracy")] == [0, 7, 14, 21, 28]


def test_inspect_in_tsv_has_the_same_values_in_the_same_order(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = inspected(written, capsys, "loss", "--steps", "2")[0]
    assert run(["--run", written, "inspect", "loss", "--steps", "2"]) == Exit.CLEAN
    fields = capsys.readouterr().out.rstrip("\n").split("\t")
    assert fields == [output.field(value) for key, value in record.items() if key != "version"]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [("0:10:3", [0, 3, 6, 9]), ("-2:", [30, 31]), ("5", [5]), ("9,11", [9, 11]), ("::16", [0, 16])],
)
def test_inspect_selects_steps(
    written: str, steps: str, expected: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    records = inspected(written, capsys, "fc/weight[0]", "--steps", steps)
    assert [record["step"] for record in records] == expected


def test_inspect_gives_values_bit_for_bit(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    records = inspected(written, capsys, "fc/weight[0]", "--values", "--steps", ":10")
    assert [record["mode_step"] for record in records] == [0, 2, 4, 6, 8]
    for record in records:
        assert np.array_equal(np.array(record["value"], np.float32), weight(record["mode_step"]))
        assert set(record) == {"version", "step", "mode", "mode_step", "worker", "attempt", "value"}


def test_inspect_slices_and_reduces(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, step = "fc/weight[0]", ["--steps", "2"]
    assert inspected(written, capsys, name, *step, "--index", "0")[0]["value"] == [2, 3]
    assert inspected(written, capsys, name, *step, "--index", "::2, 1")[0]["value"] == [3, 7]
    reduced = inspected(written, capsys, name, *step, "--reduce", "mean,max", "--axis", "0")[0]
    assert (reduced["mean"], reduced["max"]) == ([4, 5], [6, 7])
    sliced = inspected(written, capsys, name, *step, "--reduce", "sum", "--index", ":, 1")[0]
    assert sliced["sum"] == 3 + 5 + 7
    assert inspected(written, capsys, name, *step, "--reduce", "median")[0]["median"] == 4.5


def test_inspect_reduces_what_statistics_hold_without_values(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    records = inspected(written, capsys, "fc/weight[0]", "--reduce", "mean,variance", "--steps", "1")
    assert records[0]["mean"] == 3.5 and records[0]["variance"] == pytest.approx(np.var(weight(1)))


def test_inspect_shows_texts(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspected(written, capsys, "note", "--steps", "3")[0]["value"] == "step 3"
    run(["--run", written, "inspect", "note", "--format", "table"])
    assert "step 29" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["fc/weihgt"], ["fc/weight[0]", "Did you mean"]),
        (["*o*"], ["matches 2 tensors", "loss, note"]),
        (["fc/weight[0]", "--values", "--steps", "1"], ["Only statistics", "kept at steps 0, 2, 4"]),
        (["fc/weight[0]", "--steps", "1000:"], ["saved steps run from 0 to 31"]),
        (["fc/weight[0]", "--steps", "1:2:3:4"], ["two colons"]),
        (["fc/weight[0]", "--index", "7"], ["axis 0", "size 3"]),
        (["fc/weight[0]", "--index", "0,0,0"], ["2 axes"]),
        (["fc/weight[0]", "--index", "zero"], ["cannot be read"]),
        (["fc/weight[0]", "--reduce", "meen"], ["Did you mean mean"]),
        (["fc/weight[0]", "--reduce", "mean", "--axis", "2"], ["2 axes"]),
        (["fc/weight[0]", "--axis", "2"], ["--reduce"]),
        (["fc/weight[0]", "--worker", "3"], ["Worker 3"]),
        (["fc/weight[0]", "--mode", "eval"], ["never saved in mode eval"]),
        (["fc/weight[0]", "--out", "no/such/folder/x.npy"], ["no/such/folder"]),
        (["fc/weight[0]", "--out", "x.npy", "--values", "--steps", "1"], ["Only statistics"]),
        (["loss", "--out", "x.npy", "--reduce", "mean,max"], ["one name"]),
    ],
)
def test_inspect_says_what_is_wrong(
    written: str, args: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--run", written, "inspect", *args]) == Exit.ERROR
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err and "internal error" not in err
    for word in words:
        assert word in err, err
    assert not Path("x.npy").exists()


def test_a_glob_may_stand_for_one_name(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(inspected(written, capsys, "fc*")) == 30


def test_inspect_writes_one_array(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("w.npy").write_text("old")
    assert run(["--run", written, "inspect", "fc/weight[0]", "--out", "w.npy"]) == Exit.CLEAN
    array = np.load("w.npy", allow_pickle=False)
    assert array.dtype == np.float32
    assert np.array_equal(array, np.stack([weight(step) for step in range(0, 30, 2)]))
    out, err = capsys.readouterr()
    assert out == "" and "15 steps" in err
    assert run(["--run", written, "inspect", "note", "--out", "n.npy", "--steps", ":2"]) == Exit.CLEAN
    assert np.load("n.npy", allow_pickle=False).tolist() == ["step 0", "step 1"]
    assert run(["--run", written, "inspect", "fc*", "--index", "0", "--reduce", "max", "--out", "m.npy"]) == Exit.CLEAN
    assert np.load("m.npy").tolist() == [step + 1 for step in range(0, 30, 2)]
    assert sorted(os.listdir()) == ["m.npy", "n.npy", "w.npy"]


def test_one_array_cannot_hold_changing_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    with Hook("run", collections=[CollectionConfig("t", save_config=EVERY, reduction_config=RAW)]) as hook:
        for step in range(3):
            hook.save_tensor("x", np.zeros((2, step + 1)), "t")
            hook.end_step()
    assert run(["--run", "run", "inspect", "x", "--out", "x.npy"]) == Exit.ERROR
    err = capsys.readouterr().err
    assert "float64 2 x 1 at step 0, float64 2 x 2 at step 1" in err and os.listdir() == ["run"]
    assert run(["--run", "run", "inspect", "x", "--out", "x.npy", "--steps", "1"]) == Exit.CLEAN
    assert np.load("x.npy").shape == (1, 2, 2)
    assert [record["value"] for record in inspected("run", capsys, "x", "--values", "--index", "0, -1")] == [0, 0, 0]


def test_inspect_as_a_table_leaves_out_the_middle(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--run", written, "inspect", "loss", "--format", "table"]) == Exit.CLEAN
    out = capsys.readouterr().out
    assert "×" in out and "13 of 33 left out; --steps : shows all" in out and len(out.splitlines()) < 35
    assert "train 29" in out
    assert run(["--run", written, "inspect", "loss", "--format", "table", "--steps", ":"]) == Exit.CLEAN
    out = capsys.readouterr().out
    assert "left out" not in out and "nan" in out and "inf" in out
    assert run(["--run", written, "inspect", "fc*", "--values", "--format", "table"]) == Exit.CLEAN
    assert "[4. 5.]" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "bool", "complex64", "int8", "float16", "float64"])
def test_every_dtype_is_written_so_that_numpy_reads_it(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    value = np.array([[0, 1, 2], [3, 4, 5]]).astype(kind)
    with Hook("run", collections=[CollectionConfig("t", save_config=EVERY, reduction_config=RAW)]) as hook:
        for _ in range(3):
            hook.save_tensor("x", value, "t")
            hook.end_step()
    assert run(["--run", "run", "inspect", "x", "--out", "x.npy"]) == Exit.CLEAN, capsys.readouterr().err
    array = np.load("x.npy", allow_pickle=False)
    assert array.shape == (3, 2, 3) and np.array_equal(array[2].astype(complex), value.astype(complex))
    assert array.dtype == ("float32" if "float8" in dtype or dtype == "bfloat16" else dtype)
    record = inspected("run", capsys, "x", "--values", "--steps", "0")[0]
    assert np.array_equal(np.array(record["value"], complex), value.astype(complex))


def test_a_table_reads_no_more_large_values_than_it_shows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from smdbg.analysis.run import Tensor

    with Hook("run", collections=[CollectionConfig("t", save_config=EVERY, reduction_config=RAW)]) as hook:
        for step in range(50):
            hook.save_tensor("x", np.full((4, 4), step), "t")
            hook.end_step()
    read: list[int] = []
    values = Tensor.values

    def counting(self: Tensor, steps: Any = None, worker: int = 0, index: Any = None) -> Any:
        read.extend(steps)
        return values(self, steps, worker, index)

    monkeypatch.setattr(Tensor, "values", counting)
    assert run(["--run", "run", "inspect", "x", "--values", "--format", "table"]) == Exit.CLEAN
    assert "30 of 50 left out" in capsys.readouterr().out
    assert read == [*range(10), *range(40, 50)]


def test_large_values_are_shown_as_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    with Hook("run", collections=[CollectionConfig("t", save_config=EVERY, reduction_config=RAW)]) as hook:
        hook.set_mode("eval")
        hook.save_tensor("x", np.arange(12.0).reshape(3, 4), "t")
    assert run(["--run", "run", "inspect", "x", "--values", "--format", "table"]) == Exit.CLEAN
    assert capsys.readouterr().out.endswith(
        "step 0 (eval 0)\n[[ 0.  1.  2.  3.]\n [ 4.  5.  6.  7.]\n [ 8.  9. 10. 11.]]\n"
    )


def test_inspect_of_several_workers_gives_one_record_a_step_and_worker(capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(2):
        with Hook("run", rank=rank, world_size=2, workers="all") as hook:
            for step in range(3):
                hook.save_tensor("loss", np.float32(step + 10 * rank), "losses")
                hook.end_step()
    records = inspected("run", capsys, "loss")
    assert [(r["step"], r["worker"], r["value"]) for r in records] == [
        (0, 0, 0), (0, 1, 10), (1, 0, 1), (1, 1, 11), (2, 0, 2), (2, 1, 12)
    ]  # fmt: skip
    assert [r["value"] for r in inspected("run", capsys, "loss", "--worker", "1")] == [10, 11, 12]
    assert run(["--run", "run", "inspect", "loss", "--out", "x.npy"]) == Exit.ERROR
    assert "--worker" in capsys.readouterr().err
    assert run(["--run", "run", "inspect", "loss", "--out", "x.npy", "--worker", "1"]) == Exit.CLEAN
    assert np.load("x.npy").tolist() == [10, 11, 12]
    assert run(["--run", "run", "ls", "--format", "table"]) == Exit.CLEAN
    assert "workers" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- runs


def test_runs_lists_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    make_run("runs/done", 5)
    hook = Hook("runs/open", hyperparameters={"scale": 1e11})
    hook.save_scalar("x", 1.0)
    hook.end_step()
    hook.flush()
    with pytest.raises(RuntimeError), Hook("runs/broken") as third:
        third.save_scalar("x", 1.0)
        raise RuntimeError("out of luck")
    Path("runs/junk").mkdir()
    try:
        assert run(["runs", "--format", "jsonl"]) == Exit.CLEAN
        records = {record["name"]: record for record in lines(capsys)}
        assert list(records) == ["done", "open", "broken"], "in the order of creation"
        assert records["done"]["status"] == "completed" and records["open"]["status"] == "running"
        assert records["broken"]["status"].startswith("failed: RuntimeError")
        assert records["open"]["hyperparameters"] == {"scale": 1e11}
        assert (records["done"]["steps"], records["done"]["last_step"], records["done"]["workers"]) == (5, 4, 1)
        assert 0 <= records["done"]["age"] < 300 and records["done"]["created"].endswith("Z")
        assert run(["runs", "runs", "--format", "table"]) == Exit.CLEAN
        out = capsys.readouterr().out
        assert "scale=100000000000" in out and "name=x[red]y" in out and len(out.splitlines()) == 4
    finally:
        hook.close()


def test_runs_describes_one(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["runs", written, "--format", "jsonl"]) == Exit.CLEAN
    (record,) = lines(capsys)
    assert record["status"] == "completed" and record["hyperparameters"] == {"lr": 0.1, "name": "x[red]y"}
    assert {c["name"]: c["tensors"] for c in record["collections"]}["weights"] == 1
    assert record["attempts"][0]["last_step"] == 32 and record["run_id"] and record["versions"]["numpy"]
    for args in (["runs", written], ["--run", written, "runs"], ["runs", "-r", written]):
        assert run([*args, "--format", "table"]) == Exit.CLEAN
        out = capsys.readouterr().out
        assert "x[red]y" in out and "completed" in out and "weights" in out
    assert run(["runs", written, "--format", "tsv"]) == Exit.CLEAN
    assert "status\tcompleted" in capsys.readouterr().out


def test_runs_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["runs"]) == Exit.CLEAN
    out, err = capsys.readouterr()
    assert out == "" and "smdbg demo" in err


# ---------------------------------------------------------------------------------------------------- rules


def test_rules_are_listed_with_parameters_and_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["rules", "--format", "jsonl"]) == Exit.CLEAN
    records = {record["name"]: record for record in lines(capsys)}
    assert {"exploding_tensor", "vanishing_gradient", "all_zero"} <= set(records)
    found = records["vanishing_gradient"]
    assert set(found) == {"version", "name", "summary", "parameters", "needs"}
    threshold = {p["name"]: p for p in found["parameters"]}["threshold"]
    assert set(threshold) == {"name", "type", "default", "unit", "help"} and threshold["default"] == 1e-7
    assert run(["rules"]) == Exit.CLEAN
    rows = [row.split("\t") for row in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == list(records) and all(len(row) == 2 for row in rows)


def test_a_rule_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for form in ("table", "tsv"):
        assert run(["rules", "exploding_tensor", "--format", form]) == Exit.CLEAN
        out = capsys.readouterr().out
        assert "Why it matters" in out and "only_nan" in out
    assert run(["rules", "exploding_tensr"]) == Exit.ERROR
    assert "exploding_tensor" in capsys.readouterr().err


def test_sparkline_keeps_what_came_before_the_first_nan_apart() -> None:
    values = [1.0, 2.0] + [math.nan] * 198
    text = sparkline(values, 60).text
    assert len(text) == 60
    assert text[0] != "×" and set(text[1:]) == {"×"}


def test_out_leaves_what_is_no_regular_file_alone(tmp_path: Path) -> None:
    make_run("run", 1)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "target.npy").write_bytes(b"old")
    (tmp_path / "link.npy").symlink_to(tmp_path / "target.npy")
    name = [n for n in open_run("run").tensors() if len(open_run("run").tensor(n).value_steps())][0]
    assert run(["--run", "run", "inspect", name, "--out", "pipe"]) == 2
    assert (tmp_path / "pipe").is_fifo()
    assert run(["--run", "run", "inspect", name, "--out", "link.npy"]) == 0
    assert (tmp_path / "link.npy").is_symlink() and (tmp_path / "target.npy").read_bytes()[:6] == b"\x93NUMPY"
