"""Whole jobs of which manifest, images, masks and output all lie in an S3 store."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffedit_ray import JobSettings, JobSummary, run_edit_job
from diffedit_ray.dataset import records, storage
from diffedit_ray.errors import ManifestError
from tests.pipeline.rows import QUICK, row, save_pictures
from tests.services.proxy import Fault, FaultyProxy, every
from tests.services.s3 import S3Server

pytestmark = pytest.mark.usefixtures("local_ray")

BROKEN = (Fault.RESET, Fault.HANG, Fault.TOO_MANY, Fault.INTERNAL, Fault.SLOW_DOWN, Fault.TRUNCATED)


@pytest.fixture(autouse=True)
def _storage() -> Iterator[None]:
    yield
    storage.configure({})


@pytest.fixture
def source(s3: S3Server, bucket: str, tmp_path: Path) -> str:
    """A manifest of nine edits and one row that changes nothing; one image and one mask are named absolutely."""
    fs = s3.filesystem()
    for file in save_pictures(tmp_path / "images").iterdir():
        fs.put_file(str(file), f"{bucket}/set/images/{file.name}")
    rows = [row(f"images/{name}", query, id=f"{name[:4]}-{query[2:]}") for name in ("square.png", "tall.jpg")
            for query in ("a cat", "a dog", "a pear")]  # fmt: skip
    rows += [
        row("images/square.png", "a horse", id="same"),
        row("images/wide.png", id="masked", mask_uri="images/mask.png"),
        row(f"s3://{bucket}/set/images/alpha.png", id="absolute"),
        row("images/wide.png", id="wide", mask_uri=f"s3://{bucket}/set/images/mask.png"),
    ]
    stream = io.BytesIO()
    # the first row's columns are the table's
    pq.write_table(pa.Table.from_pylist([{"mask_uri": None, **r} for r in rows]), stream)
    fs.pipe_file(f"{bucket}/set/manifest.parquet", stream.getvalue())
    return f"s3://{bucket}/set/manifest.parquet"


def _run(source: str, output: str, model: Path, server: S3Server, **job: Any) -> JobSummary:
    options = {"s3": server.options}
    settings = JobSettings(storage_options=options, batch_size=2, **job)  # type: ignore[arg-type]
    return run_edit_job(source, output, model=model, settings=QUICK, job=settings)


def _check(summary: JobSummary, server: S3Server, bucket: str) -> None:
    """Every row is done, and the store, asked directly, holds exactly what the records say."""
    assert summary.errors == {}
    assert (summary.rows, summary.edited, summary.unchanged, summary.failed) == (10, 9, 1, 0)
    assert summary.exit_code == 0
    storage.configure({"s3": server.options})
    table = records.read_records(summary.output).to_pylist()
    assert len(table) == 10
    fs = server.filesystem()
    for record in table:
        assert record["error_message"] is None
        if record["status"] == "edited":
            for name in ("edited_uri", "mask_uri"):
                pixels = np.asarray(Image.open(io.BytesIO(fs.cat_file(record[name].removeprefix("s3://")))))
                assert pixels.shape[:2] == (record["height"], record["width"])
    written = {f"s3://{path}" for path in fs.find(f"{bucket}/out") if "/images/" in path or "/masks/" in path}
    assert written == {r[name] for r in table if r["status"] == "edited" for name in ("edited_uri", "mask_uri")}
    assert len(storage.list_files(f"s3://{bucket}/out/records", ".parquet")) == 1
    everything = b"".join(fs.cat_file(path) for path in fs.find(f"{bucket}/out"))
    assert server.secret.encode() not in everything
    config = json.loads(fs.cat_file(f"{bucket}/out/_run/config.json"))
    assert config["job"]["storage_options"] == "s3(endpoint_url, key, secret, config_kwargs)"


def test_a_whole_job(source: str, s3: S3Server, bucket: str, tiny_folder: Path) -> None:
    output = f"s3://{bucket}/out"
    _check(_run(source, output, tiny_folder, s3), s3, bucket)
    again = _run(source, output, tiny_folder, s3)
    assert (again.edited_now, again.done_before, again.exit_code) == (0, 10, 0)


def test_a_whole_job_over_a_store_that_breaks_every_fifth_answer(
    source: str, s3: S3Server, bucket: str, tiny_folder: Path
) -> None:
    rates = {**every(*BROKEN, rate=0.2), "HEAD": {Fault.FORBIDDEN: 0.1, Fault.INTERNAL: 0.1}}
    with FaultyProxy(s3.endpoint, rates, seed=1, hang_seconds=3).running() as proxy:
        summary = _run(source, f"s3://{bucket}/out", tiny_folder, s3.at(proxy.endpoint), storage_tries=10)
        injected = sum(proxy.injected.values())
    _check(summary, s3, bucket)
    assert injected >= 5
    assert {method for method, _ in proxy.injected} >= {"GET", "PUT"}


def test_overwriting_leaves_nothing_of_the_run_before(
    source: str, s3: S3Server, bucket: str, tiny_folder: Path
) -> None:
    output = f"s3://{bucket}/out"
    s3.filesystem().pipe_file(f"{bucket}/out/images/ol/old.png", b"old")
    _check(_run(source, output, tiny_folder, s3, overwrite=True), s3, bucket)


def test_wrong_credentials_end_the_job_with_one_clear_line(
    source: str, s3: S3Server, bucket: str, tiny_folder: Path
) -> None:
    if s3.kind != "ceph":
        pytest.skip("needs Ceph's radosgw: moto lets everybody in")
    wrong = replace(s3, secret="not-the-secret-at-all")
    with pytest.raises(ManifestError, match=r"manifest\.parquet may not be .* with the credentials") as caught:
        _run(source, f"s3://{bucket}/out", tiny_folder, wrong, storage_tries=1)
    assert "not-the-secret-at-all" not in str(caught.value)
