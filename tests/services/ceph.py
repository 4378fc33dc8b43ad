"""A real S3 server for tests: a one-node Ceph cluster with its object gateway, on loopback, in memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mgr", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")

CONFIG = """\
[global]
fsid = {fsid}
mon host = 127.0.0.1:{mon}
keyring = {root}/keyring
run dir = {root}
log file = {root}/$name.log
pid file = {root}/$name.pid
admin socket =
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth allow insecure global id reclaim = false
mon allow pool size one = true
mon warn on pool no redundancy = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 4294967296
osd class load list = *
osd class default list = *

[mon]
mon data = {root}/mon
mon data avail crit = 0
mon data avail warn = 0

[mgr]
mgr data = {root}/mgr
mgr initial modules =

[osd]
osd data = {root}/osd

[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:{gateway}
rgw thread pool size = 64
"""


def installed() -> bool:
    """Whether this machine has all of Ceph that it takes."""
    return all(shutil.which(program) for program in PROGRAMS)


@contextlib.contextmanager
def gateway(root: Path, key: str, secret: str) -> Iterator[str]:
    """Start a cluster with one S3 user in an empty folder, yield its endpoint, stop it.

    Raises:
        RuntimeError: It did not come up; the message holds the end of its logs.
    """
    ports = _free_ports(2)
    config = root / "ceph.conf"
    config.write_text(CONFIG.format(fsid=uuid.uuid4(), root=root, mon=ports[0], gateway=ports[1]))
    started: list[str] = []
    try:
        _make_keys_and_monitor(root, config, ports[0])
        for program, name in (("ceph-mon", "mon.a"), ("ceph-mgr", "mgr.x"), ("ceph-osd", "osd.0")):
            if name == "osd.0":
                _make_store(config)
            started.append(name)
            _run(program, "-c", config, "-i", name.partition(".")[2])
        started.append("client.rgw.a")
        _run("radosgw", "-c", config, "-n", "client.rgw.a")
        _wait_for(ports[1], root)
        user = ("--uid", "tester", "--display-name", "Tester", "--access-key", key, "--secret-key", secret)
        _run("radosgw-admin", "-c", config, "user", "create", *user)
        yield f"http://127.0.0.1:{ports[1]}"
    finally:
        for name in reversed(started):
            _stop(root / f"{name}.pid")


def _make_keys_and_monitor(root: Path, config: Path, port: int) -> None:
    keyring, monmap = root / "keyring", root / "monmap"
    everything = ("--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *")
    caps = {
        "mon.": ("--cap", "mon", "allow *"),
        "client.admin": (*everything, "--cap", "mds", "allow *"),
        "mgr.x": everything,
        "osd.0": everything,
        "client.rgw.a": everything,
    }
    _run("ceph-authtool", "--create-keyring", keyring)
    for name, allowed in caps.items():
        _run("ceph-authtool", keyring, "--gen-key", "-n", name, *allowed)
    fsid = next(line.split()[-1] for line in config.read_text().splitlines() if line.startswith("fsid"))
    _run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{port}]", monmap)
    for folder in ("mon", "mgr", "osd"):
        (root / folder).mkdir()
    _run("ceph-mon", "-c", config, "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)


def _make_store(config: Path) -> None:
    """Needs the monitor, which it asks for the cluster's map."""
    osd = str(uuid.uuid4())
    _run("ceph", "-c", config, "osd", "new", osd)
    _run("ceph-osd", "-c", config, "-i", "0", "--mkfs", "--osd-uuid", osd)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _run(*command: str | Path, seconds: float = 120) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=seconds)
    if done.returncode:
        raise RuntimeError(f"{_shown(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def _shown(command: Sequence[str | Path]) -> str:
    return " ".join(str(part) for part in command[:6])


def _wait_for(port: int, root: Path, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    logs = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1000:]}" for log in sorted(root.glob("*.log")))
    raise RuntimeError(f"the object gateway did not answer within {seconds:g} s\n{logs}")


def _stop(pid_file: Path) -> None:
    # its store is memory: there is nothing to save, and asking politely takes seconds
    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
