"""An HTTP proxy that goes wrong on purpose, in front of a server that does not.

A client is told the proxy's address. Its requests go on untouched, the Host header that S3
signatures cover included, so the server behind finds them validly signed.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE")


class Fault(StrEnum):
    """What can go wrong with a request."""

    RESET = "reset"  # before or after the server has done it
    HANG = "hang"
    TOO_MANY = "429"
    INTERNAL = "500"
    SLOW_DOWN = "503"
    TRUNCATED = "truncated"  # Content-Length promises more than comes
    FORBIDDEN = "403"


ANSWERS = {
    Fault.TOO_MANY: (429, "TooManyRequests"),
    Fault.INTERNAL: (500, "InternalError"),
    Fault.SLOW_DOWN: (503, "SlowDown"),
    Fault.FORBIDDEN: (403, "AccessDenied"),
}

HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}

Rates = Mapping[str, Mapping[Fault, float]]


def every(*faults: Fault, rate: float, methods: tuple[str, ...] = METHODS) -> Rates:
    """The same rate, in all, of faults in equal parts for several methods."""
    return {method: {fault: rate / len(faults) for fault in faults} for method in methods}


class FaultyProxy:
    """The proxy: set `rates` at any time.

    Attributes:
        endpoint: Where clients go.
        rates: Method -> fault -> the share of requests it befalls.
        requests: Method -> requests received.
        injected: (method, fault) -> how often it was done.
        paths: Method and path of every request, in order.
    """

    def __init__(self, upstream: str, rates: Rates | None = None, seed: int = 0, hang_seconds: float = 4.0) -> None:
        self.upstream = urlsplit(upstream)
        self.rates: Rates = rates or {}
        self.hang_seconds = hang_seconds
        self.requests: Counter[str] = Counter()
        self.injected: Counter[tuple[str, Fault]] = Counter()
        self.paths: list[tuple[str, str]] = []
        self.stopped = threading.Event()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def choose(self, method: str, path: str) -> tuple[Fault | None, float]:
        """Count a request and draw its fault, if any, and a number for whatever else is left to chance."""
        with self._lock:
            self.requests[method] += 1
            self.paths.append((method, path))
            drawn, luck = self._random.random(), self._random.random()
        for fault, rate in self.rates.get(method, {}).items():
            drawn -= rate
            if drawn < 0:
                return fault, luck
        return None, luck

    def count(self, method: str, fault: Fault) -> None:
        """Note a fault that was done."""
        with self._lock:
            self.injected[method, fault] += 1

    def forget(self) -> None:
        """Start counting afresh."""
        with self._lock:
            self.requests.clear()
            self.injected.clear()
            self.paths.clear()

    @contextlib.contextmanager
    def running(self) -> Iterator[FaultyProxy]:
        """Serve until the end of the block."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.stopped.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: FaultyProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _handle(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault, luck = proxy.choose(self.command, self.path)
        if fault in ANSWERS:
            proxy.count(self.command, fault)
            self._refuse(*ANSWERS[fault])
        elif fault is Fault.HANG:
            proxy.count(self.command, fault)
            proxy.stopped.wait(proxy.hang_seconds)
            self.close_connection = True
        elif fault is Fault.RESET and luck < 0.5:
            proxy.count(self.command, fault)
            self._reset()
        else:
            self._forward(body, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _refuse(self, status: int, code: str) -> None:
        body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message></Error>'.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()

    def _forward(self, body: bytes, fault: Fault | None) -> None:
        proxy = self.server.proxy
        upstream = http.client.HTTPConnection(proxy.upstream.hostname or "", proxy.upstream.port, timeout=60)
        with contextlib.closing(upstream):
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "expect":  # we have answered it
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            content = answer.read()
        if fault is Fault.RESET:
            proxy.count(self.command, fault)
            self._reset()
            return
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        if length is not None and answer.status != 204:
            self.send_header("Content-Length", length)
        self.end_headers()
        if fault is Fault.TRUNCATED and content and self.command != "HEAD":
            proxy.count(self.command, fault)
            content = content[: len(content) // 2]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass
