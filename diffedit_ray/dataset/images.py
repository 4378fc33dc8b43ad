"""Bytes to pixels and back, with every limit that hostile input needs."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from diffedit_ray.errors import ErrorCode, RowError

Image.init()
FORMATS = tuple(f for f in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF") if f in Image.OPEN)
"""Formats read; Pillow's rarer decoders are its least tested ones."""

EXTENSIONS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


@dataclass(frozen=True)
class Picture:
    """A decoded image, upright.

    Attributes:
        pixels: (H, W, 3), or (H, W, 4) where the file has transparency; uint8 sRGB-like.
        icc_profile: The file's colour profile, if its pixels still mean what it says.
    """

    pixels: NDArray[np.uint8]
    icc_profile: bytes | None


def decode_image(data: bytes, uri: str, *, max_pixels: int) -> Picture:
    """Decode an image file: EXIF orientation applied, alpha kept, 8-bit RGB.

    Raises:
        RowError: `NOT_AN_IMAGE`, `CORRUPT_IMAGE` or `TOO_LARGE`.
    """
    if not data:
        raise RowError(ErrorCode.NOT_AN_IMAGE, f"{uri} is empty (0 bytes)")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow has a limit of its own, and the user's may be higher
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit replaces Pillow's bomb warning
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise RowError(
                        ErrorCode.TOO_LARGE,
                        f"{uri} is {width}×{height} pixels, more than max_pixels = {max_pixels:,} allows",
                    )
                image.load()
                profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA") else None
                return Picture(np.asarray(_to_rgb(_upright(image))), profile)
    except RowError:
        raise
    except UnidentifiedImageError:
        raise RowError(
            ErrorCode.NOT_AN_IMAGE, f"{uri} is not an image in a format we read ({', '.join(FORMATS)})"
        ) from None
    except Image.DecompressionBombError:
        raise RowError(ErrorCode.TOO_LARGE, f"{uri} has far more pixels than max_pixels = {max_pixels:,}") from None
    except (OSError, ValueError, SyntaxError, IndexError, KeyError, struct.error, zlib.error, EOFError) as error:
        # Pillow's decoders raise all of these on damaged files
        raise RowError(ErrorCode.CORRUPT_IMAGE, f"{uri} is damaged: {error}") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF raises anything; the pixels are still good
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def decode_mask(data: bytes, uri: str, size: tuple[int, int], *, max_pixels: int) -> NDArray[np.uint8]:
    """A hand-drawn mask, (H, W) uint8, 255 = edit: the image's luminance, white on black.

    Args:
        data: The mask's file.
        uri: Its name in errors.
        size: (width, height) it must have: those of the image it belongs to.
        max_pixels: As `decode_image`.

    Raises:
        RowError: `BAD_MASK`, whatever is wrong with it.
    """
    try:
        picture = decode_image(data, uri, max_pixels=max_pixels)
    except RowError as error:
        raise RowError(ErrorCode.BAD_MASK, error.message) from None
    height, width = picture.pixels.shape[:2]
    if (width, height) != size:
        raise RowError(
            ErrorCode.BAD_MASK,
            f"{uri} is {width}×{height} pixels, but its image is {size[0]}×{size[1]}; they must be the same size",
        )
    return np.asarray(Image.fromarray(picture.pixels[..., :3]).convert("L"))


def encode_image(pixels: NDArray[np.uint8], image_format: str, icc_profile: bytes | None = None) -> bytes:
    """An image file: "png" and "webp" lossless, "jpg" at quality 95 without chroma subsampling and without alpha.

    Args:
        pixels: (H, W) greyscale, (H, W, 3) or (H, W, 4) uint8.
        image_format: A key of `EXTENSIONS`.
        icc_profile: Kept in the file if given.
    """
    image = Image.fromarray(pixels)
    kinds: dict[str, dict[str, Any]] = {
        "png": {},
        "webp": {"lossless": True, "exact": True},  # exact: or the colours below full transparency are dropped
        "jpg": {"quality": 95, "subsampling": 0},
    }
    options = kinds[image_format]
    if image_format == "jpg" and image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    if icc_profile:
        options = {**options, "icc_profile": icc_profile}
    stream = io.BytesIO()
    image.save(stream, EXTENSIONS[image_format], **options)
    return stream.getvalue()
