from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffedit_ray.dataset import records
from diffedit_ray.pipeline.fetch import Fetch
from diffedit_ray.pipeline.rows import carried_fields, work_schema
from diffedit_ray.pipeline.store import Store
from tests.pipeline.line import Line, statuses
from tests.pipeline.rows import read, row

MIXED = [
    row("square.png"),
    row("none.png"),
    row("cut.png"),
    row("page.png"),
    row("wide.png", ""),
    row("wide.png", mask_uri="none.png"),
    row("wide.png", mask_uri="square.png"),
    row("wide.png", steps=1),
    row("nowhere://b/a.png"),
    row("tall.jpg"),
]
MIXED_RESULTS = [
    ("edited", None),
    ("failed", "not_found"),
    ("failed", "corrupt_image"),
    ("failed", "not_an_image"),
    ("failed", "bad_row"),
    ("failed", "bad_mask"),
    ("failed", "bad_mask"),
    ("failed", "bad_settings"),
    ("failed", "bad_uri"),
    ("edited", None),
]


class TestRowsOfAllKinds:
    @pytest.fixture
    def stored(self, line: Line) -> list[dict[str, Any]]:
        return line.store(line.edited(MIXED))

    def test_each_ends_as_it_should_and_no_neighbour_notices(self, stored: list[dict[str, Any]]) -> None:
        assert [(r["status"], r["error_code"]) for r in stored] == MIXED_RESULTS

    def test_failures_say_why_and_leave_no_files(self, line: Line, stored: list[dict[str, Any]]) -> None:
        for r in stored:
            if r["status"] == "failed":
                assert r["error_message"]
                assert r["edited_uri"] is r["mask_uri"] is r["sha256"] is None
        assert "none.png does not exist" in stored[1]["error_message"]
        assert len([p for p in Path(line.layout.root, "images").rglob("*") if p.is_file()]) == 2
        assert len([p for p in Path(line.layout.root, "masks").rglob("*") if p.is_file()]) == 2

    def test_the_files_are_what_the_record_says(self, stored: list[dict[str, Any]]) -> None:
        for r, size in ((stored[0], (32, 32)), (stored[9], (25, 61))):
            assert (r["width"], r["height"]) == size
            assert read(r["edited_uri"]).shape == (*read(r["mask_uri"]).shape, 3) == (size[1], size[0], 3)
            assert hashlib.sha256(Path(r["edited_uri"]).read_bytes()).hexdigest() == r["sha256"]
            assert r["mask_fraction"] == pytest.approx((read(r["mask_uri"]) > 0).mean())
            assert min(r[f"{s}_seconds"] for s in ("fetch", "mask", "encode", "decode", "store")) > 0

    def test_a_stage_keeps_its_rows_their_order_and_their_schema(self, line: Line) -> None:
        planned = line.plan(MIXED)
        fetched = line.fetch(MIXED)
        edited = line.edit(fetched)
        assert planned.schema == fetched.schema == edited.schema == work_schema(line.columns)
        assert planned["id"].equals(fetched["id"])
        assert planned["id"].equals(edited["id"])

    def test_a_failed_row_carries_no_pictures_on(self, line: Line) -> None:
        for r in line.edited(MIXED).to_pylist():
            if r["status"] == "failed":
                assert [
                    name for name in work_schema(line.columns).names if name[0] == "_" and r[name] is not None
                ] == []


class TestUserMasks:
    def test_the_drawn_mask_is_the_mask(self, line: Line, folder: Path) -> None:
        (r,) = line.store(line.edited([row("wide.png", mask_uri="mask.png")]))
        drawn, original = read(str(folder / "mask.png")), read(str(folder / "wide.png"))
        assert r["status"] == "edited"
        assert r["user_mask_uri"] == "mask.png"
        assert r["significance"] is None
        assert np.array_equal(read(r["mask_uri"]), drawn)
        changed = (read(r["edited_uri"]) != original).any(-1)
        assert changed.any()
        assert not changed[drawn == 0].any()

    def test_equal_texts_are_edited_inside_it(self, line: Line) -> None:
        # whoever draws a mask has said where
        assert statuses(line.edited([row("wide.png", "a horse", mask_uri="mask.png")])) == [("edited", None)]

    def test_a_black_one_changes_nothing(self, line: Line) -> None:
        assert statuses(line.edited([row("wide.png", mask_uri="black.png")])) == [("unchanged", None)]


def test_stages_survive_the_way_to_a_worker(line: Line) -> None:
    import ray.cloudpickle as pickle

    line.plan([row("square.png")])
    stages: list[Callable[..., Any]] = [
        Fetch(line.geometry, ".", line.job),
        Store(line.geometry, line.job, line.layout, records.record_schema(carried_fields(line.columns))),
    ]
    assert pickle.loads(pickle.dumps(stages)) == stages


def test_an_empty_block_stays_one(line: Line) -> None:
    table = line.edited([row("square.png")])
    for stage in (line.edit, Fetch(line.geometry, ".", line.job)):
        assert stage(table.slice(0, 0)).schema == table.schema
    schema = records.record_schema(carried_fields(line.columns))
    assert len(Store(line.geometry, line.job, line.layout, schema)(table.slice(0, 0))) == 0
    assert not Path(line.layout.records).exists()
