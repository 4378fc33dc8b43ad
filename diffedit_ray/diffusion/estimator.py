"""Noise estimates for any number of latents, each at its own time under its own text."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from diffedit_ray.diffusion.model import LatentDiffusionModel

TEXTS_KEPT = 1024
"""Embeddings kept: 120 MB of them for Stable Diffusion 1 in half precision."""
TEXTS_TOGETHER = 8
"""Of one latent, at most, in a call: more would save no more and divide less evenly among calls and cores."""
LEAST_TOGETHER = 16
"""Estimates that latents with as many texts must have for calls of their own: small ones cost more than they save."""


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
    def __call__(self, x: Tensor, times: Sequence[int], texts: Sequence[Sequence[str]]) -> Tensor:
        """The UNet's output for each latent under each of its texts.

        Args:
            x: (B, C, h, w) latents.
            times: B.
            texts: Those of each latent; "" is ∅.

        Returns:
            (their sum, C, h, w) float32: a latent's estimates one after another.
        """
        wanted = [(i, text) for i, own in enumerate(texts) for text in own]
        distinct = list(dict.fromkeys(text for _, text in wanted))
        table = self.embed(distinct)
        place = {text: i for i, text in enumerate(distinct)}
        latent = torch.tensor([i for i, _ in wanted], device=x.device)
        which = torch.tensor([place[text] for _, text in wanted], device=x.device)
        t = torch.tensor(times, device=x.device)
        x = x.contiguous()  # kernels, and so rounding, follow the layout, which slicing may have changed
        outputs = torch.empty(len(wanted), *x.shape[1:], device=x.device)
        for count, runs in self._runs([len(own) for own in texts]).items():
            calls = self.model.calls(len(runs), self.unet_batch, count)
            for run in torch.split(torch.tensor(runs, device=x.device), calls):
                estimates, own = run.flatten(), latent[run[:, 0]]
                outputs[estimates] = self.model.predict(x[own], t[own], table[which[estimates]])
        return outputs

    def _runs(self, texts: Sequence[int]) -> dict[int, list[list[int]]]:
        """Places of estimates that share a latent and a call, by how many: of latents with so many texts each.

        A UNet that shares nothing between the texts of a latent gets them one by one.
        """
        most = min(TEXTS_TOGETHER, self.unet_batch) if self.model.shares_stem and not self.reproducible else 1
        runs: dict[int, list[list[int]]] = {}
        begin = 0
        for count in texts:
            for start in range(begin, begin + count, most):
                run = list(range(start, min(start + most, begin + count)))
                runs.setdefault(len(run), []).append(run)
            begin += count
        few = [count for count, own in runs.items() if count * len(own) < LEAST_TOGETHER]
        for count in few if len(runs) > 1 else []:
            singles = [[place] for run in runs.pop(count) for place in run]
            runs.setdefault(1, []).extend(singles)
        if self.reproducible:
            runs[1] += [runs[1][-1]] * (-len(runs[1]) % self.unet_batch)
        return runs

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
