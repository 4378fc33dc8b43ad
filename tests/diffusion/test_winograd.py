from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from diffedit_ray.demo import demo_model
from diffedit_ray.diffusion import winograd
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.diffusion.winograd import (
    PLAIN,
    UPSAMPLED,
    WinogradConv2d,
    WinogradUpsample2D,
    multiply_less,
    saves,
)
from tests.diffusion.helpers import as_diffusers_builds


def convolution(ins: int = 64, outs: int = 48, size: int = 3, **options: Any) -> nn.Conv2d:
    torch.manual_seed(ins + outs)
    return nn.Conv2d(ins, outs, size, **{"padding": 1, **options}).requires_grad_(False)


def pictures(*shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return x.contiguous(memory_format=torch.channels_last)


def upsample(channels: int = 64, outs: int = 48, **options: Any) -> Upsample2D:
    torch.manual_seed(channels + outs)
    return Upsample2D(channels, **{"use_conv": True, "out_channels": outs, **options}).requires_grad_(False)


def truth(layer: nn.Conv2d, x: Tensor) -> Tensor:
    assert layer.bias is not None
    return F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)


@pytest.fixture(scope="module")
def model() -> LatentDiffusionModel:
    return LatentDiffusionModel.load(demo_model(), device="cpu")


def test_in_one_dimension_four_outputs_cost_six_products() -> None:
    d = torch.arange(6, dtype=torch.float64) ** 2 - 7
    g = torch.tensor([3, -5, 2], dtype=torch.float64)
    direct = torch.stack([(d[i : i + 3] * g).sum() for i in range(4)])
    ours = PLAIN.output.double() @ ((PLAIN.weight @ g) * (PLAIN.input.double() @ d))
    torch.testing.assert_close(ours, direct, rtol=1e-12, atol=1e-12)


def test_of_pixels_that_come_twice_four_outputs_cost_five() -> None:
    d, g = torch.tensor([-7, 3, 11, 2], dtype=torch.float64), torch.tensor([3, -5, 2], dtype=torch.float64)
    twice = d.repeat_interleave(2)[1:-1]  # a tile begins with the second of a pair
    direct = torch.stack([(twice[i : i + 3] * g).sum() for i in range(4)])
    products = (UPSAMPLED.weight @ g) * (UPSAMPLED.input.double() @ d)
    assert len(products) == 5
    torch.testing.assert_close(UPSAMPLED.output.double() @ products, direct, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 64, 4, 4),
        (3, 64, 16, 16),
        (2, 64, 12, 8),  # not square
        (2, 64, 7, 15),  # tiles reach beyond it
        (70, 64, 4, 4),  # more than are transformed at once, and a rest
        (5, 64, 16, 16),
        (2, 64, 64, 48),  # one picture has more
    ],
    ids=str,
)
def test_it_is_the_convolution(shape: tuple[int, ...]) -> None:
    layer, x = convolution(), pictures(*shape)
    convolved = WinogradConv2d(layer)(x)
    assert convolved.shape == (shape[0], 48, *shape[2:])
    assert float((convolved - truth(layer, x)).abs().max()) < 2e-5  # float32 has 6e-8, pixels are about 1


@pytest.mark.parametrize(
    "shape",
    [(1, 64, 2, 2), (3, 64, 8, 8), (2, 64, 6, 4), (2, 64, 5, 7), (70, 64, 4, 4), (2, 64, 40, 24), (66, 64, 2, 2)],
    ids=str,
)
def test_it_is_the_convolution_of_a_picture_twice_as_large(shape: tuple[int, ...]) -> None:
    layer, x = upsample(), pictures(*shape)
    enlarged = WinogradUpsample2D(layer)(x)
    assert enlarged.shape == (shape[0], 48, 2 * shape[2], 2 * shape[3])
    twice = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert float((enlarged - truth(layer.conv, twice)).abs().max()) < 5e-5  # equal pixels add up to more


@pytest.mark.parametrize("size", [(16, 16), (15, 16), (15, 15), (24, 8)])
def test_an_enlarged_picture_has_the_size_that_is_asked_for(size: tuple[int, int]) -> None:
    layer, x = upsample(), pictures(2, 64, 8, 8)
    enlarged = WinogradUpsample2D(layer)(x, torch.Size(size))
    assert enlarged.shape == (2, 48, *size)
    torch.testing.assert_close(enlarged, layer(x, size), rtol=0, atol=5e-5)


