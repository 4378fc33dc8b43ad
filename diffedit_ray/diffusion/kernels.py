"""How a network's arithmetic is laid out and compiled: the same numbers but for rounding, sooner."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from diffedit_ray.errors import ModelError


def lay_out(network: nn.Module, device: torch.device) -> None:
    """Put a network's convolution weights where `device` reads them fastest."""
    if device.type in ("cpu", "cuda"):  # nobody has measured the others
        # oneDNN and cuDNN work on channels-last inside and would rearrange every activation on its way in and out
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def compile_options(device: torch.device) -> dict[str, Any]:
    """What `torch.compile` is told on `device`."""
    if device.type == "cuda":
        return {"mode": "max-autotune"}  # which includes CUDA graphs
    return {"options": {"freezing": True}}  # weights are packed once, for the kernels that will read them


class CompiledUNet:
    """A UNet compiled for a few batch sizes of one shape; smaller batches are padded, other shapes run uncompiled.

    Compiling takes a minute or more a shape, so what was not warmed up is never compiled in the middle of a run.

    Args:
        unet: The network, with its weights in place.
        batch: The largest batch it will see; the others are its half and its quarter.
        latent: (C, h, w).
        text: (tokens, width).
        backend: What `torch.compile` calls to make code of the graph.

    Raises:
        ModelError: The compiler is missing or fails.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        batch: int,
        latent: tuple[int, ...],
        text: tuple[int, ...],
        *,
        backend: str = "inductor",
    ) -> None:
        self.unet: Any = unet
        self.buckets = sorted({-(-batch // 4), -(-batch // 2), batch})
        options = compile_options(unet.device) if backend == "inductor" else {}
        try:
            self._compiled: Any = torch.compile(unet, dynamic=False, backend=backend, **options)
            self._inputs = {size: self._warmed(size, latent, text) for size in self.buckets}
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler's stack raises many unrelated types
            lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise ModelError(f"the UNet cannot be compiled ({lines[0]}); run without --compile") from error

    @torch.inference_mode()
    def _warmed(self, size: int, latent: tuple[int, ...], text: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors that batches of `size` are copied into: code is compiled for their strides and flags as well."""
        device, dtype = self.unet.device, self.unet.dtype
        inputs = (
            torch.zeros(size, *latent, device=device, dtype=dtype),
            torch.zeros(size, device=device, dtype=torch.long),
            torch.zeros(size, *text, device=device, dtype=dtype),
        )
        for _ in range(3):  # CUDA graphs are recorded on the second call and replayed from the third
            self._compiled(*inputs)
        return inputs

    @property
    def module(self) -> nn.Module:
        """The compiled network."""
        return self._compiled  # type: ignore[no-any-return]

    def bucket(self, latents: Tensor, embeddings: Tensor) -> int | None:
        """The batch size that this batch is padded to; none where it runs uncompiled."""
        size = next((size for size in self.buckets if size >= len(latents)), None)
        if size is None:
            return None
        x, _, texts = self._inputs[size]
        return size if (x.shape[1:], texts.shape[1:]) == (latents.shape[1:], embeddings.shape[1:]) else None

    @torch.inference_mode()
    def __call__(self, latents: Tensor, times: Tensor, embeddings: Tensor) -> Tensor:
        """(B, C, h, w), (B,) int64, (B, tokens, width) -> (B, C, h, w), which the next call may overwrite."""
        size = self.bucket(latents, embeddings)
        if size is None:
            return self.unet(latents, times, embeddings).sample  # type: ignore[no-any-return]
        inputs = self._inputs[size]
        for held, given in zip(inputs, (latents, times, embeddings), strict=True):
            held[: len(given)] = given
        return self._compiled(*inputs).sample[: len(latents)]  # type: ignore[no-any-return]
