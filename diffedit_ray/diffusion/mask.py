"""Step 1: from two noise estimates to a mask. Every statistic is per image.

Paper, section 3.2: the estimates under the two texts differ where the texts would
change the image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffedit_ray.settings import EditSettings


def mask_from(contrast: Tensor, settings: EditSettings) -> tuple[Tensor, Tensor, Tensor]:
    """All that follows the estimates, for one image: (n, h, w) contrasts -> contrast and mask (h, w), F ratio ()."""
    f_ratio = significance(contrast)
    soft = rescale(clip_extremes(average_contrast(contrast), settings.mask_clip))
    return soft, binarise(soft, settings.mask_threshold) & (f_ratio >= settings.mask_significance), f_ratio


def noise_contrast(query: Tensor, reference: Tensor) -> Tensor:
    """|ε(query) − ε(reference)| averaged over channels: (..., C, h, w) -> (..., h, w)."""
    return (query.float() - reference.float()).abs().mean(dim=-3)


def average_contrast(contrast: Tensor) -> Tensor:
    """Average n maps without each cell's highest fifth: (..., n, h, w) -> (..., h, w).

    The paper removes extreme values and averages, and gives no formula. This removes what only
    a few of the noise samples have; `clip_extremes` sees to cells that are extreme in all of them.
    """
    n = contrast.shape[-3]
    return contrast.sort(-3).values[..., : n - n // 5, :, :].mean(-3)


def clip_extremes(contrast: Tensor, share: float) -> Tensor:
    """Clip each map to where the cells above hold `share` of its energy: (..., h, w) -> (..., h, w).

    Energy is the squared excess over the map's own median, so neither batch-mates nor the size of
    the object in the picture decide where the clip falls. A quantile over cells would, for an
    object of fewer cells than it cuts off, fall into the background's noise.
    """
    values = contrast.flatten(-2).sort(-1, descending=True).values
    energy = (values - values.median(-1, keepdim=True).values).clamp_min(0).square().cumsum(-1)
    above = (energy < share * energy[..., -1:]).sum(-1, keepdim=True).clamp_max(values.shape[-1] - 1)
    return contrast.minimum(values.gather(-1, above)[..., None])


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
