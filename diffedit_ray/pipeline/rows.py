"""A row in flight: its record's columns, those carried through, and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa

from diffedit_ray.dataset import records, storage
from diffedit_ray.dataset.manifest import Columns
from diffedit_ray.dataset.records import FAILED
from diffedit_ray.diffusion.framing import Frame, Geometry, frame_for
from diffedit_ray.errors import ErrorCode, RowError
from diffedit_ray.settings import EditSettings, JobSettings

Row = dict[str, Any]

PENDING = "pending"
"""The status of a row that nothing has gone wrong with yet; never recorded."""

WORK_FIELDS = tuple(
    pa.field(name, pa.large_binary()) for name in ("_original", "_user_mask", "_fitted", "_edited", "_latent_mask")
)
"""The pictures a row in flight carries; none of them is recorded."""
PICTURE_FIELDS = (pa.field("edited_image", pa.large_binary()), pa.field("mask_image", pa.large_binary()))
"""What `Collect` returns beside the record: the files that `Store` would have written."""

_RESERVED = (*records.NAMES, *(f.name for f in (*WORK_FIELDS, *PICTURE_FIELDS)))


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
    return pa.schema([*records.FIELDS, *carried_fields(columns), *WORK_FIELDS])


def settings_of(row: Mapping[str, Any]) -> EditSettings:
    """The settings a planned row carries, without its seed."""
    return EditSettings(**{name: row[name] for name in EditSettings.model_fields if name != "seed"})


def fail(row: Row, error: RowError) -> None:
    """Mark a row as failed and drop its pictures; it travels on as its own record."""
    row.update(status=FAILED, error_code=error.code.value, error_message=error.message)
    row.update({f.name: None for f in WORK_FIELDS})


def surprise(code: ErrorCode, row: Mapping[str, Any], error: Exception) -> RowError:
    """A bug or a library's surprise, as the error of the row it met."""
    return RowError(code, storage.shown(f"{row['image_uri']}: {type(error).__name__}: {error}"))


def frame_of(row: Mapping[str, Any], geometry: Geometry) -> Frame:
    """How a fetched row's picture lies in what the model sees."""
    return frame_for(row["width"], row["height"], geometry, row["resolution"])


def use_storage(job: JobSettings) -> None:
    """Make this process use a job's storage options; whatever touches storage on its behalf calls it first."""
    storage.configure(job.storage_options.get_secret_value(), tries=job.storage_tries, seconds=job.storage_seconds)


def map_rows(table: pa.Table, function: Callable[[list[Row]], None]) -> pa.Table:
    """A table after `function` has changed its rows in place."""
    rows = table.to_pylist()
    function(rows)
    return pa.Table.from_pylist(rows, schema=table.schema)
