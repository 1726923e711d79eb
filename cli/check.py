"""`smdbg check`: run rules over a run and say what is wrong."""

from __future__ import annotations

import fnmatch
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import click

from smdbg.cli.exits import Exit
from smdbg.cli.options import LISTINGS, attempt_option, mode_option, shared, words, worker_option
from smdbg.cli.output import Format, printable, talk
from smdbg.cli.root import Session
from smdbg.cli.target import open_target
from smdbg.errors import BadSelection, RuleNotFound, near

if TYPE_CHECKING:
    from smdbg.analysis.checker import Report
    from smdbg.analysis.pack import Pack
    from smdbg.analysis.rule import Rule


@dataclass(frozen=True)
class Verdict:
    """The status of a check, and why no verdict could be given where it is ERROR."""

    status: Exit
    reason: str = ""


@click.command("check", short_help="Run rules over a run and say what is wrong.")
@click.option("--rules", "rules", multiple=True, metavar="NAME,…", help="Only these rules: names or globs.")
@click.option("--ignore", multiple=True, metavar="NAME,…", help="Leave these rules out; wins over --rules.")
@click.option("--pack", metavar="NAME|FILE", help="The rules of this pack.  [default: default]")
@click.option("--set", "settings", multiple=True, metavar="RULE.PARAM=VALUE", help="Set a parameter; repeatable.")
@click.option(
    "--fail-on",
    type=click.Choice(["error", "warning", "info"]),
    default="error",
    show_default=True,
    help="The least severity that gives status 1.",
)
@click.option("--allow-incomplete", is_flag=True, help="Status 0 for a clean run that did not complete.")
@click.option("--exit-zero", is_flag=True, help="Status 0 in place of 1.")
@mode_option
@worker_option
@attempt_option
@shared(formats=(*LISTINGS, Format.JSON))
def command(
    session: Session,
    form: Format,
    rules: tuple[str, ...],
    ignore: tuple[str, ...],
    pack: str | None,
    settings: tuple[str, ...],
    fail_on: str,
    allow_incomplete: bool,
    exit_zero: bool,
    mode: str | None,
    worker: int | None,
    attempt: str | int,
) -> Exit:
    """Run rules over a run and say what is wrong.

    \b
    Examples:
      smdbg check
      smdbg check --rules exploding_tensor
      smdbg check --pack sagemaker --ignore 'tree_*' --fail-on warning
      smdbg check --set vanishing_gradient.threshold=1e-6 --format jsonl

    Rules named by --rules have the parameters of the catalogue, or those of the pack when --pack is given.

    \b
    Exit status:
      0  nothing found at or above --fail-on; the run completed, nothing of it
         was dropped, and at least one rule judged something
      1  findings at or above --fail-on
      2  no verdict: a rule failed, a rule named by --rules had nothing to
         judge, or nothing was found in a run that has gaps or did not complete
         (--allow-incomplete accepts the latter)
    """
    from smdbg.analysis.checker import check
    from smdbg.cli import check_page

    run = open_target(session, attempt)
    named, pack = configured(words(rules), pack)
    chosen = choose(named, words(ignore), pack, settings)
    chosen = _narrowed(chosen, mode, worker, run.workers())
    report = check(run, chosen, progress=_progress(session.quiet))
    check_page.show(report, form, session.quiet)
    verdict = judge(report, named, fail_on, allow_incomplete)
    if verdict.reason:
        talk(f"smdbg: {verdict.reason}")
    return Exit.CLEAN if exit_zero and verdict.status is Exit.VIOLATIONS else verdict.status


def judge(report: Report, named: Sequence[str], fail_on: str, allow_incomplete: bool) -> Verdict:
    """Return the status of a check; `named` holds what the user gave to --rules.

    Whatever kept a rule that was asked for from judging comes first, then the findings, then what makes a clean result
    untrustworthy.
    """
    from smdbg.analysis.rule import Severity

    summary = report.summary
    if report.failed:
        return Verdict(Exit.ERROR, f"No verdict: {_list('the rule', report.failed)} failed; see above.")
    idle = [name for name in named if not _judged(report, name)]
    if idle:
        return Verdict(Exit.ERROR, f"No verdict: {_list('the rule', idle)} had nothing to judge; see above.")
    if report.at_least(Severity(fail_on)):
        return Verdict(Exit.VIOLATIONS)
    if not report.judged:
        why = "; the hook switched itself off during the training, and its log says why" if summary.switched_off else ""
        return Verdict(Exit.ERROR, f"No verdict: no rule found anything to judge in {summary.run}{why}.")
    if summary.switched_off:
        text = "the hook switched itself off during the training, so what came after was not saved"
        return Verdict(Exit.ERROR, f"No verdict: nothing was found, but {text}. Its log says why.")
    if summary.damaged:
        text = f"nothing was found, but part of the run cannot be read: {summary.damaged[0]}"
        return Verdict(Exit.ERROR, f"No verdict: {text}. `smdbg verify` tells what is left.")
    if summary.dropped_rows or summary.dropped_steps:
        lost = f"{summary.dropped_steps} steps and {summary.dropped_rows} rows were dropped while the run was written"
        return Verdict(Exit.ERROR, f"No verdict: nothing was found, but {lost}.")
    if summary.incomplete and not allow_incomplete:
        advice = "--allow-incomplete accepts what there is"
        return Verdict(Exit.ERROR, f"No verdict: nothing was found, but the run is {summary.status}; {advice}.")
    return Verdict(Exit.CLEAN)


