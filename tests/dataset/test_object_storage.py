"""A real S3 server, reached straight and through a proxy that goes wrong."""

from __future__ import annotations

import io
import os
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from diffedit_ray.dataset import records, storage
from diffedit_ray.dataset.compaction import compact
from diffedit_ray.dataset.manifest import manifest_files, manifest_folder, manifest_schema
from diffedit_ray.dataset.spans import iterate_spans
from diffedit_ray.errors import ErrorCode, ForbiddenError, ManifestError, OutputError, RowError
from tests.services.proxy import Fault, FaultyProxy, every
from tests.services.s3 import S3Server

BROKEN = (Fault.RESET, Fault.HANG, Fault.TOO_MANY, Fault.INTERNAL, Fault.SLOW_DOWN, Fault.TRUNCATED)
WITH_403_ON_HEAD = {**every(*BROKEN, rate=0.2), "HEAD": {Fault.FORBIDDEN: 0.1, Fault.INTERNAL: 0.1}}


@pytest.fixture
def root(s3: S3Server, bucket: str) -> Iterator[str]:
    storage.configure({"s3": s3.options})
    yield f"s3://{bucket}"
    storage.configure({})


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3.endpoint, seed=3, hang_seconds=3).running() as proxy:
        yield proxy


@pytest.fixture
def broken(root: str, s3: S3Server, proxy: FaultyProxy) -> str:
    """`root` by way of the proxy, which breaks every fifth answer."""
    storage.configure({"s3": s3.at(proxy.endpoint).options}, tries=8)
    proxy.rates = WITH_403_ON_HEAD
    return root


@pytest.fixture
def watched(root: str, s3: S3Server, proxy: FaultyProxy) -> str:
    """`root` by way of the proxy, which only counts."""
    storage.configure({"s3": s3.at(proxy.endpoint).options})
    return root


def _refused(uri: str, max_bytes: int = 1000) -> RowError:
    with pytest.raises(RowError) as caught:
        storage.read_bytes(uri, max_bytes=max_bytes)
    return caught.value


def _table(rows: int) -> pa.Table:
    noise = np.random.default_rng(0).bytes(rows * 200).hex()
    texts = [noise[i * 400 : (i + 1) * 400] for i in range(rows)]
    return pa.table({"image_uri": [f"images/{i}.png" for i in range(rows)], "query": texts})


def _parquet(table: pa.Table) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, compression="none", use_dictionary=False, row_group_size=4000)
    return stream.getvalue()


class TestReadingAndWriting:
    @pytest.mark.parametrize("size", [0, 1, 1000])
    def test_what_is_written_is_read(self, root: str, size: int) -> None:
        data = os.urandom(size)
        storage.write_bytes(f"{root}/a b/ü?&+.bin", data)
        assert storage.read_bytes(f"{root}/a b/ü?&+.bin", max_bytes=size) == data

    def test_one_byte_too_many(self, root: str) -> None:
        storage.write_bytes(f"{root}/a", b"x" * 11)
        assert _refused(f"{root}/a", 10).code is ErrorCode.TOO_LARGE

    def test_reading_takes_one_get_and_writing_one_put(self, watched: str, proxy: FaultyProxy) -> None:
        storage.write_bytes(f"{watched}/a", b"abc")
        storage.read_bytes(f"{watched}/a", max_bytes=10)
        assert [method for method, _ in proxy.paths] == ["PUT", "GET"]

    def test_lists_and_removes(self, root: str) -> None:
        for name in ("b.parquet", "a.parquet", "deep/c.parquet", "notes.txt", ".hidden.parquet"):
            storage.write_bytes(f"{root}/out/{name}", b"x")
        assert storage.list_files(f"{root}/out", ".parquet") == [f"{root}/out/a.parquet", f"{root}/out/b.parquet"]
        assert storage.list_files(f"{root}/none", ".parquet") == []
        storage.remove(f"{root}/out/a.parquet")
        storage.remove(f"{root}/out/a.parquet")
        assert storage.list_files(f"{root}/out/", ".parquet") == [f"{root}/out/b.parquet"]
        storage.remove(f"{root}/out", recursive=True)
        storage.remove(f"{root}/out", recursive=True)
        assert storage.kind(f"{root}/out") is None

    def test_listing_sees_what_others_wrote_since(self, root: str, s3: S3Server, bucket: str) -> None:
        assert storage.list_files(f"{root}/out", "") == []
        s3.filesystem().pipe_file(f"{bucket}/out/new", b"x")
        assert storage.list_files(f"{root}/out", "") == [f"{root}/out/new"]
        assert storage.kind(f"{root}/out") == "folder"
        assert storage.kind(f"{root}/out/new") == "file"


