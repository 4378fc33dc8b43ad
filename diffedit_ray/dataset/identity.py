"""As whom this process reaches a store: what a person needs to know when it is refused."""

from __future__ import annotations

import getpass
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from diffedit_ray.dataset import storage


def identity(uri: str) -> str:
    """Who asks for a URI, without any secret: an access key's first and last characters, or the local user."""
    fs, _ = storage.filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        return f"user {_user()}"
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    if "s3" in protocols:
        return _s3_identity(fs)
    if "http" in protocols:
        return "nobody in particular (https needs no credentials, or has them in the URI)"
    return f"the credentials that {type(fs).__name__} finds in this environment"


def _s3_identity(fs: Any) -> str:
    if getattr(fs, "anon", False):
        return "nobody (anonymous access is set)"
    if getattr(fs, "key", None):
        return f"access key {_masked(fs.key)} from the storage options"
    import botocore.session

    session = botocore.session.Session(profile=(fs.kwargs or {}).get("profile"))
    found = session.get_credentials()
    if found is None:
        return "nobody: there are no AWS credentials in the environment, the AWS configuration or this machine's role"
    return f"access key {_masked(found.access_key)} from {found.method.replace('-', ' ')}"


def _masked(key: str) -> str:
    return f"{key[:4]}…{key[-4:]}" if len(key) > 12 else f"{key[:2]}…"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a password file
        return "unknown"
