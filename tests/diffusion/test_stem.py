from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffedit_ray.demo import demo_model
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.diffusion.stem import repeated, share_stem, shares_stem
from tests.diffusion.helpers import as_diffusers_builds

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "block_out_channels": (16, 32),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


def build(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**SMALL, **changes}).eval().requires_grad_(False)


def batch(latents: int, texts: int, unet: UNet2DConditionModel) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(latents)
    side = unet.config.sample_size
    x = torch.randn(latents, unet.config.in_channels, side, side, generator=generator)
    times = torch.arange(latents) * 100 + 1
    return x, times, torch.randn(latents * texts, 7, unet.config.cross_attention_dim, generator=generator)


def one_by_one(unet: UNet2DConditionModel, x: Tensor, times: Tensor, embeddings: Tensor) -> Tensor:
    each = len(embeddings) // len(x)
    estimates: Tensor = unet(x.repeat_interleave(each, 0), times.repeat_interleave(each), embeddings).sample
    return estimates


@pytest.mark.parametrize("texts", [1, 2, 5])
@pytest.mark.parametrize(
    "changes",
    [
        {},  # the first block reads texts, as Stable Diffusion's does
        {"down_block_types": SMALL["down_block_types"][::-1], "up_block_types": SMALL["up_block_types"][::-1]},
        {"use_linear_projection": True, "transformer_layers_per_block": 2},
        {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},  # the middle alone does
        {"resnet_time_scale_shift": "scale_shift"},
    ],
    ids=["first", "last", "deep", "middle", "scale"],
)
def test_estimates_are_those_of_each_text_by_itself(changes: dict[str, Any], texts: int) -> None:
    unet = build(**changes)
    given = batch(3, texts, unet)
    expected = one_by_one(unet, *given)
    share_stem(unet)
    assert shares_stem(unet)
    torch.testing.assert_close(unet(*given).sample, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one_by_one(unet, *given), expected, rtol=1e-5, atol=1e-5)


def test_the_embedded_model_does_the_stem_once_a_latent() -> None:
    unet = LatentDiffusionModel.load(demo_model(), device="cpu").unet
    given = batch(2, 3, unet)
    seen: dict[str, int] = {}
    layers = {
        "first": unet.conv_in,
        "before": unet.down_blocks[1].resnets[0].conv1,
        "after": unet.down_blocks[1].attentions[0].proj_in,
        "last": unet.conv_out,
    }
    handles = [
        layer.register_forward_hook(lambda _, args, _output, name=name: seen.update({name: len(args[0])}))
        for name, layer in layers.items()
    ]
    with torch.inference_mode():
        estimates = unet(*given).sample
    for handle in handles:
        handle.remove()
    assert seen == {"first": 2, "before": 2, "after": 6, "last": 6}
    with torch.inference_mode():
        torch.testing.assert_close(estimates, one_by_one(unet, *given), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_class_embeds": 5},
        {"dual_cross_attention": True},
        {"mid_block_type": None},
        {"down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_unet_that_reads_texts_elsewhere_stays_as_it_is(changes: dict[str, Any]) -> None:
    unet = build(**changes)
    share_stem(unet)
    assert not shares_stem(unet)
    assert not any(module._forward_pre_hooks for module in unet.modules())


def test_a_model_repeats_latents_for_a_unet_that_shares_nothing(tiny_model: LatentDiffusionModel) -> None:
    x, times, _ = batch(3, 2, tiny_model.unet)
    embeddings = tiny_model.embed_prompts([f"thing {i}" for i in range(6)])
    shared = tiny_model.predict(x, times, embeddings)
    assert tiny_model.shares_stem
    model = dataclasses.replace(tiny_model, unet=as_diffusers_builds(tiny_model.unet))
    assert not model.shares_stem
    torch.testing.assert_close(model.predict(x, times, embeddings), shared, rtol=1e-5, atol=1e-5)


def test_compilers_see_through_it() -> None:
    unet = build()
    share_stem(unet)
    compiled = torch.compile(unet, backend="eager", fullgraph=True, dynamic=False)
    for texts in (1, 2):
        given = batch(2, texts, unet)
        torch.testing.assert_close(compiled(*given).sample, unet(*given).sample, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


def test_repeating_keeps_the_layout() -> None:
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    thrice = repeated(x, 6)
    assert thrice.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(thrice, x.repeat_interleave(3, 0))
    assert repeated(x, 2) is x
