"""Drivers killed at random points of their runs, and the runs carried on from there."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffedit_ray.dataset import records
from tests.pipeline.forks import SETUP_WORKER, SOCKET, Driver, fork_server
from tests.pipeline.rows import picture, row
from tests.pipeline.runs import arguments, finish, results, start, two_nodes

ROWS = 12
KILLS = 20
SIDE_BY_SIDE = 2
KILLS_AN_OUTPUT = 5
LONGEST_WAIT = 300


@dataclass(frozen=True)
class World:
    """What all runs share."""

    folder: Path
    told: Callable[[Path], list[str]]
    results: dict[str, tuple[str, str | None]]
    seconds: float


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("kills")
    for i in range(3):
        Image.fromarray(picture(i, 32, 32 + 8 * i)).save(folder / f"{i}.png")
    # the pictures of a batch are alike, so that they are edited together; after a kill they are mixed
    rows = [row(f"{i // 4}.png", f"a cat {i}", id=f"row-{i}") for i in range(ROWS)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "manifest.parquet")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(SOCKET, str(folder / "forks"))
        with fork_server(folder), two_nodes(setup_worker_path=str(SETUP_WORKER)):

            def told(output: Path) -> list[str]:
                return arguments(folder / "manifest.parquet", output, tiny_folder)

            began = time.monotonic()
            finish(start(told(folder / "undisturbed")))
            found = results(folder / "undisturbed")
            assert len(found) == ROWS
            assert {status for status, _ in found.values()} == {"edited"}
            yield World(folder, told, found, time.monotonic() - began)


def written(output: Path) -> set[tuple[str, int]]:
    """Every file there is, as it was last written."""
    found = set()
    for path in output.rglob("*"):
        with suppress(FileNotFoundError):
            found.add((str(path), path.stat().st_mtime_ns))
    return found


def await_a_point(driver: Driver, output: Path, pending: int, world: World, chance: random.Random) -> None:
    if chance.random() < 0.25:
        driver.wait(chance.uniform(0, world.seconds))
        return
    # by time alone most kills would meet a run that has nothing to lose yet
    before, seen = written(output), set[tuple[str, int]]()
    point = chance.randint(1, 3 * pending + 6)  # image, mask and record; what opens and closes a run
    while len(seen) < point and not driver.wait(0.01):
        seen |= written(output) - before
    driver.wait(chance.uniform(0, 0.1))


def kill_and_carry_on(name: str, kills: int, world: World, seed: str) -> list[int]:
    """Kill drivers, so many; returns how many rows were recorded at each kill."""
    chance = random.Random(seed)
    kept: list[int] = []
    outputs = 0
    while len(kept) < kills:
        output = world.folder / f"{name}-{outputs}"
        outputs += 1
        for go in range(min(KILLS_AN_OUTPUT, kills - len(kept)) + 1):
            driver = Driver(world.told(output), world.folder / f"{output.name}-{go}.log")
            if go < KILLS_AN_OUTPUT and len(kept) < kills:
                recorded = len(records.read_records(str(output), ["id"]))
                await_a_point(driver, output, ROWS - recorded, world, chance)
                if driver.kill():
                    kept.append(len(records.read_records(str(output), ["id"])))
                    continue
            assert driver.wait(LONGEST_WAIT), driver.log.read_text()
            assert driver.code == 0, driver.log.read_text()
            break
        assert results(output) == world.results
    return kept


def test_a_killed_driver_is_carried_on_from_wherever_it_was(
    world: World, record_property: Callable[[str, object], None]
) -> None:
    seed = os.environ.get("DIFFEDIT_TEST_SEED", str(time.time_ns() % 1_000_000))
    print(f"DIFFEDIT_TEST_SEED={seed}")
    record_property("seed", seed)
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        lines = [
            pool.submit(kill_and_carry_on, f"line{i}", KILLS // SIDE_BY_SIDE, world, f"{seed}/{i}")
            for i in range(SIDE_BY_SIDE)
        ]
    kept = [recorded for line in lines for recorded in line.result()]
    print(f"rows recorded at each kill: {kept}")
    assert len(kept) >= KILLS
    assert any(0 < recorded < ROWS for recorded in kept)
