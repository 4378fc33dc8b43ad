from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from diffedit_ray.diffusion.schedule import CLEAN, NoiseSchedule, add_noise, epsilon_from, image_from
from diffedit_ray.errors import ModelError

STABLE_DIFFUSION: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SPACINGS = ("leading", "trailing", "linspace")


def config(**changes: Any) -> dict[str, Any]:
    return {**STABLE_DIFFUSION, **changes}


def random_pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 4, 8, 8, generator=generator)


@pytest.mark.parametrize("steps", [50, 20, 30, 7, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_grid_is_that_of_diffusers(spacing: str, steps: int) -> None:
    # with an offset, diffusers' leading grid of all 1000 steps runs one past the end of its own table
    settings = config(timestep_spacing=spacing, steps_offset=0 if steps == 1000 else 1)
    theirs = DDIMScheduler.from_config(settings)
    theirs.set_timesteps(steps)
    assert NoiseSchedule.from_config(settings).timesteps(steps).tolist() == theirs.timesteps.flip(0).tolist()


@pytest.mark.parametrize("steps", [50, 20])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_step_down_is_diffusers_ddim(prediction_type: str, spacing: str, to_one: bool, steps: int) -> None:
    settings = config(prediction_type=prediction_type, timestep_spacing=spacing, set_alpha_to_one=to_one)
    ours, theirs = NoiseSchedule.from_config(settings), DDIMScheduler.from_config(settings)
    theirs.set_timesteps(steps)
    for start in theirs.timesteps.tolist():
        x, output = random_pair(start)
        # diffusers steps down by 1000 // steps whatever the grid; test_path says where that is the grid's own next time
        end = max(start - 1000 // steps, CLEAN)
        expected = theirs.step(output, start, x).prev_sample
        torch.testing.assert_close(ours.step(x, output, start, end), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [50, 20])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])  # DDIMInverseScheduler knows no other
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_step_up_is_diffusers_ddim_inverse(prediction_type: str, spacing: str, to_one: bool, steps: int) -> None:
    settings = config(prediction_type=prediction_type, timestep_spacing=spacing, set_alpha_to_one=to_one)
    ours, theirs = NoiseSchedule.from_config(settings), DDIMInverseScheduler.from_config(settings)
    theirs.set_timesteps(steps)
    path = ours.path(steps, 1.0)
    assert path == [CLEAN, *theirs.timesteps.tolist()]
    for start, end in itertools.pairwise(path):
        x, output = random_pair(end)
        expected = theirs.step(output, end, x).prev_sample
        torch.testing.assert_close(ours.step(x, output, start, end), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_path_visits_each_time_of_the_grid_once(spacing: str) -> None:
    schedule = NoiseSchedule.from_config(config(timestep_spacing=spacing))
    path = schedule.path(50, 0.8)
    assert path == [CLEAN, *schedule.timesteps(50)[:40].tolist()]
    assert path == sorted(set(path))
    if spacing != "linspace":
        assert {b - a for a, b in itertools.pairwise(path[1:])} == {20}


@pytest.mark.parametrize(("steps", "ratio", "length"), [(50, 0.8, 40), (50, 1, 50), (50, 0.29, 14), (2, 0.01, 1)])
def test_ratio_counts_steps_and_never_none(steps: int, ratio: float, length: int) -> None:
    assert len(NoiseSchedule.from_config(config()).path(steps, ratio)) == 1 + length


def test_mask_time_on_stable_diffusions_grid_is_481() -> None:
    assert NoiseSchedule.from_config(config()).time_at(50, 0.5) == 481


@pytest.mark.parametrize("to_one", [False, True])
def test_clean_alpha_is_what_the_checkpoint_says(to_one: bool) -> None:
    schedule = NoiseSchedule.from_config(config(set_alpha_to_one=to_one))
    expected = 1.0 if to_one else float(schedule.alphas[0])
    assert float(schedule.alpha(CLEAN)) == expected
    assert float(schedule.alphas[0]) < 1


def test_add_noise_is_diffusers_own() -> None:
    schedule, theirs = NoiseSchedule.from_config(config()), DDIMScheduler.from_config(config())
    x0, noise = random_pair(0)
    for t in (0, 481, 999):
        expected = theirs.add_noise(x0, noise, torch.tensor([t, t]))
        torch.testing.assert_close(add_noise(x0, noise, schedule.alpha(t)), expected, rtol=1e-6, atol=1e-6)


def test_a_step_back_undoes_a_step_with_the_same_estimate() -> None:
    schedule = NoiseSchedule.from_config(config())
    x, epsilon = random_pair(1)
    noisier = schedule.step(x, epsilon, 1, 781)
    assert not torch.allclose(noisier, x, atol=0.1)
    torch.testing.assert_close(schedule.step(noisier, epsilon, 781, 1), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_both_estimates_find_what_was_mixed(prediction_type: str) -> None:
    x0, noise = random_pair(2)
    alpha = torch.tensor(0.3)
    x = add_noise(x0, noise, alpha)
    v = alpha.sqrt() * noise - (1 - alpha).sqrt() * x0
    output = noise if prediction_type == "epsilon" else v
    torch.testing.assert_close(epsilon_from(output, x, alpha, prediction_type), noise, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(image_from(output, x, alpha, prediction_type), x0, rtol=1e-5, atol=1e-5)


def test_a_schedule_that_ends_in_pure_noise_can_be_left_again() -> None:
    settings = config(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    ours, theirs = NoiseSchedule.from_config(settings), DDIMScheduler.from_config(settings)
    theirs.set_timesteps(50)
    assert float(ours.alpha(999)) == 0
    x, output = random_pair(3)
    expected = theirs.step(output, 999, x).prev_sample
    torch.testing.assert_close(ours.step(x, output, 999, 979), expected, rtol=1e-5, atol=1e-5)


def test_config_of_another_scheduler_class_is_read() -> None:
    # Stable Diffusion 1.5 ships this one
    pndm = config(_class_name="PNDMScheduler", skip_prk_steps=True, num_train_timesteps=1000)
    schedule = NoiseSchedule.from_config(pndm)
    torch.testing.assert_close(schedule.alphas, DDIMScheduler.from_config(config()).alphas_cumprod)
    assert schedule.timesteps(50)[0] == 1


def test_predicting_the_image_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="'sample'"):
        NoiseSchedule.from_config(config(prediction_type="sample"))
