"""The whole Ray job against the bare engine, on the same rows, settings and threads, in one run."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from datetime import UTC
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.measure import timed
from benchmarks.timeline import BATCH, START, Span, edit_stage, has_rows, note, read_timeline
from benchmarks.workload import Row, columns, demo_rows
from diffedit_ray import EditSettings, JobSettings, run_edit_job
from diffedit_ray.dataset.records import read_records
from diffedit_ray.demo import demo_images, demo_manifest, demo_model, demo_scenes, demo_settings
from diffedit_ray.diffusion.checkpoint import model_geometry
from diffedit_ray.diffusion.model import resolve_device
from diffedit_ray.pipeline.cluster import start_ray
from diffedit_ray.pipeline.edit import Edit

ENGINE = ("mask", "encode", "decode")
STAGES = ("fetch", *ENGINE, "store")


def timed_edit(folder: Path) -> type:
    """The edit stage, with its times written to a folder of this machine."""

    class TimedEdit(Edit):
        """`Edit`, watched."""

        def __init__(self, *args: Any, **options: Any) -> None:
            began = time.time()
            super().__init__(*args, **options)
            note(folder, START, began, time.time())

        def __call__(self, table: pa.Table) -> pa.Table:
            """As `Edit.__call__`."""
            began = time.time()
            edited = super().__call__(table)
            if has_rows(table):
                note(folder, BATCH, began, time.time(), len(table))
            return edited

    return TimedEdit


def write_manifest(path: Path, rows: list[Row]) -> None:
    """The rows as a manifest over the shipped pictures, each with an id and a seed of its own."""
    names = pq.read_table(demo_scenes())["name"].to_pylist()
    folder = demo_manifest().parent / "images"
    table = {
        "id": [f"row-{i:06d}" for i in range(len(rows))],
        "image_uri": [str(folder / f"{names[i % len(names)]}.png") for i in range(len(rows))],
        "reference": [row.reference for row in rows],
        "query": [row.query for row in rows],
        "seed": [row.seed for row in rows],
    }
    pq.write_table(pa.table(table), path)


def edit_bare(stage: Edit, rows: list[Row], settings: EditSettings, batch: int) -> float:
    """Seconds the stage's own editor takes for the rows, without Ray or files."""
    with timed(stage.editor.model.device) as spent:
        for start in range(0, len(rows), batch):
            stage.editor.edit(*columns(rows[start : start + batch]), settings=settings)
    return spent[0]


