"""Rows that kill, hang or hold up the process working on them; workers find `hook` by its name in their environment.

A query ending in "!edit:exit" makes the edit stage's process exit over that row, and so on for every stage
and kind. Nothing happens unless the folder that `FAULTS` names holds a file "armed".
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

FAULTS = "DIFFEDIT_TEST_FAULTS"
HOOK = "tests.pipeline.misbehave:hook"
HELD_SECONDS = 20.0


def hook(stage: str, row: dict[str, Any]) -> None:
    """Do to this process what the row asks for in this stage."""
    folder = Path(os.environ[FAULTS])
    _, _, wish = (row["query"] or "").rpartition("!")
    place, _, kind = wish.partition(":")
    if place != stage or not (folder / "armed").exists():
        return
    if kind == "exit":
        os._exit(3)
    elif kind == "segfault":
        ctypes.string_at(0)
    elif kind == "hang":
        time.sleep(1e6)
    elif kind == "stuck":
        ctypes.PyDLL(None).sleep(1_000_000)  # unlike CDLL it keeps Python's lock, so no other thread runs
    elif kind == "held":
        mark = folder / f"{stage}.pid"
        if not mark.exists():  # the first time only: whoever waits for the mark is about to kill this process
            mark.with_suffix(".tmp").write_text(str(os.getpid()))
            mark.with_suffix(".tmp").rename(mark)
            time.sleep(HELD_SECONDS)