class TestAtomicity:
    def test_a_reader_sees_all_of_a_file_or_the_one_before(self, root: str) -> None:
        contents = [bytes([i]) * 300_000 for i in range(2)]
        storage.write_bytes(f"{root}/a", contents[0])
        written, read_enough = 0, threading.Event()

        def write() -> None:
            nonlocal written
            while not read_enough.is_set():
                storage.write_bytes(f"{root}/a", contents[written % 2])
                written += 1

        writer = threading.Thread(target=write)
        writer.start()
        seen = []
        while len(seen) < 20 or (written < 20 and writer.is_alive()):
            seen.append(storage.read_bytes(f"{root}/a", max_bytes=10**6) in contents)
        read_enough.set()
        writer.join()
        assert written >= 20
        assert all(seen)

    def test_a_file_of_several_parts_appears_once_it_is_whole(self, root: str, s3: S3Server, bucket: str) -> None:
        fs = s3.filesystem()
        done = threading.Event()
        sizes = set()

        def watch() -> None:
            while not done.is_set():
                sizes.add(fs.info(f"{bucket}/big")["size"] if fs.exists(f"{bucket}/big") else None)

        watcher = threading.Thread(target=watch)
        watcher.start()
        storage.write_bytes(f"{root}/big", bytes(storage.MULTIPART_BYTES + 1))
        time.sleep(0.2)
        done.set()
        watcher.join()
        assert sizes == {None, storage.MULTIPART_BYTES + 1}

    def test_a_write_that_fails_leaves_the_old_file(
        self, watched: str, proxy: FaultyProxy, s3: S3Server, bucket: str
    ) -> None:
        storage.configure({"s3": s3.at(proxy.endpoint).options}, tries=2)
        storage.write_bytes(f"{watched}/a", b"old")
        proxy.rates = every(Fault.INTERNAL, rate=1)
        with pytest.raises(OutputError, match=r"cannot write s3://.*/a: the store answers 500 .*tried 2 times"):
            storage.write_bytes(f"{watched}/a", b"new")
        assert s3.filesystem().cat_file(f"{bucket}/a") == b"old"


