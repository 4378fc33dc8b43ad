"""How a picture of any size gets into the model, and the edit back onto its own pixels (step 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_STRETCH = 0.04
"""Aspect error accepted to land on a whole multiple; beyond it the picture is padded instead."""


@dataclass(frozen=True)
class Geometry:
    """The sizes a model works at, in pixels.

    Attributes:
        native: Side of the square it was trained at.
        multiple: Both sides must be multiples of this: VAE factor × UNet stride.
        factor: Pixels a latent cell stands for, along each side.
    """

    native: int
    multiple: int
    factor: int


@dataclass(frozen=True)
class Frame:
    """Where a picture lies in what the model sees.

    Attributes:
        width, height: The picture's own size.
        content_width, content_height: Its size after scaling, at the top left of the model's input.
        model_width, model_height: The model's input; what the content leaves free is mirrored.
        factor: Pixels a latent cell stands for.
    """

    width: int
    height: int
    content_width: int
    content_height: int
    model_width: int
    model_height: int
    factor: int

    @property
    def content_cells(self) -> NDArray[np.bool_]:
        """Which latent cells the content reaches: (h, w) bool. A mask in the padding changes nothing."""
        cells = np.zeros((self.model_height // self.factor, self.model_width // self.factor), np.bool_)
        cells[: math.ceil(self.content_height / self.factor), : math.ceil(self.content_width / self.factor)] = True
        return cells

    @property
    def latent_box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the content in latent cells."""
        return 0.0, 0.0, self.content_width / self.factor, self.content_height / self.factor


def frame_for(width: int, height: int, geometry: Geometry, resolution: int | None = None) -> Frame:
    """Fit a picture: near the model's native area, its aspect ratio kept, on sizes the model accepts.

    Args:
        width: Of the picture, pixels.
        height: Likewise.
        geometry: Of the model.
        resolution: Side of the square whose area to work at; none is the model's own.
    """
    side, multiple = resolution or geometry.native, geometry.multiple
    scale = math.sqrt(side * side / (width * height))
    # a very long picture is padded across: keep what the model sees within twice the native area
    scale = min(scale, 2 * side * side / multiple / max(width, height))
    content_width, model_width = _snap(width * scale, multiple)
    content_height, model_height = _snap(height * scale, multiple)
    return Frame(width, height, content_width, content_height, model_width, model_height, geometry.factor)


def _snap(length: float, multiple: int) -> tuple[int, int]:
    """(content, model) lengths for a scaled length."""
    nearest = max(1, round(length / multiple)) * multiple
    if abs(nearest / length - 1) <= MAX_STRETCH:
        return nearest, nearest
    content = max(1, round(length))
    return content, math.ceil(content / multiple) * multiple


def fit(image: NDArray[np.uint8], frame: Frame) -> NDArray[np.uint8]:
    """Scale and pad a picture for the model: (H, W[, 3]) uint8 -> (model_height, model_width[, 3]) uint8."""
    size = (frame.content_width, frame.content_height)
    scaled = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    padding = [(0, frame.model_height - frame.content_height), (0, frame.model_width - frame.content_width)]
    padded: NDArray[np.uint8] = np.pad(scaled, [*padding, (0, 0)][: scaled.ndim], mode="symmetric")
    return padded


def latent_mask_from(mask: NDArray[np.uint8], frame: Frame) -> NDArray[np.bool_]:
    """A hand-drawn mask in latent cells: every cell it touches. (H, W) uint8 -> (h, w) bool.

    Generous on purpose: `paste_back` holds to the drawn pixels, and a thin stroke must not vanish.
    """
    size = (frame.content_width, frame.content_height)
    # in floats: the box average of one drawn pixel in a large picture would round to 0 in 8 bits
    scaled = np.asarray(Image.fromarray((mask > 0).astype(np.float32)).resize(size, Image.Resampling.BOX))
    padded = np.zeros((frame.model_height, frame.model_width), np.float32)
    padded[: frame.content_height, : frame.content_width] = scaled
    f = frame.factor
    cells = padded.reshape(frame.model_height // f, f, frame.model_width // f, f)
    touched: NDArray[np.bool_] = cells.max((1, 3)) > 0
    return touched


def grow(mask: NDArray[np.bool_], cells: int) -> NDArray[np.bool_]:
    """Dilate by `cells` in all eight directions: (h, w) bool -> (h, w) bool."""
    for _ in range(cells):
        padded = np.pad(mask, 1)
        h, w = mask.shape
        mask = np.logical_or.reduce([padded[y : y + h, x : x + w] for y in range(3) for x in range(3)])
    return mask


def pixel_alpha(latent_mask: NDArray[np.bool_], frame: Frame, cells: int) -> NDArray[np.uint8]:
    """How much of the edit each of the picture's own pixels takes: (h, w) bool -> (H, W) uint8.

    The mask is grown by `cells` and falls to 0 linearly over about one latent cell.
    """
    if not latent_mask.any():
        return np.zeros((frame.height, frame.width), np.uint8)
    grown = Image.fromarray(grow(latent_mask, cells).astype(np.float32))
    size = (frame.width, frame.height)
    alpha = np.asarray(grown.resize(size, Image.Resampling.BILINEAR, box=frame.latent_box))
    eight_bit: NDArray[np.uint8] = np.rint(alpha.clip(0, 1) * 255).astype(np.uint8)
    return eight_bit


def unfit(image: NDArray[np.uint8], frame: Frame) -> NDArray[np.uint8]:
    """The model's picture at the picture's own size: (model_height, model_width, 3) -> (H, W, 3) uint8."""
    content = Image.fromarray(image[: frame.content_height, : frame.content_width])
    return np.asarray(content.resize((frame.width, frame.height), Image.Resampling.LANCZOS))


def paste_back(original: NDArray[np.uint8], edited: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Blend an edit onto the original's own pixels; where alpha is 0 they stay bit for bit.

    Args:
        original: (H, W, 3) uint8.
        edited: (H, W, 3) uint8, the same size (`unfit`).
        alpha: (H, W) uint8, 255 = all edit.
    """
    result = original.copy()
    rows, columns = np.nonzero(alpha.any(1))[0], np.nonzero(alpha.any(0))[0]
    if len(rows) == 0:
        return result
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    share = alpha[box][..., None].astype(np.float32) / 255
    blended = original[box] * (1 - share) + edited[box] * share
    result[box] = np.where(share > 0, np.rint(blended), original[box]).astype(np.uint8)
    return result


def finish(
    original: NDArray[np.uint8], edited: NDArray[np.uint8], alpha: NDArray[np.uint8], frame: Frame, *, composite: bool
) -> NDArray[np.uint8]:
    """Step 4: the model's picture at the original's size, pasted into it unless `composite` is off.

    Args:
        original: (H, W, 3 or 4) uint8; an alpha channel is kept as it is.
        edited: (model_height, model_width, 3) uint8.
        alpha: (H, W) uint8, as `pixel_alpha` or a hand-drawn mask.
        frame: How the original lies in what the model saw.
        composite: Whether the original's own pixels stay outside the mask.
    """
    full = unfit(edited, frame)
    rgb = paste_back(original[..., :3], full, alpha) if composite else full
    return np.concatenate([rgb, original[..., 3:]], axis=-1)


def over_white(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What the model sees of a picture, its colours over white: (H, W, 3 or 4) uint8 -> (H, W, 3) uint8."""
    if image.shape[2] == 3:
        return image
    share = image[..., 3:].astype(np.float32) / 255
    return np.rint(image[..., :3] * share + 255 * (1 - share)).astype(np.uint8)
