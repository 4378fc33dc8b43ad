"""Records of made-up rows, written as a run writes them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from diffedit_ray.dataset import records
from diffedit_ray.dataset.records import EDITED, FAILED, OutputLayout
from diffedit_ray.errors import ErrorCode

START = datetime(2026, 1, 1, tzinfo=UTC)
SCHEMA = records.record_schema([pa.field("shop", pa.int16())])


def record(row_id: str, age: float = 0, **values: Any) -> dict[str, Any]:
    """An edit recorded `age` seconds before `START`."""
    return {
        "id": row_id,
        "fingerprint": f"f-{row_id}",
        "status": EDITED,
        "attempts": 1,
        "seed": 1,
        "recorded_at": START - timedelta(seconds=age),
        **values,
    }


def failure(row_id: str, code: ErrorCode, age: float = 0, **values: Any) -> dict[str, Any]:
    """A failed row."""
    message = f"{row_id}: {code.value}"
    return record(row_id, age, status=FAILED, error_code=code.value, error_message=message, **values)


def write(output: Path, *rows: Mapping[str, Any], schema: pa.Schema = SCHEMA) -> Path:
    """One record file of these rows."""
    return Path(records.write_records(OutputLayout(str(output)), rows, schema))


def files(output: Path) -> list[Path]:
    """The record files."""
    return sorted((output / "records").iterdir())
