"""Records: one for every manifest row, and the layout of the output they live in."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffedit_ray.dataset import storage
from diffedit_ray.errors import ErrorCode, OutputError
from diffedit_ray.settings import EditSettings

SCHEMA_VERSION = 1

EDITED, UNCHANGED, FAILED = "edited", "unchanged", "failed"
STATUSES = (EDITED, UNCHANGED, FAILED)

_SETTING_TYPES = {
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
    return _write_table(layout, table)


def _write_table(layout: OutputLayout, table: pa.Table) -> str:
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
    layout = OutputLayout(storage.absolute(output))
    wanted = None if columns is None else list(dict.fromkeys(["id", "recorded_at", *columns]))
    tables = [_read_file(uri, wanted) for uri in storage.list_files(layout.records, ".parquet")]
    if not tables:
        schema = record_schema([])
        return schema.empty_table() if columns is None else schema.empty_table().select(list(columns))
    table = newest(pa.concat_tables(tables, promote_options="permissive"))
    return table if columns is None else table.select(list(columns))


def _read_file(uri: str, columns: list[str] | None) -> pa.Table:
    try:
        with storage.open_read(uri) as stream:
            return pq.read_table(stream, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise OutputError(f"{uri} is not a readable record file: {storage.shown(str(error))}") from error


def check_types(output: str, schema: pa.Schema) -> None:
    """Refuse a run whose records could not stand in one table with those the output holds.

    Raises:
        OutputError: A carried column has another type there.
    """
    for uri in storage.list_files(OutputLayout(storage.absolute(output)).records, ".parquet"):
        try:
            with storage.open_read(uri) as stream:
                held = pq.read_schema(stream)
            pa.unify_schemas([held.remove_metadata(), schema.remove_metadata()], promote_options="permissive")
        except (pa.ArrowException, OSError) as error:
            raise OutputError(
                f"{uri} does not go with this manifest: {error}. Use another output, or give the column its old type"
            ) from error


def newest(records: pa.Table) -> pa.Table:
    """Only the latest record of each id, in the order of the table."""
    order = pa.chunked_array([pa.array(range(len(records)), pa.int64())])
    ranked = records.append_column("_order", order).select(["id", "recorded_at", "_order"])
    ranked = ranked.sort_by([("recorded_at", "ascending"), ("_order", "ascending")])
    last = ranked.group_by("id", use_threads=False).aggregate([("_order", "last")])
    return records.take(last["_order_last"].sort())


def compact(output: str) -> int:
    """Merge the record files into one that holds exactly one record per id; returns how many there are.

    The merged file is written before the others go, so a crash in between leaves duplicates
    that `read_records` sees through, and never a gap.
    """
    layout = OutputLayout(storage.absolute(output))
    files = storage.list_files(layout.records, ".parquet")
    if not files:
        return 0
    if len(files) == 1:
        whole = _read_file(files[0], ["id"])
        if len(whole["id"].unique()) == len(whole):
            return len(whole)
    table = newest(pa.concat_tables([_read_file(uri, None) for uri in files], promote_options="permissive"))
    table = table.replace_schema_metadata({"diffedit_ray_records": str(SCHEMA_VERSION)})
    _write_table(layout, table)
    for uri in files:
        storage.remove(uri)
    return len(table)


@dataclass(frozen=True)
class Done:
    """What an output already holds.

    Attributes:
        fingerprints: id -> fingerprint of rows that need no work.
        attempts: id -> tries so far, of rows that failed.
    """

    fingerprints: dict[str, str]
    attempts: dict[str, int]


def read_done(output: str, retry_failed: str) -> Done:
    """Read what is recorded.

    Args:
        output: The output URI.
        retry_failed: "transient", "all" or "none": which failures to try again.
    """
    table = read_records(output, ["id", "fingerprint", "status", "error_code", "attempts"])
    fingerprints, attempts = {}, {}
    for row in table.to_pylist():
        if row["status"] == FAILED:
            attempts[row["id"]] = row["attempts"]
            if retry_failed == "all" or (retry_failed == "transient" and row["error_code"] not in PERMANENT):
                continue
        fingerprints[row["id"]] = row["fingerprint"]
    return Done(fingerprints, attempts)


def write_json(uri: str, value: Mapping[str, Any]) -> None:
    """Write a run file for people and scripts."""
    storage.write_bytes(uri, (json.dumps(value, indent=2, default=str) + "\n").encode())
