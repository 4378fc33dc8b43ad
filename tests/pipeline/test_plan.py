from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffedit_ray.dataset.manifest import RowPlanner, manifest_files, manifest_schema, match_columns
from diffedit_ray.dataset.scan import scan_manifest
from diffedit_ray.pipeline.plan import Plan, PlanPending, span_rows
from diffedit_ray.pipeline.rows import carried_fields, work_schema
from diffedit_ray.settings import JobSettings
from tests.pipeline.line import Line
from tests.pipeline.rows import QUICK, row


def test_carried_columns_keep_their_types_and_step_aside_for_ours(line: Line) -> None:
    rows = [row("square.png", status="new", manifest_status="old", tags=["a", "b"], _edited=1, price=None)]
    table = line.plan(rows)
    carried = [f.name for f in carried_fields(line.columns)]
    assert carried == ["manifest_manifest_status", "manifest_status", "tags", "manifest__edited", "price"]
    assert len(set(table.column_names)) == len(table.column_names)
    got = table.to_pylist()[0]
    assert (got["status"], got["manifest_manifest_status"], got["manifest_status"]) == ("pending", "new", "old")
    assert (got["tags"], got["manifest__edited"]) == (["a", "b"], 1)


def test_every_row_has_its_settings(line: Line) -> None:
    (r,) = line.plan([row("square.png", guidance_scale=3.0, seed=9)]).to_pylist()
    assert (r["steps"], r["guidance_scale"], r["seed"], r["attempts"]) == (4, 3.0, 9, 1)


def test_pending_rows_are_planned_from_their_place_in_the_manifest(line: Line, tmp_path: Path) -> None:
    rows = [row("square.png", f"query {i}", id=f"{i}", sku=i) for i in range(7)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet", row_group_size=3)
    files = manifest_files(str(tmp_path / "m.parquet"))
    schema = manifest_schema(files)
    planner = RowPlanner(match_columns(schema, {}), QUICK, "r1", "png")
    scan = scan_manifest(files, planner)
    turns = np.array([0, 1, 3, 0, 0, 0, 2], np.int16)
    spans = scan.pending_spans(turns)
    assert len(spans) == 2
    stage = PlanPending(Plan(planner, "model"), schema, turns, JobSettings())
    table = stage(pa.Table.from_pylist(span_rows(spans)))
    assert table.schema == work_schema(planner.columns)
    assert [(r["id"], r["query"], r["sku"], r["attempts"], r["status"]) for r in table.to_pylist()] == [
        ("1", "query 1", 1, 1, "pending"),
        ("2", "query 2", 2, 3, "pending"),
        ("6", "query 6", 6, 2, "pending"),
    ]
    assert stage(pa.Table.from_pylist(span_rows(spans)).slice(0, 0)).schema == table.schema
    # it goes to every planning task
    assert len(pickle.dumps(PlanPending(stage.plan, schema, None, JobSettings()))) < 20_000
