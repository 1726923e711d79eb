"""`smdbg demo`: write two small runs, a broken one and a healthy one, and look at both."""

from __future__ import annotations

import os
import shlex
import time

import click

from smdbg.cli import run
from smdbg.cli.exits import Exit
from smdbg.cli.options import shared
from smdbg.cli.output import data, talk
from smdbg.cli.root import Session

BROKEN, HEALTHY = 1e11, 1.0
ROOT = "runs"


@click.command("demo", short_help="Write a broken run and a healthy one, and look at both.")
@click.option("--scale", type=float, help="Write one run only, its inputs multiplied by this.")
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, help="Steps of each run.")
@click.option("--show/--no-show", default=True, help="Then run ls, inspect and check on what was written.")
@shared(formats=())
def command(session: Session, scale: float | None, steps: int, show: bool) -> Exit:
    """Write a broken run and a healthy one, and look at both.

    \b
    Examples:
      smdbg demo
      smdbg demo --run s3://bucket/demo
      smdbg demo --scale 1 --run runs/healthy --no-show

    The training fits two weights by linear regression, in NumPy. Its inputs are multiplied by the hyperparameter
    scale: with 1 it is healthy, with 100000000000 its loss explodes. Both runs go below ./runs, under new names, or
    below the folder that --run gives. With --scale, --run is the one run itself.

    With --no-show the URLs of the runs are printed, one a line, and nothing else.
    """
    from smdbg.cli.demo_training import train

    targets = _targets(session.run, scale)
    for url, factor in targets:
        train(url, factor, steps)
        talk(f"wrote {url} (scale {factor:.0f}, {steps} steps)", session.quiet)
    if not show:
        for url, _ in targets:
            data(url)
        return Exit.CLEAN
    statuses = [_show(words) for words in _commands(targets)]
    talk("\nNext: smdbg rules exploding_tensor, or any of these on a run of your own.", session.quiet)
    stopped = [status for status in statuses if status not in (Exit.CLEAN, Exit.VIOLATIONS)]
    return stopped[0] if stopped else Exit.CLEAN


def _targets(url: str | None, scale: float | None) -> list[tuple[str, float]]:
    """Return (URL, scale) of the runs to write; the broken one last, so that it is the newest."""
    if scale is not None:
        return [(url or f"{_fresh()}-scale-{scale:.12g}", scale)]
    start = f"{url.rstrip('/')}/" if url else f"{_fresh()}-"
    return [(f"{start}scale-{factor:.0f}", factor) for factor in (HEALTHY, BROKEN)]


def _fresh() -> str:
    """Return the start of the names of new runs under ./runs, by UTC time and not taken yet."""
    name = f"{ROOT}/demo-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    taken = os.listdir(ROOT) if os.path.isdir(ROOT) else []
    start, count = name, 1
    while any(os.path.join(ROOT, other).startswith(f"{start}-scale-") for other in taken):
        count += 1
        start = f"{name}.{count}"
    return start


def _commands(targets: list[tuple[str, float]]) -> list[list[str]]:
    """Return the command lines to show on the runs."""
    broken = targets[-1][0]
    lines = [["runs", os.path.dirname(broken)]] if len(targets) > 1 else []
    lines += [["--run", broken, "ls"], ["--run", broken, "inspect", "loss/loss:0"]]
    return [*lines, *(["--run", url, "check"] for url, _ in reversed(targets)), ["--run", broken, "blame"]]


def _show(words: list[str]) -> Exit:
    """Print a command line, what it prints, and its status."""
    data(f"\n$ smdbg {shlex.join(words)}")
    status = run([*words, "--format", "table"])
    if status is Exit.BROKEN_PIPE:
        raise BrokenPipeError
    if status is Exit.INTERRUPTED:
        raise KeyboardInterrupt
    data(f"exit status {int(status)}")
    return status
