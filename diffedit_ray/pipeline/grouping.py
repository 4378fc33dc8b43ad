"""Brings the rows of one image together, over the whole manifest, so that they meet in one block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from diffedit_ray.pipeline.cluster import IO_CPUS

if TYPE_CHECKING:
    import ray.data

PARTITION_ROWS = 200_000
"""Rows, about, that one task sorts and cuts into blocks: 120 MB of texts, and few partitions for 10^8 rows."""

SORTED_BY = ("image_uri", "reference", "seed", "id")
"""Where a group is larger than a block, rows that share the most stay together. The id makes the order a fact of the
rows alone, not of which task was first."""

_BLOCK = "block"


def group_by_image(rows: ray.data.Dataset, batch_size: int, count: int | None) -> ray.data.Dataset:
    """Planned rows in blocks of at most `batch_size`, those of one image in as few blocks as hold them.

    Ray Data's hash shuffle moves them, so nothing comes out before everything has gone in: it is for texts, before
    any picture is fetched. Which rows a block has depends on the rows alone.

    Args:
        rows: Planned rows, without pictures.
        batch_size: Rows a block may have.
        count: How many rows there are; if it is not known, Ray's `default_hash_shuffle_parallelism` says how many
            partitions are made, each of which ends in blocks that may not be full.
    """
    from ray.data import DataContext

    partitions = DataContext.get_current().default_hash_shuffle_parallelism
    if count is not None:
        partitions = max(1, -(-count // PARTITION_ROWS))

    def bundle(table: pa.Table) -> Iterator[pa.Table]:
        return bundles(table, batch_size)

    # Ray cuts blocks at numbers of rows, not at images; so a row is made of each block, and the cut is after each row
    return (
        rows.repartition(partitions, keys=["image_uri"])
        .map_batches(bundle, batch_size=None, batch_format="pyarrow", num_cpus=IO_CPUS)
        .repartition(target_num_rows_per_block=1)
        .map_batches(unbundle, batch_size=None, batch_format="pyarrow", num_cpus=IO_CPUS)
    )


def bundles(table: pa.Table, batch_size: int) -> Iterator[pa.Table]:
    """A table of one row for each block that `table`'s rows go into; `unbundle` makes the block of it.

    Args:
        table: All rows of some images.
        batch_size: Rows a block may have.
    """
    table = table.sort_by([(name, "ascending") for name in SORTED_BY])
    pieces = _pieces(table["image_uri"], batch_size)
    for block in packed([rows for _, rows in pieces], batch_size):
        yield _bundle(pa.concat_tables([table.slice(*pieces[i]) for i in block]))
    if not pieces:
        yield _bundle(table)


def _bundle(rows: pa.Table) -> pa.Table:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows.combine_chunks())
    return pa.table({_BLOCK: pa.array([sink.getvalue().to_pybytes()], pa.large_binary())})


def unbundle(bundles: pa.Table) -> pa.Table:
    """The rows of the blocks that `bundles` has made rows of."""
    return pa.concat_tables(pa.ipc.open_stream(block.as_buffer()).read_all() for block in bundles[_BLOCK])


def _pieces(images: pa.ChunkedArray, batch_size: int) -> list[tuple[int, int]]:
    """First row and number of rows of each image in a sorted column, the larger ones in pieces of `batch_size`."""
    ends = pc.run_end_encode(images.combine_chunks()).run_ends.to_pylist()
    pieces: list[tuple[int, int]] = []
    first = 0
    for end in ends:
        pieces.extend((start, min(batch_size, end - start)) for start in range(first, end, batch_size))
        first = end
    return pieces


def packed(sizes: list[int], capacity: int) -> list[list[int]]:
    """Which of some pieces go together so that few places stay empty: the largest first, each where it fits best.

    Args:
        sizes: Of the pieces, at most `capacity` each.
        capacity: What those that go together may have in all.

    Returns:
        Indices into `sizes`, each in one list.
    """
    packs: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # stable: equal ones stay in order
        room = next((r for r in range(sizes[i], capacity) if with_room[r]), None)
        if room is None:
            pack, room = len(packs), capacity
            packs.append([])
        else:
            pack = with_room[room].pop()
        packs[pack].append(i)
        with_room[room - sizes[i]].append(pack)
    return packs
