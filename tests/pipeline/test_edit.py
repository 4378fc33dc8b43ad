from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffedit_ray.diffusion import throughput
from diffedit_ray.diffusion.checkpoint import model_geometry
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.diffusion.throughput import Throughput
from diffedit_ray.pipeline.edit import Edit
from diffedit_ray.settings import JobSettings
from tests.pipeline.line import Line, statuses
from tests.pipeline.rows import read, row


@pytest.mark.parametrize(
    ("job", "batch"),
    [
        ({}, 32),
        ({"unet_batch": 3}, 3),
        ({"reproducible": True, "batch_size": 5}, 8),
        ({"reproducible": True, "batch_size": 500}, 64),
        ({"reproducible": True, "unet_batch": 2}, 2),
    ],
)
def test_the_unet_batch_is_measured_unless_it_is_given_or_must_not_depend_on_the_machine(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, job: dict[str, Any], batch: int
) -> None:
    compiled: list[int] = []
    monkeypatch.setattr(throughput, "measure_unet_batch", lambda _: Throughput(32, {32: 9.0}))
    monkeypatch.setattr(LatentDiffusionModel, "compile", lambda _, size: compiled.append(size))
    geometry = model_geometry(str(tiny_folder))
    assert Edit(str(tiny_folder), "cpu", 2, geometry, JobSettings(**job)).editor.estimate.unet_batch == batch
    assert compiled == []
    Edit(str(tiny_folder), "cpu", 2, geometry, JobSettings(**job, compile=True))
    assert compiled == [batch]


def test_a_row_that_breaks_the_batch_fails_alone(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = line.edit.editor
    whole = editor.edit_fitted
    sizes = []

    def fragile(pixels: torch.Tensor, references: Any, queries: list[str], *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(queries))
        if "a bomb" in queries:
            raise RuntimeError("boom")
        return whole(pixels, references, queries, *args, **kwargs)

    monkeypatch.setattr(editor, "edit_fitted", fragile)
    rows = [row("square.png", q) for q in ("a cat", "a bomb", "a dog")]
    table = line.edited(rows)
    assert statuses(table) == [("edited", None), ("failed", "edit_failed"), ("edited", None)]
    assert "boom" in table["error_message"][1].as_py()
    assert sizes == [3, 1, 1, 1]


def test_rows_of_one_shape_are_one_batch_whatever_their_settings(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = line.edit.editor
    whole = editor.edit_fitted
    batches: list[Sequence[str]] = []

    def watched(pixels: torch.Tensor, references: Any, queries: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        batches.append(list(queries))
        return whole(pixels, references, queries, *args, **kwargs)

    monkeypatch.setattr(editor, "edit_fitted", watched)
    line.edited([row("square.png", "1"), row("wide.png", "2"), row("square.png", "3"), row("square.png", "4", steps=5)])
    assert batches == [["1", "3", "4"], ["2"]]


def test_a_result_does_not_depend_on_its_batch(line: Line) -> None:
    rows = [row("square.png", q) for q in ("a cat", "a dog", "a pear")]
    together = line.store(line.edited(rows))
    alone = line.store(line.edited(rows[1:2]))[0]
    pixels = [read(r["edited_uri"]).astype(int) for r in (together[1], alone)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_equal_texts_change_nothing_and_write_nothing(line: Line) -> None:
    (r,) = line.store(line.edited([row("square.png", "a horse")]))
    assert (r["status"], r["mask_fraction"], r["edited_uri"], r["mask_uri"]) == ("unchanged", 0.0, None, None)
    assert not Path(line.layout.root, "images").exists()
    assert not Path(line.layout.root, "masks").exists()


def test_a_missing_reference_is_the_empty_text(line: Line) -> None:
    table = line.edited([row("square.png") | {"reference": None}, row("square.png") | {"reference": ""}])
    assert table["status"].to_pylist() == ["edited", "edited"]
    assert table["_edited"][0] == table["_edited"][1]


@pytest.mark.parametrize("threads", [1, 2])
def test_it_has_its_threads_on_whichever_thread_ray_calls_it(
    tiny_folder: Path, line: Line, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    stage = Edit(str(tiny_folder), "cpu", threads, model_geometry(str(tiny_folder)), JobSettings(unet_batch=16))
    seen: list[int] = []
    monkeypatch.setattr(stage, "_edit_all", lambda _rows: seen.append(torch.get_num_threads()))
    table = line.fetch([row("square.png")])

    def call() -> None:
        torch.set_num_threads(3 - threads)
        stage(table)

    before = torch.get_num_threads()
    with ThreadPoolExecutor(1) as other:
        other.submit(call).result()
    torch.set_num_threads(before)
    assert seen == [threads]
