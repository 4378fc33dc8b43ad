from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from diffedit_ray.dataset.images import Picture, decode_image, decode_mask, encode_image
from diffedit_ray.errors import ErrorCode, RowError

LIMIT = 1_000_000


def _pixels(height: int = 20, width: int = 30, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def _file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _decode(data: bytes, max_pixels: int = LIMIT) -> Picture:
    return decode_image(data, "a.png", max_pixels=max_pixels)


def _code(data: bytes, max_pixels: int = LIMIT) -> ErrorCode:
    with pytest.raises(RowError) as caught:
        _decode(data, max_pixels)
    assert "a.png" in caught.value.message
    return caught.value.code


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to nothing in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_is_applied(self, orientation: int) -> None:
        upright = np.zeros((8, 16, 3), np.uint8)
        upright[:4, :4] = 255  # the top left corner
        turned = {
            1: upright,
            2: upright[:, ::-1],
            3: upright[::-1, ::-1],
            4: upright[::-1],
            5: upright.transpose(1, 0, 2),
            6: np.rot90(upright, 1),
            7: upright[::-1, ::-1].transpose(1, 0, 2),
            8: np.rot90(upright, -1),
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = _file(Image.fromarray(np.ascontiguousarray(turned)), "PNG", exif=exif)
        assert np.array_equal(_decode(data).pixels, upright)

    @pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\xff" * 40])
    def test_broken_exif_does_not_cost_the_picture(self, exif: bytes) -> None:
        picture = _decode(_file(Image.fromarray(_pixels()), "JPEG", exif=exif))
        assert picture.pixels.shape == (20, 30, 3)


class TestModes:
    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_alpha_is_kept(self, mode: str, kind: str) -> None:
        pixels = _decode(_file(Image.fromarray(_pixels(channels=4)).convert(mode), kind)).pixels
        assert pixels.shape == (20, 30, 4)
        assert np.array_equal(pixels[..., 3], _pixels(channels=4)[..., 3])

    def test_a_palette_with_a_transparent_entry_has_alpha(self) -> None:
        image = Image.fromarray(np.repeat([[0, 1, 2]], 3, 0).astype(np.uint8), "P")
        image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
        assert _decode(_file(image)).pixels[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
        transparent = _decode(_file(image, transparency=1)).pixels
        assert transparent[..., 3].tolist() == [[255, 0, 255]] * 3

    @pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("YCbCr", "JPEG")])
    def test_other_colours_become_rgb(self, mode: str, kind: str) -> None:
        image = Image.new("RGB", (30, 20), "white").convert(mode)
        pixels = _decode(_file(image, kind)).pixels
        assert pixels.shape == (20, 30, 3)
        assert pixels.min() >= 253

    @pytest.mark.parametrize("kind", ["PNG", "TIFF"])
    def test_16_bit_greyscale_keeps_its_upper_byte(self, kind: str) -> None:
        ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
        pixels = _decode(_file(Image.fromarray(ramp), kind)).pixels
        assert np.array_equal(pixels, np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, -1))

    def test_an_animation_is_its_first_frame(self) -> None:
        first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
        data = _file(first, "GIF", save_all=True, append_images=[second])
        assert _decode(data).pixels[0, 0, :3].tolist() == [255, 0, 0]


class TestHostileFiles:
    def test_an_empty_file(self) -> None:
        assert _code(b"") is ErrorCode.NOT_AN_IMAGE

    @pytest.mark.parametrize("data", [b"<html>not found</html>", b"\0" * 1000, b"%PDF-1.7 ...", b"\x89PNG"])
    def test_no_image(self, data: bytes) -> None:
        assert _code(data) is ErrorCode.NOT_AN_IMAGE

    def test_a_format_outside_the_list(self) -> None:
        # Pillow would open it
        assert _code(_file(Image.fromarray(_pixels()), "PPM")) is ErrorCode.NOT_AN_IMAGE

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
    @pytest.mark.parametrize("kept", [0.5, 0.9])
    def test_truncated(self, kind: str, kept: float) -> None:
        data = _file(Image.fromarray(_pixels(200, 200)), kind)
        # a TIFF has its directory at the end, and without it is anything
        allowed = (
            {ErrorCode.CORRUPT_IMAGE, ErrorCode.NOT_AN_IMAGE} if kind in ("TIFF", "WEBP") else {ErrorCode.CORRUPT_IMAGE}
        )
        assert _code(data[: int(len(data) * kept)]) in allowed

    def test_damaged_anywhere_is_an_error_of_ours_or_no_error(self) -> None:
        rng = np.random.default_rng(0)
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
            whole = _file(Image.fromarray(_pixels()), kind)
            for _ in range(40):
                data = bytearray(whole)
                for place in rng.integers(0, len(data), 5):
                    data[place] = rng.integers(0, 256)
                try:
                    picture = _decode(bytes(data))
                except RowError:
                    continue
                assert picture.pixels.dtype == np.uint8

    def test_too_many_pixels_are_refused_before_they_are_decoded(self) -> None:
        data = _file(Image.fromarray(_pixels(20, 30)))
        assert _decode(data, max_pixels=600).pixels.shape == (20, 30, 3)
        assert _code(data, max_pixels=599) is ErrorCode.TOO_LARGE
        # were these decoded, they would be corrupt
        assert _code(_png_header(2000, 2000)) is ErrorCode.TOO_LARGE
        assert _code(_png_header(2**30, 2**30)) is ErrorCode.TOO_LARGE

    def test_the_users_limit_may_be_above_pillows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        assert _decode(_file(Image.fromarray(_pixels(20, 30)))).pixels.shape == (20, 30, 3)


