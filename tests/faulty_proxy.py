"""A proxy between an S3 client and a server, which does to requests what networks and stores do to them.

The client's endpoint is the proxy; heads of requests are passed on byte for byte, so the Host header that the client
signed is the one that the server checks. Every connection has a thread of its own. `fault` says what happens to the
requests that come from then on; None passes them on.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

FAULTS = (
    "reset_request",  # the connection is reset after half of the request's body
    "reset_answer",  # the request is executed, the connection reset after half of the answer
    "lost_answer",  # the request is executed, nothing of the answer arrives
    "error_500",
    "slow_down",  # 503, please come more slowly
    "expired",  # 403, the credentials were good once
    "quota",  # 403, the bucket's quota is used up, as Ceph says it
    "full",  # 507, no space left, as MinIO says it
    "hang",  # the request is read and never answered
    "stall",  # the request's body is no longer read
    "slow",  # RATE bytes a second in each direction, over all connections
    "refused",  # nobody listens any more, and open connections are reset
)
LATE = "late"  # the request is executed LATE_SECONDS after it came, when the client may have given it up
LATE_SECONDS = 2.5
RATE = 1_000_000
_ANSWERS = {
    "error_500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "expired": (403, "ExpiredToken", "The provided token has expired."),
    "quota": (403, "QuotaExceeded", "The bucket's quota is used up."),
    "full": (507, "XMinioStorageFull", "Storage backend has reached its minimum free drive threshold."),
}
_BLOCK = 65536


class _Reset(Exception):
    """The connection is to be reset."""


@dataclass(frozen=True)
class Request:
    """A request that came in: of whom, and whether it is to create an object only if there is none."""

    method: str
    path: str
    access_key: str
    create: bool


Affects = Callable[[Request], bool]


def every(request: Request) -> bool:
    return True


class FaultyProxy:
    """Use as a context manager. `affects(request)` may spare some requests of a fault; `left` is how many more the
    fault is done to, None without end; `seen` are all requests, each with the fault that was done to it or ''."""

    def __init__(self, host: str, port: int) -> None:
        self.fault: str | None = None
        self.affects: Affects = every
        self.left: int | None = None
        self.seen: list[tuple[Request, str]] = []
        self._server = (host, port)
        self._lock = threading.Lock()
        self._clients: set[socket.socket] = set()
        self._ended = threading.Event()
        self._listener: socket.socket | None = None
        self._accepting: threading.Thread | None = None
        self._free_at = [0.0, 0.0]  # when the slow line is free again: up, down
        self.port = 0
        self._listen()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *why: object) -> None:
        self._ended.set()
        self._stop_listening()
        self._reset_all()

    def set(self, fault: str | None, affects: Affects = every, times: int | None = None) -> None:
        """Begin a fault, or with None end it. Requests that hang are reset when their fault ends."""
        assert fault is None or fault in (*FAULTS, LATE), fault
        hung = self.fault in ("hang", "stall") and fault != self.fault
        with self._lock:
            self.fault, self.affects, self.left = fault, affects, times
        if fault == "refused":
            self._stop_listening()
        elif self._listener is None:
            self._listen()
        if fault == "refused" or hung:
            self._reset_all()

    def count(self, fault: str) -> int:
        """Return to how many requests a fault was done so far."""
        return sum(1 for _, done in list(self.seen) if done == fault)

    # --- connections ---

    def _listen(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(128)
        listener.settimeout(0.2)
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._accepting = threading.Thread(target=self._accept, args=(listener,), daemon=True)
        self._accepting.start()

    def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            # A thread that waits in accept() would keep the port open, and take one more connection.
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            assert self._accepting is not None
            self._accepting.join()
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while self._listener is listener:
            try:
                client, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            client.settimeout(None)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._clients.add(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _reset_all(self) -> None:
        with self._lock:
            clients, self._clients = self._clients, set()
        for client in clients:
            with contextlib.suppress(OSError):
                _reset_on_close(client)
                client.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it

    def _serve(self, client: socket.socket) -> None:
        reset = False
        with contextlib.ExitStack() as stack:
            try:
                incoming = stack.enter_context(client.makefile("rb"))
                server = _Upstream(self._server)
                stack.callback(server.close)
                while self._one_request(client, incoming, server):
                    pass
            except (_Reset, OSError, ValueError):
                reset = True
        with self._lock:
            self._clients.discard(client)
        with contextlib.suppress(OSError):
            if reset:
                _reset_on_close(client)
            client.close()

    def _fault_of(self, request: Request) -> str:
        with self._lock:
            fault = self.fault
            if fault is None or self.left == 0 or not self.affects(request):
                fault = None
            elif self.left is not None:
                self.left -= 1
            self.seen.append((request, fault or ""))
        return fault or ""

    # --- one request ---

    def _one_request(self, client: socket.socket, incoming: BinaryIO, server: _Upstream) -> bool:
        head = _read_head(incoming)
        if not head:
            return False
        method, path = (part.decode("latin-1") for part in head.split(b" ", 2)[:2])
        facts = _headers(head)
        if "transfer-encoding" in facts:
            raise ValueError("requests of unknown length are not passed on")
        length = int(facts.get("content-length", 0))
        if facts.get("expect", "").lower() == "100-continue":
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        key = facts.get("authorization", "").partition("Credential=")[2].partition("/")[0]
        fault = self._fault_of(Request(method, path, key, "if-none-match" in facts and method == "PUT"))
        if fault == "refused":
            raise _Reset
        if fault == "stall":
            while not self._ended.wait(0.05) and self.fault == "stall":
                pass
            raise _Reset
        if fault in _ANSWERS or fault == "hang":
            self._copy(incoming, length, None, 0)
            if fault == "hang":
                while not self._ended.wait(0.05) and self.fault == "hang":
                    pass
                raise _Reset
            client.sendall(_error_answer(*_ANSWERS[fault], head_only=method == "HEAD"))
            return True
        if fault == LATE:
            body = incoming.read(length)
            time.sleep(LATE_SECONDS)
            server.connection().sendall(head + body)
            self._answer(server, method, None)
            raise _Reset
        outgoing = server.connection()
        outgoing.sendall(head)
        if fault == "reset_request":
            self._copy(incoming, length // 2, outgoing, 0)
            raise _Reset
        self._copy(incoming, length, outgoing, 0)
        if fault == "lost_answer":
            self._answer(server, method, None)
            raise _Reset
        return self._answer(server, method, client, half=fault == "reset_answer")

    def _answer(self, server: _Upstream, method: str, client: socket.socket | None, half: bool = False) -> bool:
        head = _read_head(server.file)
        while head.split(b" ", 2)[1:2] == [b"100"]:
            head = _read_head(server.file)
        if not head:
            raise _Reset
        facts, status = _headers(head), int(head.split(b" ", 2)[1])
        chunked = "chunked" in facts.get("transfer-encoding", "")
        length = 0 if method == "HEAD" or status in (204, 304) else int(facts.get("content-length", 0))
        if half and not length:
            if client is not None and len(head) > 1:
                client.sendall(head[: len(head) // 2])
            raise _Reset
        if client is not None:
            client.sendall(head)
        if chunked and method != "HEAD":
            self._copy_chunked(server.file, client)
        else:
            self._copy(server.file, length // 2 if half else length, client, 1)
        if half:
            raise _Reset
        if facts.get("connection", "").lower() == "close":
            server.close()
        return True

    def _copy(self, source: BinaryIO, length: int, target: socket.socket | None, way: int) -> None:
        while length:
            block = source.read1(min(length, _BLOCK))  # type: ignore[attr-defined]
            if not block:
                raise _Reset
            self._take_time(len(block), way)
            if target is not None:
                target.sendall(block)
            length -= len(block)

    def _copy_chunked(self, source: BinaryIO, target: socket.socket | None) -> None:
        while True:
            line = source.readline()
            size = int(line.split(b";")[0], 16)
            block = line + source.read(size + 2)
            self._take_time(len(block), 1)
            if target is not None:
                target.sendall(block)
            if not size:
                return

    def _take_time(self, size: int, way: int) -> None:
        if self.fault == "slow":
            with self._lock:
                now = time.monotonic()
                self._free_at[way] = max(now, self._free_at[way]) + size / RATE
                pause = self._free_at[way] - now
            time.sleep(pause)


class _Upstream:
    """The connection to the server that belongs to one connection of a client, opened when it is needed."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._socket: socket.socket | None = None

    def connection(self) -> socket.socket:
        if self._socket is None:
            self._socket = socket.create_connection(self._address, timeout=60)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.file = self._socket.makefile("rb")
        return self._socket

    def close(self) -> None:
        if self._socket is not None:
            self.file.close()
            self._socket.close()
            self._socket = None


def _reset_on_close(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _read_head(source: BinaryIO) -> bytes:
    lines = []
    while line := source.readline():
        lines.append(line)
        if line == b"\r\n":
            return b"".join(lines)
    return b""


def _headers(head: bytes) -> dict[str, str]:
    pairs = (line.split(":", 1) for line in head.decode("latin-1").split("\r\n")[1:] if ":" in line)
    return {name.strip().lower(): value.strip() for name, value in pairs}


def _error_answer(status: int, code: str, text: str, head_only: bool) -> bytes:
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{text}</Message>'
        "<RequestId>1</RequestId></Error>"
    ).encode()
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    return head if head_only else head + body
