"""The stages one after another, without Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from diffedit_ray.dataset import records
from diffedit_ray.dataset.manifest import RowPlanner, match_columns
from diffedit_ray.dataset.records import OutputLayout
from diffedit_ray.diffusion.checkpoint import model_geometry
from diffedit_ray.pipeline.edit import Edit
from diffedit_ray.pipeline.fetch import Fetch
from diffedit_ray.pipeline.plan import Plan
from diffedit_ray.pipeline.rows import carried_fields
from diffedit_ray.pipeline.store import Collect, Store
from diffedit_ray.settings import EditSettings, JobSettings
from tests.pipeline.rows import QUICK

Rows = Sequence[Mapping[str, Any]]


class Line:
    """The stages, with one replica, a folder of images and an output."""

    def __init__(self, edit: Edit, model: str, folder: Path, output: Path, job: JobSettings | None = None) -> None:
        self.edit, self.model, self.folder = edit, model, folder
        self.layout, self.job = OutputLayout(str(output)), job or JobSettings()
        self.geometry = model_geometry(model)

    def plan(self, rows: Rows, settings: EditSettings = QUICK) -> pa.Table:
        names = dict.fromkeys(name for r in rows for name in r)
        table = pa.table({name: [r.get(name) for r in rows] for name in names})
        self.columns = match_columns(table.schema, {})
        return Plan(RowPlanner(self.columns, settings, "r1", self.job.image_format), self.model)(table)

    def fetch(self, rows: Rows, settings: EditSettings = QUICK) -> pa.Table:
        return Fetch(self.geometry, str(self.folder), self.job)(self.plan(rows, settings))

    def edited(self, rows: Rows, settings: EditSettings = QUICK) -> pa.Table:
        return self.edit(self.fetch(rows, settings))

    def store(self, table: pa.Table) -> list[dict[str, Any]]:
        schema = records.record_schema(carried_fields(self.columns))
        report = Store(self.geometry, self.job, self.layout, schema)(table)
        stored = {r["id"]: r for r in records.read_records(self.layout.root).to_pylist()}
        assert report["id"].to_pylist() == table["id"].to_pylist()
        assert report["status"].to_pylist() == [stored[i]["status"] for i in report["id"].to_pylist()]
        return [stored[i] for i in report["id"].to_pylist()]

    def collect(self, table: pa.Table) -> list[dict[str, Any]]:
        schema = records.record_schema(carried_fields(self.columns))
        rows: list[dict[str, Any]] = Collect(self.geometry, self.job, schema)(table).to_pylist()
        return rows


def statuses(table: pa.Table) -> list[tuple[str, str | None]]:
    """Status and error code of each row."""
    return list(zip(table["status"].to_pylist(), table["error_code"].to_pylist(), strict=True))
