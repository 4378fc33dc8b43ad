"""Readable, seekable streams of files, for Parquet: every read is repeated until it succeeds or cannot."""

from __future__ import annotations

import io
from functools import partial
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from diffedit_ray.dataset import transport
from diffedit_ray.dataset.faults import Retries, explain
from diffedit_ray.dataset.redaction import shown

WHOLE_BYTES = 8 << 20
"""Files up to this size are read at once: a record file takes one request, where footer and columns took several."""

BLOCK_BYTES = 4 << 20
"""Read ahead of larger ones."""


class _Ranges(AbstractBufferedFile):  # type: ignore[misc]
    """A file of known size, read part by part."""

    def __init__(self, fs: Any, path: str, size: int, retries: Retries) -> None:
        self._retries = retries
        super().__init__(fs, path, "rb", BLOCK_BYTES, cache_type="readahead", size=size)

    def _fetch_range(self, start: int, end: int) -> bytes:
        try:
            return self._retries(lambda left: transport.read_range(self.fs, self.path, start, end, left))
        except Exception as error:  # each protocol's client raises types of its own; readers of files expect one
            raise OSError(explain(error)) from None


def open_stream(fs: Any, path: str, retries: Retries) -> BinaryIO:
    """A stream of a file; one of a web server that gives no parts is downloaded first."""
    if isinstance(fs, LocalFileSystem):
        return open(path, "rb")
    data = retries(lambda left: transport.read_start(fs, path, WHOLE_BYTES + 1, left))
    if len(data) <= WHOLE_BYTES:
        return io.BytesIO(data)
    if transport.is_web(fs):
        size = retries(lambda left: transport.web_size(fs, path, left))
        if size is None:
            return cast(BinaryIO, retries(lambda left: transport.download(fs, path, left)))
    else:
        size = retries(lambda left: fs.info(path, **transport.within(fs, left))["size"])
    return cast(BinaryIO, _Ranges(fs, path, int(size), retries))


class RetryingHandler(pyarrow.fs.FSSpecHandler):  # type: ignore[misc]
    """What Arrow and Ray Data read a filesystem through, in whatever process they do."""

    def __init__(self, fs: Any, retries: Retries) -> None:
        super().__init__(fs)
        self.retries = retries

    def get_file_info(self, paths: list[str]) -> list[pyarrow.fs.FileInfo]:
        """See `pyarrow.fs.FileSystemHandler`."""
        return [self.retries(partial(self._info, path)) for path in paths]

    def _info(self, path: str, seconds: float) -> pyarrow.fs.FileInfo:
        try:
            info = transport.once(self.fs).info(path, **transport.within(self.fs, seconds))
        except FileNotFoundError as error:
            if error.__cause__ is not None:  # not missing: fsspec's HTTP filesystem says so of every trouble
                raise
            return pyarrow.fs.FileInfo(path, pyarrow.fs.FileType.NotFound)
        return self._create_file_info(path, info)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        """See `pyarrow.fs.FileSystemHandler`."""
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        """See `pyarrow.fs.FileSystemHandler`."""
        try:
            return pa.PythonFile(open_stream(transport.once(self.fs), path, self.retries), mode="r")
        except FileNotFoundError:
            raise
        except Exception as error:  # as above
            raise OSError(f"cannot read {shown(path)}: {explain(error)}") from None
