"""What several of these files need: pictures, and a look over the UNet's shoulder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.settings import EditSettings

HORSE, ZEBRA, PEAR = "a horse on grass", "a zebra on grass", "a pear on wood"

SHORT = EditSettings(steps=10, mask_maps=4, mask_significance=0)
"""The method at a tenth of its cost. A random-weight model has no significant opinion, so the gate is off."""


def smooth_image(width: int = 32, height: int = 32, seed: int = 0, channels: int = 3) -> NDArray[np.uint8]:
    """A random picture with large soft shapes and fine grain, as photos have: (height, width, channels) uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 7, channels), dtype=np.uint8)
    planes = [
        Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)
    ]
    grain = rng.normal(0, 4, (height, width, channels))
    return (np.stack([np.asarray(p) for p in planes], -1) + grain).clip(0, 255).round().astype(np.uint8)


def latents_of(model: LatentDiffusionModel, image: NDArray[np.uint8]) -> Tensor:
    """x0 of one picture at the model's own size: (1, C, h, w)."""
    return model.encode_images(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1)


def as_diffusers_builds(network: Any) -> Any:
    """The network's architecture anew, without what we have replaced in it, with its weights."""
    fresh = type(network).from_config(network.config).eval().requires_grad_(False)
    fresh.load_state_dict(network.state_dict())
    return fresh


@dataclass
class Seen:
    """Everything that went through a UNet, call by call; `embeddings` are (samples, tokens, width).

    Of a latent that was given once for several texts, `latents` has as many copies.
    """

    latents: list[Tensor] = field(default_factory=list)
    embeddings: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    @property
    def evaluations(self) -> int:
        """Samples, not calls: one call on a batch of 8 is 8."""
        return sum(len(x) for x in self.latents)


@contextmanager
def watched(unet: torch.nn.Module) -> Iterator[Seen]:
    """Record what `unet` is given and gives back inside the block."""
    seen = Seen()

    def record(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        embeddings = kwargs.get("encoder_hidden_states", args[-1])
        seen.latents.append(args[0].repeat_interleave(len(embeddings) // len(args[0]), 0))
        seen.embeddings.append(embeddings.clone())
        seen.outputs.append(output.sample.clone())

    handle = unet.register_forward_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
