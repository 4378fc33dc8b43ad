from __future__ import annotations

import json
import threading
from pathlib import Path

import pyarrow as pa
import pytest

from diffedit_ray.dataset import records
from diffedit_ray.dataset.compaction import compact
from diffedit_ray.dataset.records import OutputLayout
from diffedit_ray.errors import ErrorCode, MissingError, OutputError
from diffedit_ray.settings import EditSettings
from tests.dataset.outputs import SCHEMA, START, record, write


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
    def test_a_file_that_vanishes_while_reading_was_merged_into_another(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path, record("a"))
        write(tmp_path, record("b"))
        whole = records.read_file
        first = threading.Lock()

        def merging(uri: str, columns: list[str] | None) -> pa.Table:
            if first.acquire(blocking=False):  # as if a run had ended between the listing and the reading
                monkeypatch.undo()
                assert compact(str(tmp_path)) == 2
                raise MissingError(uri)
            return whole(uri, columns)

        monkeypatch.setattr(records, "read_file", merging)
        assert sorted(records.read_records(str(tmp_path), ["id"])["id"].to_pylist()) == ["a", "b"]
        assert first.locked()

    def test_a_folder_that_never_holds_still(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def vanished(uri: str, columns: list[str] | None) -> pa.Table:
            raise MissingError(uri)

        write(tmp_path, record("a"))
        monkeypatch.setattr(records, "read_file", vanished)
        with pytest.raises(OutputError, match="changes faster than it can be read"):
            records.read_records(str(tmp_path))

    def test_an_output_without_records_is_empty_and_typed(self, tmp_path: Path) -> None:
        assert records.read_records(str(tmp_path / "none")).schema.names == list(records.NAMES)
        assert len(records.read_records(str(tmp_path / "none"), ["id", "status"])) == 0

    def test_what_was_written(self, tmp_path: Path) -> None:
        write(tmp_path, record("a", mask_fraction=0.25, shop=3), record("b"))
        table = records.read_records(str(tmp_path))
        assert table.schema.names == SCHEMA.names
        assert table["mask_fraction"].to_pylist() == [0.25, None]
        assert table["shop"].to_pylist() == [3, None]
        assert table["recorded_at"][0].as_py() == START

    def test_the_newest_record_of_an_id_wins_whatever_file_it_is_in(self, tmp_path: Path) -> None:
        # file names are random, so the order of files says nothing
        for age in (5, 1, 9, 3):
            write(tmp_path, record("a", age, fingerprint=f"age-{age}"), record(f"only-{age}"))
        rows = {
            r["id"]: r["fingerprint"] for r in records.read_records(str(tmp_path), ["id", "fingerprint"]).to_pylist()
        }
        assert rows["a"] == "age-1"
        assert len(rows) == 5

    def test_columns_can_be_chosen(self, tmp_path: Path) -> None:
        write(tmp_path, record("a"))
        assert records.read_records(str(tmp_path), ["status", "sha256"]).column_names == ["status", "sha256"]

    def test_runs_may_carry_different_columns(self, tmp_path: Path) -> None:
        write(tmp_path, record("a", shop=1))
        write(tmp_path, record("b", tag="x"), schema=records.record_schema([pa.field("tag", pa.string())]))
        rows = {r["id"]: r for r in records.read_records(str(tmp_path)).to_pylist()}
        assert (rows["a"]["shop"], rows["a"]["tag"], rows["b"]["shop"], rows["b"]["tag"]) == (1, None, None, "x")

    def test_a_file_that_is_none(self, tmp_path: Path) -> None:
        write(tmp_path, record("a"))
        (tmp_path / "records" / "records-0.parquet").write_text("oops")
        with pytest.raises(OutputError, match=r"records-0\.parquet is not a readable record file"):
            records.read_records(str(tmp_path))


def test_every_code_is_judged() -> None:
    # those that may succeed by themselves; a new code has to be put on one side
    assert set(ErrorCode) - records.PERMANENT == {
        ErrorCode.FORBIDDEN,
        ErrorCode.FETCH_FAILED,
        ErrorCode.OUT_OF_MEMORY,
        ErrorCode.WORKER_DIED,
        ErrorCode.TIMEOUT,
        ErrorCode.EDIT_FAILED,
        ErrorCode.STORE_FAILED,
    }


def test_a_carried_column_of_another_type_is_refused_before_any_work(tmp_path: Path) -> None:
    write(tmp_path, record("a", shop=1))
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


class TestRunFiles:
    def test_none(self, tmp_path: Path) -> None:
        assert records.read_json(f"{tmp_path}/none.json") is None

    @pytest.mark.parametrize("text", ["oops", "[1]", '{"a": 1'])
    def test_a_damaged_one(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(OutputError, match=r"a\.json is damaged"):
            records.read_json(f"{tmp_path}/a.json")
