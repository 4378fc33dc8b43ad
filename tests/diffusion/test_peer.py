"""diffusers' StableDiffusionDiffEditPipeline: the same contrast, and none of its nine defects.

The pipeline is deprecated since diffusers 0.33 and is not mended any more; where a defect is
shown here, it is the pipeline of diffusers 0.42.1 that has it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionDiffEditPipeline
from numpy.typing import NDArray
from PIL import Image

from diffedit_ray.diffusion.editor import DiffEditor
from diffedit_ray.diffusion.mask import noise_contrast
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.diffusion.noise import row_noise
from diffedit_ray.diffusion.schedule import CLEAN, add_noise
from diffedit_ray.evaluation.peer import build_peer
from diffedit_ray.settings import EditSettings
from tests.diffusion.helpers import HORSE, PEAR, SHORT, ZEBRA, latents_of, smooth_image, watched

MAPS = SHORT.mask_maps
MASKING: dict[str, Any] = {"num_maps_per_mask": MAPS}


@pytest.fixture(scope="module")
def peer(tiny_model: LatentDiffusionModel) -> StableDiffusionDiffEditPipeline:
    return build_peer(tiny_model)


@pytest.fixture
def editor(tiny_model: LatentDiffusionModel) -> DiffEditor:
    return DiffEditor(tiny_model, SHORT)


def picture(image: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(image)


def generators(rows: int) -> list[torch.Generator]:
    """One for each map of each row, so that a row's noise does not depend on how many rows follow."""
    return [torch.Generator().manual_seed(i) for i in range(rows * MAPS)]


def test_contrast_is_the_peers_given_its_noise(
    peer: StableDiffusionDiffEditPipeline, tiny_model: LatentDiffusionModel
) -> None:
    image = smooth_image()
    with watched(tiny_model.unet) as seen:
        mask = peer.generate_mask(
            picture(image), ZEBRA, source_prompt=HORSE, generator=torch.Generator().manual_seed(5), **MASKING
        )
    # the pipeline draws its posterior samples first and its noise second
    generator, t = torch.Generator().manual_seed(5), 481
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        posterior = tiny_model.vae.encode(pixels.repeat_interleave(MAPS, 0)).latent_dist
    sampled = posterior.sample(generator) * tiny_model.vae.config.scaling_factor
    z = torch.randn(sampled.shape, generator=generator)
    x_t = add_noise(sampled, z, tiny_model.schedule.alpha(tiny_model.schedule.time_at(50, 0.5)))
    torch.testing.assert_close(seen.latents[0], x_t.repeat(4, 1, 1, 1), rtol=1e-4, atol=1e-4)

    query, reference = (tiny_model.embed_prompts([text]).repeat(MAPS, 1, 1) for text in (ZEBRA, HORSE))
    d = noise_contrast(tiny_model.predict(x_t, t, query), tiny_model.predict(x_t, t, reference)).mean(0)
    # guidance w only scales the contrast: by w, but by w − 1 here, as defect 1 swaps the two terms
    source_negative, source, target_negative, target = seen.outputs[0].chunk(4)
    guided = [low + 7.5 * (high - low) for low, high in ((source_negative, source), (target_negative, target))]
    torch.testing.assert_close((guided[1] - guided[0]).abs().mean((0, 1)), 6.5 * d, rtol=1e-3, atol=1e-4)
    assert np.array_equal(mask[0].astype(bool), (d > 1.5 * d.mean()).numpy())
    assert 0 < mask.mean() < 1


