"""How well the pipeline keeps many replicas busy, by simulation: the real job with an edit stage that sleeps."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.sleeper import sleeping_edit
from benchmarks.timeline import BATCH, Span, edit_stage, read_timeline
from diffedit_ray import EditSettings, JobSettings, run_edit_job
from diffedit_ray.demo import demo_model
from diffedit_ray.pipeline.cluster import Replicas, replicas, start_ray

IO_CPUS = 2
"""Logical CPUs, all of them for planning, fetching and storing: Ray starts a process for whatever may run at once."""
START_SECONDS = 900.0
"""How long all replicas may take to start before the first batch is given out."""
PICTURES = 16


def scaling(args: argparse.Namespace) -> None:
    """Utilisation of simulated replicas that sleep instead of editing, and what they cost the driver."""
    runs = []
    for count in args.replicas:
        rows = count * args.batches * args.batch
        print(f"{count} replicas: {rows} rows in batches of {args.batch}, {args.seconds:g} s each", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
            runs.append(simulate(Path(scratch), count, args))
        print(f"{count} replicas: {100 * runs[-1]['utilisation']:.1f} % busy", file=sys.stderr)
    found = {
        "seconds_a_batch": args.seconds,
        "rows_a_batch": args.batch,
        "runs": runs,
        "extrapolated": extrapolate(runs, args.extrapolate, args.seconds),
        "machine": machine(),
    }
    print_tables(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


@dataclass
class HeadCosts:
    """CPU seconds of the processes that every batch of a cluster passes through, sampled as batches are done.

    The driver runs Ray Data's scheduling, the ledger is the one actor that all guards ask, and the GCS is Ray's own
    book-keeper. Called as a job's `progress`.
    """

    samples: list[dict[str, float]] = field(default_factory=list)
    _processes: dict[str, psutil.Process] = field(default_factory=dict)

    def __call__(self, pending: int, counts: Mapping[str, int]) -> None:
        """Sample once a stored batch."""
        if not sum(counts.values()):
            return
        if not self._processes:
            self._processes = _head_processes()
        times = {name: process.cpu_times() for name, process in self._processes.items()}
        self.samples.append({name: spent.user + spent.system for name, spent in times.items()})

    def per_batch(self) -> dict[str, float]:
        """CPU seconds a batch, of each process, over the later half of the batches: the earlier pay for the start."""
        later = self.samples[len(self.samples) // 2 :]
        first, last = later[0], later[-1]
        return {name: (last[name] - first[name]) / max(1, len(later) - 1) for name in first}


def _head_processes() -> dict[str, psutil.Process]:
    found = {"driver": psutil.Process()}
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if command.startswith("ray::Ledger"):
            found["ledger"] = process
        elif "gcs_server" in command.split(" ")[0]:
            found["gcs"] = process
    return found


def simulate(scratch: Path, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """The job on a Ray that believes to have a GPU for each replica; what became of their time."""
    log = scratch / "timeline"
    log.mkdir()
    manifest = write_manifest(scratch, count * args.batches * args.batch)
    # with so many workers on a few cores Ray would take one that starts slowly for dead
    os.environ.setdefault("RAY_worker_register_timeout_seconds", str(int(START_SECONDS)))
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # as `start_ray` has it where it starts Ray itself
    ray.init(
        address="local",
        num_cpus=IO_CPUS,
        num_gpus=count,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
    )
    try:
        start_ray()
        # a cluster's replicas start at the same time; on a few cores they start one after the other
        ray.data.DataContext.get_current().wait_for_min_actors_s = START_SECONDS
        costs = HeadCosts()
        job = JobSettings(batch_size=args.batch, min_actors=count, max_actors=count)
        began = time.time()
        with edit_stage(sleeping_edit(log, args.seconds)), _without_cpus():
            summary = run_edit_job(
                manifest,
                scratch / "out",
                model=demo_model(),
                settings=EditSettings(resolution=32),  # the smallest the model takes
                job=job,
                progress=costs,
            )
        seconds = time.time() - began
    finally:
        ray.shutdown()
    if summary.edited != count * args.batches * args.batch:
        raise SystemExit(f"only {summary.edited} rows came through: nothing to report")
    spans = [span for span in read_timeline(log) if span.kind == BATCH]
    return {"replicas": count, "job_seconds": seconds, **utilisation(spans, count), "cpu": costs.per_batch()}


@contextmanager
def _without_cpus() -> Iterator[None]:
    """Replicas of jobs begun inside the block ask for no CPU: their nodes would bring more than this machine has."""

    def asking_for_none(job: JobSettings) -> Replicas:
        return replace(replicas(job), cpus=0.0)

    with mock.patch("diffedit_ray.pipeline.job.replicas", asking_for_none):
        yield


def write_manifest(folder: Path, rows: int) -> Path:
    """A manifest of `rows` over a few tiny pictures."""
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    table = {
        "id": [f"row-{i:07d}" for i in range(rows)],
        "image_uri": [f"{i % PICTURES}.png" for i in range(rows)],
        "reference": ["a horse on grass"] * rows,
        "query": ["a zebra on grass"] * rows,
    }
    path = folder / "manifest.parquet"
    pq.write_table(pa.table(table), path)
    return path


def utilisation(spans: list[Span], replicas: int) -> dict[str, float]:
    """Of the replicas' time between the first batch's beginning and the last one's end, the share they worked.

    Args:
        spans: Their batches.
        replicas: How many there are; one that never got a batch counts as idle.

    Returns:
        That, and the same of the time in which all had work: from when the last of them began its first batch to when
        the first of them ended its last one. The difference is the beginning and the end, which a longer run has
        no more of.
    """
    begin, end = min(span.begin for span in spans), max(span.end for span in spans)
    own: dict[int, list[Span]] = {}
    for span in spans:
        own.setdefault(span.replica, []).append(span)
    low = max(min(span.begin for span in held) for held in own.values())
    high = min(max(span.end for span in held) for held in own.values())
    busy = sum(max(0.0, min(span.end, high) - max(span.begin, low)) for span in spans)
    return {
        "batches": len(spans),
        "elapsed": end - begin,
        "batches_a_second": len(spans) / (end - begin),
        "utilisation": sum(span.seconds for span in spans) / (replicas * (end - begin)),
        "utilisation_between": busy / (replicas * (high - low)) if high > low else float("nan"),
        "replicas_used": len(own),
    }


def extrapolate(runs: list[dict[str, Any]], replicas: int, seconds: float) -> dict[str, Any]:
    """What the head's processes would need at more replicas than ran. An extrapolation, not a measurement.

    Args:
        runs: From `simulate`.
        replicas: How many.
        seconds: A batch takes.

    Returns:
        Of each process the CPU seconds a batch, and the cores it would need. A batch is taken to cost what it cost at
        the most replicas that ran; where that is less than the clock's hundredth of a second tells, it fills no core.
    """
    most = max(runs, key=lambda run: run["replicas"])
    rate = replicas / seconds
    found: dict[str, Any] = {"replicas": replicas, "batches_a_second": rate, "from_replicas": most["replicas"]}
    for name, cost in most["cpu"].items():
        full = seconds / cost if cost else None
        found[name] = {"cpu_a_batch": cost, "cores": cost * rate, "replicas_at_one_core": full}
    return found


def print_tables(found: dict[str, Any]) -> None:
    """Utilisation at each count, and the extrapolation, named as one."""
    console = Console(width=120)
    heads = ["replicas", "batches", "busy", "busy while all had work", "batches/s", "driver CPU ms a batch"]
    table = Table(*heads, "ledger", "GCS", title=f"batches of {found['seconds_a_batch']:g} s, simulated")
    for run in found["runs"]:
        shares = (f"{100 * run[name]:.1f} %" for name in ("utilisation", "utilisation_between"))
        costs = (f"{1e3 * run['cpu'].get(name, float('nan')):.1f}" for name in ("driver", "ledger", "gcs"))
        table.add_row(str(run["replicas"]), str(run["batches"]), *shares, f"{run['batches_a_second']:.2f}", *costs)
    console.print(table)
    e = found["extrapolated"]
    console.print(
        f"Extrapolated, not run: {e['replicas']} replicas are {e['batches_a_second']:.0f} batches/s. At the cost a "
        f"batch had with {e['from_replicas']} replicas:"
    )
    for name in ("driver", "ledger", "gcs"):
        if name in e:
            full = e[name]["replicas_at_one_core"]
            until = "too little to be measured" if full is None else f"one core is full at {full:.0f} replicas"
            console.print(f"  {name}: {e[name]['cores']:.2f} cores; {until}")
