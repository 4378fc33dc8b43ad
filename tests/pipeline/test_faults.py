"""Workers and nodes that are killed, rows that kill, and a run that is stopped.

Every run ends with each row recorded exactly once and each image's bytes those of an undisturbed run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from ray.cluster_utils import Cluster

from diffedit_ray.dataset import records
from diffedit_ray.pipeline.guard import ROW_HOOK
from tests.pipeline import runs
from tests.pipeline.misbehave import FAULTS, HOOK
from tests.pipeline.rows import picture, row
from tests.pipeline.runs import finish, results, two_nodes

ROWS = 24
# for rows that hang; a busy machine may take longer over those that do not
LIMITS = ("--edit-timeout", "4", "--fetch-timeout", "5", "--store-timeout", "5")

Results = dict[str, tuple[str, str | None]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(ROW_HOOK, HOOK)
        environment.setenv(FAULTS, str(folder))
        with two_nodes() as cluster:
            yield cluster


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Path:
    for i in range(3):
        Image.fromarray(picture(i, 32, 32 + 8 * i)).save(folder / f"{i}.png")
    wishes = {3: "!fetch:held", 9: "!edit:held", 14: "!store:held"}
    # the pictures of a batch are alike, so that they are edited together; of batches that are cut anew they are not
    rows = [row(f"{i // 8}.png", f"a cat {i}{wishes.get(i, '')}", id=f"row-{i}") for i in range(ROWS)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "manifest.parquet")
    return folder / "manifest.parquet"


def start(manifest: Path, output: Path, model: Path, *more: str) -> subprocess.Popen[str]:
    return runs.start(runs.arguments(manifest, output, model, *more))


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, manifest: Path, tiny_folder: Path, folder: Path) -> Results:
    finish(start(manifest, folder / "undisturbed", tiny_folder))
    found = results(folder / "undisturbed")
    assert len(found) == ROWS
    assert {status for status, _ in found.values()} == {"edited"}
    return found


@pytest.fixture
def armed(folder: Path) -> Iterator[Path]:
    (folder / "armed").touch()
    yield folder
    (folder / "armed").unlink()
    for mark in folder.glob("*.pid"):
        mark.unlink()


def await_pid(mark: Path, driver: subprocess.Popen[str], seconds: float = 240) -> int:
    deadline = time.monotonic() + seconds
    while not mark.exists():
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline, f"no {mark.name} within {seconds} s"
        time.sleep(0.05)
    return int(mark.read_text())


@pytest.mark.parametrize("stage", ["fetch", "edit", "store"])
def test_a_killed_worker_costs_nothing(
    stage: str, undisturbed: Results, manifest: Path, tiny_folder: Path, armed: Path
) -> None:
    output = armed / f"killed-{stage}"
    for other in {"fetch", "edit", "store"} - {stage}:
        (armed / f"{other}.pid").touch()  # only one stage is held up
    driver = start(manifest, output, tiny_folder)
    os.kill(await_pid(armed / f"{stage}.pid", driver), signal.SIGKILL)
    finish(driver)
    assert results(output) == undisturbed


def test_rows_that_kill_or_hang_fail_alone(
    undisturbed: Results, manifest: Path, tiny_folder: Path, armed: Path
) -> None:
    for stage in ("fetch", "edit", "store"):
        (armed / f"{stage}.pid").touch()
    wishes = ["!fetch:segfault", "!edit:exit", "!edit:hang", "!store:exit"]
    rows = pq.read_table(manifest).to_pylist()
    rows[5:5] = [row("0.png", f"a dog {wish}", id=f"bad-{i}") for i, wish in enumerate(wishes)]
    pq.write_table(pa.Table.from_pylist(rows), armed / "bad.parquet")
    output = armed / "killers"
    finish(start(armed / "bad.parquet", output, tiny_folder, *LIMITS))
    found = results(output)
    assert {i: r for i, r in found.items() if not i.startswith("bad")} == undisturbed
    table = records.read_records(str(output), ["id", "status", "error_code"]).to_pylist()
    codes = {r["id"]: r["error_code"] for r in table if r["status"] == "failed"}
    assert codes == {"bad-0": "worker_died", "bad-1": "worker_died", "bad-2": "timeout", "bad-3": "worker_died"}


def test_a_lost_node_costs_nothing(
    cluster: Cluster, undisturbed: Results, manifest: Path, tiny_folder: Path, armed: Path
) -> None:
    for stage in ("fetch", "store"):
        (armed / f"{stage}.pid").touch()
    extra = cluster.add_node(num_cpus=2)
    output = armed / "lost-node"
    driver = start(manifest, output, tiny_folder, "--min-actors", "3")
    await_pid(armed / "edit.pid", driver)
    cluster.remove_node(extra, allow_graceful=False)
    finish(driver)
    assert results(output) == undisturbed


def test_sigterm_stops_a_run_within_thirty_seconds_and_keeps_what_is_done(
    undisturbed: Results, manifest: Path, tiny_folder: Path, armed: Path
) -> None:
    for stage in ("fetch", "edit"):
        (armed / f"{stage}.pid").touch()
    output = armed / "stopped"
    driver = start(manifest, output, tiny_folder)
    await_pid(armed / "store.pid", driver)
    began = time.monotonic()
    driver.send_signal(signal.SIGTERM)
    said, _ = driver.communicate(timeout=60)
    assert driver.returncode == 130, said
    assert time.monotonic() - began < 30
    kept = results(output)
    assert len(kept) < ROWS
    assert json.loads((output / "_run" / "summary.json").read_text())["interrupted"] is True
    finish(start(manifest, output, tiny_folder))
    assert results(output) == undisturbed
