from __future__ import annotations

import numpy as np
import pytest

from diffedit_ray.diffusion.framing import (
    MAX_STRETCH,
    Frame,
    Geometry,
    finish,
    fit,
    frame_for,
    grow,
    latent_mask_from,
    over_white,
    paste_back,
    pixel_alpha,
    unfit,
)
from tests.diffusion.helpers import smooth_image

STABLE_DIFFUSION, DEMO, TINY = Geometry(512, 64, 8), Geometry(128, 32, 8), Geometry(32, 8, 4)
SIZES = [(1, 1), (3, 2000), (1000, 700), (128, 128), (4000, 31), (512, 512), (640, 427), (33, 32), (9999, 10000)]


@pytest.mark.parametrize("geometry", [STABLE_DIFFUSION, DEMO, TINY], ids=lambda g: str(g.native))
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_any_size_lands_on_multiples_within_twice_the_native_area(width: int, height: int, geometry: Geometry) -> None:
    frame = frame_for(width, height, geometry)
    assert (frame.model_width % geometry.multiple, frame.model_height % geometry.multiple) == (0, 0)
    assert 1 <= frame.content_width <= frame.model_width
    assert 1 <= frame.content_height <= frame.model_height
    assert frame.model_width * frame.model_height <= 2 * geometry.native**2
    # no more is padded than it takes to reach the next multiple
    assert frame.model_width - frame.content_width < geometry.multiple
    assert frame.model_height - frame.content_height < geometry.multiple


@pytest.mark.parametrize("geometry", [STABLE_DIFFUSION, DEMO], ids=lambda g: str(g.native))
def test_area_is_near_native_and_aspect_kept_for_every_usual_shape(geometry: Geometry) -> None:
    rng = np.random.default_rng(0)
    for width, aspect in zip(rng.integers(64, 6000, 300), 4 ** rng.uniform(-1, 1, 300), strict=True):
        height = max(1, round(width / aspect))
        frame = frame_for(int(width), height, geometry)
        area = frame.content_width * frame.content_height / geometry.native**2
        # each side may give by MAX_STRETCH, and by half a pixel
        assert 0.9 < area < 1.1, (width, height)
        stretch = (frame.content_width / frame.content_height) / (width / height)
        assert abs(stretch - 1) < 2 * MAX_STRETCH + 0.02, (width, height)


def test_native_size_passes_through_untouched() -> None:
    image, frame = smooth_image(128, 128), frame_for(128, 128, DEMO)
    assert frame == Frame(128, 128, 128, 128, 128, 128, 8)
    assert np.array_equal(fit(image, frame), image)
    assert np.array_equal(unfit(image, frame), image)


def test_resolution_sets_the_area() -> None:
    frame = frame_for(1000, 1000, STABLE_DIFFUSION, resolution=768)
    assert (frame.model_width, frame.model_height) == (768, 768)
    odd = frame_for(1000, 1000, STABLE_DIFFUSION, resolution=500)
    assert (odd.model_width, odd.model_height) == (512, 512)


@pytest.mark.parametrize(("width", "height"), SIZES[:5])
def test_fitting_fills_the_frame_and_unfitting_gives_the_size_back(width: int, height: int) -> None:
    image, frame = smooth_image(width, height), frame_for(width, height, TINY)
    fitted = fit(image, frame)
    assert fitted.shape == (frame.model_height, frame.model_width, 3)
    assert unfit(fitted, frame).shape == image.shape


def test_padding_mirrors_the_content_and_is_cut_off_again() -> None:
    image, frame = smooth_image(1000, 700), frame_for(1000, 700, STABLE_DIFFUSION)
    fitted = fit(image, frame)
    below, right = frame.content_height, frame.content_width
    assert np.array_equal(fitted[below], fitted[below - 1])
    assert np.array_equal(fitted[below + 5], fitted[below - 6])
    assert np.array_equal(fitted[:, right + 5], fitted[:, right - 6])
    spoilt = fitted.copy()
    spoilt[below:], spoilt[:, right:] = 0, 255
    assert np.array_equal(unfit(spoilt, frame), unfit(fitted, frame))
    # smooth shapes survive the way there and back; grain of σ 4 does not
    assert np.abs(unfit(fitted, frame).astype(int) - image).mean() < 4


