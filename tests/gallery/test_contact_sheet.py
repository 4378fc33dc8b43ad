from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffedit_ray.dataset import records
from diffedit_ray.dataset.records import OutputLayout
from diffedit_ray.errors import OutputError
from diffedit_ray.gallery.contact_sheet import CARD, CELL, GAP, PAPER, card, contact_sheet, sheet

RED, WHITE, BLUE = (200, 20, 20), (255, 255, 255), (20, 20, 200)


def _record(output: Path, row_id: str, **values: Any) -> dict[str, Any]:
    return {
        "id": row_id,
        "fingerprint": row_id,
        "image_uri": "red.png",
        "reference": "red",
        "query": f"blue {row_id}",
        "status": "edited",
        "attempts": 1,
        "edited_uri": f"{output}/images/blue.png",
        "mask_uri": f"{output}/masks/white.png",
        "seed": 1,
        "recorded_at": datetime.now(UTC),
        **values,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three edits of a red picture into a blue one, one row left alone and one failed."""
    output = tmp_path / "out"
    for name, colour in (("m/red", RED), ("out/masks/white", WHITE), ("out/images/blue", BLUE)):
        file = tmp_path / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20), colour).save(file)
    layout = OutputLayout(str(output))
    rows = [_record(output, name) for name in ("one", "two", "three")]
    rows.append(_record(output, "same", status="unchanged", edited_uri=None, mask_uri=None))
    rows.append(_record(output, "gone", status="failed", image_uri="none.png", edited_uri=None, mask_uri=None))
    records.write_records(layout, rows, records.record_schema([]))
    records.write_json(layout.config, {"manifest": str(tmp_path / "m" / "m.parquet")})
    return output


def _size(columns: int, rows: int) -> tuple[int, int]:
    return columns * (CARD[0] + 3 * GAP) + GAP, rows * (CARD[1] + 2 * GAP) + 2 * GAP


@pytest.mark.parametrize(
    ("limit", "columns", "shown", "shape"),
    [(24, 2, 3, (2, 2)), (24, 1, 3, (1, 3)), (24, 9, 3, (3, 1)), (1, 2, 1, (1, 1))],
)
def test_it_shows_the_edits_and_nothing_else(
    run: Path, tmp_path: Path, limit: int, columns: int, shown: int, shape: tuple[int, int]
) -> None:
    assert contact_sheet(str(run), str(tmp_path / "sheet.png"), limit=limit, columns=columns) == shown
    assert Image.open(tmp_path / "sheet.png").size == _size(*shape)


def test_a_card_is_before_mask_after(run: Path, tmp_path: Path) -> None:
    contact_sheet(str(run), str(tmp_path / "sheet.png"))
    page = Image.open(tmp_path / "sheet.png").convert("RGB")
    middles = [(2 * GAP + i * (CELL + GAP) + CELL // 2, 2 * GAP + CELL // 2) for i in range(3)]
    assert [page.getpixel(p) for p in middles] == [RED, WHITE, BLUE]
    # the picture is twice as wide as high, so its cell is paper above it
    assert page.getpixel((middles[0][0], 2 * GAP + 2)) == PAPER


def test_both_texts_are_written_below_and_never_beyond_the_card(run: Path) -> None:
    pictures = [np.full((10, 10, 3), 90, np.uint8)] * 3
    short, long = card(pictures, "a horse", "a zebra"), card(pictures, None, "a zebra " * 100)
    assert short.size == long.size == CARD
    for one in (short, long):
        below = np.asarray(one)[CELL + 1 :]
        assert (below != PAPER).any()
    assert (np.asarray(card(pictures, "a horse", "a mule")) != np.asarray(short)).any()


def test_greyscale_and_alpha_are_shown(run: Path) -> None:
    see_through = np.zeros((10, 10, 4), np.uint8)
    pixels = np.asarray(card([np.full((10, 10), 77, np.uint8), see_through], "a", "b"))
    assert pixels[CELL // 2, CELL // 2].tolist() == [77] * 3
    assert tuple(pixels[CELL // 2, CELL + GAP + CELL // 2]) == PAPER


def test_a_run_without_edits_has_an_empty_sheet() -> None:
    assert sheet([], 2).size == _size(1, 1)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds no run"):
        contact_sheet(str(tmp_path), str(tmp_path / "sheet.png"))
    assert not (tmp_path / "sheet.png").exists()
