"""The embedded world: emoji objects on procedural backgrounds, every mask known.

A scene is drawn from a seed and nothing else, so training sets, held-out sets and
tests name their scenes by numbers. Sprites come from Debian's
``fonts-noto-color-emoji`` (SIL Open Font License 1.1).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE = 128
"""Side of a scene, pixels."""

FONT_PATH = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
LENS_BLUR = 1.0
"""Softness of every picture, pixels (standard deviation): that of a photograph at full size.

Perfectly sharp drawings would spend most of a small autoencoder on outlines.
"""

FONT_PIXELS = 109  # the only size the bitmap font carries

KINDS: dict[str, str] = {
    "horse": "🐴", "zebra": "🦓", "cat": "🐱", "dog": "🐶", "lion": "🦁", "tiger": "🐯",
    "bear": "🐻", "panda": "🐼", "fox": "🦊", "cow": "🐮", "pig": "🐷", "frog": "🐸",
    "monkey": "🐵", "rabbit": "🐰", "koala": "🐨", "apple": "🍎", "pear": "🍐",
    "orange": "🍊", "lemon": "🍋", "banana": "🍌", "strawberry": "🍓", "tomato": "🍅",
    "pumpkin": "🎃", "tree": "🌳", "cactus": "🌵", "rose": "🌹", "sunflower": "🌻",
    "mushroom": "🍄", "house": "🏠", "car": "🚗", "bus": "🚌", "star": "⭐",
}  # fmt: skip
"""Object kinds: the word a caption uses, and the emoji that draws it."""

PLACES: dict[str, str] = {
    "sky": "in the sky",
    "grass": "on grass",
    "sand": "on sand",
    "night": "at night",
    "bricks": "on bricks",
    "wood": "on wood",
    "snow": "in snow",
    "sea": "at sea",
}
"""Backgrounds: the name, and how a caption says it."""

Pixels = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class SceneObject:
    """One drawn object.

    Attributes:
        kind: A key of `KINDS`.
        alpha: (SIZE, SIZE) uint8, the share of each pixel this object covers, 255 = all.
        box: Left, top, right, bottom of the pixels it touches; right and bottom exclusive.
    """

    kind: str
    alpha: NDArray[np.uint8]
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """A drawn scene: (SIZE, SIZE, 3) uint8 RGB, and the truth about it."""

    seed: int
    image: NDArray[np.uint8]
    background: str
    objects: tuple[SceneObject, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds in the scene, left to right."""
        return tuple(o.kind for o in self.objects)

    @property
    def caption(self) -> str:
        """What the scene shows, as the training captions say it."""
        return caption(self.kinds, self.background)

    def caption_with(self, index: int, kind: str) -> str:
        """The caption after object `index` has become a `kind`."""
        kinds = [*self.kinds]
        kinds[index] = kind
        return caption(kinds, self.background)


def caption(kinds: Sequence[str], background: str) -> str:
    """``caption(["pear", "cat"], "wood")`` is "a pear and a cat on wood"."""
    nouns = " and ".join(f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}" for kind in kinds)
    return f"{nouns} {PLACES[background]}"


