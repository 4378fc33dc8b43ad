"""Walks latents along their times, towards noise or back, each row on its own grid and with its own solver."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffedit_ray.diffusion.schedule import CLEAN, NoiseSchedule


def log_snr(alpha: float) -> float:
    """λ = log(√ᾱ / √(1−ᾱ)), the time in which DPM-Solver's error is small (Lu et al. 2022, section 3)."""
    return 0.5 * (math.log(alpha) - math.log1p(-alpha)) if 0 < alpha < 1 else math.copysign(math.inf, alpha - 0.5)


def second_order_weight(before: float, start: float, end: float) -> float:
    """How far to follow the image estimate's change: 1/(2r) of DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2).

    r is the step before over this one, in λ; the direction of the walk cancels. 0, the first order, where λ is
    infinite: at pure noise and at the clean image.
    """
    return (end - start) / (2 * (start - before)) if all(map(math.isfinite, (before, start, end))) else 0.0


class Solver:
    """DDIM, or DPM-Solver++(2M), which needs half the steps or fewer: it remembers each row's last image estimate.

    DPM-Solver++ of the second order is a DDIM step whose image estimate goes on as it has changed since the step
    before; of the first order it is DDIM. So a step of either, in either direction, is one expression.

    Args:
        schedule: The checkpoint's.
        kinds: For each row "ddim" or "dpm++".
    """

    def __init__(self, schedule: NoiseSchedule, kinds: Sequence[str]) -> None:
        self.schedule, self.kinds = schedule, kinds
        self._before: dict[int, tuple[int, Tensor]] = {}

    def step(self, rows: Sequence[int], x: Tensor, output: Tensor, start: Sequence[int], end: Sequence[int]) -> Tensor:
        """Move (B, C, h, w) latents, those of `rows`, from their times `start` to `end`.

        Args:
            rows: Whose latents these are, by their places in `kinds`.
            x: The latents.
            output: The network's, for them.
            start, end: Training times, or `CLEAN`.
        """
        image, epsilon = self.schedule.estimates(x, output, start)
        change = self._change(rows, image, start, end)
        if change is not None:
            alpha = self.schedule.alpha(start).to(x.device)
            image, epsilon = image + change, epsilon - (alpha / (1 - alpha)).sqrt() * change
        return self.schedule.mix(image, epsilon, end)

    def _change(self, rows: Sequence[int], image: Tensor, start: Sequence[int], end: Sequence[int]) -> Tensor | None:
        """What second order adds to the image estimates; none where every row's step is of the first."""
        weights = [0.0] * len(rows)
        last = list(image)
        for j, i in enumerate(rows):
            # λ of the clean image is infinite, or as good as
            if self.kinds[i] == "ddim" or start[j] == CLEAN:
                continue
            if i in self._before and end[j] != CLEAN:
                time, last[j] = self._before[i]
                alphas = (float(self.schedule.alpha(t)) for t in (time, start[j], end[j]))
                weights[j] = second_order_weight(*(log_snr(alpha) for alpha in alphas))
            self._before[i] = (start[j], image[j])
        if not any(weights):
            return None
        return torch.tensor(weights, device=image.device)[:, None, None, None] * (image - torch.stack(last))
