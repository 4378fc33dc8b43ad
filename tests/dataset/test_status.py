from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from diffedit_ray import RunStatus, failures, status
from diffedit_ray.dataset import records, storage
from diffedit_ray.dataset.lease import Claim, Lease
from diffedit_ray.dataset.records import OutputLayout
from diffedit_ray.errors import ErrorCode, SettingsError, WrongOutputError
from tests.dataset.outputs import failure, record, write


def _ago(seconds: float) -> datetime:
    return datetime.now(UTC) - timedelta(seconds=seconds)


def _config(output: Path, run: str, started: float, **values: Any) -> None:
    told = {"run": run, "rows": 100, "pending": 60, "started_at": _ago(started).isoformat(), **values}
    records.write_json(OutputLayout(str(output)).config, told)


def _summary(output: Path, run: str, ended: float, **values: Any) -> None:
    told = {"run": run, "pending": 0, "interrupted": False, "error": None, "ended_at": _ago(ended).isoformat()}
    records.write_json(OutputLayout(str(output)).summary, {**told, **values})


def _records(output: Path, count: int, seconds_ago: float, prefix: str = "r") -> None:
    write(output, *(record(f"{prefix}{i}", recorded_at=_ago(seconds_ago)) for i in range(count)))


class TestDuringARun:
    def test_counts_rate_and_time_left(self, tmp_path: Path) -> None:
        with Lease(str(tmp_path)) as lease:
            _config(tmp_path, lease.run, 1000)
            _records(tmp_path, 40, 5000, "before")
            for i in range(20):  # one row every 10 s, the first when the model had been loaded
                _records(tmp_path, 1, 10 * i + 5, f"{i}-")
            found = status(tmp_path)
        assert (found.state, found.rows, found.edited, found.pending) == ("running", 100, 60, 40)
        assert found.rate == pytest.approx(0.1, rel=0.1)
        assert found.eta_seconds == pytest.approx(400, rel=0.1)
        assert f"process {lease._claim.pid}" in (found.runner or "")
        assert found.ended_at is None

    def test_only_the_last_minutes_make_the_rate(self, tmp_path: Path) -> None:
        with Lease(str(tmp_path)) as lease:
            _config(tmp_path, lease.run, 3600)
            _records(tmp_path, 30, 3000, "fast")
            _records(tmp_path, 3, 100, "slow")
            found = status(tmp_path)
        assert found.rate == pytest.approx(3 / 300, rel=0.1)

    def test_before_the_first_record(self, tmp_path: Path) -> None:
        with Lease(str(tmp_path)) as lease:
            _config(tmp_path, lease.run, 10)
            found = status(tmp_path)
        assert (found.state, found.pending, found.rate, found.eta_seconds) == ("running", 60, None, None)

    def test_a_second_run_that_is_still_planning_is_not_the_first(self, tmp_path: Path) -> None:
        _config(tmp_path, "first", 1000)
        _summary(tmp_path, "first", 500)
        _records(tmp_path, 5, 600)
        with Lease(str(tmp_path)):
            found = status(tmp_path)
        assert (found.state, found.edited, found.pending, found.ended_at) == ("running", 5, None, None)

    def test_a_first_run_that_is_still_planning(self, tmp_path: Path) -> None:
        with Lease(str(tmp_path)):
            found = status(tmp_path)
        assert (found.state, found.rows, found.edited, found.pending) == ("running", None, 0, None)

    def test_it_writes_nothing(self, tmp_path: Path) -> None:
        _config(tmp_path, "x", 1000)
        _records(tmp_path, 3, 10)
        before = sorted(tmp_path.rglob("*"))
        status(tmp_path)
        failures(tmp_path)
        assert sorted(tmp_path.rglob("*")) == before


