"""Images as a program holds them: paths, URLs, encoded bytes, arrays and PIL images.

The same picture gives the same pixels in each of these forms, those that `distcls predict` reads
from its file, as far as that can be:

- Paths, URLs and bytes are decoded as any file is.
- An array is taken as it is, so it is equal if its pixels are. Alpha is blended with the model's
  background, as a file's is, and the axes are height, width, channel in the order RGB (OpenCV's
  `imread` gives BGR).
- A PIL image that Pillow has opened and not yet decoded stands for its file, which is read and
  decoded as above. Any other is taken as it is, turned upright by the EXIF orientation it still
  carries (as `ImageOps.exif_transpose` does, which also removes it). That is equal for lossless
  files (PNG, BMP, TIFF, PNM); of lossy ones (JPEG, WebP) Pillow's decoder may differ from OpenCV's
  in single pixel values, so probabilities are near, and equal with the same version of libjpeg.

What has no agreed meaning as 8-bit RGB is refused and never guessed: floats, 16-bit arrays, axes in
another order, CMYK.
"""

from __future__ import annotations

import contextlib
import os
import reprlib
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distcls.data.formats.remote import Prefetcher, filesystem_of, is_url, read
from distcls.data.source import TIMEOUT, Images, ImageSource, to_rgb
from distcls.errors import BadImage, UsageError
from distcls.imaging import Color, decode
from distcls.imaging.decode import FORMATS, from_pillow, open_header
from distcls.imaging.reading import read_file

ImageInput: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | NDArray[np.uint8] | Image.Image
)
"""One image: a path or URL, an encoded file, an array or a PIL image."""

