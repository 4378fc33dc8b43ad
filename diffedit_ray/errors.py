"""What can go wrong, and the codes that a failed row carries."""

from __future__ import annotations

from enum import StrEnum


class DiffEditError(Exception):
    """Base of every error this package raises on purpose; its text is written for the user."""


class SettingsError(DiffEditError):
    """A setting, an option or an argument is wrong."""


class ManifestError(DiffEditError):
    """The manifest cannot be read or breaks its contract as a whole."""


class ModelError(DiffEditError):
    """The checkpoint cannot be loaded or is of a kind this method does not support."""


class OutputError(DiffEditError):
    """The output cannot be used, or does not hold what the job should have left there."""


class PreflightError(DiffEditError):
    """Something the whole run needs does not work: reading images, writing the output."""


class ForbiddenError(OutputError):
    """The credentials are missing, wrong, expired or not enough."""


class MissingError(OutputError):
    """There is nothing under that name."""


class WrongOutputError(OutputError):
    """The output named is not one to do this with: another run's, with other settings, or no run's at all."""


class ErrorCode(StrEnum):
    """Why a row failed, as its record says it."""

    BAD_ROW = "bad_row"
    BAD_SETTINGS = "bad_settings"
    BAD_URI = "bad_uri"
    NOT_FOUND = "not_found"
    FORBIDDEN = "forbidden"
    FETCH_FAILED = "fetch_failed"
    TIMEOUT = "timeout"
    TOO_LARGE = "too_large"
    NOT_AN_IMAGE = "not_an_image"
    CORRUPT_IMAGE = "corrupt_image"
    BAD_MASK = "bad_mask"
    EDIT_FAILED = "edit_failed"
    OUT_OF_MEMORY = "out_of_memory"
    STORE_FAILED = "store_failed"
    WORKER_DIED = "worker_died"


class RowError(DiffEditError):
    """One row cannot be done.

    Attributes:
        code: The machine-readable reason.
        message: The same for a person: what happened, to which URI, what to do.
    """

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type[RowError], tuple[ErrorCode, str]]:
        return RowError, (self.code, self.message)
