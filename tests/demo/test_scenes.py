from __future__ import annotations

import numpy as np
import pytest

from diffedit_ray.demo import demo_images, demo_masks
from diffedit_ray.demo.edits import known_edit, shipped_edits
from diffedit_ray.demo.scenes import FONT_PATH, KINDS, PLACES, SIZE, caption, draw_scene
from tests.services import required

needs_font = required(FONT_PATH.exists(), "the emoji font (Debian: fonts-noto-color-emoji)")


def test_world_is_large_enough() -> None:
    assert len(KINDS) >= 30
    assert len(PLACES) >= 8
    assert {"horse", "zebra", "apple", "pear"} <= set(KINDS)


def test_caption() -> None:
    assert caption(["pear", "cat"], "wood") == "a pear and a cat on wood"
    assert caption(["apple"], "snow") == "an apple in snow"


@needs_font
def test_a_seed_names_a_scene() -> None:
    first, again, other = draw_scene(7), draw_scene(7), draw_scene(8)
    assert np.array_equal(first.image, again.image)
    assert first.caption == again.caption
    assert not np.array_equal(first.image, other.image)


@needs_font
def test_masks_are_the_truth() -> None:
    """Two scenes that differ in one object differ nowhere outside that object's two masks."""
    for seed in range(20):
        kinds = draw_scene(seed).kinds
        new = next(kind for kind in KINDS if kind not in kinds)
        before = draw_scene(seed)
        after = draw_scene(seed, kinds=[new, *kinds[1:]])
        touched = (before.objects[0].alpha > 0) | (after.objects[0].alpha > 0)
        if len(kinds) == 1:
            assert np.array_equal(before.image[~touched], after.image[~touched])
        assert touched.any()
        assert not np.array_equal(before.image, after.image)


@needs_font
def test_objects_never_share_a_pixel() -> None:
    pairs = [scene for scene in map(draw_scene, range(40)) if len(scene.objects) == 2]
    assert pairs
    for scene in pairs:
        assert not ((scene.objects[0].alpha > 0) & (scene.objects[1].alpha > 0)).any()


@needs_font
def test_chosen_kinds_and_background() -> None:
    scene = draw_scene(3, kinds=["horse", "apple"], background="night")
    assert scene.caption == "a horse and an apple at night"
    assert scene.caption_with(1, "pear") == "a horse and a pear at night"
    with pytest.raises(ValueError, match="one or two of"):
        draw_scene(3, kinds=["unicorn"])


@needs_font
def test_known_edit_replaces_one_object() -> None:
    for seed in range(30):
        edit = known_edit(seed)
        assert edit.kind in edit.reference
        assert edit.new_kind in edit.query
        assert edit.new_kind not in edit.reference
        left, top, right, bottom = edit.box
        assert edit.truth[top:bottom, left:right].sum() == edit.truth.sum() > 0


def test_shipped_pictures_carry_their_truth() -> None:
    edits = shipped_edits()
    assert len(edits) >= 48
    assert {edit.image.shape for edit in edits} == {(SIZE, SIZE, 3)}
    assert all(0.01 < edit.truth.mean() < 0.6 for edit in edits)
    assert len(demo_masks("pear-cat-wood")) == 2
    assert len(demo_images()) == len(edits)


@needs_font
def test_shipped_pictures_are_what_the_code_draws() -> None:
    """Fonts and image libraries drift: the shipped truth must stay the world the model was trained on."""
    for edit in shipped_edits()[-8:]:
        drawn = draw_scene(edit.seed).image.astype(int)
        assert np.abs(drawn - edit.image).mean() < 1
