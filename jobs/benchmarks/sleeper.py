"""An edit stage that sleeps; it needs no torch, so that many fit on a small machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.timeline import BATCH, START, has_rows, note
from diffedit_ray.dataset.records import EDITED
from diffedit_ray.diffusion.framing import Geometry
from diffedit_ray.pipeline.guard import Guard
from diffedit_ray.pipeline.rows import PENDING, Row, fail, frame_of, map_rows
from diffedit_ray.settings import JobSettings


def sleeping_edit(folder: Path, seconds: float) -> type:
    """A stage that takes `seconds` for any batch and edits nothing, its times written to a folder of this machine."""

    class SleepingEdit:
        """In place of `Edit`, with its arguments."""

        def __init__(
            self, source: str, device: str, threads: int | None, geometry: Geometry, job: JobSettings, ledger: Any
        ) -> None:
            began = time.time()
            self.geometry, self.job, self.ledger = geometry, job, ledger
            note(folder, START, began, time.time())

        def __call__(self, table: pa.Table) -> pa.Table:
            """Sleep over the rows that are still pending; they come out as they went in."""
            began = time.time()
            slept = map_rows(table, self._edit_all)
            if has_rows(table):
                note(folder, BATCH, began, time.time(), len(table))
            return slept

        def _edit_all(self, rows: list[Row]) -> None:
            # guarded as the real stage is: the ledger's answers are part of what a batch costs
            guard = Guard("edit", self.ledger, self.job.edit_timeout, self.job.row_tries, fail)
            guard.run([row for row in rows if row["status"] == PENDING], self._sleep)

        def _sleep(self, rows: list[Row]) -> None:
            time.sleep(seconds)
            for row in rows:
                frame = frame_of(row, self.geometry)
                cells = (frame.model_height // frame.factor) * (frame.model_width // frame.factor)
                row.update(status=EDITED, _edited=row["_fitted"], _fitted=None, _latent_mask=b"\1" * cells)

    return SleepingEdit
