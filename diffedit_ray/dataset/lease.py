"""A lease on an output: one run at a time writes to it, on any store, without locks or a server."""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import random
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from diffedit_ray.dataset import storage
from diffedit_ray.dataset.records import OutputLayout
from diffedit_ray.errors import DiffEditError, ErrorCode, MissingError, OutputError, RowError

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
"""How long a claim stands unless it is renewed: what a run waits at most for one whose machine has died."""
RENEWALS = 4
"""Renewals a lease's length."""
CLAIM_TRIES = 12
MAX_CLAIM_BYTES = 100_000


@dataclass(frozen=True)
class Claim:
    """One run's file among the leases.

    Attributes:
        run: Names the run.
        host, pid, user, started_at: Who to ask.
        held: Whether the run has the output; until then it is only asking for it.
        boot, namespace, process_started: What tells, on the same machine, whether the process still lives.
    """

    run: str
    host: str = "an unknown host"
    pid: int = 0
    user: str = "somebody"
    started_at: str = "an unknown time"
    held: bool = True
    boot: str | None = None
    namespace: str | None = None
    process_started: int | None = None

    @classmethod
    def of_this_process(cls, run: str) -> Claim:
        """A claim that is not held yet."""
        boot, namespace = _machine()
        return cls(
            run,
            socket.gethostname(),
            os.getpid(),
            _user(),
            datetime.now(UTC).isoformat(timespec="seconds"),
            held=False,
            boot=boot,
            namespace=namespace,
            process_started=_process(os.getpid()),
        )

    @property
    def here(self) -> bool:
        """Whether this process can see the claim's: the same boot of the same kernel, and the same process ids."""
        return self.boot is not None and self.process_started is not None and (self.boot, self.namespace) == _machine()

    @property
    def died(self) -> bool:
        """Whether the process is known to be gone; False also where that cannot be known."""
        if not self.here:
            return False
        started = _process(self.pid)
        return not _exists(self.pid) if started is None else started != self.process_started

    def __str__(self) -> str:
        return f"{self.user} on {self.host} (process {self.pid}), since {self.started_at}"


