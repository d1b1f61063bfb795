"""The one preprocessing: a decoded image to the size of the network's input, still uint8.

Normalisation is not done here; it is part of the model (and of its ONNX graph), so that nobody can
forget it or do it twice.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

import cv2
import numpy as np
from numpy.typing import NDArray

from distcls import stored
from distcls.errors import require
from distcls.imaging.decode import Color

Resize = Literal["squash", "crop", "pad"]
Interpolation = Literal["area", "linear", "cubic", "lanczos", "nearest"]
RESIZES = get_args(Resize)
INTERPOLATIONS = get_args(Interpolation)

_CV2 = {
    "area": cv2.INTER_AREA,
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "lanczos": cv2.INTER_LANCZOS4,
    "nearest": cv2.INTER_NEAREST_EXACT,
}

LARGEST = 8192
"""Side of a network's input, in pixels."""
LONGEST = 16
"""A side that sticks out of the crop's frame this many times is cut before it is scaled: a line of
30,000 pixels, scaled to be 224 high, would take 4.5 GB."""

Image = NDArray[np.uint8]

Background = Color | Literal["ignore"]
"""A background as an option: red, green and blue, or ignore for none."""
WHITE: Color = (255, 255, 255)


_SIDES = stored.each(stored.whole(1, LARGEST), 2, 2)
_CHANNELS = stored.each(stored.number(-1e6, 1e6), 3, 3)
preprocess_schema = stored.record(
    {"size": _SIDES},
    {
        "resize": stored.one_of(*RESIZES),
        "interpolation": stored.one_of(*INTERPOLATIONS),
        "crop_fraction": stored.number(0, 1),
        "mean": _CHANNELS,
        "std": stored.each(stored.number(1e-9, 1e6), 3, 3),
        "background": stored.nothing_or(stored.each(stored.whole(0, 255), 3, 3)),
    },
)
"""What `Preprocess.to_json` gives."""