def test_encoding_is_the_peers_when_it_inverts_as_the_paper_says(
    peer: StableDiffusionDiffEditPipeline, editor: DiffEditor, tiny_model: LatentDiffusionModel
) -> None:
    x0 = latents_of(tiny_model, smooth_image())
    # the pipeline takes an image of four channels for latents, so no posterior sample gets in the way
    inverted = peer.invert("", x0, num_inference_steps=10, guidance_scale=1.0).latents[0]
    [path] = editor.encode(x0, SHORT)
    assert len(inverted) == len(path.latents) - 1 == 8
    for theirs, ours in zip(inverted.flip(0), path.latents[1:], strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_decoding_is_the_peers_where_everything_is_edited(
    peer: StableDiffusionDiffEditPipeline, editor: DiffEditor, tiny_model: LatentDiffusionModel
) -> None:
    # with nothing to composite, defect 2 cannot show
    [path] = editor.encode(latents_of(tiny_model, smooth_image()), SHORT)
    noisiest_first = torch.stack(path.latents[:0:-1])[None]
    theirs = peer(ZEBRA, torch.ones(1, 1, 8, 8), noisiest_first, num_inference_steps=10, output_type="latent").images
    with torch.inference_mode():
        ours = editor.decode([path], torch.ones(1, 8, 8, dtype=torch.bool), [ZEBRA], SHORT)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_defect_1_the_texts_are_compared_and_not_their_negatives(
    peer: StableDiffusionDiffEditPipeline, editor: DiffEditor, tiny_model: LatentDiffusionModel
) -> None:
    query, reference, empty = (tiny_model.embed_prompts([text]) for text in (ZEBRA, HORSE, ""))
    with watched(tiny_model.unet) as seen:
        editor.find_masks(latents_of(tiny_model, smooth_image()), [HORSE], [ZEBRA], [0], SHORT)
    assert torch.equal(torch.cat(seen.embeddings), torch.cat([query, reference]).repeat(MAPS, 1, 1))
    # the peer: each prompt sits where its negative belongs, so guidance pushes away from it
    with watched(tiny_model.unet) as seen:
        peer.generate_mask(picture(smooth_image()), ZEBRA, source_prompt=HORSE, **MASKING)
    unconditional, conditional = seen.embeddings[0].chunk(4)[2:]
    assert torch.equal(unconditional, query.repeat(MAPS, 1, 1))
    assert torch.equal(conditional, empty.repeat(MAPS, 1, 1))


def test_defect_2_the_background_ends_on_the_clean_latent(
    peer: StableDiffusionDiffEditPipeline, editor: DiffEditor, tiny_model: LatentDiffusionModel
) -> None:
    x0 = latents_of(tiny_model, smooth_image())
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, :4] = True
    [path] = editor.encode(x0, SHORT)
    with torch.inference_mode():
        ours = editor.decode([path], mask, [ZEBRA], SHORT)
    assert path.times[:2] == [CLEAN, 1]
    assert torch.equal(ours[:, :, 4:], x0[:, :, 4:])
    # the peer: one step too noisy, down to the end
    noisiest_first = torch.stack(path.latents[:0:-1])[None]
    theirs = peer(ZEBRA, mask[:, None].float(), noisiest_first, num_inference_steps=10, output_type="latent").images
    assert torch.equal(theirs[0, :, 4:], path.latents[1][:, 4:])
    assert not torch.equal(theirs[:, :, 4:], x0[:, :, 4:])


def test_defect_3_a_mask_does_not_depend_on_its_batch_mates(
    peer: StableDiffusionDiffEditPipeline, editor: DiffEditor
) -> None:
    image, mate = smooth_image(seed=1), smooth_image(seed=2)
    alone = editor.edit([image], [HORSE], [ZEBRA], [0])
    for mates_query in (HORSE, PEAR):
        together = editor.edit([image, mate], [HORSE, HORSE], [ZEBRA, mates_query], [0, 1])
        assert np.array_equal(together.latent_masks[0], alone.latent_masks[0])
    assert 0 < alone.latent_masks[0].mean() < 1
    # the peer: a mate without any contrast halves the mean that the threshold hangs on
    by_itself = peer.generate_mask(picture(image), [ZEBRA], source_prompt=[HORSE], generator=generators(1), **MASKING)
    in_batch = peer.generate_mask(
        [picture(image), picture(mate)],
        [ZEBRA, HORSE],
        source_prompt=[HORSE, HORSE],
        generator=generators(2),
        **MASKING,
    )
    assert in_batch[0].sum() > 1.5 * by_itself[0].sum()


def test_defect_4_several_edits_of_several_images_keep_their_own_masks(
    peer: StableDiffusionDiffEditPipeline, editor: DiffEditor, tiny_model: LatentDiffusionModel
) -> None:
    top, bottom = np.zeros((2, 32, 32), np.uint8)
    top[:16], bottom[16:] = 255, 255
    images = [smooth_image(seed=1)] * 2 + [smooth_image(seed=2)] * 2
    result = editor.edit(images, [HORSE] * 4, [ZEBRA, PEAR] * 2, [0, 1, 2, 3], masks=[top, top, bottom, bottom])
    for original, edited, mask in zip(images, result.images, (top, top, bottom, bottom), strict=True):
        assert np.array_equal(edited[mask == 0], original[mask == 0])
        assert not np.array_equal(edited[mask > 0], original[mask > 0])
    # the peer: the second copy of the first image, whose mask is empty, is edited with the second image's mask
    x0 = torch.cat([latents_of(tiny_model, images[0]), latents_of(tiny_model, images[2])])
    noisiest_first = torch.stack([torch.stack(path.latents[:0:-1]) for path in editor.encode(x0, SHORT)])
    masks = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    latents = peer(
        [ZEBRA, ZEBRA],
        masks,
        noisiest_first,
        num_inference_steps=10,
        num_images_per_prompt=2,
        output_type="latent",
    ).images
    assert torch.equal(latents[0], noisiest_first[0, -1])
    assert not torch.equal(latents[1], noisiest_first[0, -1])


