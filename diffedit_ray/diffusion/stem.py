"""What a UNet makes of a latent before it first reads a text: once for all texts."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D"}
"""Those that read texts in `Transformer2DModel` and nowhere else."""


def share_stem(unet: Any) -> None:
    """Let `unet` be called with fewer latents than embeddings: those of one latent lie one after another.

    What comes before the first transformer knows no text: a tenth of the embedded UNet, a fiftieth of Stable Diffusion
    1.5's. There the batch is one of latents, from there on one of embeddings; a skip connection that crosses the border
    is repeated where it is used.
    Of a UNet that reads texts elsewhere nothing is shared.

    Args:
        unet: A `UNet2DConditionModel`. With as many latents as embeddings nothing changes.
    """
    config = unet.config
    kinds = {*config["down_block_types"], config["mid_block_type"], *config["up_block_types"]}
    elsewhere = ("class_embed_type", "num_class_embeds", "addition_embed_type", "dual_cross_attention")
    if not kinds <= BLOCKS or any(config[name] for name in elsewhere):
        return
    for module in unet.modules():
        if isinstance(module, Transformer2DModel):
            module.register_forward_pre_hook(_a_latent_for_each_text, with_kwargs=True)
        elif isinstance(module, ResnetBlock2D):
            module.register_forward_pre_hook(_a_time_for_each_latent)
    for block in unet.up_blocks:
        block.register_forward_pre_hook(_a_skip_for_each_latent, with_kwargs=True)
    unet.stem_is_shared = True


def shares_stem(unet: Any) -> bool:
    """Whether `share_stem` has been here."""
    return getattr(unet, "stem_is_shared", False)


def repeated(x: Tensor, count: int) -> Tensor:
    """(B, …) -> (count, …), every sample as many times in a row; its layout is kept."""
    return x if len(x) == count else x[torch.arange(count, device=x.device) // (count // len(x))]


def _a_latent_for_each_text(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return (repeated(args[0], len(kwargs["encoder_hidden_states"])), *args[1:]), kwargs


def _a_time_for_each_latent(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[0], repeated(args[1], len(args[0])), *args[2:]


def _a_skip_for_each_latent(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    count = len(kwargs["hidden_states"])
    skips = tuple(repeated(skip, count) for skip in kwargs["res_hidden_states_tuple"])
    return args, {**kwargs, "res_hidden_states_tuple": skips}
