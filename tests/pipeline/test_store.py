from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffedit_ray.dataset.images import decode_image
from diffedit_ray.dataset.records import OutputLayout
from diffedit_ray.pipeline.edit import Edit
from diffedit_ray.settings import JobSettings
from tests.pipeline.line import Line
from tests.pipeline.rows import picture, read, row
from tests.services.proxy import Fault, FaultyProxy
from tests.services.s3 import S3Server


def _only(part: str, fault: Fault) -> Callable[[str, str], tuple[Fault | None, float]]:
    return lambda method, path: (fault if part in path else None, 0.0)


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
