"""The embedded model's autoencoder: 128×128×3 pixels to 16×16×16 latents and back.

Its latent is a linear code, the principal components of 8×8 patches. The encoder computes
it exactly, so it is written down rather than trained, and the denoiser can be trained at
the same time as the decoder. The decoder starts as the best linear one and is trained from
there: at this downsampling, an autoencoder that starts from noise spends its first hours
finding any code at all.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

from diffedit_ray.demo.training.loop import Recipe, TrainingRun, train
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.evaluation.metrics import psnr

logger = logging.getLogger(__name__)

LATENT_CHANNELS = 16
POSTERIOR_STD = 0.03
GROUPS = 4
_PAIRS = {2: 12, 4: 32, 8: LATENT_CHANNELS}  # patch side -> components that pass through that level
_LOUD = 50.0


@dataclass(frozen=True)
class PatchCode:
    """A linear code of non-overlapping patches: ``F.conv2d(x, weight, bias, stride=side)``.

    Attributes:
        side: Of a patch, pixels.
        weight: (components, 3, side, side).
        bias: (components,).
        inverse: (components, 3, side, side), patch = Σ code · inverse + mean.
        mean: (3, side, side).
    """

    side: int
    weight: Tensor
    bias: Tensor
    inverse: Tensor
    mean: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, components, H/side, W/side)."""
        return F.conv2d(images, self.weight, self.bias, stride=self.side)


def patch_code(images: Tensor, side: int, components: int, flatten: float = 0.0) -> PatchCode:
    """The first principal components of (N, 3, H, W) images' patches.

    Args:
        images: In [-1, 1].
        side: Of a patch.
        components: Kept.
        flatten: Component k's standard deviation is divided by its ``flatten``-th power: 0 keeps
            the spread the components have, 1 whitens them.
    """
    patches = F.unfold(images, side, stride=side).transpose(1, 2).reshape(-1, 3 * side * side)
    mean = patches.mean(0)
    _, spread, axes = torch.linalg.svd(patches - mean, full_matrices=False)
    std = spread[:components] / len(patches) ** 0.5
    scale = std**flatten * std[0] ** (0.5 if flatten else 0.0)
    weight = axes[:components] / scale[:, None]
    shape = (components, 3, side, side)
    inverse = (axes[:components] * scale[:, None]).reshape(shape)
    return PatchCode(side, weight.reshape(shape), -(weight @ mean), inverse, mean.reshape(shape[1:]))


def latent_code(images: Tensor) -> PatchCode:
    """The latent: half-way between the components' own spread and whitened.

    Whitened outright, the faintest detail would get as much of the latent as the colours;
    not at all, and it would drown in the noise.
    """
    return patch_code(images, 8, LATENT_CHANNELS, flatten=0.5)


