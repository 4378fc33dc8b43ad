"""A URI and its bytes, by way of fsspec: whatever may pass by itself is tried again, and a write is whole or not there.

`configure` sets the options of each protocol and how long to insist; everything else takes a URI.
"""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

import fsspec.config
import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem

from diffedit_ray.dataset import transport
from diffedit_ray.dataset.faults import Retries, explain, hint, is_bad_uri, is_forbidden, is_missing, is_transient
from diffedit_ray.dataset.redaction import remember_secrets, shown
from diffedit_ray.dataset.streams import RetryingHandler, open_stream
from diffedit_ray.errors import DiffEditError, ErrorCode, ForbiddenError, MissingError, OutputError, RowError

__all__ = [
    "absolute",
    "arrow_filesystem",
    "configure",
    "filesystem",
    "find_files",
    "glob_files",
    "has_scheme",
    "is_transient",
    "is_web",
    "join",
    "kind",
    "list_files",
    "modified",
    "open_read",
    "parent",
    "read_bytes",
    "refuse_scheme",
    "remove",
    "resolve",
    "shown",
    "write_bytes",
]

T = TypeVar("T")

_retries = Retries()
_options: dict[str, dict[str, Any]] = {}
_before: dict[str, dict[str, Any] | None] = {}
"""What fsspec's configuration held, for each protocol in `_options`, before we touched it."""


def configure(options: Mapping[str, Mapping[str, Any]], *, tries: int = 5, seconds: float = 60.0) -> None:
    """Give every filesystem this process makes from now on its options; those of an earlier call are forgotten.

    They go into fsspec's own configuration, so that they hold wherever fsspec is used in the process. What they
    leave out comes from where the protocol's client looks by itself; s3fs looks where every AWS tool does.
    Doing the same again costs nothing.

    Args:
        options: Protocol -> options of its fsspec filesystem, as in ``{"s3": {"endpoint_url": …}}``.
        tries: Times one operation is done at the most before it has failed.
        seconds: How long all its tries may take.
    """
    global _retries, _options
    _retries = Retries(tries=tries, seconds=seconds)
    if options == _options:
        return
    for protocol, held in _before.items():
        fsspec.config.conf.pop(protocol, None)
        if held is not None:
            fsspec.config.conf[protocol] = held
    _before.clear()
    _options = {protocol: copy.deepcopy(dict(values)) for protocol, values in options.items()}
    for protocol, values in _options.items():
        held = fsspec.config.conf.get(protocol)
        _before[protocol] = held
        fsspec.config.conf[protocol] = {**(held or {}), **values}
    remember_secrets(_options)


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URI, and the path on it.

    Raises:
        OutputError: The scheme is unknown or its package is not installed.
    """
    return transport.connect(uri)


def arrow_filesystem(fs: Any) -> pyarrow.fs.FileSystem:
    """The same filesystem for Arrow and Ray Data; Arrow's own S3 client fails on real S3 servers."""
    if isinstance(fs, LocalFileSystem):
        return pyarrow.fs.LocalFileSystem()
    return pyarrow.fs.PyFileSystem(RetryingHandler(fs, _retries))


def has_scheme(uri: str) -> bool:
    """Whether a URI names its protocol, as s3://… does and a path does not."""
    return "://" in uri


def is_web(uri: str) -> bool:
    """Whether a URI is a web server's: there a ? starts a query, and there are no folders to look into."""
    return uri.startswith(("http://", "https://"))


def join(base: str, *parts: str) -> str:
    """A URI below another."""
    return "/".join([base.rstrip("/"), *parts])


def parent(uri: str) -> str:
    """The folder that a URI lies in; of a URL without its query, which is the file's own."""
    if is_web(uri):
        uri = uri.split("#", 1)[0].split("?", 1)[0]
    return uri.rstrip("/").rsplit("/", 1)[0]


def absolute(uri: str) -> str:
    """A local path made independent of the working directory; Ray's workers have another one."""
    return uri if has_scheme(uri) else os.path.abspath(os.path.expanduser(uri))


def resolve(uri: str, base: str) -> str:
    """An image URI as a manifest writes it: relative ones are relative to `base`, the manifest's folder."""
    if has_scheme(uri) or os.path.isabs(uri):
        return uri
    return join(base, uri)


