"""The noise schedule: ᾱ, the time grid, and one deterministic step between any two times.

ε- and v-prediction differ only here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffedit_ray.errors import ModelError

CLEAN = -1
"""The time of an image without noise, one before the first of the grid."""


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """x_t = √ᾱ x0 + √(1−ᾱ) z: the forward process in one step (DDPM, eq. 4)."""
    return alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise


def epsilon_from(output: Tensor, x: Tensor, alpha: Tensor, prediction_type: str) -> Tensor:
    """The noise estimate in a network's output; v-prediction is Salimans & Ho 2022, appendix D."""
    if prediction_type == "epsilon":
        return output
    return alpha.sqrt() * output + (1 - alpha).sqrt() * x


def image_from(output: Tensor, x: Tensor, alpha: Tensor, prediction_type: str) -> Tensor:
    """The clean image's estimate in a network's output; v needs no division, so pure noise (ᾱ = 0) is no exception."""
    if prediction_type == "epsilon":
        return (x - (1 - alpha).sqrt() * output) / alpha.sqrt()
    return alpha.sqrt() * x - (1 - alpha).sqrt() * output


def deterministic_step(x0: Tensor, epsilon: Tensor, alpha_to: Tensor) -> Tensor:
    """DDIM with η = 0 (Song et al. 2021, eq. 12): towards the image or, as its inverse, towards noise."""
    return add_noise(x0, epsilon, alpha_to)


@dataclass(frozen=True)
class NoiseSchedule:
    """A checkpoint's schedule.

    Attributes:
        alphas: (T,) float32, ᾱ at each training time.
        clean_alpha: ᾱ of the last step's target; 1 where the checkpoint sets it so, else ᾱ_0.
        prediction_type: "epsilon" or "v_prediction".
        steps_offset: Added to every time of a leading grid (Stable Diffusion: 1).
        spacing: "leading", "trailing" or "linspace" (Lin et al. 2023, table 2).
    """

    alphas: Tensor
    clean_alpha: Tensor
    prediction_type: str
    steps_offset: int
    spacing: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a checkpoint's ``scheduler_config.json``, whichever scheduler class wrote it.

        Raises:
            ModelError: The checkpoint predicts something other than ε or v.
        """
        scheduler = DDIMScheduler.from_config(dict(config))
        prediction_type = scheduler.config.prediction_type
        if prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(f"the checkpoint predicts {prediction_type!r}; epsilon and v_prediction are supported")
        return cls(
            alphas=scheduler.alphas_cumprod.float(),
            clean_alpha=scheduler.final_alpha_cumprod.float(),
            prediction_type=prediction_type,
            steps_offset=scheduler.config.steps_offset,
            spacing=scheduler.config.timestep_spacing,
        )

    def timesteps(self, steps: int) -> Tensor:
        """The grid of `steps` training times, least noise first: (steps,) int64."""
        total = len(self.alphas)
        if self.spacing == "leading":
            grid = torch.arange(steps) * (total // steps) + self.steps_offset
        elif self.spacing == "trailing":
            grid = (total - torch.arange(steps, dtype=torch.float64) * total / steps).round().long().flip(0) - 1
        else:
            grid = torch.linspace(0, total - 1, steps, dtype=torch.float64).round().long()
        return grid.clamp(0, total - 1)

    def alpha(self, time: int | Sequence[int]) -> Tensor:
        """ᾱ at a training time, or of the clean image at `CLEAN`: float32, 0-d; (B, 1, 1, 1) for B times."""
        return self._table[time] if isinstance(time, int) else self._table[list(time)][:, None, None, None]

    @cached_property
    def _table(self) -> Tensor:
        return torch.cat([self.alphas, self.clean_alpha.reshape(1)])  # CLEAN, which is -1, finds the last

    def path(self, steps: int, ratio: float) -> list[int]:
        """`CLEAN` and then the grid's times up to `ratio` of it: what encoding walks up and decoding down."""
        return [CLEAN, *self.timesteps(steps)[: grid_index(steps, ratio)].tolist()]

    def time_at(self, steps: int, strength: float) -> int:
        """The training time at a noise strength: 0.5 on Stable Diffusion's 50-step grid is t = 481."""
        return int(self.timesteps(steps)[grid_index(steps, strength) - 1])

    def estimates(self, x: Tensor, output: Tensor, time: int | Sequence[int]) -> tuple[Tensor, Tensor]:
        """The clean image and the noise that the network's `output` sees in `x`."""
        alpha = self.alpha(time).to(x.device)
        estimate = (output.float(), x, alpha, self.prediction_type)
        return image_from(*estimate), epsilon_from(*estimate)

    def mix(self, image: Tensor, epsilon: Tensor, time: int | Sequence[int]) -> Tensor:
        """An image and noise as they are mixed at `time`."""
        return deterministic_step(image, epsilon, self.alpha(time).to(image.device))

    def step(self, x: Tensor, output: Tensor, start: int | Sequence[int], end: int | Sequence[int]) -> Tensor:
        """Move `x` from time `start` to time `end` along the network's `output` for it: one time, or one a sample."""
        return self.mix(*self.estimates(x, output, start), end)


def grid_index(steps: int, ratio: float) -> int:
    """How many of the grid's steps `ratio` covers, at least one."""
    return max(1, round(steps * ratio))
