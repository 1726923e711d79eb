"""`make bench`: measure, print the figures, and with --write keep them in benchmarks/RESULTS.md."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

import blocked  # noqa: E402
import checking  # noqa: E402
import kernel  # noqa: E402
import lifetime  # noqa: E402
import memory  # noqa: E402
import peer  # noqa: E402
import reading  # noqa: E402
import report  # noqa: E402
import saved_step  # noqa: E402
import scale  # noqa: E402
import startup  # noqa: E402
from s3_server import s3_server  # noqa: E402
from setting import Setting  # noqa: E402
from timing import Line  # noqa: E402


@dataclass(frozen=True)
class Measurement:
    """One measurement: its title, what makes it, and whether it needs the S3 server."""

    title: str
    measure: Callable[[Setting], list[Line]]
    needs_s3: bool = False


MEASUREMENTS = {
    "startup": Measurement("Start of the command line", startup.measure),
    "s3": Measurement("A saved step of 13 MB on S3", saved_step.on_s3, True),
    "folder": Measurement("A saved step of 13 MB in a folder", saved_step.in_folder),
    "blocked": Measurement("Time taken from the training", blocked.measure, True),
    "lifetime": Measurement("The first row, and the last ones", lifetime.measure, True),
    "memory": Measurement("Memory of the writer", memory.measure, True),
    "read-s3": Measurement("Reading from S3", reading.on_s3, True),
    "read-folder": Measurement("Reading from a folder", reading.in_folder),
    "kernel": Measurement("Statistics", kernel.measure),
    "check": Measurement("Checking a run", checking.measure, True),
    "scale": Measurement("Scale", scale.measure, True),
    "huge": Measurement("A tensor of 4 GB", scale.huge),
    "constant": Measurement("Late steps against early ones", scale.late_steps, True),
    "default": Measurement("The default configuration", scale.default_configuration, True),
    "peer": Measurement("Beside smdebug 1.0.34, in a folder", peer.measure),
}


def main(words: Sequence[str] | None = None) -> int:
    """Measure what was asked for. Returns 0 even where a goal is missed: figures are read, not obeyed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="NAME", action="append", choices=list(MEASUREMENTS), help="may be repeated")
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, the figures mean nothing")
    parser.add_argument("--size", metavar="FACTOR", type=float, default=1.0, help="of the large runs of scale")
    given = parser.parse_args(words)
    if given.write and (given.only or given.quick or given.size != 1.0):
        parser.error("--write keeps all figures of one full run: leave out --only, --quick and --size")
    if not given.size > 0:
        parser.error("--size must be above 0")
    names = given.only or list(MEASUREMENTS)
    start, where = time.perf_counter(), report.machine()
    sections: dict[str, list[Line]] = {}
    with contextlib.ExitStack() as stack:
        server = None
        if any(MEASUREMENTS[name].needs_s3 for name in names):
            server = stack.enter_context(s3_server())
            for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
                os.environ.pop(name, None)
            os.environ.update(server.environment())
        for name in names:
            chosen = MEASUREMENTS[name]
            print(f"{name} ...", file=sys.stderr, flush=True)
            sections[chosen.title] = chosen.measure(Setting(server, given.quick, given.size))
    text = report.page(sections, where)
    print(text)
    print(f"measured in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if given.write:
        (HERE / "RESULTS.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
