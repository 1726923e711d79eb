"""Writes what the benchmark found as a page of Markdown: benchmarks/DETECTION.md."""

from __future__ import annotations

import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import smdbg
from benchmarks.detection import score
from benchmarks.detection.healthy import PLAIN
from benchmarks.detection.judge import EARLY, VIEWS, Record
from benchmarks.detection.recipe import HALVES

NOTES = Path(__file__).parent / "notes.md"  # what people say about the cases that are missed
PUBLISHED = """\
| tool | faulty flagged | healthy flagged |
|---|---|---|
| DeepDiagnosis | 138 of 203 (68 %) | 68 of 188 (36 %) |
| DeepLocalize | 189 of 201 (94 %) | 133 of 186 (72 %) |
| UMLAUT | - | 117 of 117 (100 %) |

From the tools' own published logs over the models of AutoTrainer; on the 11 faulty architectures above DeepDiagnosis
flags 10. Comparable: the 20 architectures, their optimizer, rate, batch, epochs and loss, and the question whether a
run is flagged at all. Not comparable: the points (made here, alike in number, centres and spread), the framework, the
seeds, their other models and data sets, which are not in this benchmark, and the other faults above, which none of
them was run on."""

Judged = Mapping[str, Record]


class Results:
    """Verdicts and what judging made of them, cut in the ways the page needs."""

    def __init__(self, verdicts: Sequence[Record], judged: Judged) -> None:
        """Keep the labelled cases that were judged."""
        self.judged = judged
        self.left_out = [v for v in verdicts if not v["label"]]
        self.cases = [v for v in verdicts if v["label"] and v["id"] in judged]

    def of(self, label: str, half: str = "both", family: str = "") -> list[Record]:
        """Return the cases with a label, of a half of the seeds, of a family."""
        return [
            v for v in self.cases if v["label"] == label and half in ("both", v["half"]) and family in ("", v["family"])
        ]

    def hits(self, cases: Sequence[Record], view: str = "whole") -> list[score.Hit]:
        """Score one view of faulty cases; of the early one those whose fault acts by then."""
        chosen = [v for v in cases if view != "early" or score.acts_early(v)]
        return [score.hit(v, self.judged[v["id"]], view) for v in chosen]

    def alarms(self, cases: Sequence[Record], severity: str, view: str = "whole") -> score.Share:
        """Return how many cases have a finding of a severity or worse."""
        least = score.RANKS[severity]
        levels = [score.level_of(self.judged[v["id"]], view) for v in cases]
        return score.share(bool(level) and score.RANKS[level] >= least for level in levels)