def draw_scene(seed: int, *, kinds: Sequence[str] | None = None, background: str | None = None) -> Scene:
    """Draw the scene that `seed` names.

    Args:
        seed: Any non-negative integer; the same seed gives the same pixels.
        kinds: One or two kinds to draw instead of the seed's own choice.
        background: A key of `PLACES` to draw instead of the seed's own choice.

    Raises:
        FileNotFoundError: The emoji font is not installed.
        ValueError: More than two kinds, or an unknown kind or background.
    """
    rng = np.random.default_rng(seed)
    count = 1 if rng.random() < 0.6 else 2
    own_kinds = rng.choice([*KINDS], size=2, replace=False)
    own_background = str(rng.choice([*PLACES]))
    kinds = [str(k) for k in own_kinds[:count]] if kinds is None else list(kinds)
    background = own_background if background is None else background
    if not 1 <= len(kinds) <= 2 or not set(kinds) <= set(KINDS) or background not in PLACES:
        raise ValueError(f"cannot draw {kinds} on {background!r}: one or two of {[*KINDS]}, on one of {[*PLACES]}")
    canvas = _soft(_BACKGROUNDS[background](rng))
    objects: list[SceneObject] = []
    for i, kind in enumerate(kinds):
        alone = len(kinds) == 1
        height = rng.uniform(76, 92) if alone else rng.uniform(50, 58)
        sprite = _turned(kind, height, rng)
        h, w = sprite.shape[:2]
        middle = SIZE / 2 if alone else SIZE * (0.26 if i == 0 else 0.74)
        spread = 9 if alone else 3
        left = _within(middle - w / 2 + rng.uniform(-spread, spread), SIZE - w)
        top = _within((SIZE - h) / 2 + rng.uniform(-6, 12), SIZE - h)
        alpha = np.zeros((SIZE, SIZE), np.float32)
        colour = np.zeros((SIZE, SIZE, 3), np.float32)
        alpha[top : top + h, left : left + w] = sprite[..., 3]
        colour[top : top + h, left : left + w] = sprite[..., :3] * sprite[..., 3:]
        alpha, colour = _soft(alpha), _soft(colour)
        for other in objects:  # two objects never share a pixel: each mask is the whole truth
            alpha[other.alpha > 0], colour[other.alpha > 0] = 0, 0
        alpha8 = np.rint(alpha * 255).astype(np.uint8)
        share = alpha8[..., None].astype(np.float32) / 255
        canvas = canvas * (1 - share) + colour  # colour is premultiplied
        ys, xs = np.nonzero(alpha8)
        box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        objects.append(SceneObject(kind, alpha8, box))
    image = np.rint(canvas.clip(0, 1) * 255).astype(np.uint8)
    return Scene(seed, image, background, tuple(objects))


def _within(value: float, limit: int) -> int:
    return int(np.clip(round(value), 0, max(limit, 0)))


@functools.cache
def _sprite(kind: str) -> Image.Image:
    if not FONT_PATH.exists():
        raise FileNotFoundError(
            f"{FONT_PATH} is missing: new scenes need the emoji font (Debian: apt-get install fonts-noto-color-emoji)"
        )
    font = ImageFont.truetype(str(FONT_PATH), FONT_PIXELS)
    page = Image.new("RGBA", (FONT_PIXELS * 2, FONT_PIXELS * 2))
    ImageDraw.Draw(page).text((16, 16), KINDS[kind], font=font, embedded_color=True)
    return page.crop(page.getbbox())


def _turned(kind: str, height: float, rng: np.random.Generator) -> Pixels:
    """The sprite flipped, turned and scaled: (h, w, 4) floats in [0, 1], at most `height` on its longer side."""
    flip, angle = rng.random() < 0.5, rng.uniform(-8, 8)
    sprite = _sprite(kind)
    if flip:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # premultiplied ("RGBa") while resampling, or transparent black would bleed into the edges
    sprite = sprite.convert("RGBa").rotate(angle, Image.Resampling.BICUBIC, expand=True)
    sprite = sprite.crop(sprite.getbbox())
    scale = height / max(sprite.size)
    sprite = sprite.resize((round(sprite.width * scale), round(sprite.height * scale)), Image.Resampling.BOX)
    return np.asarray(sprite.convert("RGBA"), np.float32) / 255


def _soft(image: Pixels) -> Pixels:
    """Blurred by the lens: (H, W) or (H, W, C)."""
    planes = np.atleast_3d(image)
    blur = ImageFilter.GaussianBlur(LENS_BLUR)
    soft = np.stack([_blurred(planes[..., c], blur) for c in range(planes.shape[2])], axis=-1)
    return soft.reshape(image.shape)


