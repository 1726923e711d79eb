"""How many requests are made to a store at a time."""

from __future__ import annotations

import os

from smdbg.errors import BadConfig, BadSelection

CONCURRENCY = "SMDBG_CONCURRENCY"
AT_A_TIME = 8
MOST_AT_A_TIME = 256


def requests_at_a_time(asked: int | None) -> int:
    """Return how many requests are made at a time. Raises BadSelection, or BadConfig for a wrong variable."""
    if asked is not None:
        if isinstance(asked, bool) or not isinstance(asked, int) or not 1 <= asked <= MOST_AT_A_TIME:
            raise BadSelection(f"concurrency must be a number from 1 to {MOST_AT_A_TIME}, not {asked!r}")
        return asked
    text = os.environ.get(CONCURRENCY, "").strip()
    if not text:
        return AT_A_TIME
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:9]) <= MOST_AT_A_TIME:
        raise BadConfig(f"{CONCURRENCY} must be a number from 1 to {MOST_AT_A_TIME}, not {text[:40]!r}")
    return int(text)


def threads(asked: int | None) -> int:
    """Return how many threads judge and measure: as many as this process may use cores, unless told."""
    if asked is not None:
        return max(1, asked)
    usable = getattr(os, "sched_getaffinity", None)
    return max(1, len(usable(0)) if usable is not None else os.cpu_count() or 1)
