"""What goes wrong between us and a store: which of it passes by itself, and how to say it."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_before_delay, wait_random_exponential

from diffedit_ray.dataset.redaction import shown

T = TypeVar("T")

TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})

# S3 gives some of these with statuses that are otherwise final, and some stores with statuses of their own
_TRANSIENT_CODES = frozenset(
    {
        "BandwidthLimitExceeded",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestLimitExceeded",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",
    }
)

# by name, so that neither need be imported, nor be installed, before a URI asks for it
_TRANSIENT_TYPES = frozenset(
    {
        "aiohttp.ClientConnectionError",
        "aiohttp.ClientPayloadError",
        "azure.IncompleteReadError",
        "azure.ServiceRequestError",
        "azure.ServiceResponseError",
        "botocore.ConnectionError",
        "botocore.CredentialRetrievalError",
        "botocore.FlexibleChecksumError",
        "botocore.HTTPClientError",
        "botocore.IncompleteReadError",
        "botocore.MetadataRetrievalError",
        "botocore.ResponseParserError",
        "http.HTTPException",
        "requests.ConnectionError",
        "requests.Timeout",
        "urllib3.HTTPError",
    }
)
_GARBLED_TYPES = frozenset({"aiohttp.HttpProcessingError"})
_BAD_URI_TYPES = frozenset({"aiohttp.InvalidURL", "botocore.ParamValidationError", "yarl.InvalidURL"})
_FORBIDDEN_TYPES = frozenset({"botocore.NoCredentialsError", "botocore.PartialCredentialsError"})

_TRANSIENT_ERRNOS = frozenset(
    {
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)

_CREDENTIALS = "the environment (AWS_ACCESS_KEY_ID …), the profile, or --storage-options"
_HINTS = {
    "ExpiredToken": "they have expired: renew them and run the same command again",
    "InvalidToken": f"the session token is not valid: check {_CREDENTIALS}",
    "TokenRefreshRequired": "they have expired: renew them and run the same command again",
    "InvalidAccessKeyId": f"the store does not know the access key: check {_CREDENTIALS}, and the endpoint",
    "SignatureDoesNotMatch": f"the secret key is not the access key's: check {_CREDENTIALS}",
    "RequestTimeTooSkewed": "the clock of the machine that asked is wrong: set it",
    "NoCredentialsError": f"there are none: check {_CREDENTIALS}; public data takes "
    """--storage-options '{"s3": {"anon": true}}'""",
}


class ShortRead(ConnectionError):
    """Fewer bytes came than were promised."""


def is_transient(error: BaseException) -> bool:
    """Whether an error of any storage client may pass by itself, so that trying again makes sense.

    Timeouts, lost connections, bodies cut short, HTTP 408, 425, 429 and 5xx, and a store's own words for them are;
    so is 403 to a HEAD, which S3 gives now and then for objects that it does serve. What is missing, forbidden
    or wrongly named is not.
    """
    # clients wrap the true reason: s3fs and fsspec keep it as the cause
    for one in reversed(_causes(error)):
        verdict = _verdict(one)
        if verdict is not None:
            return verdict
    return False


def _verdict(error: BaseException) -> bool | None:
    status, code = status_of(error)
    if status is not None or code is not None:
        operation = str(getattr(error, "operation_name", ""))
        if status == 403 and operation.startswith("Head"):
            return True
        return status in TRANSIENT_STATUSES or code in _TRANSIENT_CODES
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    if isinstance(error, TimeoutError | ConnectionError) or _named(error, _TRANSIENT_TYPES | _GARBLED_TYPES):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    return None


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while chain[-1].__cause__ is not None and len(chain) < 10:
        chain.append(chain[-1].__cause__)
    return chain


def _named(error: BaseException, names: frozenset[str]) -> bool:
    return any(f"{kind.__module__.partition('.')[0]}.{kind.__name__}" in names for kind in type(error).__mro__)


def status_of(error: BaseException) -> tuple[int | None, str | None]:
    """The HTTP status and the store's own code that one error carries, not its causes; null where it has none."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        code: str | None = (response.get("Error") or {}).get("Code")
        status: int | None = (response.get("ResponseMetadata") or {}).get("HTTPStatusCode")
        if status is None and code is not None and code.isdigit():
            status = int(code)
        return status, code
    if _named(error, _GARBLED_TYPES):  # the codes of these are aiohttp's own, not a server's
        return None, None
    for name in ("status", "status_code", "code"):  # aiohttp's, Azure's, Google's
        status = getattr(error, name, None)
        if isinstance(status, int) and 400 <= status < 600:
            return status, None
    return None, None


