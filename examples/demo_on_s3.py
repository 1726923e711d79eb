"""`make demo`: real trainings written to a real S3 server on this machine, then listed, inspected and checked.

The server (SeaweedFS) is started for the demo and stopped at its end; its data are thrown away. The trainings are the
two-dimensional linear regression of `smdbg demo` and a classifier on scikit-learn's digits, each healthy and broken.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import digits
from s3_server import s3_server

from smdbg.cli.demo_training import train as regression

BROKEN, HEALTHY = 1e11, 1.0
EXPECTED = {"healthy": 0, "broken": 1}


def say(text: str = "") -> None:
    """Print at once, so that the lines of this process and of smdbg come in order."""
    print(text, flush=True)


def smdbg(*words: str) -> int:
    """Run the installed program as a user would, and show command, output and status."""
    say(f"\n$ smdbg {shlex.join(words)}")
    status = subprocess.call([sys.executable, "-m", "smdbg", *words, "--format", "table"])
    say(f"exit status {status}")
    return status


def main() -> int:
    """Write four runs, look at them, and return 0 if each check ended as it should."""
    say("Starting an S3 server ...")
    with s3_server() as server:
        os.environ.update(server.environment())
        root = f"s3://{server.bucket}/runs"
        say(f"Training and writing to {root} at {server.endpoint} ...")
        regression(f"{root}/regression-healthy", HEALTHY, 200)
        regression(f"{root}/regression-broken", BROKEN, 200)
        digits.train(f"{root}/digits-healthy")
        digits.train(f"{root}/digits-broken", "overflow")

        broken = f"{root}/regression-broken"
        smdbg("runs", root)
        smdbg("--run", broken, "ls")
        smdbg("--run", broken, "inspect", "loss/loss:0")
        wrong = 0
        for name in ("digits-healthy", "digits-broken", "regression-healthy", "regression-broken"):
            status = smdbg("--run", f"{root}/{name}", "check")
            wrong += status != EXPECTED[name.rsplit("-", 1)[1]]
        return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