def refuse_scheme(uri: str, allowed: Sequence[str] | None) -> None:
    """Refuse a URI whose scheme is not among those allowed; a path counts as "file", no list allows all.

    Raises:
        RowError: `BAD_URI`.
    """
    if allowed is None:
        return
    # fsspec chains protocols, as in simplecache::https://…; each has to be allowed
    for part in (parts := uri.split("::")):
        bare = part if len(parts) > 1 and part.isalpha() else "file"
        scheme = part.partition("://")[0] if has_scheme(part) else bare
        if scheme.lower() not in allowed:
            raise RowError(
                ErrorCode.BAD_URI,
                f"{shown(uri)} is of scheme {scheme}, and image_schemes allows {', '.join(allowed) or 'none'}",
            )


def read_bytes(uri: str, *, max_bytes: int) -> bytes:
    """A whole file.

    Raises:
        RowError: `BAD_URI`, `NOT_FOUND`, `FORBIDDEN`, `TOO_LARGE` or `FETCH_FAILED`.
    """
    name = shown(uri)
    try:
        fs, path = filesystem(uri)
        data = _retries(lambda left: transport.read_start(fs, path, max_bytes + 1, left))
    except OutputError as error:
        raise RowError(ErrorCode.BAD_URI, str(error)) from None
    except IsADirectoryError:
        raise RowError(ErrorCode.NOT_FOUND, f"{name} is a folder, not an image") from None
    except Exception as error:  # each protocol's client raises types of its own
        if is_missing(error):
            raise RowError(ErrorCode.NOT_FOUND, f"{name} does not exist") from None
        if is_forbidden(error):
            raise RowError(ErrorCode.FORBIDDEN, _forbidden("read", uri, error)) from None
        code = ErrorCode.BAD_URI if is_bad_uri(error) else ErrorCode.FETCH_FAILED
        raise RowError(code, f"{name} cannot be read: {explain(error)}") from None
    if len(data) > max_bytes:
        raise RowError(ErrorCode.TOO_LARGE, f"{name} is larger than max_bytes = {max_bytes:,} allows")
    return data


def _forbidden(verb: str, uri: str, error: Exception) -> str:
    if isinstance(error, PermissionError) and error.__cause__ is None:
        return f"{shown(uri)} may not be {verb}: {explain(error)}"
    return f"{shown(uri)} may not be {verb} with the credentials this job has ({explain(error)}): {hint(error)}"


def _for_output(verb: str, past: str, uri: str, operation: Callable[[Any, str, float], T], request_tries: int = 1) -> T:
    """Do something to a URI that is not one row's: its errors are the job's."""
    try:
        fs, path = transport.connect(uri, request_tries)
        return _retries(lambda left: operation(fs, path, left))
    except DiffEditError:
        raise
    except Exception as error:  # each protocol's client raises types of its own
        if is_missing(error):
            raise MissingError(f"{shown(uri)} does not exist") from None
        if is_forbidden(error):
            raise ForbiddenError(_forbidden(past, uri, error)) from None
        raise OutputError(f"cannot {verb} {shown(uri)}: {explain(error)}") from None


