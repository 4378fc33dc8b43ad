"""A web server of files held in memory, obliging or not."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class FileServer:
    """The server.

    Attributes:
        endpoint: Its URL.
        files: Path, with its leading slash and without a query -> content.
        ranges: Whether it honours Range headers.
        head: Whether it answers HEAD.
        lie: Added to every Content-Length.
        requests: (method, path with query) of every request, in order.
        sent: Bytes of content written to sockets.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges = True
        self.head = True
        self.lie = 0
        self.requests: list[tuple[str, str]] = []
        self.sent = 0
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[FileServer]:
        """Serve until the end of the block."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    owner: FileServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        owner = self.server.owner
        owner.requests.append((self.command, self.path))
        content = owner.files.get(urlsplit(self.path).path)
        status, extra = 200, {}
        if self.command == "HEAD" and not owner.head:
            status, content = 405, b""
        elif content is None:
            status, content = 404, b"no such file"
        elif owner.ranges and (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            if first >= len(content):
                status, extra, content = 416, {"Content-Range": f"bytes */{len(content)}"}, b""
            else:
                status, extra = 206, {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
                content = content[first : last + 1]
        self.send_response(status)
        for name, value in extra.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) + owner.lie))
        self.end_headers()
        if owner.lie:
            self.close_connection = True
        if self.command == "GET":
            for start in range(0, len(content), 1 << 16):
                owner.sent += self.wfile.write(content[start : start + (1 << 16)])

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass
