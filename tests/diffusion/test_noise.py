from __future__ import annotations

import torch

from diffedit_ray.diffusion.noise import row_noise


def test_same_seed_same_noise_however_many_maps() -> None:
    ten = row_noise(7, 10, (4, 8, 8))
    assert ten.shape == (10, 4, 8, 8)
    for maps in (1, 3, 10):
        assert torch.equal(row_noise(7, maps, (4, 8, 8)), ten[:maps])


def test_maps_and_seeds_differ() -> None:
    two = row_noise(7, 2, (4, 8, 8))
    assert not torch.equal(two[0], two[1])
    assert not torch.equal(row_noise(8, 2, (4, 8, 8)), two)


def test_global_random_state_neither_matters_nor_moves() -> None:
    torch.manual_seed(1)
    expected, state = row_noise(7, 2, (4, 8, 8)), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(row_noise(7, 2, (4, 8, 8)), expected)
    torch.manual_seed(1)
    row_noise(7, 2, (4, 8, 8))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_largest_seed_is_accepted() -> None:
    assert row_noise(2**63 - 1, 1, (4, 8, 8)).isfinite().all()


def test_noise_is_standard_normal() -> None:
    noise = row_noise(0, 10, (4, 64, 64))
    # 163 840 draws: the standard error of the mean is 0.0025, of the deviation 0.0017
    assert abs(float(noise.mean())) < 0.0125
    assert abs(float(noise.std()) - 1) < 0.009
