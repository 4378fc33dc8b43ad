from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from diffedit_ray.diffusion.editor import DiffEditor, Path
from diffedit_ray.diffusion.mask import noise_contrast
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.diffusion.noise import row_noise
from diffedit_ray.diffusion.result import EditResult
from diffedit_ray.diffusion.schedule import CLEAN, add_noise
from diffedit_ray.settings import EditSettings
from tests.diffusion.helpers import HORSE, PEAR, SHORT, ZEBRA, latents_of, smooth_image, watched


@pytest.fixture
def editor(tiny_model: LatentDiffusionModel) -> DiffEditor:
    return DiffEditor(tiny_model, SHORT)


def drawn_square(width: int = 32, height: int = 32) -> NDArray[np.uint8]:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 4 : width // 2] = 255
    return mask


def round_trip_error(editor: DiffEditor, x0: torch.Tensor, settings: EditSettings) -> float:
    """‖y0 − x0‖ / ‖x0‖ after encoding under ∅ and decoding under ∅, everything masked, without guidance."""
    with torch.inference_mode():
        y0 = editor.decode(editor.encode(x0, settings), torch.ones(1, *x0.shape[2:], dtype=torch.bool), [""], settings)
    return float((y0 - x0).norm() / x0.norm())


# --- the three steps ---


def test_contrast_is_the_papers(editor: DiffEditor, tiny_model: LatentDiffusionModel) -> None:
    x0 = latents_of(tiny_model, smooth_image())
    soft, mask, _ = editor.find_masks(x0, [HORSE], [ZEBRA], [5], SHORT.with_overrides({"mask_clip": 0.0}))
    t = 401  # the fifth of 1, 101, 201, …
    x_t = add_noise(x0, row_noise(5, 4, (4, 8, 8)), tiny_model.schedule.alphas[t])
    query, reference = tiny_model.embed_prompts([ZEBRA]), tiny_model.embed_prompts([HORSE])
    maps = [
        noise_contrast(tiny_model.predict(x[None], t, query), tiny_model.predict(x[None], t, reference))[0] for x in x_t
    ]
    d = torch.stack(maps).mean(0)
    torch.testing.assert_close(soft[0], (d - d.min()) / (d.max() - d.min()), rtol=1e-3, atol=1e-4)
    assert torch.equal(mask[0], soft[0] >= 0.5)


def test_no_reference_is_the_empty_prompt(editor: DiffEditor) -> None:
    none = editor.edit([smooth_image()], [None], [ZEBRA], [0])
    empty = editor.edit([smooth_image()], [""], [ZEBRA], [0])
    assert not none.unchanged[0]
    assert np.array_equal(none.images[0], empty.images[0])


def test_encoding_keeps_every_latent_up_to_the_ratio(editor: DiffEditor, tiny_model: LatentDiffusionModel) -> None:
    x0 = latents_of(tiny_model, smooth_image())
    [path] = editor.encode(x0, SHORT)
    assert path.times == [CLEAN, 1, 101, 201, 301, 401, 501, 601, 701]
    assert len(path.latents) == 9
    assert torch.equal(path.latents[0], x0[0])
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(path.latents))


@pytest.mark.parametrize(("steps", "bound"), [(50, 0.32), (200, 0.09)])
def test_round_trip_error_is_27_percent_in_50_steps_and_8_in_200(
    editor: DiffEditor, tiny_model: LatentDiffusionModel, steps: int, bound: float
) -> None:
    # Random weights are the hard case: their estimate is not the noise, so x0 moves at every step. What must
    # hold for any network is first order: four times the steps, a quarter of the error (27.2 % -> 7.8 %).
    x0 = latents_of(tiny_model, smooth_image())
    settings = EditSettings(steps=steps, encoding_ratio=0.5, guidance_scale=1)
    error = round_trip_error(editor, x0, settings)
    assert bound / 2 < error < bound


def test_one_step_there_and_back_under_known_noise_is_exact(tiny_model: LatentDiffusionModel) -> None:
    # with the same estimate in both directions nothing is lost, whatever the number of steps
    schedule, x0 = tiny_model.schedule, latents_of(tiny_model, smooth_image())
    epsilon = row_noise(0, 1, x0.shape[1:])
    times, x = schedule.path(50, 0.8), x0
    for start, end in itertools.pairwise(times):
        x = schedule.step(x, epsilon, start, end)
    torch.testing.assert_close(x, add_noise_from(x0, epsilon, schedule.clean_alpha, schedule.alphas[times[-1]]))
    for start, end in itertools.pairwise(times[::-1]):
        x = schedule.step(x, epsilon, start, end)
    torch.testing.assert_close(x, x0, rtol=1e-4, atol=1e-4)


