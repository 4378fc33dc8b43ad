"""Merging the many record files of a run into few that hold exactly one record an id."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from diffedit_ray.dataset import records, storage
from diffedit_ray.dataset.keys import Keys, keys, newest
from diffedit_ray.dataset.records import READ_THREADS, SCHEMA_VERSION, OutputLayout

MERGED_ROWS = 200_000
"""Records a merged file holds: some 40 MB, so that merging stays small whatever the output's size."""


@dataclass(frozen=True)
class _File:
    """A record file, what of it stays, and which rows' ids have lost a record anywhere."""

    uri: str
    schema: pa.Schema
    keep: NDArray[np.bool_]
    contested: NDArray[np.bool_]

    @property
    def stays(self) -> bool:
        """Whether there is nothing to gain by writing it anew."""
        return bool(self.keep.all()) and len(self.keep) >= MERGED_ROWS // 2


def compact(output: str) -> int:
    """Leave exactly one record an id; returns how many there are.

    Merged files are written before the others go, so a crash in between leaves duplicates that readers
    see through, and never a gap. Edited images and masks that only superseded records name go too: those
    of a row that is now unchanged or failed, or of another format.

    Not for an output that a run is still writing to.

    Raises:
        OutputError: A record file cannot be read or written.
    """
    layout = OutputLayout(storage.absolute(output))
    files = _survey(output)
    live = sum(int(file.keep.sum()) for file in files)
    rest = [file for file in files if not file.stays]
    if not rest or (len(rest) == 1 and rest[0].keep.all()):
        return live
    schema = pa.unify_schemas([file.schema.remove_metadata() for file in rest], promote_options="permissive")
    for group in _groups(rest):
        with ThreadPoolExecutor(READ_THREADS) as pool:
            tables = list(pool.map(_kept, group))
        table = pa.concat_tables([schema.empty_table(), *tables], promote_options="permissive")
        if len(table):
            table = table.replace_schema_metadata({"diffedit_ray_records": str(SCHEMA_VERSION)})
            records.write_table(layout, table)
    _remove([*_orphans(layout, files), *(file.uri for file in rest)])
    return live


def _survey(output: str) -> list[_File]:
    def head(table: pa.Table) -> tuple[Keys, NDArray[np.int64]]:
        return keys(table["id"]), records.recorded_at(table)

    found = records.map_files(output, head, ["id", "recorded_at"])
    if not found:
        return []
    ids = np.concatenate([part[0] for _, part in found])
    keep = np.zeros(len(ids), bool)
    keep[newest(ids, np.concatenate([part[1] for _, part in found]))] = True
    contested = np.isin(ids, ids[~keep]) if not keep.all() else ~keep
    ends = np.cumsum([len(part[0]) for _, part in found])[:-1]
    uris = [uri for uri, _ in found]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        schemas = list(pool.map(records.read_schema, uris))
    pieces = zip(uris, schemas, np.split(keep, ends), np.split(contested, ends), strict=True)
    return [_File(*piece) for piece in pieces]


def _groups(files: Sequence[_File]) -> list[list[_File]]:
    """Files in the order given, cut where a merged one is full."""
    groups: list[list[_File]] = []
    room = 0
    for file in files:
        rows = int(file.keep.sum())
        if not groups or rows > room:
            groups.append([])
            room = MERGED_ROWS
        groups[-1].append(file)
        room -= rows
    return groups


def _kept(file: _File) -> pa.Table:
    table = records.read_file(file.uri, None)
    return table if file.keep.all() else table.filter(pa.array(file.keep))


def _orphans(layout: OutputLayout, files: Sequence[_File]) -> list[str]:
    """Files of the output that a superseded record names and no live one."""
    dead: set[str] = set()
    alive: set[str] = set()
    for file in files:
        if file.contested.any():
            table = records.read_file(file.uri, ["edited_uri", "mask_uri"])
            for of, rows in ((alive, file.keep & file.contested), (dead, ~file.keep)):
                for column in table.filter(pa.array(rows)).columns:
                    of.update(column.drop_null().to_pylist())
    # an output that was copied elsewhere still names the files of the old place: not ours to remove
    ours = tuple(storage.join(layout.root, part, "") for part in ("images", "masks"))
    return sorted(uri for uri in dead - alive if uri.startswith(ours))


def _remove(uris: Sequence[str]) -> None:
    with ThreadPoolExecutor(READ_THREADS) as pool:
        list(pool.map(storage.remove, uris))
