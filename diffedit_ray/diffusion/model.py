"""A latent diffusion model: pixels to latents and back, prompts to embeddings, noise estimates."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffedit_ray.diffusion.checkpoint import checkpoint_folder, geometry_of
from diffedit_ray.diffusion.cores import Cores, even_calls
from diffedit_ray.diffusion.framing import Geometry
from diffedit_ray.diffusion.kernels import CompiledUNet, keep_freed_memory, lay_out
from diffedit_ray.diffusion.layers import vectorise
from diffedit_ray.diffusion.schedule import NoiseSchedule
from diffedit_ray.diffusion.stem import repeated, share_stem, shares_stem
from diffedit_ray.diffusion.winograd import multiply_less
from diffedit_ray.errors import ModelError

VAE_PIXELS = 1 << 20
"""Pixels the autoencoder sees at once, or else one image: at full resolution a few channels are a lot of memory."""
CORE_PIXELS = 1 << 16
"""Of them, pixels a CPU's core sees at once, or else one image: more do not fit into its cache."""


def resolve_device(device: str) -> torch.device:
    """ "auto" is the first accelerator torch sees, else the CPU.

    Raises:
        ModelError: The device's name is unknown or it is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """ "auto" is float32 on CPUs, bfloat16 on GPUs that have it and float16 on the others.

    CPUs with bfloat16 units (avx512_bf16, amx) use them only if asked: what that costs in quality is not measured.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16


def prepare(unet: UNet2DConditionModel, vae: AutoencoderKL, device: torch.device) -> None:
    """Have networks whose weights are on `device` do the same in less time there."""
    # with AVX-512 multiplication is twice as fast and what it takes to save it is not; nobody has measured others
    measured = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    for network in (unet, vae):
        lay_out(network, device)
        if measured:
            multiply_less(network)
            vectorise(network)
    share_stem(unet)
    if device.type == "cpu":
        keep_freed_memory()