def page(verdicts: Sequence[Record], judged: Judged, pack: str = "default") -> str:
    """Return the page."""
    found = Results(verdicts, judged)
    parts = [
        _head(found, pack),
        "## Against the goals\n",
        _goals(found),
        "## Faults\n",
        "Seeds of the half for reporting. `detected`: an error of any rule; `right class`: of a rule that calls the "
        "fault by its name; `right layer`: such an error names a tensor of the layer at fault (in brackets: the first "
        "one does); `onset`: median distance from the first faulty step, in steps and in saved steps. Kinds with `w` "
        "count at warnings, since the rules that know them are warnings by definition.\n",
        _kinds(found),
        "## The published architectures\n",
        _architectures(found),
        "## Healthy runs\n",
        _healthy(found),
        "## Missed and mistaken, both halves\n",
        _missed(found),
        NOTES.read_text(encoding="utf-8") if NOTES.is_file() else "",
        "## Beside published figures\n",
        PUBLISHED,
        _left_out(found),
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _head(found: Results, pack: str) -> str:
    faulty, healthy = found.of("faulty"), found.of("healthy")
    awkward = sum(v["family"] not in (PLAIN, "architecture") for v in healthy)
    kinds = {v["family"] for v in faulty if v["family"] != "architecture"}
    mutated = sum(v["family"] != "architecture" for v in faulty)
    return f"""# Detection

{len(faulty) + len(healthy)} small trainings, written through the PyTorch hook and judged by the rules of pack
`{pack}`: {len(faulty)} faulty ones ({mutated} by {len(kinds)} kinds of fault, {len(faulty) - mutated} of published
architectures) and {len(healthy)} healthy ones, {awkward} of them awkward. `make bench-detection` makes this page;
benchmarks/detection/ says what every case is. Each case is labelled by what the trainer itself saw: a faulty one shows
its fault, a healthy one learned, stayed finite and does not overfit. Rules were calibrated on the even seeds, and all
figures are of the odd ones unless it says otherwise. Runs are judged whole, by their first {EARLY:.0%} of steps (where
the fault acts by then), and with all losses and metrics hidden, the learning rate and the gradient norm among them.

{time.strftime("%Y-%m-%d", time.gmtime())}, smdbg {smdbg.__version__}, Python {platform.python_version()},
PyTorch {torch.__version__}
"""


def _goals(found: Results) -> str:
    rows: list[list[Any]] = [
        ["every architecture judged rightly at every seed (both halves)", "all", "", _arch_right(found)]
    ]
    measures: dict[str, tuple[str, Callable[[Results, str], score.Share]]] = {
        "faulty cases with an error of the right class": ("≥ 95 %", _right),
        "the same, from the first 20 % of the run": ("≥ 80 %", lambda f, h: _right(f, h, "early")),
        "the same, losses and metrics hidden": ("-", lambda f, h: _right(f, h, "hidden")),
        "right layer, where one is at fault": ("≥ 80 %", _layer),
        "onset within 2 saved steps": ("", lambda f, h: score.near(f.hits(f.of("faulty", h)))),
        "healthy runs with an error": ("≤ 1 % at the upper end", lambda f, h: f.alarms(f.of("healthy", h), "error")),
        "healthy runs with a warning or worse": ("≤ 10 %", lambda f, h: f.alarms(f.of("healthy", h), "warning")),
    }  # fmt: skip
    for what, (goal, measure) in measures.items():
        rows.append([what, goal, *(_said(measure(found, half)) for half in HALVES)])
    return _table(("", "goal", "calibration half", "reporting half"), rows)


def _layer(found: Results, half: str) -> score.Share:
    return score.share(one.layer for one in found.hits(found.of("faulty", half)))


def _right(found: Results, half: str, view: str = "whole") -> score.Share:
    return score.share(one.right for one in found.hits(found.of("faulty", half), view))


def _said(share: score.Share) -> str:
    low, high = share.interval
    return f"{share} = {share.percent} ({100 * low:.1f} to {100 * high:.1f})"


def _kinds(found: Results) -> str:
    rows = []
    cases = found.of("faulty", "report")
    for kind in dict.fromkeys(_kind(v) for v in cases):
        some = [v for v in cases if _kind(v) == kind]
        hits = found.hits(some)
        off = score.median_off(hits)
        layer = score.share(h.layer for h in hits)
        rows.append(
            [
                kind + (" `w`" if some[0]["level"] == "warning" else ""),
                len(some),
                score.share(h.detected for h in hits),
                score.share(h.right for h in hits),
                f"{layer} ({score.share(h.first_layer for h in hits)})" if layer.of else "-",
                f"{off[0]:g} / {off[1]:g}" if off else "-",
                score.near(hits),
                score.share(h.right for h in found.hits(some, "early")),
                score.share(h.right for h in found.hits(some, "hidden")),
            ]
        )
    return _table(
        ("fault", "cases", "detected", "right class", "right layer", "onset off", "within 2", "first 20 %", "hidden"),
        rows,
    )


def _kind(verdict: Record) -> str:
    return str(verdict["family"])


def _arch_right(found: Results) -> str:
    return _said(score.share(_is_right(found, v) for v in found.cases if v["family"] == "architecture"))


def _is_right(found: Results, verdict: Record) -> bool:
    level = score.level_of(found.judged[verdict["id"]], "whole")
    return (level == "error") is (str(verdict["label"]) == "faulty")


def _architectures(found: Results) -> str:
    rows = []
    names = dict.fromkeys(_name(v) for v in [*found.cases, *found.left_out] if v["family"] == "architecture")
    for name in names:
        mine = [v for v in found.cases if v["family"] == "architecture" and _name(v) == name]
        out = sum(v["family"] == "architecture" and _name(v) == name for v in found.left_out)
        faulty = [v for v in mine if v["label"] == "faulty"]
        counts = f"{len(faulty)} faulty, {len(mine) - len(faulty)} healthy, {out} neither"
        right = score.share(_is_right(found, v) for v in mine)
        rows.append([name, counts, right, score.share(h.right for h in found.hits(faulty))])
    text = (
        "All seeds. Faulty: not finite, or the last epoch's mean loss above 0.9 of the first's; healthy: below 0.6.\n\n"
    )
    return text + _table(("architecture", "by outcome", "judged rightly", "right class"), rows)


def _name(verdict: Record) -> str:
    return str(verdict["id"]).removeprefix("arch-").rpartition("-")[0]


def _healthy(found: Results) -> str:
    rows = []
    cases = found.of("healthy", "report")
    groups = [("all", cases), ("awkward", [v for v in cases if v["family"] not in (PLAIN, "architecture")])]
    groups += [(f, [v for v in cases if v["family"] == f]) for f in dict.fromkeys(v["family"] for v in cases)]
    for name, some in groups:
        row = [name, len(some)]
        row += [
            _said(found.alarms(some, s)) if name in ("all", "awkward") else found.alarms(some, s)
            for s in ("error", "warning")
        ]
        row += [
            f"{found.alarms(some, 'error', view).hits} / {found.alarms(some, 'warning', view).hits}"
            for view in VIEWS[1:]
        ]
        rows.append(row)
    head = (
        "kind",
        "runs",
        "with an error",
        "with a warning or worse",
        "first 20 %: errors / all",
        "hidden: errors / all",
    )
    blame: Counter[str] = Counter()
    for v in cases:
        blame.update({f"{f['rule']} ({f['severity']})" for f in found.judged[v["id"]]["whole"]["findings"]})
    text = ", ".join(f"{rule} in {count}" for rule, count in blame.most_common()) or "none"
    return _table(head, rows) + f"\nBy rule, in runs: {text}.\n"


def _missed(found: Results) -> str:
    lines = []
    for v in found.of("faulty"):
        one = score.hit(v, found.judged[v["id"]], "whole")
        if not one.right:
            rules = ", ".join(one.rules) or "nothing"
            lines.append(f"- {v['id']} ({v['why']}): {'another class: ' + rules if one.detected else 'missed'}")
        elif one.layer is False:
            lines.append(f"- {v['id']}: right class, another layer")
    for v in found.of("healthy"):
        errors = [f for f in found.judged[v["id"]]["whole"]["findings"] if f["severity"] == "error"]
        if errors:
            lines.append(f"- {v['id']} (healthy: {v['why']}): {errors[0]['rule']} on {errors[0]['tensor']}")
    return ("\n".join(lines) or "None.") + "\n"


def _left_out(found: Results) -> str:
    count = Counter(re.sub(r"-\d+$", "", v["id"]) for v in found.left_out)
    names = ", ".join(f"{name} ({n})" for name, n in count.items())
    turned = f"{len(found.left_out)} trainings that turned out neither faulty nor healthy"
    return f"\n## Left out\n\n{turned}: {names or 'none'}.\n"
