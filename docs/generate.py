"""Write what is generated: docs/rules/*.md, the JSON Schema of packs, the ends of docs/cli.md and docs/rules.md.

The sessions of README.md are run anew too.

With --check nothing is written; the status is 1 when a page is stale. The sessions are left to the tests then.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path

import click
import sessions

from smdbg.analysis.pack import load_pack, pack_names
from smdbg.analysis.pack_schema import schema_text
from smdbg.analysis.parameters import Parameter
from smdbg.analysis.rule import Rule, all_rules, build, find_rule, parameters_of, summary_of
from smdbg.cli.root import COMMANDS, root

DOCS = Path(__file__).parent
MARK = "<!-- Written by docs/generate.py from the help texts; edit those. -->"
COMMON = "<!-- Written by docs/generate.py from the code of the rules; edit that. -->"
NOTE = "<!-- Written by docs/generate.py from the docstring of the rule; edit that. -->"
WIDTH = 100  # of the help texts, whatever the terminal

_PARAMETER = re.compile(r"([a-z_]+(?:, [a-z_]+)*) (\(.*)")


def main() -> int:
    """Write the pages, or check them; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a page is stale")
    check = bool(parser.parse_args().check)
    wanted = pages()
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    foreign = [path for path in sorted((DOCS / "rules").glob("*.md")) if path not in wanted]
    for path in (*stale, *foreign):
        name = path.relative_to(DOCS.parent).as_posix()
        if check:
            sys.stderr.write(f"{name} is stale: run make docs\n")
        elif path in wanted:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
            sys.stdout.write(f"wrote {name}\n")
        else:
            path.unlink()
            sys.stdout.write(f"removed {name}\n")
    if not check and sessions.rewrite(DOCS.parent / "README.md"):
        sys.stdout.write("wrote README.md\n")
    return 1 if check and (stale or foreign) else 0


def pages() -> dict[Path, str]:
    """Return the text of every generated page by its path."""
    found = {DOCS / "rules" / f"{name}.md": rule_page(find_rule(name)) for name in all_rules()}
    found[DOCS / "cli.md"] = _with_end(DOCS / "cli.md", MARK, help_texts())
    common = "\n".join(parameter_table(list(parameters_of(Rule))))
    found[DOCS / "rules.md"] = _with_end(DOCS / "rules.md", COMMON, f"{common}\n\n## The rules\n\n{_list()}\n")
    found[DOCS / "pack.schema.json"] = schema_text()
    return found


def _with_end(path: Path, mark: str, end: str) -> str:
    """Return a page written by hand up to its mark, with a generated end."""
    return f"{path.read_text(encoding='utf-8').partition(mark)[0]}{mark}\n\n{end}"


def _list() -> str:
    return "\n".join(f"- [{name}](rules/{name}.md): {summary_of(find_rule(name))}" for name in all_rules())


# ------------------------------------------------------------------------------------------- commands


def help_texts() -> str:
    """Return the help of the root command and of every command, each under its own title."""
    parent = _context(root, "smdbg")
    parts = [_help("smdbg", root, parent)]
    for name in COMMANDS:
        command = root.get_command(parent, name)
        assert command is not None
        parts.append(_help(f"smdbg {name}", command, _context(command, name, parent)))
    return "\n".join(parts)


def _context(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    settings = {} if parent is not None else command.context_settings
    width = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    return click.Context(command, parent, name, **{**settings, **width})


def _help(title: str, command: click.Command, context: click.Context) -> str:
    lines = [line.rstrip() for line in command.get_help(context).splitlines()]
    return "\n".join([f"## {title}", "", "```text", *lines, "```", ""])


# ---------------------------------------------------------------------------------------------- rules


def rule_page(rule: type[Rule]) -> str:
    """Return the page of a rule: its docstring, then what its code says of parameters, needs and packs."""
    lines = [NOTE, "", f"# {rule.name}", "", summary_of(rule)]
    for title, body in sections(inspect.getdoc(rule) or ""):
        lines += ["", f"## {title}", "", *_body(title, body)]
    lines += ["", "## All parameters of its own", "", *_table(rule)]
    lines += ["", "Those that every rule has are in [rules.md](../rules.md#parameters-of-every-rule).", ""]
    return "\n".join([*lines, "## What it reads", "", *_reads(rule), "", "## Packs", "", *_packs(rule), ""])


def sections(text: str) -> list[tuple[str, list[str]]]:
    """Return (title, lines) of the parts of a docstring that have an underlined title."""
    lines = text.splitlines()
    starts = [at for at in range(len(lines) - 1) if lines[at] and re.fullmatch("-{3,}", lines[at + 1])]
    ends = [*starts[1:], len(lines)]
    return [(lines[a], "\n".join(lines[a + 2 : b]).strip("\n").split("\n")) for a, b in zip(starts, ends, strict=True)]


def _body(title: str, lines: list[str]) -> list[str]:
    """Return the lines of a part as Markdown: parameters as a list, an example as it is printed."""
    if title == "Example output":
        return ["```text", *lines, "```"]
    if title != "Parameters":
        return lines
    out = []
    for line in lines:
        found = _PARAMETER.match(line)
        if found:
            names = ", ".join(f"`{name}`" for name in found[1].split(", "))
            out.append(f"- {names} {found[2]}")
        else:
            out.append(f"  {line}")
    return out


def _table(rule: type[Rule]) -> list[str]:
    """Return the parameters that the rule itself declares as a table."""
    common = {parameter.name for parameter in parameters_of(Rule)}
    own = [parameter for parameter in parameters_of(rule) if parameter.name not in common]
    return parameter_table(own) if own else ["None."]


def parameter_table(parameters: list[Parameter]) -> list[str]:
    """Return parameters as the lines of a Markdown table."""
    rows = ["| parameter | type | default | unit | meaning |", "|---|---|---|---|---|"]
    for one in parameters:
        default = one.record()["default"]
        shown = "" if default in (None, "", []) else f"`{_setting(default)}`"
        rows.append(f"| `{one.name}` | {one.type} | {shown} | {one.unit} | {one.help} |")
    return rows


def _reads(rule: type[Rule]) -> list[str]:
    needs = build(rule, {}).needs()
    picked = [f"role `{name}`" for name in needs.roles] + [f"collection `{name}`" for name in needs.collections]
    read = [f"`{name}`" for name in needs.statistics] + (["full values"] if needs.values else [])
    lines = [f"- Tensors: {' or '.join(picked) or 'all, unless some are named'}.", f"- Reads: {', '.join(read)}."]
    if needs.modes:
        lines.append(f"- Modes: {', '.join(needs.modes)}.")
    return [*lines, f"- Needs at least {needs.minimum} saved step{'s' if needs.minimum > 1 else ''} with its defaults."]


def _packs(rule: type[Rule]) -> list[str]:
    """Return a line for each pack that holds the rule, with what it sets there."""
    lines = []
    for name in pack_names():
        for instance in load_pack(name).rules:
            if type(instance) is rule:
                plain = build(rule, {})
                keys = [parameter.name for parameter in parameters_of(rule)]
                changed = {key: getattr(instance, key) for key in keys if getattr(instance, key) != getattr(plain, key)}
                settings = ", ".join(f"`{key}={_setting(value)}`" for key, value in changed.items())
                lines.append(f"- `{name}`: {settings or 'with its defaults'}.")
    return lines or ["None."]


def _setting(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
