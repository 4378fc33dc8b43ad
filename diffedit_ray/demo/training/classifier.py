"""A small classifier that says which kind of object a crop shows: the judge of edit success."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from diffedit_ray.demo.scenes import KINDS
from diffedit_ray.demo.training.loop import Recipe, TrainingRun, train
from diffedit_ray.evaluation.judge import CROP, ObjectClassifier, crop_object

LABELS = {kind: i for i, kind in enumerate(KINDS)}


def train_classifier(
    images: Tensor,
    objects: Sequence[Sequence[tuple[str, tuple[int, int, int, int]]]],
    run: TrainingRun,
    *,
    steps: int,
    batch: int,
) -> ObjectClassifier:
    """Train on crops of the scenes' own objects, blurred and jittered so that the autoencoder's softness is no clue.

    Args:
        images: (N, 3, 128, 128) uint8.
        objects: Per image its objects' kinds and boxes.
        run: Where and from which seed.
        steps: Optimiser steps.
        batch: Crops a step.
    """
    torch.manual_seed(run.seed + 2)
    network = ObjectClassifier([*KINDS]).to(run.device)
    flat = [(i, kind, box) for i, several in enumerate(objects) for kind, box in several]

    def step(index: int, generator: torch.Generator) -> Mapping[str, Tensor]:
        rng = np.random.default_rng((run.seed, index))
        crops, labels = [], []
        for pick in torch.randint(len(flat), (batch,), generator=generator).tolist():
            i, kind, box = flat[pick]
            crops.append(crop_object(images[i].permute(1, 2, 0).numpy(), _jittered(box, rng)))
            labels.append(LABELS[kind])
        x = torch.stack(crops).to(run.device)
        side = int(rng.integers(CROP // 2, CROP + 1))
        x = F.interpolate(F.interpolate(x, size=side, mode="area"), size=CROP, mode="bilinear")
        x = x + 0.1 * float(rng.random()) * torch.randn(x.shape, generator=generator).to(run.device)
        logits = network(x)
        truth = torch.tensor(labels, device=run.device)
        return {"loss": F.cross_entropy(logits, truth), "error": (logits.argmax(1) != truth).float().mean()}

    recipe = Recipe(steps=steps, learning_rate=2e-3, ema=0.99, weight_decay=1e-2)
    train("classifier", network, step, recipe, replace(run, seed=run.seed + 2))
    return network


def _jittered(box: tuple[int, int, int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    reach = max(box[2] - box[0], box[3] - box[1]) * 0.12
    moved: NDArray[np.float64] = np.asarray(box) + rng.uniform(-reach, reach, 4)
    left, top, right, bottom = (round(float(v)) for v in moved)
    return left, top, right, bottom
