from __future__ import annotations

import pytest
import torch

from diffedit_ray.diffusion.mask import (
    average_contrast,
    binarise,
    clip_extremes,
    noise_contrast,
    rescale,
    significance,
)


def test_contrast_is_the_absolute_difference_averaged_over_channels() -> None:
    query, reference = torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3)
    query[0, :, 0, 0] = torch.tensor([1.0, -3.0])
    reference[0, :, 0, 1] = torch.tensor([2.0, 0.0])
    assert noise_contrast(query, reference).tolist() == [[[2.0, 1.0, 0.0]]]


def test_contrast_of_half_precision_is_taken_in_full() -> None:
    query, reference = torch.full((1, 1, 1, 1), 1000.0).half(), torch.full((1, 1, 1, 1), -65000.0).half()
    assert noise_contrast(query, reference).item() == 1000 + float(reference.float().abs())


def test_extremes_are_clipped_where_half_of_each_maps_own_energy_begins() -> None:
    quiet = torch.zeros(1, 101)
    quiet[0, :6] = torch.tensor([1.0, 2, 3, 4, 5, 6])  # squares: 36 + 25 of 91 are more than half
    maps = torch.stack([quiet, quiet * 1000])
    assert clip_extremes(maps, 0.5)[:, 0, :6].tolist() == [[1, 2, 3, 4, 5, 5], [1000, 2000, 3000, 4000, 5000, 5000]]
    assert torch.equal(clip_extremes(maps, 0.0), maps)


def test_an_object_of_a_few_cells_is_found_in_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    contrast = 0.04 * torch.randn(64, 64, generator=generator).abs()
    contrast[20:23, 30:33] += torch.linspace(0.7, 1.0, 9).reshape(3, 3)
    mask = binarise(rescale(clip_extremes(contrast, 0.5)), 0.5)
    assert mask[20:23, 30:33].all()
    assert mask.sum() == 9


def test_one_hot_cell_in_one_map_does_not_set_the_scale() -> None:
    maps = torch.zeros(10, 16, 16)
    maps[:, :8, :8] = 1
    maps[3, 15, 15] = 1000
    assert torch.equal(average_contrast(maps), maps[0])
    soft = rescale(clip_extremes(average_contrast(maps), 0.5))
    assert torch.equal(binarise(soft, 0.5), maps[0] > 0)
    assert binarise(rescale(clip_extremes(maps.mean(0), 0.0)), 0.5).sum() == 1


def test_average_is_over_the_maps_alone_and_leaves_out_the_highest_fifth() -> None:
    maps = torch.tensor([[[1.0, 2.0]], [[3.0, 6.0]]])
    assert average_contrast(maps).tolist() == [[2.0, 4.0]]
    five = torch.tensor([1.0, 100.0, 2.0, 3.0, 2.0]).reshape(5, 1, 1)
    assert average_contrast(five).tolist() == [[2.0]]


def test_rescaling_is_per_image() -> None:
    one, other = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[100.0, 500.0, 200.0]])
    assert rescale(torch.stack([one, other])).tolist() == [[[0.0, 0.5, 1.0]], [[0.0, 1.0, 0.25]]]


@pytest.mark.parametrize("level", [0.0, 0.3, 1e-38])
def test_flat_contrast_is_zero_everywhere_and_no_mask(level: float) -> None:
    soft = rescale(torch.full((2, 4, 4), level))
    assert not soft.any()
    assert not binarise(soft, 0.0).any()


def test_rescaling_survives_a_span_too_small_to_invert() -> None:
    soft = rescale(torch.tensor([[0.0, 1e-44]]))
    assert soft.isfinite().all()
    assert soft.amax() <= 1


def test_binarise_includes_the_threshold_itself() -> None:
    assert binarise(torch.tensor([[0.0, 0.49, 0.5, 1.0]]), 0.5).tolist() == [[False, False, True, True]]


def pure_noise(images: int, maps: int = 10, side: int = 32) -> torch.Tensor:
    return torch.randn(images, maps, side, side, generator=torch.Generator().manual_seed(0)).abs()


def test_significance_of_pure_noise_is_one() -> None:
    # 1024 cells, 10 maps: F has mean 9216/9214 and deviation 0.047
    ratio = significance(pure_noise(20))
    assert ratio.shape == (20,)
    assert ((ratio - 1).abs() < 0.2).all()
    assert abs(float(ratio.mean()) - 1) < 0.05


def test_significance_knows_no_scale() -> None:
    noise = pure_noise(1)
    torch.testing.assert_close(significance(noise * 1e-4), significance(noise), rtol=1e-4, atol=0)


def test_significance_of_a_planted_region_is_large() -> None:
    maps = pure_noise(2)
    maps[1, :, :8, :8] += 3
    still, planted = significance(maps).tolist()
    assert still < 1.2
    # a sixteenth of the cells 3 higher: 10 · 9 · (1/16)(15/16) / 0.363 = 14.5 above 1
    assert planted == pytest.approx(15.5, rel=0.1)


def test_significance_is_per_image() -> None:
    maps = pure_noise(3)
    maps[2] *= 1000
    together = significance(maps)
    for i in range(3):
        torch.testing.assert_close(significance(maps[i]), together[i])


def test_a_single_map_has_no_spread() -> None:
    assert significance(pure_noise(2, maps=1)).tolist() == [torch.inf, torch.inf]
    assert significance(torch.zeros(1, 1, 4, 4)).item() == 0


def test_texts_that_never_disagree_are_not_significant() -> None:
    assert significance(torch.zeros(2, 10, 4, 4)).tolist() == [0, 0]


def test_maps_that_agree_to_the_last_bit_are_beyond_doubt() -> None:
    one = pure_noise(1, maps=1, side=4)
    assert significance(one.expand(-1, 10, -1, -1)).item() > 1e6
