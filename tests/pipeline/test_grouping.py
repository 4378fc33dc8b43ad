from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffedit_ray import JobSettings, run_edit_job
from diffedit_ray.dataset import records
from diffedit_ray.pipeline.grouping import bundles, packed, unbundle
from tests.pipeline.rows import QUICK, picture, row
from tests.services.web import FileServer

SIZES = {"a": 3, "b": 1, "c": 11, "d": 2, "e": 4, "f": 1}


def _planned(order: int = 0) -> pa.Table:
    """Rows of images of `SIZES`, shuffled, with a carried column of lists."""
    rows = [
        {
            "id": f"{image}{i:02}",
            "image_uri": image,
            "reference": [None, "x", "y"][i % 3],
            "seed": i % 2,
            "tags": [image] * i,
        }
        for image, size in SIZES.items()
        for i in range(size)
    ]
    random.Random(order).shuffle(rows)
    return pa.Table.from_pylist(rows)


def _blocks(table: pa.Table, batch_size: int) -> list[pa.Table]:
    made = list(bundles(table, batch_size))
    assert all(len(bundle) == 1 for bundle in made)
    return [unbundle(bundle) for bundle in made]


class TestBundles:
    def test_every_row_is_in_one_block_as_it_was(self) -> None:
        table = _planned()
        blocks = _blocks(table, 4)
        assert max(map(len, blocks)) <= 4
        assert pa.concat_tables(blocks).sort_by("id") == table.sort_by("id")

    def test_an_image_is_not_cut_needlessly(self) -> None:
        blocks = [Counter(block["image_uri"].to_pylist()) for block in _blocks(_planned(), 4)]
        pieces = Counter(image for block in blocks for image in block)
        assert pieces == {"a": 1, "b": 1, "c": 3, "d": 1, "e": 1, "f": 1}
        assert len(blocks) == 6, "22 rows fill five and a half blocks of 4"

    def test_what_is_cut_is_cut_where_rows_share_least(self) -> None:
        table = _planned()
        large = table.filter(pa.compute.equal(table["image_uri"], "c"))
        texts = [block["reference"].to_pylist() for block in _blocks(large, 4)]
        assert texts == [["x"] * 4, ["y"] * 3 + [None], [None] * 3]

    def test_the_order_that_rows_come_in_does_not_matter(self) -> None:
        assert _blocks(_planned(1), 4) == _blocks(_planned(2), 4)

    def test_no_rows_are_one_empty_block(self) -> None:
        table = _planned()
        assert _blocks(table.slice(0, 0), 4) == [table.slice(0, 0)]

    def test_rows_without_an_image_are_no_worse_off(self) -> None:
        table = pa.Table.from_pylist([row("a", id="1"), row("b", id="2") | {"image_uri": None}, row("c", id="3")])
        table = table.append_column("seed", pa.array([1, 2, 3]))
        assert sorted(i for block in _blocks(table, 2) for i in block["id"].to_pylist()) == ["1", "2", "3"]


class TestPacked:
    @pytest.mark.parametrize("seed", range(20))
    def test_it_is_a_packing(self, seed: int) -> None:
        draw = random.Random(seed)
        capacity = draw.randint(1, 20)
        sizes = [draw.randint(1, capacity) for _ in range(draw.randint(0, 60))]
        packs = packed(sizes, capacity)
        assert sorted(i for pack in packs for i in pack) == list(range(len(sizes)))
        assert all(sum(sizes[i] for i in pack) <= capacity for pack in packs)

    def test_few_places_stay_empty(self) -> None:
        draw = random.Random(0)
        sizes = [draw.randint(1, 9) for _ in range(1000)]
        assert len(packed(sizes, 16)) <= 1.02 * sum(sizes) / 16


@pytest.mark.usefixtures("local_ray")
def test_a_run_reads_each_image_once_wherever_its_rows_stand(
    tiny_folder: Path, tmp_path: Path, web_files: FileServer
) -> None:
    for i in range(4):
        Image.fromarray(picture(i, 32, 32)).save(tmp_path / f"{i}.png")
        web_files.files[f"/{i}.png"] = (tmp_path / f"{i}.png").read_bytes()
    folder = tmp_path / "m"
    folder.mkdir()
    for name in ("a", "b", "c"):
        rows = [row(f"{web_files.endpoint}/{i}.png", f"{name} {i}") for i in range(4)]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    job = JobSettings(group_by_image=True, batch_size=6)
    summary = run_edit_job(folder, tmp_path / "out", model=tiny_folder, settings=QUICK, job=job)
    assert (summary.rows, summary.edited, summary.failed) == (12, 12, 0)
    reads = Counter(path for _, path in web_files.requests)
    reads["/0.png"] -= 1  # what is tried before the run starts
    assert reads == {f"/{i}.png": 1 for i in range(4)}
    assert len(set(records.read_records(str(tmp_path / "out"))["query"].to_pylist())) == 12
