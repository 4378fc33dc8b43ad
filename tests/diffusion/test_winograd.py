from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffedit_ray.demo import demo_model
from diffedit_ray.diffusion import winograd
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.diffusion.winograd import INPUT, OUTPUT, WEIGHT, WinogradConv2d, multiply_less


def convolution(ins: int = 64, outs: int = 48, size: int = 3, **options: Any) -> nn.Conv2d:
    torch.manual_seed(ins + outs)
    return nn.Conv2d(ins, outs, size, **{"padding": 1, **options}).requires_grad_(False)


def pictures(*shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return x.contiguous(memory_format=torch.channels_last)


def truth(layer: nn.Conv2d, x: Tensor) -> Tensor:
    assert layer.bias is not None
    return F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)


@pytest.fixture
def avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


@pytest.fixture(scope="module")
def model() -> LatentDiffusionModel:
    return LatentDiffusionModel.load(demo_model(), device="cpu")


def test_in_one_dimension_four_outputs_cost_six_products() -> None:
    d = torch.arange(6, dtype=torch.float64) ** 2 - 7
    g = torch.tensor([3, -5, 2], dtype=torch.float64)
    direct = torch.stack([(d[i : i + 3] * g).sum() for i in range(4)])
    torch.testing.assert_close(OUTPUT.double() @ ((WEIGHT @ g) * (INPUT.double() @ d)), direct, rtol=1e-12, atol=1e-12)


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


def test_a_sample_does_not_depend_on_those_beside_it() -> None:
    layer, x = WinogradConv2d(convolution()), pictures(9, 64, 16, 16)
    torch.testing.assert_close(layer(x)[7:8], layer(x[7:8]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("side", [1, 2, 5])
def test_where_tiles_would_mostly_lie_outside_it_convolves_directly(side: int) -> None:
    layer, x = convolution(), pictures(2, 64, side, side)
    assert torch.equal(WinogradConv2d(layer)(x), layer(x))


def test_compilers_take_it_as_one_operation() -> None:
    layer, x = WinogradConv2d(convolution()), pictures(3, 64, 8, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-6)
    torch.compiler.reset()


def test_it_holds_the_same_parameters_and_stores_no_others() -> None:
    layer = convolution()
    ours = WinogradConv2d(layer)
    assert ours.weight is layer.weight
    assert ours.bias is layer.bias
    assert set(ours.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize(
    ("layer", "saves"),
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
def test_it_knows_which_layers_it_is_for(layer: nn.Conv2d, saves: bool) -> None:
    assert WinogradConv2d.saves(layer) == saves


def test_a_layer_with_too_many_weights_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = convolution()
    monkeypatch.setattr(winograd, "MOST_WEIGHTS", 36 * 64 * 48 - 1)
    assert not WinogradConv2d.saves(layer)


@pytest.mark.usefixtures("avx2")
def test_a_network_keeps_its_weights_and_its_results(model: LatentDiffusionModel) -> None:
    fresh = type(model.unet).from_config(model.unet.config).eval().requires_grad_(False)
    fresh.load_state_dict(model.unet.state_dict())
    ours = copy.deepcopy(fresh)
    multiply_less(ours)
    replaced = [module for module in ours.modules() if isinstance(module, WinogradConv2d)]
    assert len(replaced) == 24
    assert list(ours.state_dict()) == list(fresh.state_dict())
    assert not any(module.training for module in replaced)
    x, texts = pictures(5, 16, 16, 16), model.embed_prompts(["a horse on grass"]).expand(5, -1, -1)
    with torch.inference_mode():
        estimates = [network(x, 481, texts).sample for network in (ours, fresh)]
    torch.testing.assert_close(*estimates, rtol=0, atol=1e-4)


def test_a_model_on_a_cpu_multiplies_less_where_that_has_been_measured(model: LatentDiffusionModel) -> None:
    measured = torch.backends.cpu.get_cpu_capability() == "AVX2"
    assert any(isinstance(module, WinogradConv2d) for module in model.unet.modules()) == measured


@pytest.mark.parametrize("capability", ["AVX512", "DEFAULT"])
def test_other_processors_convolve_directly(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    network = nn.Sequential(convolution(64, 64))
    multiply_less(network)
    assert type(network[0]) is nn.Conv2d