def test_grow_reaches_all_eight_neighbours_a_step() -> None:
    mask = np.zeros((9, 9), bool)
    mask[4, 4] = True
    for cells in range(4):
        expected = np.zeros((9, 9), bool)
        expected[4 - cells : 5 + cells, 4 - cells : 5 + cells] = True
        assert np.array_equal(grow(mask, cells), expected)


def test_grow_stops_at_the_edge() -> None:
    mask = np.zeros((3, 3), bool)
    mask[0, 0] = True
    assert grow(mask, 1).tolist() == [[True, True, False], [True, True, False], [False, False, False]]


@pytest.mark.parametrize("cells", [0, 1, 2])
@pytest.mark.parametrize(("width", "height"), [(1000, 700), (512, 512), (60, 40)])
def test_alpha_is_full_on_the_mask_and_zero_beyond_the_grown_one(width: int, height: int, cells: int) -> None:
    frame = frame_for(width, height, STABLE_DIFFUSION)
    mask = np.zeros((frame.model_height // 8, frame.model_width // 8), bool)
    mask[10:20, 15:30] = True
    alpha = pixel_alpha(mask, frame, cells)
    assert alpha.shape == (height, width)
    # where each pixel's centre lies, in latent cells
    x = (np.arange(width) + 0.5) * frame.latent_box[2] / width
    y = (np.arange(height) + 0.5) * frame.latent_box[3] / height
    # interpolation reaches at most a cell, or a pixel where pixels are larger, beyond the last cell's centre
    reach = max(1.0, frame.latent_box[2] / width, frame.latent_box[3] / height) - 0.5
    margin = cells + reach
    outside_x, outside_y = (x < 15 - margin) | (x > 30 + margin), (y < 10 - margin) | (y > 20 + margin)
    assert not alpha[outside_y].any()
    assert not alpha[:, outside_x].any()
    inside_x, inside_y = (x > 15 + reach) & (x < 30 - reach), (y > 10 + reach) & (y < 20 - reach)
    assert inside_x.any()
    assert inside_y.any()
    assert (alpha[np.ix_(inside_y, inside_x)] == 255).all()


def test_alpha_falls_off_over_about_one_cell() -> None:
    frame = frame_for(512, 512, STABLE_DIFFUSION)
    mask = np.zeros((64, 64), bool)
    mask[:, :32] = True
    row = pixel_alpha(mask, frame, 0)[256].astype(int)
    assert np.all(np.diff(row) <= 0)
    partly = np.flatnonzero((row > 0) & (row < 255))
    assert len(partly) == 8
    assert partly.mean() == 255.5


def test_empty_mask_has_empty_alpha() -> None:
    frame = frame_for(1000, 700, STABLE_DIFFUSION)
    empty = np.zeros((frame.model_height // 8, frame.model_width // 8), bool)
    assert not pixel_alpha(empty, frame, 16).any()


def test_pasting_keeps_every_pixel_without_alpha_bit_for_bit() -> None:
    original, edited = smooth_image(1000, 700, seed=1), smooth_image(1000, 700, seed=2)
    frame = frame_for(1000, 700, STABLE_DIFFUSION)
    mask = np.zeros((frame.model_height // 8, frame.model_width // 8), bool)
    mask[5:9, 60:70], mask[40, 3] = True, True
    alpha = pixel_alpha(mask, frame, 1)
    kept = original.copy()
    result = paste_back(original, edited, alpha)
    assert np.array_equal(result[alpha == 0], original[alpha == 0])
    assert np.array_equal(result[alpha == 255], edited[alpha == 255])
    assert 0 < (alpha == 255).sum() < (alpha > 0).sum() < alpha.size / 4
    between = (alpha > 0) & (alpha < 255)
    low, high = np.minimum(original, edited), np.maximum(original, edited)
    assert ((result >= low) & (result <= high))[between].all()
    assert np.array_equal(original, kept)


def test_pasting_with_an_empty_alpha_is_a_copy() -> None:
    original, edited = smooth_image(seed=1), smooth_image(seed=2)
    result = paste_back(original, edited, np.zeros((32, 32), np.uint8))
    assert np.array_equal(result, original)
    assert not np.shares_memory(result, original)


def test_blend_is_linear_in_alpha() -> None:
    original, edited = np.full((1, 3, 3), 10, np.uint8), np.full((1, 3, 3), 210, np.uint8)
    alpha = np.array([[0, 51, 255]], np.uint8)
    assert paste_back(original, edited, alpha)[0, :, 0].tolist() == [10, 50, 210]


@pytest.mark.parametrize("composite", [True, False])
def test_alpha_channel_is_kept(composite: bool) -> None:
    original, frame = smooth_image(100, 70, channels=4), frame_for(100, 70, TINY)
    edited = smooth_image(frame.model_width, frame.model_height, seed=3)
    alpha = np.zeros((70, 100), np.uint8)
    alpha[10:30, 10:30] = 255
    result = finish(original, edited, alpha, frame, composite=composite)
    assert result.shape == (70, 100, 4)
    assert np.array_equal(result[..., 3], original[..., 3])
    full = unfit(edited, frame)
    assert np.array_equal(result[alpha > 0][:, :3], full[alpha > 0])
    assert np.array_equal(result[..., :3][alpha == 0], (original[..., :3] if composite else full)[alpha == 0])


def test_the_model_sees_white_behind_alpha() -> None:
    image = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 200, 51]]], np.uint8)
    assert over_white(image).tolist() == [[[10, 20, 30], [255, 255, 255], [204, 224, 244]]]
    assert np.array_equal(over_white(image[..., :3]), image[..., :3])


@pytest.mark.parametrize("geometry", [STABLE_DIFFUSION, DEMO, TINY], ids=lambda g: str(g.native))
@pytest.mark.parametrize(("width", "height"), [(4000, 3000), (1000, 700), (90, 60)])
@pytest.mark.parametrize("level", [1, 255])
def test_a_drawn_mask_of_one_pixel_does_not_vanish(width: int, height: int, geometry: Geometry, level: int) -> None:
    frame = frame_for(width, height, geometry)
    drawn = np.zeros((height, width), np.uint8)
    x, y = 2 * width // 3, height // 3
    drawn[y, x] = level
    cells = latent_mask_from(drawn, frame)
    assert cells.shape == (frame.model_height // frame.factor, frame.model_width // frame.factor)
    row = int((y + 0.5) * frame.content_height / height / frame.factor)
    column = int((x + 0.5) * frame.content_width / width / frame.factor)
    assert cells[row, column]
    # one pixel of a small picture can be larger than a cell
    assert cells.sum() <= 9


def test_a_thin_diagonal_stroke_stays_connected() -> None:
    frame = frame_for(4000, 3000, DEMO)
    drawn = np.zeros((3000, 4000), np.uint8)
    steps = np.arange(4000)
    drawn[steps * 3 // 4, steps] = 255
    cells = latent_mask_from(drawn, frame)
    across = frame.content_width // frame.factor
    assert cells[:, :across].any(0).all()
    assert cells.sum() < 3 * across


def test_a_drawn_mask_never_spreads_into_the_padding() -> None:
    frame = frame_for(1000, 700, STABLE_DIFFUSION)
    cells = latent_mask_from(np.full((700, 1000), 255, np.uint8), frame)
    inside_x, inside_y = np.ceil(frame.latent_box[2]), np.ceil(frame.latent_box[3])
    expected = np.zeros_like(cells)
    expected[: int(inside_y), : int(inside_x)] = True
    assert np.array_equal(cells, expected)
    assert not cells.all()