@pytest.mark.parametrize("way", [WinogradConv2d(convolution()), WinogradUpsample2D(upsample())])
def test_a_sample_does_not_depend_on_those_beside_it(way: nn.Module) -> None:
    x = pictures(9, 64, 16, 16)
    torch.testing.assert_close(way(x)[7:8], way(x[7:8]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("side", [1, 2, 5])
def test_where_tiles_would_mostly_lie_outside_it_convolves_directly(side: int) -> None:
    layer, x = convolution(), pictures(2, 64, side, side)
    assert torch.equal(WinogradConv2d(layer)(x), layer(x))


@pytest.mark.parametrize("way", [WinogradConv2d(convolution()), WinogradUpsample2D(upsample())])
@pytest.mark.parametrize("side", [8, 7])
def test_compilers_take_it_as_one_operation(way: nn.Module, side: int) -> None:
    x = pictures(3, 64, side, side)
    compiled = torch.compile(way, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), way(x), rtol=0, atol=1e-6)
    torch.compiler.reset()


def test_it_holds_the_same_parameters_and_stores_no_others() -> None:
    layer, enlarging = convolution(), upsample()
    ours, larger = WinogradConv2d(layer), WinogradUpsample2D(enlarging)
    assert ours.weight is layer.weight
    assert ours.bias is layer.bias
    assert set(ours.state_dict()) == {"weight", "bias"}
    assert larger.conv is enlarging.conv
    assert set(larger.state_dict()) == {"conv.weight", "conv.bias"}


@pytest.mark.parametrize(
    ("layer", "wanted"),
    [
        (convolution(), True),
        (convolution(size=1, padding=0), False),
        (convolution(stride=2), False),
        (convolution(dilation=2), False),
        (convolution(64, 64, groups=2), False),
        (convolution(padding_mode="circular"), False),
        (convolution(padding=0), False),
        (convolution(bias=False), False),
        (convolution(16, 64), False),
        (convolution(64, 16), False),
        (convolution(640, 640), True),
        (convolution(1280, 640, device="meta"), False),  # no room for its weights, either
        (convolution(device="meta"), False),
        (convolution().bfloat16(), False),
    ],
    ids=lambda value: value.extra_repr() if isinstance(value, nn.Module) else "",
)
def test_it_knows_which_layers_it_is_for(layer: nn.Conv2d, wanted: bool) -> None:
    assert saves(layer) == wanted


@pytest.mark.parametrize(
    ("layer", "wanted"),
    [
        (upsample(), True),
        (upsample(use_conv=False, out_channels=64), False),
        (upsample(use_conv=False, use_conv_transpose=True), False),
        (upsample(interpolate=False), False),
        (upsample(norm_type="ln_norm", elementwise_affine=True, eps=1e-5), False),
        (upsample(16), False),
        (upsample(bias=False), False),
        (upsample(name="other"), False),
    ],
)
def test_it_knows_which_enlarging_layers_it_is_for(layer: Upsample2D, wanted: bool) -> None:
    assert WinogradUpsample2D.saves(layer) == wanted


def test_a_layer_with_too_many_weights_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = convolution()
    monkeypatch.setattr(winograd, "MOST_WEIGHTS", 36 * 64 * 48 - 1)
    assert not saves(layer)


def test_a_network_keeps_its_weights_and_its_results(model: LatentDiffusionModel) -> None:
    fresh = as_diffusers_builds(model.unet)
    ours = copy.deepcopy(fresh)
    multiply_less(ours)
    replaced = [module for module in ours.modules() if isinstance(module, (WinogradConv2d, WinogradUpsample2D))]
    assert [type(module) for module in replaced].count(WinogradUpsample2D) == 2
    assert len(replaced) == 24
    assert list(ours.state_dict()) == list(fresh.state_dict())
    assert not any(module.training for module in replaced)
    x, texts = pictures(5, 16, 16, 16), model.embed_prompts(["a horse on grass"]).expand(5, -1, -1)
    with torch.inference_mode():
        estimates = [network(x, 481, texts).sample for network in (ours, fresh)]
    torch.testing.assert_close(*estimates, rtol=0, atol=1e-4)