def build_autoencoder(scaling_factor: float) -> AutoencoderKL:
    """An autoencoder of the shape we train, its weights not yet set."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=GROUPS,
        mid_block_add_attention=False,
        sample_size=128,
        scaling_factor=scaling_factor,
        force_upcast=False,
    )


@torch.no_grad()
def linear_autoencoder(images: Tensor) -> tuple[AutoencoderKL, PatchCode]:
    """An autoencoder whose encoder is `latent_code` and whose decoder is linear, fitted to `images`.

    Args:
        images: (N, 3, 128, 128) in [-1, 1].
    """
    code = latent_code(images)
    vae = build_autoencoder(1 / float(code(images).square().mean().sqrt()))
    for name, parameter in vae.named_parameters():
        if ".conv2." in name or "conv_shortcut" in name or name.endswith("conv_in.weight"):
            nn.init.zeros_(parameter)  # residual branches are silent at first
        if "quant_conv" in name or ("bias" in name and "norm" not in name):
            nn.init.zeros_(parameter)
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        nn.init.dirac_(convolution.weight)
    middle = patch_code(images, 4, _PAIRS[4])
    _write_encoder(vae.encoder, code, middle)
    _fit_decoder(vae.decoder, code, middle, images[:128])
    return vae, code


def _write_encoder(encoder: Any, code: PatchCode, middle: PatchCode) -> None:
    """Patches of 2, 4 and 8 pixels in turn, each gathered by one strided convolution."""
    nn.init.dirac_(encoder.conv_in.weight)
    blocks = encoder.down_blocks
    pixels = blocks[0].downsamplers[0].conv.weight.zero_()
    for c in range(3):
        for dy in range(2):
            for dx in range(2):
                pixels[4 * c + 2 * dy + dx, c, dy, dx] = 1
    _pass_through(blocks[1].resnets[0].conv_shortcut)
    gather = blocks[1].downsamplers[0].conv
    gather.weight.zero_()
    # (k, 3, 4, 4) -> (k, 12, 2, 2): the 4×4 patch as 2×2 cells of the level above's 12 channels
    split = middle.weight.reshape(_PAIRS[4], 3, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(-1, 12, 2, 2)
    gather.weight[: _PAIRS[4], :12, :2, :2] = split
    gather.bias[: _PAIRS[4]] = middle.bias
    _pass_through(blocks[2].resnets[0].conv_shortcut)
    gather = blocks[2].downsamplers[0].conv
    gather.weight.zero_()
    # an 8×8 patch is four 4×4 ones, each its mean plus components: write the code in terms of those
    quarters = code.weight.reshape(LATENT_CHANNELS, 3, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5)
    through = torch.einsum("kyxcij,mcij->kmyx", quarters, middle.inverse)
    gather.weight[:LATENT_CHANNELS, : _PAIRS[4], :2, :2] = through
    gather.bias[:LATENT_CHANNELS] = code.bias + torch.einsum("kyxcij,cij->k", quarters, middle.mean)
    _pass_linearly(
        blocks[3].resnets[0].conv_shortcut, encoder.conv_norm_out, encoder.conv_out, LATENT_CHANNELS, groups=2
    )
    encoder.conv_out.bias[LATENT_CHANNELS:] = 2 * math.log(POSTERIOR_STD)


def _fit_decoder(decoder: Any, code: PatchCode, middle: PatchCode, images: Tensor) -> None:
    """Each upsampling convolution is the least-squares one to the patches of half the size."""
    nn.init.dirac_(decoder.conv_in.weight)
    blocks = decoder.up_blocks
    cells = F.pixel_unshuffle(images, 2)
    known = code(images)
    for target, block in zip((middle(images), cells, images), blocks, strict=False):
        known = _least_squares(block.upsamplers[0].conv, known, target)
    _pass_through(blocks[1].resnets[0].conv_shortcut)
    _pass_through(blocks[2].resnets[0].conv_shortcut)
    _pass_linearly(blocks[3].resnets[0].conv_shortcut, decoder.conv_norm_out, decoder.conv_out, 3, groups=3)
    # the residual branch behind the loud channels should see the quiet ones at their own size
    blocks[3].resnets[1].norm1.weight.copy_(decoder.conv_norm_out.weight.clamp_min(1))


def _pass_through(shortcut: nn.Conv2d) -> None:
    """A 1×1 convolution that hands on as many channels as it can."""
    nn.init.dirac_(shortcut.weight)


def _pass_linearly(shortcut: Any, norm: nn.GroupNorm, out: nn.Conv2d, channels: int, groups: int) -> None:
    """Take `channels` through shortcut → GroupNorm → SiLU → convolution as if the middle two were not there.

    Each channel travels as x and −x, since silu(x) − silu(−x) = x; each group also holds a
    loud constant and its negative, which alone set its statistics.
    """
    size = norm.num_channels // norm.num_groups
    share = -(-channels // groups)
    shortcut.weight.zero_()
    out.weight.zero_()
    norm.weight.fill_(1)
    norm.bias.zero_()
    for channel in range(channels):
        at = (channel // share) * size + 2 * (channel % share)
        shortcut.weight[at, channel], shortcut.weight[at + 1, channel] = 1, -1
        norm.weight[at : at + 2] = _LOUD * math.sqrt(2 / size)
        out.weight[channel, at, 1, 1], out.weight[channel, at + 1, 1, 1] = 1, -1
    for group in range(groups):
        loud = (group + 1) * size - 2
        shortcut.bias[loud], shortcut.bias[loud + 1] = _LOUD, -_LOUD


def _least_squares(convolution: Any, source: Tensor, target: Tensor) -> Tensor:
    """Set a 3×3 convolution after nearest upsampling to map `source` to `target` best; returns what it gives."""
    upsampled = F.interpolate(source, scale_factor=2.0, mode="nearest")
    n = source.shape[1] * 9 + 1
    gram = torch.zeros(n, n, dtype=torch.float64)
    moment = torch.zeros(n, target.shape[1], dtype=torch.float64)
    for some, wanted in zip(torch.split(upsampled, 16), torch.split(target, 16), strict=True):
        x = F.unfold(some, 3, padding=1).transpose(1, 2).reshape(-1, n - 1).double()
        x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
        gram += x.T @ x
        moment += x.T @ wanted.flatten(2).transpose(1, 2).reshape(-1, target.shape[1]).double()
    solution = torch.linalg.solve(gram + 1e-4 * torch.eye(n, dtype=torch.float64), moment).float()
    inputs, outputs = source.shape[1], target.shape[1]
    weight = solution[:-1].T.reshape(outputs, inputs, 3, 3)
    convolution.weight.copy_(0.02 * torch.randn_like(convolution.weight))
    convolution.weight[:outputs] = 0
    convolution.weight[:outputs, :inputs] = weight
    convolution.bias[:outputs] = solution[-1]
    return F.conv2d(upsampled, weight, solution[-1], padding=1)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 on pixels plus half the L1 on their differences, which keeps edges."""
    dx = (output.diff(dim=3) - target.diff(dim=3)).abs().mean()
    dy = (output.diff(dim=2) - target.diff(dim=2)).abs().mean()
    return (output - target).abs().mean() + 0.5 * (dx + dy)


