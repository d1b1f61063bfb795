"""Decoding an image file into uint8 RGB, or a short reason why it cannot be decoded.

OpenCV decodes (measured on one core, 500x375 JPEG to 224: OpenCV 850 images/s, Pillow 240); it
applies the EXIF orientation, turns CMYK and grey into RGB, scales 16 bits to 8 and drops alpha.
Pillow reads the header first (16 us): the allow-list of formats, and the size before any
pixel is decoded. OpenCV 5 refuses truncated JPEGs; of those with a hole libjpeg says so, where it
fills the rest with grey, and of compressed TIFFs Pillow and zlib say so, by decoding them again.
Pillow also decodes what OpenCV reads wrongly or not at all: PNM whose white is another number than
255 or 65535, AVIF, HEIC, and images with transparency that are shown on a background colour.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin

from distcls.errors import BadImage
from distcls.imaging.reading import limit_of, memory_budget, patiently, read_file
from distcls.imaging.silence import hear_damage, silent_stderr
from distcls.imaging.structure import (
    DEFLATE,
    check_structure,
    default_image,
    deflate_damage,
)

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PNM", "AVIF", "HEIC")
"""Formats that are decoded, by content, not by file ending. Pillow counts MPO as JPEG; PNM are the
bitmaps .pbm, .pgm and .ppm; HEIC needs the extra `heic`."""

SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".webp", ".tif", ".tiff"),
        *(".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif"),
    )
)
"""Endings under which a folder is searched for images."""

MAX_PIXELS = 100_000_000
"""Largest width times height that is decoded (300 MB as RGB), unless DISTCLS_MAX_PIXELS is set."""

LIMIT = "DISTCLS_MAX_PIXELS"
"""Environment variable with another limit, for every command alike."""
MOST_PIXELS = 1 << 30
"""OpenCV decodes no more."""
MOST_TEXT = 1 << 24
"""Bytes to which a text or profile of a PNG may unpack."""

ACCEPT_DAMAGED = "DISTCLS_ACCEPT_DAMAGED"
"""Environment variable; 1 takes images with a hole as the decoder fills it."""

BYTES_PER_PIXEL = 10
"""Memory that decoding takes at most (measured: 3 to 9.2), the RGB array included."""
PILLOWS_BYTES = 18
"""The same of Pillow: what it decodes (17), and what it blends with a background (14)."""
WEBP_BYTES, BLENDED_WEBP_BYTES = 16, 27
"""The same of WebP, animated ones (16), and blended ones (26)."""
SMALL_BYTES = 1 << 22
"""Images that take less do not wait for room."""

Color = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""

PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
"""The same in Pillow's names, but for AVIF and HEIF, which an older Pillow does not know."""
JPEGS = frozenset(("JPEG", "MPO"))
PILLOWS = frozenset(("PPM", "AVIF", "HEIF"))
"""Decoded by Pillow."""
ALPHA_MODES = frozenset(("RGBA", "RGBa", "LA", "La", "PA"))
WIDTH, HEIGHT, BITS, COMPRESSION = 256, 257, 258, 259
"""Tags of TIFF."""
NOT_OPENCVS = frozenset((34925, 50000))
"""Compressions of TIFF, LZMA and ZSTD, that Pillow's libtiff knows and OpenCV's does not."""

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BIG = (b"+\0", b"\0+")
_MAGIC = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    *_TIFF_MAGIC,
)
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_HEIF_BRANDS = frozenset((b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"))
_HEIF_BRANDS |= {b"mif1", b"msf1"}
_PNM = re.compile(rb"P[1-6](?:\s|#[^\n]*\n)+(?:\d|#|$)")
"""Bitmaps of 1 bit, grey and colour, as text and as bytes: sizes, perhaps after comments."""

REDUCED = (
    (8, cv2.IMREAD_REDUCED_COLOR_8),
    (4, cv2.IMREAD_REDUCED_COLOR_4),
    (2, cv2.IMREAD_REDUCED_COLOR_2),
)
"""By how much the JPEG decoder can scale each side down, as part of the inverse transform."""

_REDUCTIONS = frozenset(flag for _, flag in REDUCED)

Downscale = Callable[[int, int], float]
"""By how much an image of a height and width is scaled down later, each side at least."""

_silenced = False


def looks_like_image(head: bytes) -> bool:
    """Whether a file that begins with `head` (64 bytes do) is of a format that `decode` knows.

    By its first bytes alone, in under a microsecond; such a file may still be damaged.
    """
    if head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return True
    if head[:2] == b"BM":  # two letters that a text may begin with: the header's size as well
        return int.from_bytes(head[14:18], "little") in _BMP_HEADERS
    if head[4:8] == b"ftyp":
        size = min(int.from_bytes(head[:4], "big"), len(head))
        # the major brand and the compatible ones; between them stands a version
        return any(head[at : at + 4] in _HEIF_BRANDS for at in (8, *range(16, size - 3, 4)))
    return _PNM.match(head) is not None


def decode(
    data: bytes,
    max_pixels: int | None = None,
    downscale: Downscale | None = None,
    background: Color | None = None,
) -> NDArray[np.uint8]:
    """Decode the bytes of an image file to uint8 RGB [height, width, 3], upright.

    With `background` transparent pixels are blended with that colour; without, alpha is ignored and
    the colours hidden below it show. Of an animated PNG the default image is taken, the one that
    other programs show. With `downscale` a JPEG comes out at a half, a quarter or an
    eighth of its size, as far as it is scaled down later anyway: several times as fast, with
    slightly other pixels. TIFF of 32-bit floats counts 0 as black and 1 as white; other values,
    and 32-bit integers, have no agreed white and are refused with that reason.

    `max_pixels` is by default MAX_PIXELS, or DISTCLS_MAX_PIXELS. Raises BadImage with the reason:
    empty, no known format, too large, corrupt, damaged or truncated; MachineError where memory is
    short after several attempts; UsageError for a bad DISTCLS_MAX_PIXELS.
    """
    _silence_libraries()
    most = pixel_limit() if max_pixels is None else max_pixels
    header = patiently(lambda: _read_header(data, most))
    data = default_image(data)
    flags = cv2.IMREAD_COLOR_RGB
    if downscale is not None and header.kind in JPEGS:
        height, width = header.height, header.width
        flags = _reduction(min(downscale(height, width), downscale(width, height)))
    pixels = header.height * header.width
    try:
        size = pixels * _bytes_per_pixel(header, background)
        if size < SMALL_BYTES:
            return patiently(lambda: _pixels(data, header, flags, background), pixels)
        with memory_budget().reserve(size) as keep:
            image = patiently(lambda: _pixels(data, header, flags, background), pixels)
            keep(image)
            return image
    except cv2.error as error:
        reason = " ".join(getattr(error, "err", "").split()) or "OpenCV cannot decode it"
        raise BadImage(f"corrupt: {reason}") from error


def _bytes_per_pixel(header: _Header, background: Color | None) -> int:
    """The memory that decoding takes at most, in bytes per pixel."""
    blended = background is not None and header.transparent
    if header.kind == "WEBP":
        return BLENDED_WEBP_BYTES if blended else WEBP_BYTES
    return PILLOWS_BYTES if blended or header.kind in PILLOWS else BYTES_PER_PIXEL


def _pixels(
    data: bytes, header: _Header, flags: int, background: Color | None
) -> NDArray[np.uint8]:
    blend = background if header.transparent else None
    if header.kind in PILLOWS or blend is not None or _is_run_length_bmp(data):
        with silent_stderr():
            return _by_pillow(data, blend)
    damage = ""
    if header.kind in JPEGS:
        again = functools.partial(_by_opencv, data, cv2.IMREAD_REDUCED_GRAYSCALE_8)
        image, damage = hear_damage(lambda: _by_opencv(data, flags), again)
    else:
        with silent_stderr():
            image = _by_opencv(data, flags)
            if image is None and header.kind == "TIFF":
                return _from_wide(data, background)
            if header.compressed:
                damage = _damage_of_tiff(data, header)
    if image is None:
        _require_memory(header)
        raise BadImage("corrupt or truncated")
    if damage and os.environ.get(ACCEPT_DAMAGED) != "1":
        raise BadImage(f"damaged: {damage}; the environment variable {ACCEPT_DAMAGED}=1 takes it")
    return np.asarray(image, np.uint8)


def _is_run_length_bmp(data: bytes) -> bool:
    """Whether it is a BMP of runs, of which OpenCV 5 skips lines where a run passes the width, as
    ImageMagick's do."""
    return (
        data[:2] == b"BM" and data[14:18] >= b"\x28" and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0")
    )


def _require_memory(header: _Header) -> None:
    """Raise MemoryError where there is none for an image that could not be decoded: libpng, libjpeg
    and libwebp do not say which it was."""
    np.empty(header.height * header.width * BYTES_PER_PIXEL, np.uint8)


def _damage_of_tiff(data: bytes, header: _Header) -> str:
    """What is wrong with a compressed TIFF that OpenCV has decoded; empty if nothing."""
    tags = _tiff_tags(data)
    if tags.get(COMPRESSION) in DEFLATE:
        size = 2 * BYTES_PER_PIXEL * header.height * header.width + SMALL_BYTES
        if found := deflate_damage(data, tags, size):
            return found
    try:
        with open_header(data) as image:
            image.load()
    except MemoryError:
        raise
    except Exception as error:  # as many types as Pillow's decoders raise
        return str(error) if "decoder error" in str(error) else ""
    return ""


def decode_file(
    path: Path,
    max_pixels: int | None = None,
    downscale: Downscale | None = None,
    background: Color | None = None,
) -> NDArray[np.uint8]:
    """`decode` the file at `path`; a file that cannot be read is a BadImage too."""
    return decode(read_file(path), max_pixels, downscale, background)


def may_be_transparent(data: bytes) -> bool:
    """Whether a file that `decode` takes has alpha or a transparent colour, by its header."""
    return _read_header(data, MOST_PIXELS).transparent


def pixel_limit() -> int:
    """The largest width times height that is decoded. Raises UsageError if it is set wrongly."""
    limit = limit_of(LIMIT, MAX_PIXELS, MOST_PIXELS)
    if limit > MAX_PIXELS and Image.MAX_IMAGE_PIXELS is not None:  # Pillow has a limit of its own
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limit)
    return limit


def _reduction(factor: float) -> int:
    """OpenCV's flag for the most that stays within `factor`."""
    return next((flag for reduced, flag in REDUCED if reduced <= factor), cv2.IMREAD_COLOR_RGB)


def _by_opencv(data: bytes, flags: int) -> Any:
    """RGB [height, width, 3], or with IMREAD_UNCHANGED what the file holds; None if it cannot."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is not None and flags in _REDUCTIONS:  # OpenCV has no flag for both
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return image


def _by_pillow(data: bytes, background: Color | None) -> NDArray[np.uint8]:
    """RGB [height, width, 3], upright, blended with the background if one is given."""
    try:
        with open_header(data) as image:
            if background is not None and _has_16_bit_key(data, image):
                return _without_key(data, image.info["transparency"], background)
            image.load()
            return from_pillow(image, background)
    except (BadImage, MemoryError, cv2.error):
        raise
    except Exception as error:  # Pillow's decoders raise a dozen types on damaged files
        raise BadImage("corrupt or truncated") from error


def from_pillow(image: Image.Image, background: Color | None) -> NDArray[np.uint8]:
    """A decoded Pillow image as uint8 RGB [height, width, 3], upright by its EXIF orientation.

    Transparent pixels are blended with the background if one is given; of 16 bits the upper 8 are
    taken. Other modes than those of image files have no agreed conversion; see `ObjectSource`.
    """
    turned = _upright(image)
    if turned.mode.startswith("I"):  # 16 bits; `convert` would cut them off at 255
        grey = (np.asarray(turned).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if background is not None:
        canvas = Image.new("RGB", turned.size, background)
        turned = turned.convert("RGBA")
        canvas.paste(turned, mask=turned)
        turned = canvas
    return np.array(turned.convert("RGB"), np.uint8)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF; OpenCV ignores it, too
        return image


def _has_16_bit_key(data: bytes, image: Image.Image) -> bool:
    """Whether one colour of 16 bits is transparent, which Pillow loses with the lower 8 bits."""
    return image.format == "PNG" and data[24] == 16 and "transparency" in image.info


def _without_key(data: bytes, key: Any, background: Color) -> NDArray[np.uint8]:
    """A PNG of 16 bits, grey or RGB, with `background` where it has the transparent colour."""
    image = _by_opencv(data, cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR)
    if image is None:
        raise BadImage("corrupt or truncated")
    image = image[..., ::-1]
    hidden = (image == np.array(key, np.uint16)).all(axis=2, keepdims=True)
    return np.where(hidden, np.array(background, np.uint8), (image >> 8).astype(np.uint8))


def _from_wide(data: bytes, background: Color | None) -> NDArray[np.uint8]:
    """A TIFF of 32-bit or 64-bit values; BadImage where these have no defined white."""
    image = _by_opencv(data, cv2.IMREAD_UNCHANGED)  # upright: of TIFF it turns these as well
    if image is None and _tiff_tags(data).get(COMPRESSION) in NOT_OPENCVS:
        with open_header(data) as opened:
            plain = opened.mode in ("1", "L", "P", "RGB", "CMYK")
        if plain:
            return _by_pillow(data, background)
    if image is None or image.dtype.itemsize < 4:
        raise BadImage("corrupt or truncated")
    bits, kind = 8 * image.dtype.itemsize, "integers" if image.dtype.kind in "iu" else "floats"
    low, high = float(image.min()), float(image.max())
    # half a step of 8 bits: resampling leaves values just outside
    if kind == "integers" or not (low >= -0.5 / 255 and high <= 1 + 0.5 / 255):
        expected = "" if kind == "integers" else ", expected 0 to 1"
        raise BadImage(
            f"{bits}-bit {kind} from {low:g} to {high:g}{expected}: which of them is white is not "
            "known, convert it to 8 or 16 bits"
        )
    values = np.clip(image if image.ndim == 3 else image[..., None], 0, 1)
    colour = values[..., 2::-1] if values.shape[2] >= 3 else values[..., [0, 0, 0]]
    if values.shape[2] == 4 and background is not None:
        alpha = values[..., 3:]
        colour = colour * alpha + np.array(background) / 255 * (1 - alpha)
    return np.ascontiguousarray(np.rint(colour * 255).astype(np.uint8))


class _Header(NamedTuple):
    height: int
    width: int
    kind: str
    """Pillow's name of the format."""
    transparent: bool
    """Whether some pixels may be transparent."""
    compressed: bool = False
    """Whether it is a compressed TIFF."""


def _read_header(data: bytes, max_pixels: int) -> _Header:
    """What a file says of itself. Raises BadImage."""
    if not data:
        raise BadImage("empty file")
    check_structure(data)
    header = _webp_header(data) or _pillow_header(data)
    width, height = header.width, header.height
    if width * height > max_pixels:
        raise BadImage(
            f"too large: {width}x{height} pixels, at most {max_pixels:,} are decoded; the "
            f"environment variable {LIMIT} sets the limit"
        )
    return header


def _pillow_header(data: bytes) -> _Header:
    try:
        with open_header(data) as image:
            if image.format == "PPM" and image.mode == "F":
                raise BadImage("PFM is not read: convert its floats to 8 or 16 bits")
            transparent = image.mode in ALPHA_MODES or "transparency" in image.info
            kind = str(image.format)
            compressed = kind == "TIFF" and image.info.get("compression", "raw") != "raw"
            return _Header(image.height, image.width, kind, transparent, compressed)
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large: {error}; {LIMIT} sets the limit") from error
    except Exception as error:  # Pillow's parsers raise a dozen types on hostile headers
        wide = _wide_tiff(data)
        if wide is None:
            raise BadImage(_unknown(data)) from error
        return wide


def _webp_header(data: bytes) -> _Header | None:
    """The header of a WebP, which Pillow would take the memory of the whole picture to read.

    None for another format, and for what is none.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        return _Header(height, width, "WEBP", bool(data[20] & 16))
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        sides = 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
        return _Header(*sides, "WEBP", bool(bits >> 28 & 1))
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
        return _Header(height, width, "WEBP", False)
    return None


def open_header(data: bytes) -> Image.Image:
    """Pillow's image of a file of a known format, nothing decoded; raises what Pillow raises."""
    formats = _heif_formats() if data[4:8] == b"ftyp" else PILLOW_FORMATS
    return Image.open(io.BytesIO(data), formats=formats)


@functools.cache
def _heif_formats() -> tuple[str, ...]:
    """Those of AVIF and HEIF that this Pillow opens."""
    Image.init()
    with contextlib.suppress(ImportError):  # the extra `heic`
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return tuple(name for name in ("AVIF", "HEIF") if name in Image.OPEN)


def _unknown(data: bytes) -> str:
    """Why Pillow does not open a file."""
    if data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")):
        return "corrupt or truncated: its header or metadata cannot be read"
    if data[4:8] != b"ftyp" or not looks_like_image(data[:64]):
        return f"not an image of a known format ({', '.join(FORMATS)})"
    known = _heif_formats()
    if b"avif" in data[8:64] or b"avis" in data[8:64]:
        install = "AVIF, which this Pillow cannot read: pip install --upgrade pillow"
        return "corrupt or truncated" if "AVIF" in known else install
    install = 'HEIC, which needs pillow-heif: pip install "distcls[heic]"'
    return "corrupt or truncated" if "HEIF" in known else install


def _wide_tiff(data: bytes) -> _Header | None:
    """The header of a TIFF with 32 or 64 bits a channel, of which Pillow opens the grey ones."""
    tags = _tiff_tags(data)
    with contextlib.suppress(KeyError, TypeError, ValueError):
        height, width = int(tags[HEIGHT]), int(tags[WIDTH])
        if min(height, width) >= 1 and max(tags[BITS]) in (32, 64):
            return _Header(height, width, "TIFF", False)
    return None


def _tiff_tags(data: bytes) -> Any:
    """The tags of a TIFF's first image by number; none if it has no readable ones."""
    if not data.startswith(_TIFF_MAGIC):
        return {}
    file = io.BytesIO(data)
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if data[2:4] in _BIG else 8))
        file.seek(tags.next)
        tags.load(file)
        return dict(tags)
    except Exception:  # as many types as Pillow's parsers raise
        return {}


def _silence_libraries() -> None:
    """Silence OpenCV's and Pillow's own warnings; the user gets ours already."""
    global _silenced
    if not _silenced:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        warnings.filterwarnings("ignore", module=r"PIL\.")
        logging.getLogger("PIL").addHandler(logging.NullHandler())
        # a megabyte is less than the ICC profile or XMP of some photographs
        PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, MOST_TEXT)
        _silenced = True
