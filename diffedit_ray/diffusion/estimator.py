"""Noise estimates for any number of latents, each at its own time under its own text."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from diffedit_ray.diffusion.model import LatentDiffusionModel

TEXTS_KEPT = 1024
"""Embeddings kept: 120 MB of them for Stable Diffusion 1 in half precision."""


class Estimator:
    """The UNet behind batches of one size, and the text encoder behind a memory.

    Args:
        model: The replica to use.
        unet_batch: Latents the UNet sees at once, at most.
        reproducible: Every UNet batch has the same size, the last one padded, and texts are embedded one by one.

    Attributes:
        unet_batch: May be lowered between calls, where memory has run out.
    """

    def __init__(self, model: LatentDiffusionModel, unet_batch: int, reproducible: bool = False) -> None:
        self.model = model
        # in batches of other sizes than a power of two, some kernels round by a sample's place in the batch
        self.unet_batch = 1 << (unet_batch - 1).bit_length() if reproducible else unet_batch
        self.reproducible = reproducible
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()

    @torch.inference_mode()
    def __call__(self, x: Tensor, times: Sequence[int], texts: Sequence[str]) -> Tensor:
        """The UNet's output for (B, C, h, w) latents: B times, B texts ("" is ∅) -> (B, C, h, w) float32."""
        distinct = list(dict.fromkeys(texts))
        table = self.embed(distinct)
        place = {text: i for i, text in enumerate(distinct)}
        which = torch.tensor([place[text] for text in texts], device=table.device)
        t = torch.tensor(times, device=x.device)
        x = x.contiguous()  # kernels, and so rounding, follow the layout, which slicing may have changed
        n, size = len(x), self.unet_batch
        if self.reproducible:
            padding = torch.arange(n + -n % size, device=x.device).clamp_max(n - 1)
            x, t, which = x[padding], t[padding], which[padding.to(which.device)]
        calls = self.model.calls(len(x), size)
        parts = zip(*(torch.split(part, calls) for part in (x, t, which)), strict=True)
        return torch.cat([self.model.predict(latents, at, table[text]) for latents, at, text in parts])[:n]

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(B, tokens, width) embeddings of distinct texts; those seen lately cost nothing."""
        missing = [text for text in texts if text not in self._embeddings]
        for some in [[text] for text in missing] if self.reproducible else [missing] if missing else []:
            self._embeddings.update(zip(some, self.model.embed_prompts(some), strict=True))
        for text in texts:
            self._embeddings.move_to_end(text)
        found = torch.stack([self._embeddings[text] for text in texts])
        while len(self._embeddings) > TEXTS_KEPT:
            self._embeddings.popitem(last=False)
        return found
