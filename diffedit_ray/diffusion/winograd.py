"""3×3 convolutions in a quarter of the multiplications: F(4×4, 3×3) of Lavin & Gray 2015 (arXiv 1509.09308).

On a GPU cuDNN chooses this by itself; on a CPU oneDNN has it no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from diffedit_ray.diffusion.layers import replace_layers

TILE = 4
"""Output pixels along a tile's side."""
LEAST_CHANNELS = 48
"""Of input and output: with fewer, transforming the tiles takes what the multiplication saves."""
LEAST_SAVING = 2.0
"""Multiplications of the direct way over those of this: 4, less what tiles reach beyond the picture."""
MOST_WEIGHTS = 1 << 24
"""Of a layer, transformed, where they are four times as many: 64 MiB, so that large models still fit."""
TILES_AT_ONCE = 128
"""More do not fit into a core's cache, fewer make slow matrix products."""


@dataclass(frozen=True)
class Transforms:
    """What makes n products of a row of a tile, and four pixels of them.

    Attributes:
        input: Bᵀ: the pixels in a row that a tile depends on -> n values.
        weight: G: three weights in a row -> n values.
        output: Aᵀ: n products -> four pixels.
    """

    input: Tensor
    weight: Tensor
    output: Tensor

    @property
    def products(self) -> int:
        """Of a whole tile, for each pair of channels."""
        return len(self.input) ** 2

    @cached_property
    def outputs(self) -> Tensor:
        """The products of a whole tile -> its pixels at once: fewer passes over memory, which cores share."""
        return torch.kron(self.output, self.output)

    @property
    def step(self) -> int:
        """Input pixels from a tile to the next one."""
        return self.input.shape[1] - 2


# for the points 0, 1, -1, 2, -2 and infinity
PLAIN = Transforms(
    torch.tensor(
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ],
        dtype=torch.float32,
    ),
    torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64) / 24,
    torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]).float(),
)

_TWICE = torch.eye(4)[[0, 1, 1, 2, 2, 3]]
_OTHERS = [0, 1, 3, 4, 5]
# pixels that come in equal pairs, as polynomial (1 + z) p(z²), are nothing at -1, so that point is left out
UPSAMPLED = Transforms((PLAIN.input @ _TWICE)[_OTHERS], PLAIN.weight[_OTHERS], PLAIN.output[:, _OTHERS])
"""For a picture enlarged to twice its size by repeating pixels; takes the picture as it was."""


def transform_weights(weight: Tensor, by: Transforms = PLAIN) -> Tensor:
    """G g Gᵀ of (out, in, 3, 3) weights for each place in a tile: (products, in, out)."""
    transformed = torch.einsum("ay,oiyx,bx->abio", by.weight, weight.detach().double(), by.weight)
    return transformed.flatten(0, 1).to(weight.dtype).contiguous()


