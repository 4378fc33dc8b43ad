"""Images and manifests on web servers, obliging ones and others."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffedit_ray.dataset import storage
from diffedit_ray.dataset.manifest import manifest_files, manifest_folder, manifest_schema
from diffedit_ray.dataset.spans import iterate_spans
from diffedit_ray.errors import ErrorCode, ManifestError, RowError
from tests.services.proxy import Fault, FaultyProxy, every
from tests.services.web import FileServer

BROKEN = (Fault.RESET, Fault.HANG, Fault.TOO_MANY, Fault.INTERNAL, Fault.SLOW_DOWN, Fault.TRUNCATED)


@pytest.fixture(autouse=True)
def _impatient() -> Iterator[None]:
    storage.configure({"https": {"timeout": 1}}, tries=8)
    yield
    storage.configure({})


@pytest.fixture
def proxy(web_files: FileServer) -> Iterator[FaultyProxy]:
    with FaultyProxy(web_files.endpoint, seed=5, hang_seconds=2).running() as proxy:
        yield proxy


def _manifest(rows: int, width: int = 40) -> tuple[pa.Table, bytes]:
    noise = np.random.default_rng(0).bytes(rows * width).hex()
    table = pa.table(
        {
            "image_uri": [f"{i}.png" for i in range(rows)],
            "query": [noise[i * width : (i + 1) * width] for i in range(rows)],
        }
    )
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="none", use_dictionary=False, row_group_size=max(1, rows // 8))
    return table, stream.getvalue()


def _refused(uri: str, max_bytes: int = 1000) -> RowError:
    with pytest.raises(RowError) as caught:
        storage.read_bytes(uri, max_bytes=max_bytes)
    return caught.value


class TestReading:
    def test_one_request_is_enough_and_it_is_no_head(self, web_files: FileServer) -> None:
        web_files.files["/a.png"] = b"pixels"
        assert storage.read_bytes(f"{web_files.endpoint}/a.png", max_bytes=6) == b"pixels"
        assert web_files.requests == [("GET", "/a.png")]

    def test_an_empty_file(self, web_files: FileServer) -> None:
        web_files.files["/a.png"] = b""
        assert storage.read_bytes(f"{web_files.endpoint}/a.png", max_bytes=6) == b""

    @pytest.mark.parametrize("ranges", [True, False])
    def test_of_a_file_that_is_too_large_only_a_little_is_read(self, web_files: FileServer, ranges: bool) -> None:
        web_files.ranges = ranges
        web_files.files["/big.png"] = bytes(64 << 20)
        assert _refused(f"{web_files.endpoint}/big.png").code is ErrorCode.TOO_LARGE
        assert web_files.sent < 32 << 20, "sockets hold some megabytes, but not all of it"

    def test_a_server_that_promises_more_than_it_sends(self, web_files: FileServer) -> None:
        storage.configure({}, tries=2)
        web_files.files["/a.png"] = b"pixels"
        web_files.lie = 5
        error = _refused(f"{web_files.endpoint}/a.png")
        assert error.code is ErrorCode.FETCH_FAILED
        assert "tried 2 times" in error.message
        assert len(web_files.requests) == 2

    def test_a_query_goes_to_the_server_as_it_is_written(self, web_files: FileServer) -> None:
        # a signature covers its spelling
        web_files.files["/a%20b%2Bc.png"] = b"x"
        query = "X-Amz-Credential=AK%2F2026%2Fs3&sig=a%2Bb%3D&w=1,2"
        storage.read_bytes(f"{web_files.endpoint}/a%20b%2Bc.png?{query}", max_bytes=9)
        assert web_files.requests == [("GET", f"/a%20b%2Bc.png?{query}")]

    def test_a_uri_that_is_no_proper_url_is_made_one(self, web_files: FileServer) -> None:
        web_files.files["/a%20%C3%A9.png"] = b"x"
        assert storage.read_bytes(f"{web_files.endpoint}/a é.png", max_bytes=9) == b"x"

    def test_a_uri_that_cannot_be_one(self) -> None:
        assert _refused("https://host:port/a.png").code is ErrorCode.BAD_URI

    def test_what_is_not_there_is_asked_for_once(self, proxy: FaultyProxy) -> None:
        assert _refused(f"{proxy.endpoint}/none.png").code is ErrorCode.NOT_FOUND
        assert proxy.paths == [("GET", "/none.png")]

    def test_what_is_forbidden_is_asked_for_once(self, proxy: FaultyProxy) -> None:
        proxy.rates = every(Fault.FORBIDDEN, rate=1)
        error = _refused(f"{proxy.endpoint}/a.png?X-Amz-Signature=beefbeef")
        assert error.code is ErrorCode.FORBIDDEN
        assert "beef" not in error.message
        assert len(proxy.paths) == 1

    def test_a_fault_in_every_fifth_answer_costs_no_image(self, web_files: FileServer, proxy: FaultyProxy) -> None:
        contents = {f"/{i}.png": os.urandom(random.Random(i).randrange(50_000)) for i in range(120)}
        web_files.files.update(contents)
        proxy.rates = every(*BROKEN, rate=0.2)
        with ThreadPoolExecutor(12) as pool:
            got = list(pool.map(lambda p: storage.read_bytes(proxy.endpoint + p, max_bytes=10**6), contents))
        assert got == list(contents.values())
        assert {fault for _, fault in proxy.injected} == set(BROKEN)

    def test_a_server_that_stays_broken_ends_the_row_and_not_the_patience(self, proxy: FaultyProxy) -> None:
        storage.configure({}, tries=3)
        proxy.rates = every(Fault.SLOW_DOWN, rate=1)
        error = _refused(f"{proxy.endpoint}/a.png")
        assert error.code is ErrorCode.FETCH_FAILED
        assert "the server answers 503 (tried 3 times" in error.message
        assert proxy.requests["GET"] == 3


class TestManifest:
    def test_a_presigned_one_is_no_glob(self, web_files: FileServer) -> None:
        table, web_files.files["/set/m.parquet"] = _manifest(10)
        uri = f"{web_files.endpoint}/set/m.parquet?X-Amz-Signature=abc[*]"
        assert manifest_files(uri) == [uri]
        assert manifest_folder(uri) == f"{web_files.endpoint}/set"
        assert manifest_schema([uri]).names == ["image_uri", "query"]
        assert pa.concat_tables(table for _, table in iterate_spans([uri], None)) == table
        assert {method for method, _ in web_files.requests} == {"GET"}, "the signature covers the method"

    def test_relative_images_are_beside_it(self, web_files: FileServer) -> None:
        folder = manifest_folder(f"{web_files.endpoint}/set/m.parquet?sig=x")
        assert storage.resolve("images/a.png", folder) == f"{web_files.endpoint}/set/images/a.png"

    @pytest.mark.parametrize("ranges", [True, False])
    @pytest.mark.parametrize("head", [True, False])
    def test_a_large_one(self, web_files: FileServer, ranges: bool, head: bool) -> None:
        web_files.ranges, web_files.head = ranges, head
        table, web_files.files["/m.parquet"] = _manifest(30_000, 400)
        assert len(web_files.files["/m.parquet"]) > 10 << 20
        uri = f"{web_files.endpoint}/m.parquet"
        assert pa.concat_tables(table for _, table in iterate_spans([uri], None)).combine_chunks() == table
        assert {method for method, _ in web_files.requests} == {"GET"}

    @pytest.mark.parametrize("ranges", [True, False])
    def test_a_large_one_from_a_server_that_breaks(
        self, web_files: FileServer, proxy: FaultyProxy, ranges: bool
    ) -> None:
        web_files.ranges = ranges
        table, web_files.files["/m.parquet"] = _manifest(30_000, 400)
        proxy.rates = every(*BROKEN, rate=0.3)
        for _ in range(4):
            assert (
                pa.concat_tables(
                    table for _, table in iterate_spans([f"{proxy.endpoint}/m.parquet"], None)
                ).combine_chunks()
                == table
            )
        assert sum(proxy.injected.values()) >= 3

    @pytest.mark.parametrize("ranges", [True, False])
    def test_arrow_reads_it_as_ray_does(self, web_files: FileServer, proxy: FaultyProxy, ranges: bool) -> None:
        web_files.ranges = ranges
        table, web_files.files["/m.parquet"] = _manifest(30_000, 400)
        uri = f"{proxy.endpoint}/m.parquet?sig=a"
        fs, path = storage.filesystem(uri)
        proxy.rates = every(*BROKEN, rate=0.2)
        assert pq.read_table(path, filesystem=storage.arrow_filesystem(fs)).combine_chunks() == table

    def test_one_that_is_not_there(self, web_files: FileServer) -> None:
        with pytest.raises(ManifestError, match=r"no manifest at .*none\.parquet\?sig=\*\*\*$"):
            manifest_schema([f"{web_files.endpoint}/none.parquet?sig=abcdef"])
        fs, path = storage.filesystem(f"{web_files.endpoint}/none.parquet")
        with pytest.raises(FileNotFoundError):
            pq.read_table(path, filesystem=storage.arrow_filesystem(fs))

    def test_a_page_instead_of_one(self, web_files: FileServer) -> None:
        web_files.files["/m.parquet"] = b"<html>"
        with pytest.raises(ManifestError, match=r"m\.parquet\?sig=\*\*\* cannot be read as Parquet"):
            manifest_schema([f"{web_files.endpoint}/m.parquet?sig=abcdef"])
