"""Killing everything that can be killed, on a cluster of two nodes, with drivers in processes of their own.

Every run ends with each row recorded exactly once and each image's bytes those of an undisturbed run.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from ray.cluster_utils import Cluster

from diffedit_ray.dataset import records
from diffedit_ray.pipeline.guard import ROW_HOOK
from tests.pipeline.misbehave import FAULTS, HOOK
from tests.pipeline.rows import picture, row

ROOT = Path(__file__).parents[2]
ROWS = 24
QUICK = ["--steps", "4", "--mask-maps", "2", "--mask-significance", "0"]
JOB = ["--batch-size", "4", "--reproducible", "--threads", "1", "--device", "cpu"]
LIMITS = ["--edit-timeout", "4", "--fetch-timeout", "5", "--store-timeout", "5"]
DRIVER_KILLS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    """Two nodes; drivers join it by its address, as `ray job submit` lets them."""
    if ray.is_initialized():
        ray.shutdown()  # another file's, on this machine alone; its fixture starts it again where it is needed
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(ROW_HOOK, HOOK)
        environment.setenv(FAULTS, str(folder))
        environment.setenv("PYTHONPATH", str(ROOT))
        environment.setenv("RAY_AUTH_MODE", "disabled")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        cluster.add_node(num_cpus=2)
        environment.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def manifest(folder: Path) -> Path:
    for i in range(4):
        Image.fromarray(picture(i, 32, 32 + 8 * i)).save(folder / f"{i}.png")
    wishes = {3: "!fetch:held", 9: "!edit:held", 14: "!store:held"}
    rows = [row(f"{i % 4}.png", f"a cat {i}{wishes.get(i, '')}", id=f"row-{i}") for i in range(ROWS)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "manifest.parquet")
    return folder / "manifest.parquet"


def start(manifest: Path, output: Path, model: Path, *more: str) -> subprocess.Popen[str]:
    """A driver, in a session of its own so that a kill takes nothing else along."""
    command = [sys.executable, "jobs/edit.py", str(manifest), str(output), "--model", str(model)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *QUICK, *JOB, *LIMITS, *more], start_new_session=True, cwd=ROOT, **pipes)  # type: ignore[call-overload,no-any-return]


def finish(driver: subprocess.Popen[str]) -> str:
    said, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0, said
    return said


def results(output: Path) -> dict[str, tuple[str, str | None]]:
    """Each id's status and the bytes of its image; that there is one record an id is asserted."""
    found: dict[str, tuple[str, str | None]] = {}
    for file in (output / "records").glob("*.parquet"):
        for record in pq.read_table(file).to_pylist():
            assert record["id"] not in found
            digest = None
            if record["edited_uri"]:
                digest = hashlib.sha256(Path(record["edited_uri"]).read_bytes()).hexdigest()
                assert digest == record["sha256"]
            found[record["id"]] = (record["status"], digest)
    return found


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, manifest: Path, tiny_folder: Path, folder: Path) -> dict[str, Any]:
    began = time.monotonic()
    finish(start(manifest, folder / "undisturbed", tiny_folder))
    found = results(folder / "undisturbed")
    assert len(found) == ROWS
    assert {status for status, _ in found.values()} == {"edited"}
    return {"results": found, "seconds": time.monotonic() - began}


@pytest.fixture
def armed(folder: Path) -> Iterator[Path]:
    (folder / "armed").touch()
    yield folder
    (folder / "armed").unlink()
    for mark in folder.glob("*.pid"):
        mark.unlink()


def await_pid(mark: Path, driver: subprocess.Popen[str], seconds: float = 120) -> int:
    deadline = time.monotonic() + seconds
    while not mark.exists():
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < deadline, f"no {mark.name} within {seconds} s"
        time.sleep(0.05)
    return int(mark.read_text())


