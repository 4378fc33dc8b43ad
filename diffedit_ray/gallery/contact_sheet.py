"""One picture of a run: before, mask and after of its first edits, with their texts."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

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
    columns = max(1, min(columns, len(rows)))
    height = -(-len(rows) // columns)
    sheet = Image.new(
        "RGB", (columns * (CARD[0] + 3 * GAP) + GAP, max(1, height) * (CARD[1] + 2 * GAP) + 2 * GAP), PAPER
    )
    for i, row in enumerate(rows):
        x, y = i % columns, i // columns
        sheet.paste(_card(row, base), (2 * GAP + x * (CARD[0] + 3 * GAP), 2 * GAP + y * (CARD[1] + 2 * GAP)))
    stream = io.BytesIO()
    sheet.save(stream, "PNG")
    storage.write_bytes(storage.absolute(uri), stream.getvalue())
    return len(rows)


def _card(row: Mapping[str, Any], base: str) -> Image.Image:
    card = Image.new("RGB", CARD, PAPER)
    uris = (storage.resolve(row["image_uri"], base), row["mask_uri"], row["edited_uri"])
    for i, uri in enumerate(uris):
        card.paste(_thumbnail(uri), (i * (CELL + GAP), 0))
    draw = ImageDraw.Draw(card)
    font = ImageFont.load_default(15)
    draw.text((0, CELL + 4), _clip(draw, row["reference"] or "∅", font), PALE, font)
    draw.text((0, CELL + 22), _clip(draw, f"→ {row['query']}", font), INK, font)
    return card


def _clip(draw: ImageDraw.ImageDraw, text: str, font: Any) -> str:
    text = " ".join(text.split())
    if draw.textlength(text, font) <= CARD[0]:
        return text
    while text and draw.textlength(text + "…", font) > CARD[0]:
        text = text[:-1]
    return text + "…"


def _thumbnail(uri: str) -> Image.Image:
    data = storage.read_bytes(uri, max_bytes=MAX_BYTES)
    image = Image.fromarray(decode_image(data, uri, max_pixels=MAX_PIXELS).pixels).convert("RGB")
    scale = CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    cell = Image.new("RGB", (CELL, CELL), PAPER)
    cell.paste(image.resize(size, Image.Resampling.LANCZOS), ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell
