"""What an output holds already, in arrays: about thirty bytes a record, however long its texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from diffedit_ray.dataset import records
from diffedit_ray.dataset.keys import Keys, halves, keys, newest, prints
from diffedit_ray.dataset.records import FAILED, PERMANENT, STATUSES

_COLUMNS = ["id", "fingerprint", "status", "error_code", "attempts", "recorded_at"]


@dataclass(frozen=True)
class Recorded:
    """The newest record of every id, sorted by the keys of the ids.

    Attributes:
        ids: (n,) keys of the ids.
        prints: (n,) of the fingerprints.
        statuses: (n,) positions in `STATUSES`.
        codes: (n,) positions in `code_names`, -1 where there is no error.
        code_names: The error codes that occur.
        attempts: (n,) tries so far.
        recorded_at: (n,) microseconds since 1970, UTC.
        repeated: Keys of ids that have more than one record.
    """

    ids: Keys
    prints: NDArray[np.uint64]
    statuses: NDArray[np.int8]
    codes: NDArray[np.int16]
    code_names: tuple[str, ...]
    attempts: NDArray[np.int32]
    recorded_at: NDArray[np.int64]
    repeated: Keys

    @property
    def failed(self) -> NDArray[np.bool_]:
        """(n,) whether each is a failure."""
        return np.equal(self.statuses, STATUSES.index(FAILED))

    def find(self, ids: Keys) -> NDArray[np.int64]:
        """The position of each key, -1 where there is none; fastest for sorted keys."""
        if not len(self.ids):
            return np.full(len(ids), -1)
        at = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[at] == ids, at, -1)

    def settled(self, *, retry_failed: bool, retry_permanent: bool) -> NDArray[np.bool_]:
        """(n,) which records say that their row needs no work.

        Args:
            retry_failed: Whether failures that may pass by themselves need work.
            retry_permanent: Whether those that last until somebody mends them do.
        """
        lasting = [i for i, name in enumerate(self.code_names) if name in PERMANENT]
        permanent = np.isin(self.codes, lasting)
        again: NDArray[np.bool_] = self.failed & np.where(permanent, retry_permanent, retry_failed)
        return np.logical_not(again)


def read_recorded(output: str) -> Recorded:
    """Read what is recorded.

    Raises:
        OutputError: A record file cannot be read.
    """
    parts = [part for _, part in records.map_files(output, _columns, _COLUMNS)] or [_columns(_nothing())]
    ids, fingerprints, statuses, attempts, recorded_at = (np.concatenate([p[i] for p in parts]) for i in range(5))
    at = newest(ids, recorded_at)
    codes = pa.concat_arrays([p[5] for p in parts]).take(pa.array(at)).dictionary_encode()
    unique = ids[at]
    repeated = np.unique(np.delete(ids, at)) if len(at) < len(ids) else ids[:0]
    return Recorded(
        unique,
        fingerprints[at],
        statuses[at],
        pc.fill_null(codes.indices, -1).to_numpy().astype(np.int16),
        tuple(codes.dictionary.to_pylist()),
        attempts[at],
        recorded_at[at],
        repeated,
    )


def _nothing() -> pa.Table:
    return records.record_schema([]).empty_table().select(_COLUMNS)


def _columns(table: pa.Table) -> tuple[Any, ...]:
    table = table.combine_chunks()
    ids, fingerprints = table["id"], table["fingerprint"]
    own = keys(ids)
    derived = pc.all(pc.equal(ids, fingerprints), min_count=0).as_py()
    return (
        own,
        halves(own)[0] if derived else prints(fingerprints),
        pc.fill_null(pc.index_in(table["status"], pa.array(STATUSES)), -1).to_numpy().astype(np.int8),
        table["attempts"].to_numpy().astype(np.int32),
        records.recorded_at(table),
        pa.concat_arrays(table["error_code"].cast(pa.string()).chunks or [pa.array([], pa.string())]),
    )
