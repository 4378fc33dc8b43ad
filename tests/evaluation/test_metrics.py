from __future__ import annotations

import numpy as np
import pytest

from diffedit_ray.evaluation.metrics import PSNR_LIMIT, mask_iou, psnr, upsampled


def half(left: int, right: int) -> np.ndarray:
    mask = np.zeros((4, 8), bool)
    mask[:, left:right] = True
    return mask


def test_iou_is_the_shared_part_of_the_whole() -> None:
    assert mask_iou(half(0, 4), half(2, 6)) == pytest.approx(2 / 6)
    assert mask_iou(half(0, 4), half(4, 8)) == 0
    assert mask_iou(half(0, 4), half(0, 4)) == 1


def test_two_empty_masks_agree() -> None:
    assert mask_iou(half(0, 0), half(0, 0)) == 1
    assert mask_iou(half(0, 0), half(0, 1)) == 0


def test_psnr_of_a_known_error() -> None:
    black = np.zeros((4, 8, 3), np.uint8)
    # an error of 255 / 10 everywhere is 20 dB; rounded to whole values, 25
    assert psnr(black + np.uint8(25), black) == pytest.approx(20 * np.log10(255 / 25))
    assert psnr(black, black) == PSNR_LIMIT


def test_psnr_sees_only_where_it_is_told() -> None:
    black = np.zeros((4, 8, 3), np.uint8)
    spoiled = black.copy()
    spoiled[:, :4] = 200
    assert psnr(spoiled, black, half(4, 8)) == PSNR_LIMIT
    assert psnr(spoiled, black, half(0, 4)) == pytest.approx(20 * np.log10(255 / 200))


def test_darker_is_as_wrong_as_brighter() -> None:
    # differences of unsigned bytes would wrap round
    grey = np.full((4, 8, 3), 100, np.uint8)
    assert psnr(grey - np.uint8(30), grey) == pytest.approx(psnr(grey + np.uint8(30), grey))


def test_upsampled_takes_width_before_height() -> None:
    contrast = np.array([[0.0, 1.0]], np.float32)
    wide = upsampled(contrast, (8, 3))
    assert wide.shape == (3, 8)
    assert np.all(np.diff(wide, axis=1) >= 0)
    assert wide[0, 0] == 0
    assert wide[0, -1] == 1