EXPECTED = (
    "expected a path or URL, the bytes of an image file, a PIL image, or a uint8 array "
    "[height, width, 3] (RGB), [height, width] (grey) or [height, width, 4] (RGBA)"
)
CHANNELS = (1, 3, 4)
MODES = frozenset(("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "I;16", "I;16L", "I;16B"))
"""Modes of PIL images that convert to RGB in one way only."""
WIDE_MODES = frozenset(("I", "F"))
ORIENTATION = 0x0112
"""The tag of EXIF."""

_pillow_lock = threading.Lock()
"""Pillow's images are not thread-safe, and two threads may have been given the same one."""


class ObjectSource(ImageSource):
    """Images as a program holds them, in a list."""

    def __init__(
        self, images: Sequence[ImageInput], background: Color | None, names: Sequence[str | None]
    ) -> None:
        """`images` have passed `check`; transparent pixels are blended with `background`.

        `names` are theirs, None for those that have none.
        """
        self._images = images
        self._background = background
        self._names = names
        self._urls = [
            image if isinstance(image, str) and is_url(image) else None for image in images
        ]
        self._prefetcher = Prefetcher(self._urls.__getitem__, len(images), TIMEOUT)

    @property
    def image_ids(self) -> Sequence[str]:
        """See `ImageSource`; empty for an image without a name."""
        return [name or "" for name in self._names]

    @property
    def encoded(self) -> bool:
        """See `ImageSource`: `image` alone knows each form."""
        return False

    def image(self, index: int) -> Images:
        """See `ImageSource`; alpha is blended with the background already."""
        if self._urls[index] is not None:
            return decode(self._prefetcher.get(index), background=self._background)
        return load_image(self._images[index], self._background)


def check(image: object, where: str = "image") -> None:
    """Raise UsageError, saying `where` and what to do, unless this is an image in a known form.

    Nothing is read or decoded: a file that is missing or damaged shows in `load_image`.
    """
    if isinstance(image, np.ndarray):
        _check_array(image, where)
    elif isinstance(image, Image.Image):
        _check_pillow(image, where)
    elif isinstance(image, str):
        if is_url(image):
            with contextlib.suppress(ValueError):  # no URL: an error of this image
                filesystem_of(image)
        elif not image:
            raise UsageError(f"{where}: '' is not a path; {EXPECTED}")
    elif not isinstance(image, os.PathLike | bytes | bytearray | memoryview):
        raise UsageError(f"{where}: {_text(image)} is no image; {_advice(image)}")


def name_of(image: ImageInput) -> str | None:
    """The name of an image: its path or URL as given, valid Unicode; None if it has none."""
    if isinstance(image, Image.Image):
        name: Any = getattr(image, "filename", None)
    else:
        name = image if isinstance(image, str | os.PathLike) else None
    if not name:
        return None
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def load_image(image: ImageInput, background: Color | None) -> Images:
    """An image that passed `check`, decoded, uint8 RGB [height, width, 3].

    Transparent pixels are blended with `background`; None ignores alpha. Raises BadImage with the
    reason if it cannot be read or decoded, UsageError for a folder or a glob.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image, background)
    if isinstance(image, Image.Image):
        return _from_pillow(image, background)
    if isinstance(image, str) and is_url(image):
        return decode(read(image, TIMEOUT), background=background)
    if isinstance(image, str | os.PathLike):
        return decode(_read_path(os.fsdecode(image)), background=background)
    return decode(bytes(image), background=background)


def snapshot(image: ImageInput, background: Color | None) -> ImageInput:
    """The image as it is now, whatever its owner changes later; may be the image itself.

    A PIL image that is not decoded yet has nothing to be changed but its file.
    """
    if isinstance(image, bytearray | memoryview):
        return bytes(image)
    if isinstance(image, np.ndarray):
        return image.copy()
    if isinstance(image, Image.Image) and not _is_undecoded(image):
        with contextlib.suppress(BadImage):  # `load_image` raises it again
            # its pixels and not `copy`, which forgets an orientation set by `getexif()`
            return _from_pillow(image, background)
    return image


def bytes_in_memory(image: ImageInput) -> int:
    """About how much memory an image takes before it is decoded; 0 for a path or URL."""
    if isinstance(image, Image.Image):
        return 4 * image.width * image.height
    if isinstance(image, np.ndarray | memoryview):
        return image.nbytes
    return len(image) if isinstance(image, bytes | bytearray) else 0


def _text(value: object) -> str:
    """A value in a message, shortened."""
    return f"{type(value).__name__} {reprlib.repr(value)}" if value is not None else "None"


def _advice(value: object) -> str:
    if isinstance(value, list | tuple):
        return "a list holds images, not lists of them"
    if callable(getattr(value, "read", None)):
        return "pass the bytes of the file, as in image.read()"
    if callable(getattr(value, "image", None)):
        return "pass its pixels, image(), or its path"
    if isinstance(value, Iterable) and getattr(value, "ndim", 1) < 2:  # a column of paths, too
        return "pass a list of images, list(images), or predictor.stream(images), which is lazy"
    if hasattr(value, "__array__"):
        return f"{EXPECTED}; numpy.asarray makes an array, a tensor's axes have to be in that order"
    return EXPECTED


def _read_path(path: str) -> bytes:
    path = os.path.expanduser(path)  # noqa: PTH111 - Path's raises for users it does not know
    try:
        return read_file(Path(path))
    except BadImage:
        what = "a folder" if Path(path).is_dir() else "a glob" if "*" in path else None
        if what is None:
            raise
        raise UsageError(
            f"{path}: {what}, not an image; predictor.stream({path!r}) predicts all images there"
        ) from None


def _check_array(array: NDArray[Any], where: str) -> None:
    """Raise UsageError unless the array is uint8 [H, W] or [H, W, 1, 3 or 4]."""
    shape = list(array.shape)
    what = f"{where}: an array of {array.dtype} {shape}"
    if array.size == 0:
        raise UsageError(f"{what} has no pixel, expected at least one row and one column")
    if np.ma.is_masked(array):
        raise UsageError(f"{what} has masked pixels: fill them, as in image.filled(0)")
    if array.dtype != np.uint8:
        raise UsageError(f"{what}{_values(array)}: expected uint8; {_conversion(array)}")
    if array.ndim == 1:
        raise UsageError(f"{what}: if it is an encoded file, pass its bytes: image.tobytes()")
    if array.ndim == 4:
        raise UsageError(f"{what} is a batch: pass a list of its images, list(images)")
    if array.ndim == 3 and shape[2] not in CHANNELS:
        if shape[0] in CHANNELS:
            advice = "its channels come first: pass image.transpose(1, 2, 0)"
        else:
            advice = f"expected 3 channels (RGB), 4 (RGBA) or 1 (grey), not {shape[2]}"
        raise UsageError(f"{what}: {advice}")
    if array.ndim not in (2, 3):
        raise UsageError(f"{what}: {EXPECTED}")


def _values(array: NDArray[Any]) -> str:
    if array.dtype.kind not in "iuf":
        return ""
    return f", values {array.min():g} to {array.max():g}"


def _conversion(array: NDArray[Any]) -> str:
    """How to make uint8 of an array: what its type says of where black and white are."""
    if array.dtype.kind == "f":
        return "if 0 is black and 1 is white, (255 * image).round().astype('uint8')"
    if array.dtype == np.uint16:
        return "if it uses all 16 bits, (image >> 8).astype('uint8')"
    if array.dtype.kind in "OSU":
        return "of paths, pass a list: images.tolist()"
    if array.dtype.kind == "b":
        return "if True is white, 255 * image.astype('uint8')"
    return "if its values are 0 to 255, image.astype('uint8')"


def _from_array(array: NDArray[np.uint8], background: Color | None) -> Images:
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[2] == 4 and background is not None:
        return from_pillow(Image.fromarray(np.ascontiguousarray(array)), background)
    pixels = array[..., :3]  # alpha is ignored, as that of a file is
    return np.ascontiguousarray(to_rgb(pixels))


def _check_pillow(image: Image.Image, where: str) -> None:
    what = f"{where}: a PIL image of mode {image.mode}, {image.width}x{image.height}"
    if not image.width or not image.height:
        raise UsageError(f"{what}, has no pixel")
    if _is_undecoded(image):
        return  # its file is decoded by its content
    key = image.info.get("transparency")
    wide_key = image.mode.startswith("I;16") or (isinstance(key, tuple) and max(key) > 255)
    if key is not None and wide_key:
        raise UsageError(f"{what}, has a transparent colour of 16 bits: pass its path or bytes")
    if image.mode in WIDE_MODES:
        raise UsageError(
            f"{what}: which of its 32-bit values is white is not known; pass a uint8 array"
        )
    if image.mode not in MODES:
        raise UsageError(
            f"{what}: libraries differ in its conversion to RGB; pass the path or the bytes of its "
            "file, or convert it: image.convert('RGB')"
        )


def _from_pillow(image: Image.Image, background: Color | None) -> Images:
    with _pillow_lock:
        data = _undecoded_file(image)
        if data is None:
            blend = background if image.has_transparency_data else None
            try:
                image.load()
                return from_pillow(image, blend)
            except Exception as error:  # a dozen types on damaged files, on closed ones another
                reason = str(error) or "its file is closed"
                raise BadImage(f"Pillow cannot decode it: {reason}") from error
    return decode(data, background=background)


def _is_undecoded(image: Image.Image) -> bool:
    """Whether Pillow has opened a file of a format that `decode` knows, and decoded nothing yet."""
    file = getattr(image, "fp", None)
    is_open = file is not None and not getattr(file, "closed", False)
    known = image.format in (*FORMATS, "PPM", "MPO", "HEIF")
    return bool(is_open and known and getattr(image, "tile", None))


def _undecoded_file(image: Any) -> bytes | None:
    """The file that a PIL image stands for; None if it is decoded, or no longer what is in it.

    Pixels are changed after decoding only. What can be changed before are the frame (`seek`), the
    scale (`draft`) and the metadata.
    """
    if not _is_undecoded(image):
        return None
    place = image.fp.tell()
    image.fp.seek(0)
    data = bytes(image.fp.read())
    image.fp.seek(place)
    with contextlib.suppress(Exception), open_header(data) as fresh:  # as many as parsers raise
        facts = ("format", "mode", "size", "tile", "info")
        same = all(getattr(fresh, name) == getattr(image, name) for name in facts)
        if same and image.tell() == 0 and _orientation(fresh) == _orientation(image):
            return data
    return None


def _orientation(image: Any) -> object:
    # that of a PNG may stand behind its pixels, so that asking for it decodes them
    return None if image.format == "PNG" else image.getexif().get(ORIENTATION)
