"""Where and how large: what every measurement is given."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from s3_server import S3Server
from workload import Step, step

MEMORY = Path("/dev/shm")
ENOUGH = 3 << 30


@dataclass(frozen=True)
class Setting:
    """`server`: the S3 server, None where nobody asked for it. `quick`: tiny sizes, only to see that it runs.

    `size`: factor of what is large in the measurements of scale.
    """

    server: S3Server | None
    quick: bool = False
    size: float = 1.0

    def sized(self, number: int, quick: int = 3) -> int:
        """Return a large number as it is to be: `quick`, or times the factor."""
        return quick if self.quick else max(1, round(number * self.size))

    def rounds(self, number: int) -> int:
        """Return how many rounds to measure, given how many it takes for a steady median."""
        return 1 if self.quick else number

    def step(self) -> Step:
        """Return the step to save: 13 MB."""
        return step(3, 8, 4) if self.quick else step()

    def s3(self) -> S3Server:
        """Return the server. Raises RuntimeError without one."""
        if self.server is None:
            raise RuntimeError("this measurement needs the S3 server")
        return self.server

    def s3_url(self) -> str:
        """Return a URL in the server's bucket that nothing else uses."""
        return f"s3://{self.s3().bucket}/{uuid.uuid4().hex[:12]}"


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Make an empty folder, in memory where there is room, so that no disk is measured; removed at the end."""
    in_memory = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ENOUGH
    made = Path(tempfile.mkdtemp(prefix="smdbg-bench-", dir=MEMORY if in_memory else None))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)