def add_noise_from(x: torch.Tensor, epsilon: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Where a straight DDIM line from ᾱ `low` to ᾱ `high` ends."""
    return (high / low).sqrt() * (x - (1 - low).sqrt() * epsilon) + (1 - high).sqrt() * epsilon


def test_guidance_mixes_query_and_empty_prompt(editor: DiffEditor, tiny_model: LatentDiffusionModel) -> None:
    x0 = latents_of(tiny_model, smooth_image())
    y = row_noise(1, 1, x0.shape[1:])
    whole = torch.ones(1, 8, 8, dtype=torch.bool)
    query = tiny_model.predict(y, 1, tiny_model.embed_prompts([ZEBRA]))
    empty = tiny_model.predict(y, 1, tiny_model.embed_prompts([""]))
    for scale in (1.0, 7.5):
        decoded = editor.decode(
            [Path([CLEAN, 1], [x0[0], y[0]])], whole, [ZEBRA], SHORT.with_overrides({"guidance_scale": scale})
        )
        expected = tiny_model.schedule.step(y, empty + scale * (query - empty), 1, CLEAN)
        torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-4)


def test_outside_the_mask_decoding_ends_on_the_images_own_latent(
    editor: DiffEditor, tiny_model: LatentDiffusionModel
) -> None:
    x0 = latents_of(tiny_model, smooth_image())
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 2:5, 3:6] = True
    with torch.inference_mode():
        y0 = editor.decode(editor.encode(x0, SHORT), mask, [ZEBRA], SHORT)
    outside = ~mask[:, None].expand_as(x0)
    assert torch.equal(y0[outside], x0[outside])
    assert not torch.isclose(y0[~outside], x0[~outside]).any()


# --- what a row costs ---


def test_a_row_at_the_defaults_takes_140_evaluations(tiny_model: LatentDiffusionModel) -> None:
    editor = DiffEditor(tiny_model, EditSettings(mask_significance=0))
    with watched(tiny_model.unet) as seen:
        result = editor.edit([smooth_image()], [HORSE], [ZEBRA], [0])
    assert not result.unchanged[0]
    assert seen.evaluations == 20 + 40 + 80


@pytest.mark.parametrize(("unet_batch", "most"), [(1, 1), (3, 2), (7, 4), (64, 8)])  # two texts a latent
def test_the_unet_never_sees_more_than_it_may(tiny_model: LatentDiffusionModel, unet_batch: int, most: int) -> None:
    with watched(tiny_model.unet) as seen:
        DiffEditor(tiny_model, SHORT, unet_batch=unet_batch).edit([smooth_image()], [HORSE], [ZEBRA], [0])
    assert seen.evaluations == 2 * 4 + 8 + 16
    assert max(len(x) for x in seen.latents) == most


def test_a_drawn_mask_saves_step_one(tiny_model: LatentDiffusionModel) -> None:
    editor = DiffEditor(tiny_model)
    with watched(tiny_model.unet) as seen:
        editor.edit([smooth_image()], [HORSE], [ZEBRA], [0], masks=[drawn_square()])
    assert seen.evaluations == 40 + 80


def test_no_guidance_halves_decoding(editor: DiffEditor, tiny_model: LatentDiffusionModel) -> None:
    with watched(tiny_model.unet) as seen:
        editor.edit([smooth_image()], [HORSE], [ZEBRA], [0], settings=SHORT.with_overrides({"guidance_scale": 1.0}))
    assert seen.evaluations == 2 * 4 + 8 + 8


@pytest.mark.parametrize("composite", [True, False])
@pytest.mark.parametrize(("reference", "query"), [(ZEBRA, ZEBRA), (None, ""), ("", "")])
def test_equal_texts_leave_the_image_alone_and_cost_nothing(
    tiny_model: LatentDiffusionModel, reference: str | None, query: str, composite: bool
) -> None:
    # not even a threshold of 0 without any gate makes a mask of no contrast
    settings = EditSettings(mask_threshold=0, mask_significance=0, composite=composite)
    image = smooth_image()
    with watched(tiny_model.unet) as seen:
        result = DiffEditor(tiny_model, settings).edit([image], [reference], [query], [0])
    assert seen.evaluations == 0
    assert result.unchanged == [True]
    assert result.significance == [0]
    assert np.array_equal(result.images[0], image)
    assert not result.masks[0].any()
    assert not result.contrasts[0].any()


def test_insignificant_contrast_is_unchanged_after_step_one(tiny_model: LatentDiffusionModel) -> None:
    image = smooth_image()
    measured = DiffEditor(tiny_model, SHORT).edit([image], [HORSE], [ZEBRA], [0]).significance[0]
    assert 0 < measured < np.inf
    for gate, unchanged in ((measured * 0.99, False), (measured * 1.01, True)):
        settings = SHORT.with_overrides({"mask_significance": gate})
        with watched(tiny_model.unet) as seen:
            result = DiffEditor(tiny_model, settings).edit([image], [HORSE], [ZEBRA], [0])
        assert result.unchanged == [unchanged]
        assert seen.evaluations == (8 if unchanged else 32)
        assert np.array_equal(result.images[0], image) == unchanged


def test_rows_with_empty_masks_add_nothing_to_a_batch(editor: DiffEditor, tiny_model: LatentDiffusionModel) -> None:
    images = [smooth_image(seed=i) for i in range(3)]
    blank = np.zeros((32, 32), np.uint8)
    with watched(tiny_model.unet) as seen:
        result = editor.edit(images, [HORSE, HORSE, PEAR], [HORSE, ZEBRA, ZEBRA], [0, 1, 2], masks=[None, None, blank])
    assert result.unchanged == [True, False, True]
    assert seen.evaluations == 2 * 4 + 8 + 16
    assert np.array_equal(result.images[0], images[0])
    assert np.array_equal(result.images[2], images[2])


# --- a result depends on its row alone ---

ROWS: list[tuple[NDArray[np.uint8], str, str, int]] = [
    (smooth_image(seed=1), HORSE, ZEBRA, 11),
    (smooth_image(seed=2), PEAR, ZEBRA, 12),
    (smooth_image(seed=3), "", HORSE, 13),
]


def edit_rows(editor: DiffEditor, rows: Sequence[tuple[NDArray[np.uint8], str, str, int]]) -> EditResult:
    images, references, queries, seeds = zip(*rows, strict=True)
    return editor.edit(images, references, queries, seeds)


def assert_same_row(one: EditResult, i: int, other: EditResult, j: int) -> None:
    assert np.array_equal(one.latent_masks[i], other.latent_masks[j])
    assert np.array_equal(one.masks[i], other.masks[j])
    assert np.abs(one.images[i].astype(int) - other.images[j]).max() <= 1


def test_batch_and_order_do_not_matter(editor: DiffEditor, tiny_model: LatentDiffusionModel) -> None:
    together, backwards = edit_rows(editor, ROWS), edit_rows(editor, ROWS[::-1])
    assert not any(together.unchanged)
    for i, row in enumerate(ROWS):
        alone = edit_rows(editor, [row])
        assert_same_row(alone, 0, together, i)
        assert_same_row(alone, 0, backwards, 2 - i)
    piecemeal = edit_rows(DiffEditor(tiny_model, SHORT, unet_batch=1), ROWS)
    for i in range(3):
        assert_same_row(piecemeal, i, together, i)


def test_sizes_and_drawn_masks_do_not_mix_rows_up(editor: DiffEditor) -> None:
    images = [smooth_image(32, 32, 1), smooth_image(64, 32, 2), smooth_image(32, 32, 3, channels=4)]
    masks = [None, drawn_square(64, 32), drawn_square()]
    texts, seeds = [HORSE, PEAR, ZEBRA], [1, 2, 3]
    queries = [ZEBRA, HORSE, PEAR]
    together = editor.edit(images, texts, queries, seeds, masks=masks)
    for i in range(3):
        alone = editor.edit([images[i]], [texts[i]], [queries[i]], [seeds[i]], masks=[masks[i]])
        assert_same_row(alone, 0, together, i)
        assert together.images[i].shape == images[i].shape
        assert not np.array_equal(together.images[i], images[i])


def test_same_seed_same_bytes_and_another_seed_another_contrast(editor: DiffEditor) -> None:
    one, again = (editor.edit([smooth_image()], [HORSE], [ZEBRA], [3]) for _ in range(2))
    assert np.array_equal(one.images[0], again.images[0])
    assert np.array_equal(one.contrasts[0], again.contrasts[0])
    other = editor.edit([smooth_image()], [HORSE], [ZEBRA], [4])
    assert not np.array_equal(other.contrasts[0], one.contrasts[0])


# --- on the picture's own pixels ---


@pytest.mark.parametrize("channels", [3, 4])
def test_outside_a_drawn_mask_every_pixel_is_the_originals(editor: DiffEditor, channels: int) -> None:
    image, mask = smooth_image(100, 70, channels=channels), drawn_square(100, 70)
    result = editor.edit([image], [HORSE], [ZEBRA], [0], masks=[mask])
    edited = result.images[0]
    assert np.array_equal(edited[mask == 0], image[mask == 0])
    assert (edited[mask > 0][:, :3] != image[mask > 0][:, :3]).any(1).mean() > 0.9
    assert np.array_equal(edited[..., 3:], image[..., 3:])
    assert np.array_equal(result.masks[0], mask)
    assert np.isnan(result.significance[0])


def test_outside_the_found_mask_every_pixel_is_the_originals(editor: DiffEditor) -> None:
    # a high threshold, so that an outside is left (how much, with random weights, is the CPU's)
    image = smooth_image(100, 70)
    settings = SHORT.with_overrides({"mask_threshold": 0.9})
    result = editor.edit([image], [HORSE], [ZEBRA], [0], settings=settings)
    outside = result.masks[0] == 0
    assert result.masks[0].shape == (70, 100)
    assert outside.any()
    assert not outside.all()
    assert np.array_equal(result.images[0][outside], image[outside])


def test_pil_images_are_read_with_their_transparency(editor: DiffEditor) -> None:
    array = smooth_image(channels=4)
    arguments = ([HORSE], [ZEBRA], [0])
    for image in (Image.fromarray(array), Image.fromarray(array[..., :3])):
        expected = editor.edit([np.asarray(image)], *arguments)
        assert np.array_equal(editor.edit([image], *arguments).images[0], expected.images[0])
    grey = Image.fromarray(array[..., 0])
    assert editor.edit([grey], *arguments).images[0].shape == (32, 32, 3)


# --- arguments ---


def test_settings_of_one_call_do_not_stay(editor: DiffEditor) -> None:
    image, arguments = smooth_image(), ([HORSE], [ZEBRA], [0])
    before = editor.edit([image], *arguments)
    whole = editor.edit([image], *arguments, settings=SHORT.with_overrides({"mask_threshold": 0.0}))
    after = editor.edit([image], *arguments)
    assert whole.latent_masks[0].sum() > before.latent_masks[0].sum()
    assert np.array_equal(after.images[0], before.images[0])


def test_resolution_sets_how_many_cells_there_are(editor: DiffEditor) -> None:
    result = editor.edit([smooth_image()], [HORSE], [ZEBRA], [0], settings=SHORT.with_overrides({"resolution": 64}))
    assert result.contrasts[0].shape == (16, 16)
    assert result.images[0].shape == (32, 32, 3)


def test_contrasts_and_times_are_reported(editor: DiffEditor) -> None:
    result = editor.edit([smooth_image()], [HORSE], [ZEBRA], [0])
    assert (result.contrasts[0].min(), result.contrasts[0].max()) == (0, 1)
    assert result.contrasts[0].dtype == np.float32
    assert set(result.seconds) == {"mask", "encode", "decode"}
    assert all(spent > 0 for spent in result.seconds.values())


def test_an_empty_batch_is_an_empty_result(editor: DiffEditor) -> None:
    result = editor.edit([], [], [], [])
    assert (result.images, result.masks, result.unchanged) == ([], [], [])


@pytest.mark.parametrize("short", ["references", "queries", "seeds", "masks"])
def test_arguments_of_different_lengths_are_refused(editor: DiffEditor, short: str) -> None:
    arguments = {"references": [HORSE] * 2, "queries": [ZEBRA] * 2, "seeds": [0, 1], "masks": [None, None]}
    arguments[short] = arguments[short][:1]
    with pytest.raises(ValueError, match="one entry a row each"):
        editor.edit([smooth_image()] * 2, **arguments)


@pytest.mark.parametrize(
    "image",
    [np.zeros((32, 32), np.uint8), np.zeros((32, 32, 2), np.uint8), np.zeros((32, 32, 3), np.float32)],
    ids=["grey", "two channels", "float"],
)
def test_other_arrays_are_refused(editor: DiffEditor, image: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match=r"must be \(H, W, 3 or 4\) uint8"):
        editor.edit([image], [HORSE], [ZEBRA], [0])


@pytest.mark.parametrize(
    "mask", [np.zeros((16, 32), np.uint8), np.ones((32, 32), bool), np.ones((32, 32, 1), np.uint8)]
)
def test_masks_of_another_shape_or_kind_are_refused(editor: DiffEditor, mask: NDArray[np.uint8]) -> None:
    # a bool mask would be read as 1 of 255: an edit nobody sees
    with pytest.raises(ValueError, match="mask"):
        editor.edit([smooth_image()], [HORSE], [ZEBRA], [0], masks=[mask])
