from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from diffedit_ray.dataset import storage
from diffedit_ray.errors import ErrorCode, OutputError, RowError


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://bucket"
    fsspec.filesystem("memory").store.clear()


class _Answers(BaseHTTPRequestHandler):
    """Answers /<status> with that status."""

    def do_GET(self) -> None:
        self.send_response(int(self.path[1:]))
        self.send_header("Content-Length", "5")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"hello")

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _once() -> Iterator[None]:
    """What is tried again is tested with stores that break."""
    storage.configure({}, tries=1)
    yield
    storage.configure({})


def _code(uri: str, max_bytes: int = 1000) -> ErrorCode:
    with pytest.raises(RowError) as caught:
        storage.read_bytes(uri, max_bytes=max_bytes)
    assert uri in caught.value.message
    return caught.value.code


class TestUris:
    def test_relative_ones_are_relative_to_the_base(self) -> None:
        assert storage.resolve("images/a.png", "s3://b/set/") == "s3://b/set/images/a.png"
        assert storage.resolve("images/a.png", "/data") == "/data/images/a.png"

    @pytest.mark.parametrize("uri", ["s3://b/a.png", "/data/a.png", "https://host/a.png"])
    def test_absolute_ones_stay(self, uri: str) -> None:
        assert storage.resolve(uri, "s3://other") == uri

    def test_local_paths_become_independent_of_the_working_directory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/someone")
        assert storage.absolute("out") == f"{os.getcwd()}/out"
        assert storage.absolute("~/out") == "/home/someone/out"
        assert storage.absolute("s3://b/out") == "s3://b/out"


class TestConfiguring:
    def test_options_hold_for_what_is_opened_afterwards(self) -> None:
        storage.configure({"memory": {"colour": "red"}})
        assert storage.filesystem("memory://a")[0].storage_options == {"colour": "red"}
        storage.configure({"memory": {"shape": "round"}})
        assert storage.filesystem("memory://a")[0].storage_options == {"shape": "round"}
        storage.configure({})
        assert storage.filesystem("memory://a")[0].storage_options == {}

    def test_what_fsspec_was_told_otherwise_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(fsspec.config.conf, "memory", {"colour": "red", "size": 1})
        for _ in range(2):
            storage.configure({"memory": {"colour": "blue"}})
            assert storage.filesystem("memory://a")[0].storage_options == {"colour": "blue", "size": 1}
        storage.configure({})
        assert fsspec.config.conf["memory"] == {"colour": "red", "size": 1}

    def test_options_are_the_callers_no_more(self) -> None:
        mine = {"memory": {"colour": "red"}}
        storage.configure(mine)
        mine["memory"]["colour"] = "blue"
        storage.configure(mine)
        assert storage.filesystem("memory://a")[0].storage_options == {"colour": "blue"}


class TestSchemes:
    @pytest.mark.parametrize(
        "uri", ["s3://b/a.png", "S3://b/a.png", "https://h/a.png", "simplecache::https://h/a.png", "/data/a.png"]
    )
    def test_allowed(self, uri: str) -> None:
        storage.refuse_scheme(uri, ["s3", "https", "simplecache", "file"])
        storage.refuse_scheme(uri, None)

    @pytest.mark.parametrize(
        ("uri", "scheme"),
        [
            ("/etc/passwd", "file"),
            ("file:///etc/passwd", "file"),
            ("http://169.254.169.254/", "http"),
            ("simplecache::https://h/a.png", "simplecache"),
            ("https://h/a.png::file:///etc/passwd", "file"),
            ("https://h/a.png::/etc/passwd", "file"),
        ],
    )
    def test_refused(self, uri: str, scheme: str) -> None:
        with pytest.raises(RowError, match=f"of scheme {scheme}, and image_schemes allows s3, https") as caught:
            storage.refuse_scheme(uri, ["s3", "https"])
        assert caught.value.code is ErrorCode.BAD_URI