class TestAfterARun:
    def test_a_complete_one(self, tmp_path: Path) -> None:
        _config(tmp_path, "x", 120)
        _records(tmp_path, 60, 60)
        _summary(tmp_path, "x", 20)
        found = status(tmp_path)
        assert (found.state, found.pending, found.eta_seconds, found.runner) == ("complete", 0, None, None)
        assert found.rate == pytest.approx(0.6, rel=0.05)
        assert found.ended_at is not None

    @pytest.mark.parametrize("how", [{"interrupted": True}, {"error": "no space left"}])
    def test_one_that_broke_off(self, tmp_path: Path, how: dict[str, Any]) -> None:
        _config(tmp_path, "x", 120)
        _summary(tmp_path, "x", 20, pending=7, **how)
        found = status(tmp_path)
        assert (found.state, found.pending, found.error) == ("incomplete", 7, how.get("error"))

    def test_one_that_died_after_another_had_ended_well(self, tmp_path: Path) -> None:
        _config(tmp_path, "first", 2000)
        _summary(tmp_path, "first", 1000)
        _config(tmp_path, "second", 120)
        _records(tmp_path, 10, 60)
        found = status(tmp_path)
        assert (found.state, found.pending, found.ended_at) == ("died", 50, None)

    def test_one_whose_machine_died(self, tmp_path: Path) -> None:
        claim = replace(Claim.of_this_process("x"), boot="another", held=True)
        uri = storage.join(OutputLayout(str(tmp_path)).leases, "x.json")
        storage.write_bytes(uri, json.dumps(asdict(claim)).encode())
        _config(tmp_path, "x", 120)
        assert status(tmp_path).state == "running", "for as long as its lease stands"
        os.utime(uri, (0, 0))
        assert status(tmp_path).state == "died"

    def test_the_reasons_for_failures_the_commonest_first(self, tmp_path: Path) -> None:
        _config(tmp_path, "x", 120)
        write(tmp_path, failure("a", ErrorCode.TIMEOUT), failure("b", ErrorCode.NOT_FOUND))
        write(tmp_path, failure("c", ErrorCode.NOT_FOUND), record("d"), failure("e", ErrorCode.BAD_ROW, 9))
        write(tmp_path, record("e"))
        found = status(tmp_path)
        assert (found.edited, found.unchanged, found.failed) == (2, 0, 3)
        assert [(reason.code, reason.count) for reason in found.errors] == [("not_found", 2), ("timeout", 1)]
        assert found.errors[1].example == "a: timeout"
        assert found.errors[0].example in ("b: not_found", "c: not_found")

    def test_it_goes_into_json(self, tmp_path: Path) -> None:
        _config(tmp_path, "x", 120)
        write(tmp_path, failure("a", ErrorCode.TIMEOUT))
        found = status(tmp_path)
        assert isinstance(found, RunStatus)
        assert json.loads(json.dumps(asdict(found)))["errors"] == [
            {"code": "timeout", "count": 1, "example": "a: timeout"}
        ]


@pytest.mark.parametrize("look", [status, failures])
def test_where_no_run_has_been(tmp_path: Path, look: Any) -> None:
    with pytest.raises(WrongOutputError, match=f"there is no run at {tmp_path}/none"):
        look(tmp_path / "none")


class TestFailures:
    def test_those_that_stand(self, tmp_path: Path) -> None:
        _config(tmp_path, "x", 120)
        write(
            tmp_path,
            failure("b", ErrorCode.TIMEOUT, image_uri="2.png", query="a cat", attempts=3),
            failure("a", ErrorCode.TIMEOUT, image_uri="1.png"),
            failure("c", ErrorCode.BAD_ROW, image_uri=None),
            failure("mended", ErrorCode.NOT_FOUND, 9),
            record("fine"),
        )
        write(tmp_path, record("mended"))
        rows = failures(tmp_path).to_pylist()
        assert [row["id"] for row in rows] == ["c", "a", "b"]
        assert (rows[2]["query"], rows[2]["attempts"], rows[2]["error_message"]) == ("a cat", 3, "b: timeout")
        assert [row["id"] for row in failures(tmp_path, code="timeout").to_pylist()] == ["a", "b"]
        assert len(failures(tmp_path, code="not_found")) == 0

    def test_a_code_that_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="no error code 'timeuot'; there are bad_row, "):
            failures(tmp_path, code="timeuot")
