"""The rows that are edited to measure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from diffedit_ray.demo.edits import shipped_edits

OTHERS = ("zebra", "cow", "lion", "fox", "panda")
"""What a queried object becomes where one picture has five queries."""


@dataclass(frozen=True)
class Row:
    """One edit to time; `image` is already at the model's own size, (H, W, 3) uint8.

    `changed` is the word of the reference that the query replaces.
    """

    image: np.ndarray
    reference: str
    query: str
    seed: int
    changed: str


Columns = tuple[list[np.ndarray], list[str], list[str], list[int]]


def columns(rows: list[Row]) -> Columns:
    """Images, references, queries and seeds, as every contestant takes them."""
    return [r.image for r in rows], [r.reference for r in rows], [r.query for r in rows], [r.seed for r in rows]


def demo_rows(count: int, side: int) -> list[Row]:
    """The shipped pictures and their edits, over again where there are fewer than `count`."""
    edits = shipped_edits()
    chosen = [edits[i % len(edits)] for i in range(count)]
    resized = [np.asarray(Image.fromarray(e.image).resize((side, side), Image.Resampling.LANCZOS)) for e in chosen]
    # a picture that comes again is moved by a pixel and has noise of its own: it shares no work with the first
    return [
        Row(np.roll(image, i // len(edits), axis=1), e.reference, e.query, e.seed + i // len(edits), e.kind)
        for i, (image, e) in enumerate(zip(resized, chosen, strict=True))
    ]


def random_rows(count: int, side: int) -> list[Row]:
    """Smooth random pictures of the given side: time does not depend on what they show."""
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in range(count)]
    images = [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in coarse]
    return [Row(image, "a horse on grass", "a zebra on grass", seed, "horse") for seed, image in enumerate(images)]


def five_queries(rows: list[Row]) -> list[Row]:
    """As many rows over a fifth of the pictures: five queries each, which share reference and seed."""
    pictures = rows[: -(-len(rows) // len(OTHERS))]
    queried = [replace(row, query=row.reference.replace(row.changed, other)) for row in pictures for other in OTHERS]
    return queried[: len(rows)]
