"""The embedded model's autoencoder: 128×128×3 pixels to 16×16×16 latents and back."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from diffedit_ray.demo.training.loop import Recipe, train

logger = logging.getLogger(__name__)

PATCH = 8
LATENT_CHANNELS = 16
POSTERIOR_STD = 0.03


def build_autoencoder(scaling_factor: float = 1.0) -> AutoencoderKL:
    """An untrained autoencoder that starts almost linear.

    Residual branches start at zero, upsampling convolutions at the identity and shortcuts
    orthogonal, so that from the first step colours find their way through.
    """
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=128,
        scaling_factor=scaling_factor,
        force_upcast=False,
    )
    for name, parameter in vae.named_parameters():
        if ".conv2." in name:
            nn.init.zeros_(parameter)
        elif "upsamplers" in name and parameter.ndim == 4:
            nn.init.dirac_(parameter)
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
        elif parameter.ndim == 4 and ("conv_shortcut" in name or name == "decoder.conv_in.weight"):
            nn.init.orthogonal_(parameter)
    return vae


def patch_components(images: Tensor) -> tuple[Tensor, Tensor]:
    """Principal components of 8×8 patches, as the weight and bias of a stride-8 convolution.

    Each code's standard deviation is the square root of its share of the first one's: whitening
    outright would give the faintest detail as much room in the latent as the colours.

    Args:
        images: (N, 3, H, W) in [-1, 1].

    Returns:
        Weight (16, 3, 8, 8) and bias (16,).
    """
    patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, 3 * PATCH * PATCH)
    mean = patches.mean(0)
    _, spread, axes = torch.linalg.svd(patches - mean, full_matrices=False)
    std = spread[:LATENT_CHANNELS] / len(patches) ** 0.5
    weight = axes[:LATENT_CHANNELS] / (std * std[0]).sqrt()[:, None]
    return weight.reshape(-1, 3, PATCH, PATCH), -(weight @ mean)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 on pixels plus half the L1 on their differences, which keeps edges."""
    dx = (output.diff(dim=3) - target.diff(dim=3)).abs().mean()
    dy = (output.diff(dim=2) - target.diff(dim=2)).abs().mean()
    return (output - target).abs().mean() + 0.5 * (dx + dy)


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Per-image PSNR in dB of (N, 3, H, W) pixels in [-1, 1]."""
    error = ((output.clamp(-1, 1) - target) / 2).square().flatten(1).mean(1)
    return -10 * error.clamp_min(1e-10).log10()


def train_autoencoder(
    images: Tensor, held_out: Tensor, *, workdir: Path, seed: int, steps: int, batch: int, device: torch.device
) -> AutoencoderKL:
    """Train on uint8 images (N, 3, 128, 128), reporting PSNR on `held_out` as it goes.

    The encoder is taught the linear code of `patch_components`: a deep VAE that has to find
    a code of its own at this downsampling spends its first hours doing so, and this one is
    known before training starts, so that the denoiser can be trained at the same time.
    """
    torch.manual_seed(seed)
    vae = build_autoencoder().to(device)
    to_unit = lambda x: x.to(device, torch.float32) / 127.5 - 1  # noqa: E731
    weight, bias = patch_components(to_unit(images[:512]))
    test = to_unit(held_out[:64])

    def step(index: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        x = to_unit(images[torch.randint(len(images), (batch,), generator=generator)])
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        code = F.conv2d(x, weight, bias, stride=PATCH)
        # the first quarter teaches the two halves apart; then the decoder learns the encoder's own code
        z = code if index < steps // 4 else posterior.mean
        z = z + POSTERIOR_STD * noise
        likeness = F.mse_loss(posterior.mean, code)
        spread = (posterior.logvar - 2 * math.log(POSTERIOR_STD)).square().mean()
        reconstruction = reconstruction_loss(vae.decode(z).sample, x)
        loss = reconstruction + likeness + 1e-3 * spread
        return {"loss": loss, "reconstruction": reconstruction, "likeness": likeness, "spread": spread}

    def report(index: int) -> None:
        mean = vae.encode(test).latent_dist.mean
        db = psnr(vae.decode(mean).sample, test)
        code = F.conv2d(test, weight, bias, stride=PATCH)
        linear = psnr(vae.decode(code).sample, test)
        stds = mean.std((0, 2, 3))
        logger.info(
            "autoencoder: step %d held-out PSNR %.2f dB (%.2f from the linear code), channel std %.2f to %.2f",
            index, db.mean(), linear.mean(), stds.min(), stds.max(),
        )  # fmt: skip

    recipe = Recipe(steps=steps, learning_rate=2e-3, ema=0.995)
    train("autoencoder", vae, step, recipe, workdir=workdir, seed=seed, on_checkpoint=report)
    return vae