def _blurred(plane: Pixels, blur: ImageFilter.GaussianBlur) -> Pixels:
    # Pillow blurs 8-bit planes only; scenes end up as 8 bits anyway
    eight = Image.fromarray(np.rint(plane.clip(0, 1) * 255).astype(np.uint8))
    return np.asarray(eight.filter(blur), np.float32) / 255


_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE


def _noise(rng: np.random.Generator, cells_x: int, cells_y: int) -> Pixels:
    """Smooth noise in about [-1, 1] with the given number of bumps across and down."""
    coarse = rng.uniform(-1, 1, (cells_y, cells_x)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _mix(a: Sequence[float], b: Sequence[float], share: Pixels) -> Pixels:
    start, end = np.asarray(a, np.float32) / 255, np.asarray(b, np.float32) / 255
    mixed: Pixels = start + (end - start) * share[..., None]
    return mixed


def _sky(rng: np.random.Generator) -> Pixels:
    clouds = (_noise(rng, 4, 6) * 1.2 - 0.2).clip(0, 1)
    return _mix((92, 164, 236), (190, 224, 250), (_Y * 0.7 + clouds * 0.6).clip(0, 1))


def _grass(rng: np.random.Generator) -> Pixels:
    return _mix((62, 132, 44), (128, 190, 76), (0.4 + 0.35 * _noise(rng, 7, 5) + 0.3 * (1 - _Y)).clip(0, 1))


def _sand(rng: np.random.Generator) -> Pixels:
    ripples = np.sin(2 * np.pi * (_Y * 6 + 0.5 * _noise(rng, 3, 3)))
    return _mix((205, 170, 110), (240, 214, 160), 0.5 + 0.35 * ripples)


def _night(rng: np.random.Generator) -> Pixels:
    canvas = _mix((12, 14, 48), (48, 42, 104), (_Y + 0.25 * _noise(rng, 4, 4)).clip(0, 1))
    for x, y in rng.uniform(0.04, 0.96, (12, 2)):
        glow = np.exp(-((_X - x) ** 2 + (_Y - y) ** 2) * SIZE**2 / 4)
        canvas = canvas + glow[..., None] * np.float32(0.8)
    return canvas


def _bricks(rng: np.random.Generator) -> Pixels:
    rows = _Y * 6 + rng.random()
    columns = _X * 3.5 + 0.5 * (np.floor(rows) % 2) + rng.random()
    joint = np.maximum((np.abs(rows % 1 - 0.5) - 0.38) / 0.06, (np.abs(columns % 1 - 0.5) - 0.43) / 0.04).clip(0, 1)
    wall = _mix((150, 72, 54), (186, 98, 76), 0.5 + 0.5 * _noise(rng, 4, 7))
    mortar = np.asarray((206, 190, 176), np.float32) / 255
    canvas: Pixels = wall * (1 - joint[..., None]) + mortar * joint[..., None]
    return canvas


def _wood(rng: np.random.Generator) -> Pixels:
    grain = np.sin(2 * np.pi * (_X * 7 + 0.7 * _noise(rng, 3, 2)))
    return _mix((126, 80, 42), (172, 118, 68), 0.5 + 0.4 * grain)


def _snow(rng: np.random.Generator) -> Pixels:
    return _mix((208, 220, 236), (252, 253, 255), (0.5 + 0.5 * _noise(rng, 4, 4) + 0.3 * (_Y - 0.5)).clip(0, 1))


def _sea(rng: np.random.Generator) -> Pixels:
    waves = np.sin(2 * np.pi * (_Y * 7 + 0.6 * _noise(rng, 5, 3)))
    return _mix((16, 84, 128), (58, 150, 180), (0.45 + 0.3 * waves + 0.2 * (1 - _Y)).clip(0, 1))


_BACKGROUNDS: dict[str, Callable[[np.random.Generator], Pixels]] = {
    "sky": _sky,
    "grass": _grass,
    "sand": _sand,
    "night": _night,
    "bricks": _bricks,
    "wood": _wood,
    "snow": _snow,
    "sea": _sea,
}
