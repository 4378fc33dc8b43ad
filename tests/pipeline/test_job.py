"""Whole jobs on Ray. Runs are shared: one of a manifest, one of the same again, one of it grown."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data
from PIL import Image

from diffedit_ray import JobSettings, JobSummary, edit_dataset, run_edit_job
from diffedit_ray.dataset import records
from diffedit_ray.errors import DiffEditError, ManifestError, ModelError, OutputError
from diffedit_ray.pipeline import job as job_module
from tests.pipeline.rows import QUICK, picture, read, row, save_pictures

pytestmark = pytest.mark.usefixtures("local_ray")

Record = dict[str, Any]

FIRST_FILE = pa.schema(
    [
        ("id", pa.string()),
        ("image_uri", pa.string()),
        ("reference", pa.string()),
        ("query", pa.string()),
        ("steps", pa.int64()),
        ("sku", pa.int32()),
        ("status", pa.string()),
        ("tags", pa.list_(pa.string())),
    ]
)
OWN_IDS = [
    row("images/square.png", id="square", sku=1, status="new", tags=["a", "b"]),
    row("images/wide.png", id="wide", steps=6, sku=2),
    row("images/later.png", id="later", sku=3),
    row("images/cut.png", id="cut", sku=4),
    row("images/square.png", "", id="blank", sku=5),
    row("images/square.png", "a horse", id="same", sku=6),
]
NO_IDS = [
    row("images/wide.png", mask_uri="images/mask.png"),
    row("images/tall.jpg"),
    row("images/tall.jpg"),
]


def _write_manifest(folder: Path, own_ids: Sequence[Mapping[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist([dict(r) for r in own_ids], schema=FIRST_FILE), folder / "a.parquet")
    # a second file with columns of its own: no ids, but masks
    pq.write_table(pa.Table.from_pylist(NO_IDS), folder / "b.parquet")


@dataclass
class Run:
    summary: JobSummary
    records: dict[str, Record]
    files: dict[str, int]
    written: list[dict[str, Any]]


def _finished(summary: JobSummary) -> Run:
    output = Path(summary.output)
    (file,) = (output / "records").iterdir()
    rows = pq.read_table(file).to_pylist()
    by_id = {r["id"]: r for r in rows}
    assert len(by_id) == len(rows), "one record an id"
    files = {
        str(f.relative_to(output)): f.stat().st_mtime_ns
        for part in ("images", "masks", "records")
        for f in (output / part).rglob("*")
        if f.is_file()
    }
    return Run(
        summary, by_id, files, [json.loads((output / "_run" / f"{n}.json").read_text()) for n in ("config", "summary")]
    )


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    save_pictures(folder / "images")
    _write_manifest(folder, OWN_IDS)
    return folder


@pytest.fixture(scope="module")
def first(manifest: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Run:
    output = tmp_path_factory.mktemp("job") / "out"
    seen: list[tuple[int, int]] = []
    job = JobSettings(batch_size=4)
    summary = run_edit_job(
        manifest,
        output,
        model=tiny_folder,
        settings=QUICK,
        job=job,
        progress=lambda n, c: seen.append((n, sum(c.values()))),
    )
    assert seen[0] == (8, 0)
    assert seen[-1] == (8, 8)
    return _finished(summary)


@pytest.fixture(scope="module")
def again(first: Run, manifest: Path, tiny_folder: Path) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module, "start_ray", lambda: pytest.fail("there is nothing to start Ray for"))
        summary = run_edit_job(
            manifest, first.summary.output, model=tiny_folder, settings=QUICK, job=JobSettings(max_failed=0.2)
        )
    return _finished(summary)


@pytest.fixture(scope="module")
def grown(again: Run, manifest: Path, tiny_folder: Path) -> Run:
    """A changed sentence, a new row, and a picture that has arrived since."""
    Image.fromarray(picture(7, 48, 48)).save(manifest / "images" / "later.png")
    changed = [r | {"query": "a dog"} if r["id"] == "square" else r for r in OWN_IDS]
    _write_manifest(manifest, [*changed, row("images/alpha.png", id="new")])
    summary = run_edit_job(
        manifest, again.summary.output, model=tiny_folder, settings=QUICK, job=JobSettings(retry_permanent=True)
    )
    return _finished(summary)


class TestFirstRun:
    def test_the_summary_counts_every_row_once(self, first: Run) -> None:
        s = first.summary
        assert (s.rows, s.duplicates, s.done_before, s.edited_now) == (8, 1, 0, 8)
        assert (s.edited, s.unchanged, s.failed) == (4, 1, 3)
        assert s.errors == {"not_found": 1, "corrupt_image": 1, "bad_row": 1}
        assert (s.pending, s.exit_code) == (0, 0)
        assert s.seconds > 0

    def test_one_record_a_row_with_its_status(self, first: Run) -> None:
        own = {i: (r["status"], r["error_code"]) for i, r in first.records.items() if len(i) < 32}
        assert own == {
            "square": ("edited", None),
            "wide": ("edited", None),
            "later": ("failed", "not_found"),
            "cut": ("failed", "corrupt_image"),
            "blank": ("failed", "bad_row"),
            "same": ("unchanged", None),
        }
        derived = [r for i, r in first.records.items() if len(i) == 32]
        assert [(r["status"], r["id"] == r["fingerprint"]) for r in derived] == [("edited", True)] * 2

    def test_the_records_have_the_contracts_columns_and_types(self, first: Run) -> None:
        schema = pq.read_schema(next(Path(first.summary.output, "records").iterdir()))
        carried = [("sku", pa.int32()), ("manifest_status", pa.string()), ("tags", pa.list_(pa.string()))]
        expected = records.record_schema([pa.field(*c) for c in carried])
        assert schema.names == expected.names
        assert [f.type for f in schema] == [f.type for f in expected]

    def test_columns_are_carried_through(self, first: Run) -> None:
        r = first.records["square"]
        assert (r["sku"], r["manifest_status"], r["tags"]) == (1, "new", ["a", "b"])
        assert first.records["blank"]["sku"] == 5, "for failed rows too"

    def test_records_say_what_held_for_their_row(self, first: Run, tiny_folder: Path) -> None:
        square, wide = first.records["square"], first.records["wide"]
        assert (square["steps"], wide["steps"], wide["mask_maps"]) == (4, 6, 2)
        assert (wide["image_uri"], wide["reference"], wide["query"]) == ("images/wide.png", "a horse", "a cat")
        assert (wide["width"], wide["height"], wide["attempts"]) == (70, 33, 1)
        assert square["seed"] == first.records["same"]["seed"] != wide["seed"]
        assert square["model"] == str(tiny_folder)
        assert re.fullmatch("[0-9a-f]{16}", square["model_revision"])

    def test_images_and_masks_are_where_the_record_says(self, first: Run) -> None:
        output = first.summary.output
        for r in first.records.values():
            name = f"{r['id'][:2]}/{r['id']}.png"
            if r["status"] != "edited":
                assert r["edited_uri"] is r["mask_uri"] is r["sha256"] is None
                assert f"images/{name}" not in first.files
                continue
            assert (r["edited_uri"], r["mask_uri"]) == (f"{output}/images/{name}", f"{output}/masks/{name}")
            assert hashlib.sha256(Path(r["edited_uri"]).read_bytes()).hexdigest() == r["sha256"]
            image, mask = Image.open(r["edited_uri"]), Image.open(r["mask_uri"])
            assert image.size == mask.size == (r["width"], r["height"])
            assert mask.mode == "L"
        assert len(first.files) == 4 + 4 + 1, "nothing else is left lying about"

    def test_pixels_outside_a_drawn_mask_are_the_originals(self, first: Run, manifest: Path) -> None:
        (r,) = (r for r in first.records.values() if r["user_mask_uri"])
        outside = read(str(manifest / "images" / "mask.png")) == 0
        assert np.array_equal(read(r["edited_uri"])[outside], read(str(manifest / "images" / "wide.png"))[outside])

    def test_failures_have_a_message_for_a_person(self, first: Run, manifest: Path) -> None:
        assert first.records["later"]["error_message"] == f"{manifest}/images/later.png does not exist"
        assert "damaged" in first.records["cut"]["error_message"]
        assert "query is empty" in first.records["blank"]["error_message"]

    def test_what_ran_and_how_it_ended_is_written_down(self, first: Run, manifest: Path, tiny_folder: Path) -> None:
        config, summary = first.written
        assert (config["manifest"], config["output"], config["model"]) == (
            str(manifest),
            first.summary.output,
            str(tiny_folder),
        )
        assert config["settings"] == QUICK.model_dump()
        assert config["job"]["batch_size"] == 4
        assert config["record_schema_version"] == records.SCHEMA_VERSION
        assert {"diffedit_ray", "torch", "ray", "python"} <= set(config["versions"])
        assert config["started_at"] < summary["ended_at"]
        assert (summary["rows"], summary["edited"], summary["failed"], summary["exit_code"]) == (8, 4, 3, 0)
        (replica,) = summary["replicas"]
        assert (replica["device"], replica["dtype"]) == ("cpu", "torch.float32")
        assert replica["rates"][str(replica["unet_batch"])] > 0


class TestSecondRun:
    def test_it_finds_nothing_to_do_and_touches_no_file(self, first: Run, again: Run) -> None:
        assert again.summary.done_before == again.summary.rows == 8
        assert again.summary.edited_now == 0
        assert again.files == first.files
        assert again.records == first.records

    def test_it_still_judges_the_failures(self, again: Run) -> None:
        # 3 of 8, and a fifth was accepted
        assert (again.summary.failed, again.summary.exit_code) == (3, 3)
        assert again.written[1]["exit_code"] == 3


class TestGrownManifest:
    def test_only_what_is_new_changed_or_to_be_retried_is_worked_on(self, first: Run, grown: Run) -> None:
        s = grown.summary
        assert (s.rows, s.done_before, s.edited_now) == (9, 4, 5)
        assert (s.edited, s.unchanged, s.failed) == (6, 1, 2)
        untouched = {i for i, r in grown.records.items() if first.records.get(i) == r}
        assert set(grown.records) - untouched == {"square", "new", "later", "cut", "blank"}

    def test_untouched_rows_keep_their_files(self, first: Run, grown: Run) -> None:
        changed = {
            name for name, stamp in first.files.items() if grown.files.get(name) != stamp and "records" not in name
        }
        assert changed == {"images/sq/square.png", "masks/sq/square.png"}

    def test_a_changed_sentence_under_the_same_id_has_one_record(self, first: Run, grown: Run) -> None:
        before, after = first.records["square"], grown.records["square"]
        assert (after["query"], after["status"], after["attempts"]) == ("a dog", "edited", 1)
        assert before["fingerprint"] != after["fingerprint"]
        assert before["seed"] == after["seed"]
        assert before["sha256"] != after["sha256"]

    def test_failures_are_tried_again_and_counted(self, grown: Run) -> None:
        assert (grown.records["later"]["status"], grown.records["later"]["attempts"]) == ("edited", 2)
        assert (grown.records["cut"]["status"], grown.records["cut"]["attempts"]) == ("failed", 2)

    def test_alpha_is_kept(self, grown: Run) -> None:
        assert np.array_equal(read(grown.records["new"]["edited_uri"])[..., 3], picture(4, 40, 40, 4)[..., 3])


def test_two_replicas_give_the_same_results_as_one(
    grown: Run, manifest: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    job = JobSettings(min_actors=2, max_actors=2, batch_size=2)
    other = _finished(run_edit_job(manifest, tmp_path / "out", model=tiny_folder, settings=QUICK, job=job))
    assert set(other.records) == set(grown.records)
    for row_id, r in grown.records.items():
        mine = other.records[row_id]
        assert (mine["status"], mine["fingerprint"]) == (r["status"], r["fingerprint"])
        if r["status"] == "edited" and mine["sha256"] != r["sha256"]:
            a, b = read(r["edited_uri"]).astype(int), read(mine["edited_uri"]).astype(int)
            assert np.abs(a - b).max() <= 1


def test_as_a_stage_of_a_bigger_program(grown: Run, manifest: Path, tiny_folder: Path) -> None:
    rows = [
        {"url": "images/square.png", "reference": "a horse", "query": "a dog", "label": 1},
        {"url": "images/none.png", "reference": "a horse", "query": "a dog", "label": 2},
        {"url": "images/square.png", "reference": "a horse", "query": "a dog", "label": 3},
    ]
    ds = ray.data.from_items(rows).map(lambda r: {**r, "label": r["label"] * 10})
    job = JobSettings(columns={"image_uri": "url"})
    edited = edit_dataset(ds, QUICK, model=str(tiny_folder), job=job, base_uri=str(manifest))
    got = edited.map(lambda r: {**r, "size": len(r["edited_image"] or b"")}).take_all()
    by_label = {r["label"]: r for r in got}
    assert {label: r["status"] for label, r in by_label.items()} == {10: "edited", 20: "failed", 30: "edited"}
    assert len(got) == 3, "one row a row, the repeated one too"
    assert by_label[20]["error_code"] == "not_found"
    assert by_label[20]["size"] == 0
    record = grown.records["square"]
    assert by_label[10]["fingerprint"] == record["fingerprint"]
    result = np.asarray(Image.open(io.BytesIO(by_label[10]["edited_image"]))).astype(int)
    assert np.abs(result - read(record["edited_uri"])).max() <= 1


def test_equal_rows_are_edited_once_wherever_they_stand(manifest: Path, tiny_folder: Path, tmp_path: Path) -> None:
    # one in each row group and file, so that no block holds two of them
    folder = tmp_path / "m"
    folder.mkdir()
    rows = [row(f"{manifest}/images/square.png"), row(f"{manifest}/images/wide.png")]
    for name in ("a", "b"):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet", row_group_size=1)
    summary = run_edit_job(folder, tmp_path / "out", model=tiny_folder, settings=QUICK)
    assert (summary.rows, summary.duplicates, summary.edited_now, summary.edited) == (2, 2, 2, 2)


def test_a_row_that_is_unchanged_now_leaves_no_image_behind(manifest: Path, tiny_folder: Path, tmp_path: Path) -> None:
    def run(query: str) -> Run:
        pq.write_table(
            pa.Table.from_pylist([row(f"{manifest}/images/square.png", query, id="x")]), tmp_path / "m.parquet"
        )
        return _finished(run_edit_job(tmp_path / "m.parquet", tmp_path / "out", model=tiny_folder, settings=QUICK))

    assert {"images/x/x.png", "masks/x/x.png"} <= set(run("a cat").files)
    after = run("a horse")
    assert after.records["x"]["status"] == "unchanged"
    assert [name for name in after.files if "records" not in name] == []


class TestRefusedBeforeAnyWork:
    def _refused(
        self, error: type[Exception], match: str, manifest: Path, output: Path, model: Path, **job: Any
    ) -> None:
        with pytest.raises(error, match=match):
            run_edit_job(manifest, output, model=model, job=JobSettings(**job))
        assert not (output / "_run" / "config.json").exists()

    def test_an_id_that_names_two_rows(self, tiny_folder: Path, tmp_path: Path) -> None:
        rows = [row("a.png", id="x"), row("b.png", id="x"), row("c.png", id="y")]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
        match = "1 rows repeat the id of an earlier, different row: x"
        self._refused(ManifestError, match, tmp_path / "m.parquet", tmp_path / "out", tiny_folder)

    def test_a_manifest_without_its_columns(self, tiny_folder: Path, tmp_path: Path) -> None:
        pq.write_table(pa.table({"url": ["a"]}), tmp_path / "m.parquet")
        self._refused(ManifestError, "no column 'image_uri'", tmp_path / "m.parquet", tmp_path / "out", tiny_folder)

    def test_a_folder_that_is_no_checkpoint(self, manifest: Path, tmp_path: Path) -> None:
        self._refused(ModelError, "model_index.json", manifest, tmp_path / "out", tmp_path)

    def test_a_carried_column_that_changed_its_type(self, first: Run, tiny_folder: Path, tmp_path: Path) -> None:
        shutil.copytree(Path(first.summary.output, "records"), tmp_path / "out" / "records")
        pq.write_table(pa.table({"image_uri": ["a"], "query": ["b"], "sku": ["three"]}), tmp_path / "m.parquet")
        self._refused(OutputError, "sku", tmp_path / "m.parquet", tmp_path / "out", tiny_folder)


def test_overwriting_starts_afresh_whatever_was_there(first: Run, tiny_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(first.summary.output, output)
    empty = pa.schema([("image_uri", pa.string()), ("query", pa.string())]).empty_table()
    pq.write_table(empty, tmp_path / "m.parquet")
    summary = run_edit_job(tmp_path / "m.parquet", output, model=tiny_folder, job=JobSettings(overwrite=True))
    assert (summary.rows, summary.exit_code) == (0, 0)
    assert not any((output / part).exists() for part in ("records", "images", "masks"))
    assert json.loads((output / "_run" / "config.json").read_text())["settings"]["steps"] == 50


def test_an_interrupted_run_says_so_and_keeps_what_it_has(first: Run, tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(Path(first.summary.output, "records"), tmp_path / "out" / "records")
    before = records.read_records(str(tmp_path / "out"), ["id"])
    pq.write_table(pa.table({"image_uri": ["a"], "query": ["b"]}), tmp_path / "m.parquet")

    def interrupt(total: int, counts: Mapping[str, int]) -> None:
        raise KeyboardInterrupt

    summary = run_edit_job(tmp_path / "m.parquet", tmp_path / "out", model=tiny_folder, progress=interrupt)
    assert (summary.interrupted, summary.exit_code, summary.edited_now) == (True, 130, 0)
    assert (summary.rows, summary.pending) == (1, 1)
    assert json.loads((tmp_path / "out" / "_run" / "summary.json").read_text())["exit_code"] == 130
    assert list((tmp_path / "out" / "_run" / "leases").iterdir()) == []
    assert records.read_records(str(tmp_path / "out"), ["id"]).sort_by("id") == before.sort_by("id")


def test_a_model_that_cannot_be_loaded_ends_the_run_with_one_line(
    manifest: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    shape = tmp_path / "model" / "unet" / "config.json"  # whole files, but of another network
    shape.write_text(json.dumps({**json.loads(shape.read_text()), "cross_attention_dim": 48}))
    with pytest.raises(DiffEditError, match="cannot load the checkpoint") as caught:
        run_edit_job(manifest, tmp_path / "out", model=tmp_path / "model", settings=QUICK)
    assert "\n" not in str(caught.value)
    written = json.loads((tmp_path / "out" / "_run" / "summary.json").read_text())
    assert written["exit_code"] == 1
    assert "cannot load the checkpoint" in written["error"]


def test_an_empty_manifest_is_done_at_once(tiny_folder: Path, tmp_path: Path) -> None:
    empty = pa.schema([("image_uri", pa.string()), ("query", pa.string())]).empty_table()
    pq.write_table(empty, tmp_path / "m.parquet")
    summary = run_edit_job(tmp_path / "m.parquet", tmp_path / "out", model=tiny_folder)
    assert (summary.rows, summary.exit_code) == (0, 0)
    assert (tmp_path / "out" / "_run" / "summary.json").exists()


def test_a_batch_is_one_block_and_one_record_file_however_large(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.data.DataContext.get_current(), "target_max_block_size", 1000)
    monkeypatch.setattr(job_module, "compact", lambda output: None)  # which would merge them
    Image.fromarray(picture(1, 32, 32)).save(tmp_path / "a.png")
    rows = [row("a.png", f"a cat {i}") for i in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    output = tmp_path / "out"
    job = JobSettings(batch_size=3)
    assert run_edit_job(tmp_path / "m.parquet", output, model=tiny_folder, settings=QUICK, job=job).edited == 6
    assert [pq.read_metadata(file).num_rows for file in (output / "records").iterdir()] == [3, 3]