def test_defect_5_equal_texts_are_no_edit_and_not_an_edit_of_everything(
    peer: StableDiffusionDiffEditPipeline, editor: DiffEditor
) -> None:
    result = editor.edit([smooth_image()], [HORSE], [HORSE], [0])
    assert result.unchanged == [True]
    assert not result.masks[0].any()
    # the peer: 0 / 0 is not below the threshold
    assert peer.generate_mask(picture(smooth_image()), HORSE, source_prompt=HORSE, **MASKING).all()


def test_defect_6_a_mask_is_a_picture(peer: StableDiffusionDiffEditPipeline, editor: DiffEditor) -> None:
    result = editor.edit([smooth_image(100, 70)], [HORSE], [ZEBRA], [0])
    mask = Image.fromarray(result.masks[0])
    assert (mask.mode, mask.size) == ("L", (100, 70))
    assert mask.getextrema()[1] == 255
    with pytest.raises(TypeError):  # the peer
        peer.generate_mask(picture(smooth_image()), ZEBRA, source_prompt=HORSE, output_type="pil", **MASKING)


def test_defect_7_encoding_knows_no_text_and_no_guidance(
    peer: StableDiffusionDiffEditPipeline, editor: DiffEditor, tiny_model: LatentDiffusionModel
) -> None:
    x0 = latents_of(tiny_model, smooth_image())
    empty = tiny_model.embed_prompts([""])
    with watched(tiny_model.unet) as seen:
        editor.encode(x0, EditSettings())
    assert seen.evaluations == 40
    assert all(torch.equal(text, empty) for text in seen.embeddings)
    with watched(tiny_model.unet) as seen:  # the peer
        peer.invert(HORSE, x0)
    assert seen.evaluations == 80


def test_defect_8_every_map_has_the_same_image_under_its_noise(
    peer: StableDiffusionDiffEditPipeline, editor: DiffEditor, tiny_model: LatentDiffusionModel
) -> None:
    x0, alpha = latents_of(tiny_model, smooth_image()), tiny_model.schedule.alpha(401)
    with watched(tiny_model.unet) as seen:
        editor.find_masks(x0, [HORSE], [ZEBRA], [9], SHORT)
    seen_latents = torch.cat(seen.latents)
    for x_t in (seen_latents[::2], seen_latents[1::2]):  # under the query and under the reference
        found = (x_t - (1 - alpha).sqrt() * row_noise(9, MAPS, x0.shape[1:])) / alpha.sqrt()
        torch.testing.assert_close(found, x0.expand_as(found), rtol=1e-4, atol=1e-4)
    # the peer: take its noise away again, and the maps' images differ
    generator = torch.Generator().manual_seed(9)
    with watched(tiny_model.unet) as seen:
        peer.generate_mask(picture(smooth_image()), ZEBRA, source_prompt=HORSE, generator=generator, **MASKING)
    generator.manual_seed(9)
    torch.randn(MAPS, *x0.shape[1:], generator=generator)
    z, alpha = torch.randn(MAPS, *x0.shape[1:], generator=generator), tiny_model.schedule.alpha(481)
    found = (seen.latents[0][:MAPS] - (1 - alpha).sqrt() * z) / alpha.sqrt()
    assert (found[1:] - found[0]).abs().mean() > 0.1 * x0.std()


def test_defect_9_any_encoding_ratio_is_one_setting(
    peer: StableDiffusionDiffEditPipeline, editor: DiffEditor, tiny_model: LatentDiffusionModel
) -> None:
    for ratio, steps in ((0.3, 3), (0.5, 5), (1.0, 10)):
        with watched(tiny_model.unet) as seen:
            result = editor.edit(
                [smooth_image()], [HORSE], [ZEBRA], [0], settings=SHORT.with_overrides({"encoding_ratio": ratio})
            )
        assert seen.evaluations == 2 * MAPS + steps + 2 * steps
        assert not result.unchanged[0]
    x0 = latents_of(tiny_model, smooth_image())
    inverted = peer.invert(HORSE, x0, num_inference_steps=10).latents
    with pytest.raises(ValueError, match="image_latents"):  # the peer
        peer(ZEBRA, torch.ones(1, 1, 8, 8), inverted, num_inference_steps=10, inpaint_strength=0.5)
