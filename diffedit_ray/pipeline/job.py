"""Builds the dataset, runs it, sums it up."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from diffedit_ray.dataset import records, storage
from diffedit_ray.dataset.manifest import (
    Columns,
    RowPlanner,
    iterate_manifest,
    manifest_files,
    manifest_folder,
    manifest_schema,
    match_columns,
)
from diffedit_ray.dataset.records import FAILED, Done, OutputLayout
from diffedit_ray.diffusion.model import model_geometry, model_revision
from diffedit_ray.errors import DiffEditError, ManifestError, OutputError
from diffedit_ray.pipeline.cluster import IO_CPUS, replicas, start_ray
from diffedit_ray.pipeline.guard import start_ledger
from diffedit_ray.pipeline.interrupt import interruptible
from diffedit_ray.pipeline.stages import Collect, Edit, Fetch, Plan, Store, carried_fields, use_storage
from diffedit_ray.settings import EditSettings, JobSettings

if TYPE_CHECKING:
    import ray.data

logger = logging.getLogger(__name__)

SHOWN_IDS = 10


@dataclass
class JobSummary:
    """How a run ended.

    Attributes:
        output: Where the results are.
        rows: Distinct rows in the manifest.
        duplicates: Further rows equal to one of those in everything; edited once.
        done_before: Rows that were recorded already and cost nothing now.
        edited, unchanged, failed: Records of the manifest's rows, by status, after the run.
        errors: Error code -> failed rows.
        seconds: The run's duration.
        edited_now: Rows this run worked on.
        interrupted: Whether it was stopped from outside.
        max_failed: The share of failed rows the user accepts.
        error: Why the run broke off, if it did.
    """

    output: str
    rows: int
    duplicates: int = 0
    done_before: int = 0
    edited: int = 0
    unchanged: int = 0
    failed: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    edited_now: int = 0
    interrupted: bool = False
    max_failed: float = 1.0
    error: str | None = None

    @property
    def exit_code(self) -> int:
        """0 fine, 1 broken off, 3 more failures than accepted, 130 interrupted."""
        if self.interrupted:
            return 130
        if self.error:
            return 1
        return 3 if self.rows and self.failed / self.rows > self.max_failed else 0


@dataclass(frozen=True)
class _Plan:
    """What the driver knows of a manifest before any work is done."""

    ids: set[str]
    pending: int
    duplicates: int


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
    edited = _edited(ds, planner, model, job, storage.absolute(base_uri), None, start_ledger())
    collect = Collect(model_geometry(model), job, records.record_schema(carried_fields(columns)))
    return edited.map_batches(collect, batch_size=None, batch_format="pyarrow", num_cpus=IO_CPUS)


def _arrow_type(kind: Any) -> pa.DataType:
    return kind if isinstance(kind, pa.DataType) else pa.string() if kind is object else pa.from_numpy_dtype(kind)


def _edited(
    ds: ray.data.Dataset,
    planner: RowPlanner,
    model: str,
    job: JobSettings,
    base_uri: str,
    done: Done | None,
    ledger: Any,
) -> ray.data.Dataset:
    """plan → fetch → edit, lazily."""
    import ray

    geometry = model_geometry(model)
    blocks: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    plan = Plan(planner, model, None if done is None else ray.put(done))
    rows = ds.map_batches(plan, num_cpus=IO_CPUS, **blocks)
    # a block is a batch, from here to its record file: small enough to share out, and all that one bad block can hurt
    rows = rows.repartition(target_num_rows_per_block=job.batch_size)
    rows = rows.map_batches(Fetch(geometry, base_uri, job, ledger), num_cpus=IO_CPUS, **blocks)
    pool = replicas(job)
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
        OutputError: The output cannot be written, or after the run a row has no record.
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
    done = Done({}, {})
    if not job.overwrite:
        records.check_types(output, records.record_schema(carried_fields(columns)))
        done = records.read_done(output, job.retry_failed)
    plan = _plan(files, columns, planner, done)
    if job.overwrite:  # only now that the manifest is known to be good
        for part in ("records", "images", "masks", "_run"):
            storage.remove(storage.join(output, part), recursive=True)
    summary = JobSummary(output, rows=len(plan.ids), duplicates=plan.duplicates, max_failed=job.max_failed)
    summary.done_before = len(plan.ids) - plan.pending
    logger.info("%d rows, %d recorded already, %d to do", summary.rows, summary.done_before, plan.pending)
    records.write_json(
        layout.config,
        {
            "manifest": storage.shown(manifest),
            "output": storage.shown(output),
            "model": model,
            "model_revision": revision,
            "started_at": started.isoformat(),
            "settings": settings.model_dump(),
            "job": job.model_dump(mode="json"),
            "record_schema_version": records.SCHEMA_VERSION,
            "versions": _versions(),
        },
    )
    try:
        if plan.pending:
            start_ray()
            ds = _read(files, schema)
            ledger = start_ledger()
            edited = _edited(ds, planner, model, job, manifest_folder(manifest), done, ledger)
            store = Store(model_geometry(model), job, layout, records.record_schema(carried_fields(columns)), ledger)
            stored = edited.map_batches(store, batch_size=None, batch_format="pyarrow", num_cpus=IO_CPUS)
            _drain(stored, plan.pending, summary, progress)
    except KeyboardInterrupt:
        summary.interrupted = True
    except Exception as error:
        from ray.exceptions import RayError

        summary.error = _reason(error)
        if isinstance(error, RayError):  # its text is the traceback of a worker
            raise DiffEditError(f"the run broke off: {summary.error}") from error
        raise
    finally:
        records.compact(output)
        unrecorded = _count(summary, plan.ids)
        missing = [] if summary.interrupted or summary.error else unrecorded
        if missing:
            summary.error = (
                f"{len(missing)} rows have no record after the run: {_shown(missing)}. "
                "Run the same command again; if it happens twice, please report it"
            )
        summary.seconds = time.monotonic() - began
        ended = datetime.now(UTC).isoformat()
        records.write_json(layout.summary, {**asdict(summary), "exit_code": summary.exit_code, "ended_at": ended})
    if missing:
        raise OutputError(summary.error)
    return summary


def _read(files: list[str], schema: pa.Schema) -> ray.data.Dataset:
    """The manifest's rows, lazily."""
    import ray.data

    fs, _ = storage.filesystem(files[0])
    paths = [storage.filesystem(file)[1] for file in files]
    return ray.data.read_parquet(
        paths,
        filesystem=storage.arrow_filesystem(fs),
        # the driver has chosen the files and seen all their columns; Ray would sample and filter them, and parse paths
        schema=schema,
        file_extensions=None if storage.is_web(files[0]) else sorted({path.rsplit(".", 1)[-1] for path in paths}),
        partitioning=None,
    )


