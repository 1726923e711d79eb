"""The first cause in words: what came first, what may have come of it, what cannot be told, and what shows it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smdbg.cli.output import console, counted, data, line, printable
from smdbg.cli.shellwords import folded

if TYPE_CHECKING:
    from smdbg.analysis.cause import FirstCause
    from smdbg.analysis.clock import Clock
    from smdbg.analysis.findings import Finding
    from smdbg.analysis.report import Report
    from smdbg.analysis.run import Run
    from smdbg.cli.root import Session
    from smdbg.store.format import TensorInfo

GROUPS = 8  # kinds of consequences that are listed
STEPS_BEFORE = 3  # saved steps before the onset that `inspect` is told to show

NOUNS = {
    "weight": ("weight", "weights"),
    "bias": ("bias", "biases"),
    "norm": ("norm parameter", "norm parameters"),
    "embedding": ("embedding", "embeddings"),
    "gradient": ("gradient", "gradients"),
    "update": ("update", "updates"),
    "input": ("input", "inputs"),
    "output": ("output", "outputs"),
    "loss": ("loss", "losses"),
    "metric": ("metric", "metrics"),
}


@dataclass(frozen=True)
class Story:
    """The first cause of a run's findings, and what is needed to tell of it.

    `options`: what the user gave to say which run and attempt is meant, to be given again; `several`: more than one
    worker.
    """

    cause: FirstCause | None
    catalogue: dict[str, TensorInfo]
    clock: Clock
    several: bool = False
    options: tuple[str, ...] = field(default=())


def story_of(report: Report, run: Run, session: Session, attempt: str | int = "latest") -> Story:
    """Return the story of a report."""
    from smdbg.analysis.cause import explain
    from smdbg.analysis.clock import Clock, clock_of

    catalogue = {name: run.tensor(name).info for name in run.tensors()}
    clock = clock_of(run) if report.findings else Clock()
    rules = {result.name: result.rule for result in report.rules}
    cause = explain(report.findings, catalogue, clock, rules)
    return Story(cause, catalogue, clock, len(run.workers()) > 1, options(session, attempt))


def options(session: Session, attempt: str | int = "latest") -> tuple[str, ...]:
    """Return the options that must be given again to mean the same run and attempt."""
    again = ("--run", session.run) if session.run is not None else ()
    return (*again, *(("--attempt", str(attempt)) if attempt != "latest" else ()))


def tell(story: Story, blame: bool = True) -> None:
    """Print the paragraph, and the commands that show the evidence; nothing without findings."""
    cause = story.cause
    if cause is None:
        return
    line(f"First cause: {_one(cause.first, story)}.")
    if cause.before:
        line(f"Before it, and perhaps why: {_groups(cause.before, story)}.")
    if cause.then:
        line(f"Then: {_groups(cause.then, story)}.")
    if cause.besides:
        line(f"Apart from that: {_groups(cause.besides, story)}.")
    text = cannot_tell(story)
    if text:
        line(text)
    commands = evidence(story, blame)
    if commands:
        line("To see it:")
        show_commands(commands)


def show_commands(commands: Iterable[Sequence[str]]) -> None:
    """Print command lines that can be copied, folded at the width of the terminal."""
    for words in commands:
        for text in folded(words, console().width):
            data(printable(text))


def evidence(story: Story, blame: bool = True) -> list[list[str]]:
    """Return the command lines that show what came first."""
    cause = story.cause
    if cause is None:
        return []
    first = cause.first
    lines = []
    if first.tensor in story.catalogue:
        worker = first.worker if story.several else None
        lines.append(inspect_words(first.tensor, first.onset, worker, story.options, first.first_step))
    if blame:
        lines.append(blame_words(story.options))
    return lines


def inspect_words(
    name: str, onset: tuple[int | None, int], worker: int | None, options: Sequence[str], until: int = 0
) -> list[str]:
    """Return the command line that shows a tensor around the step at which it went bad, at least up to step `until`."""
    clean, bad = onset
    gap = max(1, bad - (bad - 1 if clean is None else clean))
    words = ["--steps", f"{max(0, bad - (STEPS_BEFORE + 1) * gap)}:{max(bad + gap, until) + 1}"]
    words += [] if worker is None else ["--worker", str(worker)]
    return ["smdbg", "inspect", *_with_name(name, [*words, *options])]


def blame_words(options: Sequence[str], tensor: str | None = None) -> list[str]:
    """Return the command line that shows the whole chain, or the chain back from one tensor."""
    named = [] if tensor is None else [f"--tensor={tensor}"] if tensor.startswith("-") else ["--tensor", tensor]
    return ["smdbg", "blame", *named, *options]


def _with_name(name: str, words: list[str]) -> list[str]:
    """Put the name before the options, or where it looks like one, behind them."""
    return [*words, "--", name] if name.startswith("-") else [name, *words]


def _one(finding: Finding, story: Story) -> str:
    """Return `w (exploding_tensor, error) from step 7 on`, with worker and mode where they matter."""
    whose = f" of worker {finding.worker}" if story.several else ""
    mode = f" ({finding.mode})" if finding.mode in ("eval", "predict") else ""
    made = _made(finding, story)
    since = f"from step {finding.onset[1]}{mode} on"
    return f"{finding.tensor}{whose}, {finding.rule} ({finding.severity.value}) {since}{made}"


def _made(finding: Finding, story: Story) -> str:
    """Say of a weight which step's update made it bad."""
    from smdbg.analysis.cause import interval
    from smdbg.analysis.place import before_update
    from smdbg.store.format import TensorInfo

    info = story.catalogue.get(finding.tensor, TensorInfo(finding.tensor, ""))
    if not before_update(info):
        return ""
    lo, hi = interval(finding, info, story.clock)
    if hi < 0:
        return ", so it began that way"
    when = f"step {hi}" if hi - lo == 1 else f"a step from {max(lo + 1, 0)} to {hi}"
    return f", made by the update of {when}"


