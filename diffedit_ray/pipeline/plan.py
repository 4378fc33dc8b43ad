"""The first stage: manifest rows to rows in flight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from diffedit_ray.dataset.manifest import RowPlanner
from diffedit_ray.dataset.scan import Turns
from diffedit_ray.dataset.spans import Span, read_span
from diffedit_ray.pipeline.rows import PENDING, Row, carried_fields, fail, use_storage, work_schema
from diffedit_ray.settings import JobSettings


@dataclass(frozen=True)
class Plan:
    """Gives every row of a table its id, fingerprint, seed and settings; one that is wrong fails here."""

    planner: RowPlanner
    model: str

    def __call__(self, table: pa.Table, turns: Sequence[int] | None = None) -> pa.Table:
        """Plan a block of manifest rows.

        Args:
            table: The rows.
            turns: Which try at each row this is; without them the first.
        """
        columns = self.planner.columns
        names = [f.name for f in carried_fields(columns)]
        rows = []
        for source, attempt in zip(table.to_pylist(), turns or [1] * len(table), strict=True):
            planned = self.planner.plan(source)
            row: Row = {
                "id": planned.id,
                "fingerprint": planned.fingerprint,
                "image_uri": planned.image_uri,
                "reference": planned.reference,
                "query": planned.query,
                "user_mask_uri": planned.user_mask_uri,
                "status": PENDING,
                "attempts": attempt,
                **planned.settings.model_dump(),
                "model": self.model,
                "model_revision": self.planner.model_revision,
                "recorded_at": datetime.now(UTC),
                **{name: source[f.name] for name, f in zip(names, columns.carried, strict=True)},
            }
            if planned.error is not None:
                fail(row, planned.error)
            rows.append(row)
        return pa.Table.from_pylist(rows, schema=work_schema(columns))


@dataclass(frozen=True)
class PlanPending:
    """Reads spans of the manifest and plans those of their rows that need work.

    The driver has chosen the rows already, so that equal ones are edited once wherever they stand,
    and what ships to every node is two bytes a row.

    Attributes:
        plan: For the rows.
        schema: The manifest's.
        turns: `Turns`, or a reference to them in Ray's object store.
        job: The run's settings.
    """

    plan: Plan
    schema: pa.Schema
    turns: Any
    job: JobSettings

    def __call__(self, spans: pa.Table) -> pa.Table:
        """Plan a block of spans, as `span_rows` makes them."""
        use_storage(self.job)
        turns = self._turns()
        planned = [work_schema(self.plan.planner.columns).empty_table()]
        for span in (Span(**row) for row in spans.to_pylist()):
            own = turns[span.start : span.start + span.rows]
            rows = read_span(span, self.schema).filter(pa.array(own > 0))
            planned.append(self.plan(rows, own[own > 0].tolist()))
        return pa.concat_tables(planned)

    def _turns(self) -> Turns:
        if isinstance(self.turns, np.ndarray):
            return self.turns
        import ray

        turns: Turns = ray.get(self.turns)
        return turns


def span_rows(spans: Iterable[Span]) -> list[dict[str, Any]]:
    """Spans as the rows of a dataset."""
    return [asdict(span) for span in spans]
