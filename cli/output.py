"""Print results in every format, and talk on stderr.

A result is a list of records, plain dicts with one set of keys a listing. jsonl prints them whole; tsv prints their
values in the order of the keys; table prints columns made from them for people. Names come from a store and are not
trusted: whatever a terminal would obey is printed as an escape.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Record = Mapping[str, Any]
VERSION = 1  # of every JSON record; fields are only ever added
WIDE = 1_000_000  # columns of a table that goes to a file: nothing is cut or folded
NAME_WIDTH = 24  # a column that may fold keeps at least this many cells


class Format(StrEnum):
    """How a result is printed."""

    TABLE = "table"
    TSV = "tsv"
    JSONL = "jsonl"
    JSON = "json"


@dataclass(frozen=True)
class Column:
    """One column of a table for people.

    `cell` makes the text from a record. `fold` lets a long text go over several lines. In a terminal that is too narrow
    the columns with the highest `drop` are left out first; 0 is never left out. `style` gives rich styles, which must
    never carry what the word does not say.
    """

    title: str
    cell: Callable[[Record], str]
    justify: Literal["left", "right"] = "left"
    fold: bool = False
    drop: int = 0
    style: Callable[[Record], str] | None = None


# ---------------------------------------------------------------------------------------------------- streams


def data(text: str, end: str = "\n") -> None:
    """Write a result to stdout; what its encoding lacks is written as an escape."""
    stream = sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write((text + end).encode(encoding, "backslashreplace").decode(encoding))


def talk(text: str, quiet: bool = False) -> None:
    """Say something on stderr, unless the user asked for quiet."""
    if not quiet:
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        safe = printable(text, keep="\n").encode(encoding, "backslashreplace").decode(encoding)
        print(safe, file=sys.stderr, flush=True)


def chosen(wanted: str | None) -> Format:
    """Return the format asked for, else table on a terminal and tsv in a pipe.

    The stream itself is asked, for FORCE_COLOR makes rich take a pipe for a terminal.
    """
    if wanted is not None:
        return Format(wanted)
    return Format.TABLE if sys.stdout.isatty() else Format.TSV


# ---------------------------------------------------------------------------------------------------- plain texts


def printable(text: str, keep: str = "") -> str:
    r"""Return the text with control characters, line ends and lone surrogates as escapes such as \x1b."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep or c == "\u3000" else _escape(c) for c in text)


def _escape(character: str) -> str:
    """Return one character as a Python escape."""
    return character.encode("unicode_escape").decode("ascii")


def plain(value: Any) -> Any:
    """Return the value as JSON can hold it: NaN and infinities as strings, tuples as lists, complex numbers as text."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, complex):
        return str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if hasattr(value, "tolist"):  # NumPy arrays and scalars
        return plain(_unextended(value).tolist())
    return str(value)


def _unextended(value: Any) -> Any:
    """Return an array of a dtype that NumPy does not know by itself (bfloat16, float8) as float32, which is exact."""
    return value.astype("float32") if value.dtype.kind == "V" and value.dtype.names is None else value


def dump(record: Record) -> str:
    """Return one versioned JSON object on one line."""
    return json.dumps({"version": VERSION, **plain(record)}, allow_nan=False, ensure_ascii=False)


def field(value: Any) -> str:
    r"""Return one tsv value, exact; in texts a backslash, a tab and a line end become \\, \t and \n."""
    if hasattr(value, "tolist"):
        value = value.tolist()  # of NumPy's numbers, Python's
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float | int):
        return float.__repr__(value) if isinstance(value, float) else int.__repr__(value)
    if isinstance(value, str):
        return printable(value.replace("\\", "\\\\"))
    return printable(json.dumps(plain(value), allow_nan=False, ensure_ascii=False))


def number(value: float | int | None, digits: int = 4) -> str:
    """Return a number for people: `digits` significant digits, 1,234,567 for counts, `-` where there is none."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if value.is_integer() and abs(value) < 10**digits:
        return str(int(value))
    return f"{value:.{digits}g}"


