"""Whether an actor's memory grows with the batches it has edited.

    python jobs/memory_growth.py                          1,000 batches on the embedded model
    python jobs/memory_growth.py --model FOLDER --batches 200

Runs the pipeline's own fetch and edit stages in this process, every batch with texts and seeds of its own, and prints
the resident memory after each tenth of them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from diffedit_ray.dataset.manifest import RowPlanner, match_columns
from diffedit_ray.demo import demo_model
from diffedit_ray.diffusion.checkpoint import model_geometry, model_revision
from diffedit_ray.pipeline.edit import Edit
from diffedit_ray.pipeline.fetch import Fetch
from diffedit_ray.pipeline.plan import Plan
from diffedit_ray.settings import EditSettings, JobSettings

QUICK = EditSettings(steps=2, mask_maps=1, mask_significance=0)
"""As little work a batch as takes part in every step of the method."""


def resident_mib() -> float:
    """This process's resident memory in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def growth(model: str, batches: int, rows: int, every: int, threads: int | None = None) -> Iterator[tuple[int, float]]:
    """Edit batches, one after another, as one actor does.

    Args:
        model: A checkpoint folder.
        batches: How many.
        rows: In each; they are on two pictures of different shapes.
        every: Batches between two measurements.
        threads: Torch's.

    Yields:
        Batches done, and resident memory in MiB.

    Raises:
        RuntimeError: A row was not edited, so that this would measure nothing.
    """
    geometry, job = model_geometry(model), JobSettings(batch_size=rows)
    edit = Edit(model, "cpu", threads, geometry, job)
    columns = match_columns(pa.schema([(name, pa.string()) for name in ("image_uri", "reference", "query")]), {})
    plan = Plan(RowPlanner(columns, QUICK, model_revision(model), job.image_format), model)
    with tempfile.TemporaryDirectory() as folder:
        draw = np.random.default_rng(0)
        for name, shape in (("a.png", (96, 96, 3)), ("b.png", (96, 160, 3))):
            Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(Path(folder, name))
        fetch = Fetch(geometry, folder, job)
        for done in range(1, batches + 1):
            manifest = [
                {"image_uri": "ab"[i % 2] + ".png", "reference": f"thing {done}", "query": f"thing {done} {i}"}
                for i in range(rows)
            ]
            edited = edit(fetch(plan(pa.Table.from_pylist(manifest))))
            if set(edited["status"].to_pylist()) != {"edited"}:
                raise RuntimeError(f"batch {done}: {edited['error_message'].to_pylist()}")
            if done % every == 0:
                yield done, resident_mib()


def main() -> None:
    """Run `growth` and print what it finds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo_model()), help="checkpoint folder (default: the embedded one)")
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=4, help="rows a batch")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    given = parser.parse_args()
    first = None
    print(f"before: {resident_mib():.1f} MiB")
    for done, mib in growth(given.model, given.batches, given.rows, max(1, given.batches // 10), given.threads):
        first = first or (done, mib)
        print(f"{done:6} batches: {mib:.1f} MiB", flush=True)
    if first is not None and done > first[0]:
        print(f"{1024 * (mib - first[1]) / (done - first[0]):+.2f} KiB a batch after the first {first[0]}")


if __name__ == "__main__":
    main()
