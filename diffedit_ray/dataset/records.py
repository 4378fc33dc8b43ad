"""Records: one for every manifest row, and the layout of the output they live in."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from diffedit_ray.dataset import storage
from diffedit_ray.dataset.keys import keys, newest
from diffedit_ray.errors import ErrorCode, MissingError, OutputError, RowError
from diffedit_ray.settings import EditSettings

SCHEMA_VERSION = 1

T = TypeVar("T")

READ_THREADS = 16
"""Record files read at the same time: on an object store each costs a round trip."""
READ_TRIES = 5

EDITED, UNCHANGED, FAILED = "edited", "unchanged", "failed"
STATUSES = (EDITED, UNCHANGED, FAILED)

_SETTING_TYPES = {
    "solver": pa.string(),
    "steps": pa.int32(),
    "mask_maps": pa.int32(),
    "mask_grow": pa.int32(),
    "resolution": pa.int32(),
    "composite": pa.bool_(),
}

FIELDS: tuple[pa.Field, ...] = (
    pa.field("id", pa.string(), nullable=False),
    pa.field("fingerprint", pa.string(), nullable=False),
    pa.field("image_uri", pa.string()),
    pa.field("reference", pa.string()),
    pa.field("query", pa.string()),
    pa.field("user_mask_uri", pa.string()),
    pa.field("status", pa.string(), nullable=False),
    pa.field("error_code", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("attempts", pa.int32(), nullable=False),
    pa.field("edited_uri", pa.string()),
    pa.field("mask_uri", pa.string()),
    pa.field("mask_fraction", pa.float64()),
    pa.field("significance", pa.float64()),
    pa.field("seed", pa.int64(), nullable=False),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    *(pa.field(name, _SETTING_TYPES.get(name, pa.float64())) for name in EditSettings.model_fields if name != "seed"),
    pa.field("model", pa.string()),
    pa.field("model_revision", pa.string()),
    *(pa.field(f"{stage}_seconds", pa.float64()) for stage in ("fetch", "mask", "encode", "decode", "store")),
    pa.field("sha256", pa.string()),
    pa.field("recorded_at", pa.timestamp("us", "UTC"), nullable=False),
)
"""A record's columns; null where one does not apply. The columns carried through follow."""

NAMES = tuple(f.name for f in FIELDS)

PERMANENT = frozenset(
    {
        ErrorCode.BAD_ROW,
        ErrorCode.BAD_SETTINGS,
        ErrorCode.BAD_URI,
        ErrorCode.NOT_FOUND,
        ErrorCode.TOO_LARGE,
        ErrorCode.NOT_AN_IMAGE,
        ErrorCode.CORRUPT_IMAGE,
        ErrorCode.BAD_MASK,
    }
)
"""Failures that the same row meets again on another try, unless somebody mends it."""


def record_schema(carried: Sequence[pa.Field]) -> pa.Schema:
    """The schema of a run's records."""
    return pa.schema([*FIELDS, *carried], metadata={"diffedit_ray_records": str(SCHEMA_VERSION)})


def carried_name(name: str, reserved: Iterable[str]) -> str:
    """What a carried column is called in a record: its own name, or manifest_<name> if that one is taken."""
    taken = set(reserved)
    while name in taken:
        name = f"manifest_{name}"
    return name


@dataclass(frozen=True)
class OutputLayout:
    """Where things lie below an output URI."""

    root: str

    def image(self, row_id: str, image_format: str) -> str:
        """The edited image of a row: its name depends on the id alone."""
        return storage.join(self.root, "images", row_id[:2], f"{row_id}.{image_format}")

    def mask(self, row_id: str) -> str:
        """The mask of a row."""
        return storage.join(self.root, "masks", row_id[:2], f"{row_id}.png")

    @property
    def records(self) -> str:
        """The folder of records."""
        return storage.join(self.root, "records")

    @property
    def leases(self) -> str:
        """The claims of runs that are going on."""
        return storage.join(self.root, "_run", "leases")

    @property
    def config(self) -> str:
        """What ran."""
        return storage.join(self.root, "_run", "config.json")

    @property
    def summary(self) -> str:
        """How it ended."""
        return storage.join(self.root, "_run", "summary.json")


def write_records(layout: OutputLayout, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> str:
    """Write records as one new file and return its URI. This is what commits the rows."""
    table = pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema)
    return write_table(layout, table)


