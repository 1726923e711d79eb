"""What a run remembers of its surroundings: arguments, versions, commit, rank; never a secret."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SECRET = re.compile(
    r"(?i)(pass(word|wd|phrase)?|secret|token|api[-_]?key|credential|private[-_]?key|access[-_]?key|auth)s?$"
)
_USERINFO = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^/@\s]+@")
_QUERY = re.compile(r"(?i)([?&][^=&\s]*(?:pass|secret|token|key|credential|signature|auth)[^=&\s]*=)[^&\s]+")
HIDDEN = "***"


def is_secret(key: str) -> bool:
    """Tell whether a key names something that must not be kept (password, token, api_key, ...)."""
    return bool(_SECRET.search(key.strip("-")))


def redact_text(text: str) -> str:
    """Hide user names and passwords in URLs, and the values of query parameters that name secrets."""
    return _QUERY.sub(rf"\1{HIDDEN}", _USERINFO.sub(rf"\1{HIDDEN}@", text))


def redact_argv(argv: Sequence[str]) -> tuple[str, ...]:
    """Hide the values of options that name secrets: `--token=x`, `--token x`, `API_KEY=x`."""
    out: list[str] = []
    hide = False
    for word in argv:
        name, equals, _ = word.partition("=")
        if hide and not word.startswith("-"):
            out.append(HIDDEN)
            hide = False
        elif equals and is_secret(name):
            out.append(f"{name}={HIDDEN}")
            hide = False
        else:
            out.append(redact_text(word))
            hide = word.startswith("-") and is_secret(word)
    return tuple(out)


def plain(value: Any, depth: int = 0) -> Any:
    """Return hyperparameters as JSON-able data: NaN and infinities as text, secrets hidden, objects by their text."""
    if isinstance(value, bool | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return redact_text(value)[:10_000]
    if isinstance(value, Mapping) and depth < 8:
        return {str(k): HIDDEN if is_secret(str(k)) else plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset) and depth < 8:
        return [plain(v, depth + 1) for v in value]
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:
        return plain(value.item(), depth + 1)
    if hasattr(value, "tolist") and getattr(value, "size", 0) <= 1000:
        return plain(value.tolist(), depth + 1)
    return redact_text(str(value))[:10_000]


def hyperparameters(given: Any) -> dict[str, Any]:
    """Return hyperparameters given as a mapping, a dataclass or an argparse namespace. Raises TypeError."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        if not hasattr(given, "__dict__"):
            raise TypeError(f"hyperparameters must be a mapping or have attributes, not {type(given).__name__}")
        given = vars(given)
    found = plain(given)
    assert isinstance(found, dict)
    return found


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed, without importing them."""
    out = {"python": platform.python_version()}
    for name in packages:
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def git_commit(start: Path | None = None) -> str:
    """Return the commit that is checked out where the script runs, '' outside a repository."""
    try:
        here = (start or Path.cwd()).resolve()
        for folder in (here, *here.parents):
            git = folder / ".git"
            if git.is_file():  # a worktree: the file names the real place
                git = (folder / git.read_text().removeprefix("gitdir:").strip()).resolve()
            if git.is_dir():
                return _resolve_head(git)
    except OSError:
        pass
    return ""


def _resolve_head(git: Path) -> str:
    head = (git / "HEAD").read_text().strip()
    if not head.startswith("ref:"):
        return head[:64]
    ref = head[4:].strip()
    common = git / "commondir"
    homes = [git, (git / common.read_text().strip()).resolve()] if common.exists() else [git]
    for home in homes:
        if (home / ref).is_file():
            return (home / ref).read_text().strip()[:64]
        packed = home / "packed-refs"
        if packed.is_file():
            for line in packed.read_text().splitlines():
                if line.endswith(f" {ref}"):
                    return line.split()[0][:64]
    return ""


def argv() -> tuple[str, ...]:
    """Return the command line of this process, secrets hidden."""
    return redact_argv([str(word)[:2000] for word in sys.argv[:200]])


_RANKS = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("HOROVOD_RANK", "HOROVOD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)


def rank_and_size() -> tuple[int, int]:
    """Return (rank, world size) from the launcher's environment variables; (0, 1) without a launcher."""
    for rank, size in _RANKS:
        try:
            found = int(os.environ[rank]), int(os.environ[size])
        except (KeyError, ValueError):
            continue
        if 0 <= found[0] < found[1]:
            return found
    return 0, 1


def seed(given: Any) -> int | None:
    """Return the hyperparameter `seed`, if it is a whole number."""
    found = given.get("seed") if isinstance(given, Mapping) else getattr(given, "seed", None)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def disabled() -> bool:
    """Tell whether SMDBG_DISABLE asks every hook to do nothing."""
    return os.environ.get("SMDBG_DISABLE", "") not in ("", "0")
