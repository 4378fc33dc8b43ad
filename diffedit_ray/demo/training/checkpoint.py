"""Writes the trained parts as an ordinary diffusers folder."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer


def save_checkpoint(
    folder: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scheduler: DDIMScheduler,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write what `StableDiffusionPipeline.from_pretrained` reads: the text encoder in float32, the rest in `dtype`."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(dtype)
    # transformers loads a text encoder in the precision it was stored in, diffusers the UNet in float32: a checkpoint
    # that is to load unchanged must not have them differ
    pipeline.text_encoder.to(torch.float32)
    pipeline.save_pretrained(folder, safe_serialization=True)
