"""A manifest's rows in pieces: what the driver counts and what planning tasks read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from diffedit_ray.dataset import storage
from diffedit_ray.dataset.manifest import unreadable
from diffedit_ray.errors import DiffEditError, ManifestError

SPAN_ROWS = 50_000
"""Rows that one planning task reads: enough to share a manifest out, few enough for the first images to start soon."""


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one row group: what one planning task reads.

    Attributes:
        file: The manifest file's URI.
        row_group: Of that file.
        first: The span's first row in its row group.
        rows: How many.
        start: The span's first row in the whole manifest.
    """

    file: str
    row_group: int
    first: int
    rows: int
    start: int


def iterate_spans(
    files: list[str], columns: list[str] | None, span_rows: int = SPAN_ROWS
) -> Iterator[tuple[Span, pa.Table]]:
    """A manifest's rows as spans, in file order, without holding it all.

    Raises:
        ManifestError: A file is not Parquet, or cannot be read.
    """
    start = 0
    for file in files:
        try:
            with storage.open_read(file) as stream:
                parquet = pq.ParquetFile(stream)
                for group in range(parquet.num_row_groups):
                    first = 0
                    for batch in parquet.iter_batches(span_rows, row_groups=[group], columns=columns):
                        yield Span(file, group, first, len(batch), start), pa.Table.from_batches([batch])
                        first += len(batch)
                        start += len(batch)
        except (pa.ArrowException, OSError, DiffEditError) as error:
            raise unreadable(file, error) from None


def read_span(span: Span, schema: pa.Schema) -> pa.Table:
    """The rows of a span with all columns of the manifest; null where its file lacks one.

    Raises:
        ManifestError: The file cannot be read, or no longer holds these rows.
    """
    pieces = [schema.empty_table()]
    last, passed = span.first + span.rows, 0
    try:
        with storage.open_read(span.file) as stream:
            parquet = pq.ParquetFile(stream)
            groups = [span.row_group] if span.row_group < parquet.num_row_groups else []
            # Parquet has no way to a row but through those before it in its group; nothing behind it is read
            for batch in parquet.iter_batches(SPAN_ROWS, row_groups=groups):
                low, high = max(span.first - passed, 0), min(last - passed, len(batch))
                if high > low:
                    pieces.append(pa.Table.from_batches([batch.slice(low, high - low)]).replace_schema_metadata(None))
                passed += len(batch)
                if passed >= last:
                    break
    except (pa.ArrowException, OSError, DiffEditError) as error:
        raise unreadable(span.file, error) from None
    table = pa.concat_tables(pieces, promote_options="default")
    if len(table) != span.rows:
        raise ManifestError(
            f"{storage.shown(span.file)} has changed while the run was reading it; run the same command again"
        )
    return table