MULTIPART_BYTES = 100 << 20
"""From this size on s3fs writes in parts, which become visible together, once the last one is there."""


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file so that a reader sees all of it or none: object stores do so by themselves.

    Raises:
        OutputError: It could not be written; `ForbiddenError` if the credentials do not allow it.
    """

    def write(fs: Any, path: str, left: float) -> None:
        if not isinstance(fs, LocalFileSystem):
            fs.pipe_file(path, data, **transport.within(fs, left))
            return
        folder, name = os.path.split(path)
        os.makedirs(folder, exist_ok=True)
        transport.write_local(path, os.path.join(folder, f".{name}.{secrets.token_hex(4)}.tmp"), data)

    try:
        _for_output("write", "written", uri, write, _retries.tries if len(data) >= MULTIPART_BYTES else 1)
    except MissingError as error:  # a bucket, or a file where a folder should be
        raise OutputError(f"cannot write {shown(uri)}: its bucket or folder is not one: {error}") from None


def kind(uri: str) -> str | None:
    """ "file", "folder", or None if there is nothing there.

    Raises:
        OutputError: It could not be found out.
    """

    def look(fs: Any, path: str, left: float) -> str:
        fs.invalidate_cache()
        found = fs.info(path, **transport.within(fs, left))
        return "folder" if found["type"] == "directory" else "file"

    try:
        return _for_output("look at", "looked at", uri, look)
    except MissingError:
        return None


def list_files(uri: str, suffix: str) -> list[str]:
    """The URIs of the files directly below `uri` that end in `suffix`, sorted; none if there is no such folder.

    Raises:
        OutputError: It could not be listed.
    """

    def names(fs: Any, path: str, left: float) -> list[str]:
        fs.invalidate_cache()  # some filesystems remember listings, and other processes have written since
        found = fs.ls(path, detail=False, **transport.within(fs, left))
        return [name.rstrip("/").rsplit("/", 1)[-1] for name in found]

    with contextlib.suppress(MissingError):
        found = _for_output("list", "listed", uri, names, _retries.tries)
        return sorted(join(uri, name) for name in found if name.endswith(suffix) and not name.startswith("."))
    return []


def find_files(uri: str, suffix: str) -> list[str]:
    """The URIs of all files below `uri`, however deep, that end in `suffix`, sorted, hidden ones left out.

    Raises:
        OutputError: They could not be listed.
    """

    def find(fs: Any, path: str, left: float) -> list[str]:
        fs.invalidate_cache()
        found = fs.find(path, **transport.within(fs, left))
        wanted = [p for p in found if p.endswith(suffix) and "/." not in p[len(path.rstrip("/")) :]]
        return sorted(_named_like(uri, fs, p) for p in wanted)

    return _for_output("list", "listed", uri, find, _retries.tries)


def glob_files(uri: str) -> list[str]:
    """The URIs that a pattern stands for, sorted.

    Raises:
        OutputError: They could not be listed.
    """

    def glob(fs: Any, path: str, left: float) -> list[str]:
        fs.invalidate_cache()
        return sorted(_named_like(uri, fs, p) for p in fs.glob(path, **transport.within(fs, left)))

    return _for_output("list", "listed", uri, glob, _retries.tries)


def _named_like(uri: str, fs: Any, path: str) -> str:
    return str(fs.unstrip_protocol(path)) if has_scheme(uri) else path


def remove(uri: str, *, recursive: bool = False) -> None:
    """Remove a file or, if so told, all below it; nothing there is fine.

    Raises:
        OutputError: It could not be removed.
    """

    def take_away(fs: Any, path: str, left: float) -> None:
        if not recursive:
            fs.rm_file(path, **transport.within(fs, left))
            return
        fs.invalidate_cache()
        fs.rm(path, recursive=True, **transport.within(fs, left))
        fs.invalidate_cache()
        # S3 may refuse some of a thousand keys at a time, and s3fs does not say so
        if kept := fs.find(path, **transport.within(fs, left)):
            raise TimeoutError(f"{len(kept)} files are still there, {shown(kept[0])} for one")

    with contextlib.suppress(MissingError):
        _for_output("remove", "removed", uri, take_away, _retries.tries if recursive else 1)


@contextlib.contextmanager
def open_read(uri: str) -> Iterator[Any]:
    """A readable, seekable stream of a file, of which every single read is tried again.

    Raises:
        OutputError: It could not be opened; `MissingError` if it is not there.
    """
    try:
        fs, path = filesystem(uri)
        stream = open_stream(fs, path, _retries)
    except DiffEditError:
        raise
    except Exception as error:  # each protocol's client raises types of its own
        if is_missing(error):
            raise MissingError(f"{shown(uri)} does not exist") from None
        if is_forbidden(error):
            raise ForbiddenError(_forbidden("read", uri, error)) from None
        raise OutputError(f"cannot read {shown(uri)}: {explain(error)}") from None
    with stream:
        yield stream


def modified(uri: str) -> float:
    """When a file was last written, in seconds since 1970 on the store's own clock.

    Raises:
        MissingError: It is not there.
        OutputError: It could not be found out.
    """

    def look(fs: Any, path: str, left: float) -> float:
        fs.invalidate_cache()
        written: datetime = fs.modified(path)
        return written.timestamp()

    return _for_output("look at", "looked at", uri, look)
