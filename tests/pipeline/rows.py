"""A folder of small pictures and the manifest rows over them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffedit_ray.settings import EditSettings

QUICK = EditSettings(steps=4, mask_maps=2, mask_significance=0)
"""Few steps, and no significance test: to a network of random weights no text means anything."""


def picture(seed: int, width: int, height: int, channels: int = 3) -> NDArray[np.uint8]:
    """Smooth noise."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, channels), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def save_pictures(folder: Path) -> Path:
    """Good ones of several sizes, a damaged one, one that is none, and a mask for `wide.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(1, 32, 32)).save(folder / "square.png")
    Image.fromarray(picture(2, 70, 33)).save(folder / "wide.png")
    Image.fromarray(picture(3, 25, 61)).save(folder / "tall.jpg", quality=95)
    Image.fromarray(picture(4, 40, 40, 4)).save(folder / "alpha.png")
    stream = io.BytesIO()
    Image.fromarray(picture(5, 64, 64)).save(stream, "PNG")
    (folder / "cut.png").write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    (folder / "page.png").write_text("<html>")
    mask = np.zeros((33, 70), np.uint8)
    mask[8:24, 20:50] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(np.zeros((33, 70), np.uint8)).save(folder / "black.png")
    return folder


def read(uri: str) -> NDArray[np.uint8]:
    """The pixels of a file."""
    return np.asarray(Image.open(uri))


def row(image: str, query: str | None = "a cat", **values: Any) -> dict[str, Any]:
    """A manifest row."""
    return {"image_uri": image, "reference": "a horse", "query": query, **values}
