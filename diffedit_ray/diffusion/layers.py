"""Layers that compute what diffusers' do with loops that a CPU's vector units can follow."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

VECTOR = 8
"""Floats in a register: torch normalises groups of fewer channels one number at a time."""
LARGE = 1024
"""Pixels from which it does not."""


class NarrowGroupNorm(nn.GroupNorm):
    """Group norm from each channel's own moments, with the same parameters as `norm`."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__(norm.num_groups, norm.num_channels, norm.eps, device="meta")
        self.weight, self.bias = norm.weight, norm.bias
        self.train(norm.training)

    @staticmethod
    def suits(norm: nn.GroupNorm) -> bool:
        """Whether its groups are narrower than a register, of float32."""
        narrow = norm.num_channels // norm.num_groups < VECTOR
        return narrow and norm.affine and norm.weight.dtype == torch.float32

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, …) -> (B, C, …)."""
        if x.ndim != 4 or x.shape[2] * x.shape[3] >= LARGE or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        batch, channels, height, width = x.shape
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)
        mean, square = (moment.mean(1).view(batch, self.num_groups, -1) for moment in (pixels, pixels * pixels))
        mean, square = mean.mean(2, keepdim=True), square.mean(2, keepdim=True)
        variance = (square - mean * mean).clamp_min(0)
        scale = (variance + self.eps).rsqrt() * self.weight.view(self.num_groups, -1)
        shift = self.bias.view(self.num_groups, -1) - mean * scale
        normed = torch.addcmul(shift.view(batch, 1, channels), pixels, scale.view(batch, 1, channels))
        return normed.view(batch, height, width, channels).permute(0, 3, 1, 2)


class SplitGEGLU(GEGLU):  # type: ignore[misc]
    """The gated unit of a transformer with two products in place of one, whose halves would lie in strips."""

    def __init__(self, unit: GEGLU) -> None:
        nn.Module.__init__(self)
        self.proj = unit.proj
        self.train(unit.training)

    @staticmethod
    def suits(unit: GEGLU) -> bool:
        """Whether it is of float32."""
        return unit.proj.weight.dtype == torch.float32  # type: ignore[no-any-return]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, tokens, in) -> (B, tokens, out): linear · GELU(linear)."""
        weight, bias = self.proj.weight, self.proj.bias
        biases = bias.chunk(2) if bias is not None else (None, None)
        hidden, gate = (F.linear(hidden_states, w, b) for w, b in zip(weight.chunk(2), biases, strict=True))
        return hidden.mul_(F.gelu(gate))


def replace_layers(network: nn.Module, better: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put `better(layer)` in a layer's place wherever there is one, from the outside inwards."""
    for name, layer in list(network.named_children()):
        other = better(layer)
        if other is None:
            replace_layers(layer, better)
        else:
            setattr(network, name, other)


def vectorise(network: nn.Module) -> None:
    """Replace the layers for which this is faster on a CPU."""

    def better(layer: nn.Module) -> nn.Module | None:
        if type(layer) is nn.GroupNorm and NarrowGroupNorm.suits(layer):
            return NarrowGroupNorm(layer)
        if type(layer) is GEGLU and SplitGEGLU.suits(layer):
            return SplitGEGLU(layer)
        return None

    replace_layers(network, better)