class TestReading:
    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"x" * 10)
        assert storage.read_bytes(str(tmp_path / "a"), max_bytes=10) == b"x" * 10
        assert storage.read_bytes(f"file://{tmp_path}/a", max_bytes=10) == b"x" * 10

    def test_one_byte_too_many(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"x" * 11)
        assert _code(str(tmp_path / "a"), max_bytes=10) is ErrorCode.TOO_LARGE

    def test_a_missing_one(self, tmp_path: Path, memory: str) -> None:
        (tmp_path / "file").touch()
        assert _code(f"{tmp_path}/none.png") is ErrorCode.NOT_FOUND
        assert _code(f"{tmp_path}/file/none.png") is ErrorCode.NOT_FOUND
        assert _code(f"{memory}/none.png") is ErrorCode.NOT_FOUND

    def test_a_folder(self, tmp_path: Path) -> None:
        assert _code(str(tmp_path)) is ErrorCode.NOT_FOUND

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_forbidden_one(self, tmp_path: Path) -> None:
        (tmp_path / "a").touch(mode=0)
        assert _code(str(tmp_path / "a")) is ErrorCode.FORBIDDEN

    def test_an_unknown_scheme(self) -> None:
        assert _code("nowhere://b/a.png") is ErrorCode.BAD_URI

    def test_a_scheme_whose_package_is_not_installed(self) -> None:
        with pytest.raises(RowError) as caught:
            storage.read_bytes("gs://b/a.png", max_bytes=9)
        assert caught.value.code is ErrorCode.BAD_URI
        assert "pip install gcsfs" in caught.value.message
        with pytest.raises(OutputError, match="needs the package adlfs"):
            storage.write_bytes("abfs://b/a.png", b"x")

    def test_an_option_that_the_filesystem_does_not_take_is_named(self) -> None:
        storage.configure({"s3": {"sekret": "swordfish"}})
        with pytest.raises(RowError, match="'sekret'") as caught:
            storage.read_bytes("s3://b/a.png", max_bytes=9)
        assert "swordfish" not in str(caught.value)

    @pytest.mark.parametrize(
        ("status", "code"),
        [
            (403, ErrorCode.FORBIDDEN),
            (404, ErrorCode.NOT_FOUND),
            (410, ErrorCode.NOT_FOUND),
            (500, ErrorCode.FETCH_FAILED),
            (503, ErrorCode.FETCH_FAILED),
        ],
    )
    def test_a_web_server_that_says_no(self, web: str, status: int, code: ErrorCode) -> None:
        # "not found" is final and "try again later" is not
        assert _code(f"{web}/{status}") is code

    def test_what_signs_a_uri_is_not_shown(self, web: str) -> None:
        for uri in (f"{web}/404?X-Amz-Signature=beefbeef", f"{web}/503?sig=beefbeef".replace("//", "//me:beefbeef@")):
            with pytest.raises(RowError) as caught:
                storage.read_bytes(uri, max_bytes=9)
            assert "beef" not in str(caught.value)
            assert "***" in caught.value.message

    def test_a_web_server_that_says_yes(self, web: str) -> None:
        assert storage.read_bytes(f"{web}/200", max_bytes=100) == b"hello"
        assert _code(f"{web}/200", max_bytes=4) is ErrorCode.TOO_LARGE

    def test_a_web_server_that_is_not_there(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        assert _code(f"http://127.0.0.1:{port}/a.png") is ErrorCode.FETCH_FAILED


class TestWriting:
    def test_makes_folders_and_leaves_nothing_else(self, tmp_path: Path) -> None:
        storage.write_bytes(f"{tmp_path}/deep/er/a.bin", b"one")
        storage.write_bytes(f"{tmp_path}/deep/er/a.bin", b"two")
        assert [p.name for p in (tmp_path / "deep" / "er").iterdir()] == ["a.bin"]
        assert (tmp_path / "deep" / "er" / "a.bin").read_bytes() == b"two"

    def test_a_write_that_fails_leaves_the_old_content(self, tmp_path: Path) -> None:
        file = tmp_path / "a.bin"
        file.write_bytes(b"old")
        with pytest.raises(OutputError, match=r"cannot write .*a\.bin"):
            storage.write_bytes(str(file), "text is no bytes")  # type: ignore[arg-type]
        assert file.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [file]

    def test_a_reader_never_sees_half_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "a.bin"
        contents = [bytes([i]) * 2_000_000 for i in range(2)]
        storage.write_bytes(str(file), contents[0])
        done = threading.Event()

        def write() -> None:
            for i in range(60):
                storage.write_bytes(str(file), contents[i % 2])
            done.set()

        writer = threading.Thread(target=write)
        writer.start()
        seen = []
        while not done.is_set():
            data = storage.read_bytes(str(file), max_bytes=10**7)
            seen.append(data in contents)
        writer.join()
        assert seen
        assert all(seen)

    def test_a_place_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="cannot write"):
            storage.write_bytes(f"{tmp_path}/file/a.bin", b"x")
        with pytest.raises(OutputError, match="nowhere"):
            storage.write_bytes("nowhere://b/a.bin", b"x")


