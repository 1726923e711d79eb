"""What a run remembers of its surroundings: arguments, versions, commit, rank; never a secret."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import math
import os
import platform
import re
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HIDDEN = "***"
_TEXT = 10_000  # characters of a text that are kept
_DEEP = 8  # containers in containers that are taken apart; what lies deeper is kept as text

# Words that name a secret wherever they stand in a key.
_ALWAYS = frozenset(
    "password passwords passwd passwds pwd passphrase passphrases passcode secret secrets credential credentials creds "
    "authorization apikey apikeys apitoken accesskey accesstoken authtoken privatekey secretkey".split()
)
_VENDORS = frozenset("anthropic aws azure comet gh github gitlab hf hub huggingface neptune openai slack wandb".split())
# `token` and `key` are everyday words of training; what stands right before them decides.
_BEFORE = {
    "token": _VENDORS | frozenset("access auth oauth api bearer session refresh id jwt vault tracking".split()),
    "key": _VENDORS | frozenset("access account api auth encryption private secret signing ssh".split()),
    "keys": frozenset("access api encryption private secret signing ssh".split()),
    "auth": frozenset(("basic", "http", "proxy")),
    "pass": frozenset("admin db mysql postgres proxy smtp user".split()),
}
_ALONE = frozenset(("token", "auth", "pass"))
_CAPITALS = re.compile(r"(?:[A-Z0-9]+_)*?([A-Z0-9]+)_KEY")
# Words before _KEY that are no vendor's name: constants of a script, not variables of the environment.
_NO_VENDOR = frozenset(
    "BATCH CACHE CONFIG DATA DATASET DICT EMBEDDING FEATURE FOREIGN GROUP HASH ID IMAGE INDEX INPUT JOIN JSON LABEL "
    "LOSS MAP MASK METRIC MODEL N NUM OBJECT OUTPUT PARTITION PRIMARY PRNG PUBLIC QUERY RANDOM RNG SHARD SORT STATE "
    "TARGET TEXT VALUE".split()
)
_QUERY_WORDS = frozenset("auth jwt key keys pass sas sig signature token".split())

_CHUNK = re.compile(r"[^\W_]+")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_OPTION = re.compile(r"[-+~]*[\w.:\[\]-]+")
_SCHEME = frozenset(("basic", "bearer", "digest", "token"))

# All of these take time linear in the text: runs are possessive and looked behind, or bounded.
_USERINFO = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]{0,40}://)[^/\s]+@")
_BEARER = re.compile(r"(?i)\b(bearer(?:\s+|%20|\+))[^\s'\"&,;]+")
_NAMED = re.compile(r"(?<![\w.%-])([\w.%-]++)(?:\s*=\s*|['\"]\s*[:=]\s*|:\s+)")
_GIVEN = re.compile(r"(?<!\S)(-[\w.-]++)\s+")
_VALUE = re.compile(
    r"""(?ix) '(?:[^'\\]|\\.)*+' | "(?:[^"\\]|\\.)*+" | [(\[{][^)\]}]*+[)\]}]
    | (?:(?:basic|bearer|digest|token)\s+)?+ (?:[^\s&;'",)}\]] | ['",)}\]](?=[^\s'",)}\]]))++"""
)


def is_secret(key: str) -> bool:
    """Tell whether a key names something that must not be kept: password, api_key, secretKey, OPENAI_KEY, ...

    Whole words decide, so that max_tokens, pad_token, key_size and bypass are kept.
    """
    return any(_names_secret(part) for part in re.split(r"[^\w-]+", key) if part)


def _names_secret(part: str) -> bool:
    """Tell whether one part of a dotted key names a secret."""
    chunks = [chunk.strip("0123456789") for chunk in _CHUNK.findall(part)]
    words = [word.lower() for chunk in chunks for word in _WORD.findall(chunk)]
    # Chunks too, for passWord is one word.
    if not _ALWAYS.isdisjoint(words) or any(chunk.lower() in _ALWAYS for chunk in chunks):
        return True
    if words[:1] == ["auth"] or (len(words) == 1 and words[0] in _ALONE):
        return True
    if any(before in _BEFORE.get(word, ()) for before, word in zip(words, words[1:], strict=False)):
        return True
    vendor = _CAPITALS.fullmatch(part.strip("-").replace("-", "_"))
    return vendor is not None and vendor[1] not in _NO_VENDOR and not vendor[1].isdigit()


def _in_query(name: str) -> bool:
    """Tell whether a query parameter of a URL signs or opens something; there, a bare `key` or `sig` does."""
    words = [word.lower() for word in _WORD.findall(name)]
    return is_secret(name) or words[:2] == ["x", "amz"] or not _QUERY_WORDS.isdisjoint(words)


def redact_text(text: str) -> str:
    """Hide what is secret in a text: user info and signed queries of URLs, `password=x`, `'token': 'x'`, `Bearer x`."""
    text = _USERINFO.sub(rf"\1{HIDDEN}@", text)
    text = _hide_values(_GIVEN, _hide_values(_NAMED, text))
    return _BEARER.sub(rf"\1{HIDDEN}", text)


def _hide_values(names: re.Pattern[str], text: str) -> str:
    """Hide the value behind every match of `names` that names a secret."""
    out, at, kept = [], 0, 0
    while found := names.search(text, at):
        at = found.end()
        in_query = found.start() > 0 and text[found.start() - 1] in "?&"
        value = _VALUE.match(text, at) if (_in_query if in_query else is_secret)(found[1]) else None
        if value:
            out += [text[kept:at], HIDDEN]
            at = kept = value.end()
    return "".join([*out, text[kept:]])


def redact_argv(argv: Sequence[str]) -> tuple[str, ...]:
    """Hide the values of options that name secrets: `--token=x`, `--token x`, `API_KEY=x`, `Authorization: x`."""
    out: list[str] = []
    hide = False
    for word in argv:
        name, equals, _ = word.partition("=")
        named = _OPTION.fullmatch(name) is not None and is_secret(name)
        opens = named and not equals and (word.startswith("-") or word.endswith(":"))
        if hide:
            # `--token --password x`: the second is the value of the first, or an option without its own.
            hide = opens or word.lower() in _SCHEME
            out.append(HIDDEN)
        elif equals and named:
            out.append(f"{name}={HIDDEN}")
        else:
            hide = opens or word == "Bearer"
            out.append(redact_text(word))
    return tuple(out)


def plain(value: Any) -> Any:
    """Return a hyperparameter as JSON-able data; never raises.

    NaN and infinities become text, arrays and tensors of one element a number, larger ones lists or text, dataclasses,
    named tuples and namespaces mappings, other objects their text; secrets are hidden.
    """
    return _plain(value, ())


def _plain(value: Any, above: tuple[int, ...]) -> Any:
    """Return `plain`, given the identities of the containers around the value."""
    try:
        if isinstance(value, bool | None):
            return value
        if isinstance(value, int):
            # Python refuses to write longer ones in decimal.
            return int(value) if value.bit_length() <= 4096 else _short(hex(value))
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else str(float(value))
        if isinstance(value, str):
            return _short(str(value))
        if len(above) < _DEEP and id(value) not in above:
            return _opened(value, (*above, id(value)))
    except Exception:
        pass
    return _text(value)


def _opened(value: Any, above: tuple[int, ...]) -> Any:
    """Return a container, an array or an object, taken apart. Raises whatever the object raises."""
    fields = _fields(value)
    if fields is not None:
        return _mapping(fields, above)
    if isinstance(value, list | tuple | set | frozenset):
        if value and all(type(item) is str for item in value):
            return [word[:_TEXT] for word in redact_argv([item[: 2 * _TEXT] for item in value])]
        return [_plain(item, above) for item in value]
    count = _count(value)
    if count == 1 and hasattr(value, "item"):
        return _plain(value.item(), above)
    if count is not None and count <= 1000 and hasattr(value, "tolist"):
        return _plain(value.tolist(), above)
    return _text(value)


def _fields(value: Any) -> Mapping[Any, Any] | None:
    """Return what has named parts as a mapping, None for anything else."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: getattr(value, name) for name in names if hasattr(value, name)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=False))
    if isinstance(value, argparse.Namespace | types.SimpleNamespace):
        return vars(value)
    return None


