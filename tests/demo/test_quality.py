"""The embedded model on the shipped pictures: fails when the method or the model breaks.

The bounds are what the model must reach; its card has what it does reach.
"""

from __future__ import annotations

import pytest

from diffedit_ray.demo import CLASSIFIER, demo_model, demo_settings
from diffedit_ray.demo.edits import shipped_edits
from diffedit_ray.diffusion.editor import DiffEditor
from diffedit_ray.diffusion.model import LatentDiffusionModel
from diffedit_ray.evaluation.judge import ObjectClassifier
from diffedit_ray.evaluation.known_truth import Quality, measure


@pytest.fixture(scope="module")
def quality() -> Quality:
    editor = DiffEditor(LatentDiffusionModel.load(demo_model(), device="cpu"))
    judge = ObjectClassifier.load(demo_model() / CLASSIFIER)
    return measure(editor, judge, shipped_edits(), demo_settings())[0]


def test_autoencoder(quality: Quality) -> None:
    assert quality.autoencoder_psnr >= 28


def test_masks_find_the_object(quality: Quality) -> None:
    assert max(quality.iou.values()) >= 0.74
    assert quality.iou[0.5] >= 0.62


def test_background_is_left_alone(quality: Quality) -> None:
    assert quality.background_psnr >= 30


def test_the_new_object_is_there(quality: Quality) -> None:
    assert quality.success >= 0.75


def test_classifier_knows_real_objects(quality: Quality) -> None:
    assert quality.classifier_accuracy >= 0.97
