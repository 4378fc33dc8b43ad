"""Stable Diffusion's architectures at full size with random weights: for timing, where no checkpoint is at hand.

The shapes are those of the published checkpoints' configurations. The pictures that come out mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from diffedit_ray.demo.training.denoiser import build_scheduler, build_tokenizer
from diffedit_ray.diffusion.model import LatentDiffusionModel, prepare, resolve_device, resolve_dtype
from diffedit_ray.diffusion.schedule import NoiseSchedule

TOKENS = 77
VOCABULARY = 49408

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPEN_CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
OPEN_CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}
XL_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")


class TimedXLUNet(UNet2DConditionModel):
    """SDXL's UNet under a call without SDXL's extra inputs: size and pooled text are zeros. For timing only."""

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **options: Any) -> Any:
        """As `UNet2DConditionModel.forward`."""
        pooled = self.config["projection_class_embeddings_input_dim"] - 6 * self.config["addition_time_embed_dim"]
        added = {"text_embeds": sample.new_zeros(len(sample), pooled), "time_ids": sample.new_zeros(len(sample), 6)}
        return super().forward(sample, timestep, encoder_hidden_states, added_cond_kwargs=added, **options)


class TwoTextEncoders(CLIPTextModel):
    """SDXL's two text encoders as one, their embeddings side by side. For timing only: both read the same tokens."""

    def __init__(self, config: CLIPTextConfig, second: CLIPTextConfig) -> None:
        super().__init__(config)
        self.second = CLIPTextModel(second)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> tuple[Tensor]:
        """(B, tokens) ids -> (B, tokens, the sum of both widths)."""
        states = [super().forward(input_ids, attention_mask)[0], self.second(input_ids, attention_mask)[0]]
        return (torch.cat(states, -1),)


@dataclass(frozen=True)
class Architecture:
    """What tells one of the published models from the others.

    Attributes:
        unet: Of `UNet2DConditionModel`, where it differs from the class's own.
        native: The model's side in latent cells.
        scaling_factor: Of the autoencoder.
        text: The configuration of each text encoder.
        scheduler: Where it differs from Stable Diffusion 1's.
    """

    unet: dict[str, Any]
    native: int
    scaling_factor: float
    text: Sequence[dict[str, Any]]
    scheduler: dict[str, Any]


ARCHITECTURES = {
    "sd15": Architecture(
        unet={"attention_head_dim": 8, "cross_attention_dim": 768},
        native=64,
        scaling_factor=0.18215,
        text=(CLIP_L,),
        scheduler={},
    ),
    "sd21": Architecture(
        unet={
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        native=96,
        scaling_factor=0.18215,
        text=(OPEN_CLIP_H,),
        scheduler={"prediction_type": "v_prediction"},
    ),
    "sdxl": Architecture(
        unet={
            "block_out_channels": (320, 640, 1280),
            "down_block_types": XL_BLOCKS,
            "up_block_types": tuple(name.replace("Down", "Up") for name in XL_BLOCKS[::-1]),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        native=128,
        scaling_factor=0.13025,
        text=(CLIP_L, OPEN_CLIP_BIG_G),
        scheduler={},
    ),
}

SHRINK = 10
"""How many times narrower a shrunken UNet is."""


@dataclass(frozen=True)
class Parts:
    """A checkpoint's networks and its scheduler's configuration."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    scheduler: dict[str, Any]


def build_parts(name: str, *, shrunken: bool = False) -> Parts:
    """The networks of an architecture on torch's default device, "meta" included.

    Args:
        name: A key of `ARCHITECTURES`.
        shrunken: A tenth of the UNet's width, at most two transformers a block and an eighth of the side, to run the
            same code on a small machine.
    """
    a = ARCHITECTURES[name]
    unet = {"sample_size": a.native, "block_out_channels": (320, 640, 1280, 1280), **a.unet}
    vae: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32}
    text = [dict(config) for config in a.text]
    if shrunken:
        unet["sample_size"] //= 8
        unet["block_out_channels"] = tuple(width // SHRINK for width in unet["block_out_channels"])
        if "transformer_layers_per_block" in unet:
            unet["transformer_layers_per_block"] = tuple(min(2, n) for n in unet["transformer_layers_per_block"])
        if isinstance(unet["attention_head_dim"], tuple):
            unet["attention_head_dim"] = tuple(max(1, heads // SHRINK) for heads in unet["attention_head_dim"])
        vae = {"block_out_channels": (8, 16, 32, 32), "norm_num_groups": 8}
        for config in text:
            config.update(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        unet["cross_attention_dim"] = sum(config["hidden_size"] for config in text)
    stages = len(vae["block_out_channels"])
    encoders = [CLIPTextConfig(vocab_size=VOCABULARY, max_position_embeddings=TOKENS, **config) for config in text]
    kind = TimedXLUNet if "addition_embed_type" in unet else UNet2DConditionModel
    return Parts(
        unet=kind(**unet),
        vae=AutoencoderKL(
            **vae,
            down_block_types=("DownEncoderBlock2D",) * stages,
            up_block_types=("UpDecoderBlock2D",) * stages,
            layers_per_block=2,
            latent_channels=4,
            sample_size=unet["sample_size"] * 8,
            scaling_factor=a.scaling_factor,
        ),
        text_encoder=CLIPTextModel(encoders[0]) if len(encoders) == 1 else TwoTextEncoders(*encoders),
        scheduler={**build_scheduler().config, **a.scheduler},
    )


def random_model(
    name: str, device: str = "auto", dtype: str = "auto", *, shrunken: bool = False
) -> tuple[LatentDiffusionModel, dict[str, Any]]:
    """An architecture with random weights, and its scheduler's configuration.

    Args:
        name: A key of `ARCHITECTURES`.
        device, dtype: As `LatentDiffusionModel.load`.
        shrunken: As `build_parts`.

    Raises:
        ModelError: There is no such device.
    """
    target = resolve_device(device)
    precision = resolve_dtype(dtype, target)
    with torch.device("meta"):
        parts = build_parts(name, shrunken=shrunken)
    for network in (parts.unet, parts.vae, parts.text_encoder):
        # the library's own `to` warns of layers to be kept in float32, of which these networks have none
        nn.Module.to(network, precision)
        fill(network.to_empty(device=target))
        network.eval().requires_grad_(False)
    prepare(parts.unet, parts.vae, target)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = TOKENS
    model = LatentDiffusionModel(
        vae=parts.vae,
        unet=parts.unet,
        text_encoder=parts.text_encoder,
        tokenizer=tokenizer,
        schedule=NoiseSchedule.from_config(parts.scheduler),
        device=target,
        dtype=precision,
        source=f"random weights in {name}'s shapes" + (f", 1/{SHRINK} of the width" if shrunken else ""),
    )
    return model, parts.scheduler


@torch.no_grad()
def fill(network: nn.Module) -> None:
    """Give every weight a value that keeps activations of the order of one: a chip's clock depends on its numbers."""
    for name, weight in network.named_parameters():
        if weight.ndim < 2:
            weight.fill_(float(name.endswith("weight")))
        else:
            weight.normal_(0, weight[0].numel() ** -0.5)
    for name, buffer in network.named_buffers():
        if not name.endswith("position_ids"):
            raise NotImplementedError(f"{name}: a buffer that nobody fills here")
        buffer.copy_(torch.arange(buffer.shape[-1], device=buffer.device).expand_as(buffer))
