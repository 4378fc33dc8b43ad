from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from diffedit_ray.cli import main
from diffedit_ray.dataset import records, storage
from diffedit_ray.dataset.lease import Lease
from diffedit_ray.dataset.manifest import RowPlanner, manifest_schema, match_columns
from diffedit_ray.diffusion.checkpoint import model_revision
from diffedit_ray.settings import EditSettings, JobSettings

ROOT = Path(__file__).parents[1]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    file = tmp_path / "m.parquet"
    rows = [{"image_uri": "a.png", "query": ""}, {"image_uri": "none.png", "query": "a zebra"}]
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


@pytest.fixture
def recorded(manifest: Path, tiny_folder: Path, tmp_path: Path) -> Path:
    """An output in which every row of the manifest has failed for good, so that a run has nothing to do."""
    output = tmp_path / "out"
    columns = match_columns(manifest_schema([str(manifest)]), {})
    planner = RowPlanner(columns, EditSettings(), model_revision(str(tiny_folder)), "png")
    rows: list[dict[str, Any]] = []
    for row, code in zip(pq.read_table(manifest).to_pylist(), ("bad_row", "not_found"), strict=True):
        planned = planner.plan(row)
        rows.append(
            {
                "id": planned.id,
                "fingerprint": planned.fingerprint,
                "status": "failed",
                "error_code": code,
                "error_message": "[red] gone",
                "attempts": 1,
                "seed": planned.seed,
                "recorded_at": datetime.now(UTC),
            }
        )
    records.write_records(records.OutputLayout(str(output)), rows, records.record_schema([]))
    return output