class TestFaults:
    @pytest.mark.parametrize("fault", BROKEN)
    def test_each_passes(self, watched: str, proxy: FaultyProxy, fault: Fault, s3: S3Server) -> None:
        storage.configure({"s3": s3.at(proxy.endpoint).options}, tries=8)
        # an answer to a write has no body to cut short
        proxy.rates = every(fault, rate=0.2, methods=("GET",) if fault is Fault.TRUNCATED else ("GET", "PUT"))

        def both(i: int) -> bool:
            storage.write_bytes(f"{watched}/{i}", b"%d" % i * 100)
            return storage.read_bytes(f"{watched}/{i}", max_bytes=10**6) == b"%d" % i * 100

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(both, range(40)))
        assert sum(proxy.injected.values()) >= 1

    def test_no_read_and_no_write_is_lost(self, broken: str, proxy: FaultyProxy, s3: S3Server, bucket: str) -> None:
        contents = {f"{i}.bin": os.urandom(i * 300) for i in range(120)}

        def both(name: str) -> bytes:
            storage.write_bytes(f"{broken}/x/{name}", contents[name])
            return storage.read_bytes(f"{broken}/x/{name}", max_bytes=10**6)

        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(both, contents)) == list(contents.values())
        assert {fault for _, fault in proxy.injected} >= set(BROKEN)
        # and the store agrees
        fs = s3.filesystem()
        assert {path.rsplit("/", 1)[1]: fs.cat_file(path) for path in fs.find(f"{bucket}/x")} == contents

    def test_no_page_of_a_listing_is_lost(self, broken: str, proxy: FaultyProxy, s3: S3Server, bucket: str) -> None:
        names = [f"{i:03}.parquet" for i in range(150)]
        s3.filesystem().pipe({f"{bucket}/many/{name}": b"x" for name in names})
        options = s3.at(proxy.endpoint).options | {"s3_additional_kwargs": {"MaxKeys": 10}}
        storage.configure({"s3": options}, tries=8)
        assert storage.list_files(f"{broken}/many", ".parquet") == [f"{broken}/many/{name}" for name in names]
        assert proxy.requests["GET"] > 15
        assert sum(proxy.injected.values()) >= 1
        storage.remove(f"{broken}/many", recursive=True)
        assert s3.filesystem().find(f"{bucket}/many") == []

    def test_records_survive(self, broken: str, proxy: FaultyProxy) -> None:
        schema, now = records.record_schema([]), datetime.now(UTC)
        layout = records.OutputLayout(f"{broken}/out")
        rows: list[dict[str, Any]] = [
            {"id": f"r{i}", "fingerprint": "f", "status": "edited", "attempts": 1, "seed": i, "recorded_at": now}
            for i in range(30)
        ]  # fmt: skip
        for i in range(0, 30, 3):
            records.write_records(layout, rows[i : i + 3], schema)
        expected = {r["id"]: r["seed"] for r in rows}
        read = records.read_records(layout.root).to_pylist()
        assert {r["id"]: r["seed"] for r in read} == expected
        assert compact(layout.root) == 30
        assert len(storage.list_files(layout.records, ".parquet")) == 1
        assert {r["id"]: r["seed"] for r in records.read_records(layout.root).to_pylist()} == expected
        assert sum(proxy.injected.values()) >= 3

    @pytest.mark.parametrize("what", ["none.bin", "../no-such-bucket/none.bin"])
    def test_what_is_not_there_is_asked_for_once(self, watched: str, proxy: FaultyProxy, what: str) -> None:
        uri = "s3://no-such-bucket/none.bin" if what.startswith("..") else f"{watched}/{what}"
        assert _refused(uri).code is ErrorCode.NOT_FOUND
        assert [method for method, _ in proxy.paths] == ["GET"]

    def test_what_is_forbidden_is_asked_for_once(self, watched: str, proxy: FaultyProxy) -> None:
        proxy.rates = every(Fault.FORBIDDEN, rate=1)
        error = _refused(f"{watched}/a")
        assert error.code is ErrorCode.FORBIDDEN
        with pytest.raises(ForbiddenError, match=r"s3://.*/b may not be written"):
            storage.write_bytes(f"{watched}/b", b"x")
        assert dict(proxy.requests) == {"GET": 1, "PUT": 1}

    def test_a_bucket_that_is_not_there_cannot_be_written(self, watched: str, proxy: FaultyProxy) -> None:
        with pytest.raises(OutputError, match="cannot write s3://no-such-bucket/a"):
            storage.write_bytes("s3://no-such-bucket/a", b"x")
        assert dict(proxy.requests) == {"PUT": 1}

    def test_tries_are_counted_exactly(self, watched: str, proxy: FaultyProxy, s3: S3Server) -> None:
        # s3fs and botocore repeat, too: layers would multiply
        storage.configure({"s3": s3.at(proxy.endpoint).options}, tries=3)
        proxy.rates = every(Fault.SLOW_DOWN, rate=1)
        error = _refused(f"{watched}/a")
        assert error.code is ErrorCode.FETCH_FAILED
        assert "503 SlowDown (tried 3 times in " in error.message
        assert proxy.requests["GET"] == 3

    def test_a_store_that_hangs_is_given_up_in_time(self, watched: str, proxy: FaultyProxy, s3: S3Server) -> None:
        storage.configure({"s3": s3.at(proxy.endpoint).options}, tries=100, seconds=3)
        proxy.rates = every(Fault.HANG, rate=1)
        began = time.monotonic()
        assert _refused(f"{watched}/a").code is ErrorCode.FETCH_FAILED
        assert time.monotonic() - began < 20, "a hundred tries would take minutes"

    def test_nobody_listening(self, root: str, s3: S3Server) -> None:
        storage.configure({"s3": s3.at("http://127.0.0.1:9").options}, tries=2)
        assert _refused(f"{root}/a").code is ErrorCode.FETCH_FAILED


