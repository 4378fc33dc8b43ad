"""diffusers' own DiffEdit, the peer that speed and masks are measured against."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, StableDiffusionDiffEditPipeline
from numpy.typing import NDArray
from PIL import Image

from diffedit_ray.diffusion.checkpoint import checkpoint_folder
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.settings import EditSettings


def build_peer(model: LatentDiffusionModel) -> StableDiffusionDiffEditPipeline:
    """The pipeline around the same weights; it needs both DDIM schedulers, whatever the checkpoint names."""
    scheduler = json.loads((checkpoint_folder(model.source) / "scheduler" / "scheduler_config.json").read_text())
    pipeline = StableDiffusionDiffEditPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=DDIMScheduler.from_config(scheduler),
        inverse_scheduler=DDIMInverseScheduler.from_config(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def edit_with_peer(
    pipeline: StableDiffusionDiffEditPipeline,
    images: Sequence[NDArray[np.uint8]],
    references: Sequence[str],
    queries: Sequence[str],
    seeds: Sequence[int],
    settings: EditSettings,
) -> list[NDArray[np.uint8]]:
    """Edit one image after another as the pipeline's documentation shows: three calls for each.

    Args:
        pipeline: From `build_peer`.
        images: (H, W, 3) each, at a size the model accepts.
        references, queries, seeds: One for each image.
        settings: Steps, guidance, maps, mask strength and encoding ratio; the pipeline knows no others.
    """
    common: dict[str, Any] = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance_scale}
    strength = {"inpaint_strength": settings.encoding_ratio}
    edited = []
    for pixels, reference, query, seed in zip(images, references, queries, seeds, strict=True):
        image, generator = Image.fromarray(pixels), torch.Generator().manual_seed(seed)
        mask = pipeline.generate_mask(
            image=image,
            source_prompt=reference,
            target_prompt=query,
            num_maps_per_mask=settings.mask_maps,
            mask_encode_strength=settings.mask_strength,
            generator=generator,
            **common,
        )
        latents = pipeline.invert(prompt=reference, image=image, generator=generator, **strength, **common).latents
        result = pipeline(prompt=query, mask_image=mask, image_latents=latents, **strength, **common)
        edited.append(np.asarray(result.images[0]))
    return edited