def _groups(findings: Sequence[Finding], story: Story) -> str:
    """Return the findings counted by rule and kind of tensor: `12 gradients at step 21 (exploding_tensor)`."""
    grouped: dict[tuple[str, str], list[Finding]] = {}
    for one in findings:
        grouped.setdefault((one.rule, _role(one, story)), []).append(one)
    parts = []
    for (rule, role), members in list(grouped.items())[:GROUPS]:
        names = list(dict.fromkeys(one.tensor for one in members))
        what = names[0] if len(names) == 1 else noun(role, len(names))
        parts.append(f"{what} {steps_of(one.onset[1] for one in members)} ({rule}{_note(members, story)})")
    left = sum(len(members) for members in list(grouped.values())[GROUPS:])
    return "; ".join(parts) + (f"; and {counted(left, 'finding')} more" if left else "")


def _role(finding: Finding, story: Story) -> str:
    return story.catalogue[finding.tensor].role if finding.tensor in story.catalogue else ""


def _note(members: Sequence[Finding], story: Story) -> str:
    """Return severity where it is not error, and the workers where there are several."""
    severities = list(dict.fromkeys(one.severity.value for one in members if one.severity.value != "error"))
    workers = sorted({one.worker for one in members})
    text = f", {', '.join(severities)}" if severities else ""
    if not story.several:
        return text
    return f"{text}, worker {workers[0]}" if len(workers) == 1 else f"{text}, {counted(len(workers), 'worker')}"


def noun(role: str, count: int) -> str:
    """Return `1 bias`, `12 gradients`, of a role that is not known `3 tensors`."""
    one, many = NOUNS.get(role, ("tensor", "tensors"))
    return f"{count:,} {one if count == 1 else many}"


def steps_of(steps: Iterable[int]) -> str:
    """Return `at step 21`, `at steps 21 to 30`."""
    found = sorted(set(steps))
    return f"at step {found[0]}" if len(found) == 1 else f"at steps {found[0]} to {found[-1]}"


def cannot_tell(story: Story) -> str:
    """Say what the saved steps leave open about the order, '' if nothing."""
    cause = story.cause
    if cause is None or cause.window is None:
        return ""
    wide = []
    for one in (cause.first, *cause.undecided):
        home = story.catalogue[one.tensor].collection if one.tensor in story.catalogue else one.tensor
        wide.append((home, story.clock.apart(one.worker, one.onset), one.onset[0] is None))
    return open_order(wide, cause.window, len(cause.undecided))


def open_order(
    wide: Sequence[tuple[str, int, bool]],
    window: tuple[int, int],
    count: int,
    nouns: tuple[str, str] = ("finding", "findings"),
) -> str:
    """Return the sentence on what is open, from (collection, steps apart, never seen clean) of all concerned."""
    homes = list(dict.fromkeys(home for home, apart, _ in wide if apart > 1))
    apart = max((apart for _, apart, unseen in wide if not unseen and apart > 1), default=0)
    lo, hi = window
    saved = ""
    if homes:
        names = homes[0] if len(homes) == 1 else f"{', '.join(homes[:-1])} and {homes[-1]}"
        how = f"{apart} steps apart" if apart else f"not before step {max(hi, 0)}"
        saved = f"{names} {'was' if len(homes) == 1 and not homes[0].endswith('s') else 'were'} saved {how}: "
    advice = f"save every step between {max(lo, 0)} and {hi} to know" if hi > 0 else "the first step is all there is"
    order = f"{'within' if saved else 'Within'} ({lo}, {hi}] the order follows that of a training step"
    what = f"{count:,} {nouns[count != 1]}"
    return f"The saved steps cannot tell whether {what} came before it. {saved}{order}; {advice}."


def summary_field(story: Story | None) -> dict[str, Any]:
    """Return the field `first_cause` of a summary, or nothing where it was not looked for."""
    return {} if story is None else {"first_cause": None if story.cause is None else story.cause.record()}
