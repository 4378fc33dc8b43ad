"""What an edit gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass
class LatentEdit:
    """What the three steps give for a batch at the model's own size.

    Attributes:
        pixels: (B, 3, H, W) uint8, the decoded edit; the input itself where the mask is empty.
        contrast: (B, h, w) float32 in [0, 1]; the mask itself where one was given.
        mask: (B, h, w) bool.
        significance: (B,) float32, the contrast's F ratio; NaN where a mask was given.
        seconds: Spent in "mask", "encode" and "decode", for the whole batch.
    """

    pixels: Tensor
    contrast: Tensor
    mask: Tensor
    significance: Tensor
    seconds: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def joined(parts: Sequence[LatentEdit]) -> LatentEdit:
        """The parts of one batch as one."""
        if len(parts) == 1:
            return parts[0]
        names = ("pixels", "contrast", "mask", "significance")
        whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return LatentEdit(**whole, seconds={step: sum(p.seconds[step] for p in parts) for step in parts[0].seconds})


@dataclass
class EditResult:
    """Edited images at their own sizes, row by row.

    Attributes:
        images: (H, W, 3) or, if alpha came in, (H, W, 4) uint8.
        masks: (H, W) uint8; 255 = edited, 0 = the original's own pixel.
        contrasts: (h, w) float32 in [0, 1], the soft contrast in latent cells.
        latent_masks: (h, w) bool, the mask that guided decoding.
        significance: The contrast's F ratio (`mask.significance`).
        seconds: Spent in "mask", "encode" and "decode", for the whole batch.
    """

    images: list[NDArray[np.uint8]]
    masks: list[NDArray[np.uint8]]
    contrasts: list[NDArray[np.float32]]
    latent_masks: list[NDArray[np.bool_]]
    significance: list[float]
    seconds: dict[str, float]

    @property
    def unchanged(self) -> list[bool]:
        """Rows whose mask is empty: the texts do not disagree about the image."""
        return [not mask.any() for mask in self.latent_masks]
