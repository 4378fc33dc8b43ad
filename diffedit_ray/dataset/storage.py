"""A URI and its bytes, by way of fsspec."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import fsspec
import pyarrow.fs
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from diffedit_ray.errors import DiffEditError, ErrorCode, MissingError, OutputError, RowError


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URI, and the path on it.

    Raises:
        OutputError: The scheme is unknown or its package is not installed.
    """
    try:
        fs, path = url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise OutputError(f"{uri}: {error}") from None
    return fs, path


def arrow_filesystem(fs: Any) -> pyarrow.fs.FileSystem:
    """The same filesystem for Arrow and Ray Data; Arrow's own S3 client fails on real S3 servers."""
    if isinstance(fs, LocalFileSystem):
        return pyarrow.fs.LocalFileSystem()
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))


def has_scheme(uri: str) -> bool:
    """Whether a URI names its protocol, as s3://… does and a path does not."""
    return "://" in uri


def join(base: str, *parts: str) -> str:
    """A URI below another."""
    return "/".join([base.rstrip("/"), *parts])


def absolute(uri: str) -> str:
    """A local path made independent of the working directory; Ray's workers have another one."""
    return uri if has_scheme(uri) else os.path.abspath(os.path.expanduser(uri))


def resolve(uri: str, base: str) -> str:
    """An image URI as a manifest writes it: relative ones are relative to `base`, the manifest's folder."""
    if has_scheme(uri) or os.path.isabs(uri):
        return uri
    return join(base, uri)


def read_bytes(uri: str, *, max_bytes: int) -> bytes:
    """A whole file.

    Raises:
        RowError: `BAD_URI`, `NOT_FOUND`, `FORBIDDEN`, `TOO_LARGE` or `FETCH_FAILED`.
    """
    try:
        fs, path = filesystem(uri)
        with fs.open(path, "rb") as stream:
            data: bytes = stream.read(max_bytes + 1)
    except OutputError as error:
        raise RowError(ErrorCode.BAD_URI, str(error)) from None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _http_error(uri, error) or RowError(ErrorCode.NOT_FOUND, f"{uri} does not exist") from None
    except IsADirectoryError:
        raise RowError(ErrorCode.NOT_FOUND, f"{uri} is a folder, not an image") from None
    except PermissionError:
        raise RowError(ErrorCode.FORBIDDEN, f"{uri} may not be read with the credentials this job has") from None
    except Exception as error:  # each protocol's client raises types of its own
        wrong = RowError(ErrorCode.FETCH_FAILED, f"{uri}: {type(error).__name__}: {error}")
        raise _http_error(uri, error) or wrong from None
    if len(data) > max_bytes:
        raise RowError(ErrorCode.TOO_LARGE, f"{uri} is larger than max_bytes = {max_bytes:,} allows")
    return data


def _http_error(uri: str, error: Exception) -> RowError | None:
    """What a web server said, if it is one: fsspec calls every trouble "not found" and keeps the true one as cause."""
    if not uri.startswith(("http://", "https://")):
        return None
    cause = error.__cause__ or error
    status = getattr(cause, "status", None)
    if status in (404, 410) or isinstance(cause, FileNotFoundError):
        return None
    if status in (401, 403):
        return RowError(ErrorCode.FORBIDDEN, f"{uri} may not be read: the server answers {status}")
    return RowError(ErrorCode.FETCH_FAILED, f"{uri}: {type(cause).__name__}: {cause}")


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file so that a reader sees all of it or none: object stores do so by themselves.

    Raises:
        OutputError: It could not be written.
    """
    try:
        fs, path = filesystem(uri)
        if not isinstance(fs, LocalFileSystem):
            fs.pipe_file(path, data)
            return
        folder, name = os.path.split(path)
        os.makedirs(folder, exist_ok=True)
        hidden = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.tmp")
        try:
            with open(hidden, "wb") as stream:
                stream.write(data)
            os.replace(hidden, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(hidden)
    except DiffEditError:
        raise
    except Exception as error:  # each protocol's client raises types of its own
        raise OutputError(f"cannot write {uri}: {type(error).__name__}: {error}") from error


def list_files(uri: str, suffix: str) -> list[str]:
    """The URIs of the files directly below `uri` that end in `suffix`, sorted; none if there is no such folder."""
    fs, path = filesystem(uri)
    fs.invalidate_cache()  # s3fs remembers listings, and other processes have written since
    try:
        found = fs.ls(path, detail=False)
    except FileNotFoundError:
        return []
    names = (name.rstrip("/").rsplit("/", 1)[-1] for name in found)
    return sorted(join(uri, name) for name in names if name.endswith(suffix) and not name.startswith("."))


def remove(uri: str, *, recursive: bool = False) -> None:
    """Remove a file or, if so told, all below it; nothing there is fine."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=recursive)


@contextlib.contextmanager
def open_read(uri: str) -> Iterator[Any]:
    """A readable, seekable stream of a file."""
    with fsspec.open(uri, "rb") as stream:
        yield stream


def modified(uri: str) -> float:
    """When a file was last written, in seconds since 1970 on the store's own clock.

    Raises:
        MissingError: It is not there.
    """
    fs, path = filesystem(uri)
    fs.invalidate_cache()  # as in list_files
    try:
        written: datetime = fs.modified(path)
    except FileNotFoundError:
        raise MissingError(f"{uri} does not exist") from None
    return written.timestamp()
