"""The manifest: its columns, what makes a row valid, and the id, fingerprint and seed of each."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffedit_ray.dataset import storage
from diffedit_ray.errors import DiffEditError, ErrorCode, ManifestError, MissingError, RowError, SettingsError
from diffedit_ray.settings import EditSettings

REQUIRED = ("image_uri", "query")
OPTIONAL = ("reference", "id", "mask_uri")
OVERRIDES = tuple(EditSettings.model_fields)
CONTRACT = (*REQUIRED, *OPTIONAL, *OVERRIDES)
MAX_TEXT = 10_000
"""Characters of a text or URI beyond which a row is refused; a model reads 77 tokens."""


def manifest_files(uri: str) -> list[str]:
    """The Parquet files a manifest URI stands for: one file, a folder of them, or a glob.

    Raises:
        ManifestError: Nothing there, or it cannot be found out.
    """
    if storage.is_web(uri):  # always one file: a web server lists no folder, and its ? starts a query
        return [uri]
    try:
        kind = storage.kind(uri)
        if kind is None:
            found = storage.glob_files(uri) if _is_glob(uri) else []
        else:
            found = [uri] if kind == "file" else storage.find_files(uri, ".parquet")
    except DiffEditError as error:
        raise ManifestError(str(error)) from None
    if not found:
        raise ManifestError(
            f"no manifest at {storage.shown(uri)}: expected a Parquet file, a folder of them, or a glob"
        )
    nameless = [f for f in found if "." not in f.rsplit("/", 1)[-1]]
    if nameless:
        raise ManifestError(f"{nameless[0]} has no file name extension; call it {nameless[0]}.parquet")
    return found


def manifest_folder(uri: str) -> str:
    """What relative image URIs are relative to: the manifest's folder; for a glob, the folder before its first star."""
    if storage.is_web(uri):
        return storage.parent(uri)
    path = uri.rstrip("/")
    kind = storage.kind(path)
    if kind == "folder":
        return path
    if kind is None:
        path = re.split(r"[*?[]", path, maxsplit=1)[0]
    return path.rsplit("/", 1)[0]


def _is_glob(uri: str) -> bool:
    return any(mark in uri for mark in "*?[")


@dataclass(frozen=True)
class Columns:
    """How a manifest's own columns map onto the contract's.

    Attributes:
        source: Contract column -> its name in the manifest, for those it has.
        carried: Columns that are none of the contract's, in the manifest's order and with its types.
    """

    source: dict[str, str]
    carried: list[pa.Field]


def match_columns(schema: pa.Schema, renames: Mapping[str, str]) -> Columns:
    """Find the contract's columns in a manifest's schema.

    Args:
        schema: The manifest's.
        renames: Contract column -> the manifest's name for it.

    Raises:
        ManifestError: A required column is missing, a rename names no column, or a type is not usable.
    """
    names = schema.names
    for wanted, own in renames.items():
        if wanted not in CONTRACT:
            raise ManifestError(
                f"--columns {wanted}={own}: no such column in the contract; it knows {', '.join(CONTRACT)}"
            )
        if own not in names:
            raise ManifestError(
                f"--columns {wanted}={own}: the manifest has no column {own!r}; it has {', '.join(names)}"
            )
    source = {c: renames.get(c, c) for c in CONTRACT if renames.get(c, c) in names}
    # a column renamed to something else no longer stands for its own name
    taken = set(renames.values())
    source = {c: own for c, own in source.items() if c in renames or own not in taken}
    missing = [c for c in REQUIRED if c not in source]
    if missing:
        raise ManifestError(
            f"the manifest has no column {' and no '.join(map(repr, missing))}; it has {', '.join(names) or 'none'}. "
            f"Use --columns {missing[0]}=<its name there>"
        )
    for column in (*REQUIRED, *OPTIONAL):
        if column in source:
            kind = schema.field(source[column]).type
            text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
            text = text or (pa.types.is_dictionary(kind) and pa.types.is_string(kind.value_type))
            if not text and not (column == "id" and pa.types.is_integer(kind)):
                raise ManifestError(f"column {source[column]!r} ({column}) must hold strings, not {kind}")
    return Columns(source, [f for f in schema if f.name not in source.values()])


def iterate_manifest(files: list[str], columns: list[str] | None, batch_rows: int = 10_000) -> Iterator[pa.Table]:
    """A manifest's rows as tables, in file order, without holding it all.

    Raises:
        ManifestError: A file is not Parquet, or cannot be read.
    """
    for file in files:
        try:
            with storage.open_read(file) as stream:
                for batch in pq.ParquetFile(stream).iter_batches(batch_rows, columns=columns):
                    yield pa.Table.from_batches([batch])
        except (pa.ArrowException, OSError, DiffEditError) as error:
            raise _unreadable(file, error) from None