def write_table(layout: OutputLayout, table: pa.Table) -> str:
    """Write a table of records as one new file and return its URI."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    uri = storage.join(layout.records, f"records-{secrets.token_hex(8)}.parquet")
    storage.write_bytes(uri, sink.getvalue().to_pybytes())
    return uri


def read_records(output: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The newest record of every id, as a table; empty if nothing is recorded yet.

    Args:
        output: The output URI of a run, going on or ended.
        columns: Columns to read; none is all.

    Raises:
        OutputError: A record file cannot be read.
    """
    wanted = None if columns is None else list(dict.fromkeys(["id", "recorded_at", *columns]))
    tables = [table for _, table in map_files(output, lambda table: table, wanted)]
    if not tables:
        schema = record_schema([])
        return schema.empty_table() if columns is None else schema.empty_table().select(list(columns))
    table = pa.concat_tables(tables, promote_options="permissive")
    at = newest(keys(table["id"]), recorded_at(table))
    if len(at) < len(table):
        table = table.take(pa.array(np.sort(at)))
    return table if columns is None else table.select(list(columns))


def recorded_at(table: pa.Table) -> NDArray[np.int64]:
    """When each record was written: microseconds since 1970, UTC."""
    at: NDArray[np.int64] = table["recorded_at"].cast(pa.int64()).to_numpy()
    return at


def map_files(output: str, function: Callable[[pa.Table], T], columns: list[str] | None) -> list[tuple[str, T]]:
    """What `function` makes of each record file's table, many at a time; sorted by URI.

    A run that is going on has a file for every batch, and at its end they are merged: should one
    vanish meanwhile, its records are in another, and all are read again.

    Args:
        output: The output URI.
        function: Called in threads.
        columns: Columns to read; none is all.

    Raises:
        OutputError: A record file cannot be read.
    """
    layout = OutputLayout(storage.absolute(output))
    for left in reversed(range(READ_TRIES)):
        files = storage.list_files(layout.records, ".parquet")
        try:
            with ThreadPoolExecutor(READ_THREADS) as pool:
                return list(zip(files, pool.map(lambda uri: function(read_file(uri, columns)), files), strict=True))
        except MissingError as error:
            if not left:
                raise OutputError(f"{layout.records} changes faster than it can be read: {error}") from error
    return []


def read_file(uri: str, columns: list[str] | None) -> pa.Table:
    """One record file.

    Raises:
        OutputError: It cannot be read; `MissingError` if it is gone.
    """
    try:
        with storage.open_read(uri) as stream:
            return pq.read_table(stream, columns=columns)
    except FileNotFoundError:
        raise MissingError(f"{uri} does not exist") from None
    except (pa.ArrowException, OSError) as error:
        raise OutputError(f"{uri} is not a readable record file: {error}") from error


def read_schema(uri: str) -> pa.Schema:
    """The columns of one record file.

    Raises:
        OutputError: It cannot be read.
    """
    try:
        with storage.open_read(uri) as stream:
            return pq.read_schema(stream)
    except (pa.ArrowException, OSError) as error:
        raise OutputError(f"{uri} is not a readable record file: {storage.shown(str(error))}") from error


def check_types(output: str, schema: pa.Schema) -> None:
    """Refuse a run whose records could not stand in one table with those the output holds.

    Raises:
        OutputError: A carried column has another type there.
    """
    files = storage.list_files(OutputLayout(storage.absolute(output)).records, ".parquet")
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for uri, held in zip(files, pool.map(read_schema, files), strict=True):
            try:
                pa.unify_schemas([held.remove_metadata(), schema.remove_metadata()], promote_options="permissive")
            except pa.ArrowException as error:
                raise OutputError(
                    f"{uri} does not go with this manifest: {error}. "
                    "Use another output, or give the column its old type"
                ) from error


def write_json(uri: str, value: Mapping[str, Any]) -> None:
    """Write a run file for people and scripts."""
    storage.write_bytes(uri, (json.dumps(value, indent=2, default=str) + "\n").encode())


def read_json(uri: str) -> dict[str, Any] | None:
    """A run file; None if there is none.

    Raises:
        OutputError: It cannot be read, or is not JSON.
    """
    try:
        held = json.loads(storage.read_bytes(uri, max_bytes=1 << 24))
    except RowError as error:
        if error.code is ErrorCode.NOT_FOUND:
            return None
        raise OutputError(error.message) from None
    except ValueError as error:
        raise OutputError(f"{uri} is damaged: {error}") from None
    if not isinstance(held, dict):
        raise OutputError(f"{uri} is damaged: it holds no JSON object")
    return held
