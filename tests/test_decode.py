"""Decoding: every kind of file against Pillow, and every kind of damage refused with a reason."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from distcls.errors import BadImage, UsageError
from distcls.imaging import MAX_PIXELS, decode, decode_file
from distcls.imaging.decode import _heif_formats, looks_like_image, pixel_limit
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
        ("PPM", {}),
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
        ("AVIF", {"quality": 90}),
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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_exif_orientation_is_turned_upright(kind: str) -> None:
    options: dict[str, Any] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    seen = set()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(corners(24, 36), kind, exif=exif, **options)
        pixels = decode(data)
        assert_close(pixels, by_pillow(data), 3)
        seen.add(((pixels[4::16, 4::28].astype(int) + 32) // 64).tobytes())
    assert len(seen) == 8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF"])
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
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF"):
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
    assert "known format (JPEG, PNG, BMP, WEBP, TIFF, GIF, PNM, AVIF, HEIC)" in refused(
        b"just some text\n" * 50
    )
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(BadImage, match="known format"):
        decode_file(tmp_path / "text.jpg")
    with pytest.raises(BadImage, match="cannot be read: No such file"):
        decode_file(tmp_path / "none.jpg")
    with pytest.raises(BadImage, match="cannot be read: Is a directory"):
        decode_file(tmp_path)


@pytest.mark.parametrize("kind", ["EPS", "ICO", "TGA", "PDF", "JPEG2000"])
def test_formats_that_are_not_on_the_list_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(encode(PICTURE, kind))
    with pytest.raises(BadImage, match="known format"):
        decode_file(path)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *[(kind, {}) for kind in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "AVIF")],
        ("MPO", {"save_all": True, "append_images": [IMAGE]}),
        ("TIFF", {"big_tiff": True}),
    ],
)
def test_the_first_bytes_say_that_a_file_is_an_image(kind: str, options: dict[str, Any]) -> None:
    data = encode(PICTURE, kind, **options)
    assert looks_like_image(data[:64])
    assert not looks_like_image(b"\0" + data[:63])


def test_heic_is_told_by_its_brands() -> None:
    assert looks_like_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert looks_like_image(b"\0\0\0\x18ftypXXXX\0\0\0\0mif1heic")
    assert not looks_like_image(b"\0\0\0\x18ftypisom\0\0\0\0isomiso2mp41")  # 24 bytes: a video
    assert not looks_like_image(b"\0\0\0\x14ftypqt  \0\0\0\0qt  avif")


@pytest.mark.parametrize("head", [b"P2\n# by hand\n3 4\n255\n", b"P4 3 4 ", b"P6#x\n1 1 255\n"])
def test_a_bitmap_with_comments_is_an_image(head: bytes) -> None:
    assert looks_like_image(head)


@pytest.mark.parametrize(
    "head",
    [b"", b"BM", b"BMW and other cars of this year", b"P5", b"P2 is a class", b"RIFF1234WAVE"],
)
def test_texts_and_sounds_are_no_images(head: bytes) -> None:
    assert not looks_like_image(head)


def test_content_counts_and_not_the_ending(tmp_path: Path) -> None:
    path = tmp_path / "picture.txt"
    path.write_bytes(encode(PICTURE, "PNG"))
    assert np.array_equal(decode_file(path), PICTURE)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"P1\n# by hand\n2 2\n1 0\n0 1\n", [0, 255, 255, 0]),
        (b"P2\n3 1\n15\n0 5 15\n", [0, 85, 255]),
        (b"P4 8 1\n\x0f", [255] * 4 + [0] * 4),
        (b"P5 2 1 255\n\x07\xff", [7, 255]),
        (b"P5 2 1 100\n\x00\x64", [0, 255]),
        (b"P5 3 1 1023\n\x00\x00\x01\xff\x03\xff", [0, 127, 255]),
        (b"P5 3 1 65535\n\x00\xff\x80\x00\xff\xff", [0, 128, 255]),
    ],
)
def test_bitmaps_are_scaled_by_their_own_white(data: bytes, expected: list[int]) -> None:
    pixels = decode(data)
    assert (pixels == pixels[..., :1]).all()
    assert pixels[..., 0].ravel().tolist() == pytest.approx(expected, abs=1)


def test_colour_bitmaps() -> None:
    assert decode(b"P3 1 1 255 1 2 3\n").tolist() == [[[1, 2, 3]]]
    assert decode(b"P6 1 1 15\n\x00\x05\x0f").tolist() == [[[0, 85, 255]]]


def test_grey_avif_and_avif_of_ten_bits() -> None:
    for image in (IMAGE.convert("L"), IMAGE):
        data = encode(image, "AVIF", quality=95)
        assert_close(decode(data), by_pillow(data), 3)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.fixture
def _fresh_plug_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Image.init()
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    _heif_formats.cache_clear()
    yield
    _heif_formats.cache_clear()


@pytest.mark.usefixtures("_fresh_plug_ins")
def test_heic_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    assert refused(HEIC + bytes(99)) == (
        'HEIC, which needs pillow-heif: pip install "distcls[heic]"'
    )


@pytest.mark.usefixtures("_fresh_plug_ins")
def test_heic_is_decoded_by_the_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for pillow-heif: a BMP behind the first bytes of a HEIC."""

    class Heif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            assert self.fp.read(len(HEIC)) == HEIC
            self._held = Image.open(io.BytesIO(self.fp.read()), formats=("BMP",))
            self._size, self._mode = self._held.size, self._held.mode

        def load(self) -> Any:
            self.im = self._held.convert("RGB").im
            return super().load()

    fake = types.ModuleType("pillow_heif")
    fake.register_heif_opener = (
        lambda: Image.register_open(  # type: ignore[attr-defined]
            "HEIF", Heif, lambda head: head[4:12] == b"ftypheic"
        )
    )
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    assert np.array_equal(decode(HEIC + encode(PICTURE, "BMP")), PICTURE)
    assert refused(HEIC + b"BM" + bytes(99)) == "corrupt or truncated"


