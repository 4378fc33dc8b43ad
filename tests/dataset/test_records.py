from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffedit_ray.dataset import records
from diffedit_ray.dataset.records import EDITED, FAILED, OutputLayout
from diffedit_ray.errors import ErrorCode, OutputError
from diffedit_ray.settings import EditSettings

START = datetime(2026, 1, 1, tzinfo=UTC)
SCHEMA = records.record_schema([pa.field("shop", pa.int16())])


def _record(row_id: str, age: int = 0, **values: Any) -> dict[str, Any]:
    return {
        "id": row_id,
        "fingerprint": f"f-{row_id}",
        "status": EDITED,
        "attempts": 1,
        "seed": 1,
        "recorded_at": START - timedelta(seconds=age),
        **values,
    }


def _write(output: Path, *rows: Mapping[str, Any], schema: pa.Schema = SCHEMA) -> Path:
    return Path(records.write_records(OutputLayout(str(output)), rows, schema))


def _files(output: Path) -> list[Path]:
    return sorted((output / "records").iterdir())


class TestSchema:
    def test_it_is_versioned_and_has_every_setting_under_its_own_name(self) -> None:
        assert SCHEMA.metadata[b"diffedit_ray_records"] == str(records.SCHEMA_VERSION).encode()
        assert set(EditSettings.model_fields) <= set(records.NAMES)
        assert SCHEMA.names == [*records.NAMES, "shop"]

    def test_what_users_build_on(self) -> None:
        # renaming any of these breaks somebody's query: raise SCHEMA_VERSION with it
        kinds = {f.name: str(f.type) for f in SCHEMA}
        assert {
            name: kinds[name] for name in ("id", "fingerprint", "status", "error_code", "edited_uri", "sha256")
        } == {name: "string" for name in ("id", "fingerprint", "status", "error_code", "edited_uri", "sha256")}
        assert kinds["recorded_at"] == "timestamp[us, tz=UTC]"
        assert kinds["seed"] == "int64"
        assert kinds["composite"] == "bool"
        assert kinds["mask_fraction"] == kinds["fetch_seconds"] == kinds["guidance_scale"] == "double"

    @pytest.mark.parametrize(
        ("name", "expected"),
        [("shop", "shop"), ("status", "manifest_status"), ("id", "manifest_id"), ("manifest_id", "manifest_id")],
    )
    def test_a_carried_column_steps_aside_for_a_records_own(self, name: str, expected: str) -> None:
        assert records.carried_name(name, records.NAMES) == expected

    def test_it_steps_aside_twice_if_need_be(self) -> None:
        assert records.carried_name("status", [*records.NAMES, "manifest_status"]) == "manifest_manifest_status"


def test_the_layout_depends_on_the_id_alone() -> None:
    layout = OutputLayout("s3://b/out/")
    assert layout.image("abcdef", "jpg") == "s3://b/out/images/ab/abcdef.jpg"
    assert layout.mask("abcdef") == "s3://b/out/masks/ab/abcdef.png"
    assert layout.image("a", "png") == "s3://b/out/images/a/a.png"
    assert layout.config == "s3://b/out/_run/config.json"


class TestReading:
    def test_an_output_without_records_is_empty_and_typed(self, tmp_path: Path) -> None:
        assert records.read_records(str(tmp_path / "none")).schema.names == list(records.NAMES)
        assert len(records.read_records(str(tmp_path / "none"), ["id", "status"])) == 0
        assert records.compact(str(tmp_path / "none")) == 0

    def test_what_was_written(self, tmp_path: Path) -> None:
        _write(tmp_path, _record("a", mask_fraction=0.25, shop=3), _record("b"))
        table = records.read_records(str(tmp_path))
        assert table.schema.names == SCHEMA.names
        assert table["mask_fraction"].to_pylist() == [0.25, None]
        assert table["shop"].to_pylist() == [3, None]
        assert table["recorded_at"][0].as_py() == START

    def test_the_newest_record_of_an_id_wins_whatever_file_it_is_in(self, tmp_path: Path) -> None:
        # file names are random, so the order of files says nothing
        for age in (5, 1, 9, 3):
            _write(tmp_path, _record("a", age, fingerprint=f"age-{age}"), _record(f"only-{age}"))
        rows = {
            r["id"]: r["fingerprint"] for r in records.read_records(str(tmp_path), ["id", "fingerprint"]).to_pylist()
        }
        assert rows["a"] == "age-1"
        assert len(rows) == 5

    def test_columns_can_be_chosen(self, tmp_path: Path) -> None:
        _write(tmp_path, _record("a"))
        assert records.read_records(str(tmp_path), ["status", "sha256"]).column_names == ["status", "sha256"]

    def test_runs_may_carry_different_columns(self, tmp_path: Path) -> None:
        _write(tmp_path, _record("a", shop=1))
        _write(tmp_path, _record("b", tag="x"), schema=records.record_schema([pa.field("tag", pa.string())]))
        rows = {r["id"]: r for r in records.read_records(str(tmp_path)).to_pylist()}
        assert (rows["a"]["shop"], rows["a"]["tag"], rows["b"]["shop"], rows["b"]["tag"]) == (1, None, None, "x")

    def test_a_file_that_is_none(self, tmp_path: Path) -> None:
        _write(tmp_path, _record("a"))
        (tmp_path / "records" / "records-0.parquet").write_text("oops")
        with pytest.raises(OutputError, match=r"records-0\.parquet is not a readable record file"):
            records.read_records(str(tmp_path))


