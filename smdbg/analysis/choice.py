"""Which rules to run: those that are named, or those of a pack, and those of plugins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import filter as matching
from fnmatch import fnmatchcase

from smdbg.analysis.pack import Pack, load_pack, with_overrides
from smdbg.analysis.rule import Rule, all_rules, build, find_rule
from smdbg.errors import BadSelection, RuleNotFound, near

Classes = Mapping[str, type[Rule]]

DEFAULT_PACK = "default"


def choose(
    named: Sequence[str] = (),
    ignored: Sequence[str] = (),
    pack: str | None = None,
    settings: Sequence[str] = (),
    extra: Classes | None = None,
    added: Iterable[str] = (),
) -> list[Rule]:
    """Return the rules to run: those named, or those of the pack, without the ignored ones, with the settings.

    Without either the pack is `default`. `extra` are rules beside those of smdbg; those of them that are `added` are
    run as well, unless they are there already. Raises RuleNotFound for a name or glob that is no rule, BadConfig for a
    pack or a setting that is wrong, BadSelection where no rule is left.
    """
    extra = {} if extra is None else extra  # its length is not asked for: installed packages would be looked at
    if pack is None and named:
        rules = _catalogue(named, extra)
    else:
        rules = _of_pack(load_pack(pack or DEFAULT_PACK, extra), named)
    there = {rule.name for rule in rules}
    rules += [build(extra[name], {}) for name in added if name not in there]
    for pattern in ignored:
        if not set(pattern) & set("*?[") and not _known(pattern, rules, extra):
            raise RuleNotFound(f"--ignore: there is no rule {pattern!r}.{near(pattern, [*all_rules(), *extra])}")
    kept = [rule for rule in rules if not any(means(rule, pattern) for pattern in ignored)]
    if not rules:
        raise BadSelection("The pack has no rules, so there is nothing to check.")
    if not kept:
        raise BadSelection("No rule is left to run: --ignore leaves out everything that was selected.")
    return with_overrides(kept, settings)


def narrowed(rules: Sequence[Rule], mode: str | None, worker: int | None, ranks: Sequence[int]) -> list[Rule]:
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


def means(rule: Rule, pattern: str) -> bool:
    """Return whether a name or glob means the rule, by its label or its class."""
    return fnmatchcase(rule.label, pattern) or fnmatchcase(rule.name, pattern)


def _catalogue(named: Sequence[str], extra: Classes) -> list[Rule]:
    """Return the named rules with the parameters of the catalogue, each once."""
    found: dict[str, Rule] = {}
    for pattern in named:
        names = [pattern]  # find_rule says what is wrong with a name that is none
        if set(pattern) & set("*?["):
            names = matching([*all_rules(), *extra], pattern) or names
        for name in names:
            found.setdefault(name, build(find_rule(name, extra), {}))
    return list(found.values())


def _of_pack(pack: Pack, named: Sequence[str]) -> list[Rule]:
    """Return the rules of a pack, or those of them that are named."""
    for pattern in named:
        if not any(means(rule, pattern) for rule in pack.rules):
            hint = near(pattern, {rule.label for rule in pack.rules})
            raise RuleNotFound(f"There is no rule '{pattern}' in the pack {pack.name}.{hint}")
    return [rule for rule in pack.rules if not named or any(means(rule, pattern) for pattern in named)]


def _known(name: str, rules: Sequence[Rule], extra: Classes) -> bool:
    return any(means(rule, name) for rule in rules) or name in all_rules() or name in extra