@pytest.mark.parametrize("stage", ["fetch", "edit", "store"])
def test_a_killed_worker_costs_nothing(
    stage: str, undisturbed: dict[str, Any], manifest: Path, tiny_folder: Path, armed: Path
) -> None:
    output = armed / f"killed-{stage}"
    for other in {"fetch", "edit", "store"} - {stage}:
        (armed / f"{other}.pid").touch()  # only one stage is held up
    driver = start(manifest, output, tiny_folder, "--edit-timeout", "60", "--store-timeout", "60")
    os.kill(await_pid(armed / f"{stage}.pid", driver), signal.SIGKILL)
    finish(driver)
    assert results(output) == undisturbed["results"]


def test_rows_that_kill_or_hang_fail_alone(
    undisturbed: dict[str, Any], manifest: Path, tiny_folder: Path, armed: Path
) -> None:
    for stage in ("fetch", "edit", "store"):
        (armed / f"{stage}.pid").touch()
    wishes = ["!fetch:segfault", "!edit:exit", "!edit:hang", "!store:exit"]
    rows = pq.read_table(manifest).to_pylist()
    rows[5:5] = [row("0.png", f"a dog {wish}", id=f"bad-{i}") for i, wish in enumerate(wishes)]
    pq.write_table(pa.Table.from_pylist(rows), armed / "bad.parquet")
    output = armed / "killers"
    finish(start(armed / "bad.parquet", output, tiny_folder))
    found = results(output)
    assert {i: r for i, r in found.items() if not i.startswith("bad")} == undisturbed["results"]
    table = records.read_records(str(output), ["id", "status", "error_code"]).to_pylist()
    codes = {r["id"]: r["error_code"] for r in table if r["status"] == "failed"}
    assert codes == {"bad-0": "worker_died", "bad-1": "worker_died", "bad-2": "timeout", "bad-3": "worker_died"}


def test_a_lost_node_costs_nothing(
    cluster: Cluster, undisturbed: dict[str, Any], manifest: Path, tiny_folder: Path, armed: Path
) -> None:
    for stage in ("fetch", "store"):
        (armed / f"{stage}.pid").touch()
    extra = cluster.add_node(num_cpus=2)
    output = armed / "lost-node"
    driver = start(manifest, output, tiny_folder, "--min-actors", "3", "--edit-timeout", "60")
    await_pid(armed / "edit.pid", driver)
    cluster.remove_node(extra, allow_graceful=False)
    finish(driver)
    assert results(output) == undisturbed["results"]


def test_sigterm_stops_a_run_within_thirty_seconds_and_keeps_what_is_done(
    undisturbed: dict[str, Any], manifest: Path, tiny_folder: Path, armed: Path
) -> None:
    for stage in ("fetch", "edit"):
        (armed / f"{stage}.pid").touch()
    output = armed / "stopped"
    driver = start(manifest, output, tiny_folder, "--store-timeout", "60")
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
    assert results(output) == undisturbed["results"]


def test_a_killed_driver_is_carried_on_from_wherever_it_was(
    cluster: Cluster,
    undisturbed: dict[str, Any],
    manifest: Path,
    tiny_folder: Path,
    folder: Path,
    record_property: Callable[[str, object], None],
) -> None:
    seed = int(os.environ.get("DIFFEDIT_TEST_SEED", time.time_ns() % 1_000_000))
    print(f"DIFFEDIT_TEST_SEED={seed}")
    record_property("seed", seed)
    chance = random.Random(seed)
    output, kills, resumed = folder / "killed-driver", 0, 0
    while kills < DRIVER_KILLS:
        driver = start(manifest, output / str(resumed), tiny_folder)
        # the first third of a run is starting Python and the model
        time.sleep(chance.uniform(0.3, 1.0) * undisturbed["seconds"])
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
            kills += 1
            continue
        finish(driver)
        assert results(output / str(resumed)) == undisturbed["results"]
        resumed += 1
    finish(start(manifest, output / str(resumed), tiny_folder))
    assert results(output / str(resumed)) == undisturbed["results"]