class TestOtherFilesystems:
    def test_write_list_read_remove(self, memory: str) -> None:
        storage.write_bytes(f"{memory}/out/b.parquet", b"b")
        storage.write_bytes(f"{memory}/out/a.parquet", b"a")
        storage.write_bytes(f"{memory}/out/deep/c.parquet", b"c")
        storage.write_bytes(f"{memory}/out/notes.txt", b"n")
        assert storage.list_files(f"{memory}/out", ".parquet") == [f"{memory}/out/a.parquet", f"{memory}/out/b.parquet"]
        assert storage.read_bytes(f"{memory}/out/b.parquet", max_bytes=9) == b"b"
        storage.remove(f"{memory}/out/b.parquet")
        assert storage.list_files(f"{memory}/out/", ".parquet") == [f"{memory}/out/a.parquet"]
        storage.remove(f"{memory}/out", recursive=True)
        assert storage.list_files(f"{memory}/out", ".parquet") == []

    def test_arrow_reads_through_it(self, memory: str) -> None:
        fs, path = storage.filesystem(f"{memory}/a.bin")
        storage.write_bytes(f"{memory}/a.bin", b"abc")
        with storage.arrow_filesystem(fs).open_input_stream(path) as stream:
            assert stream.read() == b"abc"


def test_listing_sees_what_another_process_wrote_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # s3fs remembers listings for ever; a filesystem that does the same stands for it
    class Remembering(LocalFileSystem):  # type: ignore[misc]
        protocol = ("remembering",)
        cachable = True

        def __init__(self) -> None:
            super().__init__()
            self.listings: dict[str, list[str]] = {}

        def ls(self, path: str, detail: bool = False, **kwargs: object) -> list[str]:
            return self.listings.setdefault(path, super().ls(path, detail=False))

        def invalidate_cache(self, path: str | None = None) -> None:
            self.listings.clear()

    fsspec.register_implementation("remembering", Remembering, clobber=True)
    (tmp_path / "a.parquet").touch()
    assert len(storage.list_files(f"remembering://{tmp_path}", ".parquet")) == 1
    (tmp_path / "b.parquet").touch()
    assert len(storage.list_files(f"remembering://{tmp_path}", ".parquet")) == 2


def test_listing_a_folder_skips_what_is_being_written(tmp_path: Path) -> None:
    for name in ("a.parquet", ".a.parquet.12ab.tmp", ".hidden.parquet"):
        (tmp_path / name).touch()
    assert storage.list_files(str(tmp_path), ".parquet") == [f"{tmp_path}/a.parquet"]
    assert storage.list_files(f"{tmp_path}/none", ".parquet") == []


def test_removing_what_is_not_there_is_fine(tmp_path: Path, memory: str) -> None:
    storage.remove(f"{tmp_path}/none")
    storage.remove(f"{tmp_path}/none", recursive=True)
    storage.remove(f"{memory}/none", recursive=True)
