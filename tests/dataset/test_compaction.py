from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffedit_ray.dataset import compaction, records
from diffedit_ray.dataset.compaction import compact
from diffedit_ray.dataset.records import OutputLayout
from diffedit_ray.errors import ErrorCode
from tests.dataset.outputs import SCHEMA, failure, files, record, write


def _ids(file: Path) -> list[str]:
    return sorted(pq.read_table(file)["id"].to_pylist())


class TestMerging:
    def test_nothing_there(self, tmp_path: Path) -> None:
        assert compact(str(tmp_path / "none")) == 0
        assert not (tmp_path / "none").exists()

    def test_one_file_one_record_an_id(self, tmp_path: Path) -> None:
        for age in (3, 2, 1):
            write(tmp_path, record("a", age, sha256=f"{age}"), record(f"b{age}"))
        before = records.read_records(str(tmp_path)).sort_by("id")
        assert compact(str(tmp_path)) == 4
        (file,) = files(tmp_path)
        table = pq.read_table(file)
        assert sorted(table["id"].to_pylist()) == ["a", "b1", "b2", "b3"]
        assert table.sort_by("id").equals(before)
        assert table.schema.metadata == SCHEMA.metadata

    def test_nothing_to_do_touches_nothing(self, tmp_path: Path) -> None:
        file = write(tmp_path, record("a"), record("b"))
        stamp = file.stat().st_mtime_ns
        assert compact(str(tmp_path)) == 2
        assert files(tmp_path) == [file]
        assert file.stat().st_mtime_ns == stamp

    def test_duplicates_within_one_file_go_too(self, tmp_path: Path) -> None:
        write(tmp_path, record("a", 1), record("a", 0, sha256="new"))
        assert compact(str(tmp_path)) == 1
        assert pq.read_table(files(tmp_path)[0])["sha256"].to_pylist() == ["new"]

    def test_a_crash_before_the_old_files_are_gone_is_harmless(self, tmp_path: Path) -> None:
        write(tmp_path, record("a", 2), record("b", 2))
        write(tmp_path, record("a", 1, sha256="new"))
        old = {file: file.read_bytes() for file in files(tmp_path)}
        compact(str(tmp_path))
        whole = records.read_records(str(tmp_path)).sort_by("id")
        for file, data in old.items():
            file.write_bytes(data)
        assert records.read_records(str(tmp_path)).sort_by("id").equals(whole)
        assert compact(str(tmp_path)) == 2
        assert pq.read_table(files(tmp_path)[0]).sort_by("id").equals(whole)

    def test_runs_that_carried_different_columns(self, tmp_path: Path) -> None:
        write(tmp_path, record("a", shop=1))
        write(tmp_path, record("b", tag="x"), schema=records.record_schema([pa.field("tag", pa.string())]))
        assert compact(str(tmp_path)) == 2
        rows = {r["id"]: (r["shop"], r["tag"]) for r in pq.read_table(files(tmp_path)[0]).to_pylist()}
        assert rows == {"a": (1, None), "b": (None, "x")}


class TestManyRecords:
    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(compaction, "MERGED_ROWS", 10)

    def test_no_merged_file_grows_beyond_its_size(self, tmp_path: Path) -> None:
        for i in range(9):
            write(tmp_path, *(record(f"{i}-{j}") for j in range(3)))
        assert compact(str(tmp_path)) == 27
        sizes = [pq.read_metadata(file).num_rows for file in files(tmp_path)]
        assert sorted(sizes) == [9, 9, 9]
        assert sorted(i for file in files(tmp_path) for i in _ids(file)) == sorted(
            f"{i}-{j}" for i in range(9) for j in range(3)
        )

    def test_a_night_with_few_new_rows_leaves_the_full_files_alone(self, tmp_path: Path) -> None:
        full = write(tmp_path, *(record(f"full-{i}", 9) for i in range(8)))
        changed = write(tmp_path, *(record(f"changed-{i}", 9) for i in range(8)))
        write(tmp_path, record("new"), record("changed-3", sha256="new"))
        assert compact(str(tmp_path)) == 17
        left = files(tmp_path)
        assert full in left
        assert changed not in left
        assert sorted(i for file in left for i in _ids(file)) == sorted(
            [*(f"full-{i}" for i in range(8)), *(f"changed-{i}" for i in range(8)), "new"]
        )
        assert records.read_records(str(tmp_path), ["sha256"])["sha256"].drop_null().to_pylist() == ["new"]

    def test_a_file_that_lost_every_record_leaves_nothing(self, tmp_path: Path) -> None:
        write(tmp_path, *(record(f"{i}", 5) for i in range(8)))
        newer = write(tmp_path, *(record(f"{i}") for i in range(8)))
        assert compact(str(tmp_path)) == 8
        assert files(tmp_path) == [newer]


class TestOrphans:
    def _edited(self, output: Path, row_id: str, age: float, image_format: str = "png") -> dict[str, Any]:
        layout = OutputLayout(str(output))
        uris = layout.image(row_id, image_format), layout.mask(row_id)
        for uri in uris:
            Path(uri).parent.mkdir(parents=True, exist_ok=True)
            Path(uri).write_text(row_id)
        return record(row_id, age, edited_uri=uris[0], mask_uri=uris[1])

    def _left(self, output: Path) -> set[str]:
        return {file.name for part in ("images", "masks") for file in (output / part).rglob("*") if file.is_file()}

    def test_files_that_no_record_names_any_more_go(self, tmp_path: Path) -> None:
        rows = [self._edited(tmp_path, name, 9) for name in ("same", "failed", "unchanged")]
        write(tmp_path, *rows, self._edited(tmp_path, "format", 9, "jpg"))
        write(
            tmp_path,
            failure("failed", ErrorCode.NOT_FOUND),
            record("unchanged", status="unchanged"),
            self._edited(tmp_path, "format", 0),
        )
        compact(str(tmp_path))
        assert self._left(tmp_path) == {"same.png", "format.png"}
        assert (tmp_path / "images" / "fo" / "format.png").exists()
        assert (tmp_path / "masks" / "fo" / "format.png").exists()
        assert not (tmp_path / "images" / "fo" / "format.jpg").exists()

    def test_files_a_new_record_still_names_stay(self, tmp_path: Path) -> None:
        write(tmp_path, self._edited(tmp_path, "again", 9))
        write(tmp_path, self._edited(tmp_path, "again", 0))
        compact(str(tmp_path))
        assert (tmp_path / "images" / "ag" / "again.png").exists()
        assert (tmp_path / "masks" / "ag" / "again.png").exists()

    def test_an_output_that_was_copied_keeps_its_hands_off_the_original(self, tmp_path: Path) -> None:
        old, new = tmp_path / "old", tmp_path / "new"
        write(new, self._edited(old, "a", 9))
        write(new, record("a", status="unchanged"))
        compact(str(new))
        assert self._left(old) == {"a.png"}
