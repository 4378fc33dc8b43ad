"""A row's noise comes from its seed alone, drawn on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def row_noise(seed: int, maps: int, shape: Sequence[int]) -> Tensor:
    """(maps, *shape) standard normal float32 from `seed`.

    Map k is the same however many are drawn, in whatever batch the row travels and on
    whatever device it is used (diffusers #208: noise that changed with the batch size).
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(*shape, generator=generator) for _ in range(maps)])
