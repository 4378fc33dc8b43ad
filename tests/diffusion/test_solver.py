from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from diffedit_ray.diffusion.schedule import CLEAN, NoiseSchedule, grid_index
from diffedit_ray.diffusion.solver import Solver, log_snr, second_order_weight

CONFIG: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": True,
    "clip_sample": False,
    "steps_offset": 1,
}
SPREAD = 0.5
"""Standard deviation of the data in a world so simple that its noise estimate and its paths are known exactly."""


def true_output(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """ε for data that is normal with standard deviation `SPREAD`: σ x / (ᾱ s² + σ²)."""
    return (1 - alpha).sqrt() * x / (alpha * SPREAD**2 + 1 - alpha)


def true_end(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Where the probability flow takes `x` from ᾱ `low` to ᾱ `high`: along a fixed quantile."""
    return x * ((high * SPREAD**2 + 1 - high) / (low * SPREAD**2 + 1 - low)).sqrt()


def error_of(kind: str, steps: int, up: bool) -> float:
    """Of a walk between a fifth and four fifths of the noise range, against the known end."""
    schedule = NoiseSchedule.from_config(CONFIG)
    times = schedule.timesteps(steps)[grid_index(steps, 0.2) - 1 : grid_index(steps, 0.8)].tolist()
    times = times if up else times[::-1]
    x = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    began, solver = x, Solver(schedule, [kind])
    for start, end in itertools.pairwise(times):
        x = solver.step([0], x, true_output(x, schedule.alpha(start)), [start], [end])
    return float((x - true_end(began, schedule.alpha(times[0]), schedule.alpha(times[-1]))).norm())


@pytest.mark.parametrize("up", [True, False])
def test_ddim_is_of_first_order_and_dpm_of_second(up: bool) -> None:
    # four times the steps: a quarter of the error, or a sixteenth
    ddim, dpm = (error_of(kind, 20, up) / error_of(kind, 80, up) for kind in ("ddim", "dpm++"))
    assert 3 < ddim < 6
    assert 10 < dpm < 30
    assert error_of("dpm++", 20, up) < error_of("ddim", 60, up)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [20, 25])
def test_dpm_is_diffusers_multistep_solver(steps: int, prediction_type: str) -> None:
    config = {**CONFIG, "prediction_type": prediction_type}
    theirs = DPMSolverMultistepScheduler.from_config(config, timestep_spacing="leading", final_sigmas_type="zero")
    theirs.set_timesteps(steps)
    times = [*theirs.timesteps.tolist(), CLEAN]
    schedule = NoiseSchedule.from_config(config)
    generator = torch.Generator().manual_seed(0)
    ours = x = torch.randn(1, 4, 8, 8, generator=generator)
    solver = Solver(schedule, ["dpm++"])
    for start, end in itertools.pairwise(times):
        output = torch.randn(x.shape, generator=generator)
        ours = solver.step([0], ours, output, [start], [end])
        x = theirs.step(output, start, x).prev_sample
        torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


def test_rows_keep_their_own_solver_and_memory() -> None:
    schedule = NoiseSchedule.from_config(CONFIG)
    generator = torch.Generator().manual_seed(1)
    kinds, grids = ["ddim", "dpm++", "dpm++"], [[901, 801, 701], [901, 801, 701], [941, 881, 821]]
    x = torch.randn(3, 4, 8, 8, generator=generator)
    outputs = torch.randn(2, 3, 4, 8, 8, generator=generator)
    together, solver = x, Solver(schedule, kinds)
    for k in range(2):
        starts, ends = [g[k] for g in grids], [g[k + 1] for g in grids]
        together = solver.step([0, 1, 2], together, outputs[k], starts, ends)
    for i, grid in enumerate(grids):
        alone, own = x[i : i + 1], Solver(schedule, [kinds[i]])
        for k in range(2):
            alone = own.step([0], alone, outputs[k, i : i + 1], [grid[k]], [grid[k + 1]])
        torch.testing.assert_close(together[i : i + 1], alone)
    assert not torch.allclose(together[0], together[1])


def test_weight_is_half_the_ratio_of_the_steps() -> None:
    assert second_order_weight(0.0, 1.0, 2.0) == 0.5
    assert second_order_weight(2.0, 1.0, 0.0) == 0.5
    assert second_order_weight(0.0, 2.0, 3.0) == 0.25
    for ends in ((-math.inf, 0.0, 1.0), (0.0, 1.0, math.inf), (0.0, 1.0, -math.inf)):
        assert second_order_weight(*ends) == 0.0


def test_log_snr_is_infinite_where_there_is_no_noise_or_nothing_else() -> None:
    assert log_snr(0.5) == 0
    assert log_snr(1.0) == math.inf
    assert log_snr(0.0) == -math.inf
