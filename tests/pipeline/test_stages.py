from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffedit_ray.dataset import records
from diffedit_ray.dataset.images import decode_image
from diffedit_ray.dataset.manifest import RowPlanner, manifest_files, manifest_schema, match_columns
from diffedit_ray.dataset.records import OutputLayout
from diffedit_ray.dataset.scan import scan_manifest
from diffedit_ray.diffusion import throughput
from diffedit_ray.diffusion.checkpoint import model_geometry
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.diffusion.throughput import Throughput
from diffedit_ray.pipeline.plan import Plan, PlanPending, span_rows
from diffedit_ray.pipeline.rows import carried_fields, work_schema
from diffedit_ray.pipeline.stages import Edit, Fetch, Store
from diffedit_ray.settings import JobSettings
from tests.pipeline.line import Line, statuses
from tests.pipeline.rows import QUICK, picture, read, row
from tests.services.proxy import Fault, FaultyProxy
from tests.services.s3 import S3Server


@pytest.mark.parametrize(
    ("job", "batch"),
    [
        ({}, 32),
        ({"unet_batch": 3}, 3),
        ({"reproducible": True, "batch_size": 5}, 8),
        ({"reproducible": True, "batch_size": 500}, 64),
        ({"reproducible": True, "unet_batch": 2}, 2),
    ],
)
def test_the_unet_batch_is_measured_unless_it_is_given_or_must_not_depend_on_the_machine(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, job: dict[str, Any], batch: int
) -> None:
    compiled: list[int] = []
    monkeypatch.setattr(throughput, "measure_unet_batch", lambda _: Throughput(32, {32: 9.0}))
    monkeypatch.setattr(LatentDiffusionModel, "compile", lambda _, size: compiled.append(size))
    geometry = model_geometry(str(tiny_folder))
    assert Edit(str(tiny_folder), "cpu", 2, geometry, JobSettings(**job)).editor.estimate.unet_batch == batch
    assert compiled == []
    Edit(str(tiny_folder), "cpu", 2, geometry, JobSettings(**job, compile=True))
    assert compiled == [batch]


def _only(part: str, fault: Fault) -> Callable[[str, str], tuple[Fault | None, float]]:
    return lambda method, path: (fault if part in path else None, 0.0)


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


class TestPlan:
    def test_carried_columns_keep_their_types_and_step_aside_for_ours(self, line: Line) -> None:
        rows = [row("square.png", status="new", manifest_status="old", tags=["a", "b"], _edited=1, price=None)]
        table = line.plan(rows)
        carried = [f.name for f in carried_fields(line.columns)]
        assert carried == ["manifest_manifest_status", "manifest_status", "tags", "manifest__edited", "price"]
        assert len(set(table.column_names)) == len(table.column_names)
        got = table.to_pylist()[0]
        assert (got["status"], got["manifest_manifest_status"], got["manifest_status"]) == ("pending", "new", "old")
        assert (got["tags"], got["manifest__edited"]) == (["a", "b"], 1)

    def test_every_row_has_its_settings(self, line: Line) -> None:
        (r,) = line.plan([row("square.png", guidance_scale=3.0, seed=9)]).to_pylist()
        assert (r["steps"], r["guidance_scale"], r["seed"], r["attempts"]) == (4, 3.0, 9, 1)

    def test_pending_rows_are_planned_from_their_place_in_the_manifest(self, line: Line, tmp_path: Path) -> None:
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

    def test_an_empty_block_stays_one(self, line: Line) -> None:
        table = line.edited([row("square.png")])
        for stage in (line.edit, Fetch(line.geometry, ".", line.job)):
            assert stage(table.slice(0, 0)).schema == table.schema
        schema = records.record_schema(carried_fields(line.columns))
        assert len(Store(line.geometry, line.job, line.layout, schema)(table.slice(0, 0))) == 0
        assert not Path(line.layout.records).exists()


