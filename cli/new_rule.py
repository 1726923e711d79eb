"""`smdbg rules new NAME`: a rule to begin with, and a test of it that passes."""

from __future__ import annotations

import keyword
import re
from contextlib import suppress
from pathlib import Path

from smdbg.cli.output import data, printable, talk
from smdbg.errors import BadConfig

_NAME = re.compile(r"[a-z][a-z0-9_]*\Z", re.ASCII)

RULE = '''\
"""@NAME@: replace this line by what the rule finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from smdbg.analysis.rule import Block, Facts, Judgement, Kind, Needs, Rule, State, parameter


@dataclass(frozen=True, kw_only=True)
class @CLASS@(Rule):
    """A weight is larger than it should ever be.

    What it does
    ------------
    Fires when the largest absolute value of a weight is above `threshold`.
    """

    name: ClassVar[str] = "@NAME@"

    threshold: float = parameter(100.0, minimum=0, help="fire when an absolute value is above it")

    def needs(self) -> Needs:
        """Say what to read: statistics by name, of tensors with these roles."""
        return Needs(statistics=("abs_max",), roles=("weight",))

    def kinds(self) -> tuple[Kind, ...]:
        """Say what is compared, and with what."""
        return (Kind("abs_max", self.threshold),)

    def evaluate(self, block: Block, state: State) -> tuple[Judgement, State]:
        """Judge some saved steps of all tensors at once; the arrays are [steps, tensors]."""
        largest = block.stat("abs_max")
        return Judgement(judged=block.present, violated=largest > self.threshold, worst=largest), state

    def message(self, facts: Facts) -> str:
        """Say what is wrong, in a sentence with tensor, step and figures."""
        return f"{facts.tensor} reaches {facts.first['abs_max']:.3g} at step {facts.step}."

    def hint(self, facts: Facts) -> str:
        """Say what to do about it."""
        return "Lower the learning rate, or add weight decay."
'''

TEST = '''\
"""The rule @NAME@ on small runs, written by the hook as a training does."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import smdbg
from smdbg.analysis.checker import Report, check
from smdbg.analysis.plugins import load_rules
from smdbg.analysis.rule import build

RULES = load_rules([Path(__file__).with_name("@NAME@.py")])
EVERY = smdbg.CollectionConfig("weights", save_config=smdbg.SaveConfig(save_interval=1))


def judged(folder: Path, growth: float, **parameters: object) -> Report:
    """Write five steps of a weight that grows, and let the rule judge them."""
    url = str(folder / "run")
    with smdbg.Hook(url, collections=[EVERY]) as hook:
        for step in range(5):
            hook.save_tensor("layer.weight", np.full(3, growth**step), "weights", role="weight")
            hook.end_step()
    return check(smdbg.open_run(url), [build(RULES["@NAME@"], parameters)])


def test_it_fires(tmp_path: Path) -> None:
    """A weight of 1, 10, 100, 1000, 10000 is first above 100 at step 3."""
    (finding,) = judged(tmp_path, 10.0).findings
    assert finding.tensor == "layer.weight"
    assert finding.onset == (2, 3)
    assert "1e+03" in finding.message


def test_it_is_silent(tmp_path: Path) -> None:
    """A weight that stays small is judged, and clean."""
    report = judged(tmp_path, 1.0)
    assert report.rules[0].outcome is smdbg.Outcome.CLEAN


def test_a_parameter_counts(tmp_path: Path) -> None:
    """With a higher threshold the same weight is clean; text is converted, as on the command line."""
    assert not judged(tmp_path, 10.0, threshold="1e6").findings
'''


def write(name: str, folder: str, quiet: bool = False) -> None:
    """Write NAME.py and test_NAME.py. Raises BadConfig for a name that cannot be, and where a file is there already."""
    from smdbg.analysis.rule import all_rules

    if not _NAME.match(name) or keyword.iskeyword(name) or name == "new":
        raise BadConfig(f"{name!r} cannot be the name of a rule: small letters, digits and _, such as large_weight.")
    if name in all_rules():
        raise BadConfig(f"There is a rule {name!r} already; choose another name.")
    title = "".join(part.capitalize() for part in name.split("_"))
    texts = {Path(folder) / f"{name}.py": RULE, Path(folder) / f"test_{name}.py": TEST}
    for path in texts:
        if path.exists() or path.is_symlink():
            raise BadConfig(f"{path} is there already, and is not replaced. Choose another name or --out FOLDER.")
    made: list[Path] = []
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            with open(path, "x", encoding="utf-8") as file:
                made.append(path)
                file.write(text.replace("@NAME@", name).replace("@CLASS@", title))
    except OSError as error:
        for path in made:
            with suppress(OSError):
                path.unlink()
        raise BadConfig(f"{error.filename or folder}: cannot be written: {error.strerror or error}.") from None
    for path in texts:
        data(printable(str(path)))
    rule, test = texts
    talk(f"Try: smdbg check --plugin {rule}; python -m pytest {test}", quiet)
