"""What can be said about the input: its size, its reading and its augmentation."""

from __future__ import annotations

import dataclasses
import math
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
    resize: Resize | None = None
    """squash ignores the aspect ratio; crop fills the frame and cuts the centre; pad shows all of
    the image on black; unset, the weights' own, else crop."""
    interpolation: Interpolation | None = None
    """Resampling; area averages when shrinking and is linear when enlarging; unset, the weights'
    own, else area."""
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
    policy: Literal["randaugment", "trivialaugment"] | None = None
    """Random operations out of torchvision's fourteen: randaugment (Cubuk et al., 2019) several of
    one strength, trivialaugment (Mueller, Hutter, 2021) one of any strength; null is off."""
    randaugment_ops: int | None = None
    """With randaugment: operations one after the other; null is 2."""
    randaugment_magnitude: int | None = None
    """With randaugment: their strength, 0 to 30; null is 9."""
    mixup: float = 0.0
    """Alpha of mixup (Zhang et al., 2017): each image becomes a mean of two, weighted by
    Beta(alpha, alpha), and its label too; 0 is off, 0.2 usual."""
    cutmix: float = 0.0
    """Alpha of CutMix (Yun et al., 2019): a box of another image is pasted over each, 1 minus
    Beta(alpha, alpha) of its area, and the label's share is that of the pixels; 0 is off, 1
    usual."""
    mix_probability: float = 1.0
    """With mixup or cutmix: share of the images that are mixed."""
    cutmix_share: float | None = None
    """With both: share of the mixed images that take CutMix; null is 0.5."""

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
        self._check_policy()
        self._check_mixing()

    def _check_policy(self) -> None:
        for name, low, high in (("ops", 1, 14), ("magnitude", 0, 30)):
            key = f"randaugment_{name}"
            value = getattr(self, key)
            if value is not None:
                require(low <= value <= high, key, value, f"{low} to {high}, or null")
                used = self.policy == "randaugment"
                require(used, key, value, "null; it belongs to policy: randaugment")

    def _check_mixing(self) -> None:
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, value, "0 (off) or a number above it")
        rate, share = self.mix_probability, self.cutmix_share
        require(0 < rate <= 1, "mix_probability", rate, "above 0 and at most 1")
        used = rate == 1 or self.mixup > 0 or self.cutmix > 0
        require(used, "mix_probability", rate, "1 where mixup and cutmix are off")
        if share is not None:
            require(0 <= share <= 1, "cutmix_share", share, "a share from 0 to 1, or null")
            both = self.mixup > 0 and self.cutmix > 0
            require(both, "cutmix_share", share, "null unless mixup and cutmix are both on")

    @property
    def resolved_cutmix_share(self) -> float:
        """Share of the mixed images that take CutMix rather than mixup."""
        if self.mixup > 0 and self.cutmix > 0:
            return 0.5 if self.cutmix_share is None else self.cutmix_share
        return 1.0 if self.cutmix > 0 else 0.0