def pipeline(args: argparse.Namespace) -> None:
    """Edits a second of the whole Ray job against the bare engine, and where the rest goes."""
    model = str(demo_model()) if args.model == "demo" else args.model
    settings = demo_settings() if args.model == "demo" else EditSettings(mask_significance=0)
    settings = settings.with_overrides({"steps": args.steps})
    threads = args.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    job = JobSettings(
        batch_size=args.batch, min_actors=1, max_actors=1, device=args.device, dtype=args.dtype, threads=threads
    )
    # the pictures' own size: fitting them to the model's is work that both sides do
    rows = demo_rows(args.rows, next(iter(demo_images().values())).shape[0])
    half = len(rows) // 2 // args.batch * args.batch or len(rows)

    def bare(part: list[Row]) -> float:
        if not part:
            return 0.0
        stage = Edit(model, str(resolve_device(args.device)), threads, model_geometry(model), job)
        edit_bare(stage, part[: args.batch], settings.with_overrides({"steps": 2}), args.batch)
        print(f"bare engine: {len(part)} rows", file=sys.stderr)
        spent = edit_bare(stage, part, settings, args.batch)
        del stage
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return spent

    # half of them before the job and half after it, so that a machine that slows down meanwhile meets both sides
    before = bare(rows[:half])
    with tempfile.TemporaryDirectory() as scratch:
        times = run_job(Path(scratch), rows, model, settings, job)
    after = bare(rows[half:])
    found = {
        "rows": len(rows),
        "batch": args.batch,
        "model": args.model,
        "settings": settings.model_dump(),
        "machine": machine(resolve_device(args.device)),
        "bare_halves": [half / before, (len(rows) - half) / after if after else None],
        **account(times, before + after, len(rows)),
    }
    print_account(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def run_job(scratch: Path, rows: list[Row], model: str, settings: EditSettings, job: JobSettings) -> dict[str, Any]:
    """The job on its own Ray, and when it did what."""
    manifest, output, log = scratch / "manifest.parquet", scratch / "out", scratch / "timeline"
    log.mkdir()
    write_manifest(manifest, rows)
    print(f"the whole job: {len(rows)} rows", file=sys.stderr)
    began = time.time()
    start_ray()
    ready = time.time()
    with edit_stage(timed_edit(log)):
        summary = run_edit_job(manifest, output, model=model, settings=settings, job=job)
    ended = time.time()
    ray.shutdown()
    if summary.failed or summary.edited + summary.unchanged != len(rows):
        raise SystemExit(f"of {len(rows)} rows {summary.edited} edited, {summary.failed} failed: nothing to compare")
    recorded = read_records(str(output), ["recorded_at", "status", *(f"{stage}_seconds" for stage in STAGES)])
    return {
        "began": began,
        "ready": ready,
        "ended": ended,
        "timeline": read_timeline(log),
        "recorded": pc.max(recorded["recorded_at"]).as_py().replace(tzinfo=UTC).timestamp(),
        "stages": {stage: pc.sum(recorded[f"{stage}_seconds"]).as_py() or 0.0 for stage in STAGES},
        "edited": summary.edited,
    }


def account(times: dict[str, Any], bare: float, rows: int) -> dict[str, Any]:
    """What became of the job's seconds, from the first batch's beginning to the end.

    Args:
        times: From `run_job`.
        bare: Seconds the bare engine took for the same rows.
        rows: How many.

    Returns:
        Rates, their ratio, the start-up and the rest in seconds; the parts of the rest add up to what the job took
        longer than the bare engine.
    """
    timeline: list[Span] = times["timeline"]
    batches = [span for span in timeline if span.kind == BATCH]
    start = next(span for span in timeline if span.kind == START)
    first, last = batches[0].begin, max(span.end for span in batches)
    busy = sum(span.seconds for span in batches)
    engine = sum(times["stages"][stage] for stage in ENGINE)
    elapsed = times["ended"] - first
    return {
        "edited": times["edited"],
        "bare_edits_per_second": rows / bare,
        "job_edits_per_second": rows / elapsed,
        "ratio": bare / elapsed,
        "start_up": {
            "Ray starts": times["ready"] - times["began"],
            "the driver plans, the actor's process starts": start.begin - times["ready"],
            "the actor imports torch and loads the model": start.seconds,
            "the first batch is fetched": max(0.0, first - start.end),
        },
        "stage_seconds": times["stages"],
        "batches": len(batches),
        "actor_idle_share": 1 - busy / (last - first),
        "rest": {
            "the three steps, slower than alone": engine - bare,
            "in the actor around them": busy - engine,
            "the actor waits for its next batch": last - first - busy,
            "the last batch is stored": times["recorded"] - last,
            "records are merged and checked": times["ended"] - times["recorded"],
        },
        "rest_in_all": elapsed - bare,
    }


def print_account(found: dict[str, Any]) -> None:
    """The ratio, and where the rest goes."""
    console = Console(width=110)
    console.print(
        f"bare engine {found['bare_edits_per_second']:.3f} edits/s, whole job {found['job_edits_per_second']:.3f} "
        f"edits/s from its first batch to its end: [bold]{100 * found['ratio']:.1f} %[/bold] of the bare engine "
        f"({found['rows']} rows, {found['edited']} of them edited, batches of {found['batch']})",
        soft_wrap=True,  # a sentence to search for must not break where the figures are long
    )
    table = Table("start-up", "seconds")
    for name, seconds in found["start_up"].items():
        table.add_row(name, f"{seconds:.1f}")
    console.print(table)
    whole = found["rows"] / found["job_edits_per_second"]
    table = Table("where the rest of the job's time goes", "seconds", "of the job")
    for name, seconds in {**found["rest"], "all in all": found["rest_in_all"]}.items():
        table.add_row(name, f"{seconds:.2f}", f"{100 * seconds / whole:.1f} %")
    console.print(table)
    table = Table("stage", "seconds, all rows", "ms a row")
    for name, seconds in found["stage_seconds"].items():
        table.add_row(name, f"{seconds:.1f}", f"{1e3 * seconds / found['rows']:.1f}")
    console.print(table)
