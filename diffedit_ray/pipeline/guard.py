"""Finds the row that kills or hangs the process working on it, and leaves it out.

Ray runs a task again for as long as its process dies, and does not know which row did it. So
each stage tells the `Ledger`, which lives in a process of its own, what it begins and what it
ends: what was begun and never ended has killed. A batch that did so is run again row by row, and
a row that does so alone, as often as the run's settings allow, becomes a failed record.
"""

from __future__ import annotations

import faulthandler
import hashlib
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffedit_ray.errors import ErrorCode, RowError

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0
"""How long a stage waits for the ledger before it goes on without one."""
TOLD_SECONDS = 5.0
"""How long a run that ends waits for what is nice to know."""
GRACE_SECONDS = 5.0
"""How much later the watchdog bites that needs nothing of Python, not even its lock."""

ROW_HOOK = "DIFFEDIT_ROW_HOOK"
"""An environment variable, for tests: module:function, called with the stage and the row before a row is worked on."""


@dataclass
class Trial:
    """What is known of one piece of work.

    Attributes:
        deaths: How often it was begun and neither ended nor is being worked on.
        hung: Whether the last of them was a hang.
    """

    deaths: int = 0
    hung: bool = False


@dataclass(frozen=True)
class Replica:
    """How a model replica runs, for the run's summary.

    Attributes:
        node: The machine's name.
        device: Where the model is.
        dtype: Its precision.
        unet_batch: Latents its UNet sees at once.
        rates: Batch size -> latents a second, of the sizes it has tried; empty where it was told.
    """

    node: str
    device: str
    dtype: str
    unet_batch: int
    rates: Mapping[int, float]


class Ledger:
    """Who works in a run, and what every stage has begun and not ended; one Ray actor a run."""

    def __init__(self) -> None:
        self._open: dict[str, Trial] = {}
        self._replicas: list[Replica] = []

    def introduce(self, replica: Replica) -> None:
        """Note that a replica has started."""
        self._replicas.append(replica)

    def replicas(self) -> list[Replica]:
        """Every replica that has started, those that ended included."""
        return list(self._replicas)

    def look(self, key: str) -> Trial:
        """What is known of work that is about to begin."""
        return self._open.get(key, Trial())

    def begin(self, key: str) -> Trial:
        """Note that work begins; returns what became of it the times before."""
        trial = self._open.setdefault(key, Trial())
        before = Trial(trial.deaths, trial.hung)
        trial.deaths, trial.hung = trial.deaths + 1, False  # taken back by `end`, if it comes to that
        return before

    def end(self, key: str) -> None:
        """Note that work ended well."""
        if key in self._open:
            self._open[key].deaths -= 1

    def hang(self, key: str) -> None:
        """Note that the process working on it is about to end itself because the time is up."""
        if key in self._open:
            self._open[key].hung = True

    def forget(self, keys: Sequence[str]) -> None:
        """Drop what no longer matters: a batch is through, its rows with it."""
        for key in keys:
            self._open.pop(key, None)

    def open(self) -> dict[str, Trial]:
        """All that is begun and not forgotten, for whoever wants to look."""
        return dict(self._open)


def start_ledger() -> Any:
    """A ledger for one run, as a Ray actor that outlives the processes it keeps book of."""
    import ray

    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)(Ledger).remote()


def known_replicas(ledger: Any) -> list[Replica]:
    """The replicas that have introduced themselves to a run's ledger; none without one that answers."""
    import ray

    if ledger is None:
        return []
    try:
        found: list[Replica] = ray.get(ledger.replicas.remote(), timeout=TOLD_SECONDS)
    except ray.exceptions.RayError as error:
        logger.warning("the replicas of this run are not known: %s", error)
        return []
    return found


@dataclass(frozen=True)
class Guard:
    """Does a stage's work on rows so that no row can take its neighbours, or the run, with it.

    Attributes:
        stage: Which stage.
        ledger: The run's, or none: work is then done unguarded.
        seconds: How long one row may take; a batch may take that for each of its rows.
        tries: Times a row may kill or hang the process that works on it alone.
        fail: Makes a failed record of a row.
    """

    stage: str
    ledger: Any
    seconds: float
    tries: int
    fail: Callable[[dict[str, Any], RowError], None]

    def run(self, rows: Sequence[dict[str, Any]], work: Callable[[list[dict[str, Any]]], None]) -> None:
        """Do `work`, which changes rows in place, on all of `rows`: at once, or alone if that has killed before."""
        if not rows:
            return
        if self.ledger is None:
            work(_hooked(self.stage, rows))
            return
        whole, alone = self._key(rows), {row["id"]: self._key([row]) for row in rows}
        if len(rows) > 1 and not self._ask("begin", whole, Trial()).deaths:
            with self._watched(whole, self.seconds * len(rows)):
                work(_hooked(self.stage, rows))
        else:
            if len(rows) > 1:
                logger.warning("%s: a process died or hung over %d rows; now one by one", self.stage, len(rows))
            for row in rows:
                self._run_alone(row, alone[row["id"]], work)
        self._ask("forget", [whole, *alone.values()], None)

    def _run_alone(self, row: dict[str, Any], key: str, work: Callable[[list[dict[str, Any]]], None]) -> None:
        before = self._ask("look", key, Trial())
        if before.deaths >= self.tries:
            self.fail(row, self._verdict(row, before))
            return
        self._ask("begin", key, None)
        with self._watched(key, self.seconds):
            work(_hooked(self.stage, [row]))
        self._ask("end", key, None)

    def _verdict(self, row: dict[str, Any], trial: Trial) -> RowError:
        times = "once" if trial.deaths == 1 else f"{trial.deaths} times"
        if trial.hung:
            message = f"{row['image_uri']}: {self.stage} took longer than {self.seconds:g} s, {times}, and was stopped"
            return RowError(ErrorCode.TIMEOUT, message)
        return RowError(
            ErrorCode.WORKER_DIED,
            f"{row['image_uri']}: the process working on it alone died {times} in {self.stage}; "
            "the worker's log in Ray's session folder says more",
        )

    def _key(self, rows: Sequence[dict[str, Any]]) -> str:
        kind = "row" if len(rows) == 1 else "batch"
        ids = hashlib.sha256("\0".join(row["id"] for row in rows).encode()).hexdigest()
        return f"{self.stage}/{kind}/{ids}"

    def _ask(self, method: str, argument: Any, otherwise: Any) -> Any:
        """Call the ledger; one that does not answer must not hold up the work it guards."""
        import ray

        try:
            return ray.get(getattr(self.ledger, method).remote(argument), timeout=ANSWER_SECONDS)
        except ray.exceptions.RayError as error:
            logger.warning("%s goes on without a ledger: %s", self.stage, error)
            return otherwise

    @contextmanager
    def _watched(self, key: str, seconds: float) -> Iterator[None]:
        """End this process if the block takes longer: nothing less stops a hang in somebody's C code."""

        def bite() -> None:
            logger.error("%s has taken more than %g s; ending this process", self.stage, seconds)
            self._ask("hang", key, None)
            os._exit(1)

        timer = threading.Timer(seconds, bite)
        timer.daemon = True
        timer.start()
        faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            timer.cancel()


def _hooked(stage: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows`, after the tests' hook has seen each."""
    hook = os.environ.get(ROW_HOOK)
    if hook:
        module, _, name = hook.partition(":")
        function = getattr(importlib.import_module(module), name)
        for row in rows:
            function(stage, row)
    return list(rows)
