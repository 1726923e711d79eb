"""The options that commands share, as decorators."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import click

from smdbg.cli.output import Format, chosen
from smdbg.cli.root import Session

Function = Callable[..., Any]

LISTINGS = (Format.TABLE, Format.TSV, Format.JSONL)


def shared(formats: Sequence[Format] = LISTINGS, *, run: bool = True) -> Callable[[Function], Function]:
    """Add --run, --format, --debug and --quiet to a command.

    The command is called with `session`, the options before the command overruled by those after it, and `form`, the
    Format to print in. Without `formats` there is no --format and no `form`; `run=False` leaves --run out.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(**given: Any) -> Any:
            before = click.get_current_context().find_object(Session) or Session()
            session = before.updated(given.pop("run", None), given.pop("quiet"))
            given.pop("debug")
            if formats:
                given["form"] = chosen(given["form"] or _configured())
            return function(session=session, **given)

        options = [
            click.option("--debug", is_flag=True, hidden=True),  # both are explained by `smdbg --help`
            click.option("-q", "--quiet", is_flag=True, hidden=True),
        ]
        if formats:
            help_text = "How to print.  [default: table on a terminal, tsv in a pipe]"
            choice = click.Choice([form.value for form in formats])
            options.insert(0, click.option("--format", "form", type=choice, help=help_text))
        if run:
            options.insert(0, click.option("-r", "--run", metavar="URL", help="The run: a folder or a URL."))
        for option in reversed(options):
            call = option(call)
        return call

    return decorate


def _configured() -> str | None:
    """Return `format:` of the nearest smdbg.yaml."""
    from smdbg.config import load_config

    return load_config().format


def mode_option(function: Function) -> Function:
    """Add --mode; the command gets `mode`, None for all."""
    choice = click.Choice(["train", "eval", "predict", "global"])
    return click.option("--mode", type=choice, help="Only the steps of this mode.")(function)


def worker_option(function: Function) -> Function:
    """Add --worker; the command gets `worker`, None for all."""
    return click.option("--worker", type=click.IntRange(min=0), metavar="N", help="Only this worker (its rank).")(
        function
    )


def attempt_option(function: Function) -> Function:
    """Add --attempt; the command gets `attempt`: 'latest', 'all' or a number."""
    text = "Of resumed workers, also the steps that were repeated (all), or one attempt alone.  [default: latest]"
    return click.option(
        "--attempt", metavar="all|N", default="latest", callback=lambda _ctx, _param, given: _attempt(given), help=text
    )(function)


def _attempt(given: str) -> str | int:
    if given in ("latest", "all"):
        return given
    if given.isdecimal():
        return int(given)
    raise click.BadParameter(f"{given!r} is neither 'all', 'latest' nor a number from 0")


def words(values: Sequence[str]) -> list[str]:
    """Return the values of an option that is repeatable and also takes comma lists."""
    return [word.strip() for value in values for word in value.split(",") if word.strip()]