def reconstruction_psnr(output: Tensor, target: Tensor) -> NDArray[np.float64]:
    """(N,) PSNR in dB of (N, 3, H, W) pixels in [-1, 1], each picture's as 8-bit files."""
    files = [((x.cpu().clamp(-1, 1) + 1) * 127.5).round().byte().numpy() for x in (output, target)]
    return np.array([psnr(a, b) for a, b in zip(*files, strict=True)])


def train_autoencoder(
    images: Tensor,
    held_out: Tensor,
    run: TrainingRun,
    *,
    steps: int,
    batch: int,
) -> tuple[AutoencoderKL, PatchCode]:
    """Train the decoder on uint8 images (N, 3, 128, 128), reporting PSNR on `held_out` as it goes.

    A warm start takes that checkpoint's decoder instead of the linear one.

    Returns:
        The autoencoder, and the code its encoder computes: the same latents for a hundredth of the work.
    """

    def unit(pixels: Tensor) -> Tensor:
        return pixels.to(run.device, torch.float32) / 127.5 - 1

    torch.manual_seed(run.seed)
    vae, code = linear_autoencoder(unit(images[:512]).cpu())
    if run.warm_start is not None:
        vae.decoder.load_state_dict(LatentDiffusionModel.load(run.warm_start, device="cpu").vae.decoder.state_dict())
    vae.to(run.device).requires_grad_(False)
    test = unit(held_out[:64])
    with torch.no_grad():
        mean = vae.encode(test).latent_dist.mean
        error = (mean - code(test.cpu()).to(run.device)).square().mean() / mean.var()
        logger.info(
            "autoencoder: the encoder explains all but %.2e of the code; PSNR of the linear decoder %.2f dB",
            error, reconstruction_psnr(vae.decode(mean).sample, test).mean(),
        )  # fmt: skip
    decoder = vae.decoder.requires_grad_(True)

    def step(index: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        x = unit(images[torch.randint(len(images), (batch,), generator=generator)])
        with torch.no_grad():
            mean = vae.encode(x).latent_dist.mean
        z = mean + POSTERIOR_STD * torch.randn(mean.shape, generator=generator).to(run.device)
        return {"loss": reconstruction_loss(decoder(z), x)}

    def report(index: int) -> None:
        db = reconstruction_psnr(vae.decode(vae.encode(test).latent_dist.mean).sample, test)
        logger.info("autoencoder: step %d held-out PSNR %.2f dB, worst %.2f", index, db.mean(), db.min())

    recipe = Recipe(steps=steps, learning_rate=1.5e-4, ema=0.995)
    train("autoencoder", decoder, step, recipe, run, on_checkpoint=report)
    return vae.eval(), code
