"""One filesystem and its bytes: single requests, each bounded in time and never repeated here."""

from __future__ import annotations

import os
import tempfile
from typing import IO, Any

import fsspec.config
import yarl
from fsspec.asyn import sync
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from diffedit_ray.dataset.faults import ShortRead, status_of
from diffedit_ray.dataset.redaction import shown
from diffedit_ray.errors import OutputError

SILENCE_SECONDS = 15.0
"""Seconds without a byte after which a web server counts as gone; s3fs has the same."""

_CHUNK = 1 << 18


def protocols(fs: Any) -> tuple[str, ...]:
    """The protocols a filesystem stands for."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def is_s3(fs: Any) -> bool:
    """Whether a filesystem is s3fs."""
    return "s3" in protocols(fs)


def is_web(fs: Any) -> bool:
    """Whether a filesystem is a web server: it has files, but no folders."""
    return "https" in protocols(fs)


def connect(uri: str, request_tries: int = 1) -> tuple[Any, str]:
    """The filesystem of a URI, and the path on it.

    Args:
        uri: Any that fsspec understands.
        request_tries: Times s3fs may send one request. Our own retries repeat whole operations: where those are
            single requests, a second layer would multiply the tries; where they are many, as listings are,
            they would hardly ever succeed without.

    Raises:
        OutputError: The scheme is unknown, its package is not installed, or its options are wrong.
    """
    scheme = uri.partition("://")[0]
    options: dict[str, Any] = {}
    if scheme in ("s3", "s3a"):
        configured = {**fsspec.config.conf.get("s3", {}), **fsspec.config.conf.get("s3a", {})}
        retries = {"mode": "standard", "total_max_attempts": request_tries}
        options["config_kwargs"] = {"retries": retries, **configured.get("config_kwargs", {})}
        options["use_listings_cache"] = False  # other processes write, too
    try:
        fs, path = url_to_fs(uri, **options)
    except ImportError as error:
        raise OutputError(f"{shown(uri)}: {_missing_package(scheme, error)}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise OutputError(f"{shown(uri)} cannot be opened: {shown(str(error))}") from None
    return once(fs), path


def once(fs: Any) -> Any:
    """The same filesystem, made to leave repeating to its caller."""
    if is_s3(fs):
        fs.retries = 1
    return fs


def _missing_package(scheme: str, error: ImportError) -> str:
    known = known_implementations.get(scheme, {})
    package = known.get("class", "").partition(".")[0]
    if package in ("", "fsspec"):
        return f"{scheme}:// needs a package that is not installed: {error}"
    return f"{scheme}:// needs the package {package}, which is not installed: pip install {package}, on every node"


def within(fs: Any, seconds: float) -> dict[str, float]:
    """The argument that bounds a call in time, where the filesystem has one."""
    return {"timeout": seconds} if getattr(fs, "async_impl", False) else {}


def read_start(fs: Any, path: str, limit: int, seconds: float) -> bytes:
    """The first `limit` bytes of a file, fewer if it is shorter, in one request where the protocol allows it."""
    if is_web(fs):
        data: bytes = sync(fs.loop, _get_start, fs, path, limit, timeout=seconds)
        return data
    if is_s3(fs):
        # a HEAD would cost another request, and S3 denies them now and then
        try:
            data = fs.cat_file(path, start=0, end=limit, timeout=seconds)
        except OSError as error:
            if error.__cause__ is not None and status_of(error.__cause__)[0] == 416:
                return b""  # of an empty object no range can be had
            raise
        return data
    with fs.open(path, "rb") as stream:
        data = stream.read(limit)
    return data


def read_range(fs: Any, path: str, start: int, end: int, seconds: float) -> bytes:
    """The bytes from `start` up to `end` of a file known to be that long.

    Raises:
        ShortRead: There were fewer.
    """
    if is_web(fs):
        data = sync(fs.loop, _get_range, fs, path, start, end, timeout=seconds)
    else:
        data = fs.cat_file(path, start=start, end=end, **within(fs, seconds))
    if len(data) != end - start:
        raise ShortRead(f"{len(data)} bytes came instead of {end - start}")
    return bytes(data)


def web_size(fs: Any, url: str, seconds: float) -> int | None:
    """The size of a web server's file if parts of it can be had; None if it only comes whole."""
    size: int | None = sync(fs.loop, _ranged_size, fs, url, timeout=seconds)
    return size


def download(fs: Any, url: str, seconds: float) -> IO[bytes]:
    """A web server's file in a temporary one, which is gone once closed."""
    file = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        sync(fs.loop, _get_into, fs, url, file, timeout=seconds)
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


def _request(fs: Any, url: str, headers: dict[str, str]) -> tuple[yarl.URL, dict[str, Any]]:
    import aiohttp

    options = dict(fs.kwargs)
    options["headers"] = {**options.get("headers", {}), **headers}
    silence = options.get("timeout", SILENCE_SECONDS)
    if isinstance(silence, int | float):
        options["timeout"] = aiohttp.ClientTimeout(total=None, sock_connect=silence, sock_read=silence)
    # what is a proper URL already goes as it is: a signature may cover its very spelling
    proper = url.isascii() and not any(c.isspace() for c in url)
    try:
        target = yarl.URL(url, encoded=proper)
        _ = target.port  # looked at only when asked for, and then refused
        return target, options
    except ValueError as error:
        raise aiohttp.InvalidURL(shown(url), str(error)) from None


async def _at_most(answer: Any, limit: int) -> bytes:
    """What a server sends, but no more than is wanted, whatever it says the size is."""
    data = bytearray()
    while len(data) < limit and (chunk := await answer.content.read(min(_CHUNK, limit - len(data)))):
        data += chunk
    return bytes(data)


async def _get_start(fs: Any, url: str, limit: int) -> bytes:
    session = await fs.set_session()
    target, options = _request(fs, url, {})
    async with session.get(target, **options) as answer:
        answer.raise_for_status()
        return await _at_most(answer, limit)


async def _get_range(fs: Any, url: str, start: int, end: int) -> bytes:
    session = await fs.set_session()
    target, options = _request(fs, url, {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"})
    async with session.get(target, **options) as answer:
        answer.raise_for_status()
        if answer.status != 206:
            raise ShortRead(f"the server answers {answer.status} where it gave parts before")
        return await _at_most(answer, end - start + 1)


async def _ranged_size(fs: Any, url: str) -> int | None:
    session = await fs.set_session()
    target, options = _request(fs, url, {"Range": "bytes=0-0", "Accept-Encoding": "identity"})
    async with session.get(target, **options) as answer:
        answer.raise_for_status()
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        return int(total) if answer.status == 206 and total.isdigit() else None


async def _get_into(fs: Any, url: str, file: IO[bytes]) -> None:
    session = await fs.set_session()
    target, options = _request(fs, url, {})
    async with session.get(target, **options) as answer:
        answer.raise_for_status()
        async for chunk in answer.content.iter_chunked(_CHUNK):
            file.write(chunk)


def write_local(path: str, hidden: str, data: bytes) -> None:
    """Write a local file by way of a hidden one beside it."""
    try:
        with open(hidden, "wb") as stream:
            stream.write(data)
            # or after a power cut the name may stand for an empty file, and a record for an image that is none
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(hidden, path)
    finally:
        if os.path.exists(hidden):
            os.remove(hidden)
