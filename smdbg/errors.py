"""Every error a user can meet.

Each one is a sentence or two: what happened, where, and what to do next. The command line prints the text as it
stands and ends with status 2; library users catch the class, or the builtin it also is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SmdbgError(Exception):
    """Root of all errors that smdbg raises on purpose."""

    def __str__(self) -> str:
        """Return the text alone (KeyError would quote it)."""
        return str(self.args[0]) if self.args else self.__class__.__name__


class StoreError(SmdbgError, OSError):
    """The store cannot be used: not there, refused, no such bucket, or it answered nonsense."""


class AccessRefused(StoreError, PermissionError):
    """The store is there and said no: credentials, permissions, a read-only folder."""


class CredentialsExpired(AccessRefused):
    """The credentials were good once; new ones may come."""


class RunNotFound(SmdbgError, FileNotFoundError):
    """There is nothing at the URL."""


class NotARun(SmdbgError, ValueError):
    """There is something at the URL, and it is not a run."""


class NewerFormat(NotARun):
    """The run was written in a format that this version does not know."""


class RunExists(SmdbgError, FileExistsError):
    """A hook was asked to start a run where there is one already."""


class TensorNotFound(SmdbgError, KeyError):
    """The run holds no tensor of that name."""


class StepNotSaved(SmdbgError, KeyError):
    """The tensor was not saved at that step, and never will be."""


class StepNotYet(StepNotSaved):
    """The run is still being written and has not reached that step."""


class OnlyStatistics(SmdbgError, LookupError):
    """The step was saved, but of this tensor only statistics were kept."""


class DamagedData(SmdbgError, OSError):
    """Stored bytes do not match their checksum, or are missing although committed."""


class BadSelection(SmdbgError, ValueError):
    """A selector, a step range or an index cannot be read, or selects nothing."""


class BadConfig(SmdbgError, ValueError):
    """A configuration file, a pack or a parameter is wrong; names file and line where there is one."""


class RuleNotFound(SmdbgError, KeyError):
    """There is no rule of that name."""


class MissingExtra(SmdbgError, ImportError):
    """An optional dependency is not installed."""


def near(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return ' Did you mean ...?' with the names most like `name`, or '' when none is."""
    found = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    shown = [name if name.isprintable() else repr(name) for name in found]
    return f" Did you mean {', '.join(shown)}?" if shown else ""
