"""Decoding: every kind of file against Pillow, and every kind of damage refused with a reason."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from distcls.errors import BadImage
from distcls.imaging import MAX_PIXELS, decode, decode_file
from tests.pictures import Pixels, corners, encode, png_header, smooth

PICTURE = smooth()
IMAGE = Image.fromarray(PICTURE)


def refused(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, max_pixels)
    text = str(caught.value)
    assert "\n" not in text
    return text


def by_pillow(data: bytes) -> Pixels:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def assert_close(ours: Pixels, theirs: Pixels, tolerance: int) -> None:
    assert ours.dtype == np.uint8
    assert ours.shape == theirs.shape
    assert int(np.abs(ours.astype(int) - theirs.astype(int)).max()) <= tolerance


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_come_back_exactly(kind: str, options: dict[str, Any]) -> None:
    assert np.array_equal(decode(encode(PICTURE, kind, **options)), PICTURE)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GIF", {}),
        ("WEBP", {"quality": 90}),
        ("JPEG", {"quality": 90}),
        ("JPEG", {"quality": 90, "progressive": True}),
        ("JPEG", {"quality": 90, "subsampling": 0}),
        ("MPO", {"save_all": True, "append_images": [IMAGE]}),
    ],
)
def test_lossy_formats_equal_pillow(kind: str, options: dict[str, Any]) -> None:
    data = encode(PICTURE, kind, **options)
    assert_close(decode(data), by_pillow(data), 3)


def test_the_first_picture_of_an_animation() -> None:
    data = encode(IMAGE, "GIF", save_all=True, append_images=[Image.fromarray(255 - PICTURE)])
    assert_close(decode(data), by_pillow(data), 0)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA"])
def test_other_modes_become_rgb(mode: str) -> None:
    data = encode(IMAGE.convert(mode), "PNG")
    assert_close(decode(data), np.asarray(IMAGE.convert(mode).convert("RGB")), 0)


def test_grey_jpeg_has_three_equal_channels() -> None:
    pixels = decode(encode(IMAGE.convert("L"), "JPEG", quality=95))
    assert (pixels == pixels[..., :1]).all()
    assert_close(pixels, np.asarray(IMAGE.convert("L").convert("RGB")), 8)


def test_alpha_is_dropped_and_the_colour_below_kept() -> None:
    image = IMAGE.copy()
    image.putalpha(Image.fromarray(np.tile(np.arange(36, dtype=np.uint8), (24, 1))))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        assert np.array_equal(decode(encode(image, kind, **options)), PICTURE)


@pytest.mark.parametrize("ending", [".png", ".tiff"])
def test_sixteen_bits_are_scaled_not_cut(ending: str) -> None:
    rng = np.random.default_rng(1)
    colour = rng.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    _, data = cv2.imencode(ending, np.ascontiguousarray(colour[..., ::-1]))
    assert_close(decode(data.tobytes()), (colour >> 8).astype(np.uint8), 1)
    grey = rng.integers(0, 65536, (5, 7), dtype=np.uint16)
    _, data = cv2.imencode(ending, grey)
    expected = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    assert_close(decode(data.tobytes()), expected, 1)


def test_cmyk_jpeg_equals_pillow() -> None:
    data = encode(IMAGE.convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert_close(decode(data), by_pillow(data), 2)
    assert_close(decode(data), PICTURE, 16)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_exif_orientation_is_turned_upright(kind: str) -> None:
    options: dict[str, Any] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    seen = set()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(corners(24, 36), kind, exif=exif, **options)
        pixels = decode(data)
        assert_close(pixels, by_pillow(data), 3)
        seen.add((pixels[4::16, 4::28].astype(int) // 64 * 64).tobytes())
    assert len(seen) == 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_files_are_refused(kind: str) -> None:
    data = encode(PICTURE, kind)
    decode(data)
    lengths = [int(len(data) * part) for part in (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)]
    for length in [*lengths, len(data) - 1]:
        assert refused(data[:length])


def test_every_flipped_bit_of_a_pngs_pixels_is_found() -> None:
    data = encode(PICTURE, "PNG")
    start = data.index(b"IDAT") + 4
    for place in range(start, len(data) - 16, 97):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        assert refused(bytes(damaged)).startswith("corrupt")


def test_random_damage_never_raises_anything_else() -> None:
    rng = np.random.default_rng(2)
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        data = encode(PICTURE, kind)
        for _ in range(40):
            damaged = bytearray(data)
            for place in rng.integers(0, min(len(data), 120), 3):
                damaged[place] = rng.integers(0, 256)
            try:
                pixels = decode(bytes(damaged), max_pixels=1_000_000)
            except BadImage:
                continue
            assert pixels.ndim == 3
            assert pixels.dtype == np.uint8


def test_files_that_are_no_images(tmp_path: Path) -> None:
    assert refused(b"") == "empty file"
    assert "known format (JPEG, PNG, BMP, WEBP, TIFF, GIF)" in refused(b"just some text\n" * 50)
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(BadImage, match="known format"):
        decode_file(tmp_path / "text.jpg")
    with pytest.raises(BadImage, match="cannot be read: No such file"):
        decode_file(tmp_path / "none.jpg")
    with pytest.raises(BadImage, match="cannot be read: Is a directory"):
        decode_file(tmp_path)


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICO", "TGA", "PDF", "JPEG2000"])
def test_formats_that_are_not_on_the_list_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(encode(PICTURE, kind))
    with pytest.raises(BadImage, match="known format"):
        decode_file(path)


def test_content_counts_and_not_the_ending(tmp_path: Path) -> None:
    path = tmp_path / "picture.txt"
    path.write_bytes(encode(PICTURE, "PNG"))
    assert np.array_equal(decode_file(path), PICTURE)


def test_the_pixel_limit_is_on_width_times_height() -> None:
    data = encode(PICTURE, "PNG")
    assert decode(data, max_pixels=24 * 36).shape == (24, 36, 3)
    assert refused(data, max_pixels=24 * 36 - 1).startswith("too large: 36x24 pixels")


def test_a_decompression_bomb_is_refused_from_its_header() -> None:
    start = time.perf_counter()
    assert refused(png_header(100_000, 100_000)).startswith("too large")
    assert time.perf_counter() - start < 0.5


BOMB = """
import resource, sys
from distcls.errors import BadImage
from distcls.imaging import decode
decode(open(sys.argv[1], "rb").read())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    try:
        decode(open(path, "rb").read())
    except BadImage as error:
        print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_bomb_takes_no_memory_and_prints_no_warning(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(encode(PICTURE, "PNG"))
    for name, side in (("huge.png", 100_000), ("large.png", 10_500)):
        (tmp_path / name).write_bytes(png_header(side, side))
    paths = [str(tmp_path / name) for name in ("good.png", "huge.png", "large.png")]
    command = [sys.executable, "-c", BOMB, *paths]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    huge, large, grown = result.stdout.splitlines()
    assert huge.startswith("too large")
    assert large.startswith("too large: 10500x10500 pixels, at most 100,000,000")
    assert int(grown) < 20_000  # KiB; the pixels would take 30 GB and 330 MB
    assert result.stderr == ""