class TestMasks:
    def _mask(self, data: bytes, size: tuple[int, int] = (30, 20)) -> NDArray[np.uint8]:
        return decode_mask(data, "m.png", size, max_pixels=LIMIT)

    @pytest.mark.parametrize("mode", ["L", "RGB", "1", "P"])
    def test_white_is_where_to_edit(self, mode: str) -> None:
        drawn = np.zeros((20, 30), np.uint8)
        drawn[5:10, 3:9] = 255
        mask = self._mask(_file(Image.fromarray(drawn).convert(mode)))
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, drawn)

    def test_another_size_is_a_bad_mask(self) -> None:
        with pytest.raises(RowError, match=r"m\.png is 30×20 pixels, but its image is 20×30") as caught:
            self._mask(_file(Image.new("L", (30, 20))), (20, 30))
        assert caught.value.code is ErrorCode.BAD_MASK

    @pytest.mark.parametrize("data", [b"", b"junk", _png_header(5000, 5000), _png_header(30, 20)])
    def test_whatever_is_wrong_is_a_bad_mask(self, data: bytes) -> None:
        with pytest.raises(RowError) as caught:
            self._mask(data)
        assert caught.value.code is ErrorCode.BAD_MASK


class TestEncoding:
    @pytest.mark.parametrize("image_format", ["png", "webp"])
    @pytest.mark.parametrize("channels", [3, 4])
    def test_lossless_round_trip(self, image_format: str, channels: int) -> None:
        pixels = _pixels(channels=channels)
        if channels == 4:
            pixels[:10, :, 3] = 0  # colours below full transparency are pixels too
        assert np.array_equal(_decode(encode_image(pixels, image_format)).pixels, pixels)

    def test_the_bytes_depend_on_nothing_else(self) -> None:
        assert encode_image(_pixels(), "png") == encode_image(_pixels(), "png")

    def test_greyscale(self) -> None:
        mask = _pixels()[..., 0]
        assert np.array_equal(decode_mask(encode_image(mask, "png"), "m", (30, 20), max_pixels=LIMIT), mask)

    def test_jpg_is_near_and_has_no_alpha(self) -> None:
        smooth = np.asarray(Image.fromarray(_pixels(4, 6)).resize((60, 40), Image.Resampling.BICUBIC))
        decoded = _decode(encode_image(smooth, "jpg")).pixels
        assert np.abs(decoded.astype(int) - smooth).mean() < 3
        see_through = np.concatenate([smooth, np.zeros((40, 60, 1), np.uint8)], -1)
        over_white = _decode(encode_image(see_through, "jpg")).pixels
        assert over_white.shape == (40, 60, 3)
        assert over_white.min() > 250

    @pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
    def test_the_colour_profile_is_kept(self, image_format: str) -> None:
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        picture = _decode(_file(Image.fromarray(_pixels()), icc_profile=profile))
        assert picture.icc_profile == profile
        assert _decode(encode_image(picture.pixels, image_format, picture.icc_profile)).icc_profile == profile

    def test_a_profile_of_other_colours_is_not(self) -> None:
        # a CMYK profile over RGB pixels would be wrong
        data = _file(Image.new("CMYK", (8, 8)), "JPEG", icc_profile=b"some CMYK profile")
        assert _decode(data).icc_profile is None
