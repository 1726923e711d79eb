"""feature_importance_overweight: a model that relies on a few features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from smdbg.analysis.course import is_number
from smdbg.analysis.rule import Facts, Kind, Needs, parameter
from smdbg.analysis.run_rule import RunRule, Trouble, Verdicts
from smdbg.analysis.training import places
from smdbg.analysis.view import View
from smdbg.rules._evaluations import compiled
from smdbg.store.format import TensorInfo

GROUP = "feature_importance/[^/]+"  # the kind of importance; behind it comes the feature's name, slashes and all


@dataclass(frozen=True, kw_only=True)
class FeatureImportanceOverweight(RunRule):
    """A few features carry almost all of the importance.

    What it does
    ------------
    Takes, at each saved step, the importance of all features of one kind (tensors such as
    `feature_importance/weight/age`, one number each), divides it by their sum, and fires when the `nfeatures` largest
    shares add up to more than `threshold`. Each kind is judged by itself. With no more features than `nfeatures` there
    is nothing to judge.

    Why it matters
    --------------
    Such a model stands and falls with these features. Often one of them gives the answer away and will not be there
    when the model is used.

    Parameters
    ----------
    threshold (default 0.8): fire when the largest shares add up to more.
    nfeatures (features, default 3): how many of the largest shares to add up.
    tensor_regex (default `.*feature_importance/weight.*`): names of importances.

    Example output
    --------------
    feature_importance/weight at step 30: 3 of 24 features have 91.2 % of the importance (age, zip, id).

    How to fix
    ----------
    Check that these features do not contain the answer; try colsample_bytree, or train without the largest one.

    References
    ----------
    Amazon SageMaker Debugger, built-in rule FeatureImportanceOverweight.
    """

    name: ClassVar[str] = "feature_importance_overweight"

    threshold: float = parameter(0.8, minimum=0, maximum=1, help="fire when the largest shares add up to more")
    nfeatures: int = parameter(3, unit="features", minimum=1, help="how many of the largest shares to add up")
    tensor_regex: str = parameter(".*feature_importance/weight.*", help="names of importances")

    def needs(self) -> Needs:
        """Read single numbers (the mean of one element is its value)."""
        return Needs(("mean",))

    def picks(self, info: TensorInfo) -> bool:
        """Pick by name."""
        return is_number(info) and compiled(self.tensor_regex).search(info.name) is not None

    def looked_for(self) -> str:
        """Name the expression."""
        return super().looked_for() if self.include or self.collections else f"names that match {self.tensor_regex}"

    def kinds(self) -> tuple[Kind, ...]:
        """The sum of the largest shares."""
        return (Kind("share", self.threshold),)

    def judge(self, view: View, names: Sequence[str]) -> Verdicts:
        """Judge each kind of importance, in each mode, on each worker."""
        groups: dict[str, list[str]] = {}
        for name in names:
            found = compiled(GROUP).search(name)
            groups.setdefault(name[: found.end()] if found else name.rpartition("/")[0], []).append(name)
        groups = {group: members for group, members in groups.items() if len(members) > self.nfeatures}
        if names and not groups:
            few = f"it adds up the {self.nfeatures} largest shares, and there are no more features than that"
            return Verdicts(not_applicable=few)
        troubles: list[Trouble] = []
        judged: set[str] = set()
        steps = 0
        for worker, mode in places(self, view):
            for group, members in groups.items():
                count, trouble = self._of_group(view, group, members, mode, worker)
                steps = max(steps, count)
                judged.update(members if count else [])
                troubles += [trouble] if trouble is not None else []
        return Verdicts(troubles=troubles, judged=sorted(judged), steps=steps)

    def message(self, facts: Facts) -> str:
        """Say which features, and how much they have."""
        return f"{facts.tensor} at step {facts.step}: {facts.note}."

    def hint(self, facts: Facts) -> str:
        """Say what to do."""
        return "Check that these features do not contain the answer; try training without the largest one."

    def _of_group(
        self, view: View, group: str, members: Sequence[str], mode: str, worker: int
    ) -> tuple[int, Trouble | None]:
        """Return how many steps were judged, and what is wrong."""
        table = view.table(members, ("mean",), mode, worker)
        values = np.maximum(np.nan_to_num(table.statistics["mean"], posinf=0.0), 0.0)
        total = values.sum(axis=1)
        usable = total > 0
        shares = values / np.where(usable, total, 1.0)[:, None]
        largest = np.sort(shares, axis=1)[:, -self.nfeatures :].sum(axis=1)
        bad = np.flatnonzero(usable & (largest > self.threshold))
        if not len(bad):
            return int(usable.sum()), None
        row = int(bad[0])
        top = np.argsort(-shares[row], kind="stable")[: self.nfeatures]
        features = ", ".join(members[column].removeprefix(group).lstrip("/") for column in top)
        clean = np.flatnonzero(usable[:row])
        trouble = Trouble(
            tensor=group,
            worker=worker,
            mode=mode,
            step=int(table.steps[row]),
            last_step=int(table.steps[bad[-1]]),
            violations=len(bad),
            judged=int(usable.sum()),
            worst=float(largest[bad].max()),
            before=int(table.steps[clean[-1]]) if len(clean) else None,
            note=(
                f"{self.nfeatures} of {len(members)} features have {100 * largest[row]:.3g} % of the importance"
                f" ({features})"
            ),
        )
        return int(usable.sum()), trouble