def convolve(x: Tensor, transformed: Tensor, bias: Tensor, by: Transforms = PLAIN) -> Tensor:
    """Convolve with 3×3 weights, stride 1, padding 1: Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A for each tile d.

    Args:
        x: (B, H, W, in) float32.
        transformed: (products, in, out), from `transform_weights`.
        bias: (out,).
        by: As the weights were.

    Returns:
        (B, H, W, out), or (B, 2H, 2W, out) by `UPSAMPLED`.
    """
    batch, height, width, channels = x.shape
    (values_a_row, read), step, out = by.input.shape, by.step, transformed.shape[2]
    down, across = -(-height // step), -(-width // step)
    padded = F.pad(x, (0, 0, 1, 1 + across * step - width, 1, 1 + down * step - height)).contiguous()
    sample, row, pixel, _ = padded.stride()
    convolved = x.new_empty(batch, down * TILE, across * TILE, out)
    # whole pictures, or else some rows of a picture's tiles
    pictures, rows = max(1, TILES_AT_ONCE // (down * across)), min(down, max(1, TILES_AT_ONCE // across))
    for some, done in zip(torch.split(padded, pictures), torch.split(convolved, pictures), strict=True):
        for top in range(0, down, rows):
            band, place = some[:, step * top :], done[:, TILE * top : TILE * (top + rows)]
            shape = (len(some), place.shape[1] // TILE, across)
            tiles = band.as_strided((read, read, *shape, channels), (row, pixel, sample, step * row, step * pixel, 1))
            values = by.input @ (by.input @ tiles.reshape(read, -1)).view(values_a_row, read, -1)
            products = values.view(by.products, -1, channels).bmm(transformed)
            pixels = (by.outputs @ products.view(by.products, -1)).view(TILE, TILE, *shape, out)
            pixels = pixels.permute(2, 3, 0, 4, 1, 5)
            torch.add(pixels, bias, out=place.view(pixels.shape))
    return convolved[:, : height * TILE // step, : width * TILE // step].contiguous()


@torch.library.custom_op("diffedit_ray::winograd", mutates_args=())
def convolve_opaquely(x: Tensor, transformed: Tensor, bias: Tensor, upsampled: bool) -> Tensor:
    """`convolve`, which compilers shall leave as it is: they would unroll its loop."""
    return convolve(x, transformed, bias, UPSAMPLED if upsampled else PLAIN)


@convolve_opaquely.register_fake
def _(x: Tensor, transformed: Tensor, bias: Tensor, upsampled: bool) -> Tensor:
    batch, height, width, _ = x.shape
    scale = 2 if upsampled else 1
    return x.new_empty(batch, scale * height, scale * width, transformed.shape[2])


def saves(convolution: nn.Conv2d, by: Transforms = PLAIN) -> bool:
    """Whether this way is the faster one for a layer, as far as that does not depend on the picture."""
    ins, outs = convolution.in_channels, convolution.out_channels
    plain = convolution.kernel_size == (3, 3) and convolution.stride == (1, 1) and convolution.padding == (1, 1)
    usual = convolution.dilation == (1, 1) and convolution.groups == 1 and convolution.padding_mode == "zeros"
    wanted = min(ins, outs) >= LEAST_CHANNELS and by.products * ins * outs <= MOST_WEIGHTS
    weight = convolution.weight
    known = convolution.bias is not None and weight.dtype == torch.float32 and weight.device.type == "cpu"
    return plain and usual and wanted and known


def _saves_for(height: int, width: int, by: Transforms) -> bool:
    """Whether tiles lie mostly inside a picture of that size, before it is enlarged."""
    tiles = -(-height // by.step) * -(-width // by.step)
    direct = 9 * height * width * (TILE // by.step) ** 2
    return direct >= LEAST_SAVING * by.products * tiles


def _convolve_by(by: Transforms, x: Tensor, transformed: Tensor, bias: Tensor | None) -> Tensor:
    """(B, in, H, W) -> (B, out, H, W) or twice as large, channels last."""
    assert bias is not None  # `saves`
    pixels = x.permute(0, 2, 3, 1)
    if torch.compiler.is_compiling():
        convolved: Tensor = convolve_opaquely(pixels, transformed, bias, by is UPSAMPLED)
    else:
        convolved = convolve(pixels, transformed, bias, by)
    return convolved.permute(0, 3, 1, 2)


class WinogradConv2d(nn.Conv2d):
    """A 3×3 convolution with the same parameters as `convolution`, and what they become when transformed."""

    transformed: Tensor

    def __init__(self, convolution: nn.Conv2d) -> None:
        # on the meta device: the parameters are replaced at once
        super().__init__(convolution.in_channels, convolution.out_channels, 3, padding=1, device="meta")
        self.weight, self.bias = convolution.weight, convolution.bias
        self.register_buffer("transformed", transform_weights(self.weight), persistent=False)
        self.train(convolution.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W), channels last."""
        if not _saves_for(x.shape[2], x.shape[3], PLAIN):
            return super().forward(x)
        return _convolve_by(PLAIN, x, self.transformed, self.bias)


class WinogradUpsample2D(nn.Module):
    """Enlarges a picture and convolves it, with the same parameters as `upsample`; the large one is never made."""

    transformed: Tensor

    def __init__(self, upsample: Upsample2D) -> None:
        super().__init__()
        self.conv: nn.Conv2d = upsample.conv
        self.register_buffer("transformed", transform_weights(self.conv.weight, UPSAMPLED), persistent=False)
        self.train(upsample.training)

    @staticmethod
    def saves(upsample: Upsample2D) -> bool:
        """Whether it repeats pixels and convolves, and this way is the faster one."""
        repeats = upsample.interpolate and not upsample.use_conv_transpose and upsample.norm is None
        convolution = getattr(upsample, "conv", None)
        return repeats and type(convolution) is nn.Conv2d and saves(convolution, UPSAMPLED)

    def forward(self, hidden_states: Tensor, output_size: Any = None) -> Tensor:
        """(B, in, H, W) -> (B, out, 2H, 2W), or of the size that is asked for, channels last."""
        height, width = hidden_states.shape[2:]
        size = (2 * height, 2 * width) if output_size is None else tuple(output_size)
        if size != (2 * height, 2 * width) or not _saves_for(height, width, UPSAMPLED):
            return self.conv(F.interpolate(hidden_states, size=size, mode="nearest"))  # type: ignore[no-any-return]
        return _convolve_by(UPSAMPLED, hidden_states, self.transformed, self.conv.bias)


def multiply_less(network: nn.Module) -> None:
    """Replace the convolutions for which this way is faster; none but in float32 on a CPU."""

    def better(layer: nn.Module) -> nn.Module | None:
        if type(layer) is Upsample2D and WinogradUpsample2D.saves(layer):
            return WinogradUpsample2D(layer)
        if type(layer) is nn.Conv2d and saves(layer):
            return WinogradConv2d(layer)
        return None

    replace_layers(network, better)
