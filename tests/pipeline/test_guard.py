from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from diffedit_ray.errors import RowError
from diffedit_ray.pipeline.guard import ROW_HOOK, Guard, Ledger, Replica, Trial, known_replicas, start_ledger
from tests.pipeline.misbehave import FAULTS, HOOK

Row = dict[str, Any]


def fail(row: Row, error: RowError) -> None:
    row.update(status="failed", code=error.code.value, message=error.message)


def touch(rows: list[Row]) -> None:
    for row in rows:
        row.update(status="edited", beside=len(rows))


def rows_of(*wishes: str) -> list[Row]:
    return [{"id": f"r{i}", "image_uri": f"{i}.png", "query": wish} for i, wish in enumerate(wishes)]


@pytest.fixture
def armed(tmp_path: Path) -> Path:
    (tmp_path / "armed").touch()
    return tmp_path


def guarded(ledger: Any, rows: list[Row], folder: Path, seconds: float = 3.0, tries: int = 2) -> list[Row]:
    """In a Ray worker that Ray starts anew for as long as it dies."""

    @ray.remote(max_retries=-1, num_cpus=0.5)
    def work() -> list[Row]:
        os.environ.update({ROW_HOOK: HOOK, FAULTS: str(folder)})
        Guard("edit", ledger, seconds, tries, fail).run(rows, touch)
        return rows

    done: list[Row] = ray.get(work.remote(), timeout=300)
    return done


def test_ledger_counts_what_was_begun_and_not_ended() -> None:
    ledger = Ledger()
    assert ledger.begin("a") == Trial(0)
    assert ledger.begin("a") == Trial(1)
    ledger.hang("a")
    assert ledger.begin("a") == Trial(2, hung=True)
    ledger.end("a")
    assert ledger.begin("a").deaths == 2
    ledger.forget(["a", "never begun"])
    assert ledger.open() == {}
    assert ledger.begin("a") == Trial(0)


def test_without_a_ledger_work_is_simply_done() -> None:
    rows = rows_of("a", "b")
    Guard("edit", None, 1.0, 2, fail).run(rows, touch)
    assert [row["beside"] for row in rows] == [2, 2]
    Guard("edit", None, 1.0, 2, fail).run([], touch)


@pytest.mark.usefixtures("local_ray")
def test_replicas_are_known_for_as_long_as_the_ledger_answers() -> None:
    ledger = start_ledger()
    replica = Replica("node-1", "cpu", "torch.float32", 64, {32: 50.0, 64: 60.0})
    ray.get(ledger.introduce.remote(replica))
    assert known_replicas(ledger) == [replica]
    ray.kill(ledger)
    deadline = time.monotonic() + 60
    while known_replicas(ledger):  # a call that is under way when it is killed may still be answered
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert known_replicas(None) == []


@pytest.mark.usefixtures("local_ray")
def test_a_healthy_batch_is_done_at_once_and_leaves_nothing_open(armed: Path) -> None:
    ledger = start_ledger()
    assert [row["beside"] for row in guarded(ledger, rows_of("a", "b", "c"), armed)] == [3, 3, 3]
    assert ray.get(ledger.open.remote()) == {}


@pytest.mark.usefixtures("local_ray")
def test_rows_that_kill_fail_and_their_neighbours_do_not(armed: Path) -> None:
    ledger = start_ledger()
    wishes = ["a", "!edit:exit", "b", "!edit:segfault", "!edit:hang", "!edit:stuck", "c"]
    done = guarded(ledger, rows_of(*wishes), armed, seconds=1.5)
    assert [row.get("code") for row in done] == [
        None, "worker_died", None, "worker_died", "timeout", "worker_died", None,
    ]  # fmt: skip
    assert [row["beside"] for row in done if row["status"] == "edited"] == [1, 1, 1]
    assert "1.png" in done[1]["message"]
    assert "1.5 s" in done[4]["message"]
    assert ray.get(ledger.open.remote()) == {}


@pytest.mark.usefixtures("local_ray")
def test_a_row_has_as_many_tries_as_it_is_given(armed: Path) -> None:
    (done,) = guarded(start_ledger(), rows_of("!edit:exit"), armed, tries=1)
    assert "died once" in done["message"]
    (done,) = guarded(start_ledger(), rows_of("!edit:exit"), armed, tries=3)
    assert "died 3 times" in done["message"]


@pytest.mark.usefixtures("local_ray")
def test_work_goes_on_when_the_ledger_is_gone(armed: Path) -> None:
    ledger = start_ledger()
    ray.get(ledger.begin.remote("a"))
    ray.kill(ledger)
    assert [row["status"] for row in guarded(ledger, rows_of("a", "b"), armed)] == ["edited", "edited"]