class Lease:
    """The right to write to an output, as a context manager.

    A claim is a file of its own; whoever has written one and then, listing them, finds no other that is alive
    has the output: of two runs that do so, the later to list sees the other's. Whether a claim is alive is told
    by its age on the store's own clock at the time of our own claim, so that no two machines' clocks are compared.
    A daemon thread renews the claim; a run that dies stops renewing it.

    Attributes:
        run: Names this run.
        lost: Whether another run has taken the output over meanwhile, as when this one slept for too long.

    Raises:
        OutputError: On entering: another run has the output. Says which, and when it will be free.
    """

    def __init__(self, output: str, *, seconds: float = LEASE_SECONDS) -> None:
        self.output = storage.absolute(output)
        self.seconds = seconds
        self.run = secrets.token_hex(8)
        self.lost = False
        self._uri = _claim_uri(self.output, self.run)
        self._ended = threading.Event()
        self._writing = threading.Lock()
        self._renewed = 0.0
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)
        self._claim = Claim.of_this_process(self.run)

    def __enter__(self) -> Lease:
        try:
            self._acquire()
        except BaseException as error:
            with contextlib.suppress(Exception):
                storage.remove(self._uri)
            if isinstance(error, Exception) and not isinstance(error, DiffEditError):
                raise OutputError(f"{self.output} cannot be claimed: {type(error).__name__}: {error}") from error
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._writing:
            self._ended.set()
            try:
                storage.remove(self._uri)
            except Exception as trouble:  # the run's own outcome matters more, and the claim expires
                logger.warning("the lease on %s could not be given back: %s", self.output, trouble)

    def _acquire(self) -> None:
        rivals: list[_Rival] = []
        for attempt in range(CLAIM_TRIES):
            began = time.monotonic()
            self._write(held=False)
            others = _others(self.output, self.run)
            now = storage.modified(self._uri)
            dead = [other for other in others if other.claim.died or now - other.modified >= self.seconds]
            rivals = [other for other in others if other not in dead]
            if not rivals:
                self._write(held=True)
                # had it taken longer, somebody may have found this claim expired in between
                if time.monotonic() - began < self.seconds / 2:
                    for other in dead:
                        storage.remove(_claim_uri(self.output, other.claim.run))
                    return
            storage.remove(self._uri)
            for other in rivals:
                if other.claim.held:
                    left = max(0.0, self.seconds - (now - other.modified))
                    raise OutputError(
                        f"{self.output} is in use by another run: {other.claim}. Wait until it has ended; "
                        f"should it have died, the output is free {left:.0f} s from now"
                    )
            # two that ask at the same time both step back, and come again at different times
            time.sleep(random.uniform(0.02, 0.1) * (attempt + 1))
        who = f": {rivals[0].claim}" if rivals else ""
        raise OutputError(f"{self.output} is being asked for by several runs at once{who}. Try again in a minute")

    def _write(self, *, held: bool) -> None:
        claim = {**asdict(self._claim), "held": held}
        asked = time.time()
        storage.write_bytes(self._uri, (json.dumps(claim, indent=2) + "\n").encode())
        self._renewed = asked

    def _keep_renewing(self) -> None:
        while not self._ended.wait(self.seconds / RENEWALS) and not self.lost:
            with self._writing:
                if not self._ended.is_set():
                    try:
                        self._renew()
                    except Exception as error:  # the store may be back at the next renewal
                        logger.warning("the lease on %s could not be renewed: %s", self.output, error)

    def _renew(self) -> None:
        overslept = time.time() - self._renewed > 0.9 * self.seconds
        try:
            storage.modified(self._uri)
        except MissingError:
            self._lose()
            return
        self._write(held=True)
        # whoever found the claim expired may have removed it between the look and the writing
        if overslept and any(other.claim.held and not other.claim.died for other in _others(self.output, self.run)):
            storage.remove(self._uri)
            self._lose()

    def _lose(self) -> None:
        logger.warning("another run has taken %s over: this one had not renewed its lease in time", self.output)
        self.lost = True


def current_claim(output: str, *, seconds: float = LEASE_SECONDS) -> Claim | None:
    """The claim of the run that has an output, if one has.

    Only reading, this has no store's time to compare with: for a run on another machine it trusts this one's clock.
    """
    for other in _others(storage.absolute(output), ""):
        fresh = time.time() - other.modified < seconds
        if other.claim.held and not other.claim.died and (fresh or other.claim.here):
            return other.claim
    return None


@dataclass(frozen=True)
class _Rival:
    """Another run's claim and when it was last renewed, in seconds on the store's clock."""

    claim: Claim
    modified: float


def _claim_uri(output: str, run: str) -> str:
    return storage.join(OutputLayout(output).leases, f"{run}.json")


def _others(output: str, own: str) -> list[_Rival]:
    found = []
    for uri in storage.list_files(OutputLayout(output).leases, ".json"):
        run = uri.rsplit("/", 1)[-1].removesuffix(".json")
        if run == own:
            continue
        try:
            modified = storage.modified(uri)
            claim = Claim(**json.loads(storage.read_bytes(uri, max_bytes=MAX_CLAIM_BYTES)))
        except MissingError:  # withdrawn since the listing
            continue
        except RowError as error:
            if error.code is ErrorCode.NOT_FOUND:
                continue
            claim = Claim(run)
        except (TypeError, ValueError):  # of another release of this package: its age still counts
            claim = Claim(run)
        found.append(_Rival(claim, modified))
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())


def _machine() -> tuple[str | None, str | None]:
    """The boot of this kernel and the namespace of its process ids: host names repeat, these do not."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return None, None


def _process(pid: int) -> int | None:
    """When a process started, in ticks since boot; 0 for the remains of one, None if it cannot be seen."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])


def _exists(pid: int) -> bool:
    """Whether there is such a process, also where /proc hides those of other users."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