def _complaint(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line on stderr that wrong use gets, besides exit code 2."""
    assert main([str(a) for a in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1, shown.err
    assert shown.err.startswith("diffedit-ray: ")
    return shown.err


class TestHelp:
    @pytest.mark.parametrize("command", ["edit", "demo"])
    def test_every_setting_is_an_option(
        self, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        assert main([command, "--help"]) == 0
        shown = capsys.readouterr().out
        fields = [*EditSettings.model_fields, *JobSettings.model_fields]
        assert [f for f in fields if f"--{f.replace('_', '-')}" not in shown] == []
        assert {"--no-composite", "--no-retry-failed"} <= set(shown.replace(",", " ").replace("/", " ").split())

    def test_the_commands_are_listed(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["-h"]) == 0
        shown = capsys.readouterr().out
        assert {"edit", "demo", "status", "failures"} <= set(shown.split())

    def test_nothing_at_all_shows_the_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([]) == 2
        assert "Usage" in capsys.readouterr().out


class TestWrongUse:
    def test_an_unknown_option(self, capsys: pytest.CaptureFixture[str], manifest: Path) -> None:
        assert "--stepz" in _complaint(capsys, "edit", manifest, "out", "--model", "demo", "--stepz", "5")

    def test_an_unknown_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "edti" in _complaint(capsys, "edti")

    @pytest.mark.parametrize(
        ("arguments", "named"), [(["m.parquet", "--model", "demo"], "OUTPUT"), (["m.parquet", "out"], "--MODEL")]
    )
    def test_a_missing_argument(self, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
        assert named in _complaint(capsys, "edit", *arguments).upper()

    @pytest.mark.parametrize(
        ("option", "value", "named"),
        [
            ("--steps", "1", "steps: "),
            ("--steps", "many", "--steps"),
            ("--encoding-ratio", "1.5", "encoding_ratio: "),
            ("--max-failed", "2", "max_failed: "),
            ("--batch-size", "0", "batch_size: "),
            ("--image-format", "gif", "gif"),
            ("--dtype", "int8", "int8"),
            ("--retry-failed", "some", "some"),
        ],
    )
    def test_a_value_out_of_range(
        self, capsys: pytest.CaptureFixture[str], manifest: Path, option: str, value: str, named: str
    ) -> None:
        assert named in _complaint(capsys, "edit", manifest, "out", "--model", "demo", option, value)

    @pytest.mark.parametrize("columns", ["image_uri", "image_uri=", "=url", "image_uri=url,,query=q"])
    def test_columns_of_the_wrong_form(self, capsys: pytest.CaptureFixture[str], manifest: Path, columns: str) -> None:
        line = _complaint(capsys, "edit", manifest, "out", "--model", "demo", "--columns", columns)
        assert "NAME=COLUMN" in line

    @pytest.mark.parametrize(
        ("text", "named"),
        [
            ('{"s3": {"secret": "swordfish"', "not JSON"),
            ('{"s3": "swordfish"}', "storage_options.s3"),
            ("swordfish", "the path of a JSON file: No such file"),
        ],
    )
    def test_storage_options_of_the_wrong_form_are_not_shown(
        self, capsys: pytest.CaptureFixture[str], manifest: Path, text: str, named: str
    ) -> None:
        line = _complaint(capsys, "edit", manifest, "out", "--model", "demo", "--storage-options", text)
        assert named in line
        assert "swordfish" not in line

    def test_a_file_of_storage_options_that_is_no_object(
        self, capsys: pytest.CaptureFixture[str], manifest: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "options.json").write_text('["swordfish"]')
        line = _complaint(
            capsys, "edit", manifest, "out", "--model", "demo", "--storage-options", tmp_path / "options.json"
        )
        assert "must be an object" in line
        assert "swordfish" not in line

    def test_columns_that_are_not_there(
        self, capsys: pytest.CaptureFixture[str], manifest: Path, tiny_folder: Path, tmp_path: Path
    ) -> None:
        arguments = ("edit", manifest, tmp_path / "out", "--model", tiny_folder, "--columns", "query=caption")
        assert "no column 'caption'; it has image_uri, query" in _complaint(capsys, *arguments)
        assert not (tmp_path / "out").exists()

    def test_a_missing_manifest(self, capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path) -> None:
        line = _complaint(capsys, "edit", tmp_path / "none.parquet", tmp_path / "out", "--model", tiny_folder)
        assert "no manifest at" in line
        assert "none.parquet" in line
        assert not (tmp_path / "out").exists()

    def test_a_manifest_that_is_none(
        self, capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "m.parquet").write_text("image_uri,query\n")
        line = _complaint(capsys, "edit", tmp_path / "m.parquet", tmp_path / "out", "--model", tiny_folder)
        assert "cannot be read as Parquet" in line

    def test_a_missing_model(self, capsys: pytest.CaptureFixture[str], manifest: Path, tmp_path: Path) -> None:
        assert "none" in _complaint(capsys, "edit", manifest, tmp_path / "out", "--model", tmp_path / "none")

    def test_a_folder_that_is_no_model(
        self, capsys: pytest.CaptureFixture[str], manifest: Path, tmp_path: Path
    ) -> None:
        assert "unet" in _complaint(capsys, "edit", manifest, tmp_path / "out", "--model", tmp_path)


class TestStorageOptions:
    @pytest.mark.parametrize("as_file", [True, False])
    def test_they_reach_storage_and_not_the_run_files(
        self, manifest: Path, recorded: Path, tiny_folder: Path, tmp_path: Path, as_file: bool
    ) -> None:
        given = '{"memory": {"secret": "swordfish"}}'
        if as_file:
            (tmp_path / "options.json").write_text(given)
            given = str(tmp_path / "options.json")
        try:
            arguments = ["edit", str(manifest), str(recorded), "--model", str(tiny_folder)]
            assert main([*arguments, "--storage-options", given, "--image-schemes", "s3,https"]) == 0
            assert storage.filesystem("memory://a")[0].storage_options == {"secret": "swordfish"}
        finally:
            storage.configure({})
        job = json.loads((recorded / "_run" / "config.json").read_text())["job"]
        assert job["storage_options"] == "memory(secret)"
        assert job["image_schemes"] == ["s3", "https"]
        assert [f for f in recorded.rglob("*") if f.is_file() and b"swordfish" in f.read_bytes()] == []


class TestExitCodes:
    def test_failures_within_the_limit(
        self, capsys: pytest.CaptureFixture[str], manifest: Path, recorded: Path, tiny_folder: Path
    ) -> None:
        assert main(["edit", str(manifest), str(recorded), "--model", str(tiny_folder)]) == 0
        shown = capsys.readouterr()
        assert f"nothing to do: all 2 rows are recorded in {recorded}" in shown.out.replace("\n", "")
        assert "bad_row" in shown.out
        assert "not_found" in shown.out

    @pytest.mark.parametrize(("accepted", "code"), [("0", 3), ("0.99", 3), ("1", 0)])
    def test_failures_beyond_it(
        self, manifest: Path, recorded: Path, tiny_folder: Path, accepted: str, code: int
    ) -> None:
        arguments = ["edit", str(manifest), str(recorded), "--model", str(tiny_folder), "--max-failed", accepted]
        assert main(arguments) == code

    def test_an_output_that_is_damaged_is_no_wrong_use(
        self, capsys: pytest.CaptureFixture[str], manifest: Path, recorded: Path, tiny_folder: Path
    ) -> None:
        (recorded / "records" / "records-0.parquet").write_text("oops")
        assert main(["edit", str(manifest), str(recorded), "--model", str(tiny_folder)]) == 1
        assert "records-0.parquet" in capsys.readouterr().err


class TestAnOutputThatIsNotOurs:
    def test_other_settings_are_wrong_use(
        self, capsys: pytest.CaptureFixture[str], manifest: Path, recorded: Path, tiny_folder: Path
    ) -> None:
        arguments = ["edit", str(manifest), str(recorded), "--model", str(tiny_folder)]
        assert main(arguments) == 0
        capsys.readouterr()
        line = _complaint(capsys, *arguments, "--steps", "20", "--image-format", "webp")
        assert "steps 50 there and 20 now; image_format png there and webp now" in line
        assert "--overwrite" in line
        assert main([*arguments, "--batch-size", "2", "--dtype", "float32"]) == 0

    def test_one_in_use_is_no_wrong_use(
        self, capsys: pytest.CaptureFixture[str], manifest: Path, recorded: Path, tiny_folder: Path
    ) -> None:
        with Lease(str(recorded)):
            assert main(["edit", str(manifest), str(recorded), "--model", str(tiny_folder)]) == 1
        assert f"{recorded} is in use by another run: " in capsys.readouterr().err

    @pytest.mark.parametrize("command", ["status", "failures"])
    def test_one_without_a_run(self, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
        assert f"there is no run at {tmp_path}/none" in _complaint(capsys, command, tmp_path / "none")


class TestLookingAtARun:
    @pytest.fixture(autouse=True)
    def _ran(
        self,
        manifest: Path,
        recorded: Path,
        tiny_folder: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("diffedit_ray.cli._console", Console(width=200))
        assert main(["edit", str(manifest), str(recorded), "--model", str(tiny_folder)]) == 0
        capsys.readouterr()

    def test_status_for_people(self, capsys: pytest.CaptureFixture[str], recorded: Path) -> None:
        assert main(["status", str(recorded)]) == 0
        shown = capsys.readouterr().out
        assert f"complete: {recorded}" in shown
        assert re.search(r"failed\W+2\b", shown)
        assert re.search(r"not_found\W+1\W+\[red\] gone", shown), "a message is no markup"
        assert re.search(r"pending\W+0\b", shown)

    def test_status_for_scripts(self, capsys: pytest.CaptureFixture[str], recorded: Path) -> None:
        assert main(["status", str(recorded), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["state"], found["rows"], found["failed"], found["pending"]) == ("complete", 2, 2, 0)

    def test_status_of_a_run_going_on(self, capsys: pytest.CaptureFixture[str], recorded: Path) -> None:
        with Lease(str(recorded)):
            assert main(["status", str(recorded)]) == 0
        shown = capsys.readouterr().out
        assert "running: " in shown
        assert f"(process {os.getpid()})" in shown

    def test_failures_for_people(
        self, capsys: pytest.CaptureFixture[str], recorded: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert main(["failures", str(recorded)]) == 0
        shown = capsys.readouterr().out
        assert "2 failed rows" in shown
        assert "[red] gone" in shown
        monkeypatch.setattr("diffedit_ray.cli.SHOWN_FAILURES", 1)
        assert main(["failures", str(recorded)]) == 0
        assert "and 1 more" in capsys.readouterr().out

    def test_failures_for_scripts(self, capsys: pytest.CaptureFixture[str], recorded: Path) -> None:
        assert main(["failures", str(recorded), "--json", "--code", "not_found"]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        found = json.loads(line)
        assert (found["error_code"], found["error_message"], found["attempts"]) == ("not_found", "[red] gone", 1)

    def test_a_code_that_is_none(self, capsys: pytest.CaptureFixture[str], recorded: Path) -> None:
        assert "no error code 'oops'; there are bad_row" in _complaint(capsys, "failures", recorded, "--code", "oops")


@pytest.mark.parametrize("program", [["-c", "from diffedit_ray.cli import entry; entry()"], ["jobs/edit.py"]])
def test_it_runs_as_a_program(program: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert done.stderr == ""
