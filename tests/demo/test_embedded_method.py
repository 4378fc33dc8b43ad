"""The method on the embedded model: diffusers' own schedulers agree, a round trip comes back, batches do not matter."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from diffedit_ray.demo import demo_model, demo_settings
from diffedit_ray.demo.edits import shipped_edits
from diffedit_ray.diffusion.editor import DiffEditor
from diffedit_ray.diffusion.mask import noise_contrast
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.diffusion.schedule import CLEAN
from diffedit_ray.settings import EditSettings

ROUND_TRIP_ERROR = 0.10
"""Relative to the latent, at r = 0.8, 50 steps, no guidance, ∅ both ways; the shipped model reaches 0.053."""


@pytest.fixture(scope="module")
def model() -> LatentDiffusionModel:
    return LatentDiffusionModel.load(demo_model(), device="cpu")


@pytest.fixture(scope="module")
def x0(model: LatentDiffusionModel) -> torch.Tensor:
    pixels = np.stack([edit.image for edit in shipped_edits()[:2]])
    return model.encode_images(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)


def test_encoding_and_decoding_walk_as_diffusers_schedulers_do(model: LatentDiffusionModel, x0: torch.Tensor) -> None:
    config = json.loads((demo_model() / "scheduler" / "scheduler_config.json").read_text())
    settings = EditSettings(steps=20, guidance_scale=1)
    editor = DiffEditor(model, settings)
    with torch.inference_mode():
        paths = editor.encode(x0, settings)
        empty = model.embed_prompts([""]).expand(len(x0), -1, -1)
        inverse = DDIMInverseScheduler.from_config(config)
        inverse.set_timesteps(20)
        x = x0
        times = inverse.timesteps[:16].tolist()
        assert [path.times for path in paths] == [[CLEAN, *times]] * len(x0)
        for k, t in enumerate(times, start=1):
            x = inverse.step(model.unet(x, t, empty).sample, t, x).prev_sample
            torch.testing.assert_close(torch.stack([path.latents[k] for path in paths]), x, rtol=1e-3, atol=1e-4)
        forward = DDIMScheduler.from_config(config)
        forward.set_timesteps(20)
        query = model.embed_prompts(["a zebra on grass"]).expand(len(x0), -1, -1)
        for t in forward.timesteps[4:].tolist():
            x = forward.step(model.unet(x, t, query).sample, t, x).prev_sample
        everywhere = torch.ones(len(x0), *x0.shape[2:], dtype=torch.bool)
        ours = editor.decode(paths, everywhere, ["a zebra on grass"] * len(x0), settings)
    torch.testing.assert_close(ours, x, rtol=1e-2, atol=1e-2)


def test_round_trip_under_the_empty_prompt_comes_back(model: LatentDiffusionModel, x0: torch.Tensor) -> None:
    settings = EditSettings(guidance_scale=1)
    editor = DiffEditor(model, settings)
    with torch.inference_mode():
        paths = editor.encode(x0, settings)
        everywhere = torch.ones(len(x0), *x0.shape[2:], dtype=torch.bool)
        back = editor.decode(paths, everywhere, [""] * len(x0), settings)
    error = ((back - x0).norm() / x0.norm()).item()
    noise = ((torch.stack([path.latents[-1] for path in paths]) - x0).norm() / x0.norm()).item()
    assert error < ROUND_TRIP_ERROR < noise / 2


def test_contrast_is_where_the_object_is(model: LatentDiffusionModel, x0: torch.Tensor) -> None:
    """The plain mean of |Δε|, as both the paper and diffusers take it, is larger on the object than off it."""
    edit = shipped_edits()[0]
    with torch.inference_mode():
        t = model.schedule.time_at(50, 0.5)
        alpha = model.schedule.alpha(t)
        z = torch.randn(4, *x0.shape[1:], generator=torch.Generator().manual_seed(0))
        x_t = alpha.sqrt() * x0[:1] + (1 - alpha).sqrt() * z
        texts = [model.embed_prompts([text]).expand(4, -1, -1) for text in (edit.query, edit.reference)]
        contrast = noise_contrast(model.predict(x_t, t, texts[0]), model.predict(x_t, t, texts[1])).mean(0).numpy()
    truth = edit.truth.reshape(16, 8, 16, 8).mean((1, 3)) > 0.5
    assert contrast[truth].mean() > 2 * contrast[~truth].mean()


def test_batch_size_and_order_do_not_matter(model: LatentDiffusionModel) -> None:
    settings = demo_settings().with_overrides({"steps": 20})
    editor = DiffEditor(model, settings)
    edits = shipped_edits()[:3]

    def run(rows: list[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        result = editor.edit(
            [edits[i].image for i in rows],
            [edits[i].reference for i in rows],
            [edits[i].query for i in rows],
            [edits[i].seed for i in rows],
        )
        return {i: (result.latent_masks[j], result.images[j]) for j, i in enumerate(rows)}

    together, reversed_order = run([0, 1, 2]), run([2, 1, 0])
    for i in range(3):
        alone = run([i])[i]
        for other in (together[i], reversed_order[i]):
            assert np.array_equal(alone[0], other[0])
            assert np.abs(alone[1].astype(int) - other[1]).max() <= 1
