"""What the user asks for: tensors by name, steps by number, parts of a tensor by index.

Nothing here reads a run: names, saved steps and shapes are handed in.
"""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import TYPE_CHECKING, Any

from smdbg.errors import BadSelection

if TYPE_CHECKING:
    import numpy as np

    Steps = np.ndarray[Any, np.dtype[np.int64]]

Index = tuple[int | slice | EllipsisType, ...]

REGEX_PREFIX = "re:"
STEP_FORMS = (
    "Write one step (17), a list (0,10,20) or a range START:STOP:EVERY (100:200, ::50);"
    " negative numbers count from the last saved step (-1, -5:)."
)
INDEX_FORMS = "Write whole numbers, slices and at most one ..., as NumPy does: '0, :, ::2' or '..., -1'."

# Digits enough for any step or axis, and few enough for int64 arithmetic.
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


# ---------------------------------------------------------------- tensors


def matcher(pattern: str) -> Callable[[str], bool]:
    """Return the test that `pattern` stands for: a glob, or after `re:` a regular expression found anywhere.

    Globs see case, and `*` matches every character, `/` and `:` too. Raises BadSelection for a bad expression.
    """
    if not pattern:
        raise BadSelection("A tensor selector is empty. Write a name, a glob such as '*/bias' or re:EXPRESSION.")
    if not pattern.startswith(REGEX_PREFIX):
        glob = re.compile(fnmatch.translate(pattern))
        return lambda name: glob.match(name) is not None
    source = pattern[len(REGEX_PREFIX) :]
    try:
        expression = re.compile(source)
    except re.error as error:
        where = "" if error.pos is None else f", at character {error.pos + 1} of {source!r}"
        raise BadSelection(
            f"The selector {pattern!r} is not a regular expression: {error.msg}{where}."
            f" Put a backslash before characters that stand for themselves, or drop {REGEX_PREFIX!r} for a glob."
        ) from None
    except (OverflowError, RecursionError):
        raise BadSelection(f"The regular expression in {pattern!r} is too large. Write a simpler one.") from None
    return lambda name: expression.search(name) is not None


def matching(names: Iterable[str], pattern: str) -> set[str]:
    """Return those of `names` that one pattern selects; a name equal to the pattern is selected alone."""
    found = set(names)
    if pattern in found:
        return {pattern}
    matches = matcher(pattern)
    return {name for name in found if matches(name)}


def select(names: Iterable[str], patterns: Iterable[str] = (), exclude: Iterable[str] = ()) -> list[str]:
    """Return the names that any of `patterns` selects and none of `exclude` does, in their given order.

    No patterns select everything. A pattern that is itself a name selects that name alone, so names with `[` need no
    escaping; otherwise it is a glob, or a regular expression after `re:`.
    """
    return Selector(_several(patterns), _several(exclude)).apply(names)


