"""`python -m benchmarks.detection`: train what is not there yet, judge all of it, print the report or write it."""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.detection import judge, report, score, train
from benchmarks.detection.judge import Record

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "benchmarks" / "DETECTION.md"
JUDGED = "judged.json"


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line asks for. Returns 0 even where a goal is missed: figures are read, not obeyed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection", description=__doc__)
    parser.add_argument("--cases", metavar="GLOB", default="*", help="ids of the cases")
    parser.add_argument("--half", choices=("calibrate", "report", "both"), default="both", help="of the seeds")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "detection", help="where the runs are kept")
    parser.add_argument("--no-train", action="store_true", help="judge what is there")
    parser.add_argument("--no-judge", action="store_true", help="train only")
    parser.add_argument("--views", default=",".join(judge.VIEWS), help="whole,early,hidden or some of them")
    parser.add_argument("--rules", default="", help="judge by these rules alone, also those that are in no pack")
    parser.add_argument("--list", action="store_true", help="print the findings of each case instead of the report")
    parser.add_argument("--write", action="store_true", help="write benchmarks/DETECTION.md")
    given = parser.parse_args(words)
    part = given.cases != "*" or given.half != "both" or given.rules or given.views != ",".join(judge.VIEWS)
    if given.write and part:
        parser.error("--write keeps all figures of one full run: leave out --cases, --half, --rules and --views")
    if not given.no_train:
        cases = train.chosen(given.cases, given.half)
        for number, verdict in enumerate(train.train_all(cases, given.out, given.jobs), 1):
            print(number, verdict["id"], verdict["label"] or "left out", verdict["why"], file=sys.stderr, flush=True)
    if given.no_judge:
        return 0
    verdicts = [v for v in train.stored(given.out) if fnmatch.fnmatch(v["id"], given.cases)]
    verdicts = [v for v in verdicts if given.half in ("both", v["half"])]
    judged = _judged(given, verdicts, part)
    if given.list:
        for verdict in verdicts:
            _list(verdict, judged)
    elif given.views == ",".join(judge.VIEWS):
        text = report.page(verdicts, judged)
        print(text)
        if given.write:
            PAGE.write_text(text, encoding="utf-8")
    else:
        _list_alarms(verdicts, judged)
    return 0


def _judged(given: argparse.Namespace, verdicts: Sequence[Record], part: bool) -> dict[str, Record]:
    """Judge, and keep the findings of a full round beside the runs."""
    start = time.perf_counter()
    names = tuple(filter(None, given.rules.split(",")))
    found = dict(judge.judge_all(verdicts, given.out, given.jobs, given.views.split(","), names))
    print(f"judged {len(found)} cases in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    failed = {
        (rule, why)
        for one in found.values()
        for view in judge.VIEWS
        for rule, why in one.get(view, {}).get("failed", {}).items()
    }
    for rule, why in sorted(failed):
        print(f"the rule {rule} failed: {why}", file=sys.stderr)
    if not part:
        (given.out / JUDGED).write_text(json.dumps(found), encoding="utf-8")
    return found


def _list(verdict: Record, judged: dict[str, Record]) -> None:
    """Print what a case is, and what was found in it in each view."""
    if verdict["id"] not in judged:
        return
    print(f"{verdict['id']}: {verdict['label']}, {verdict['why']}; first faulty step {verdict['first_faulty_step']}")
    for view in judge.VIEWS:
        for one in judged[verdict["id"]].get(view, {}).get("findings", []):
            print(
                f"  {view:6s} {one['severity']:7s} {one['rule']} {one['tensor']} from {one['onset']}: {one['message']}"
            )


def _list_alarms(verdicts: Sequence[Record], judged: dict[str, Record]) -> None:
    """Print, for each case, the rules that spoke in the whole run, and whether that is right."""
    for verdict in verdicts:
        record = judged.get(verdict["id"])
        if record is None or "whole" not in record:
            continue
        rules = sorted({f"{one['rule']}:{one['severity']}" for one in record["whole"]["findings"]})
        if verdict["label"] == "faulty":
            one = score.hit(verdict, record, "whole")
            mark = "right" if one.right else "other" if one.detected else "MISSED"
        else:
            mark = {"error": "FALSE", "warning": "warned"}.get(score.level_of(record, "whole"), "quiet")
        print(f"{mark:7s}{verdict['id']:60s} {' '.join(rules)}")


if __name__ == "__main__":
    sys.exit(main())
