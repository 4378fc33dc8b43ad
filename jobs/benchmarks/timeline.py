"""When each replica of the edit stage was at work, written down by the stage itself, on one machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import pyarrow as pa

START, BATCH = "start", "batch"


@dataclass(frozen=True)
class Span:
    """Something a replica did.

    Attributes:
        kind: `START`, building the replica, or `BATCH`.
        replica: Its process's id.
        begin, end: Seconds since 1970.
        rows: Of the batch.
    """

    kind: str
    replica: int
    begin: float
    end: float
    rows: int = 0

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin


def note(folder: Path, kind: str, begin: float, end: float, rows: int = 0) -> None:
    """Append a span of this process; each process has a file of its own."""
    span = Span(kind, os.getpid(), begin, end, rows)
    with (folder / f"{span.replica}.jsonl").open("a") as file:
        file.write(json.dumps(asdict(span)) + "\n")


def read_timeline(folder: Path) -> list[Span]:
    """All spans, the earliest first."""
    spans = [Span(**json.loads(line)) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    return sorted(spans, key=lambda span: span.begin)


def has_rows(table: pa.Table) -> bool:
    """Ray Data also calls stages with blocks of no rows, which are no batches."""
    return len(table) > 0


@contextmanager
def edit_stage(stage: type) -> Iterator[None]:
    """Jobs begun inside the block run `stage` in place of `Edit`.

    The job has no such parameter, since nobody but these benchmarks would want one.
    """
    with mock.patch("diffedit_ray.pipeline.job.Edit", stage):
        yield
