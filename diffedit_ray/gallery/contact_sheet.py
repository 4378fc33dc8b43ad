"""One picture of a run: before, mask and after of its first edits, with their texts."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from diffedit_ray.dataset import records, storage
from diffedit_ray.dataset.images import decode_image
from diffedit_ray.dataset.manifest import manifest_folder
from diffedit_ray.dataset.records import EDITED, OutputLayout
from diffedit_ray.errors import OutputError

CELL = 160
GAP = 8
TEXT_HEIGHT = 44
CARD = (3 * CELL + 2 * GAP, CELL + TEXT_HEIGHT)
PAPER, INK, PALE = (250, 250, 248), (30, 30, 34), (110, 110, 118)
MAX_PIXELS = 200_000_000
MAX_BYTES = 1_000_000_000


def contact_sheet(output: str, uri: str, *, limit: int = 24, columns: int = 2) -> int:
    """Write a PNG of a run's first edits and return how many it shows.

    Args:
        output: The run's output.
        uri: Where the PNG goes.
        limit: Edits shown at most.
        columns: Cards side by side.

    Raises:
        OutputError: The output holds no run.
    """
    output = storage.absolute(output)
    try:
        config = json.loads(storage.read_bytes(OutputLayout(output).config, max_bytes=1 << 24))
    except Exception as error:
        raise OutputError(f"{output} holds no run: {error}") from None
    base = manifest_folder(config["manifest"])
    names = ["id", "image_uri", "reference", "query", "status", "edited_uri", "mask_uri"]
    rows = [row for row in records.read_records(output, names).to_pylist() if row["status"] == EDITED]
    rows = sorted(rows, key=lambda row: (row["image_uri"], row["query"]))[:limit]
    cards = [_row_card(row, base) for row in rows]
    stream = io.BytesIO()
    sheet(cards, columns).save(stream, "PNG")
    storage.write_bytes(storage.absolute(uri), stream.getvalue())
    return len(rows)


def sheet(cards: Sequence[Image.Image], columns: int) -> Image.Image:
    """Cards side by side in rows; an empty sheet if there are none."""
    columns = max(1, min(columns, len(cards)))
    rows = max(1, -(-len(cards) // columns))
    page = Image.new("RGB", (columns * (CARD[0] + 3 * GAP) + GAP, rows * (CARD[1] + 2 * GAP) + 2 * GAP), PAPER)
    for i, one in enumerate(cards):
        page.paste(one, (2 * GAP + i % columns * (CARD[0] + 3 * GAP), 2 * GAP + i // columns * (CARD[1] + 2 * GAP)))
    return page


def card(pictures: Sequence[NDArray[np.uint8]], reference: str | None, query: str) -> Image.Image:
    """Before, mask and after side by side, the two texts below.

    Args:
        pictures: (H, W) greyscale or (H, W, 3 or 4) uint8, of any sizes.
        reference: None or "" is shown as such.
        query: The other text.
    """
    paper = Image.new("RGB", CARD, PAPER)
    for i, picture in enumerate(pictures):
        paper.paste(_thumbnail(picture), (i * (CELL + GAP), 0))
    draw = ImageDraw.Draw(paper)
    font = ImageFont.load_default(15)
    draw.text((0, CELL + 4), _clip(draw, reference or "(no reference)", font), PALE, font)
    draw.text((0, CELL + 22), _clip(draw, f"» {query}", font), INK, font)
    return paper


def _row_card(row: Mapping[str, Any], base: str) -> Image.Image:
    uris = (storage.resolve(row["image_uri"], base), row["mask_uri"], row["edited_uri"])
    files = [storage.read_bytes(uri, max_bytes=MAX_BYTES) for uri in uris]
    names = map(storage.shown, uris)
    pictures = [decode_image(data, name, max_pixels=MAX_PIXELS).pixels for data, name in zip(files, names, strict=True)]
    return card(pictures, row["reference"], row["query"])


def _clip(draw: ImageDraw.ImageDraw, text: str, font: Any) -> str:
    text = " ".join(text.split())
    if draw.textlength(text, font) <= CARD[0]:
        return text
    while text and draw.textlength(text + "…", font) > CARD[0]:
        text = text[:-1]
    return text + "…"


def _thumbnail(picture: NDArray[np.uint8]) -> Image.Image:
    image = Image.fromarray(picture)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, PAPER), image)
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    cell = Image.new("RGB", (CELL, CELL), PAPER)
    resized = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    cell.paste(resized, ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell
