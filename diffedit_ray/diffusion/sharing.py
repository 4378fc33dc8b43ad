"""What rows of one batch have in common, so that it is done once; nothing here changes a result.

The encoding knows no text, so all queries on one picture share it, and a lower encoding ratio is a prefix of a
higher one. What a text makes of a noised picture is asked for by every row with that picture, seed and text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from diffedit_ray.settings import EditSettings


def distinct(pixels: Tensor) -> tuple[list[int], list[int]]:
    """Which picture each row of (B, 3, H, W) shows, and the first row that shows each."""
    seen: dict[bytes, int] = {}
    pictures: list[int] = []
    first: list[int] = []
    for i, row in enumerate(pixels):
        key = hashlib.blake2b(row.contiguous().numpy().data, digest_size=16).digest()
        if key not in seen:
            seen[key] = len(first)
            first.append(i)
        pictures.append(seen[key])
    return pictures, first


class Noised(NamedTuple):
    """A picture under a seed's noise at a time."""

    picture: int
    seed: int
    time: int


@dataclass(frozen=True)
class Comparison:
    """What one row's mask needs: two texts' estimates over the first `maps` of a seed's noise samples."""

    place: Noised
    query: str
    reference: str
    maps: int

    @property
    def estimates(self) -> list[tuple[Noised, str]]:
        """Where to look the two up, the query's first; of equal texts neither is needed."""
        return [(self.place, text) for text in (self.query, self.reference)] if self.query != self.reference else []


def estimates_wanted(comparisons: Iterable[Comparison]) -> dict[Noised, dict[str, int]]:
    """The texts that rows ask about each, and over how many noise samples: the most that one row needs."""
    wanted: dict[Noised, dict[str, int]] = {}
    for comparison in comparisons:
        for place, text in comparison.estimates:
            texts = wanted.setdefault(place, {})
            texts[text] = max(comparison.maps, texts.get(text, 0))
    return wanted


Walk = tuple[int, int, str]
"""A picture, the number of steps of its grid, and the solver."""


def walk_of(picture: int, settings: EditSettings) -> Walk:
    """Rows with the same walk share a path."""
    return picture, settings.steps, settings.solver


def longest_walks(pictures: Sequence[int], settings: Sequence[EditSettings]) -> dict[Walk, EditSettings]:
    """Every walk that some row needs, with the settings of the row that goes furthest."""
    longest: dict[Walk, EditSettings] = {}
    for picture, s in zip(pictures, settings, strict=True):
        known = longest.setdefault(walk_of(picture, s), s)
        if s.encoding_ratio > known.encoding_ratio:
            longest[walk_of(picture, s)] = s
    return longest
