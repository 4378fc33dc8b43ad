from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffedit_ray.dataset import storage
from diffedit_ray.pipeline.fetch import Fetch
from diffedit_ray.settings import JobSettings
from tests.pipeline.line import Line, statuses
from tests.pipeline.rows import row
from tests.services.s3 import S3Server
from tests.services.web import FileServer


def _after(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
    def late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return function(*args, **kwargs)

    return late


def test_a_row_that_does_not_arrive_in_time_fails_alone(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    line.job = JobSettings(fetch_timeout=0.3)
    whole = Fetch._fetch_image
    released = threading.Event()

    def slow(self: Fetch, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if rows[0]["image_uri"] == "wide.png":
            released.wait(10)
        return whole(self, rows)

    monkeypatch.setattr(Fetch, "_fetch_image", slow)
    began = time.monotonic()
    table = line.fetch([row("square.png"), row("wide.png"), row("tall.jpg")])
    released.set()
    assert statuses(table) == [("pending", None), ("failed", "timeout"), ("pending", None)]
    assert time.monotonic() - began < 5


def test_an_image_that_several_rows_name_is_read_once(line: Line, folder: Path, web_files: FileServer) -> None:
    web_files.files = {f"/{name}": (folder / name).read_bytes() for name in ("wide.png", "square.png", "mask.png")}
    wide, square, mask = (f"{web_files.endpoint}/{name}.png" for name in ("wide", "square", "mask"))
    rows = [
        row(wide, "1"),
        row(square, "2"),
        row(wide, "3", resolution=64),
        row(wide, "4", mask_uri=mask),
        row(square, "5"),
    ]
    together = line.fetch(rows).to_pylist()
    assert sorted(path for _, path in web_files.requests) == ["/mask.png", "/square.png", "/wide.png"]
    for r, alone in zip(together, (line.fetch([one]).to_pylist()[0] for one in rows), strict=True):
        times = {"fetch_seconds", "recorded_at"}
        assert {k: v for k, v in r.items() if k not in times} == {k: v for k, v in alone.items() if k not in times}
        assert r["status"] == "pending"
    assert len(together[2]["_fitted"]) > len(together[0]["_fitted"]), "each at its own resolution"
    assert together[0]["fetch_seconds"] == together[2]["fetch_seconds"] < together[3]["fetch_seconds"]


def test_the_time_an_image_takes_is_counted_once(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "read_bytes", _after(0.4, storage.read_bytes))
    spent = line.fetch([row("square.png", q) for q in ("1", "2", "3", "4")])["fetch_seconds"].to_pylist()
    assert sum(spent) >= 0.4
    assert max(spent) < 0.4


def test_an_image_that_cannot_be_read_fails_each_of_its_rows(line: Line, web_files: FileServer) -> None:
    line.job = JobSettings(storage_tries=1)
    uri = f"{web_files.endpoint}/none.png"
    table = line.fetch([row(uri, "1"), row("square.png"), row(uri, "2"), row(uri, "")])
    assert statuses(table) == [
        ("failed", "not_found"),
        ("pending", None),
        ("failed", "not_found"),
        ("failed", "bad_row"),
    ]
    assert table["error_message"][0] == table["error_message"][2]
    assert [path for _, path in web_files.requests] == ["/none.png"]


def test_limits(line: Line) -> None:
    line.job = JobSettings(max_pixels=32 * 32)
    assert statuses(line.fetch([row("square.png"), row("wide.png")]))[1] == ("failed", "too_large")
    line.job = JobSettings(max_bytes=10)
    assert statuses(line.fetch([row("square.png")])) == [("failed", "too_large")]


def test_schemes_that_are_not_allowed(line: Line) -> None:
    line.job = JobSettings(image_schemes=["https"])
    assert statuses(line.fetch([row("square.png")])) == [("failed", "bad_uri")]
    line.job = JobSettings(image_schemes=["file"])
    rows = [row("square.png"), row("wide.png", mask_uri="memory://mask.png"), row("https://h/a.png")]
    assert statuses(line.fetch(rows)) == [("pending", None), ("failed", "bad_uri"), ("failed", "bad_uri")]


def test_a_record_keeps_the_uri_and_its_message_hides_what_signs_it(line: Line, web_files: FileServer) -> None:
    line.job = JobSettings(storage_tries=1)
    uri = f"{web_files.endpoint}/none.png?X-Amz-Signature=beefbeef"
    web_files.files["/page.png"] = b"<html>"
    page = f"{web_files.endpoint}/page.png?sig=beefbeef"
    for one, code in ((uri, "not_found"), (page, "not_an_image")):
        table = line.fetch([row(one)])
        assert statuses(table) == [("failed", code)]
        assert table["image_uri"][0].as_py() == one, "it is the user's own key"
        assert "beef" not in table["error_message"][0].as_py()


def test_a_mask_that_may_come_another_time_is_no_bad_mask(line: Line) -> None:
    line.job = JobSettings(storage_tries=1)
    rows = [row("wide.png", mask_uri="http://127.0.0.1:9/mask.png"), row("wide.png", mask_uri="none.png")]
    assert statuses(line.fetch(rows)) == [("failed", "fetch_failed"), ("failed", "bad_mask")]


def test_the_jobs_options_hold_where_the_stage_runs(line: Line, s3: S3Server, bucket: str) -> None:
    s3.filesystem().put_file(str(line.folder / "square.png"), f"{bucket}/square.png")
    rows = [row(f"s3://{bucket}/square.png")]
    line.job = JobSettings(storage_options={"s3": s3.options})
    assert statuses(line.fetch(rows)) == [("pending", None)]
    line.job = JobSettings(storage_options={"s3": s3.at("http://127.0.0.1:9").options}, storage_tries=1)
    table = line.fetch(rows)
    assert statuses(table) == [("failed", "fetch_failed")]
    assert s3.secret not in table["error_message"][0].as_py()
