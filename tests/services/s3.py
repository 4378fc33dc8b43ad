"""The S3 server of the tests: Ceph's object gateway where it is installed, else moto's, else a skip."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import s3fs

from tests.services import ceph


@dataclass(frozen=True)
class S3Server:
    """Where a server answers and who may use it.

    Attributes:
        endpoint: Its URL.
        key, secret: Of the one user, who owns everything.
        kind: Ceph checks signatures and permissions as S3 does; moto does not.
    """

    endpoint: str
    key: str
    secret: str = field(repr=False)
    kind: Literal["ceph", "moto"]

    @property
    def options(self) -> dict[str, Any]:
        """Storage options that reach it; short timeouts, so that a fault that hangs costs a test little."""
        timeouts = {"connect_timeout": 2, "read_timeout": 2}
        return {"endpoint_url": self.endpoint, "key": self.key, "secret": self.secret, "config_kwargs": timeouts}

    def at(self, endpoint: str) -> S3Server:
        """The same server by way of another endpoint: a proxy's."""
        return replace(self, endpoint=endpoint)

    def filesystem(self) -> s3fs.S3FileSystem:
        """A plain s3fs of our own to look at it with, past the code under test; it remembers no listing."""
        return s3fs.S3FileSystem(endpoint_url=self.endpoint, key=self.key, secret=self.secret, use_listings_cache=False)

    def make_bucket(self) -> str:
        """A new, empty bucket's name; it dies with the server."""
        name = f"test-{secrets.token_hex(6)}"  # shorter than three characters is refused
        self.filesystem().mkdir(name)
        return name


@contextlib.contextmanager
def s3_server(root: Path) -> Iterator[S3Server]:
    """Start one in an empty folder; stop it afterwards."""
    key, secret = f"AK{secrets.token_hex(8).upper()}", secrets.token_urlsafe(24)
    if ceph.installed() or os.environ.get("DIFFEDIT_REQUIRE_SERVICES") == "1":
        with ceph.gateway(root, key, secret) as endpoint:
            yield S3Server(endpoint, key, secret, "ceph")
        return
    moto = pytest.importorskip("moto.server", reason="needs Ceph's radosgw, or moto[server]")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Server(f"http://{host}:{port}", key, secret, "moto")
    finally:
        server.stop()
