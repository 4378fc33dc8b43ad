"""How far a run has come and what has failed, from its records and run files alone: during the run and after."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from diffedit_ray.dataset import records, storage
from diffedit_ray.dataset.lease import LEASE_SECONDS, current_claim
from diffedit_ray.dataset.recorded import Recorded, read_recorded
from diffedit_ray.dataset.records import FAILED, STATUSES, OutputLayout
from diffedit_ray.errors import ErrorCode, SettingsError, WrongOutputError

RECENT_SECONDS = 300.0
"""What a run's present rate is measured over."""

FAILURE_COLUMNS = (
    "id",
    "image_uri",
    "reference",
    "query",
    "user_mask_uri",
    "error_code",
    "error_message",
    "attempts",
    "recorded_at",
)


@dataclass(frozen=True)
class ErrorReason:
    """One way in which rows have failed.

    Attributes:
        code: As the records have it.
        count: Rows.
        example: The message of one of them.
    """

    code: str
    count: int
    example: str


@dataclass(frozen=True)
class RunStatus:
    """The state of an output.

    Attributes:
        output: Its URI.
        state: "running"; "complete"; "incomplete" where the last run ended early and said so; "died" where it
            stopped without a word, as after kill -9.
        rows: Distinct rows in the manifest of the last run; None for an output older than this field.
        edited, unchanged, failed: Records by status, those of rows that have left the manifest too.
        pending: Rows the last run still had, or has, to do; None where `rows` is, and while a run is planning.
        rate: Rows a second: while running over the last minutes, after the end over the run; None if nothing
            can be said.
        eta_seconds: Until the end at that rate; None unless running.
        started_at: When the last run began, ISO 8601.
        ended_at: When it ended; None while it runs or where it died.
        runner: Who holds the output; None unless running.
        error: Why the last run ended early, if it said so.
        errors: The reasons for failures, the commonest first.
    """

    output: str
    state: str
    rows: int | None
    edited: int
    unchanged: int
    failed: int
    pending: int | None
    rate: float | None
    eta_seconds: float | None
    started_at: str | None
    ended_at: str | None
    runner: str | None
    error: str | None
    errors: list[ErrorReason] = field(default_factory=list)


def status(output: str | os.PathLike[str]) -> RunStatus:
    """How a run goes, or how it went.

    Args:
        output: The output of a run, going on or ended.

    Raises:
        WrongOutputError: No run has written there.
        OutputError: A record or a run file cannot be read.
    """
    root = storage.absolute(os.fspath(output))
    layout = OutputLayout(root)
    claim = current_claim(root, seconds=LEASE_SECONDS)
    config = records.read_json(layout.config)
    recorded = read_recorded(root)
    if config is None and claim is None and not len(recorded.ids):
        raise _no_run(root)
    config = config or {}
    summary = records.read_json(layout.summary) or {}
    # a summary is written when a run ends: an earlier run's says nothing of this one
    ended = summary if summary and summary.get("run") == config.get("run") else {}
    running = claim is not None and not (ended and claim.run == config.get("run"))
    if claim is not None and claim.run != config.get("run"):  # it is still planning: all else is of the run before
        config, ended = {**config, "pending": None, "started_at": claim.started_at}, {}
    began = _seconds(config.get("started_at"))
    now = time.time()
    at = recorded.recorded_at / 1e6
    at = at[at >= began] if began is not None else at
    pending = ended.get("pending")
    if pending is None and config.get("pending") is not None:
        pending = max(0, config["pending"] - len(at))
    rate = _rate(at, began, _seconds(ended.get("ended_at")), now if running else None)
    edited, unchanged, failed = (int((recorded.statuses == i).sum()) for i in range(len(STATUSES)))
    return RunStatus(
        output=root,
        state="running" if running else _ending(ended),
        rows=config.get("rows"),
        edited=edited,
        unchanged=unchanged,
        failed=failed,
        pending=pending,
        rate=rate,
        eta_seconds=pending / rate if running and rate and pending is not None else None,
        started_at=config.get("started_at"),
        ended_at=ended.get("ended_at"),
        runner=str(claim) if running else None,
        error=ended.get("error"),
        errors=_reasons(root, recorded),
    )


def failures(output: str | os.PathLike[str], code: str | None = None) -> pa.Table:
    """The rows that have failed and not succeeded since, with what went wrong.

    Args:
        output: The output of a run, going on or ended.
        code: Only those with this error code.

    Returns:
        The columns `FAILURE_COLUMNS` of their records, sorted by code and image.

    Raises:
        SettingsError: There is no such code.
        WrongOutputError: No run has written there.
        OutputError: A record file cannot be read.
    """
    if code is not None and code not in list(ErrorCode):
        raise SettingsError(f"no error code {code!r}; there are {', '.join(ErrorCode)}")
    root = storage.absolute(os.fspath(output))
    layout = OutputLayout(root)
    if records.read_json(layout.config) is None and not storage.list_files(layout.records, ".parquet"):
        raise _no_run(root)
    table = records.read_records(root, [*FAILURE_COLUMNS, "status"])
    wanted = pc.equal(table["status"], FAILED)
    if code is not None:
        wanted = pc.and_(wanted, pc.equal(table["error_code"], code))
    return (
        table.filter(wanted).select(FAILURE_COLUMNS).sort_by([("error_code", "ascending"), ("image_uri", "ascending")])
    )


def _no_run(root: str) -> WrongOutputError:
    return WrongOutputError(f"there is no run at {root}: it holds no _run/config.json")


def _ending(ended: dict[str, Any]) -> str:
    if not ended:
        return "died"
    return "incomplete" if ended.get("interrupted") or ended.get("error") else "complete"


def _rate(at: Any, began: float | None, ended: float | None, now: float | None) -> float | None:
    """Rows a second; from the first record on, so that planning and loading the model do not count."""
    if not len(at) or began is None:
        return None
    if now is None:
        spent = (ended or float(at.max())) - began
        return len(at) / spent if spent > 0 else None
    since = max(float(at.min()), now - RECENT_SECONDS)
    lately = int((at > since).sum())
    return lately / (now - since) if lately and now > since else None


def _reasons(root: str, recorded: Recorded) -> list[ErrorReason]:
    codes = Counter(recorded.codes[recorded.failed & (recorded.codes >= 0)].tolist())
    if not codes:
        return []
    examples: dict[str, str] = {}
    for _, found in records.map_files(root, _examples, ["status", "error_code", "error_message"]):
        for code, message in found.items():
            examples.setdefault(code, message)
    named = [(recorded.code_names[code], count) for code, count in codes.most_common()]
    return [ErrorReason(name, count, examples.get(name, "")) for name, count in named]


def _examples(table: pa.Table) -> dict[str, str]:
    """One message of each code in a record file."""
    failed = table.filter(pc.equal(table["status"], FAILED))
    first = failed.group_by("error_code", use_threads=False).aggregate([("error_message", "first")])
    return dict(zip(first["error_code"].to_pylist(), first["error_message_first"].to_pylist(), strict=True))


def _seconds(stamp: Any) -> float | None:
    try:
        return datetime.fromisoformat(stamp).timestamp()
    except (TypeError, ValueError):
        return None
