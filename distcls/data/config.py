"""What can be said about the input: its size, its reading and its augmentation."""

from __future__ import annotations

import dataclasses
from typing import Literal

from distcls.errors import require
from distcls.imaging.preprocess import Interpolation, Resize

SMALL_IMAGE = 64
"""Images of up to this many pixels a side are trained on at their own size by default."""
SMALLEST_INPUT = 28
LARGE_INPUT = 224


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputConfig:
    """How an image becomes the network's input; travels inside the model file."""

    size: tuple[int, int] | None = None
    """Height and width in pixels; unset, the weights' own, else the images' own up to 64, else
    224."""
    resize: Resize = "crop"
    """squash ignores the aspect ratio; crop fills the frame and cuts the centre; pad shows all of
    the image on black."""
    interpolation: Interpolation = "area"
    """Resampling; area averages when shrinking and is linear when enlarging."""
    crop_fraction: float | None = None
    """With crop: the part of the resized image that is kept; unset, the weights' own, else 1."""

    def __post_init__(self) -> None:
        size, fraction = self.size, self.crop_fraction
        require(size is None or min(size) >= 1, "size", size, "height and width of at least 1")
        valid = fraction is None or 0 < fraction <= 1
        require(valid, "crop_fraction", fraction, "a number above 0 and at most 1, or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How images are read."""

    pack: Literal["auto", "on", "off"] = "auto"
    """Read decoded images from the dataset's pack: where there is one, always, or never."""
    workers: int | None = None
    """Threads that decode; unset, the cores of this process."""
    ahead: int = 3
    """Batches read ahead of the step that needs them."""
    timeout: float = 300.0
    """Seconds without a batch after which the run stops and names the files it waits for."""

    def __post_init__(self) -> None:
        workers = self.workers
        require(workers is None or workers >= 1, "workers", workers, "at least 1, or null")
        require(self.ahead >= 1, "ahead", self.ahead, "at least 1")
        require(self.timeout > 0, "timeout", self.timeout, "a number of seconds above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes to training images, drawn per image from (seed, epoch, image)."""

    flip: float = 0.0
    """Probability of a horizontal mirror image."""
    crop_padding: int = 0
    """Random crop: shift by up to this many pixels either way; black moves in."""
    resized_crop: tuple[float, float] | None = None
    """Random resized crop: smallest and largest share of the area that is kept, such as
    0.35,1."""
    rotate: float = 0.0
    """Random rotation by up to this many degrees either way."""
    erase: float = 0.0
    """Probability of erasing a rectangle of 2 to 33 % of the area with one random colour
    (Zhong et al.: Random Erasing Data Augmentation, 2017)."""

    def __post_init__(self) -> None:
        for name in ("flip", "erase"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, value, "a probability from 0 to 1")
        require(self.crop_padding >= 0, "crop_padding", self.crop_padding, "0 or more pixels")
        require(0 <= self.rotate <= 180, "rotate", self.rotate, "0 to 180 degrees")
        if self.resized_crop is not None:
            low, high = self.resized_crop
            valid = 0 < low <= high <= 1
            require(valid, "resized_crop", self.resized_crop, "two shares, 0 < low <= high <= 1")
            clash = self.crop_padding == 0
            require(clash, "crop_padding", self.crop_padding, "0 where resized_crop is on")
