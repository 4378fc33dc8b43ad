"""How well a model edits scenes whose every object mask is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from diffedit_ray.diffusion.editor import DiffEditor
from diffedit_ray.evaluation.judge import ObjectClassifier
from diffedit_ray.evaluation.metrics import mask_iou, psnr, upsampled
from diffedit_ray.settings import EditSettings

THRESHOLDS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65)


@dataclass(frozen=True)
class KnownEdit:
    """One edit with a right answer.

    Attributes:
        image: (H, W, 3) uint8.
        reference: What it shows.
        query: What it should show: one object replaced.
        truth: (H, W) bool, the pixels of the object that is to change.
        box: That object's left, top, right, bottom.
        kind: What is there now.
        new_kind: What should be there.
        seed: Of the row's noise.
    """

    image: NDArray[np.uint8]
    reference: str
    query: str
    truth: NDArray[np.bool_]
    box: tuple[int, int, int, int]
    kind: str
    new_kind: str
    seed: int


@dataclass(frozen=True)
class Quality:
    """What `measure` finds, each a mean over the edits.

    Attributes:
        edits: How many.
        autoencoder_psnr: dB, decode(encode(x)) against x.
        iou: Threshold -> mask IoU at pixel resolution, the contrast upsampled bilinearly.
        background_psnr: dB outside the true mask, after paste-back.
        success: Share of edits in which the classifier sees the queried object where the old one was.
        classifier_accuracy: Share of untouched objects that the classifier names rightly.
    """

    edits: int
    autoencoder_psnr: float
    iou: dict[float, float]
    background_psnr: float
    success: float
    classifier_accuracy: float

    @property
    def best_threshold(self) -> float:
        """The single threshold with the highest mean IoU."""
        return max(self.iou, key=lambda t: self.iou[t])


def measure(
    editor: DiffEditor, judge: ObjectClassifier, edits: Sequence[KnownEdit], settings: EditSettings, batch: int = 24
) -> tuple[Quality, list[NDArray[np.uint8]]]:
    """Do every edit and score it; also returns the edited images.

    Args:
        editor: Holds the model.
        judge: The classifier.
        edits: What to do.
        settings: How; the IoU at other thresholds is read off the same contrasts.
        batch: Edits at once.
    """
    seen, done = [], []
    ious: dict[float, list[float]] = {t: [] for t in THRESHOLDS}
    background, reconstruction = [], []
    for start in range(0, len(edits), batch):
        part = edits[start : start + batch]
        result = editor.edit(
            [e.image for e in part],
            [e.reference for e in part],
            [e.query for e in part],
            [e.seed for e in part],
            settings=settings,
        )
        for e, image, contrast in zip(part, result.images, result.contrasts, strict=True):
            soft = upsampled(contrast, (e.image.shape[1], e.image.shape[0]))
            for t in THRESHOLDS:
                ious[t].append(mask_iou(soft >= t, e.truth))
            background.append(psnr(image, e.image, ~e.truth))
            done.append(image)
        pixels = np.stack([e.image for e in part])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        y = editor.model.decode_latents(editor.model.encode_images(x)).permute(0, 2, 3, 1).cpu().numpy()
        rebuilt = np.rint((y + 1) * 127.5).astype(np.uint8)
        reconstruction += [psnr(a, b) for a, b in zip(rebuilt, pixels, strict=True)]
    seen = judge.classify(done, [e.box for e in edits])
    before = judge.classify([e.image for e in edits], [e.box for e in edits])
    quality = Quality(
        edits=len(edits),
        autoencoder_psnr=float(np.mean(reconstruction)),
        iou={t: float(np.mean(v)) for t, v in ious.items()},
        background_psnr=float(np.mean(background)),
        success=float(np.mean([s == e.new_kind for s, e in zip(seen, edits, strict=True)])),
        classifier_accuracy=float(np.mean([b == e.kind for b, e in zip(before, edits, strict=True)])),
    )
    return quality, done
