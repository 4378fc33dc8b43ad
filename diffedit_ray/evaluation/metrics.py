"""Measures of masks and pictures against known truth, as pure functions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PSNR_LIMIT = 60.0
"""What equal pictures score, dB; infinity would swallow a mean."""


def mask_iou(mask: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Intersection over union of two (H, W) masks; two empty ones agree: 1."""
    union = np.logical_or(mask, truth).sum()
    return float(np.logical_and(mask, truth).sum() / union) if union else 1.0


def upsampled(contrast: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """A soft contrast in latent cells at (width, height) pixels, bilinearly."""
    return np.asarray(Image.fromarray(contrast.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))


def psnr(image: NDArray[np.uint8], truth: NDArray[np.uint8], where: NDArray[np.bool_] | None = None) -> float:
    """PSNR in dB of 8-bit pictures, over the (H, W) pixels of `where` if given; at most `PSNR_LIMIT`."""
    error = (image.astype(np.float64) - truth.astype(np.float64)) ** 2
    mean = error[where].mean() if where is not None else error.mean()
    return PSNR_LIMIT if mean == 0 else min(PSNR_LIMIT, float(10 * np.log10(255**2 / mean)))
