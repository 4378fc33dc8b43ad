"""The manifest: its columns, what makes a row valid, and the id, fingerprint and seed of each."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from json.encoder import encode_basestring_ascii
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffedit_ray.dataset import storage
from diffedit_ray.errors import DiffEditError, ErrorCode, ManifestError, MissingError, RowError, SettingsError
from diffedit_ray.settings import EditSettings

REQUIRED = ("image_uri", "query")
OPTIONAL = ("reference", "id", "mask_uri")
OVERRIDES = tuple(EditSettings.model_fields)
ADDED_LATER = ("solver",)
"""Settings that fingerprints leave out at their defaults, so that those of earlier outputs still hold."""
CONTRACT = (*REQUIRED, *OPTIONAL, *OVERRIDES)
MAX_TEMPLATES = 1000
"""Combinations of overriding settings that are remembered; a manifest has few, unless it is an experiment."""
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


def unreadable(file: str, error: Exception) -> ManifestError:
    """What to raise when a manifest file could not be read."""
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
            raise unreadable(file, error) from None
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
        fingerprint, seed, settings, error = self._identify(given)
        settings = settings.model_copy(update={"seed": seed})
        row_id, has_own_id = _row_id(given, fingerprint)
        if has_own_id and (problem := _id_error(row_id)):
            error = error or problem
        return PlannedRow(row_id, fingerprint, image_uri, reference, query, mask_uri, seed, settings, error, has_own_id)

    def identify(self, table: pa.Table) -> tuple[list[str], list[str]]:
        """The id and the fingerprint that `plan` gives each row of a table, in a tenth of the time.

        Args:
            table: Manifest rows; columns that their file lacks may be missing.
        """
        held = [(c, own) for c, own in self.columns.source.items() if own in table.column_names]
        names = [c for c, _ in held]
        ids, fingerprints = [], []
        for values in zip(*(table[own].to_pylist() for _, own in held), strict=True):
            given = dict(zip(names, values, strict=True))
            fingerprint = self._identify(given)[0]
            ids.append(_row_id(given, fingerprint)[0])
            fingerprints.append(fingerprint)
        return ids, fingerprints

    def _identify(self, given: Mapping[str, Any]) -> tuple[str, int, EditSettings, RowError | None]:
        """Fingerprint, seed, settings but for the seed, and what is wrong with texts or settings."""
        image_uri, query = given.get("image_uri"), given.get("query")
        reference, mask_uri = given.get("reference") or None, given.get("mask_uri") or None
        held = self._overriding
        overrides = {name: v for name in held if not _absent(v := given.get(name))} if held else {}
        error = _text_error(image_uri, query, reference)
        template = self._template
        seed = None
        if overrides:
            try:
                template, seed = self._overridden(overrides)
            except SettingsError as wrong:
                error = error or RowError(ErrorCode.BAD_SETTINGS, str(wrong))
        seed = template.settings.seed if seed is None else seed
        seed = derived_seed(image_uri or "") if seed is None else seed
        # as json.dumps writes it with sorted keys: most of it is the same in every row
        text = (
            f'{{"image_format": {self._format_json}, "image_uri": {_json(image_uri)}, '
            f'"mask_uri": {_json(mask_uri)}, "model": {self._model_json}, '
            f'"overrides": {_texts(overrides) if error else "{}"}, "query": {_json(query)}, '
            f'"reference": {_json(reference)}, "settings": {template.before}{seed}{template.after}}}'
        )
        return hashlib.sha256(text.encode()).hexdigest()[:32], seed, template.settings, error

    def _overridden(self, overrides: dict[str, Any]) -> tuple[_Template, int | None]:
        """The settings a row asks for, and its seed if it has one: of which nearly every row has another."""
        seed = overrides.get("seed")
        plain = seed is None or (type(seed) is int and 0 <= seed < 2**63)
        others = {name: v for name, v in overrides.items() if name != "seed"}
        key = tuple((name, type(v), v) for name, v in others.items())
        try:
            known = self._templates.get(key) if plain else None
        except TypeError:  # a list, say, which no setting is
            plain = False
        if not plain:
            return _Template.of(self.settings.with_overrides(overrides)), None
        if known is None:
            known = _Template.of(self.settings.with_overrides(others))
            if len(self._templates) < MAX_TEMPLATES:
                self._templates[key] = known
        return known, seed

    @cached_property
    def _overriding(self) -> tuple[str, ...]:
        return tuple(name for name in OVERRIDES if name in self.columns.source)

    @cached_property
    def _template(self) -> _Template:
        return _Template.of(self.settings)

    @cached_property
    def _templates(self) -> dict[Any, _Template]:
        return {}

    @cached_property
    def _format_json(self) -> str:
        return json.dumps(self.image_format)

    @cached_property
    def _model_json(self) -> str:
        return json.dumps(self.model_revision)


@dataclass(frozen=True)
class _Template:
    """Settings as a fingerprint has them, open where the seed goes."""

    settings: EditSettings
    before: str
    after: str

    @classmethod
    def of(cls, settings: EditSettings) -> _Template:
        held = settings.model_dump()
        for name in ADDED_LATER:
            if held[name] == type(settings).model_fields[name].default:
                del held[name]
        text = json.dumps({**held, "seed": 0}, sort_keys=True)
        before, after = text.split('"seed": 0')
        return cls(settings, f'{before}"seed": ', after)


def _json(text: str | None) -> str:
    return "null" if text is None else encode_basestring_ascii(text)


def _texts(overrides: Mapping[str, Any]) -> str:
    return json.dumps({name: str(v) for name, v in overrides.items()}, sort_keys=True)


def _row_id(given: Mapping[str, Any], fingerprint: str) -> tuple[str, bool]:
    """A row's id, and whether it is the user's own."""
    own = given.get("id")
    return (fingerprint, False) if own is None or own == "" else (str(own), True)


def derived_seed(image_uri: str) -> int:
    """A row's seed from its image URI, so that all queries on one image see the same noise: 32 bits."""
    return int.from_bytes(hashlib.sha256(image_uri.encode()).digest()[:4], "big")


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text_error(image_uri: str | None, query: str | None, reference: str | None) -> RowError | None:
    if not image_uri or not image_uri.strip():
        return RowError(ErrorCode.BAD_ROW, "image_uri is empty")
    if not query or not query.strip():
        return RowError(ErrorCode.BAD_ROW, f"query is empty: nothing says what {storage.shown(image_uri)} should show")
    if len(whole := f"{image_uri}{query}{reference or ''}") <= MAX_TEXT and "\0" not in whole:
        return None
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
