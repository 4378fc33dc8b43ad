"""Errors as clients raise them; what stores answer is tested against stores."""

from __future__ import annotations

import errno
import http.client
import socket
import time
from typing import Any

import aiohttp
import pytest
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    ReadTimeoutError,
)
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from diffedit_ray.dataset.faults import (
    Retries,
    explain,
    hint,
    is_bad_uri,
    is_forbidden,
    is_missing,
    is_transient,
)


def _s3(code: str, status: int, operation: str = "GetObject") -> BaseException:
    """As s3fs raises it."""
    response: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(response, operation))


def _web(status: int) -> BaseException:
    """As fsspec's HTTP filesystem raises it."""
    error = FileNotFoundError("https://h/a")
    error.__cause__ = aiohttp.ClientResponseError(None, (), status=status)  # type: ignore[arg-type]
    return error


TRANSIENT = [
    _s3("SlowDown", 503),
    _s3("InternalError", 500),
    _s3("InternalError", 200),
    _s3("ServiceUnavailable", 503),
    _s3("RequestTimeout", 400),
    _s3("TooManyRequests", 429),
    _s3("403", 403, "HeadObject"),
    _s3("SomethingNew", 502),
    *(_web(status) for status in (408, 429, 500, 502, 503, 504)),
    ReadTimeoutError(endpoint_url="http://h"),
    ConnectTimeoutError(endpoint_url="http://h"),
    EndpointConnectionError(endpoint_url="http://h"),
    FSTimeoutError(),
    TimeoutError(),
    ConnectionResetError(),
    BrokenPipeError(),
    OSError(errno.ESTALE, "stale file handle"),
    OSError(errno.EHOSTUNREACH, "no route"),
    socket.gaierror(socket.EAI_AGAIN, "try again"),
    http.client.IncompleteRead(b""),
    aiohttp.ClientPayloadError(),
    aiohttp.ServerDisconnectedError(),
    aiohttp.http_exceptions.ContentLengthError("short"),
]
PERMANENT = [
    _s3("NoSuchKey", 404),
    _s3("NoSuchBucket", 404),
    _s3("AccessDenied", 403),
    _s3("403", 403, "GetObject"),
    _s3("404", 404, "HeadObject"),
    _s3("ExpiredToken", 400),
    _s3("InvalidBucketName", 400),
    _s3("NotImplemented", 501),
    *(_web(status) for status in (400, 401, 403, 404, 410, 501)),
    NoCredentialsError(),
    ParamValidationError(report="no"),
    FileNotFoundError(),
    PermissionError(),
    IsADirectoryError(),
    OSError(errno.ENOSPC, "disk full"),
    OSError("TLS: CERTIFICATE_VERIFY_FAILED"),
    ConnectionError("CERTIFICATE_VERIFY_FAILED"),
    socket.gaierror(socket.EAI_NONAME, "no such host"),
    ValueError(),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_what_passes_by_itself(error: BaseException) -> None:
    assert is_transient(error)


@pytest.mark.parametrize("error", PERMANENT, ids=repr)
def test_what_does_not(error: BaseException) -> None:
    assert not is_transient(error)


def test_what_happened_while_another_error_was_handled_is_not_its_reason() -> None:
    error = FileNotFoundError("a")
    error.__context__ = TimeoutError()
    assert not is_transient(error)


def _from(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def test_a_missing_file_is_told_from_a_server_out_of_reach() -> None:
    assert is_missing(_from(FileNotFoundError("a"), KeyError("a")))
    assert not is_missing(_from(FileNotFoundError("a"), ConnectionRefusedError()))
    assert not is_missing(KeyError("a"))


def test_missing_forbidden_and_bad() -> None:
    assert [is_missing(e) for e in (_s3("NoSuchKey", 404), _web(410), FileNotFoundError("a"), _web(503))] == [
        True, True, True, False,
    ]  # fmt: skip
    forbidden = (_s3("AccessDenied", 403), _s3("ExpiredToken", 400), _web(401), NoCredentialsError(), PermissionError())
    assert all(is_forbidden(e) for e in forbidden)
    assert not is_forbidden(_s3("NoSuchKey", 404))
    assert is_bad_uri(ParamValidationError(report="no"))
    assert is_bad_uri(aiohttp.InvalidURL("x"))
    assert not is_bad_uri(ValueError())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (_s3("SlowDown", 503), "the store answers 503 SlowDown"),
        (_s3("403", 403, "HeadObject"), "the server answers 403"),
        (_web(502), "the server answers 502"),
        (FSTimeoutError(), "FSTimeoutError"),
        (EndpointConnectionError(endpoint_url="http://a:pw@h/"), 'EndpointConnectionError: Could not connect to the '
         'endpoint URL: "http://***@h/"'),
    ],
)  # fmt: skip
def test_an_error_is_told_in_one_line_without_secrets(error: BaseException, said: str) -> None:
    assert explain(error) == said


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (_s3("ExpiredToken", 400), "expired: renew them"),
        (_s3("InvalidAccessKeyId", 403), "does not know the access key"),
        (_s3("SignatureDoesNotMatch", 403), "secret key is not the access key's"),
        (NoCredentialsError(), "there are none"),
        (_s3("AccessDenied", 403), "--storage-options, and what they allow"),
    ],
)
def test_credentials_that_do_not_do_come_with_advice(error: BaseException, advice: str) -> None:
    assert advice in hint(error)


class TestRetries:
    def test_it_insists_until_it_succeeds(self) -> None:
        calls: list[float] = []

        def flaky(left: float) -> str:
            calls.append(left)
            if len(calls) < 3:
                raise TimeoutError
            return "done"

        assert Retries(tries=3, seconds=9, first_wait=0.05)(flaky) == "done"
        assert len(calls) == 3
        assert 9 >= calls[0] > calls[1] > calls[2] > 8

    def test_it_gives_up_after_so_many_tries_and_says_so(self) -> None:
        calls = []

        def broken(left: float) -> None:
            calls.append(left)
            raise ConnectionResetError("gone")

        with pytest.raises(ConnectionResetError) as caught:
            Retries(tries=4, first_wait=0.01)(broken)
        assert len(calls) == 4
        assert explain(caught.value).startswith("ConnectionResetError: gone (tried 4 times in ")

    def test_it_gives_up_after_so_many_seconds(self) -> None:
        def slow(left: float) -> None:
            time.sleep(min(0.2, left))
            raise TimeoutError

        began = time.monotonic()
        with pytest.raises(TimeoutError):
            Retries(tries=1000, seconds=1.0, first_wait=0.05, longest_wait=0.1)(slow)
        assert 0.5 < time.monotonic() - began < 2.0

    def test_what_is_permanent_is_tried_once(self) -> None:
        calls = []

        def missing(left: float) -> None:
            calls.append(left)
            raise FileNotFoundError("a")

        with pytest.raises(FileNotFoundError) as caught:
            Retries()(missing)
        assert len(calls) == 1
        assert "tried" not in explain(caught.value)