class TestCompacting:
    def test_one_file_one_record_an_id(self, tmp_path: Path) -> None:
        for age in (3, 2, 1):
            _write(tmp_path, _record("a", age, sha256=f"{age}"), _record(f"b{age}"))
        before = records.read_records(str(tmp_path)).sort_by("id")
        assert records.compact(str(tmp_path)) == 4
        (file,) = _files(tmp_path)
        table = pq.read_table(file)
        assert sorted(table["id"].to_pylist()) == ["a", "b1", "b2", "b3"]
        assert table.sort_by("id").equals(before)
        assert table.schema.metadata == SCHEMA.metadata

    def test_nothing_to_do_touches_nothing(self, tmp_path: Path) -> None:
        file = _write(tmp_path, _record("a"), _record("b"))
        stamp = file.stat().st_mtime_ns
        assert records.compact(str(tmp_path)) == 2
        assert _files(tmp_path) == [file]
        assert file.stat().st_mtime_ns == stamp

    def test_duplicates_within_one_file_go_too(self, tmp_path: Path) -> None:
        _write(tmp_path, _record("a", 1), _record("a", 0, sha256="new"))
        assert records.compact(str(tmp_path)) == 1
        assert pq.read_table(_files(tmp_path)[0])["sha256"].to_pylist() == ["new"]

    def test_a_crash_before_the_old_files_are_gone_is_harmless(self, tmp_path: Path) -> None:
        _write(tmp_path, _record("a", 2), _record("b", 2))
        _write(tmp_path, _record("a", 1, sha256="new"))
        old = {file: file.read_bytes() for file in _files(tmp_path)}
        records.compact(str(tmp_path))
        whole = records.read_records(str(tmp_path)).sort_by("id")
        for file, data in old.items():
            file.write_bytes(data)
        assert records.read_records(str(tmp_path)).sort_by("id").equals(whole)
        assert records.compact(str(tmp_path)) == 2
        assert pq.read_table(_files(tmp_path)[0]).sort_by("id").equals(whole)


class TestDone:
    @pytest.fixture
    def output(self, tmp_path: Path) -> str:
        _write(
            tmp_path,
            _record("edited"),
            _record("same", status="unchanged"),
            _record("gone", status=FAILED, error_code=ErrorCode.NOT_FOUND.value, attempts=2),
            _record("slow", status=FAILED, error_code=ErrorCode.TIMEOUT.value, attempts=3),
        )
        return str(tmp_path)

    @pytest.mark.parametrize(
        ("retry", "again"), [("transient", {"slow"}), ("all", {"slow", "gone"}), ("none", set[str]())]
    )
    def test_which_failures_are_tried_again(self, output: str, retry: str, again: set[str]) -> None:
        done = records.read_done(output, retry)
        assert set(done.fingerprints) == {"edited", "same", "gone", "slow"} - again
        assert done.attempts == {"gone": 2, "slow": 3}

    def test_fingerprints_are_the_recorded_ones(self, output: str) -> None:
        assert records.read_done(output, "none").fingerprints["edited"] == "f-edited"

    def test_a_failure_that_later_succeeded_is_done(self, output: str) -> None:
        _write(Path(output), _record("slow", -5))
        done = records.read_done(output, "all")
        assert "slow" in done.fingerprints
        assert "slow" not in done.attempts

    def test_every_code_is_judged(self) -> None:
        # those that may succeed by themselves; a new code has to be put on one side
        assert set(ErrorCode) - records.PERMANENT == {
            ErrorCode.FORBIDDEN,
            ErrorCode.FETCH_FAILED,
            ErrorCode.TIMEOUT,
            ErrorCode.EDIT_FAILED,
            ErrorCode.STORE_FAILED,
        }


def test_a_carried_column_of_another_type_is_refused_before_any_work(tmp_path: Path) -> None:
    _write(tmp_path, _record("a", shop=1))
    records.check_types(str(tmp_path), SCHEMA)
    records.check_types(
        str(tmp_path), records.record_schema([pa.field("shop", pa.int64()), pa.field("tag", pa.string())])
    )
    with pytest.raises(OutputError, match=r"does not go with this manifest: .*shop"):
        records.check_types(str(tmp_path), records.record_schema([pa.field("shop", pa.string())]))


def test_run_files_are_json_for_people(tmp_path: Path) -> None:
    records.write_json(f"{tmp_path}/_run/config.json", {"a": 1, "path": Path("x")})
    text = (tmp_path / "_run" / "config.json").read_text()
    assert json.loads(text) == {"a": 1, "path": "x"}
    assert text.count("\n") > 2
    assert text.endswith("}\n")
