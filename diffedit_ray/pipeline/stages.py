"""The map stages a planned row passes through: fetch, edit, store.

Every stage maps a table to a table of the same rows and the same columns (`work_schema`).
What goes wrong with a row is written into it, and it travels on.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from diffedit_ray.dataset import records, storage
from diffedit_ray.dataset.images import decode_image, decode_mask, encode_image
from diffedit_ray.dataset.records import EDITED, UNCHANGED, OutputLayout
from diffedit_ray.diffusion.framing import (
    Geometry,
    finish,
    fit,
    latent_mask_from,
    over_white,
    pixel_alpha,
)
from diffedit_ray.errors import DiffEditError, ErrorCode, ForbiddenError, RowError
from diffedit_ray.pipeline.guard import Guard, Replica
from diffedit_ray.pipeline.rows import (
    PENDING,
    PICTURE_FIELDS,
    WORK_FIELDS,
    Row,
    fail,
    frame_of,
    map_rows,
    settings_of,
    surprise,
    use_storage,
)
from diffedit_ray.settings import JobSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

STORE_THREADS = 4
"""Images one store task encodes and writes at the same time."""
LEAST_EDIT_SECONDS = 60.0
"""However fast rows are, one may take this long before it counts as hung."""


def _all_at_once(
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


@dataclass(frozen=True)
class Fetch:
    """URI to bytes to checked, fitted pixels, many at a time; an image that several rows name is read once.

    Its `fetch_seconds` are shared out evenly among them, so that a run's records add up to what was spent; a mask's
    are its row's own.
    """

    geometry: Geometry
    base_uri: str
    job: JobSettings
    ledger: Any = None

    def __call__(self, table: pa.Table) -> pa.Table:
        """Fetch the rows that are still pending."""
        use_storage(self.job)
        return map_rows(table, self._fetch_all)

    def _fetch_all(self, rows: list[Row]) -> None:
        # the threads below keep to the time limits, an image's and a mask's; the guard's is for what no thread survives
        guard = Guard("fetch", self.ledger, 3 * self.job.fetch_timeout, self.job.row_tries, fail)
        guard.run([row for row in rows if row["status"] == PENDING], self._fetch_pending)

    def _fetch_pending(self, pending: list[Row]) -> None:
        images: dict[str, list[Row]] = {}
        for row in pending:
            images.setdefault(row["image_uri"], []).append(row)
        self._settle(list(images.values()), self._fetch_image, "image_uri")
        # only now, since a mask must have its image's size
        drawn = [[row] for row in pending if row["status"] == PENDING and row["user_mask_uri"]]
        self._settle(drawn, self._fetch_mask, "user_mask_uri")

    def _settle(self, groups: Sequence[list[Row]], fetch: Callable[[list[Row]], list[Row]], column: str) -> None:
        """Give each group of rows what `fetch` finds for it, or each of its rows the same failure."""
        for rows, result in _all_at_once(fetch, groups, self.job.fetch_threads, self.job.fetch_timeout):
            if not isinstance(result, Exception):
                for row, found in zip(rows, result, strict=True):
                    row.update(found)
                continue
            for row in rows:
                if isinstance(result, RowError):
                    fail(row, result)
                elif isinstance(result, FutureTimeout):
                    name = storage.shown(row[column])
                    fail(row, RowError(ErrorCode.TIMEOUT, f"{name} did not arrive within {self.job.fetch_timeout:g} s"))
                else:  # a bug or a library's surprise must stay these rows' own
                    fail(row, surprise(ErrorCode.FETCH_FAILED, row, result))

    def _allowed(self, uri: str) -> str:
        uri = storage.resolve(uri, self.base_uri)
        storage.refuse_scheme(uri, self.job.image_schemes)
        return uri

    def _fetch_image(self, rows: list[Row]) -> list[Row]:
        began = time.perf_counter()
        uri = self._allowed(rows[0]["image_uri"])
        data = storage.read_bytes(uri, max_bytes=self.job.max_bytes)
        pixels = decode_image(data, storage.shown(uri), max_pixels=self.job.max_pixels).pixels
        height, width = pixels.shape[:2]
        pixels = over_white(pixels)
        found: Row = {"_original": data, "width": width, "height": height}
        resolutions = {row["resolution"]: frame_of({**row, **found}, self.geometry) for row in rows}
        fitted = {resolution: fit(pixels, frame).tobytes() for resolution, frame in resolutions.items()}
        found["fetch_seconds"] = (time.perf_counter() - began) / len(rows)
        return [{**found, "_fitted": fitted[row["resolution"]]} for row in rows]

    def _fetch_mask(self, rows: list[Row]) -> list[Row]:
        (row,) = rows
        began = time.perf_counter()
        uri = self._allowed(row["user_mask_uri"])
        try:
            drawn = storage.read_bytes(uri, max_bytes=self.job.max_bytes)
        except RowError as error:
            if error.code not in records.PERMANENT:  # the mask may be good, and the row with it another time
                raise
            raise RowError(ErrorCode.BAD_MASK, error.message) from None
        size = (row["width"], row["height"])
        mask = decode_mask(drawn, storage.shown(uri), size, max_pixels=self.job.max_pixels)
        latent = latent_mask_from(mask, frame_of(row, self.geometry))
        seconds = row["fetch_seconds"] + time.perf_counter() - began
        return [{"_user_mask": encode_image(mask, "png"), "_latent_mask": latent.tobytes(), "fetch_seconds": seconds}]


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
        self.geometry, self.job, self.ledger = geometry, job, ledger
        self.slowest = 0.0

    def __call__(self, table: pa.Table) -> pa.Table:
        """Edit the rows that are still pending."""
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


@dataclass(frozen=True)
class _Finisher:
    """Composites edits onto the originals and makes files of them."""

    geometry: Geometry
    job: JobSettings

    def files(self, row: Mapping[str, Any]) -> tuple[bytes, bytes, float]:
        """The image file, the mask file, and the share of pixels the mask touches, of an edited row."""
        frame = frame_of(row, self.geometry)
        picture = decode_image(row["_original"], storage.shown(row["image_uri"]), max_pixels=self.job.max_pixels)
        edited = np.frombuffer(row["_edited"], np.uint8).reshape(frame.model_height, frame.model_width, 3)
        settings = settings_of(row)
        if row["_user_mask"] is not None:
            size = (row["width"], row["height"])
            alpha = decode_mask(row["_user_mask"], "the mask", size, max_pixels=self.job.max_pixels)
        else:
            f = frame.factor
            cells = np.frombuffer(row["_latent_mask"], np.bool_).reshape(
                frame.model_height // f, frame.model_width // f
            )
            alpha = pixel_alpha(cells, frame, settings.mask_grow)
        result = finish(picture.pixels, edited, alpha, frame, composite=settings.composite)
        image = encode_image(result, self.job.image_format, picture.icc_profile)
        return image, encode_image(alpha, "png"), float((alpha > 0).mean())


@dataclass(frozen=True)
class Store:
    """Writes images and masks, then the records that commit them; returns what progress needs."""

    geometry: Geometry
    job: JobSettings
    layout: OutputLayout
    schema: pa.Schema
    ledger: Any = None

    def __call__(self, table: pa.Table) -> pa.Table:
        """Store a block of rows; their records are one new file."""
        use_storage(self.job)
        rows = table.to_pylist()
        guard = Guard("store", self.ledger, 2 * self.job.store_timeout, self.job.row_tries, fail)
        guard.run([row for row in rows if row["status"] == EDITED], self._store_edited)
        for row in rows:
            row["recorded_at"] = datetime.now(UTC)
        if rows:
            records.write_records(self.layout, rows, self.schema)
        return table.schema.empty_table().select(REPORT) if not rows else _report(rows)

    def _store_edited(self, rows: list[Row]) -> None:
        for row, result in _all_at_once(self._store, rows, STORE_THREADS, self.job.store_timeout):
            if isinstance(result, RowError):
                fail(row, result)
            elif isinstance(result, FutureTimeout):
                seconds = self.job.store_timeout
                message = f"{storage.shown(row['image_uri'])}: its image and mask were not written within {seconds:g} s"
                fail(row, RowError(ErrorCode.TIMEOUT, message))
            elif isinstance(result, DiffEditError):
                forbidden = isinstance(result, ForbiddenError)
                fail(row, RowError(ErrorCode.FORBIDDEN if forbidden else ErrorCode.STORE_FAILED, str(result)))
            elif isinstance(result, Exception):  # as in Fetch: this row's own
                fail(row, surprise(ErrorCode.STORE_FAILED, row, result))
            else:
                row.update(result)

    def _store(self, row: Row) -> Row:
        began = time.perf_counter()
        image, mask, fraction = _Finisher(self.geometry, self.job).files(row)
        image_uri = self.layout.image(row["id"], self.job.image_format)
        mask_uri = self.layout.mask(row["id"])
        storage.write_bytes(image_uri, image)
        storage.write_bytes(mask_uri, mask)
        return {
            "edited_uri": image_uri,
            "mask_uri": mask_uri,
            "mask_fraction": fraction,
            "sha256": hashlib.sha256(image).hexdigest(),
            "store_seconds": time.perf_counter() - began,
        }


REPORT = ["id", "status", "error_code"]


def _report(rows: Sequence[Row]) -> pa.Table:
    return pa.table({name: pa.array([row[name] for row in rows], pa.string()) for name in REPORT})


@dataclass(frozen=True)
class Collect:
    """Returns records with the files as columns, for programs that go on with them."""

    geometry: Geometry
    job: JobSettings
    schema: pa.Schema

    def __call__(self, table: pa.Table) -> pa.Table:
        """Finish a block of rows."""
        rows = table.to_pylist()
        for row in rows:
            row.update(edited_image=None, mask_image=None, recorded_at=datetime.now(UTC))
            if row["status"] == EDITED:
                try:
                    image, mask, fraction = _Finisher(self.geometry, self.job).files(row)
                except RowError as error:
                    fail(row, error)
                    continue
                except Exception as error:  # as in Fetch: this row's own
                    fail(row, surprise(ErrorCode.STORE_FAILED, row, error))
                    continue
                row.update(edited_image=image, mask_image=mask, mask_fraction=fraction)
                row["sha256"] = hashlib.sha256(image).hexdigest()
        schema = pa.schema([*self.schema, *PICTURE_FIELDS])
        return pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema)
