"""Whole runs on a cluster of two nodes, by drivers in processes of their own, and what they have left."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[2]
QUICK = ("--steps", "4", "--mask-maps", "2", "--mask-significance", "0")
JOB = ("--batch-size", "4", "--reproducible", "--threads", "1", "--device", "cpu")


@contextmanager
def two_nodes(**node: object) -> Iterator[Cluster]:
    """A cluster that drivers started in the block join by its address, as `ray job submit` lets them."""
    if ray.is_initialized():
        ray.shutdown()  # another file's, which would only take memory; `local_ray` starts it again
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(ROOT))
        environment.setenv("RAY_AUTH_MODE", "disabled")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, **node})
        try:
            cluster.add_node(num_cpus=2, **node)
            environment.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            cluster.shutdown()


def arguments(manifest: Path, output: Path, model: Path, *more: str) -> list[str]:
    """What a driver is told."""
    return [str(manifest), str(output), "--model", str(model), *QUICK, *JOB, *more]


def start(told: Sequence[str]) -> subprocess.Popen[str]:
    """A driver, in a session of its own so that a kill takes nothing else along."""
    return subprocess.Popen(
        [sys.executable, "jobs/edit.py", *told],
        start_new_session=True,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(driver: subprocess.Popen[str]) -> str:
    """What it says, once it has ended well."""
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
