"""What can be said about the loss."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

from distcls.errors import require

DEFAULT_TEMPERATURE, DEFAULT_SHARE = 4.0, 0.5
DEFAULT_GAMMA = 2.0
"""Focusing that Lin et al. found best."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss of an image, and how much each class and each image counts.

    The evaluation's `val_loss` is plain cross-entropy (of labels, BCE) whatever is said here.
    """

    name: Literal["cross_entropy", "focal", "bce"] = "cross_entropy"
    """cross_entropy; focal, which turns to the images still wrong (Lin et al.: Focal Loss for Dense
    Object Detection, 2017); bce, yes or no for each class on its own, the mean over the classes
    (Wightman et al.: ResNet strikes back, 2021). Of heads the mean of theirs, without bce; labels
    take bce, or focal of each one's sigmoid."""
    label_smoothing: float = 0.0
    """Share of each label's weight that is spread over all classes."""
    focal_gamma: float | None = None
    """With focal: how strongly images that are right already are passed over; 0 is cross-entropy,
    null is 2."""
    class_weights: Literal["balanced"] | tuple[float, ...] | dict[str, float] | None = None
    """How much images of each class count: `balanced` (inversely to the class's training images, as
    scikit-learn has it), a list in label order, or some classes by name, such as cat=2,dog=0.5,
    where the others are 1. Scaled so that the training images weigh 1 on average."""
    sample_weights: Literal["auto", "on", "off"] = "auto"
    """Whether each image counts by its weight in the dataset: where it has weights, always, or
    never. Scaled so that the training images weigh 1 on average."""

    def __post_init__(self) -> None:
        smoothing, gamma = self.label_smoothing, self.focal_gamma
        require(0 <= smoothing < 1, "label_smoothing", smoothing, "a number from 0 to below 1")
        valid = gamma is None or (math.isfinite(gamma) and gamma >= 0)
        require(valid, "focal_gamma", gamma, "a number of 0 or more, or null")
        used = gamma is None or self.name == "focal"
        require(used, "focal_gamma", gamma, f"null with {self.name}; it belongs to name: focal")
        weights = self.class_weights
        numbers = weights.values() if isinstance(weights, dict) else weights
        if numbers is not None and not isinstance(numbers, str):
            valid = all(math.isfinite(number) and number >= 0 for number in numbers)
            require(valid, "class_weights", weights, "numbers of 0 or more")
            # classes that a mapping leaves out weigh 1
            some = isinstance(weights, dict) or any(numbers)
            require(some, "class_weights", weights, "at least one number above 0")

    @property
    def gamma(self) -> float:
        """The focusing of the focal loss."""
        return DEFAULT_GAMMA if self.focal_gamma is None else self.focal_gamma


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Distillation (Hinton et al., 2015): learning a trained model's answers beside the labels."""

    teacher: Path | None = None
    """Trained model to learn from, best.pth or best.onnx, of the same classes; null is off."""
    temperature: float | None = None
    """With a teacher: both models' logits are divided by it, so that the small probabilities tell
    more; null is 4."""
    share: float | None = None
    """With a teacher: its share of the loss, the labels have the rest; null is 0.5."""

    def __post_init__(self) -> None:
        temperature, share = self.temperature, self.share
        valid = temperature is None or 0 < temperature < math.inf
        require(valid, "temperature", temperature, "a number above 0, or null")
        require(share is None or 0 < share <= 1, "share", share, "above 0 and at most 1, or null")
        for name in ("temperature", "share"):
            used = getattr(self, name) is None or self.teacher is not None
            require(used, name, getattr(self, name), "null without a teacher")

    @property
    def resolved_temperature(self) -> float:
        """The temperature, as given or usual."""
        return DEFAULT_TEMPERATURE if self.temperature is None else self.temperature

    @property
    def resolved_share(self) -> float:
        """The teacher's share, as given or usual."""
        return DEFAULT_SHARE if self.share is None else self.share
