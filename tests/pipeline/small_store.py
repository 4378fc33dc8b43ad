"""A job whose pictures are many times what Ray's object store holds, in a process and a Ray of its own.

Run as a module with the checkpoint, a folder, the number of rows, rows a batch and the store's size in MiB; prints
one JSON object: MiB of one batch, and after each batch the rows recorded, and MiB in the store and spilled to disk.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import Image
from ray._private.internal_api import memory_summary

from diffedit_ray import EditSettings, JobSettings, run_edit_job
from tests.pipeline.rows import row

SIDE = 1500
PICTURES = 4
QUICKEST = EditSettings(steps=2, mask_maps=1, mask_significance=0)


def _store_mib() -> tuple[int, int]:
    """MiB of the object store in use, and spilled to disk since it was started."""
    told = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
    used, spilled = (re.search(pattern, told) for pattern in (r"usage (\d+) MiB", r"Spilled (\d+) MiB"))
    return int(used[1]) if used else 0, int(spilled[1]) if spilled else 0


def main(model: str, folder: Path, rows: int, batch_size: int, store_mib: int) -> None:
    """Run the job."""
    for i in range(PICTURES):
        pixels = np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png", compress_level=0)
    manifest = [row(f"{i % PICTURES}.png", f"a cat {i}") for i in range(rows)]
    pq.write_table(pa.Table.from_pylist(manifest), folder / "m.parquet")
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=store_mib * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    seen: list[tuple[int, int, int]] = []

    def progress(total: int, counts: Mapping[str, int]) -> None:
        seen.append((sum(counts.values()), *_store_mib()))

    job = JobSettings(batch_size=batch_size, image_format="jpg", device="cpu")
    summary = run_edit_job(
        folder / "m.parquet", folder / "out", model=model, settings=QUICKEST, job=job, progress=progress
    )
    batch = batch_size * (folder / "0.png").stat().st_size / 2**20
    print(json.dumps({"edited": summary.edited, "batch": batch, "seen": seen}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *(int(given) for given in sys.argv[3:]))
