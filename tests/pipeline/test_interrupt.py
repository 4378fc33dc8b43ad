from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from diffedit_ray.pipeline.interrupt import interruptible


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_keyboard_interrupt(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def waiting() -> None:
        with interruptible():
            os.kill(os.getpid(), number)
            time.sleep(10)

    with pytest.raises(KeyboardInterrupt):
        waiting()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_another_thread_is_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def run() -> None:
        with interruptible():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


DAWDLER = """
import sys, time
from diffedit_ray.pipeline.interrupt import interruptible
with interruptible(stop_seconds=float(sys.argv[1])):
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(60)
"""


@pytest.mark.parametrize(("allowed", "signals"), [("1", 1), ("60", 2)])
def test_one_that_dawdles_is_cut_off(allowed: str, signals: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", DAWDLER, allowed], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    began = time.monotonic()
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert process.wait(timeout=20) == 130
    assert time.monotonic() - began < 15
