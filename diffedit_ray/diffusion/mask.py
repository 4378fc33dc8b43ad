"""Step 1: from two noise estimates to a mask. Every statistic is per image.

Paper, section 3.2: the estimates under the two texts differ where the texts would
change the image.
"""

from __future__ import annotations

import torch
from torch import Tensor


def noise_contrast(query: Tensor, reference: Tensor) -> Tensor:
    """|ε(query) − ε(reference)| averaged over channels: (..., C, h, w) -> (..., h, w)."""
    return (query.float() - reference.float()).abs().mean(dim=-3)


def remove_extremes(contrast: Tensor, quantile: float) -> Tensor:
    """Clip each map at its own `quantile`: (..., h, w) -> (..., h, w).

    The paper removes extreme values and gives no formula; a quantile of the map itself
    knows nothing of batch-mates, and one hot cell cannot set the scale of the mask.
    """
    limit = torch.quantile(contrast.flatten(-2), quantile, dim=-1)
    return contrast.minimum(limit[..., None, None])


def average_contrast(contrast: Tensor, quantile: float) -> Tensor:
    """Average n maps without their extremes: (..., n, h, w) -> (..., h, w)."""
    return remove_extremes(contrast, quantile).mean(dim=-3)


def rescale(contrast: Tensor) -> Tensor:
    """Each image's contrast to [0, 1]; a flat one is 0 everywhere: (..., h, w) -> (..., h, w)."""
    low, high = contrast.amin((-2, -1), keepdim=True), contrast.amax((-2, -1), keepdim=True)
    span = high - low
    return torch.where(span > 0, (contrast - low) / span.clamp_min(torch.finfo(span.dtype).tiny), 0)


def significance(contrast: Tensor) -> Tensor:
    """How far the contrast of places stands out of its spread over noise samples: (..., n, h, w) -> (...).

    The F ratio of a one-way analysis of variance with latent cells as groups and the n
    maps as samples: about 1 when no place differs from another by more than chance. 0
    where the texts do not disagree at all; infinite for a single map, which has no spread.
    """
    n, cells = contrast.shape[-3], contrast.shape[-2] * contrast.shape[-1]
    between = contrast.mean(-3).flatten(-2).var(-1) * n if cells > 1 else contrast.new_zeros(contrast.shape[:-3])
    if n == 1:
        return torch.where(between > 0, torch.inf, 0)
    within = contrast.var(-3).flatten(-2).mean(-1)
    return torch.where(between > 0, between / within.clamp_min(torch.finfo(within.dtype).tiny), 0)


def binarise(contrast: Tensor, threshold: float) -> Tensor:
    """Where the rescaled contrast reaches `threshold` and is not zero: bool, same shape."""
    return (contrast >= threshold) & (contrast > 0)
