"""What tests need from the machine, and what happens where it is missing."""

from __future__ import annotations

import os

import pytest


def required(present: bool, what: str) -> pytest.MarkDecorator:
    """Skip a test where something is not installed; where CI forbids skipping, let it run and fail instead."""
    skip = not present and os.environ.get("DIFFEDIT_REQUIRE_SERVICES") != "1"
    return pytest.mark.skipif(skip, reason=f"needs {what}")
