"""Stopping a run from outside: the same for Ctrl-C, `kill` and a scheduler's SIGTERM."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

STOP_SECONDS = 25.0
"""How long an interrupted run may take to wind up before it is cut off; schedulers kill after 30."""
INTERRUPTED = 130
"""Exit code of an interrupted run."""


@contextmanager
def interruptible(stop_seconds: float = STOP_SECONDS) -> Iterator[None]:
    """Inside the block SIGINT and SIGTERM raise KeyboardInterrupt, once; then the process has `stop_seconds` to end.

    What is recorded by then is safe, since records are written as rows are done. A second signal ends
    the process at once. Outside the main thread Python allows no signal handlers and nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timer: list[threading.Timer] = []

    def cut_off() -> None:
        logger.error("the run did not wind up within %g s and is cut off; what is recorded is safe", stop_seconds)
        os._exit(INTERRUPTED)

    def stop(number: int, _frame: FrameType | None) -> None:
        if timer:
            os._exit(INTERRUPTED)
        logger.warning("%s: finishing up; again to stop at once", signal.Signals(number).name)
        timer.append(threading.Timer(stop_seconds, cut_off))
        timer[0].daemon = True
        timer[0].start()
        raise KeyboardInterrupt

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        for waiting in timer:
            waiting.cancel()
