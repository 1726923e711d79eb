"""`smdbg check`: run rules over a run and say what is wrong."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smdbg.cli.exits import Exit
from smdbg.cli.options import LISTINGS, attempt_option, mode_option, shared, words, worker_option
from smdbg.cli.output import Format, counted, printable, talk
from smdbg.cli.root import Session
from smdbg.cli.target import open_target
from smdbg.errors import BadSelection, SmdbgError

if TYPE_CHECKING:
    from smdbg.analysis.baseline import Known
    from smdbg.analysis.checker import Report
    from smdbg.analysis.rule import Rule
    from smdbg.analysis.run import Run


@dataclass(frozen=True)
class Verdict:
    """The status of a check, and why no verdict could be given where it is ERROR."""

    status: Exit
    reason: str = ""


@dataclass(frozen=True)
class Options:
    """What a check is asked for."""

    rules: tuple[str, ...]
    ignore: tuple[str, ...]
    pack: str | None
    settings: tuple[str, ...]
    plugin: tuple[str, ...]
    reference: str | None
    fail_on: str
    allow_incomplete: bool
    exit_zero: bool
    baseline: str | None
    write_baseline: str | None
    reason: str | None
    save: bool
    mode: str | None
    worker: int | None
    attempt: str | int

    @property
    def whole(self) -> bool:
        """Tell whether the rules see all of the run."""
        return self.mode is None and self.worker is None and not isinstance(self.attempt, int)

    def record(self) -> dict[str, Any]:
        """Return what a saved verdict tells of them; of paths the names alone, which mean something elsewhere."""
        files = {"pack": self.pack, "reference": self.reference, "baseline": self.baseline}
        named = {key: value and value.rstrip("/").rpartition("/")[2] for key, value in files.items()}
        return {
            **{key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()},
            **named,
            "plugin": [Path(path).name for path in self.plugin],
            "write_baseline": self.write_baseline is not None,
        }


@click.command("check", short_help="Run rules over a run and say what is wrong.")
@click.option("--rules", "rules", multiple=True, metavar="NAME,…", help="Only these rules: names or globs.")
@click.option("--ignore", multiple=True, metavar="NAME,…", help="Leave these rules out; wins over --rules.")
@click.option("--pack", metavar="NAME|FILE", help="The rules of this pack.  [default: default]")
@click.option("--set", "settings", multiple=True, metavar="RULE.PARAM=VALUE", help="Set a parameter; repeatable.")
@click.option("--plugin", multiple=True, metavar="FILE.py", help="Rules of your own; repeatable.")
@click.option("--reference", metavar="RUN", help="The run that ref(…) in expressions stands for.")
@click.option(
    "--fail-on",
    type=click.Choice(["error", "warning", "info"]),
    default="error",
    show_default=True,
    help="The least severity that gives status 1.",
)
@click.option("--allow-incomplete", is_flag=True, help="Status 0 for a clean run that did not complete.")
@click.option("--exit-zero", is_flag=True, help="Status 0 in place of 1.")
@click.option("--baseline", metavar="FILE", help="Findings that are known and do not count.")
@click.option("--write-baseline", metavar="FILE", help="Write all findings to FILE, or bring it up to date.")
@click.option("--reason", metavar="TEXT", help="With --write-baseline: why the new ones are known.")
@click.option("--save", is_flag=True, help="Leave the verdict in the run; `smdbg runs` shows the last one.")
@mode_option
@worker_option
@attempt_option
@shared(formats=(*LISTINGS, Format.JSON))
def command(session: Session, form: Format, **given: Any) -> Exit:
    """Run rules over a run and say what is wrong.

    \b
    Examples:
      smdbg check
      smdbg check --rules exploding_tensor
      smdbg check --pack sagemaker --ignore 'tree_*' --fail-on warning
      smdbg check --set vanishing_gradient.threshold=1e-6 --format jsonl
      smdbg check --plugin my_rules.py
      smdbg check --write-baseline known.yaml --reason 'as ever'
      smdbg check --baseline known.yaml --save

    Rules named by --rules have the parameters of the catalogue, or those of the pack when --pack is given. The rules of
    a --plugin are run beside those of the pack; with --rules only those that are named.

    \b
    Exit status:
      0  nothing found at or above --fail-on; the run completed, nothing of it
         was dropped, and at least one rule judged something
      1  findings at or above --fail-on that no --baseline knows
      2  no verdict: a rule failed, a rule named by --rules or of a --plugin had
         nothing to judge, or nothing was found in a run that has gaps or did
         not complete (--allow-incomplete accepts the latter); or the verdict
         could not be saved
    """
    from smdbg.analysis import baseline
    from smdbg.analysis.checker import check
    from smdbg.cli import baseline_page, check_page
    from smdbg.cli.cause_text import story_of

    options = Options(**given)
    _refuse_contradictions(options)
    file = options.baseline or options.write_baseline
    entries = _entries(options)
    run = open_target(session, options.attempt)
    _refuse_repeats(run, options.attempt)
    # What a user's rules print would stand amid the results.
    with contextlib.redirect_stdout(sys.stderr):
        chosen, named = _chosen(run, options)
        report = check(run, chosen, progress=_progress(session.quiet))
    today = datetime.now(UTC).date()
    if options.write_baseline is not None:
        before, entries = entries, baseline.updated(report, entries, options.reason or "", today, whole=options.whole)
        baseline.write(options.write_baseline, entries)
        talk(_written(options.write_baseline, before, entries), session.quiet)
    compared = baseline.compare(report, entries, today, whole=options.whole)
    shown = compared.counted
    story = story_of(shown, run, session, options.attempt)
    if file is None:
        check_page.show(shown, form, session.quiet, story)
    else:
        baseline_page.show(compared, Path(file).name, form, session.quiet, story)
    verdict = judge(shown, named, options.fail_on, options.allow_incomplete)
    if verdict.reason:
        talk(f"smdbg: {verdict.reason}")
    saved = not options.save or _saved(run, report, shown, verdict, options)
    if not saved:
        return Exit.ERROR
    return Exit.CLEAN if options.exit_zero and verdict.status is Exit.VIOLATIONS else verdict.status


def judge(report: Report, named: Sequence[str], fail_on: str, allow_incomplete: bool) -> Verdict:
    """Return the status of a check; `named` holds what the user gave to --rules."""
    from smdbg.analysis import gate
    from smdbg.analysis.findings import Severity

    found = gate.judge(report, named, Severity(fail_on), allow_incomplete)
    return Verdict(Exit(int(found.verdict)), found.reason)


def _refuse_contradictions(options: Options) -> None:
    """Raise UsageError for options that cannot go together."""
    source = click.get_current_context().get_parameter_source("fail_on")
    if options.exit_zero and source is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--exit-zero and --fail-on contradict each other: one says never to fail.")
    if options.baseline is not None and options.write_baseline is not None:
        raise click.UsageError(
            "--baseline and --write-baseline contradict each other. --write-baseline alone brings a file up to date: "
            "what it says of findings that are still there stays."
        )
    if options.reason is not None and options.write_baseline is None:
        raise click.UsageError("--reason is for the entries that --write-baseline writes.")


def _refuse_repeats(run: Run, attempt: str | int) -> None:
    """Raise BadSelection where steps come twice: rules would see the later one alone, and seem to have seen both."""
    if attempt != "all":
        return
    for rank in run.workers():
        steps = run.step_table(rank).step
        if (steps[1:] == steps[:-1]).any():
            text = f"Worker {rank} was resumed and repeated steps, and rules judge each step once."
            raise BadSelection(f"{text} Check one attempt at a time: --attempt 0, --attempt 1, …")


def _entries(options: Options) -> list[Known]:
    """Return the entries of the baseline, which must be there unless it is to be written."""
    from smdbg.analysis import baseline

    if options.baseline is not None:
        return baseline.read(options.baseline)
    if options.write_baseline is not None and Path(options.write_baseline).exists():
        return baseline.read(options.write_baseline)
    return []


def _written(file: str, before: Iterable[Known], after: Iterable[Known]) -> str:
    """Return what became of a baseline file, in words."""
    old, new = ({entry.fingerprint for entry in entries} for entries in (before, after))
    changes = f"{len(new - old)} new, {len(old - new)} fixed and taken out"
    return f"{counted(len(new), 'known finding')} in {file}: {changes}"


def _chosen(run: Run, options: Options) -> tuple[list[Rule], list[str]]:
    """Return the rules to run, and the names of those that the user asked for."""
    from smdbg.analysis.choice import choose, means, narrowed
    from smdbg.analysis.plugins import known_rules, load_rules

    own = load_rules(options.plugin)
    named, pack = configured(words(options.rules), options.pack)
    added = [] if options.rules else list(own)
    rules = choose(named, words(options.ignore), pack, options.settings, known_rules(own), added)
    asked = [*named, *(name for name in added if any(means(rule, name) for rule in rules))]
    rules = narrowed(rules, options.mode, options.worker, run.workers())
    return _referred(rules, options.reference, run.storage_options), asked


def _referred(rules: list[Rule], reference: str | None, storage_options: Mapping[str, Any]) -> list[Rule]:
    """Return the rules with a run to compare with. Raises BadSelection where none of them compares."""
    if reference is None:
        return rules
    from smdbg.analysis.expression_rule import with_reference

    referred = with_reference(rules, reference, storage_options)
    if not any(old.applicable() and not new.applicable() for old, new in zip(rules, referred, strict=True)):
        raise BadSelection("--reference has no use here: no rule that is run compares with another run by ref(…).")
    return referred


def configured(named: Sequence[str], pack: str | None) -> tuple[Sequence[str], str | None]:
    """Return the rules and the pack to run: the flags; where there is none of both, what smdbg.yaml says."""
    from smdbg.config import load_config

    config = load_config()
    return (named or (() if pack else config.rules)), pack or config.pack


def _saved(run: Run, report: Report, counted_ones: Report, verdict: Verdict, options: Options) -> bool:
    """Leave the verdict in the run; say on stderr where that cannot be done."""
    from smdbg.analysis.verdict_store import save_verdict

    known = {finding.fingerprint for finding in report.findings}
    known -= {finding.fingerprint for finding in counted_ones.findings}
    try:
        save_verdict(
            run.url,
            report,
            status=int(verdict.status),
            reason=verdict.reason,
            asked=options.record(),
            known=sorted(known),
            storage_options=run.storage_options,
        )
    except SmdbgError as error:
        talk(f"smdbg: The check was made, but its verdict could not be saved: {error}")
        return False
    return True


def _progress(quiet: bool) -> Callable[[int, int, str], None] | None:
    """Return what shows how far the check is on stderr, None where that is no terminal that can erase a line."""
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return None

    def show(done: int, total: int, text: str) -> None:
        share = printable(f"{done}/{total} {text}") if done < total else ""
        sys.stderr.write("\r\x1b[K" + share[:60])
        sys.stderr.flush()

    return show
