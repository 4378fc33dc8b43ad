"""The embedded world: scenes whose every mask is known, and a small model trained on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffedit_ray.settings import EditSettings

_ASSETS = Path(__file__).parent / "assets"

CLASSIFIER = "classifier.safetensors"
"""Beside the checkpoint: the judge of edit success (`evaluation.judge.ObjectClassifier`)."""


def demo_model() -> Path:
    """The folder of the embedded checkpoint, in the diffusers format."""
    return _ASSETS / "model"


def demo_settings() -> EditSettings:
    """The settings that suit the embedded model; the demo's manifest carries them as columns."""
    return EditSettings(mask_strength=0.6, mask_threshold=0.4, mask_grow=0, guidance_scale=5.0)


def demo_manifest() -> Path:
    """The demo's manifest; its image URIs are relative to it."""
    return _ASSETS / "manifest.parquet"


def demo_scenes() -> Path:
    """The Parquet file with the truth about the shipped images: captions, kinds, and where the true masks lie."""
    return _ASSETS / "scenes.parquet"


def demo_images() -> dict[str, NDArray[np.uint8]]:
    """The shipped images by name, such as "horse-grass": (128, 128, 3) uint8."""
    files = sorted((_ASSETS / "images").glob("*.png"))
    return {file.stem: np.asarray(Image.open(file).convert("RGB")) for file in files}


def demo_masks(name: str) -> list[NDArray[np.uint8]]:
    """The true alpha masks of a shipped image's objects, left to right: (128, 128) uint8, 255 = object."""
    files = sorted((_ASSETS / "masks").glob(f"{name}.*.png"))
    return [np.asarray(Image.open(file).convert("L")) for file in files]
