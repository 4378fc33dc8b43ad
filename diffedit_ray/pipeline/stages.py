"""The map stages a planned row passes through: fetch, edit, store.

Every stage maps a table to a table of the same rows and the same columns (`work_schema`).
What goes wrong with a row is written into it, and it travels on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from diffedit_ray.dataset import records, storage
from diffedit_ray.dataset.images import decode_image, decode_mask, encode_image
from diffedit_ray.dataset.manifest import Columns
from diffedit_ray.dataset.records import EDITED, FAILED, UNCHANGED, OutputLayout
from diffedit_ray.diffusion.framing import (
    Frame,
    Geometry,
    finish,
    fit,
    frame_for,
    latent_mask_from,
    over_white,
    pixel_alpha,
)
from diffedit_ray.errors import DiffEditError, ErrorCode, RowError
from diffedit_ray.settings import EditSettings, JobSettings

Row = dict[str, Any]

PENDING = "pending"
"""The status of a row that nothing has gone wrong with yet; never recorded."""

_WORK_FIELDS = tuple(
    pa.field(name, pa.large_binary()) for name in ("_original", "_user_mask", "_fitted", "_edited", "_latent_mask")
)
PICTURE_FIELDS = (pa.field("edited_image", pa.large_binary()), pa.field("mask_image", pa.large_binary()))
"""What `Collect` returns beside the record: the files that `Store` would have written."""

_RESERVED = (*records.NAMES, *(f.name for f in (*_WORK_FIELDS, *PICTURE_FIELDS)))


def carried_fields(columns: Columns) -> list[pa.Field]:
    """The carried columns as records name them."""
    reserved = {*_RESERVED, *(f.name for f in columns.carried)}
    fields = []
    for f in columns.carried:
        name = records.carried_name(f.name, reserved) if f.name in _RESERVED else f.name
        reserved.add(name)
        fields.append(f.with_name(name).with_nullable(True))
    return fields


def work_schema(columns: Columns) -> pa.Schema:
    """The columns of a row in flight: its record's, the carried ones, and its pictures."""
    return pa.schema([*records.FIELDS, *carried_fields(columns), *_WORK_FIELDS])


def settings_of(row: Mapping[str, Any]) -> EditSettings:
    """The settings a planned row carries, without its seed."""
    return EditSettings(**{name: row[name] for name in EditSettings.model_fields if name != "seed"})


def fail(row: Row, error: RowError) -> None:
    """Mark a row as failed and drop its pictures; it travels on as its own record."""
    row.update(status=FAILED, error_code=error.code.value, error_message=error.message)
    row.update({f.name: None for f in _WORK_FIELDS})


def frame_of(row: Mapping[str, Any], geometry: Geometry) -> Frame:
    """How a fetched row's picture lies in what the model sees."""
    return frame_for(row["width"], row["height"], geometry, row["resolution"])


def _map_rows(table: pa.Table, function: Callable[[list[Row]], None]) -> pa.Table:
    rows = table.to_pylist()
    function(rows)
    return pa.Table.from_pylist(rows, schema=table.schema)


@dataclass(frozen=True)
class Fetch:
    """URI to bytes to checked, fitted pixels, many at a time."""

    geometry: Geometry
    base_uri: str
    job: JobSettings

    def __call__(self, table: pa.Table) -> pa.Table:
        """Fetch the rows that are still pending."""
        return _map_rows(table, self._fetch_all)

    def _fetch_all(self, rows: list[Row]) -> None:
        pending = [row for row in rows if row["status"] == PENDING]
        pool = ThreadPoolExecutor(self.job.fetch_threads)
        waiting = [(row, pool.submit(self._fetch, dict(row))) for row in pending]
        for row, future in waiting:
            try:
                row.update(future.result(timeout=self.job.fetch_timeout))
            except RowError as error:
                fail(row, error)
            except FutureTimeout:
                seconds = self.job.fetch_timeout
                fail(row, RowError(ErrorCode.TIMEOUT, f"{row['image_uri']} did not arrive within {seconds:g} s"))
            except Exception as error:  # a bug or a library's surprise must stay this row's own
                fail(row, RowError(ErrorCode.FETCH_FAILED, f"{row['image_uri']}: {type(error).__name__}: {error}"))
        pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, row: Row) -> Row:
        began = time.perf_counter()
        uri = storage.resolve(row["image_uri"], self.base_uri)
        data = storage.read_bytes(uri, max_bytes=self.job.max_bytes)
        pixels = decode_image(data, uri, max_pixels=self.job.max_pixels).pixels
        height, width = pixels.shape[:2]
        found: Row = {"_original": data, "width": width, "height": height}
        frame = frame_of({**row, **found}, self.geometry)
        found["_fitted"] = fit(over_white(pixels), frame).tobytes()
        if row["user_mask_uri"]:
            mask_uri = storage.resolve(row["user_mask_uri"], self.base_uri)
            try:
                drawn = storage.read_bytes(mask_uri, max_bytes=self.job.max_bytes)
            except RowError as error:
                raise RowError(ErrorCode.BAD_MASK, error.message) from None
            mask = decode_mask(drawn, mask_uri, (width, height), max_pixels=self.job.max_pixels)
            found["_user_mask"] = encode_image(mask, "png")
            found["_latent_mask"] = latent_mask_from(mask, frame).tobytes()
        found["fetch_seconds"] = time.perf_counter() - began
        return found