def configured(named: Sequence[str], pack: str | None) -> tuple[Sequence[str], str | None]:
    """Return the rules and the pack to run: the flags; where there is none of both, what smdbg.yaml says."""
    from smdbg.config import load_config

    config = load_config()
    return (named or (() if pack else config.rules)), pack or config.pack


def choose(named: Sequence[str], ignored: Sequence[str], pack: str | None, settings: Sequence[str]) -> list[Rule]:
    """Return the rules to run: those named, or those of the pack, without the ignored ones, with the settings.

    Without either the pack is `default`. Raises RuleNotFound for a name or glob that is no rule, BadConfig for a pack
    or a setting that is wrong, BadSelection where no rule is left.
    """
    from smdbg.analysis.pack import load_pack, with_overrides
    from smdbg.analysis.rule import all_rules

    if pack is None and named:
        rules = _catalogue(named)
    else:
        rules = _of_pack(load_pack(pack or "default"), named)
    for pattern in ignored:
        plain = not set(pattern) & set("*?[")
        if plain and pattern not in all_rules() and not any(_is(rule, pattern) for rule in rules):
            raise RuleNotFound(f"--ignore: there is no rule {pattern!r}.{near(pattern, all_rules())}")
    kept = [rule for rule in rules if not any(_is(rule, pattern) for pattern in ignored)]
    if not rules:
        raise BadSelection("The pack has no rules, so there is nothing to check.")
    if not kept:
        raise BadSelection("No rule is left to run: --ignore leaves out everything that was selected.")
    return with_overrides(kept, settings)


def _catalogue(named: Sequence[str]) -> list[Rule]:
    """Return the named rules with the parameters of the catalogue, each once."""
    from smdbg.analysis.rule import all_rules, build, find_rule

    known = all_rules()
    found: dict[str, Rule] = {}
    for pattern in named:
        matches = fnmatch.filter(known, pattern)
        for name in matches or [pattern]:  # find_rule says what is wrong with a name that is none
            found.setdefault(name, build(find_rule(name), {}))
    return list(found.values())


def _of_pack(pack: Pack, named: Sequence[str]) -> list[Rule]:
    """Return the rules of a pack, or those of them that are named."""
    for pattern in named:
        if not any(_is(rule, pattern) for rule in pack.rules):
            hint = near(pattern, {rule.label for rule in pack.rules})
            raise RuleNotFound(f"There is no rule '{pattern}' in the pack {pack.name}.{hint}")
    return [rule for rule in pack.rules if not named or any(_is(rule, pattern) for pattern in named)]


def _is(rule: Rule, pattern: str) -> bool:
    """Return whether a name or glob means the rule, by its label or its class."""
    return fnmatch.fnmatchcase(rule.label, pattern) or fnmatch.fnmatchcase(rule.name, pattern)


def _judged(report: Report, pattern: str) -> bool:
    """Return whether a rule that the name or glob means has judged something."""
    return any(
        fnmatch.fnmatchcase(result.name, pattern) or fnmatch.fnmatchcase(result.rule, pattern)
        for result in report.rules
        if result.name in report.judged
    )


def _narrowed(rules: Sequence[Rule], mode: str | None, worker: int | None, ranks: Sequence[int]) -> list[Rule]:
    """Return the rules, kept to one mode and one worker; a rule that is bound to others drops out."""
    if worker is not None and worker not in ranks:
        raise BadSelection(f"There is no worker {worker} in this run; it has {', '.join(map(str, ranks))}.")
    kept = list(rules)
    if mode is not None:
        kept = [replace(rule, mode=mode) for rule in kept if rule.mode in (None, mode)]
    if worker is not None:
        kept = [replace(rule, workers=(worker,)) for rule in kept if not rule.workers or worker in rule.workers]
    if not kept:
        raise BadSelection("No rule is left to run: all of them are bound to another mode or worker.")
    return kept


def _list(noun: str, names: Sequence[str]) -> str:
    """Return `the rule x`, `the rules x and y`."""
    return f"{noun} {names[0]}" if len(names) == 1 else f"{noun}s {', '.join(names[:-1])} and {names[-1]}"


def _progress(quiet: bool) -> Callable[[int, int, str], None] | None:
    """Return what shows how far the check is on stderr, None where that is no terminal that can erase a line."""
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return None

    def show(done: int, total: int, text: str) -> None:
        share = printable(f"{done}/{total} {text}") if done < total else ""
        sys.stderr.write("\r\x1b[K" + share[:60])
        sys.stderr.flush()

    return show