@dataclass
class LatentDiffusionModel:
    """One replica of a Stable-Diffusion-1-style checkpoint.

    Attributes:
        vae: Pixels to latents and back.
        unet: The noise estimate.
        text_encoder: Token ids to embeddings.
        tokenizer: Texts to token ids.
        schedule: ᾱ and the time grid.
        device: Where the weights are.
        dtype: What they are.
        source: What `load` was given.
    """

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: NoiseSchedule
    device: torch.device
    dtype: torch.dtype
    source: str = ""
    _compiled: CompiledUNet | None = field(default=None, init=False, repr=False)
    _cores: Cores = field(default_factory=Cores, init=False, repr=False)

    @classmethod
    def load(cls, source: str | Path, device: str = "auto", dtype: str = "auto") -> LatentDiffusionModel:
        """Load a checkpoint in the diffusers folder format.

        Args:
            source: A folder, or a model id on the hub.
            device: "auto", "cpu", "cuda", "cuda:1", "mps".
            dtype: "auto", "float32", "bfloat16" or "float16".

        Raises:
            ModelError: Nothing there, not a Stable-Diffusion-1-style checkpoint, or no such device.
        """
        folder = checkpoint_folder(str(source))
        target = resolve_device(device)
        precision = resolve_dtype(dtype, target)
        try:
            parts: dict[str, Any] = {
                "vae": AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=precision),
                "unet": UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=precision),
                "text_encoder": CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=precision),
            }
            tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
            scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            # one line: what a worker raises is told by the last of its traceback
            raise ModelError(f"{folder}: cannot load the checkpoint: {shorten(str(error), 400)}") from error
        for part in parts.values():
            part.to(target).eval().requires_grad_(False)
        prepare(parts["unet"], parts["vae"], target)
        model = cls(
            **parts,
            tokenizer=tokenizer,
            schedule=NoiseSchedule.from_config(scheduler),
            device=target,
            dtype=precision,
            source=str(source),
        )
        model._check()
        return model

    def _check(self) -> None:
        latent, unet = self.vae.config["latent_channels"], self.unet.config
        if unet["in_channels"] != latent:
            raise ModelError(
                f"{self.source}: the UNet takes {unet['in_channels']} channels and the VAE gives {latent}; "
                "inpainting and depth checkpoints are not supported, use their base model"
            )
        if unet.get("addition_embed_type") is not None:
            raise ModelError(f"{self.source}: SDXL-style checkpoints are not supported, only Stable Diffusion 1 and 2")

    @property
    def geometry(self) -> Geometry:
        """What sizes the model works at."""
        return geometry_of(self.vae.config, self.unet.config)

    @torch.inference_mode()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """x0 = VAE mean × scaling factor: (B, 3, H, W) in [-1, 1] -> (B, C, H/f, W/f) float32.

        The mean, never a sample: the code of an image must not depend on chance.
        """
        mean = self._by_image(
            lambda some: self.vae.encode(some).latent_dist.mode(), pixels, pixels.shape[2] * pixels.shape[3]
        )
        mean = mean.float().contiguous()
        latents: Tensor = (mean - (self.vae.config.get("shift_factor") or 0.0)) * self.vae.config["scaling_factor"]
        return latents

    @torch.inference_mode()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) float32 -> (B, 3, h·f, w·f) float32, clamped to [-1, 1]."""
        latents = latents / self.vae.config["scaling_factor"] + (self.vae.config.get("shift_factor") or 0.0)
        pixels = latents.shape[2] * latents.shape[3] * self.geometry.factor**2
        decoded = self._by_image(lambda some: self.vae.decode(some).sample, latents, pixels)
        return decoded.float().clamp(-1, 1).contiguous()

    def _by_image(self, network: Callable[[Tensor], Tensor], batch: Tensor, pixels: int) -> Tensor:
        """``network(batch)`` in parts that fit into memory, for samples that show so many pixels."""
        done = []
        for group in torch.split(batch, max(1, VAE_PIXELS // pixels)):
            group = group.to(self.device, self.dtype)  # not all at once: only this much is on the device
            at_once = max(1, CORE_PIXELS // pixels) if group.device.type == "cpu" else len(group)
            pieces = torch.split(group, at_once)
            done += self._cores.map(network, [(piece,) for piece in pieces], self._cores.parts(len(pieces), 1))
        return torch.cat(done)

    @torch.inference_mode()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """(B, tokens, width) embeddings, padded and truncated as Stable Diffusion does; "" is ∅."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        attend = getattr(self.text_encoder.config, "use_attention_mask", False)
        attention = tokens.attention_mask.to(self.device) if attend else None
        embeddings: Tensor = self.text_encoder(tokens.input_ids.to(self.device), attention_mask=attention)[0]
        return embeddings

    @torch.inference_mode()
    def predict(self, latents: Tensor, time: int | Tensor, embeddings: Tensor) -> Tensor:
        """The UNet's raw output, (B·K, C, h, w) float32.

        Args:
            latents: (B, C, h, w).
            time: One, or (B,) of them.
            embeddings: (B·K, tokens, width): K for each latent, one after another.
        """
        # a time before the grid's first means the clean image, which the network knows as its first time
        times = torch.as_tensor(time, device=self.device).clamp_min(0).expand(len(latents))
        latents = latents.to(self.dtype)
        if not self.shares_stem:
            latents, times = repeated(latents, len(embeddings)), repeated(times, len(embeddings))
        if self._compiled is not None:
            output = self._compiled(latents, times, embeddings).clone()
        else:
            each = embeddings.reshape(len(latents), -1, *embeddings.shape[1:])
            output = self._cores(self._denoise, latents, times, each, weight=each.shape[1])
        return output.float().contiguous()

    def _denoise(self, latents: Tensor, times: Tensor, embeddings: Tensor) -> Tensor:
        return self.unet(latents, times, embeddings.flatten(0, 1)).sample  # type: ignore[no-any-return]

    @property
    def shares_stem(self) -> bool:
        """Whether `predict` costs less for K texts on a latent than for as many latents."""
        return self._compiled is None and shares_stem(self.unet)

    def calls(self, latents: int, most: int, texts: int = 1) -> list[int]:
        """How many latents are best given to each call of `predict`.

        Args:
            latents: How many there are.
            most: Embeddings of a call.
            texts: Embeddings of each latent.
        """
        if self._compiled is not None:
            return self._compiled.split(latents, most)
        parts = self._cores.parts(most) if self.device.type == "cpu" else 1
        return even_calls(latents, max(1, most // texts), parts)

    @property
    def denoisers(self) -> list[nn.Module]:
        """The UNet and, if there is one, its compiled form: every evaluation is a call of one of them."""
        return [self.unet, *([self._compiled.module] if self._compiled else [])]

    def compile(self, batch: int) -> None:
        """Compile the UNet for latents of the model's own size, at most `batch` at once; takes minutes.

        Raises:
            ModelError: The compiler is missing or fails.
        """
        side = self.geometry.native // self.geometry.factor
        latent, text = (self.unet.config["in_channels"], side, side), self.embed_prompts([""]).shape[1:]
        self._compiled = CompiledUNet(self.unet, batch, latent, tuple(text), cores=self._cores)
