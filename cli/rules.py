"""`smdbg rules`: list the rules, or explain one."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import click

from smdbg.cli.options import shared
from smdbg.cli.output import Column, Format, Record, counted, data, dump, field, line, listing, printable
from smdbg.cli.root import Session

if TYPE_CHECKING:
    from smdbg.analysis.rule import Rule


@click.command("rules", short_help="List the rules, or explain one.")
@click.argument("name", required=False)
@shared(run=False)
def command(session: Session, form: Format, name: str | None) -> None:
    """List the rules, or explain one.

    \b
    Examples:
      smdbg rules
      smdbg rules exploding_tensor
      smdbg rules --format jsonl

    tsv gives name and summary; jsonl also the parameters (name, type, default, unit, help each) and needs.
    """
    from smdbg.analysis.rule import all_rules, find_rule

    if name is None:
        records = [record(find_rule(rule)) for rule in all_rules()]
        brief = [{key: one[key] for key in ("name", "summary")} for one in records]
        listing(brief if form is Format.TSV else records, _columns(), form)
    elif form is Format.JSONL:
        rule = find_rule(name)
        data(dump({**record(rule), "text": inspect.getdoc(rule)}))
    else:
        explain(find_rule(name), form)


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