class Box(NamedTuple):
    """A region of an image, in whole pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image becomes the network's input; travels inside every model file."""

    size: tuple[int, int]
    """Height and width of the network's input, in pixels."""
    resize: Resize = "crop"
    """squash ignores the aspect ratio; crop fills the frame and cuts the centre; pad shows all of
    the image on black."""
    interpolation: Interpolation = "area"
    """area averages when shrinking (no aliasing) and is linear when enlarging."""
    crop_fraction: float = 1.0
    """With crop: fraction of the resized image's sides that is cut out (0.875: 256 to 224)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of each RGB channel, of values scaled to 0..1; applied by the model."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of each RGB channel; applied by the model."""
    background: Color | None = None
    """Red, green and blue (0..255) that transparent pixels are blended with when a file is decoded;
    None ignores alpha, as models without this field do."""

    def __post_init__(self) -> None:
        known = min(self.size) >= 1 and max(self.size) <= LARGEST
        require(known, "size", self.size, f"height and width from 1 to {LARGEST:,}")
        require(self.resize in RESIZES, "resize", self.resize, f"one of {', '.join(RESIZES)}")
        names = ", ".join(INTERPOLATIONS)
        known = self.interpolation in INTERPOLATIONS
        require(known, "interpolation", self.interpolation, f"one of {names}")
        fraction = self.crop_fraction
        require(0 < fraction <= 1, "crop_fraction", fraction, "a number above 0 and at most 1")
        # the whole image is scaled to this size, in memory, before its middle is cut out
        fits = self.resize != "crop" or max(self.size) <= 2 * LARGEST * fraction
        least = f"at least {max(self.size) / (2 * LARGEST):.2g} for inputs of this size"
        require(fits, "crop_fraction", fraction, least)
        require(min(self.std) > 0, "std", self.std, "numbers above 0")
        require_color("background", self.background)

    def __call__(self, image: Image) -> Image:
        """Bring uint8 RGB [h, w, 3] to uint8 RGB [size[0], size[1], 3]."""
        if self.keeps(image.shape):
            return image
        if self.resize == "squash":
            return self._scale(image, self.size)
        if self.resize == "crop":
            return self._crop(image)
        return self._pad(image)

    def region(self, image: Image, box: Box) -> Image:
        """Bring a region of uint8 RGB [h, w, 3] to uint8 RGB [size[0], size[1], 3].

        Its aspect ratio is ignored, as are `resize` and `crop_fraction`.
        """
        part = image[box.top : box.top + box.height, box.left : box.left + box.width]
        return np.ascontiguousarray(self._scale(part, self.size))

    def keeps(self, shape: tuple[int, ...]) -> bool:
        """Whether images of this shape (height, width, ...) pass unchanged."""
        return shape[:2] == self.size and (self.crop_fraction == 1 or self.resize != "crop")

    def downscale(self, height: int, width: int) -> float:
        """Factor by which an image of that size is scaled down, each side at least; below 1, up."""
        target = self.size
        ratios = (height / target[0], width / target[1])
        if self.resize == "crop":
            return min(ratios) * self.crop_fraction
        return max(ratios) if self.resize == "pad" else min(ratios)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a model file's metadata; without a background no word of it."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
            if key != "background" or value is not None
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Preprocess:
        """The inverse of `to_json`. Raises Unfit or BadValue for anything else."""
        preprocess_schema(values, "")
        plain: dict[str, Any] = {}
        for key, value in values.items():
            plain[key] = tuple(value) if isinstance(value, list) else value
        return cls(**plain)

    def _scale(self, image: Image, size: tuple[int, int]) -> Image:
        height, width = size
        if image.shape[:2] == size:
            return image
        flag = _CV2[self.interpolation]
        return np.asarray(cv2.resize(image, (width, height), interpolation=flag), np.uint8)

    def _crop(self, image: Image) -> Image:
        target = self.size
        scale = max(target[0] / image.shape[0], target[1] / image.shape[1]) / self.crop_fraction
        image = _middle(image, *(math.ceil(LONGEST * side / scale) for side in target))
        height, width = image.shape[:2]
        frame = (max(target[0], round(height * scale)), max(target[1], round(width * scale)))
        scaled = self._scale(image, frame)
        top, left = (frame[0] - target[0]) // 2, (frame[1] - target[1]) // 2
        return np.ascontiguousarray(scaled[top : top + target[0], left : left + target[1]])

    def _pad(self, image: Image) -> Image:
        (height, width), target = image.shape[:2], self.size
        scale = min(target[0] / height, target[1] / width)
        inner = tuple(
            min(limit, max(1, round(side * scale)))
            for side, limit in zip((height, width), target, strict=True)
        )
        canvas = np.zeros((*target, 3), np.uint8)
        top, left = (target[0] - inner[0]) // 2, (target[1] - inner[1]) // 2
        canvas[top : top + inner[0], left : left + inner[1]] = self._scale(
            image, (inner[0], inner[1])
        )
        return canvas


def background_color(value: Background) -> Color | None:
    """The colour of an option; None for ignore."""
    return None if value == "ignore" else value


def background_option(color: Color | None) -> Background:
    """The inverse of `background_color`."""
    return "ignore" if color is None else color


def background_text(color: Color | None) -> str:
    """A background as the options take it."""
    return "ignore" if color is None else ",".join(map(str, color))


def require_color(field: str, value: Any) -> None:
    """Raise BadValue for `field` unless it is three numbers from 0 to 255, or None."""
    numbers = isinstance(value, tuple) and len(value) == 3 and all(type(n) is int for n in value)
    known = value is None or (numbers and all(0 <= number <= 255 for number in value))
    require(known, field, value, "red, green and blue, whole numbers from 0 to 255")


def _middle(image: Image, height: int, width: int) -> Image:
    """The central region of at most this height and width."""
    top, left = (max(0, a - b) // 2 for a, b in zip(image.shape, (height, width), strict=False))
    return image[top : top + height, left : left + width]
