from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from diffedit_ray.demo import demo_model
from diffedit_ray.diffusion.layers import NarrowGroupNorm, SplitGEGLU, vectorise
from diffedit_ray.diffusion.model import LatentDiffusionModel
from tests.diffusion.helpers import as_diffusers_builds


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    torch.manual_seed(channels)
    norm = nn.GroupNorm(groups, channels).requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def activations(*shape: int) -> Tensor:
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) + 1
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


@pytest.mark.parametrize(
    "shape", [(3, 64, 16, 16), (1, 64, 5, 7), (2, 64, 32, 32), (2, 64, 1, 1), (3, 64, 20)], ids=str
)
def test_a_narrow_group_norm_is_the_group_norm(shape: tuple[int, ...]) -> None:
    norm, x = group_norm(16, 64), activations(*shape)
    normed = NarrowGroupNorm(norm)(x)
    truth = F.group_norm(x.double(), 16, norm.weight.double(), norm.bias.double(), norm.eps)
    assert float((normed - truth).abs().max()) < 2e-5
    assert normed.is_contiguous(memory_format=torch.channels_last) or x.ndim == 3


def test_equal_pixels_are_normed_to_the_bias() -> None:
    norm = group_norm(16, 64)
    normed = NarrowGroupNorm(norm)(torch.full((1, 64, 8, 8), 1e3).contiguous(memory_format=torch.channels_last))
    assert torch.isfinite(normed).all()
    assert float((normed - norm.bias.view(1, 64, 1, 1)).abs().max()) < 0.1


def test_it_is_for_groups_narrower_than_a_register() -> None:
    assert NarrowGroupNorm.suits(group_norm(16, 64))
    assert not NarrowGroupNorm.suits(group_norm(16, 128))
    assert not NarrowGroupNorm.suits(nn.GroupNorm(16, 64, affine=False))
    assert not NarrowGroupNorm.suits(group_norm(16, 64).bfloat16())


@pytest.mark.parametrize("bias", [True, False])
def test_a_split_unit_is_the_unit(bias: bool) -> None:
    torch.manual_seed(0)
    unit, x = GEGLU(12, 20, bias=bias).requires_grad_(False), torch.randn(3, 5, 12)
    torch.testing.assert_close(SplitGEGLU(unit)(x), unit(x), rtol=1e-5, atol=1e-6)


def test_a_network_keeps_its_weights_and_its_results() -> None:
    unet = LatentDiffusionModel.load(demo_model(), device="cpu").unet
    fresh = as_diffusers_builds(unet).to(memory_format=torch.channels_last)
    ours = copy.deepcopy(fresh)
    vectorise(ours)
    kinds = [type(module) for module in ours.modules()]
    assert kinds.count(NarrowGroupNorm) == 6
    assert kinds.count(SplitGEGLU) == 7
    assert list(ours.state_dict()) == list(fresh.state_dict())
    assert not any(module.training for module in ours.modules())
    generator = torch.Generator().manual_seed(0)
    x, texts = torch.randn(3, 16, 16, 16, generator=generator), torch.randn(3, 16, 128, generator=generator)
    with torch.inference_mode():
        estimates = [network(x, 481, texts).sample for network in (ours, fresh)]
    torch.testing.assert_close(*estimates, rtol=0, atol=1e-4)


def test_other_precisions_stay() -> None:
    network = nn.Sequential(group_norm(16, 64), GEGLU(8, 8)).bfloat16()
    vectorise(network)
    assert [type(layer) for layer in network] == [nn.GroupNorm, GEGLU]