def _drain(
    stored: ray.data.Dataset,
    pending: int,
    summary: JobSummary,
    progress: Callable[[int, Mapping[str, int]], None] | None,
) -> None:
    """Drive the rows through the stages, counting what comes out."""
    counts: Counter[str] = Counter()
    if progress is not None:
        progress(pending, counts)
    with closing(iter(stored.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))) as batches:
        for batch in batches:
            counts.update(batch["status"].to_pylist())
            summary.edited_now = sum(counts.values())
            if progress is not None:
                progress(pending, counts)


def _plan(files: list[str], columns: Columns, planner: RowPlanner, done: Done) -> _Plan:
    """Read the manifest once on the driver: count it, and refuse an id that names two different rows."""
    fingerprints: dict[str, str] = {}
    repeated: list[str] = []
    duplicates = pending = 0
    for table in iterate_manifest(files, list(columns.source.values())):
        for row in table.to_pylist():
            planned = planner.plan(row)
            known = fingerprints.get(planned.id)
            if known is None:
                fingerprints[planned.id] = planned.fingerprint
                pending += done.fingerprints.get(planned.id) != planned.fingerprint
            elif known == planned.fingerprint:
                duplicates += 1
            else:
                repeated.append(planned.id)
    if repeated:
        raise ManifestError(
            f"{len(repeated)} rows repeat the id of an earlier, different row: {_shown(repeated)}. "
            "Ids must be unique; without an id column they are derived"
        )
    if not fingerprints:
        logger.warning("the manifest has no rows")
    return _Plan(set(fingerprints), pending, duplicates)


def _count(summary: JobSummary, ids: set[str]) -> list[str]:
    """Count the manifest's rows by status; returns those without a record, of which a whole run leaves none."""
    table = records.read_records(summary.output, ["id", "status", "error_code"])
    statuses: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for row in table.to_pylist():
        if row["id"] in ids:
            statuses[row["status"]] += 1
            if row["status"] == FAILED:
                errors[row["error_code"]] += 1
    summary.edited, summary.unchanged, summary.failed = (statuses[s] for s in records.STATUSES)
    summary.errors = dict(errors.most_common())
    return sorted(ids.difference(table["id"].to_pylist()))


def _reason(error: Exception) -> str:
    """What broke a run, in one line: of a worker's traceback the last, which says it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return storage.shown(lines[-1]) if lines else type(error).__name__


def _shown(ids: list[str]) -> str:
    return ", ".join(ids[:SHOWN_IDS]) + (", …" if len(ids) > SHOWN_IDS else "")


def _versions() -> dict[str, str]:
    packages = ("diffedit_ray", "ray", "torch", "diffusers", "transformers", "pyarrow", "fsspec", "pillow")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