class TestEdit:
    def test_a_row_that_breaks_the_batch_fails_alone(self, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
        editor = line.edit.editor
        whole = editor.edit_fitted
        sizes = []

        def fragile(pixels: torch.Tensor, references: Any, queries: list[str], *args: Any, **kwargs: Any) -> Any:
            sizes.append(len(queries))
            if "a bomb" in queries:
                raise RuntimeError("boom")
            return whole(pixels, references, queries, *args, **kwargs)

        monkeypatch.setattr(editor, "edit_fitted", fragile)
        rows = [row("square.png", q) for q in ("a cat", "a bomb", "a dog")]
        table = line.edited(rows)
        assert statuses(table) == [("edited", None), ("failed", "edit_failed"), ("edited", None)]
        assert "boom" in table["error_message"][1].as_py()
        assert sizes == [3, 1, 1, 1]

    def test_rows_of_one_shape_are_one_batch_whatever_their_settings(
        self, line: Line, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        editor = line.edit.editor
        whole = editor.edit_fitted
        batches: list[Sequence[str]] = []

        def watched(pixels: torch.Tensor, references: Any, queries: Sequence[str], *args: Any, **kwargs: Any) -> Any:
            batches.append(list(queries))
            return whole(pixels, references, queries, *args, **kwargs)

        monkeypatch.setattr(editor, "edit_fitted", watched)
        line.edited(
            [row("square.png", "1"), row("wide.png", "2"), row("square.png", "3"), row("square.png", "4", steps=5)]
        )
        assert batches == [["1", "3", "4"], ["2"]]

    def test_a_result_does_not_depend_on_its_batch(self, line: Line) -> None:
        rows = [row("square.png", q) for q in ("a cat", "a dog", "a pear")]
        together = line.store(line.edited(rows))
        alone = line.store(line.edited(rows[1:2]))[0]
        pixels = [read(r["edited_uri"]).astype(int) for r in (together[1], alone)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1

    def test_equal_texts_change_nothing_and_write_nothing(self, line: Line) -> None:
        (r,) = line.store(line.edited([row("square.png", "a horse")]))
        assert (r["status"], r["mask_fraction"], r["edited_uri"], r["mask_uri"]) == ("unchanged", 0.0, None, None)
        assert not Path(line.layout.root, "images").exists()
        assert not Path(line.layout.root, "masks").exists()

    def test_a_missing_reference_is_the_empty_text(self, line: Line) -> None:
        table = line.edited([row("square.png") | {"reference": None}, row("square.png") | {"reference": ""}])
        assert table["status"].to_pylist() == ["edited", "edited"]
        assert table["_edited"][0] == table["_edited"][1]


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


class TestPixels:
    @pytest.mark.parametrize("name", ["square.png", "wide.png", "tall.jpg"])
    def test_outside_the_mask_every_pixel_is_the_originals(self, line: Line, folder: Path, name: str) -> None:
        (r,) = line.store(line.edited([row(name, mask_threshold=0.8, mask_grow=0)]))
        outside = read(r["mask_uri"]) == 0
        original, result = read(str(folder / name)), read(r["edited_uri"])
        assert 0 < outside.mean() < 1
        assert np.array_equal(result[outside], original[outside])
        assert not np.array_equal(result[~outside], original[~outside])

    def test_without_composite_the_decoders_picture_is_all_there_is(self, line: Line, folder: Path) -> None:
        (r,) = line.store(line.edited([row("wide.png", mask_threshold=0.8, mask_grow=0, composite=False)]))
        outside = read(r["mask_uri"]) == 0
        assert not np.array_equal(read(r["edited_uri"])[outside], read(str(folder / "wide.png"))[outside])

    @pytest.mark.parametrize("image_format", ["png", "webp"])
    def test_alpha_is_kept(
        self, edit: Edit, tiny_folder: Path, folder: Path, tmp_path: Path, image_format: str
    ) -> None:
        job = JobSettings(image_format=image_format)  # type: ignore[arg-type]
        line = Line(edit, str(tiny_folder), folder, tmp_path, job)
        (r,) = line.store(line.edited([row("alpha.png", mask_threshold=0.8, mask_grow=0)]))
        assert r["edited_uri"].endswith(f".{image_format}")
        result, original = read(r["edited_uri"]), picture(4, 40, 40, 4)
        assert np.array_equal(result[..., 3], original[..., 3])
        outside = read(r["mask_uri"]) == 0
        assert np.array_equal(result[outside], original[outside])


class TestStore:
    def test_a_store_that_forbids_writing_is_told_from_one_that_fails(
        self, line: Line, s3: S3Server, bucket: str
    ) -> None:
        table = line.edited([row("square.png")])
        line.layout = OutputLayout(f"s3://{bucket}/out")
        with FaultyProxy(s3.endpoint).running() as proxy:
            line.job = JobSettings(storage_options={"s3": s3.at(proxy.endpoint).options}, storage_tries=1)
            for fault, code in ((Fault.FORBIDDEN, "forbidden"), (Fault.INTERNAL, "store_failed")):
                # the images' writes go wrong, the record's does not
                proxy.forget()
                proxy.choose = _only("/images/", fault)  # type: ignore[method-assign]
                (r,) = line.store(table)
                assert (r["status"], r["error_code"]) == ("failed", code)
                assert f"s3://{bucket}/out/images/" in r["error_message"]

    def test_a_file_that_cannot_be_written_fails_its_row_alone(self, line: Line) -> None:
        table = line.edited([row("square.png", id="aa1"), row("square.png", id="bb2")])
        images = Path(line.layout.root, "images")
        images.mkdir(parents=True)
        (images / "aa").write_text("a file where a folder should be")
        first, second = line.store(table)
        assert (first["status"], first["error_code"]) == ("failed", "store_failed")
        assert "aa1" in first["error_message"]
        assert second["status"] == "edited"

    def test_what_no_format_can_hold_fails_its_row_alone(
        self, edit: Edit, tiny_folder: Path, folder: Path, tmp_path: Path
    ) -> None:
        # WebP ends at 16383 pixels a side
        Image.fromarray(picture(6, 16400, 9)).save(tmp_path / "long.png")
        line = Line(edit, str(tiny_folder), folder, tmp_path / "out", JobSettings(image_format="webp"))
        rows = [row(str(tmp_path / "long.png"), steps=2, mask_maps=1), row("square.png")]
        table = line.edited(rows)
        assert [r["status"] for r in line.store(table)] == ["failed", "edited"]
        collected = line.collect(table)
        assert [(r["status"], r["error_code"]) for r in collected] == [("failed", "store_failed"), ("edited", None)]


class TestCollect:
    def test_it_returns_the_files_that_store_writes(self, line: Line) -> None:
        table = line.edited([row("wide.png", sku=7), row("none.png", sku=8), row("square.png", "a horse", sku=9)])
        collected, stored = line.collect(table), line.store(table)
        assert [r["sku"] for r in collected] == [7, 8, 9]
        assert collected[0]["edited_image"] == Path(stored[0]["edited_uri"]).read_bytes()
        assert collected[0]["mask_image"] == Path(stored[0]["mask_uri"]).read_bytes()
        assert collected[0]["sha256"] == stored[0]["sha256"]
        assert collected[0]["edited_uri"] is None
        for r, status in zip(collected[1:], ("failed", "unchanged"), strict=True):
            assert (r["status"], r["edited_image"], r["mask_image"]) == (status, None, None)

    def test_the_bytes_are_images(self, line: Line) -> None:
        (r,) = line.collect(line.edited([row("tall.jpg")]))
        assert decode_image(r["edited_image"], "x", max_pixels=10**6).pixels.shape == (61, 25, 3)
        assert Image.open(io.BytesIO(r["mask_image"])).mode == "L"


def test_stages_survive_the_way_to_a_worker(line: Line) -> None:
    import ray.cloudpickle as pickle

    line.plan([row("square.png")])
    stages: list[Callable[..., Any]] = [
        Fetch(line.geometry, ".", line.job),
        Store(line.geometry, line.job, line.layout, records.record_schema(carried_fields(line.columns))),
    ]
    assert pickle.loads(pickle.dumps(stages)) == stages
