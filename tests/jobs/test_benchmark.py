from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from jobs import benchmark


def test_engine_counts_what_each_side_evaluates(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "engine.json"
    options = "--images 2 --repeats 2 --steps 10 --random-images --device cpu"
    arguments = ["engine", "--model", str(tiny_folder), "--json", str(figures), *options.split()]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    benchmark.main()
    found = json.loads(figures.read_text())
    # ten maps under two texts, eight steps up, eight guided ones down; the peer guides everything
    assert found["sides"][benchmark.OURS]["evaluations"] == 2 * 10 + 8 + 2 * 8
    assert found["sides"][benchmark.PEER]["evaluations"] == 4 * 10 + 2 * 8 + 2 * 8
    rates = {name: side["edits_per_second"] for name, side in found["sides"].items()}
    assert all(len(rate) == 2 and min(rate) > 0 for rate in rates.values())
    medians = {name: sum(rate) / 2 for name, rate in rates.items()}
    assert found["ratio"] == pytest.approx(medians[benchmark.OURS] / medians[benchmark.PEER])
    assert "times the peer" in capsys.readouterr().out


def test_resume_measures_what_planning_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "resume.json"
    monkeypatch.setattr(
        sys, "argv", ["benchmark.py", "resume", "--rows", "3000", "--files", "7", "--json", str(figures)]
    )
    benchmark.main()
    found = json.loads(figures.read_text())
    # all but the last thousand are recorded; of the recorded one in two hundred failed for now
    assert (found["rows"], found["recorded"], found["unrecorded"]) == (3000, 2000, 1000)
    assert 1000 < found["pending"] < 1030
    assert found["planning_seconds"] > 0
    assert found["bytes_a_manifest_row"] == 32
    assert found["bytes_a_recorded_row"] < 45
    assert "planning, all in all" in capsys.readouterr().out
