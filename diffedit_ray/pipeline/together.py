"""Many things at the same time, none for longer than it may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def all_at_once(
    function: Callable[[T], R], items: Sequence[T], threads: int, seconds: float
) -> Iterator[tuple[T, R | Exception]]:
    """Each item with what `function` makes of it, or what it raised, each within `seconds`.

    A thread that is late goes on in the background and is not waited for; nothing can stop it.
    """
    pool = ThreadPoolExecutor(threads)
    waves = -(-len(items) // threads)
    deadline = time.monotonic() + seconds * waves
    waiting = [(item, pool.submit(function, item)) for item in items]
    for item, future in waiting:
        try:
            yield item, future.result(timeout=max(0.0, deadline - time.monotonic()))
        except Exception as error:
            yield item, error
    pool.shutdown(wait=False, cancel_futures=True)
