from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffedit_ray.dataset.manifest import RowPlanner, manifest_files, manifest_schema, match_columns
from diffedit_ray.dataset.recorded import read_recorded
from diffedit_ray.dataset.scan import Scan, scan_manifest
from diffedit_ray.errors import ErrorCode, ManifestError
from diffedit_ray.settings import EditSettings
from tests.dataset.outputs import START, failure, record, write

Rows = Iterable[Mapping[str, Any]]


def _row(name: str, **values: Any) -> dict[str, Any]:
    return {"image_uri": f"{name}.png", "query": "a zebra", "id": name, **values}


def _scan(folder: Path, *files: Rows) -> Scan:
    folder.mkdir(exist_ok=True)
    for i, rows in enumerate(files):
        pq.write_table(pa.Table.from_pylist([dict(r) for r in rows]), folder / f"{i}.parquet", row_group_size=3)
    found = manifest_files(str(folder))
    return scan_manifest(found, RowPlanner(match_columns(manifest_schema(found), {}), EditSettings(), "r1", "png"))


def _done(scan: Scan, *rows: Mapping[str, Any], **values: Any) -> list[dict[str, Any]]:
    return [record(p.id, fingerprint=p.fingerprint, **values) for p in map(scan.planner.plan, rows)]


def _turns(scan: Scan, output: Path, *, retry_failed: bool = True, retry_permanent: bool = False) -> list[int]:
    recorded = read_recorded(str(output))
    found: list[int] = scan.turns(recorded, retry_failed=retry_failed, retry_permanent=retry_permanent).tolist()
    return found


