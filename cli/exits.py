"""The exit statuses of every command."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """What the shell, and a CI job, is told.

    VIOLATIONS is given by a command that made a check and found something, and by nothing else, ever.
    """

    CLEAN = 0
    VIOLATIONS = 1
    ERROR = 2
    INTERRUPTED = 130
    BROKEN_PIPE = 141
