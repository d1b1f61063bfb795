"""One pass over all images: what is known of each afterwards, in a few hundred bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from distcls import log
from distcls.data.image_dataset import Opened
from distcls.data.source import NO_TEXT, ImageRecord, Images, ImageSource, is_text
from distcls.errors import BadImage
from distcls.files import writable
from distcls.imaging import Color, decode
from distcls.imaging.decode import may_be_transparent, open_header
from distcls.imaging.reading import in_order
from distcls.system import available_cores

THUMB = 32
"""Side of the thumbnails that are compared, at most."""
MEASURED = 256
"""Larger side up to which brightness and sharpness are measured on the image itself."""
TASK = 16
"""Images that a thread takes at a time."""

MEASURES = {
    "height": "<i4",
    "width": "<i4",
    "brightness": "<f4",
    "darkest": "<f4",
    "brightest": "<f4",
    "spread": "<f4",
    "entropy": "<f4",
    "sharpness": "<f4",
    "orientation": "u1",
    "transparent": "<f4",
    "hidden": "?",
    "file": "S16",
    "pixels": "S16",
}
"""Fields of `Scan.table`. Grey values are 0 to 1: the mean, the 5th and the 99th percentile and the
standard deviation; entropy in bits, of 64 grey values; sharpness is the variance of the Laplacian
divided by that of the image; orientation that of EXIF, 1 to 8, 0 where there is none; transparent
the fraction of such pixels; hidden whether there are colours below them; the first 16 bytes of the
SHA-256 of the file (empty where there is none) and of the decoded pixels."""


class Rows:
    """An array of one row an image, in a temporary file instead of memory: it is filled from the
    first row on, and rows are read by their numbers.

    Not mapped into memory, where the pages that were read would count.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        """`shape` and `dtype` are those of a row."""
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._size = math.prod(shape) * self.dtype.itemsize
        self._count = 0
        with writable(Path(tempfile.gettempdir())):
            self._file = tempfile.TemporaryFile(prefix="distcls-")  # noqa: SIM115 - closed below
        weakref.finalize(self, self._file.close)

    def extend(self, rows: NDArray[Any]) -> None:
        """Append rows [n, *shape]. Raises DistclsError if the temporary folder cannot take them."""
        with writable(Path(tempfile.gettempdir())):
            self._file.write(np.ascontiguousarray(rows, self.dtype).data)
            self._file.flush()
        self._count += len(rows)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, chosen: NDArray[np.integer[Any]]) -> NDArray[Any]:
        """The rows of these numbers, [n, *shape]."""
        found = np.empty((len(chosen), *self.shape), self.dtype)
        descriptor = self._file.fileno()
        for row, at in zip(found, chosen.tolist(), strict=True):
            os.preadv(descriptor, [row], at * self._size)
        return found


Sources = Callable[[str | None], ImageSource]


class Seen(NamedTuple):
    """What a thread found in one image."""

    row: tuple[Any, ...]
    thumb: Images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scan:
    """All images of a dataset, each looked at once."""

    records: Sequence[ImageRecord]
    table: NDArray[Any]
    """A row for each record, see `MEASURES`; of zeros where the image is broken."""
    thumbs: Rows
    """Grey thumbnails, uint8 [N, side, side]."""
    broken: dict[int, str]
    """Why an image cannot be decoded, by its position."""


def scan(data: Opened, background: Color | None) -> Scan:
    """Look at every image of a dataset. Raises MachineError where the machine cannot read."""
    records = data.records

    @functools.cache
    def sources(split: str | None) -> ImageSource:
        return data.source_of(split).on_background(background)

    def look(start: int) -> list[Seen | BadImage]:
        part = records[start : start + TASK]
        return [_look_at(sources(each.split), each, side, background) for each in part]

    table = np.zeros(len(records), list(MEASURES.items()))
    broken: dict[int, str] = {}
    side = _side(records, sources)
    thumbs, blank = Rows((side, side), np.uint8), np.zeros((side, side), np.uint8)
    with log.Progress("looking at", len(records)) as progress:
        starts = range(0, len(records), TASK)
        looked = in_order(look, starts, min(available_cores(), 16))
        for start, found in zip(starts, looked, strict=True):
            for at, seen in enumerate(found, start=start):
                if isinstance(seen, BadImage):
                    broken[at] = str(seen)
                else:
                    table[at] = seen.row
            small = [blank if isinstance(each, BadImage) else each.thumb for each in found]
            thumbs.extend(np.stack(small))
            progress.update(len(found))
    return Scan(records=records, table=table, thumbs=thumbs, broken=broken)


