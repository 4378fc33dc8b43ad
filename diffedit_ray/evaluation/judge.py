"""Which kind of object a crop shows, as a small convolutional network sees it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CROP = 40
"""Side of what the classifier sees, pixels."""


class ObjectClassifier(nn.Module):
    """Four convolutions and a mean: (B, 3, CROP, CROP) in [-1, 1] -> (B, kinds) logits.

    Args:
        kinds: The names of the classes, in order.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        super().__init__()
        self.kinds = list(kinds)
        layers: list[nn.Module] = []
        widths = (3, 24, 48, 96, 160)
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, stride=1 if i == 0 else 2)]
            layers += [nn.GroupNorm(8, outputs), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1] * 25, len(self.kinds))

    def forward(self, crops: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.features(crops).flatten(1))
        return logits

    @torch.inference_mode()
    def classify(self, images: Sequence[NDArray[np.uint8]], boxes: Sequence[tuple[int, int, int, int]]) -> list[str]:
        """The kind seen in each image's box.

        Args:
            images: (H, W, 3) uint8.
            boxes: Left, top, right, bottom in pixels.
        """
        crops = torch.stack([crop_object(image, box) for image, box in zip(images, boxes, strict=True)])
        return [self.kinds[int(i)] for i in self(crops).argmax(1)]

    def save(self, path: Path) -> None:
        """Write weights and class names as one safetensors file, in half precision."""
        weights = {name: value.half().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, path, metadata={"kinds": ",".join(self.kinds)})

    @classmethod
    def load(cls, path: Path) -> ObjectClassifier:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            network = cls(file.metadata()["kinds"].split(","))
            network.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
        return network.eval()


def crop_object(image: NDArray[np.uint8], box: tuple[int, int, int, int], margin: float = 0.08) -> Tensor:
    """The square around a box, a little wider: (H, W, 3) uint8 -> (3, CROP, CROP) in [-1, 1]."""
    left, top, right, bottom = box
    half = max(right - left, bottom - top) * (0.5 + margin)
    x, y = (left + right) / 2, (top + bottom) / 2
    square = (round(x - half), round(y - half), round(x + half), round(y + half))
    crop = Image.fromarray(image).crop(square).resize((CROP, CROP), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(crop, np.float32) / 127.5 - 1).permute(2, 0, 1)
