from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

STORE_MIB = 90
ROWS = 60


def test_the_object_store_holds_a_few_batches_however_long_the_manifest(tiny_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.pipeline.small_store", str(tiny_folder), str(tmp_path)]
    # a Ray of its own, whatever cluster this process is in
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [*command, str(ROWS), "3", str(STORE_MIB)], env=environment, stdout=subprocess.PIPE, text=True, timeout=900
    )
    assert done.returncode == 0
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["edited"] == ROWS
    seen = told["seen"]
    assert ROWS / 3 * told["batch"] > 4 * STORE_MIB, "or there would be nothing to show"
    assert max(used for _, used, _ in seen) <= STORE_MIB
    # what is fetched while the model loads may be too much; from then on what goes in waits for what comes out
    spilled_by = [next(spilled for done, _, spilled in seen if done >= ROWS * part) for part in (1 / 3, 1)]
    assert spilled_by[1] - spilled_by[0] <= 2 * told["batch"]
    assert spilled_by[1] <= 6 * told["batch"]