def _mapping(fields: Mapping[Any, Any], above: tuple[int, ...]) -> dict[str, Any]:
    """Return a mapping with its secrets hidden; an entry that cannot be read is named by its error."""
    out: dict[str, Any] = {}
    for key in fields:
        name = key if type(key) is str else _text(key)
        if is_secret(name):
            out[_short(name)] = HIDDEN
            continue
        try:
            item = fields[key]
        except Exception as error:
            item = type(error).__name__
        out[_short(name)] = _plain(item, above)
    return out


def _count(value: Any) -> int | None:
    """Return the number of elements of an array or tensor of any framework, None for what is none."""
    found = getattr(value, "size", None)
    if not isinstance(found, int) and callable(getattr(value, "numel", None)):
        found = value.numel()  # PyTorch: its `size` is a method that gives the shape
    return found if isinstance(found, int) else None


def _text(value: Any) -> str:
    """Return an object's text with secrets hidden, the name of its type if it has none."""
    for text in (str, repr):
        try:
            return _short(text(value))
        except Exception:
            continue
    return type(value).__name__


def _short(text: str) -> str:
    """Return the text with secrets hidden, cut. Cut first as well: no secret is halved within what is kept."""
    return redact_text(text[: 2 * _TEXT])[:_TEXT]


def hyperparameters(given: Any) -> dict[str, Any]:
    """Return hyperparameters given as a mapping, a dataclass, a namespace or any object with attributes.

    Raises TypeError for what has no named parts; never because of a value.
    """
    if given is None:
        return {}
    try:
        fields = _fields(given)
        if fields is None and hasattr(given, "__dict__"):
            fields = vars(given)
        if fields is not None:
            return _mapping(fields, (id(given),))
    except Exception as error:
        raise TypeError(f"hyperparameters of type {type(given).__name__} cannot be read ({_text(error)})") from error
    raise TypeError(f"hyperparameters must be a mapping or have attributes, not {type(given).__name__}")


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
    return tuple(word[:2000] for word in redact_argv([str(word)[:_TEXT] for word in sys.argv[:200]]))


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
    try:
        found = given.get("seed") if isinstance(given, Mapping) else getattr(given, "seed", None)
    except Exception:  # the hyperparameters are somebody else's object
        return None
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def disabled() -> bool:
    """Tell whether SMDBG_DISABLE asks every hook to do nothing."""
    return os.environ.get("SMDBG_DISABLE", "") not in ("", "0")
