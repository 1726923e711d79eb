"""Command lines that can be copied into a shell, also from a narrow terminal and with any name in them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

INDENT = "  "


def quoted(word: str) -> str:
    r"""Return a word as a shell takes it; with characters that a terminal would obey as $'…\x1b…'."""
    if word.isprintable():
        return shlex.quote(word)
    return f"$'{''.join(_escaped(character) for character in word)}'"


def _escaped(character: str) -> str:
    if character in "'\\":
        return f"\\{character}"
    if character.isprintable():
        return character
    raw = character.encode("utf-8", "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass")
    return "".join(f"\\{byte:03o}" for byte in raw)


def folded(words: Sequence[str], width: int) -> list[str]:
    """Return a command line as lines of at most `width` cells, each but the last with a backslash at its end.

    It is broken between words where that is possible, else within one, where the next line begins without a blank.
    """
    from rich.cells import cell_len

    room = max(width, 10)
    lines = [INDENT]
    for number, word in enumerate(words):
        text = quoted(word)
        last = number == len(words) - 1
        gap = "" if lines[-1] == INDENT else " "
        spare = 0 if last else 2  # for a blank and a backslash
        if cell_len(lines[-1] + gap + text) + spare > room:
            if gap:
                lines[-1] += " \\"
                lines.append(INDENT * 2)
            pieces = _pieces(word, room - len(INDENT) * 2 - 2)
            if len(pieces) > 1:
                lines[-1] += pieces[0] + "\\"
                lines += [piece + "\\" for piece in pieces[1:-1]]
                lines.append(pieces[-1])
                continue
            gap = ""
        lines[-1] += gap + text
    return lines


def _pieces(word: str, room: int) -> list[str]:
    """Return a word in pieces, each quoted by itself and no wider than `room`: a shell puts them together again."""
    from rich.cells import cell_len

    pieces: list[str] = []
    now = ""
    for character in word:
        if now and cell_len(quoted(now + character)) > room:
            pieces.append(quoted(now))
            now = ""
        now += character
    return [*pieces, quoted(now)]