def _answer(error: BaseException) -> tuple[int | None, str | None]:
    return next((a for a in map(status_of, reversed(_causes(error))) if a != (None, None)), (None, None))


def is_missing(error: BaseException) -> bool:
    """Whether there is nothing under the name that was asked for."""
    status, _ = _answer(error)
    if status is not None:
        return status in (404, 410)
    causes = _causes(error)
    if isinstance(causes[-1], KeyError) and len(causes) > 1:  # fsspec's stores in memory are dictionaries
        causes.pop()
    # of the others the last decides: fsspec calls a web server that cannot be reached a FileNotFoundError, too
    return isinstance(causes[-1], FileNotFoundError | NotADirectoryError)


def is_forbidden(error: BaseException) -> bool:
    """Whether credentials are missing, wrong, expired, or not enough."""
    status, code = _answer(error)
    if status in (401, 403) or code in _HINTS:
        return True
    return any(isinstance(e, PermissionError) or _named(e, _FORBIDDEN_TYPES) for e in _causes(error))


def is_bad_uri(error: BaseException) -> bool:
    """Whether the client refused the URI itself."""
    return any(_named(e, _BAD_URI_TYPES) for e in _causes(error))


def explain(error: BaseException) -> str:
    """An error of any storage client in one line without secrets."""
    root = _causes(error)[-1]
    status, code = _answer(error)
    if code is not None and not code.isdigit():
        text = f"the store answers {status or 'with an error'} {code}"
    elif status is not None:
        text = f"the server answers {status}"
    else:
        text = f"{type(root).__name__}: {root}" if str(root) else type(root).__name__
    return shown(" ".join([" ".join(text.split()), *(f"({note})" for note in getattr(error, "__notes__", ()))]))


def hint(error: BaseException) -> str:
    """What to check when credentials do not do."""
    _, code = _answer(error)
    names = [code, *(type(e).__name__ for e in _causes(error))]
    return next((_HINTS[n] for n in names if n in _HINTS), f"check {_CREDENTIALS}, and what they allow")


@dataclass(frozen=True)
class Retries:
    """How long to insist on one storage operation.

    Attributes:
        tries: Times it is done at the most.
        seconds: When to give up, whatever the number of tries.
        first_wait: The wait after the first failure is random and at most this, and at most doubles each time.
        longest_wait: Seconds no wait exceeds.
    """

    tries: int = 5
    seconds: float = 60.0
    first_wait: float = 0.5
    longest_wait: float = 15.0

    def __call__(self, operation: Callable[[float], T]) -> T:
        """Do an operation, given the seconds left to it, until it succeeds or fails for good.

        Raises:
            Exception: Its last error, with a note of how often it was tried.
        """
        began = time.monotonic()
        again = Retrying(
            stop=stop_after_attempt(self.tries) | stop_before_delay(self.seconds),
            wait=wait_random_exponential(multiplier=self.first_wait, max=self.longest_wait),
            retry=retry_if_exception(is_transient),
            reraise=True,
        )
        try:
            return again(lambda: operation(max(0.01, began + self.seconds - time.monotonic())))
        except Exception as error:
            tried = again.statistics["attempt_number"]
            if tried > 1:
                error.add_note(f"tried {tried} times in {time.monotonic() - began:.1f} s")
            raise