def unmatched(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Return the patterns that select none of `names`: what a command must not pass over in silence."""
    known = list(names)
    return [pattern for pattern in _several(patterns) if not matching(known, pattern)]


@dataclass(frozen=True)
class Selector:
    """Tensor names to take and to leave out; see `select` for what the patterns mean."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def apply(self, names: Iterable[str]) -> list[str]:
        """Return the selected names in their given order. Raises BadSelection for a pattern that cannot be read."""
        known = list(names)
        chosen = set(known) if not self.include else set[str]().union(*(matching(known, p) for p in self.include))
        for pattern in self.exclude:
            chosen -= matching(known, pattern)
        return [name for name in known if name in chosen]


def _several(patterns: Iterable[str]) -> tuple[str, ...]:
    """Take one pattern for a tuple of one: a string is not meant as a list of its characters."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


# ---------------------------------------------------------------- steps


@dataclass(frozen=True)
class StepRange:
    """Steps with start <= step < stop, every `step`-th step number counted from start.

    Negative bounds count saved steps from the last one: start -5 is the fifth last saved step.
    """

    start: int | None = None
    stop: int | None = None
    step: int = 1

    def __str__(self) -> str:
        """Return the range as one would type it."""
        text = f"{'' if self.start is None else self.start}:{'' if self.stop is None else self.stop}"
        return text if self.step == 1 else f"{text}:{self.step}"

    def apply(self, saved: Steps) -> Steps:
        """Return those of `saved` (int64 [n], ascending) that lie in the range. Raises BadSelection if none does."""
        steps = _ascending(saved)
        start = 0 if self.start is None else _bound(self.start, steps)
        chosen = steps >= start
        if self.stop is not None:
            chosen &= steps < _bound(self.stop, steps)
        chosen &= (steps - start) % self.step == 0
        if not chosen.any():
            raise BadSelection(f"No saved step lies in {str(self)!r}: {saved_range(steps)}.")
        return steps[chosen]


@dataclass(frozen=True)
class StepList:
    """Single steps by number; negative ones count saved steps from the last one (-1)."""

    steps: tuple[int, ...]

    def __str__(self) -> str:
        """Return the list as one would type it."""
        return ",".join(str(step) for step in self.steps)

    def apply(self, saved: Steps) -> Steps:
        """Return the listed steps, ascending and each once (int64). Raises BadSelection if one was not saved."""
        import numpy as np

        steps = _ascending(saved)
        wanted = []
        for step in self.steps:
            if step < 0 and -step > len(steps):
                raise BadSelection(f"There is no step {step}, counted from the last: {saved_range(steps)}.")
            wanted.append(int(steps[step]) if step < 0 else step)
        lost = [step for step in wanted if not _holds(steps, step)]
        if lost:
            raise BadSelection(f"Step {lost[0]} was not saved: {saved_range(steps)}{_neighbours(steps, lost[0])}.")
        return np.unique(np.array(wanted, dtype=np.int64))


def parse_steps(text: str) -> StepRange | StepList:
    """Read what `--steps` takes. Raises BadSelection that says which forms there are."""
    stripped = text.strip()
    if ":" not in stripped:
        return StepList(tuple(_step_number(part, text) for part in stripped.split(",")))
    parts = [part.strip() for part in stripped.split(":")]
    if len(parts) > 3:
        raise BadSelection(f"The steps {text!r} cannot be read: a range has at most two colons. {STEP_FORMS}")
    start, stop, every = [_step_number(part, text) if part else None for part in (*parts, "")[:3]]
    if every is not None and every < 1:
        raise BadSelection(f"The steps {text!r} cannot be read: the third number must be 1 or more. {STEP_FORMS}")
    return StepRange(start, stop, 1 if every is None else every)


def saved_range(steps: Steps) -> str:
    """Return in words which steps are saved (int64 [n], ascending), for messages."""
    if len(steps) == 0:
        return "no step is saved"
    if len(steps) == 1:
        return f"step {steps[0]} is the only one saved"
    return f"saved steps run from {steps[0]} to {steps[-1]}, {len(steps)} of them"


def _step_number(part: str, text: str) -> int:
    if _INTEGER.fullmatch(part.strip()) is None:
        raise BadSelection(f"The steps {text!r} cannot be read: {part.strip()!r} is not a step number. {STEP_FORMS}")
    return int(part)


def _ascending(saved: Steps) -> Steps:
    import numpy as np

    return np.asarray(saved, dtype=np.int64)


def _bound(bound: int, steps: Steps) -> int:
    """Return a bound as a step number; a negative one beyond the first saved step means the first, as in slices."""
    if bound >= 0:
        return bound
    return int(steps[max(bound, -len(steps))]) if len(steps) else 0


def _holds(steps: Steps, step: int) -> bool:
    at = int(steps.searchsorted(step))
    return at < len(steps) and int(steps[at]) == step


def _neighbours(steps: Steps, step: int) -> str:
    at = int(steps.searchsorted(step))
    if not 0 < at < len(steps):
        return ""
    return f"; the nearest are {steps[at - 1]} and {steps[at]}"


# ---------------------------------------------------------------- parts of a tensor


def parse_index(text: str) -> Index:
    """Read what `--index` takes, for example '0, :, ::2': a tuple for NumPy's basic indexing.

    Raises BadSelection that names the part which cannot be read.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) > 1 and not parts[-1]:
        parts.pop()
    index = tuple(_index_part(part, text) for part in parts)
    if sum(part is ... for part in index) > 1:
        raise BadSelection(f"The index {text!r} has more than one '...'. {INDEX_FORMS}")
    return index


def check_index(index: Sequence[int | slice | EllipsisType], shape: Sequence[int], name: str) -> None:
    """Raise BadSelection unless `index` takes something from the tensor `name` of this shape.

    Refused: more parts than axes, a number outside its axis, a slice that selects nothing from an axis which is not
    itself empty.
    """
    parts = list(index)
    given = sum(part is not ... for part in parts)
    if given > len(shape):
        have = f"has {_count(len(shape), 'axis', 'axes')} (shape {_shape(shape)})" if shape else "is a single number"
        raise BadSelection(f"The index has {_count(given, 'part', 'parts')}, but {name!r} {have}. Give fewer parts.")
    at = next((i for i, part in enumerate(parts) if part is ...), len(parts))
    parts[at : at + 1] = [slice(None)] * (len(shape) - given)
    for axis, (part, size) in enumerate(zip(parts, shape, strict=True)):
        where = f"axis {axis} of {name!r}, which has size {size} (shape {_shape(shape)})"
        if isinstance(part, slice):
            if size and not len(range(size)[part]):
                raise BadSelection(f"The slice {_slice_text(part)!r} selects nothing from {where}.")
        elif not isinstance(part, EllipsisType) and not -size <= operator.index(part) < size:
            allowed = f"Give a number from {-size} to {size - 1}." if size else "The tensor is empty."
            raise BadSelection(f"The index {part} is outside {where}. {allowed}")


def _index_part(part: str, text: str) -> int | slice | EllipsisType:
    if part in ("...", "Ellipsis"):
        return ...
    if part in ("None", "newaxis", "np.newaxis"):
        raise BadSelection(f"The index {text!r} adds an axis with {part!r}, which is not supported. {INDEX_FORMS}")
    numbers = [number.strip() for number in part.split(":")]
    for number in numbers:
        if _INTEGER.fullmatch(number) is None and (number or len(numbers) == 1):
            raise BadSelection(f"The index {text!r} cannot be read: {part!r} is no number or slice. {INDEX_FORMS}")
    if len(numbers) == 1:
        return int(numbers[0])
    if len(numbers) > 3:
        raise BadSelection(f"The index {text!r} cannot be read: {part!r} has more than two colons. {INDEX_FORMS}")
    start, stop, step = [int(number) if number else None for number in (*numbers, "")[:3]]
    if step == 0:
        raise BadSelection(f"The index {text!r} cannot be read: {part!r} has a step of zero. {INDEX_FORMS}")
    return slice(start, stop, step)


def _slice_text(part: slice) -> str:
    text = f"{'' if part.start is None else part.start}:{'' if part.stop is None else part.stop}"
    return text if part.step is None else f"{text}:{part.step}"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(str(size) for size in shape)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