def size(count: int) -> str:
    """Return a number of bytes for people: 512 B, 1.5 KiB, 20 MiB."""
    if count < 1024:
        return f"{count} B"
    amount = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        amount /= 1024
        if amount < 1024 or unit == "TiB":
            break
    return f"{amount:.3g} {unit}" if amount < 1000 else f"{amount:.0f} {unit}"


def counted(count: int, noun: str) -> str:
    """Return `1 step`, `20 steps`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def shape(dimensions: Sequence[int]) -> str:
    """Return a shape for people: `64 x 10`, and `scalar` for none."""
    return " x ".join(map(str, dimensions)) if dimensions else "scalar"


# ---------------------------------------------------------------------------------------------------- listings


def listing(records: Iterable[Record], columns: Sequence[Column], form: Format) -> None:
    """Print the records in the format; columns matter to the table alone. Nothing at all for no records."""
    match form:
        case Format.TABLE:
            table(list(records), columns)
        case Format.TSV:
            for record in records:
                data("\t".join(field(value) for value in record.values()))
        case Format.JSONL:
            for record in records:
                data(dump(record))
        case Format.JSON:
            raise AssertionError("json is one object, and a listing has none; only check offers it")


def table(records: Sequence[Record], columns: Sequence[Column], gap: int = -1) -> None:
    """Print a table for people, with a row of dots after the row number `gap`."""
    if not records:
        return
    from rich.text import Text

    screen = console()
    cells = [[printable(column.cell(record)) for column in columns] for record in records]
    kept = _fitting(columns, cells, screen.width)
    grid = _grid([columns[at] for at in kept])
    for row, record in enumerate(records):
        line = []
        for at in kept:
            style = columns[at].style
            line.append(Text(cells[row][at], style=style(record) if style else ""))
        grid.add_row(*line)
        if row == gap:
            grid.add_row(*[Text("…", style="dim")] * len(kept))
    show(screen, grid)


def _grid(columns: Sequence[Column]) -> Any:
    """Return an empty rich table with the columns."""
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    for column in columns:
        grid.add_column(
            column.title,
            justify=column.justify,
            no_wrap=not column.fold,
            overflow="fold",
            min_width=None if column.fold else 1,
        )
    return grid


def _fitting(columns: Sequence[Column], cells: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return which columns to print so that they fit into `width` cells, leaving out the least important first."""
    from rich.cells import cell_len

    needs = []
    for at, column in enumerate(columns):
        widest = max(cell_len(text) for text in [column.title, *(row[at] for row in cells)])
        needs.append(min(widest, NAME_WIDTH) if column.fold else widest)
    kept = list(range(len(columns)))
    while sum(needs[at] for at in kept) + 2 * (len(kept) - 1) > width:
        last = max(kept, key=lambda at: columns[at].drop)
        if columns[last].drop == 0:
            break
        kept.remove(last)
    return kept


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """Print `label  value` lines for people, the labels in one column; pairs with an empty value are left out."""
    from rich.text import Text

    grid = _grid([Column("", str), Column("", str, fold=True)])
    grid.show_header = False
    for label, value in pairs:
        if value:
            grid.add_row(Text(printable(label), style="bold"), Text(printable(value)))
    show(console(), grid)


def line(text: str | Text = "", style: str = "") -> None:
    """Print one line for people on stdout, folded at the width of the terminal."""
    from rich.text import Text

    content = Text(printable(text), style=style) if isinstance(text, str) else text
    show(console(), content)


# ---------------------------------------------------------------------------------------------------- rich


def console() -> Console:
    """Return a console that writes plain wide lines to anything but a terminal, and honours NO_COLOR and TERM."""
    from rich.console import Console

    if sys.stdout.isatty():
        return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    return Console(
        file=sys.stdout,
        highlight=False,
        markup=False,
        emoji=False,
        width=WIDE,
        color_system=None,
        force_terminal=False,
    )


def show(screen: Console, content: Any) -> None:
    """Print something that rich can render, without the blanks that fill its lines."""
    with screen.capture() as captured:
        screen.print(content, overflow="fold")
    for text in captured.get().splitlines():
        data(text.rstrip())
