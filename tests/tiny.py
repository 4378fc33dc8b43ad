"""Tiny random-weight checkpoints in the true format: everything but meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from diffedit_ray.demo.training.checkpoint import save_checkpoint
from diffedit_ray.demo.training.denoiser import build_scheduler, build_text_encoder, build_tokenizer


def save_tiny_checkpoint(folder: Path, seed: int = 0, **scheduler: Any) -> Path:
    """A two-level UNet on 4-channel latents at a quarter of 32×32 pixels, float32."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
        scaling_factor=0.5,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    kind = build_scheduler()
    kind = type(kind).from_config(kind.config, **scheduler)
    save_checkpoint(folder, vae, unet, build_text_encoder(tokenizer), tokenizer, kind, torch.float32)
    return folder
