"""One pass over a manifest: which rows it has, and which of them need work."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffedit_ray.dataset.keys import Keys, halves, keys
from diffedit_ray.dataset.manifest import RowPlanner
from diffedit_ray.dataset.recorded import Recorded
from diffedit_ray.dataset.records import STATUSES
from diffedit_ray.dataset.spans import Span, iterate_spans
from diffedit_ray.errors import ManifestError

logger = logging.getLogger(__name__)

SHOWN_IDS = 10

Turns = NDArray[np.int16]
"""For each row of a manifest which try at it a run makes; 0 where there is nothing to do."""


@dataclass(frozen=True)
class Scan:
    """The distinct rows of a manifest, sorted by the keys of their ids: 32 bytes a row.

    Attributes:
        ids: (n,) keys of the ids.
        prints: (n,) of the fingerprints.
        rows: (n,) positions in the manifest; of equal rows the first.
        spans: All of the manifest.
        planner: What gives rows their ids.
    """

    ids: Keys
    prints: NDArray[np.uint64]
    rows: NDArray[np.int64]
    spans: Sequence[Span]
    planner: RowPlanner

    @property
    def total(self) -> int:
        """Rows in the manifest, the equal ones too."""
        return sum(span.rows for span in self.spans)

    def turns(self, recorded: Recorded, *, retry_failed: bool, retry_permanent: bool) -> Turns:
        """What is to be done, given what is recorded.

        Args:
            recorded: What the output holds.
            retry_failed: Whether to try failures again that may pass by themselves.
            retry_permanent: Whether to try those again that last until somebody mends them.
        """
        at = recorded.find(self.ids)
        same = self._same(recorded, at)
        settled = recorded.settled(retry_failed=retry_failed, retry_permanent=retry_permanent)
        todo = ~same
        tries = np.ones(len(self.ids), np.int64)
        todo[same] = ~settled[at[same]]
        tries[same] += np.where(recorded.failed, recorded.attempts, 0)[at[same]]
        turns = np.zeros(self.total, np.int16)
        turns[self.rows[todo]] = np.minimum(tries[todo], np.iinfo(np.int16).max)
        return turns

    def pending_spans(self, turns: Turns) -> list[Span]:
        """The spans in which there is something to do."""
        return [span for span in self.spans if turns[span.start : span.start + span.rows].any()]

    def reconcile(self, recorded: Recorded, turns: Turns) -> Reconciliation:
        """Hold what is recorded after a run against what the manifest asks for."""
        at = recorded.find(self.ids)
        same = self._same(recorded, at)
        tried = np.ones(len(self.ids), bool)
        # a failure that was to be tried again has a record either way: the number of tries tells the two apart
        tried[same] = recorded.attempts[at[same]] >= turns[self.rows[same]]
        statuses = Counter(recorded.statuses[at[same]].tolist())
        codes = Counter(recorded.codes[at[same & recorded.failed[at]]].tolist()) if len(recorded.ids) else Counter()
        return Reconciliation(
            {name: statuses[i] for i, name in enumerate(STATUSES)},
            {recorded.code_names[code]: count for code, count in codes.most_common() if code >= 0},
            self.rows[at < 0],
            self.rows[(at >= 0) & ~same],
            self.rows[~tried],
            self.rows[np.isin(self.ids, recorded.repeated)],
        )

    def names(self, rows: NDArray[np.int64], limit: int = SHOWN_IDS) -> list[str]:
        """The ids of some rows of the manifest; their files are read again for it.

        Args:
            rows: Positions in the manifest.
            limit: How many at the most: the first ones.
        """
        wanted = np.sort(rows)[:limit]
        return _names(self.spans, self.planner, wanted)

    def _same(self, recorded: Recorded, at: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which rows are recorded as they stand; a changed row is not."""
        same = at >= 0
        same[same] = recorded.prints[at[same]] == self.prints[same]
        return same


@dataclass(frozen=True)
class Reconciliation:
    """Rows in against records out.

    Attributes:
        statuses: Status -> rows of the manifest, as they stand, that are recorded with it.
        errors: Error code -> failed rows, the commonest first.
        missing: Rows without a record.
        outdated: Rows that have changed since their record.
        untried: Failures that were to be tried again and were not.
        repeated: Rows with more than one record.
    """

    statuses: Mapping[str, int]
    errors: Mapping[str, int]
    missing: NDArray[np.int64]
    outdated: NDArray[np.int64]
    untried: NDArray[np.int64]
    repeated: NDArray[np.int64]

    def complaint(self, scan: Scan) -> str | None:
        """What does not add up after a whole run, with ids; None if everything does."""
        kinds = (
            (self.missing, "have no record"),
            (self.outdated, "have only the record of what they were before they changed"),
            (self.untried, "were to be tried again and were not"),
            (self.repeated, "have more than one record"),
        )
        found = [f"{len(rows)} rows {what}: {shown(scan.names(rows), len(rows))}" for rows, what in kinds if len(rows)]
        if not found:
            return None
        return f"after the run {'; '.join(found)}. Run the same command again; if it happens twice, please report it"


def shown(ids: Sequence[str], count: int) -> str:
    """Some of `count` ids, for a message."""
    return ", ".join(ids[:SHOWN_IDS]) + (", …" if count > SHOWN_IDS else "")


def scan_manifest(files: list[str], planner: RowPlanner) -> Scan:
    """Read a manifest once.

    Raises:
        ManifestError: A file cannot be read, or an id names two different rows.
    """
    spans: list[Span] = []
    parts: list[tuple[Keys, NDArray[np.uint64]]] = []
    for span, table in iterate_spans(files, list(planner.columns.source.values())):
        ids, fingerprints = planner.identify(table)
        spans.append(span)
        own = keys(ids)
        parts.append((own, halves(own if ids == fingerprints else keys(fingerprints))[0]))
    if not parts:
        logger.warning("the manifest has no rows")
        return Scan(keys([]), np.empty(0, np.uint64), np.empty(0, np.int64), [], planner)
    all_ids, all_prints = (np.concatenate([part[i] for part in parts]) for i in range(2))
    parts.clear()
    high, low = halves(all_ids)
    order = np.lexsort((low, high))  # stable: of equal rows the first comes first
    first = np.ones(len(order), bool)
    first[1:] = (high[order[1:]] != high[order[:-1]]) | (low[order[1:]] != low[order[:-1]])
    rows = order[first]
    clash = all_prints[order] != all_prints[rows][np.cumsum(first) - 1]
    if clash.any():
        clashing = order[clash]
        names = _names(spans, planner, np.sort(clashing)[:SHOWN_IDS])
        raise ManifestError(
            f"{len(clashing)} rows repeat the id of an earlier, different row: {shown(names, len(clashing))}. "
            "Ids must be unique; without an id column they are derived"
        )
    return Scan(all_ids[rows], all_prints[rows], rows, spans, planner)


def _names(spans: Sequence[Span], planner: RowPlanner, rows: NDArray[np.int64]) -> list[str]:
    """The ids of the rows at these positions, which are sorted."""
    names: list[str] = []
    files = dict.fromkeys(span.file for span in spans)
    for span, table in iterate_spans(list(files), list(planner.columns.source.values())):
        here = rows[(rows >= span.start) & (rows < span.start + span.rows)] - span.start
        if len(here):
            names.extend(planner.identify(table.take(here))[0])
        if len(names) == len(rows):
            break
    return names
