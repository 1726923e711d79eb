"""The command line: its entry point and its one error boundary.

Only the standard library is imported here, and everything else inside the boundary: a dependency that breaks at
import must not end with status 1, which means "violations found" and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Sequence
from typing import TextIO

from smdbg.cli.exits import Exit

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what writing to stdout may end with


def main() -> None:
    """Run the arguments of this process and end it with their status."""
    sys.exit(int(run(sys.argv[1:])))


def run(args: Sequence[str]) -> Exit:
    """Run one command line and return its status; whatever goes wrong becomes one paragraph on stderr."""
    _open_streams()
    try:
        result = _invoke(args)
        sys.stdout.flush()  # here, because a flush that fails at shutdown would end with status 120
    except KeyboardInterrupt:
        logging.getLogger("asyncio").disabled = True  # it would tell of requests that nobody waits for any more
        _discard(sys.stdout)
        return Exit.INTERRUPTED
    except BrokenPipeError:
        _discard(sys.stdout)
        return Exit.BROKEN_PIPE
    except BaseException as error:  # SystemExit too: a rule may call sys.exit(1)
        _report(error, args)
        return Exit.ERROR
    return result


def _open_streams() -> None:
    """Give streams that the caller has closed (`smdbg check >&-`) a place to go, so that the status stays right."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))


def _invoke(args: Sequence[str]) -> Exit:
    """Hand the arguments to click; only an Exit that a command returns counts as a status."""
    import click

    from smdbg.cli.root import root

    if "_SMDBG_COMPLETE" in os.environ:  # click's shell completion lives in root.main
        with contextlib.suppress(SystemExit):
            root.main(list(args), "smdbg")
        return Exit.CLEAN
    try:
        with root.make_context("smdbg", list(args)) as context:
            result = root.invoke(context)
    except click.exceptions.Exit as stop:  # --help, --version
        return Exit.CLEAN if stop.exit_code == 0 else Exit.ERROR
    except click.ClickException as error:
        error.show()
        return Exit.ERROR
    except click.Abort:
        return Exit.INTERRUPTED
    if result is None:
        return Exit.CLEAN
    return result if isinstance(result, Exit) else Exit.ERROR


def _report(error: BaseException, args: Sequence[str]) -> None:
    """Say on stderr what happened; the traceback only with --debug."""
    from smdbg.errors import SmdbgError

    if isinstance(error, SmdbgError):
        text = str(error)
    elif isinstance(error, OSError) and error.filename is None and error.errno in FULL:
        text = f"could not write the output: {error.strerror or error}. Free some space or send it elsewhere."
    else:
        text = f"internal error: {_one_line(repr(error))}" + ("" if _debug(args) else " (--debug shows more)")
    with contextlib.suppress(OSError, ValueError):
        if _debug(args):
            import traceback

            traceback.print_exception(error, file=sys.stderr)
        print(f"smdbg: {_printable(text)}", file=sys.stderr, flush=True)
    if _flush_fails(sys.stdout):
        _discard(sys.stdout)


def _debug(args: Sequence[str]) -> bool:
    """Return whether --debug is among the options, before or after the command."""
    words = list(args)
    return "--debug" in (words[: words.index("--")] if "--" in words else words)


def _one_line(text: str, limit: int = 500) -> str:
    """Return the text on one line, cut at `limit` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."


def _printable(text: str) -> str:
    """Return the text with what a terminal would obey, or cannot encode, as escapes."""
    safe = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    return safe.encode(encoding, "backslashreplace").decode(encoding)


def _flush_fails(stream: TextIO) -> bool:
    """Return whether the stream cannot take what was written to it."""
    try:
        stream.flush()
    except (OSError, ValueError):
        return True
    return False


def _discard(stream: TextIO) -> None:
    """Send what the stream still holds nowhere, so that Python's own flush at the end stays quiet."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
