"""Make an output with many records, and measure what planning a resume on it costs the driver.

`jobs/benchmark.py resume` runs this in processes of their own: `make` fills memory that `measure` must not count.

    python jobs/resume_planning.py make FOLDER --rows 1000000 --files 1000
    python jobs/resume_planning.py measure FOLDER
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffedit_ray.dataset import records
from diffedit_ray.dataset.compaction import compact
from diffedit_ray.dataset.manifest import RowPlanner, derived_seed, manifest_files, manifest_schema, match_columns
from diffedit_ray.dataset.recorded import read_recorded
from diffedit_ray.dataset.records import EDITED, FAILED, UNCHANGED, OutputLayout
from diffedit_ray.dataset.scan import scan_manifest
from diffedit_ray.settings import EditSettings

T = TypeVar("T")

NEW = 1000
"""Rows of the manifest that are not recorded: a night's worth."""
SLICE = 100_000
REVISION = "0123456789abcdef"


def manifest_of(start: int, rows: int) -> pa.Table:
    """Rows as a catalogue has them."""
    numbers = range(start, start + rows)
    return pa.table(
        {
            "image_uri": [f"s3://catalogue/photos/{i % 997:03d}/{i:012d}.jpg" for i in numbers],
            "reference": [f"a table of wood, item {i}" for i in numbers],
            "query": [f"a table of marble, item {i}" for i in numbers],
            "sku": pa.array(numbers, pa.int64()),
        }
    )


def records_of(table: pa.Table, planner: RowPlanner, layout: OutputLayout, schema: pa.Schema) -> pa.Table:
    """The records of these rows: one in a hundred failed, one in fifty unchanged."""
    ids, fingerprints = planner.identify(table)
    count = len(ids)
    kinds = np.arange(count) % 100
    status = np.where(kinds == 0, FAILED, np.where(kinds < 3, UNCHANGED, EDITED))
    edited = status == EDITED
    code = np.where(kinds == 0, np.where(np.arange(count) % 200 == 0, "not_found", "timeout"), None)
    values: dict[str, Any] = {
        "id": ids,
        "fingerprint": fingerprints,
        "status": status,
        "error_code": code,
        "error_message": [
            f"{uri} did not arrive" if c else None for uri, c in zip(table["image_uri"], code, strict=True)
        ],
        "attempts": np.ones(count, np.int32),
        "edited_uri": [layout.image(i, "png") if yes else None for i, yes in zip(ids, edited, strict=True)],
        "mask_uri": [layout.mask(i) if yes else None for i, yes in zip(ids, edited, strict=True)],
        "seed": [derived_seed(str(uri)) for uri in table["image_uri"]],
        "model": pa.repeat(pa.scalar("some/model"), count),
        "model_revision": pa.repeat(pa.scalar(REVISION), count),
        "sha256": [f"{i}{i}" for i in ids],
        "recorded_at": pa.repeat(pa.scalar(datetime.now(UTC), pa.timestamp("us", "UTC")), count),
        **{name: table[name] for name in table.column_names},
        **EditSettings().model_dump(exclude={"seed"}),
    }
    columns = [_column(values.get(field.name), field.type, count) for field in schema]
    return pa.table(columns, schema=schema)


def _column(value: Any, kind: pa.DataType, count: int) -> Any:
    if value is None:
        return pa.nulls(count, kind)
    if isinstance(value, pa.Array | pa.ChunkedArray):
        return value.cast(kind)
    if isinstance(value, list | np.ndarray):
        return pa.array(value, kind)
    return pa.repeat(pa.scalar(value, kind), count)


def planner_for(manifest: str) -> RowPlanner:
    """As `run_edit_job` makes it."""
    columns = match_columns(manifest_schema(manifest_files(manifest)), {})
    return RowPlanner(columns, EditSettings(), REVISION, "png")


def make(folder: Path, rows: int, files: int) -> None:
    """Write a manifest of `rows` and the records of all but the last of them, in `files` files."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / "manifest.parquet"
    with pq.ParquetWriter(manifest, manifest_of(0, 1).schema) as writer:
        for start in range(0, rows, SLICE):
            writer.write_table(manifest_of(start, min(SLICE, rows - start)))
    planner = planner_for(str(manifest))
    layout = OutputLayout(str(folder / "out"))
    schema = records.record_schema(planner.columns.carried)
    done = max(rows - NEW, 1)
    size = -(-done // files)
    for start in range(0, done, size):
        table = manifest_of(start, min(size, done - start))
        records.write_table(layout, records_of(table, planner, layout, schema))


def measure(folder: Path) -> dict[str, Any]:
    """Seconds and peak memory of planning a resume and of concluding the run, step by step."""
    output, manifest = str(folder / "out"), str(folder / "manifest.parquet")
    base = _peak()
    steps: dict[str, dict[str, float]] = {}

    def step(name: str, run: Callable[[], T]) -> T:
        began, worked = time.perf_counter(), time.process_time()
        result = run()
        spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
        steps[name] = {**spent, "peak_mib_added": _peak() - base}
        return result

    planner = planner_for(manifest)
    schema = records.record_schema(planner.columns.carried)
    step("check the records' types", lambda: records.check_types(output, schema))
    scan = step("scan the manifest", lambda: scan_manifest(manifest_files(manifest), planner))
    recorded = step("read what is recorded", lambda: read_recorded(output))
    turns = step("choose the rows", lambda: scan.turns(recorded, retry_failed=True, retry_permanent=False))
    planning = {name: sum(s[name] for s in steps.values()) for name in ("seconds", "cpu_seconds")}
    added = _peak() - base
    step("merge the records", lambda: compact(output))
    again = step("read them again", lambda: read_recorded(output))
    found = step("reconcile", lambda: scan.reconcile(again, turns))
    return {
        "rows": len(scan.ids),
        "recorded": len(recorded.ids),
        "pending": int(np.count_nonzero(turns)),
        "unrecorded": len(found.missing),
        "planning_seconds": planning["seconds"],
        "planning_cpu_seconds": planning["cpu_seconds"],
        "planning_mib_added": added,
        "base_mib": base,
        "bytes_a_recorded_row": sum(a.nbytes for a in vars(recorded).values() if isinstance(a, np.ndarray))
        / max(1, len(recorded.ids)),
        "bytes_a_manifest_row": (scan.ids.nbytes + scan.prints.nbytes + scan.rows.nbytes) / max(1, len(scan.ids)),
        "bytes_shipped_a_row": turns.nbytes / max(1, len(turns)),
        "steps": steps,
    }


def _peak() -> float:
    """The most memory this process has held so far, in MiB."""
    try:
        # getrusage would count what the parent held at the fork
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    except OSError:
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return held / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=1000)
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder, args.rows, args.files)
    else:
        print(json.dumps(measure(args.folder)))


if __name__ == "__main__":
    main()
