"""What may be printed of a URI: everything but its credentials."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "***"

_SECRET_NAME = re.compile(r"key|secret|token|pass|pwd|sig|auth|credential|cookie|connection|sas", re.IGNORECASE)
_USER = re.compile(r"(?<=://)[^/?#\s]*@")
_PARAMETER = re.compile(r"(?<=[?&#;])([^=&#\s]+)=([^&#\s'\"<>]+)")
_SHORTEST = 8
"""Characters: a shorter value cannot be told from ordinary text, and is no secret to speak of."""

_known: tuple[str, ...] = ()


def shown(text: str) -> str:
    """A URI, or a text with URIs in it, as errors, logs and run files show it.

    User information (``https://user:password@host``), the values of query parameters that sign or authorise
    (``X-Amz-Signature``, ``sig``, ``token``, …) and the secrets of the storage options become ``***``.
    """
    text = _USER.sub(f"{MASK}@", text)
    text = _PARAMETER.sub(lambda m: f"{m[1]}={MASK if _SECRET_NAME.search(m[1]) else m[2]}", text)
    for secret in _known:
        text = text.replace(secret, MASK)
    return text


def remember_secrets(options: Mapping[str, Any]) -> None:
    """Never show these storage options' secrets, whatever text they turn up in."""
    global _known
    # the longest first: one may be part of another
    _known = tuple(sorted(set(_secrets(options, False)), key=len, reverse=True))


def _secrets(value: Any, secret: bool) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _secrets(inner, secret or bool(_SECRET_NAME.search(str(name))))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _secrets(inner, secret)
    elif secret and isinstance(value, str) and len(value) >= _SHORTEST:
        yield value
