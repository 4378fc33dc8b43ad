"""What rows of one batch share, counted in UNet evaluations, and rows that differ in everything a row may set."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from diffedit_ray.diffusion.editor import DiffEditor
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.diffusion.result import EditResult
from diffedit_ray.settings import EditSettings
from tests.diffusion.helpers import HORSE, PEAR, SHORT, ZEBRA, smooth_image, watched

QUERIES = ["a zebra on grass", "a pear on grass", "a cat on grass", "a dog on wood", "an apple"]
MASK, ENCODE, DECODE = 4, 8, 16
"""UNet evaluations of `SHORT`: of one text's contrast, of the encoding, of the decoding."""

Edit = tuple[NDArray[np.uint8], str, str, int, EditSettings]


def edit(model: LatentDiffusionModel, rows: list[Edit]) -> tuple[EditResult, int]:
    """The result, and the UNet evaluations it took."""
    images, references, queries, seeds, settings = zip(*rows, strict=True)
    with watched(model.unet) as seen:
        result = DiffEditor(model).edit(images, references, queries, seeds, settings=settings)
    return result, seen.evaluations


def assert_as_alone(model: LatentDiffusionModel, rows: list[Edit], together: EditResult) -> None:
    """Every row of a batch against the same row by itself, in an editor that has seen no other."""
    for i, row in enumerate(rows):
        alone, _ = edit(model, [row])
        assert np.array_equal(alone.latent_masks[0], together.latent_masks[i])
        assert alone.latent_masks[0].any()
        assert np.abs(alone.images[0].astype(int) - together.images[i]).max() <= 1
        np.testing.assert_allclose(alone.contrasts[0], together.contrasts[i], rtol=1e-3, atol=1e-4)


def test_five_queries_on_one_image_share_encoding_and_the_references_estimates(
    tiny_model: LatentDiffusionModel,
) -> None:
    rows = [(smooth_image(), HORSE, query, 7, SHORT) for query in QUERIES]
    together, evaluations = edit(tiny_model, rows)
    assert evaluations == MASK + 5 * MASK + ENCODE + 5 * DECODE
    assert_as_alone(tiny_model, rows, together)


def test_five_queries_at_the_defaults_take_a_hundred_evaluations_each(tiny_model: LatentDiffusionModel) -> None:
    settings = EditSettings(mask_significance=0)
    _, evaluations = edit(tiny_model, [(smooth_image(), HORSE, query, 7, settings) for query in QUERIES])
    assert evaluations == 5 * (10 / 5 + 10 + 40 / 5 + 80)


def test_another_seed_or_reference_is_another_estimate_and_the_same_encoding(tiny_model: LatentDiffusionModel) -> None:
    image = smooth_image()
    rows = [(image, HORSE, ZEBRA, 7, SHORT), (image, HORSE, ZEBRA, 8, SHORT), (image, PEAR, ZEBRA, 7, SHORT)]
    together, evaluations = edit(tiny_model, rows)
    # seed 7 sees three texts, seed 8 two
    assert evaluations == 5 * MASK + ENCODE + 3 * DECODE
    assert_as_alone(tiny_model, rows, together)


def test_images_are_told_apart_by_their_pixels(tiny_model: LatentDiffusionModel) -> None:
    other = smooth_image()
    other[5, 5, 0] ^= 64
    rows = [(image, HORSE, ZEBRA, 7, SHORT) for image in (smooth_image(), other, smooth_image().copy())]
    together, evaluations = edit(tiny_model, rows)
    assert evaluations == 2 * (2 * MASK + ENCODE) + 3 * DECODE
    assert np.array_equal(together.contrasts[0], together.contrasts[2])
    assert not np.array_equal(together.contrasts[0], together.contrasts[1])
    assert np.abs(together.images[0].astype(int) - together.images[2]).max() <= 1


def test_a_lower_encoding_ratio_is_a_prefix_of_a_higher_one(tiny_model: LatentDiffusionModel) -> None:
    rows = [
        (smooth_image(), HORSE, ZEBRA, 7, SHORT.with_overrides({"encoding_ratio": ratio})) for ratio in (0.5, 0.8, 0.3)
    ]
    together, evaluations = edit(tiny_model, rows)
    assert evaluations == 2 * MASK + ENCODE + 2 * (5 + 8 + 3)
    assert_as_alone(tiny_model, rows, together)


def test_fewer_maps_are_the_first_of_more(tiny_model: LatentDiffusionModel) -> None:
    rows = [(smooth_image(), HORSE, ZEBRA, 7, SHORT.with_overrides({"mask_maps": n})) for n in (2, 4)]
    together, evaluations = edit(tiny_model, rows)
    assert evaluations == 2 * MASK + ENCODE + 2 * DECODE
    assert_as_alone(tiny_model, rows, together)


VARIED = [
    {},
    {"steps": 7, "encoding_ratio": 0.6},
    {"guidance_scale": 1.0},
    {"guidance_scale": 3.0, "mask_strength": 0.7, "mask_threshold": 0.3},
    {"mask_maps": 2, "mask_clip": 0.0},
    {"solver": "dpm++"},
    {"solver": "dpm++", "steps": 6},
]


def test_rows_of_different_settings_are_one_batch(tiny_model: LatentDiffusionModel, one_thread: None) -> None:
    rows = [(smooth_image(seed=i), HORSE, ZEBRA, i, SHORT.with_overrides(c)) for i, c in enumerate(VARIED)]
    images, references, queries, seeds, settings = zip(*rows, strict=True)
    with watched(tiny_model.unet) as seen:
        together = DiffEditor(tiny_model).edit(images, references, queries, seeds, settings=settings)
    # the longest row takes eight steps each way; nobody waits for anybody, so nor does the batch take more calls
    assert len(seen.latents) == 1 + 8 + 8
    assert_as_alone(tiny_model, rows, together)


def test_rows_of_different_settings_share_their_image(tiny_model: LatentDiffusionModel) -> None:
    rows = [(smooth_image(), HORSE, ZEBRA, 3, SHORT.with_overrides(c)) for c in VARIED]
    together, evaluations = edit(tiny_model, rows)
    assert_as_alone(tiny_model, rows, together)
    # four times at which texts are compared; four grids; decoding is each row's own
    assert evaluations == 4 * 2 * MASK + (8 + 4 + 8 + 5) + (4 * DECODE + 8 + 8 + 10)


@pytest.mark.parametrize("rows", [3, 16])
def test_batches_of_three_and_sixteen_give_what_one_gives(tiny_model: LatentDiffusionModel, rows: int) -> None:
    batch = [(smooth_image(seed=i // 2), HORSE, QUERIES[i % 5], i // 4, SHORT) for i in range(rows)]
    together, _ = edit(tiny_model, batch)
    assert_as_alone(tiny_model, batch, together)


def test_texts_are_embedded_once_in_an_editors_life(tiny_model: LatentDiffusionModel) -> None:
    editor, asked = DiffEditor(tiny_model, SHORT), []
    handle = tiny_model.text_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: asked.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    try:
        for seed in range(3):
            editor.edit([smooth_image(seed=seed)] * 2, [HORSE] * 2, [ZEBRA, PEAR], [seed] * 2)
    finally:
        handle.remove()
    assert asked == [3, 1]  # three texts, and then ∅


def test_the_vae_sees_an_image_once(tiny_model: LatentDiffusionModel) -> None:
    encoded: list[int] = []
    handle = tiny_model.vae.encoder.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    try:
        edit(tiny_model, [(smooth_image(seed=i % 2), HORSE, QUERIES[i], 0, SHORT) for i in range(5)])
    finally:
        handle.remove()
    assert encoded == [2]
