"""What a person sees while a job runs: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_SECONDS = 15


class JobProgress:
    """Shows counts by status; give its `update` to `run_edit_job` and use it as a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("editing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("editing", total=None, counts="starting")
        self._logged = time.monotonic()

    def __enter__(self) -> JobProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, total: int, counts: Mapping[str, int]) -> None:
        """Show `counts` out of `total` rows."""
        done = sum(counts.values())
        shown = " · ".join(f"{n} {status}" for status, n in counts.items() if n) or "starting Ray and loading the model"
        self._bar.update(self._task, total=total, completed=done, counts=shown)
        now = time.monotonic()
        if not self.console.is_terminal and (done in (0, total) or now - self._logged > LOG_SECONDS):
            self._logged = now
            self.console.print(f"{done} of {total} rows: {shown}", highlight=False)
