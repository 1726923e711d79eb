"""`smdbg rules`: list the rules, or explain one."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from smdbg.cli.options import shared
from smdbg.cli.output import Column, Format, Record, counted, data, dump, field, line, listing, printable, talk
from smdbg.cli.root import Session
from smdbg.errors import BadConfig

if TYPE_CHECKING:
    from smdbg.analysis.rule import Rule


@click.command("rules", short_help="List the rules, or explain one.")
@click.argument("words", nargs=-1, metavar="[NAME | new NAME]")
@click.option("--plugin", multiple=True, metavar="FILE.py", help="Rules of your own as well; repeatable.")
@click.option("--out", metavar="FOLDER", help="With new: where the two files go.  [default: here]")
@shared(run=False)
def command(session: Session, form: Format, words: tuple[str, ...], plugin: tuple[str, ...], out: str | None) -> None:
    """List the rules, or explain one.

    `new` begins one of your own: it writes NAME.py, a rule to start from, and test_NAME.py, a test that passes. It
    never replaces a file.

    \b
    Examples:
      smdbg rules
      smdbg rules exploding_tensor
      smdbg rules --format jsonl
      smdbg rules --plugin my_rules.py
      smdbg rules new large_weight

    tsv gives name and summary; jsonl also the parameters (name, type, default, unit, help each) and needs.
    """
    from smdbg.analysis.plugins import known_rules, load_rules
    from smdbg.analysis.rule import find_rule
    from smdbg.cli import new_rule

    begin = words[:1] == ("new",)
    if out is not None and not begin:
        raise click.UsageError("--out is for `smdbg rules new NAME`.")
    if len(words) > (2 if begin else 1):
        raise click.UsageError(f"One name is enough, and got {', '.join(words)}.")
    if begin:
        if len(words) == 1:
            raise click.UsageError("Say what the rule is called: smdbg rules new NAME.")
        new_rule.write(words[1], out or ".", session.quiet)
        return
    with contextlib.redirect_stdout(sys.stderr):  # what a user's file prints
        extra = known_rules(load_rules(plugin))
    if not words:
        records = [record(rule) for rule in _every(extra)]
        brief = [{key: one[key] for key in ("name", "summary")} for one in records]
        listing(brief if form is Format.TSV else records, _columns(), form)
    elif form is Format.JSONL:
        rule = find_rule(words[0], extra)
        data(dump({**record(rule), "text": inspect.getdoc(rule)}))
    else:
        explain(find_rule(words[0], extra), form)


def _every(extra: Mapping[str, type[Rule]]) -> list[type[Rule]]:
    """Return all rules by name, those of installed packages too; one that breaks is told of on stderr."""
    from smdbg.analysis.rule import all_rules, find_rule

    found = []
    for name in sorted({*all_rules(), *extra}):
        try:
            found.append(find_rule(name, extra))
        except BadConfig as error:
            talk(f"smdbg: {error}")
    return found


def record(rule: type[Rule]) -> dict[str, Any]:
    """Return what a program wants to know of a rule."""
    from smdbg.analysis.rule import build, parameters_of, summary_of

    return {
        "name": rule.name,
        "summary": summary_of(rule),
        "parameters": [parameter.record() for parameter in parameters_of(rule)],
        "needs": build(rule, {}).needs().record(),
    }


def explain(rule: type[Rule], form: Format) -> None:
    """Print the page of a rule: its documentation, then every parameter with its default."""
    from smdbg.analysis.rule import parameters_of

    text = inspect.getdoc(rule) or ""
    if form is Format.TSV:
        data(printable(f"{rule.name}\n\n{text}", keep="\n"))
        return
    line(rule.name, "bold")
    data("")
    lines = text.splitlines()
    for number, content in enumerate(lines):
        below = lines[number + 1] if number + 1 < len(lines) else ""
        if _underline(content):
            continue
        line(content, "bold" if _underline(below) else "")
    data("")
    line(f"All {counted(len(parameters_of(rule)), 'parameter')}, set with --set {rule.name}.NAME=VALUE", "bold")
    listing([parameter.record() for parameter in parameters_of(rule)], _parameter_columns(), Format.TABLE)


def _underline(text: str) -> bool:
    """Return whether the line only underlines the title above it."""
    return len(text) >= 3 and set(text.strip()) == {"-"}


def _default(value: Any) -> str:
    """Return a default for people: empty for none."""
    return "" if value in (None, "", [], ()) else field(value)


def _columns() -> list[Column]:
    """Return the columns of the list of rules."""
    return [
        Column("rule", lambda r: r["name"]),
        Column("summary", lambda r: r["summary"], fold=True),
        Column("parameters", _own_parameters, fold=True, drop=1),
    ]


def _own_parameters(entry: Record) -> str:
    """Return `threshold=1e-07 %, num_steps=3 steps`, without the parameters that every rule has."""
    from smdbg.analysis.rule import Rule, parameters_of

    common = {parameter.name for parameter in parameters_of(Rule)}
    own = [parameter for parameter in entry["parameters"] if parameter["name"] not in common]
    return ", ".join(f"{p['name']}={_default(p['default']) or 'none'} {p['unit']}".rstrip() for p in own)


def _parameter_columns() -> list[Column]:
    """Return the columns of the parameters of one rule."""
    return [
        Column("parameter", lambda p: p["name"]),
        Column("type", lambda p: p["type"], drop=2),
        Column("default", lambda p: _default(p["default"])),
        Column("unit", lambda p: p["unit"], drop=1),
        Column("meaning", lambda p: p["help"], fold=True),
    ]
