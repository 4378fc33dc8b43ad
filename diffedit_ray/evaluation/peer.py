"""diffusers' own DiffEdit, the peer that speed and masks are measured against."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, StableDiffusionDiffEditPipeline
from numpy.typing import NDArray
from PIL import Image

from diffedit_ray.diffusion.checkpoint import checkpoint_folder
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.settings import EditSettings


def build_peer(
    model: LatentDiffusionModel, scheduler: Mapping[str, Any] | None = None
) -> StableDiffusionDiffEditPipeline:
    """The pipeline around the same weights; it needs both DDIM schedulers, whatever the checkpoint names.

    Args:
        model: The weights.
        scheduler: The scheduler's configuration; none is that of the model's folder.
    """
    if scheduler is None:
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
    *,
    batch: int | None = None,
) -> list[NDArray[np.uint8]]:
    """Edit images as the pipeline's documentation shows: three calls for each, one image after another.

    Args:
        pipeline: From `build_peer`.
        images: (H, W, 3) each, at a size the model accepts; all at the same if `batch` is given.
        references, queries, seeds: One for each image.
        settings: Steps, guidance, maps, mask strength and encoding ratio; the pipeline knows no others.
        batch: Images a call gets as a list; none is one by one. In a list one generator, seeded with the first
            row's seed, serves all, since it wants one for each of a row's maps otherwise and then encodes them
            one by one; and masks depend on the other images of the list.
    """
    edited: list[NDArray[np.uint8]] = []
    for start in range(0, len(images), batch or 1):
        part = slice(start, start + (batch or 1))
        pictures: Any = [Image.fromarray(pixels) for pixels in images[part]]
        sources: Any = list(references[part])
        targets: Any = list(queries[part])
        if batch is None:
            (pictures,), (sources,), (targets,) = pictures, sources, targets
        edited += _edit_together(pipeline, pictures, sources, targets, seeds[start], settings)
    return edited


def _edit_together(
    pipeline: StableDiffusionDiffEditPipeline, image: Any, source: Any, target: Any, seed: int, settings: EditSettings
) -> list[NDArray[np.uint8]]:
    """One image or a list of them through the pipeline's three calls."""
    generator = torch.Generator().manual_seed(seed)
    common: dict[str, Any] = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance_scale}
    strength = {"inpaint_strength": settings.encoding_ratio}
    mask = pipeline.generate_mask(
        image=image,
        source_prompt=source,
        target_prompt=target,
        num_maps_per_mask=settings.mask_maps,
        mask_encode_strength=settings.mask_strength,
        generator=generator,
        **common,
    )
    latents = pipeline.invert(prompt=source, image=image, generator=generator, **strength, **common).latents
    result = pipeline(prompt=target, mask_image=mask, image_latents=latents, **strength, **common)
    return [np.asarray(picture) for picture in result.images]
