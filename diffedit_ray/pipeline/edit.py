"""The second map stage of a planned row: DiffEdit, in an actor that holds one model replica."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from diffedit_ray.dataset.records import EDITED, UNCHANGED
from diffedit_ray.diffusion.framing import Geometry
from diffedit_ray.errors import ErrorCode, RowError
from diffedit_ray.pipeline.guard import Guard, Replica
from diffedit_ray.pipeline.rows import PENDING, WORK_FIELDS, Row, fail, frame_of, map_rows, settings_of
from diffedit_ray.settings import JobSettings

logger = logging.getLogger(__name__)

LEAST_EDIT_SECONDS = 60.0
"""However fast rows are, one may take this long before it counts as hung."""


class Edit:
    """One model replica in an actor: mask, encode, decode for the rows of a batch.

    Args:
        source: The checkpoint.
        device, threads: Where it runs.
        geometry: The sizes it works at.
        job: The run's settings.
        ledger: What `Guard` keeps book with.
    """

    def __init__(
        self, source: str, device: str, threads: int | None, geometry: Geometry, job: JobSettings, ledger: Any = None
    ) -> None:
        import torch

        from diffedit_ray.diffusion.editor import DiffEditor
        from diffedit_ray.diffusion.model import LatentDiffusionModel
        from diffedit_ray.diffusion.throughput import DEFAULT_BATCH, measure_unet_batch

        if threads is not None:
            torch.set_num_threads(threads)
        model = LatentDiffusionModel.load(source, device, job.dtype)
        unet_batch = job.unet_batch
        rates: Mapping[int, float] = {}
        if unet_batch is None and job.reproducible:  # padding to more than a batch would be work for nothing
            unet_batch = min(DEFAULT_BATCH, job.batch_size)
        elif unet_batch is None:
            measured = measure_unet_batch(model)
            unet_batch, rates = measured.batch, measured.rates
        self.editor = DiffEditor(model, unet_batch=unet_batch, reproducible=job.reproducible)
        if job.compile:
            model.compile(self.editor.estimate.unet_batch)
        if ledger is not None:
            replica = Replica(
                platform.node(), str(model.device), str(model.dtype), self.editor.estimate.unet_batch, rates
            )
            ledger.introduce.remote(replica)
        self.threads, self.geometry, self.job, self.ledger = threads, geometry, job, ledger
        self.slowest = 0.0

    def __call__(self, table: pa.Table) -> pa.Table:
        """Edit the rows that are still pending."""
        import torch

        if self.threads not in (None, torch.get_num_threads()):
            torch.set_num_threads(self.threads)  # a thread's own, and Ray calls in another than it builds in
        return map_rows(table, self._edit_all)

    def _edit_all(self, rows: list[Row]) -> None:
        limit = self.job.edit_timeout
        if self.slowest:  # by now it is known how long a row takes here; a hang need not cost the whole limit
            limit = min(limit, max(LEAST_EDIT_SECONDS, 20 * self.slowest))
        guard = Guard("edit", self.ledger, limit, self.job.row_tries, fail)
        guard.run([row for row in rows if row["status"] == PENDING], self._edit_pending)

    def _edit_pending(self, pending: list[Row]) -> None:
        began = time.monotonic()
        sizes: dict[tuple[int, int], list[Row]] = {}
        for row in pending:
            frame = frame_of(row, self.geometry)
            sizes.setdefault((frame.model_height, frame.model_width), []).append(row)
        for size, members in sizes.items():
            try:
                self._edit(members, size)
            except Exception as error:
                self._edit_alone(members, size, error)
        self.slowest = max(self.slowest, (time.monotonic() - began) / len(pending))

    def _edit_alone(self, rows: list[Row], size: tuple[int, int], error: Exception) -> None:
        """One of `rows` broke the batch: find it, edit the others."""
        for row in rows:
            try:
                if len(rows) == 1:
                    raise error
                self._edit([row], size)
            except Exception as own:
                if device_is_lost(own):
                    # no call into a dead context ever works again; sys.exit would leave a zombie that Ray waits for
                    logger.error("the accelerator is lost, so this process ends and Ray starts another: %s", own)
                    os._exit(1)
                fail(row, _edit_error(row, own))

    def _edit(self, rows: Sequence[Row], size: tuple[int, int]) -> None:
        import torch

        height, width = size
        fitted = np.stack([np.frombuffer(row["_fitted"], np.uint8).reshape(height, width, 3) for row in rows])
        f = self.geometry.factor
        drawn = [
            None if m is None else torch.from_numpy(np.frombuffer(m, np.bool_).reshape(height // f, width // f).copy())
            for m in (row["_latent_mask"] for row in rows)
        ]
        edit = self.editor.edit_fitted(
            torch.from_numpy(fitted).permute(0, 3, 1, 2),
            [row["reference"] for row in rows],
            [row["query"] for row in rows],
            [row["seed"] for row in rows],
            masks=drawn,
            content=torch.from_numpy(np.stack([frame_of(row, self.geometry).content_cells for row in rows])),
            settings=[settings_of(row) for row in rows],
        )
        pixels = edit.pixels.permute(0, 2, 3, 1).contiguous().numpy()
        for i, row in enumerate(rows):
            mask = edit.mask[i].numpy()
            row.update({f"{step}_seconds": spent / len(rows) for step, spent in edit.seconds.items()})
            f_ratio = float(edit.significance[i])
            row["significance"] = f_ratio if np.isfinite(f_ratio) else None
            row["mask_fraction"] = float(mask.mean())
            row["_fitted"] = None
            if mask.any():
                row.update(status=EDITED, _edited=pixels[i].tobytes(), _latent_mask=mask.tobytes())
            else:
                row.update({f.name: None for f in WORK_FIELDS}, status=UNCHANGED)


def device_is_lost(error: Exception) -> bool:
    """Whether an accelerator's context is beyond use: an illegal access, a failed assertion, a dead device."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def _edit_error(row: Row, error: Exception) -> RowError:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        side = f"{row['width']}×{row['height']} pixels, resolution = {row['resolution'] or 'the model’s own'}"
        message = f"{row['image_uri']} alone needs more memory than there is ({side}); use a lower resolution"
        return RowError(ErrorCode.OUT_OF_MEMORY, message)
    return RowError(ErrorCode.EDIT_FAILED, f"{row['image_uri']}: the edit failed with {type(error).__name__}: {error}")