def _side(records: Sequence[ImageRecord], sources: Sources) -> int:
    """Side of the thumbnails: that of images that are all small, else THUMB."""
    for record in records[:8]:
        with contextlib.suppress(BadImage):
            height, width = sources(record.split).image(record.index).shape[:2]
            return int(min(THUMB, max(height, width)))
    return THUMB


def _look_at(
    source: ImageSource, record: ImageRecord, side: int, background: Color | None
) -> Seen | BadImage:
    if not is_text(record.path or ""):
        return BadImage(NO_TEXT)
    try:
        return _seen(source, record.index, side, background)
    except BadImage as error:
        return error


def _seen(source: ImageSource, index: int, side: int, background: Color | None) -> Seen:
    file, orientation, transparent, hidden = b"", 0, 0.0, False
    if source.encoded:
        data = source.read(index)
        image = decode(data, background=background)
        file = hashlib.sha256(data).digest()[:16]
        orientation = _orientation(data)
        if may_be_transparent(data):
            transparent, hidden = _transparency(data)
    else:
        image = source.image(index)
    grey = _grey(image)
    thumb = cv2.resize(grey, (side, side), interpolation=cv2.INTER_AREA)
    pixels = hashlib.sha256(repr(image.shape).encode())
    pixels.update(np.ascontiguousarray(image).data)
    measures = (*grey.shape, *_measure(grey), orientation, transparent, hidden)
    return Seen((*measures, file, pixels.digest()[:16]), np.asarray(thumb, np.uint8))


def _grey(image: Images) -> Images:
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)


def _measure(grey: Images) -> tuple[float, ...]:
    scale = MEASURED / max(grey.shape)
    if scale < 1:
        size = tuple(max(1, round(length * scale)) for length in reversed(grey.shape))
        grey = np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), np.uint8)
    counts = np.bincount(grey.ravel(), minlength=256)
    below = np.cumsum(counts) / grey.size
    darkest, brightest = (float(np.searchsorted(below, part)) / 255 for part in (0.05, 0.99))
    shares = counts.reshape(64, 4).sum(1) / grey.size
    shares = shares[shares > 0]
    variance = float(grey.var())
    edges = float(cv2.Laplacian(grey, cv2.CV_32F).var()) if min(grey.shape) > 2 else variance
    sharpness = edges / variance if variance > 0 else 0.0
    return (
        float(grey.mean()) / 255,
        darkest,
        brightest,
        variance**0.5 / 255,
        float(-(shares * np.log2(shares)).sum()),
        sharpness,
    )


def _orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG, 0 without one."""
    if data[:2] != b"\xff\xd8" or b"Exif" not in data[:4096]:
        return 0
    try:
        with open_header(data) as image:
            found = image.getexif().get(0x0112, 0)
    except Exception:  # damaged EXIF; decoding ignores it, too
        return 0
    return found if isinstance(found, int) and 0 <= found <= 8 else 0


def _transparency(data: bytes) -> tuple[float, bool]:
    """The fraction of pixels that are not opaque, and whether those without any opacity hide
    more than one colour."""
    try:
        with open_header(data) as image:
            pixels = np.asarray(image.convert("RGBA"))
    except Exception:  # as many types as Pillow's decoders raise
        return 0.0, False
    alpha = pixels[..., 3]
    below = pixels[alpha == 0][:, :3]
    hides = len(below) > 0 and bool((below.max(0).astype(int) - below.min(0) > 8).any())
    return float((alpha < 255).mean()), hides
