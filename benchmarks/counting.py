"""What the S3 server was asked, by its own metrics."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field

from s3_server import S3Server
from timing import Action, Cost

COUNTED_SECONDS = 0.1  # the server counts a request a moment after it has answered
_BYTES = re.compile(r"^SeaweedFS_s3_bucket_traffic_(received|sent)_bytes_total\{[^}]*\} (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Traffic:
    """Requests by type, failed ones too (a HEAD counts as GET), and bytes that the server received and sent."""

    requests: Mapping[str, int] = field(default_factory=dict)
    received: int = 0
    sent: int = 0

    def __sub__(self, before: Traffic) -> Traffic:
        """Return what came after `before`."""
        kinds = {kind: count - before.requests.get(kind, 0) for kind, count in self.requests.items()}
        return Traffic(kinds, self.received - before.received, self.sent - before.sent)

    def __add__(self, other: Traffic) -> Traffic:
        """Return both together."""
        kinds = dict(self.requests)
        for kind, count in other.requests.items():
            kinds[kind] = kinds.get(kind, 0) + count
        return Traffic(kinds, self.received + other.received, self.sent + other.sent)

    @property
    def total(self) -> int:
        """All requests."""
        return sum(self.requests.values())

    def text(self, per: int = 1) -> str:
        """Return the requests, divided by `per`, such as '3.2 PUT, 0 GET, 0 LIST'."""
        kinds = {"PUT": 0, "GET": 0, "LIST": 0, **self.requests}
        shown = {kind: count / per for kind, count in kinds.items()}
        return ", ".join(f"{n:,.0f} {kind}" if n == int(n) else f"{n:.3g} {kind}" for kind, n in shown.items())


def traffic(server: S3Server | None) -> Traffic:
    """Return all that the server counted so far; nothing without a server."""
    if server is None:
        return Traffic()
    time.sleep(COUNTED_SECONDS)
    requests: dict[str, int] = {}
    for (_, kind), count in server.request_counts().items():
        requests[kind] = requests.get(kind, 0) + count
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.metrics_url, timeout=10) as answer:
        page = answer.read().decode()
    nbytes = {"received": 0, "sent": 0}
    for found in _BYTES.finditer(page):
        nbytes[found[1]] += int(float(found[2]))
    return Traffic(requests, **nbytes)


@dataclass
class Requests:
    """What the server was asked while something was done `times` times over, again and again."""

    server: S3Server | None
    times: int = 0
    found: Traffic = field(default_factory=Traffic)

    def during(self, times: int, action: Action) -> Cost:
        """Do `action`, counting the requests in the meantime."""
        before = traffic(self.server)
        cost = action()
        self.found += traffic(self.server) - before
        self.times += times
        return cost

    def text(self, what: str = "a step") -> str:
        """Return the requests each time, such as '3.2 PUT, 0 GET, 0 LIST a step ...', or nothing without a server."""
        if self.server is None or not self.times:
            return ""
        return f"{self.found.text(self.times)} {what}, by the server's own count"
