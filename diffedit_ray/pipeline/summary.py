"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffedit_ray.dataset.scan import Reconciliation
from diffedit_ray.pipeline.guard import Replica


@dataclass
class JobSummary:
    """How a run ended.

    Attributes:
        output: Where the results are.
        rows: Distinct rows in the manifest.
        duplicates: Further rows equal to one of those in everything; edited once.
        done_before: Rows that were recorded already and cost nothing now.
        edited, unchanged, failed: Rows of the manifest, as they stand, by what is recorded of them after the run.
        pending: Rows without such a record: none after a whole run.
        errors: Error code -> failed rows.
        seconds: The run's duration.
        edited_now: Rows this run worked on.
        interrupted: Whether it was stopped from outside.
        max_failed: The share of failed rows the user accepts.
        error: Why the run broke off, if it did.
        replicas: The model replicas that worked, with the UNet batch each uses.
    """

    output: str
    rows: int
    duplicates: int = 0
    done_before: int = 0
    edited: int = 0
    unchanged: int = 0
    failed: int = 0
    pending: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    edited_now: int = 0
    interrupted: bool = False
    max_failed: float = 1.0
    error: str | None = None
    replicas: list[Replica] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 fine, 1 broken off, 3 more failures than accepted, 130 interrupted."""
        if self.interrupted:
            return 130
        if self.error:
            return 1
        return 3 if self.rows and self.failed / self.rows > self.max_failed else 0

    def count(self, found: Reconciliation) -> None:
        """Take over what the records say."""
        self.edited, self.unchanged, self.failed = (found.statuses[s] for s in ("edited", "unchanged", "failed"))
        self.pending = self.rows - self.edited - self.unchanged - self.failed
        self.errors = dict(found.errors)