class TestCredentials:
    @pytest.fixture(autouse=True)
    def _only_a_real_store_checks_them(self, s3: S3Server) -> None:
        if s3.kind != "ceph":
            pytest.skip("needs Ceph's radosgw: moto lets everybody in")

    @pytest.mark.parametrize(
        ("wrong", "advice"),
        [
            ({"key": "AKNOBODYKNOWS"}, "does not know the access key"),
            ({"secret": "not-the-secret-at-all"}, "secret key is not the access key's"),
        ],
    )
    def test_wrong_ones(self, root: str, s3: S3Server, wrong: dict[str, str], advice: str) -> None:
        storage.configure({"s3": s3.options | wrong})
        error = _refused(f"{root}/a")
        assert error.code is ErrorCode.FORBIDDEN
        assert f"{root}/a" in error.message
        assert advice in error.message
        with pytest.raises(ForbiddenError, match=advice) as caught:
            storage.write_bytes(f"{root}/a", b"x")
        with pytest.raises(ForbiddenError):
            storage.list_files(root, "")
        told = f"{error!r} {error} {caught.value!r}"
        assert not any(secret in told for secret in (s3.secret, *wrong.values()))

    def test_none(self, root: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
        storage.configure({"s3": {"endpoint_url": s3.endpoint}})
        error = _refused(f"{root}/a")
        assert error.code is ErrorCode.FORBIDDEN
        assert '"anon": true' in error.message

    def test_those_of_the_environment(self, root: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        storage.write_bytes(f"{root}/a", b"x")
        storage.configure({})
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            assert storage.read_bytes(f"{root}/a", max_bytes=9) == b"x"
        finally:
            s3fs.S3FileSystem.clear_instance_cache()

    def test_new_options_hold_at_once_and_old_ones_are_gone(self, root: str, s3: S3Server) -> None:
        storage.write_bytes(f"{root}/a", b"x")
        storage.configure({"s3": s3.options | {"secret": "not-the-secret-at-all"}})
        assert _refused(f"{root}/a").code is ErrorCode.FORBIDDEN
        storage.configure({"s3": s3.options})
        assert storage.read_bytes(f"{root}/a", max_bytes=9) == b"x"

    def test_presigned_uris_work_and_never_show_their_signature(self, root: str, s3: S3Server, bucket: str) -> None:
        fs = s3.filesystem()
        fs.pipe_file(f"{bucket}/set/a b+c.png", b"pixels")
        fs.pipe_file(f"{bucket}/set/m.parquet", _parquet(_table(5)))
        image, manifest = (fs.sign(f"{bucket}/set/{name}", expiration=60) for name in ("a b+c.png", "m.parquet"))
        assert storage.read_bytes(image, max_bytes=10) == b"pixels"
        assert manifest_files(manifest) == [manifest]
        assert manifest_folder(manifest) == f"{s3.endpoint}/{bucket}/set"
        assert pa.concat_tables(table for _, table in iterate_spans([manifest], None)) == _table(5)
        error = _refused(image.replace("Signature=", "Signature=0"))
        assert error.code is ErrorCode.FORBIDDEN
        assert "Signature=***" in error.message
        assert s3.key not in error.message


class TestManifest:
    @pytest.fixture
    def files(self, root: str, s3: S3Server, bucket: str) -> str:
        for name in ("b.parquet", "a.parquet", "deep/c.parquet", "_SUCCESS", ".crc.parquet"):
            s3.filesystem().pipe_file(f"{bucket}/set/{name}", _parquet(_table(3)))
        return f"{root}/set"

    def test_file_folder_and_glob(self, files: str) -> None:
        everything = [f"{files}/{name}" for name in ("a.parquet", "b.parquet", "deep/c.parquet")]
        assert manifest_files(f"{files}/a.parquet") == everything[:1]
        assert manifest_folder(f"{files}/a.parquet") == files
        for uri in (files, f"{files}/"):
            assert manifest_files(uri) == everything
            assert manifest_folder(uri) == files
        assert manifest_files(f"{files}/[ab].par?uet") == everything[:2]
        assert manifest_folder(f"{files}/[ab].par?uet") == files
        assert manifest_folder(f"{files}/*/c.parquet") == files

    def test_nothing_there(self, files: str) -> None:
        for uri in (f"{files}/none.parquet", f"{files}/none", f"{files}/*.csv", "s3://no-such-bucket/m.parquet"):
            with pytest.raises(ManifestError, match="no manifest at"):
                manifest_files(uri)

    def test_wrong_credentials_are_not_an_absent_manifest(self, files: str, s3: S3Server) -> None:
        if s3.kind == "moto":
            pytest.skip("moto lets everybody in")
        storage.configure({"s3": s3.options | {"secret": "not-the-secret-at-all"}}, tries=2)
        for uri in (f"{files}/a.parquet", files, f"{files}/*.parquet"):
            with pytest.raises(ManifestError, match="credentials"):
                manifest_files(uri)

    def test_a_large_one_through_faults(self, broken: str, s3: S3Server, bucket: str, proxy: FaultyProxy) -> None:
        table = _table(40_000)
        data = _parquet(table)
        assert len(data) > 12 << 20
        s3.filesystem().pipe_file(f"{bucket}/m.parquet", data)
        uri = f"{broken}/m.parquet"
        proxy.rates = {**WITH_403_ON_HEAD, "GET": {fault: 0.05 for fault in BROKEN}}
        for _ in range(3):
            assert manifest_files(uri) == [uri]
            assert manifest_schema([uri]).names == ["image_uri", "query"]
            assert pa.concat_tables(table for _, table in iterate_spans([uri], None)).combine_chunks() == table
        assert sum(proxy.injected.values()) >= 3

    def test_arrow_reads_it_through_faults_in_another_process(
        self, broken: str, s3: S3Server, bucket: str, proxy: FaultyProxy
    ) -> None:
        table = _table(40_000)
        s3.filesystem().pipe_file(f"{bucket}/m.parquet", _parquet(table))
        fs, path = storage.filesystem(f"{broken}/m.parquet")
        sent = pickle.dumps(storage.arrow_filesystem(fs))
        storage.configure({})  # the other process was never told
        s3fs.S3FileSystem.clear_instance_cache()
        for _ in range(4):
            assert pq.read_table(path, filesystem=pickle.loads(sent)).combine_chunks() == table
        assert sum(proxy.injected.values()) >= 2