class Edit:
    """One model replica in an actor: mask, encode, decode for the rows of a batch."""

    def __init__(self, source: str, device: str, dtype: str, threads: int | None, geometry: Geometry) -> None:
        import torch

        from diffedit_ray.diffusion.editor import DiffEditor
        from diffedit_ray.diffusion.model import LatentDiffusionModel

        if threads is not None:
            torch.set_num_threads(threads)
        self.editor = DiffEditor(LatentDiffusionModel.load(source, device, dtype))
        self.geometry = geometry

    def __call__(self, table: pa.Table) -> pa.Table:
        """Edit the rows that are still pending."""
        return _map_rows(table, self._edit_all)

    def _edit_all(self, rows: list[Row]) -> None:
        groups: dict[Any, list[Row]] = {}
        for row in rows:
            if row["status"] == PENDING:
                frame = frame_of(row, self.geometry)
                size = (frame.model_height, frame.model_width)
                groups.setdefault((settings_of(row), size, row["_latent_mask"] is not None), []).append(row)
        for (settings, size, _), members in groups.items():
            try:
                self._edit(members, settings, size)
            except Exception as error:
                self._edit_alone(members, settings, size, error)

    def _edit_alone(self, rows: list[Row], settings: EditSettings, size: tuple[int, int], error: Exception) -> None:
        """One of `rows` broke the batch: find it, edit the others."""
        for row in rows:
            try:
                if len(rows) == 1:
                    raise error
                self._edit([row], settings, size)
            except Exception as own:
                message = f"{row['image_uri']}: the edit failed with {type(own).__name__}: {own}"
                fail(row, RowError(ErrorCode.EDIT_FAILED, message))

    def _edit(self, rows: Sequence[Row], settings: EditSettings, size: tuple[int, int]) -> None:
        import torch

        height, width = size
        fitted = np.stack([np.frombuffer(row["_fitted"], np.uint8).reshape(height, width, 3) for row in rows])
        masks = None
        if rows[0]["_latent_mask"] is not None:
            f = self.geometry.factor
            drawn = [np.frombuffer(row["_latent_mask"], np.bool_).reshape(height // f, width // f) for row in rows]
            masks = torch.from_numpy(np.stack(drawn))
        edit = self.editor.edit_fitted(
            torch.from_numpy(fitted).permute(0, 3, 1, 2),
            [row["reference"] for row in rows],
            [row["query"] for row in rows],
            [row["seed"] for row in rows],
            masks=masks,
            content=torch.from_numpy(np.stack([frame_of(row, self.geometry).content_cells for row in rows])),
            settings=settings,
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
                row.update({f.name: None for f in _WORK_FIELDS}, status=UNCHANGED)


@dataclass(frozen=True)
class _Finisher:
    """Composites edits onto the originals and makes files of them."""

    geometry: Geometry
    job: JobSettings

    def files(self, row: Mapping[str, Any]) -> tuple[bytes, bytes, float]:
        """The image file, the mask file, and the share of pixels the mask touches, of an edited row."""
        frame = frame_of(row, self.geometry)
        picture = decode_image(row["_original"], row["image_uri"], max_pixels=self.job.max_pixels)
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

    def __call__(self, table: pa.Table) -> pa.Table:
        """Store a block of rows; their records are one new file."""
        rows = table.to_pylist()
        with ThreadPoolExecutor(max_workers=4) as pool:
            list(pool.map(self._store, rows))
        for row in rows:
            row["recorded_at"] = datetime.now(UTC)
        if rows:
            records.write_records(self.layout, rows, self.schema)
        return table.schema.empty_table().select(REPORT) if not rows else _report(rows)

    def _store(self, row: Row) -> None:
        if row["status"] != EDITED:
            return
        began = time.perf_counter()
        try:
            image, mask, fraction = _Finisher(self.geometry, self.job).files(row)
            image_uri = self.layout.image(row["id"], self.job.image_format)
            mask_uri = self.layout.mask(row["id"])
            storage.write_bytes(image_uri, image)
            storage.write_bytes(mask_uri, mask)
        except DiffEditError as error:
            fail(row, error if isinstance(error, RowError) else RowError(ErrorCode.STORE_FAILED, str(error)))
            return
        except Exception as error:  # as in Fetch: this row's own
            fail(row, RowError(ErrorCode.STORE_FAILED, f"{row['image_uri']}: {type(error).__name__}: {error}"))
            return
        row.update(edited_uri=image_uri, mask_uri=mask_uri, mask_fraction=fraction)
        row.update(sha256=hashlib.sha256(image).hexdigest(), store_seconds=time.perf_counter() - began)


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
                    fail(row, RowError(ErrorCode.STORE_FAILED, f"{row['image_uri']}: {type(error).__name__}: {error}"))
                    continue
                row.update(edited_image=image, mask_image=mask, mask_fraction=fraction)
                row["sha256"] = hashlib.sha256(image).hexdigest()
        schema = pa.schema([*self.schema, *PICTURE_FIELDS])
        return pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema)
