"""The last map stage of a row: composite its edit onto the original, write the files, then the record."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from diffedit_ray.dataset import records, storage
from diffedit_ray.dataset.images import decode_image, decode_mask, encode_image
from diffedit_ray.dataset.records import EDITED, OutputLayout
from diffedit_ray.diffusion.framing import Geometry, finish, pixel_alpha
from diffedit_ray.errors import DiffEditError, ErrorCode, ForbiddenError, RowError
from diffedit_ray.pipeline.guard import Guard
from diffedit_ray.pipeline.rows import PICTURE_FIELDS, Row, fail, frame_of, settings_of, surprise, use_storage
from diffedit_ray.pipeline.together import all_at_once
from diffedit_ray.settings import JobSettings

STORE_THREADS = 4
"""Images one store task encodes and writes at the same time."""


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
        for row, result in all_at_once(self._store, rows, STORE_THREADS, self.job.store_timeout):
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
