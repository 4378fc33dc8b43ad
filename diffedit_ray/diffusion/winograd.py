"""3×3 convolutions in a quarter of the multiplications: F(4×4, 3×3) of Lavin & Gray 2015 (arXiv 1509.09308).

On a GPU cuDNN chooses this by itself; on a CPU oneDNN has it no more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 4
"""Output pixels along a tile's side."""
READ = TILE + 2
"""Input pixels that they depend on."""
LEAST_CHANNELS = 48
"""Of input and output: with fewer, transforming the tiles takes what the multiplication saves."""
LEAST_SAVING = 2.0
"""Multiplications of the direct way over those of this: 4, less what tiles reach beyond the picture."""
MOST_WEIGHTS = 1 << 24
"""Of a layer, transformed, where they are four times as many: 64 MiB, so that large models still fit."""
TILES_AT_ONCE = 128
"""More do not fit into a core's cache, fewer make slow matrix products."""

# for the points 0, ±1, ±2 and infinity
INPUT = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float32,
)
"""Bᵀ: six pixels in a row -> six values."""
WEIGHT = (
    torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64) / 24
)
"""G: three weights in a row -> six values."""
OUTPUT = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], dtype=torch.float32
)
"""Aᵀ: six products in a row -> four pixels."""
OUTPUTS = torch.kron(OUTPUT, OUTPUT)
"""The same for a whole tile: 36 products -> 16 pixels."""


def transform_weights(weight: Tensor) -> Tensor:
    """G g Gᵀ of (out, in, 3, 3) weights for each place in a tile: (36, in, out)."""
    transformed = torch.einsum("ay,oiyx,bx->abio", WEIGHT, weight.detach().double(), WEIGHT)
    return transformed.flatten(0, 1).to(weight.dtype).contiguous()


def convolve(x: Tensor, transformed: Tensor, bias: Tensor) -> Tensor:
    """Convolve with 3×3 weights, stride 1, padding 1: Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A for each tile d.

    Args:
        x: (B, H, W, in) float32; H and W multiples of `TILE`.
        transformed: (36, in, out), from `transform_weights`.
        bias: (out,).

    Returns:
        (B, H, W, out).
    """
    batch, height, width, channels = x.shape
    down, across, out = height // TILE, width // TILE, transformed.shape[2]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1)).contiguous()
    sample, row, pixel, _ = padded.stride()
    convolved = x.new_empty(batch, height, width, out)
    # whole pictures, or else some rows of a picture's tiles
    pictures, rows = max(1, TILES_AT_ONCE // (down * across)), min(down, max(1, TILES_AT_ONCE // across))
    for some, done in zip(torch.split(padded, pictures), torch.split(convolved, pictures), strict=True):
        for top in range(0, height, TILE * rows):
            band, place = some[:, top:], done[:, top : top + TILE * rows]
            shape = (len(some), place.shape[1] // TILE, across)
            tiles = band.as_strided((READ, READ, *shape, channels), (row, pixel, sample, TILE * row, TILE * pixel, 1))
            values = INPUT @ (INPUT @ tiles.reshape(READ, -1)).view(READ, READ, -1)
            products = values.view(READ**2, -1, channels).bmm(transformed)
            # the pixels of a tile at once: fewer passes over memory, which the cores share
            pixels = (OUTPUTS @ products.view(READ**2, -1)).view(TILE, TILE, *shape, out).permute(2, 3, 0, 4, 1, 5)
            torch.add(pixels, bias, out=place.view(pixels.shape))
    return convolved


@torch.library.custom_op("diffedit_ray::winograd", mutates_args=())
def convolve_opaquely(x: Tensor, transformed: Tensor, bias: Tensor) -> Tensor:
    """`convolve`, which compilers shall leave as it is: they would unroll its loop."""
    return convolve(x, transformed, bias)


@convolve_opaquely.register_fake
def _(x: Tensor, transformed: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:3], transformed.shape[2])


class WinogradConv2d(nn.Conv2d):
    """A 3×3 convolution with the same parameters as `convolution`, and what they become when transformed."""

    transformed: Tensor

    def __init__(self, convolution: nn.Conv2d) -> None:
        # on the meta device: the parameters are replaced at once
        super().__init__(convolution.in_channels, convolution.out_channels, 3, padding=1, device="meta")
        self.weight, self.bias = convolution.weight, convolution.bias
        self.register_buffer("transformed", transform_weights(self.weight), persistent=False)
        self.train(convolution.training)

    @staticmethod
    def saves(convolution: nn.Conv2d) -> bool:
        """Whether this way is the faster one for a layer, as far as that does not depend on the picture."""
        ins, outs = convolution.in_channels, convolution.out_channels
        plain = convolution.kernel_size == (3, 3) and convolution.stride == (1, 1) and convolution.padding == (1, 1)
        usual = convolution.dilation == (1, 1) and convolution.groups == 1 and convolution.padding_mode == "zeros"
        wanted = min(ins, outs) >= LEAST_CHANNELS and READ**2 * ins * outs <= MOST_WEIGHTS
        weight = convolution.weight
        known = convolution.bias is not None and weight.dtype == torch.float32 and weight.device.type == "cpu"
        return plain and usual and wanted and known

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W), channels last."""
        height, width = x.shape[2:]
        down, across = -(-height // TILE), -(-width // TILE)
        saving = 9 * height * width / (READ**2 * down * across)
        if saving < LEAST_SAVING:
            return super().forward(x)
        missing = (0, 0, 0, across * TILE - width, 0, down * TILE - height)
        pixels = F.pad(x.permute(0, 2, 3, 1), missing) if any(missing) else x.permute(0, 2, 3, 1)
        bias = self.bias
        assert bias is not None  # `saves`
        way = convolve_opaquely if torch.compiler.is_compiling() else convolve
        return way(pixels, self.transformed, bias)[:, :height, :width].permute(0, 3, 1, 2)


def multiply_less(network: nn.Module) -> None:
    """Replace the convolutions for which this way is faster; none but in float32 on a CPU."""
    # with AVX-512 the multiplication is twice as fast and the transformation is not; nobody has measured others
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        return
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Conv2d and WinogradConv2d.saves(child):
                setattr(module, name, WinogradConv2d(child))