def _unreadable(file: str, error: Exception) -> ManifestError:
    if isinstance(error, MissingError):
        return ManifestError(f"no manifest at {storage.shown(file)}")
    if isinstance(error, DiffEditError):
        return ManifestError(str(error))
    return ManifestError(f"{storage.shown(file)} cannot be read as Parquet: {storage.shown(str(error))}")


def manifest_schema(files: list[str]) -> pa.Schema:
    """The schema all files share.

    Raises:
        ManifestError: A file is not Parquet or cannot be read, or two files disagree.
    """
    schemas = []
    for file in files:
        try:
            with storage.open_read(file) as stream:
                schemas.append(pq.read_schema(stream).remove_metadata())
        except (pa.ArrowException, OSError, DiffEditError) as error:
            raise _unreadable(file, error) from None
    try:
        return pa.unify_schemas(schemas)
    except pa.ArrowException as error:
        raise ManifestError(f"the manifest's files have different columns: {error}") from None


@dataclass(frozen=True)
class PlannedRow:
    """One manifest row, ready to be worked on.

    Attributes:
        id: The user's own key, else the fingerprint.
        fingerprint: Hash of everything that determines the result.
        image_uri, reference, query, user_mask_uri: As the manifest has them.
        seed: The user's, else derived from the image URI.
        settings: What holds for this row, the seed in it.
        error: Why the row cannot be worked on, if so.
        has_own_id: Whether the id is the user's.
    """

    id: str
    fingerprint: str
    image_uri: str | None
    reference: str | None
    query: str | None
    user_mask_uri: str | None
    seed: int
    settings: EditSettings
    error: RowError | None
    has_own_id: bool


@dataclass(frozen=True)
class RowPlanner:
    """Turns manifest rows into planned ones: the same on the driver and in every task.

    Attributes:
        columns: The manifest's.
        settings: Where a row overrides nothing.
        model_revision: Names the weights.
        image_format: Part of the fingerprint, since it decides the bytes.
    """

    columns: Columns
    settings: EditSettings
    model_revision: str
    image_format: str

    def plan(self, row: Mapping[str, Any]) -> PlannedRow:
        """Validate one row; what is wrong with it is in `PlannedRow.error`, never raised."""
        given = {c: row.get(own) for c, own in self.columns.source.items()}
        image_uri, query = given.get("image_uri"), given.get("query")
        reference, mask_uri = given.get("reference") or None, given.get("mask_uri") or None
        overrides = {name: v for name in OVERRIDES if not _absent(v := given.get(name))}
        error = _text_error(image_uri, query, reference)
        settings = self.settings
        if overrides:
            try:
                settings = settings.with_overrides(overrides)
            except SettingsError as wrong:
                error = error or RowError(ErrorCode.BAD_SETTINGS, str(wrong))
        seed = settings.seed if settings.seed is not None else derived_seed(image_uri or "")
        settings = settings.model_copy(update={"seed": seed})
        fingerprint = _hash(
            {
                "image_uri": image_uri,
                "query": query,
                "reference": reference,
                "mask_uri": mask_uri,
                "settings": settings.model_dump(),
                "overrides": {k: str(v) for k, v in overrides.items()} if error else {},
                "model": self.model_revision,
                "image_format": self.image_format,
            }
        )
        own_id = given.get("id")
        has_own_id = own_id is not None and str(own_id) != ""
        row_id = str(own_id) if has_own_id else fingerprint
        if has_own_id and (problem := _id_error(row_id)):
            error = error or problem
        return PlannedRow(row_id, fingerprint, image_uri, reference, query, mask_uri, seed, settings, error, has_own_id)


def derived_seed(image_uri: str) -> int:
    """A row's seed from its image URI, so that all queries on one image see the same noise: 32 bits."""
    return int.from_bytes(hashlib.sha256(image_uri.encode()).digest()[:4], "big")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()[:32]


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text_error(image_uri: str | None, query: str | None, reference: str | None) -> RowError | None:
    if not image_uri or not image_uri.strip():
        return RowError(ErrorCode.BAD_ROW, "image_uri is empty")
    if not query or not query.strip():
        return RowError(ErrorCode.BAD_ROW, f"query is empty: nothing says what {storage.shown(image_uri)} should show")
    for name, text in (("image_uri", image_uri), ("query", query), ("reference", reference)):
        if text and (len(text) > MAX_TEXT or "\0" in text):
            return RowError(ErrorCode.BAD_ROW, f"{name} has {len(text):,} characters or a NUL among them")
    return None


def _id_error(row_id: str) -> RowError | None:
    """An id becomes a file name, so it must be one."""
    if len(row_id.encode()) > 200 or row_id.startswith(".") or not all(c.isalnum() or c in "-_.=+@ " for c in row_id):
        return RowError(
            ErrorCode.BAD_ROW,
            f"id {row_id[:80]!r} cannot name a file: use letters, digits and -_.=+@, at most 200 bytes, no leading dot",
        )
    return None