def test_real_heic() -> None:
    heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    heif.from_pillow(IMAGE).save(file, quality=95)
    assert looks_like_image(file.getvalue()[:64])
    assert_close(decode(file.getvalue()), PICTURE, 24)


@pytest.mark.usefixtures("_fresh_plug_ins")
def test_an_older_pillow_names_what_avif_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(PICTURE, "AVIF")
    del Image.OPEN["AVIF"]
    monkeypatch.setattr(Image, "init", lambda: True)
    assert "pip install --upgrade pillow" in refused(data)


def tiff(values: NDArray[Any]) -> bytes:
    """A TIFF by OpenCV, of [h, w], BGR or BGRA."""
    return cv2.imencode(".tiff", values)[1].tobytes()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_tiff_of_floats_counts_one_as_white(kind: type) -> None:
    values = PICTURE[..., ::-1].astype(kind) / 255
    assert np.array_equal(decode(tiff(values)), PICTURE)
    grey = decode(tiff(values[..., 0]))
    assert np.array_equal(grey, np.repeat(PICTURE[..., 2:], 3, axis=2))
    assert np.array_equal(
        decode(encode(Image.fromarray(values[..., 0].astype(np.float32)), "TIFF")), grey
    )
    pixels = decode(tiff(np.dstack([values, values[..., 0] * 0])), background=(9, 8, 7))
    assert (pixels == (9, 8, 7)).all()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0, 255]], np.float32), "32-bit floats from 0 to 255, expected 0 to 1: "),
        (np.array([[-3.5, 1]], np.float32), "32-bit floats from -3.5 to 1, expected 0 to 1: "),
        (np.array([[0, np.nan]], np.float32), "32-bit floats from nan to nan, expected 0 to 1: "),
        (np.array([[0, 1 << 20]], np.int32), "32-bit integers from 0 to 1.04858e+06: "),
    ],
)
def test_other_wide_tiffs_are_refused_with_the_true_reason(
    values: NDArray[Any], reason: str
) -> None:
    for data in (tiff(values), encode(Image.fromarray(values), "TIFF")):
        text = refused(data)
        assert text.startswith(reason)
        assert text.endswith("convert it to 8 or 16 bits")


def test_damaged_wide_tiffs_are_refused() -> None:
    data = tiff(PICTURE.astype(np.float32) / 255)
    for length in range(4, len(data), len(data) // 23):
        assert refused(data[:length])
    rng = np.random.default_rng(4)
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 6):
            damaged[place] = rng.integers(0, 256)
        try:
            assert decode(bytes(damaged), max_pixels=1_000_000).dtype == np.uint8
        except BadImage:
            continue


def test_a_wide_tiff_is_upright() -> None:
    picture = Image.fromarray(corners(24, 36)).convert("L")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        floats = Image.fromarray(np.asarray(picture, np.float32) / 255)
        found = decode(encode(floats, "TIFF", exif=exif))
        assert np.array_equal(found, by_pillow(encode(picture, "TIFF", exif=exif)))


def test_the_limit_is_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(PICTURE, "PNG")
    monkeypatch.setenv("DISTCLS_MAX_PIXELS", str(24 * 36))
    assert decode(data).shape == (24, 36, 3)
    monkeypatch.setenv("DISTCLS_MAX_PIXELS", str(24 * 36 - 1))
    assert refused_by_default(data).endswith(
        "the environment variable DISTCLS_MAX_PIXELS sets the limit"
    )
    for text in ("many", "0", "-5", "1.5", "9" * 12):
        monkeypatch.setenv("DISTCLS_MAX_PIXELS", text)
        with pytest.raises(UsageError, match=f"DISTCLS_MAX_PIXELS: '{text}', expected a whole"):
            decode(data)
    monkeypatch.setenv("DISTCLS_MAX_PIXELS", "")
    assert pixel_limit() == MAX_PIXELS


def refused_by_default(data: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data)
    return str(caught.value)


LARGE = """
import sys
import cv2, numpy as np
from distcls.imaging import decode
flat = np.zeros((15_000, 13_000), np.uint8)
data = cv2.imencode(".png", flat, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
del flat
print(decode(data).shape)
"""


def test_a_photograph_of_195_megapixels_is_decoded_when_allowed() -> None:
    """More than the number at which Pillow takes an image for a bomb."""
    environment = {**os.environ, "DISTCLS_MAX_PIXELS": "200000000"}
    command = [sys.executable, "-W", "error", "-c", LARGE]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert (result.stdout, result.stderr) == ("(15000, 13000, 3)\n", "")


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
