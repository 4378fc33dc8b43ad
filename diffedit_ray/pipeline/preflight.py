"""What is tried before any GPU is taken: each failure here would else come late, once for every row."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable

from diffedit_ray.dataset import storage
from diffedit_ray.dataset.identity import identity
from diffedit_ray.diffusion.checkpoint import check_checkpoint
from diffedit_ray.errors import DiffEditError, ErrorCode, PreflightError, RowError

logger = logging.getLogger(__name__)

SAMPLES = 3
"""Images tried; one that can be read is enough."""
REFUSED = (ErrorCode.FORBIDDEN, ErrorCode.FETCH_FAILED, ErrorCode.BAD_URI)
"""What says that no image at all can be read. One that is missing says nothing of the others."""


def check_output(output: str) -> None:
    """Write a file in the output, read it back, delete it.

    Raises:
        PreflightError: One of the three does not work.
    """
    uri = storage.join(output, "_run", f"preflight-{secrets.token_hex(4)}")
    token = secrets.token_bytes(16)
    doing = "write to"
    try:
        storage.write_bytes(uri, token)
        doing = "read back from"
        found = storage.read_bytes(uri, max_bytes=len(token))
        if found != token:
            raise PreflightError(f"the output {output} gives back other bytes than were written to {uri}")
        doing = "delete from"
        storage.remove(uri)
    except PreflightError:
        raise
    except Exception as error:  # each protocol's client raises types of its own
        message = error.message if isinstance(error, RowError) else str(error)
        raise PreflightError(
            f"cannot {doing} the output {output}: {message}. This was tried as {identity(output)}; check that it may "
            "read, write and delete there, and that the endpoint and region are right (AWS_* variables, or "
            "--storage-options)"
        ) from None


def check_images(uris: Iterable[str], *, max_bytes: int) -> None:
    """Read the first few images of a manifest, to see whether this process may.

    Raises:
        PreflightError: None of them can be reached.
    """
    refusal: tuple[str, RowError] | None = None
    for tried, uri in enumerate(uris):
        if tried == SAMPLES:
            break
        try:
            storage.read_bytes(uri, max_bytes=max_bytes)
            return
        except RowError as error:
            if error.code not in REFUSED:
                return
            refusal = uri, error
    if refusal is not None:
        uri, why = refusal
        try:
            who = f" This was tried as {identity(uri)}."
        except DiffEditError:
            who = ""
        raise PreflightError(
            f"cannot read any of the first images of the manifest: {why.message}.{who} Check the URI's scheme and "
            "bucket, and that these credentials may read there (AWS_* variables, or --storage-options)"
        )


def check_model(model: str) -> None:
    """Open every part of a checkpoint, without loading it.

    Raises:
        ModelError: It is not complete.
    """
    check_checkpoint(model)
