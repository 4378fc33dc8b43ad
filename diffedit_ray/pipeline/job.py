"""Builds the dataset, runs it, sums it up."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from diffedit_ray.dataset import records, storage
from diffedit_ray.dataset.compaction import compact
from diffedit_ray.dataset.lease import Lease
from diffedit_ray.dataset.manifest import RowPlanner, manifest_files, manifest_folder, manifest_schema, match_columns
from diffedit_ray.dataset.recorded import read_recorded
from diffedit_ray.dataset.records import OutputLayout
from diffedit_ray.dataset.run_config import check_config, versions
from diffedit_ray.dataset.scan import Scan, Turns, scan_manifest
from diffedit_ray.dataset.spans import read_span
from diffedit_ray.diffusion.checkpoint import model_geometry, model_revision
from diffedit_ray.errors import DiffEditError, ManifestError, OutputError
from diffedit_ray.pipeline.cluster import IO_CPUS, replicas, start_ray
from diffedit_ray.pipeline.edit import Edit
from diffedit_ray.pipeline.fetch import Fetch
from diffedit_ray.pipeline.grouping import group_by_image
from diffedit_ray.pipeline.guard import known_replicas, start_ledger
from diffedit_ray.pipeline.interrupt import interruptible
from diffedit_ray.pipeline.plan import Plan, PlanPending, span_rows
from diffedit_ray.pipeline.preflight import check_images, check_model, check_output
from diffedit_ray.pipeline.rows import carried_fields, use_storage
from diffedit_ray.pipeline.store import Collect, Store
from diffedit_ray.pipeline.summary import JobSummary
from diffedit_ray.settings import EditSettings, JobSettings

if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)


def edit_dataset(
    ds: ray.data.Dataset,
    settings: EditSettings | None = None,
    *,
    model: str,
    job: JobSettings | None = None,
    base_uri: str = ".",
) -> ray.data.Dataset:
    """The pipeline as one lazy stage of somebody else's Ray Data program.

    Args:
        ds: Rows with the manifest's columns.
        settings: The method's settings; a row's own columns override them.
        model: A checkpoint folder or hub id.
        job: The run's settings; those of the output and of resuming do not apply here.
        base_uri: What relative image URIs are relative to.

    Returns:
        One row a row: its record, the carried columns, and ``edited_image`` and ``mask_image``,
        the encoded files (null unless edited).

    Raises:
        ManifestError: A required column is missing.
        ModelError: The checkpoint is not one.

    Example:
        >>> import ray
        >>> from diffedit_ray import EditSettings, edit_dataset
        >>> from diffedit_ray.demo import demo_manifest, demo_model
        >>> ds = ray.data.read_parquet(str(demo_manifest())).limit(2)
        >>> edited = edit_dataset(
        ...     ds, EditSettings(steps=10), model=str(demo_model()), base_uri=str(demo_manifest().parent)
        ... )
        >>> sorted(row["status"] for row in edited.take_all())
        ['edited', 'edited']
    """
    job = job or JobSettings()
    found = ds.schema()
    if found is None:
        raise ManifestError("the dataset is empty: it has no columns")
    schema = pa.schema(list(zip(found.names, (_arrow_type(t) for t in found.types), strict=True)))
    columns = match_columns(schema, job.columns)
    planner = RowPlanner(columns, settings or EditSettings(), model_revision(model), job.image_format)
    edited = _edited(ds, Plan(planner, model), model, job, storage.absolute(base_uri), start_ledger())
    collect = Collect(model_geometry(model), job, records.record_schema(carried_fields(columns)))
    return edited.map_batches(collect, batch_size=None, batch_format="pyarrow", num_cpus=IO_CPUS)


def _arrow_type(kind: Any) -> pa.DataType:
    return kind if isinstance(kind, pa.DataType) else pa.string() if kind is object else pa.from_numpy_dtype(kind)


def _edited(
    ds: ray.data.Dataset,
    plan: Plan | PlanPending,
    model: str,
    job: JobSettings,
    base_uri: str,
    ledger: Any,
    count: int | None = None,
) -> ray.data.Dataset:
    """plan → fetch → edit, lazily; `count` is how many rows there will be, if that is known."""
    import ray

    geometry = model_geometry(model)
    blocks: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    rows = ds.map_batches(plan, num_cpus=IO_CPUS, **blocks)
    # a block is a batch, from here to its record file: small enough to share out, and all that one bad block can hurt
    if job.group_by_image:
        rows = group_by_image(rows, job.batch_size, count)
    else:
        rows = rows.repartition(target_num_rows_per_block=job.batch_size)
    rows = rows.map_batches(Fetch(geometry, base_uri, job, ledger), num_cpus=IO_CPUS, **blocks)
    pool = replicas(job)
    if pool.gpus:  # Ray Data refuses a stage on GPUs without a batch size; this one leaves blocks as they are
        blocks["batch_size"] = job.batch_size
    return rows.map_batches(
        Edit,
        fn_constructor_kwargs={
            "source": model,
            "device": pool.device,
            "threads": pool.threads,
            "geometry": geometry,
            "job": job,
            "ledger": ledger,
        },
        compute=ray.data.ActorPoolStrategy(min_size=pool.least, max_size=pool.most, max_tasks_in_flight_per_actor=2),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
        **blocks,
    )


def run_edit_job(
    manifest: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str],
    settings: EditSettings | None = None,
    job: JobSettings | None = None,
    progress: Callable[[int, Mapping[str, int]], None] | None = None,
) -> JobSummary:
    """The whole job: edit every row of a manifest that has no record yet.

    Images and masks are written first and the record last, so that a run stopped anywhere
    is carried on by running it again.

    Args:
        manifest: A Parquet file, a folder of them or a glob.
        output: Where images, masks and records go.
        model: A checkpoint folder or hub id.
        settings: The method's settings.
        job: The run's settings.
        progress: Called with the number of rows to do and the counts by status so far.

    Raises:
        ManifestError: The manifest cannot be read, lacks a column, or repeats an id.
        ModelError: The checkpoint is not one.
        WrongOutputError: The output was made with another model, other settings or another image format.
        OutputError: The output cannot be written, another run is writing to it, or after the run rows and
            records do not match.
        DiffEditError: The run broke off; what it did until then is recorded.

    Example:
        >>> import tempfile
        >>> from diffedit_ray import EditSettings, JobSettings, run_edit_job
        >>> from diffedit_ray.demo import demo_manifest, demo_model
        >>> with tempfile.TemporaryDirectory() as output:
        ...     summary = run_edit_job(
        ...         demo_manifest(), output, model=demo_model(), settings=EditSettings(steps=10)
        ...     )
        >>> summary.edited > 20, summary.failed
        (True, 1)
    """
    with interruptible():
        return _run(os.fspath(manifest), os.fspath(output), os.fspath(model), settings, job, progress)


def _run(
    manifest: str,
    output: str,
    model: str,
    settings: EditSettings | None,
    job: JobSettings | None,
    progress: Callable[[int, Mapping[str, int]], None] | None,
) -> JobSummary:
    began = time.monotonic()
    started = datetime.now(UTC)
    settings, job = settings or EditSettings(), job or JobSettings()
    use_storage(job)
    manifest, output = storage.absolute(manifest), storage.absolute(output)
    model = storage.absolute(model) if os.path.isdir(os.path.expanduser(model)) else model
    revision = model_revision(model)
    files = manifest_files(manifest)
    schema = manifest_schema(files)
    columns = match_columns(schema, job.columns)
    planner = RowPlanner(columns, settings, revision, job.image_format)
    layout = OutputLayout(output)
    stored_schema = records.record_schema(carried_fields(columns))
    check_model(model)
    check_output(output)
    with Lease(output) as lease:
        if not job.overwrite:
            check_config(output, settings, revision, job.image_format)
            records.check_types(output, stored_schema)
        scan = scan_manifest(files, planner)
        if job.overwrite:  # only now that the manifest is known to be good
            _clear(layout)
        turns = scan.turns(read_recorded(output), retry_failed=job.retry_failed, retry_permanent=job.retry_permanent)
        pending = int(np.count_nonzero(turns))
        rows = len(scan.ids)
        summary = JobSummary(output, rows, duplicates=scan.total - rows, max_failed=job.max_failed)
        summary.done_before = rows - pending
        logger.info("%d rows, %d recorded already, %d to do", rows, summary.done_before, pending)
        records.write_json(
            layout.config,
            {
                "run": lease.run,
                "manifest": storage.shown(manifest),
                "output": storage.shown(output),
                "model": model,
                "model_revision": revision,
                "started_at": started.isoformat(),
                "rows": rows,
                "pending": pending,
                "settings": settings.model_dump(),
                "job": job.model_dump(mode="json"),
                "record_schema_version": records.SCHEMA_VERSION,
                "versions": versions(),
            },
        )
        broken: Exception | None = None
        ledger: Any = None
        try:
            if pending:
                base_uri = manifest_folder(manifest)
                check_images(_pending_images(scan, turns, schema, base_uri), max_bytes=job.max_bytes)
                start_ray()
                ledger = start_ledger()
                store = Store(model_geometry(model), job, layout, stored_schema, ledger)
                edited = _edited_rows(scan, turns, schema, model, job, base_uri, ledger)
                stored = edited.map_batches(store, batch_size=None, batch_format="pyarrow", num_cpus=IO_CPUS)
                _drain(stored, pending, summary, progress, lease)
        except KeyboardInterrupt:
            summary.interrupted = True
        except Exception as error:
            summary.error, broken = _reason(error), error
        summary.replicas = known_replicas(ledger)
        conclude(summary, scan, turns)
        summary.seconds = time.monotonic() - began
        ended = datetime.now(UTC).isoformat()
        told = {"run": lease.run, **asdict(summary), "exit_code": summary.exit_code, "ended_at": ended}
        records.write_json(layout.summary, told)
    if broken is not None:
        raise _told(broken, summary)
    if summary.error:
        raise OutputError(summary.error)
    return summary


def conclude(summary: JobSummary, scan: Scan, turns: Turns) -> None:
    """Merge the records of a run that has ended, and hold them against the manifest.

    What does not add up after a whole run is in `summary.error`. A run that broke off leaves its record files
    to the next one: some worker may still be writing.
    """
    whole = not summary.interrupted and summary.error is None
    try:
        if whole:
            compact(summary.output)
        found = scan.reconcile(read_recorded(summary.output), turns)
        summary.count(found)
        if whole:
            summary.error = found.complaint(scan)
    except DiffEditError as error:
        summary.error = summary.error or str(error)


def _clear(layout: OutputLayout) -> None:
    # records first: they must not outlive what they name, nor the configuration that says how they were made
    for part in ("records", "images", "masks"):
        storage.remove(storage.join(layout.root, part), recursive=True)
    for uri in (layout.config, layout.summary):  # the leases beside them stay
        storage.remove(uri)


def _pending_images(scan: Scan, turns: Turns, schema: pa.Schema, base_uri: str) -> Iterator[str]:
    """The image URIs of the rows that need work, of those rows that name one."""
    for span in scan.pending_spans(turns):
        own = turns[span.start : span.start + span.rows]
        for row in read_span(span, schema).filter(pa.array(own > 0)).to_pylist():
            planned = scan.planner.plan(row)
            if planned.error is None and planned.image_uri:
                yield storage.resolve(planned.image_uri, base_uri)


def _edited_rows(
    scan: Scan, turns: Turns, schema: pa.Schema, model: str, job: JobSettings, base_uri: str, ledger: Any
) -> ray.data.Dataset:
    """The rows of a manifest that need work, edited, lazily."""
    import ray

    spans = span_rows(scan.pending_spans(turns))
    ds = ray.data.from_items(spans, override_num_blocks=len(spans))
    # Ray would cut a batch of large pictures at a size that depends on which of them have failed, and a task that
    # is run again for a lost node must give as many blocks as before
    ds.context.target_max_block_size = None
    plan = PlanPending(Plan(scan.planner, model), schema, ray.put(turns), job)
    return _edited(ds, plan, model, job, base_uri, ledger, int(np.count_nonzero(turns)))


def _drain(
    stored: ray.data.Dataset,
    pending: int,
    summary: JobSummary,
    progress: Callable[[int, Mapping[str, int]], None] | None,
    lease: Lease,
) -> None:
    """Drive the rows through the stages, counting what comes out."""
    counts: Counter[str] = Counter()
    if progress is not None:
        progress(pending, counts)
    with closing(iter(stored.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))) as batches:
        for batch in batches:
            counts.update(batch["status"].to_pylist())
            summary.edited_now = sum(counts.values())
            _stop_if_lost(lease)
            if progress is not None:
                progress(pending, counts)
    _stop_if_lost(lease)  # merging, too, is for the run that has the output


def _stop_if_lost(lease: Lease) -> None:
    if lease.lost:
        raise OutputError(
            f"another run has taken {storage.shown(lease.output)} over, since this one had not renewed its lease in "
            "time; what it did until now is recorded"
        )


def _reason(error: Exception) -> str:
    """What broke a run, in one line: of a worker's traceback the last, which says it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return storage.shown(lines[-1]) if lines else type(error).__name__


def _told(error: Exception, summary: JobSummary) -> Exception:
    """What to raise for what broke a run: Ray's own errors read as the traceback of a worker."""
    from ray.exceptions import RayError

    if not isinstance(error, RayError):
        return error
    told = DiffEditError(f"the run broke off: {summary.error}")
    told.__cause__ = error
    return told
