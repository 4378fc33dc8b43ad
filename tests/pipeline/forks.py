"""Drivers and Ray workers forked from one process that has imported everything, so that killing many is cheap.

A run spends ten seconds of a core on importing Ray, torch and diffusers, and two on a dozen tiny rows. What is
forked is the program's own `main` and Ray's own default_worker.py; only their imports have been done before.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

SOCKET = "DIFFEDIT_TEST_FORKS"
"""The environment variable that tells where the server listens."""
SETUP_WORKER = Path(__file__).with_name("forked_worker.py")
"""For a Ray node's `setup_worker_path`."""
IMPORTED = (
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "transformers.models.clip",
    "pandas",
    "diffedit_ray.cli",
    "diffedit_ray.diffusion.editor",
    "diffedit_ray.pipeline.job",
    "diffedit_ray.pipeline.progress",
)
"""All but Ray itself, whose workers learn from their environment, on importing it, which job they are for."""


class Driver:
    """`diffedit-ray edit`, forked."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.log = log
        self.code: int | None = None
        """Its exit code; none while it runs, and if it was killed."""
        self.ended = False
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(os.environ[SOCKET])
        wanted = {"kind": "driver", "arguments": list(arguments), "environment": dict(os.environ), "log": str(log)}
        self._server.sendall(json.dumps(wanted).encode() + b"\n")
        self.pid = int(self._server.recv(100))

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within so long."""
        self._server.settimeout(seconds)
        try:
            while not self.ended:
                said = self._server.recv(100)
                self.ended = not said
                self.code = int(said) if said else self.code
        except TimeoutError:
            pass
        return self.ended

    def kill(self) -> bool:
        """SIGKILL; whether that came before its own end."""
        if not self.wait(0.001):
            os.kill(self.pid, signal.SIGKILL)
            assert self.wait(30)
        return self.code is None


@contextmanager
def fork_server(folder: Path) -> Iterator[None]:
    """Serve forks for as long as the block lasts; `SOCKET` is for the caller to put into the environment."""
    command = [sys.executable, "-m", "tests.pipeline.forks"]
    with (folder / "forks.log").open("wb") as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n", (folder / "forks.log").read_text()
    try:
        yield
    finally:
        server.kill()
        server.wait()


def _serve(path: str) -> NoReturn:
    for name in IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(100)
        print("ready", flush=True)
        while True:
            caller, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                code = 1
                try:
                    code = _become(caller)
                except SystemExit as leaving:
                    code = leaving.code if isinstance(leaving.code, int) else 1
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    caller.sendall(f"{code}\n".encode())
                    os._exit(code)
            caller.close()


def _become(caller: socket.socket) -> int:
    wanted: dict[str, Any] = json.loads(caller.makefile("rb").readline())
    os.environ.clear()
    os.environ.update(wanted["environment"])
    if wanted["kind"] == "worker":
        threading.Thread(target=_end_with, args=(caller,), daemon=True).start()
        _work(wanted["arguments"])
        return 0
    os.setsid()
    with Path(wanted["log"]).open("wb") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    caller.sendall(b"%d\n" % os.getpid())
    return importlib.import_module("diffedit_ray.cli").main(["edit", *wanted["arguments"]])


def _work(arguments: list[str]) -> None:
    setup = importlib.import_module("ray._private.workers.setup_worker")
    own, rest = setup.parser.parse_known_args(arguments)
    os.environ.update(setup.RuntimeEnvContext.deserialize(own.serialized_runtime_env_context or "{}").env_vars)
    sys.argv = rest
    runpy.run_path(rest[0], run_name="__main__")


def _end_with(caller: socket.socket) -> None:
    """A raylet that wants its worker gone kills what it has started, which is the one that called."""
    caller.recv(1)
    os._exit(1)


if __name__ == "__main__":
    _serve(os.environ[SOCKET])
