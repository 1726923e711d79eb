"""Run the console blocks of a page in a terminal of 100 columns, to check them or to write them anew.

A block is a fence of ```console with lines `$ smdbg ...`, each followed by what it prints, and `$ echo $?`, followed by
the status of the command before. All blocks of a page share one folder.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

COLUMNS = 100
PROGRAM = "import sys; from smdbg.cli import main; sys.argv[0] = 'smdbg'; main()"

_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_STYLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_TIME = re.compile(r"\d{8}T\d{6}Z")
_FOREIGN = ("CI", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES")


@dataclass(frozen=True)
class Call:
    """One line behind `$ `, and the text below it."""

    words: tuple[str, ...]
    line: str
    shown: str


def blocks(page: str) -> list[list[Call]]:
    """Return the calls of every console block of a page."""
    return [list(_calls(found[1])) for found in _BLOCK.finditer(page)]


def _calls(block: str) -> Iterator[Call]:
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        line, _, shown = part.partition("\n")
        yield Call(tuple(shlex.split(line)), line, shown)


def printed(calls: list[Call], folder: Path) -> list[str]:
    """Run the calls in a folder, one after the other, and return what each prints. Raises ValueError for others."""
    found, status = [], 0
    for call in calls:
        if call.words[0] == "smdbg":
            text, status = in_terminal([sys.executable, "-c", PROGRAM, *call.words[1:]], folder)
        elif call.line == "echo $?":
            text = f"{status}\n"
        else:
            raise ValueError(f"not a call of smdbg: {call.line}")
        found.append(text)
    return found


def in_terminal(command: list[str], folder: Path) -> tuple[str, int]:
    """Run a command in a terminal of its own and return (what one sees there, without styles; its status)."""
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
        with subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=_clean()) as process:
            os.close(theirs)
            theirs = -1
            text = b"".join(_read(ours)).decode()
            status = process.wait()
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)
    lines = text.replace("\r\n", "\n").split("\n")
    # Progress is overwritten in place: what counts is what stands there in the end.
    return "\n".join(_STYLE.sub("", line.rpartition("\r")[2]).rstrip() for line in lines), status


def _read(terminal: int) -> Iterator[bytes]:
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            return
        if not part:
            return
        yield part


def _clean() -> Mapping[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in _FOREIGN and not k.startswith(("SMDBG_", "AWS_"))}
    return {**kept, "TERM": "xterm"}


def normal(text: str) -> str:
    """Return the text with times in names replaced by one of the same length, so that two runs compare equal."""
    return _TIME.sub("20260101T000000Z", "\n".join(line.rstrip() for line in text.splitlines()))


def rewrite(path: Path) -> bool:
    """Write the outputs in the console blocks of a page anew; True if more than times changed."""
    page = path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:

        def fresh(found: re.Match[str]) -> str:
            calls = list(_calls(found[1]))
            outputs = printed(calls, Path(folder))
            parts = [f"$ {call.line}\n{output}" for call, output in zip(calls, outputs, strict=True)]
            text = "\n".join(parts).replace("\n\n$ echo $?", "\n$ echo $?")
            return f"```console\n{text}```"

        new = _BLOCK.sub(fresh, page)
    if normal(new) == normal(page):
        return False
    path.write_text(new, encoding="utf-8")
    return True
