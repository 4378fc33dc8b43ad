"""What a job does before and after Ray: none of these starts it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffedit_ray import JobSettings, JobSummary, run_edit_job
from diffedit_ray.dataset import records
from diffedit_ray.dataset.lease import Lease
from diffedit_ray.dataset.manifest import RowPlanner, manifest_schema, match_columns
from diffedit_ray.dataset.recorded import read_recorded
from diffedit_ray.dataset.records import OutputLayout
from diffedit_ray.dataset.scan import Scan, scan_manifest
from diffedit_ray.diffusion.checkpoint import model_revision
from diffedit_ray.errors import DiffEditError, ErrorCode, OutputError, WrongOutputError
from diffedit_ray.pipeline import job as job_module
from diffedit_ray.pipeline.job import conclude
from diffedit_ray.settings import EditSettings
from tests.dataset.outputs import failure, files, record, write

NAMES = ("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "start_ray", lambda: pytest.fail("there is nothing to start Ray for"))


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    rows = [{"id": name, "image_uri": f"{name}.png", "query": "a zebra"} for name in NAMES]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    return tmp_path / "m.parquet"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def _scan(manifest: Path, model: Path) -> Scan:
    columns = match_columns(manifest_schema([str(manifest)]), {})
    return scan_manifest([str(manifest)], RowPlanner(columns, EditSettings(), model_revision(str(model)), "png"))


def _recorded(manifest: Path, model: Path, **changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    planner = _scan(manifest, model).planner
    prints = {row["id"]: planner.plan(row).fingerprint for row in pq.read_table(manifest).to_pylist()}
    schema_row: Mapping[str, Any] = {}
    return [
        record(name, fingerprint=prints[name], image_uri=f"{name}.png") | dict(changes.get(name, schema_row))
        for name in NAMES
    ]


def _write(output: Path, *rows: Mapping[str, Any]) -> None:
    write(output, *rows, schema=records.record_schema([]))


class TestACompleteOutput:
    @pytest.fixture(autouse=True)
    def _complete(self, manifest: Path, output: Path, tiny_folder: Path) -> None:
        gone = {"status": "failed", "error_code": "not_found"}
        rows = _recorded(manifest, tiny_folder, c=gone, d={"status": "unchanged"})
        for row in rows:  # as a run leaves them that was killed before it could merge them
            _write(output, row)

    def test_there_is_nothing_to_do_but_to_merge_the_records(
        self, manifest: Path, output: Path, tiny_folder: Path
    ) -> None:
        s = run_edit_job(manifest, output, model=tiny_folder)
        assert (s.rows, s.done_before, s.edited_now, s.pending, s.exit_code) == (4, 4, 0, 0, 0)
        assert (s.edited, s.unchanged, s.failed, s.errors) == (2, 1, 1, {"not_found": 1})
        assert len(files(output)) == 1
        config, summary = (json.loads((output / "_run" / f"{n}.json").read_text()) for n in ("config", "summary"))
        assert (config["rows"], config["pending"]) == (4, 0)
        assert config["run"] == summary["run"]

    def test_a_missing_image_is_tried_again_only_if_asked_for(
        self, manifest: Path, output: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started: list[int] = []
        monkeypatch.setattr(job_module, "start_ray", lambda: started.append(1) or (_ for _ in ()).throw(OSError("no")))
        run_edit_job(manifest, output, model=tiny_folder, job=JobSettings(retry_failed=True))
        assert not started
        with pytest.raises(OSError, match="no"):
            run_edit_job(manifest, output, model=tiny_folder, job=JobSettings(retry_permanent=True))
        assert started
        summary = json.loads((output / "_run" / "summary.json").read_text())
        assert (summary["exit_code"], summary["error"]) == (1, "no")
        assert (summary["failed"], summary["pending"]) == (1, 0)

    def test_a_run_that_could_not_start_leaves_the_records_to_the_next(
        self, manifest: Path, output: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(job_module, "start_ray", interrupt)
        s = run_edit_job(manifest, output, model=tiny_folder, job=JobSettings(retry_permanent=True))
        assert (s.interrupted, s.exit_code) == (True, 130)
        assert len(files(output)) == 4

    def test_rows_gone_from_the_manifest_keep_their_records(
        self, manifest: Path, output: Path, tiny_folder: Path
    ) -> None:
        pq.write_table(pq.read_table(manifest).slice(0, 1), manifest)
        s = run_edit_job(manifest, output, model=tiny_folder)
        assert (s.rows, s.edited, s.unchanged, s.failed) == (1, 1, 0, 0)
        assert len(records.read_records(str(output), ["id"])) == 4

    def test_other_settings_are_refused_and_overwriting_starts_afresh(
        self, manifest: Path, output: Path, tiny_folder: Path
    ) -> None:
        run_edit_job(manifest, output, model=tiny_folder)
        image = Path(OutputLayout(str(output)).image("a", "png"))
        image.parent.mkdir(parents=True)
        image.touch()
        other = EditSettings(steps=20)
        with pytest.raises(WrongOutputError, match="steps 50 there and 20 now"):
            run_edit_job(manifest, output, model=tiny_folder, settings=other)
        assert image.exists()
        pq.write_table(pq.read_table(manifest).slice(0, 0), manifest)
        s = run_edit_job(manifest, output, model=tiny_folder, settings=other, job=JobSettings(overwrite=True))
        assert (s.rows, s.exit_code) == (0, 0)
        assert not any((output / part).exists() for part in ("records", "images", "masks"))
        assert json.loads((output / "_run" / "config.json").read_text())["settings"]["steps"] == 20

    def test_overwriting_waits_for_a_manifest_that_is_good(
        self, manifest: Path, output: Path, tiny_folder: Path
    ) -> None:
        rows = [{"id": "a", "image_uri": "a.png", "query": q} for q in ("a cow", "a horse")]
        pq.write_table(pa.Table.from_pylist(rows), manifest)
        with pytest.raises(DiffEditError, match="repeat the id"):
            run_edit_job(manifest, output, model=tiny_folder, job=JobSettings(overwrite=True))
        assert len(files(output)) == 4

    def test_a_second_run_is_refused_while_the_first_has_the_output(
        self, manifest: Path, output: Path, tiny_folder: Path
    ) -> None:
        with Lease(str(output)), pytest.raises(OutputError, match="is in use by another run"):
            run_edit_job(manifest, output, model=tiny_folder, job=JobSettings(overwrite=True))
        assert len(files(output)) == 4
        assert run_edit_job(manifest, output, model=tiny_folder).exit_code == 0


class TestConcluding:
    def _conclude(
        self, manifest: Path, output: Path, model: Path, *rows: Mapping[str, Any], **ended: Any
    ) -> JobSummary:
        scan = _scan(manifest, model)
        turns = scan.turns(read_recorded(str(output)), retry_failed=True, retry_permanent=False)
        _write(output, *rows)
        summary = JobSummary(str(output), rows=len(scan.ids), **ended)
        conclude(summary, scan, turns)
        return summary

    def test_rows_in_are_records_out(self, manifest: Path, output: Path, tiny_folder: Path) -> None:
        rows = _recorded(manifest, tiny_folder, a={"status": "failed", "error_code": "timeout"})
        s = self._conclude(manifest, output, tiny_folder, *rows)
        assert (s.edited, s.failed, s.pending, s.error, s.errors) == (3, 1, 0, None, {"timeout": 1})

    def test_a_row_that_was_lost_is_named(self, manifest: Path, output: Path, tiny_folder: Path) -> None:
        s = self._conclude(manifest, output, tiny_folder, *_recorded(manifest, tiny_folder)[1:])
        assert s.error is not None
        assert "1 rows have no record: a." in s.error
        assert (s.edited, s.pending, s.exit_code) == (3, 1, 1)

    def test_a_retry_that_was_lost_is_named(self, manifest: Path, output: Path, tiny_folder: Path) -> None:
        rows = _recorded(manifest, tiny_folder)
        _write(output, failure("b", ErrorCode.TIMEOUT, 9, fingerprint=rows[1]["fingerprint"]))
        s = self._conclude(manifest, output, tiny_folder, rows[0], *rows[2:])
        assert s.error is not None
        assert "1 rows were to be tried again and were not: b." in s.error

    def test_an_edit_done_twice_ends_as_one_record(self, manifest: Path, output: Path, tiny_folder: Path) -> None:
        # Ray replays a task whose worker died, after it had written its records
        rows = _recorded(manifest, tiny_folder)
        _write(output, *rows[:2])
        s = self._conclude(manifest, output, tiny_folder, *rows)
        assert (s.error, s.edited) == (None, 4)
        assert len(pq.read_table(files(output)[0])) == 4

    def test_a_run_that_was_stopped_owes_nothing(self, manifest: Path, output: Path, tiny_folder: Path) -> None:
        _write(output, record("z"))
        s = self._conclude(manifest, output, tiny_folder, *_recorded(manifest, tiny_folder)[:1], interrupted=True)
        assert (s.error, s.edited, s.pending) == (None, 1, 3)
        assert len(files(output)) == 2, "some worker may still be writing"

    def test_a_damaged_record_file_does_not_hide_why_the_run_broke_off(
        self, manifest: Path, output: Path, tiny_folder: Path
    ) -> None:
        _write(output, record("z"))
        scan = _scan(manifest, tiny_folder)
        (output / "records" / "records-0.parquet").write_text("oops")
        for error, expected in ((None, "records-0.parquet is not a readable"), ("no GPU", "no GPU")):
            summary = JobSummary(str(output), rows=4, error=error)
            conclude(summary, scan, np.zeros(4, np.int16))
            assert expected in (summary.error or "")


class _Stored:
    """A dataset of two blocks."""

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        yield from [pa.table({"status": ["edited", "failed"]})] * 2


class TestDraining:
    def test_counts_reach_summary_and_progress(self, output: Path) -> None:
        seen: list[tuple[int, Counter[str]]] = []
        summary = JobSummary(str(output), rows=4)
        with Lease(str(output)) as lease:
            job_module._drain(_Stored(), 4, summary, lambda n, c: seen.append((n, Counter(c))), lease)
        assert summary.edited_now == 4
        assert [(n, c["failed"]) for n, c in seen] == [(4, 0), (4, 1), (4, 2)]

    def test_a_run_whose_output_was_taken_over_stops(self, output: Path) -> None:
        with Lease(str(output)) as lease:
            lease.lost = True
            with pytest.raises(OutputError, match=r"another run has taken .*out over"):
                job_module._drain(_Stored(), 4, JobSummary(str(output), rows=4), None, lease)