class TestScanning:
    def test_distinct_rows_are_counted_and_the_first_of_equal_ones_is_taken(self, tmp_path: Path) -> None:
        same, other = {"image_uri": "a.png", "query": "q"}, {"image_uri": "b.png", "query": "q"}
        scan = _scan(tmp_path / "m", [other, same, other, same], [same, other])
        assert (len(scan.ids), scan.total) == (2, 6)
        assert sorted(scan.rows.tolist()) == [0, 1]
        assert _turns(scan, tmp_path) == [1, 1, 0, 0, 0, 0]

    def test_equal_rows_with_an_id_of_their_own_are_one_too(self, tmp_path: Path) -> None:
        scan = _scan(tmp_path / "m", [_row("a"), _row("a")])
        assert (len(scan.ids), scan.total) == (1, 2)

    def test_an_id_that_names_two_rows_is_refused_with_its_name(self, tmp_path: Path) -> None:
        rows = [_row(f"{i}") for i in range(20)]
        changed = [{**row, "query": "a cow"} for row in rows[:12]]
        with pytest.raises(ManifestError) as caught:
            _scan(tmp_path / "m", rows, changed, rows)
        message = str(caught.value)
        assert "12 rows repeat the id of an earlier, different row: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …" in message

    def test_an_empty_manifest(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        schema = pa.schema([("image_uri", pa.string()), ("query", pa.string())])
        pq.write_table(schema.empty_table(), tmp_path / "m.parquet")
        scan = scan_manifest(
            [str(tmp_path / "m.parquet")], RowPlanner(match_columns(schema, {}), EditSettings(), "r1", "png")
        )
        assert (len(scan.ids), scan.total, _turns(scan, tmp_path)) == (0, 0, [])
        assert "no rows" in caplog.text

    def test_ids_are_found_again_by_their_place(self, tmp_path: Path) -> None:
        scan = _scan(tmp_path / "m", [_row(f"{i}") for i in range(7)], [_row("x"), _row("y")])
        assert scan.names(np.array([8, 3, 7])) == ["3", "x", "y"]
        assert scan.names(np.array([8, 3, 7]), limit=1) == ["3"]
        assert scan.names(np.array([], np.int64)) == []


class TestTurns:
    def test_what_is_new_changed_or_may_pass_is_worked_on(self, tmp_path: Path) -> None:
        rows = [_row(name) for name in ("done", "new", "changed", "slow", "gone", "same")]
        scan = _scan(tmp_path / "m", rows)
        done = _done(scan, rows[0], rows[5])
        done[1]["status"] = "unchanged"
        slow, gone = (scan.planner.plan(row).fingerprint for row in (rows[3], rows[4]))
        write(
            tmp_path,
            *done,
            record("changed"),
            record("left the manifest"),
            failure("slow", ErrorCode.TIMEOUT, fingerprint=slow, attempts=4),
            failure("gone", ErrorCode.NOT_FOUND, fingerprint=gone, attempts=2),
        )
        assert _turns(scan, tmp_path) == [0, 1, 1, 5, 0, 0]
        assert _turns(scan, tmp_path, retry_permanent=True) == [0, 1, 1, 5, 3, 0]
        assert _turns(scan, tmp_path, retry_failed=False) == [0, 1, 1, 0, 0, 0]

    def test_a_changed_row_starts_counting_anew_even_if_it_failed(self, tmp_path: Path) -> None:
        scan = _scan(tmp_path / "m", [_row("a")])
        write(tmp_path, failure("a", ErrorCode.NOT_FOUND, attempts=7))
        assert _turns(scan, tmp_path) == [1]

    def test_only_spans_with_work_are_read_again(self, tmp_path: Path) -> None:
        rows = [_row(f"{i}") for i in range(9)]
        scan = _scan(tmp_path / "m", rows)
        assert [span.rows for span in scan.spans] == [3, 3, 3]
        write(tmp_path, *_done(scan, *rows[:4], *rows[6:]))
        turns = scan.turns(read_recorded(str(tmp_path)), retry_failed=True, retry_permanent=False)
        assert scan.pending_spans(turns) == [scan.spans[1]]


ROWS = [_row(name) for name in ("a", "b", "c", "d")]


class TestReconciling:
    def _found(self, tmp_path: Path, before: Rows, after: Rows) -> tuple[Scan, Any]:
        scan = _scan(tmp_path / "m", ROWS)
        write(tmp_path, *before)
        turns = scan.turns(read_recorded(str(tmp_path)), retry_failed=True, retry_permanent=False)
        write(tmp_path, *after)
        return scan, scan.reconcile(read_recorded(str(tmp_path)), turns)

    def test_a_whole_run_has_nothing_to_complain_of(self, tmp_path: Path) -> None:
        scan = _scan(tmp_path / "m", ROWS)
        good = _done(scan, *ROWS)
        good[1].update(status="unchanged")
        good[2].update(failure("c", ErrorCode.TIMEOUT, fingerprint=good[2]["fingerprint"]))
        good[3].update(failure("d", ErrorCode.TIMEOUT, fingerprint=good[3]["fingerprint"]))
        scan, found = self._found(tmp_path, [], [*good, record("left the manifest")])
        assert found.statuses == {"edited": 1, "unchanged": 1, "failed": 2}
        assert found.errors == {"timeout": 2}
        assert found.complaint(scan) is None

    def test_a_row_without_a_record(self, tmp_path: Path) -> None:
        scan = _scan(tmp_path / "m", ROWS)
        scan, found = self._found(tmp_path, [], _done(scan, *ROWS[:2]))
        assert found.statuses == {"edited": 2, "unchanged": 0, "failed": 0}
        complaint = found.complaint(scan) or ""
        assert complaint.startswith("after the run 2 rows have no record: c, d. Run the same command again")

    def test_a_changed_row_with_its_old_record_only(self, tmp_path: Path) -> None:
        scan = _scan(tmp_path / "m", ROWS)
        scan, found = self._found(tmp_path, [record("b", 9)], [r for r in _done(scan, *ROWS) if r["id"] != "b"])
        assert found.statuses == {"edited": 3, "unchanged": 0, "failed": 0}
        assert "1 rows have only the record of what they were before they changed: b" in (found.complaint(scan) or "")

    def test_a_failure_that_was_to_be_tried_again_and_was_not(self, tmp_path: Path) -> None:
        scan = _scan(tmp_path / "m", ROWS)
        done = _done(scan, *ROWS)
        slow = failure("d", ErrorCode.TIMEOUT, 9, fingerprint=done[3]["fingerprint"])
        scan, found = self._found(tmp_path, [slow], done[:3])
        assert "1 rows were to be tried again and were not: d" in (found.complaint(scan) or "")
        write(tmp_path, {**slow, "attempts": 2, "recorded_at": START})  # of equally late ones either may count
        turns = np.array([0, 0, 0, 2], np.int16)
        assert scan.reconcile(read_recorded(str(tmp_path)), turns).untried.tolist() == []

    def test_a_row_with_two_records(self, tmp_path: Path) -> None:
        scan = _scan(tmp_path / "m", ROWS)
        scan, found = self._found(tmp_path, _done(scan, *ROWS), _done(scan, ROWS[2]))
        assert found.statuses["edited"] == 4
        assert "1 rows have more than one record: c" in (found.complaint(scan) or "")

    def test_nothing_recorded_at_all(self, tmp_path: Path) -> None:
        scan, found = self._found(tmp_path, [], [])
        assert "4 rows have no record: a, b, c, d" in (found.complaint(scan) or "")


def test_a_row_costs_little_memory(tmp_path: Path) -> None:
    # what a hundred million of them need is stated in ARCHITECTURE.md
    scan = _scan(tmp_path / "m", [_row("x" * 100 + str(i)) for i in range(300)])
    assert scan.ids.nbytes + scan.prints.nbytes + scan.rows.nbytes == 32 * 300
    turns = scan.turns(read_recorded(str(tmp_path)), retry_failed=True, retry_permanent=False)
    assert turns.nbytes == 2 * 300
