"""mixup and CutMix: training images in pairs, and their soft labels.

Images are mixed with their neighbour in the batch: 0 and 1, 2 and 3, and so on; the last of an odd
number is not mixed. The sampler keeps neighbours on one process, and every image's random numbers
come from (seed, epoch, image), so the number of processes changes nothing. How a step is cut into
micro-batches (`accumulate`) does: it decides which images are neighbours.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distcls.training.config import AugmentConfig

MIX_DRAWS = 5
"""Random numbers that one image needs."""
KNOTS = 4096
"""Points between which a beta distribution's quantiles are interpolated."""


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A batch after mixing, and what was mixed with what."""

    images: Tensor
    """[B, H, W, 3] in 0..255."""
    own: Tensor
    """Weight of each image's own label, float32 [B]; its partner's is 1 minus it."""
    partner: Tensor
    """Index of each image's partner in the batch, int64 [B]."""

    def targets(self, labels: Tensor, classes: int) -> Tensor:
        """Soft labels, float32 [B, classes], from labels int64 [B]."""
        return self.soft_labels(F.one_hot(labels, classes))

    def soft_labels(self, labels: Tensor) -> Tensor:
        """Soft labels, float32 [B, classes], from 0 and 1 for each class, int64 [B, classes].

        An image may have multiple ones: one in each head, or any number of labels.
        """
        first = labels * self.own[:, None]
        second = labels[self.partner] * (1 - self.own)[:, None]
        return first + second

    def blend(self, values: Tensor) -> Tensor:
        """A number of each image, [B], mixed as the labels are."""
        return self.own * values + (1 - self.own) * values[self.partner]


class Mixing:
    """Mixes batches according to the config; does nothing if neither alpha is above 0."""

    def __init__(self, config: AugmentConfig, device: torch.device) -> None:
        self.active = config.mixup > 0 or config.cutmix > 0
        self._probability = config.mix_probability
        self._cutmix_probability = config.resolved_cutmix_probability
        self._mixup = _Beta(config.mixup, device) if config.mixup else None
        self._cutmix = _Beta(config.cutmix, device) if config.cutmix else None

    def __call__(self, images: Tensor, draws: Tensor) -> Mixed:
        """Mix images [B, H, W, 3] by draws [B, MIX_DRAWS] in [0, 1), all on one device.

        CutMix keeps the type of the pixels, mixup makes them float32.
        """
        places = torch.arange(len(images), device=images.device)
        partner = places ^ 1
        partner = torch.where(partner < len(images), partner, places)
        chosen = draws[:, 0] < self._probability
        cut = chosen & (draws[:, 1] < self._cutmix_probability)
        others, own = images[partner], torch.ones_like(draws[:, 0])
        if self._cutmix is not None:
            boxes = _boxes(self._cutmix(draws[:, 2]), draws[:, 3:5], images.shape[1:3])
            boxes = boxes & cut[:, None, None]
            images = torch.where(boxes[..., None], others, images)
            own = 1 - boxes.sum((1, 2)) / boxes[0].numel()
        if self._mixup is not None:
            own = torch.where(chosen & ~cut, self._mixup(draws[:, 2]), own)
            weight = torch.where(cut, 1.0, own)[:, None, None, None]
            images = torch.lerp(others.float(), images.float(), weight)
        alone = partner == places
        return Mixed(images, torch.where(alone, 1.0, own), partner)


def _boxes(own: Tensor, places: Tensor, size: torch.Size) -> Tensor:
    """Which pixels each image takes from its partner, bool [B, *size].

    A box of 1 - own of the area has its centre anywhere in the image and is cut off at the rim, so
    the label's weight has to follow the pixels (Yun et al.: CutMix, 2019, and its code).
    """
    inside = []
    for axis, side in enumerate(size):
        half = (side * torch.sqrt(1 - own)).long() // 2
        centre = (places[:, axis] * side).long()
        pixel = torch.arange(side, device=own.device)
        start, stop = (centre - half)[:, None], (centre + half)[:, None]
        inside.append((pixel >= start) & (pixel < stop))
    return inside[0][:, :, None] & inside[1][:, None, :]


class _Beta:
    """Beta(alpha, alpha) from uniform numbers: its quantile function, as a table on the device."""

    def __init__(self, alpha: float, device: torch.device) -> None:
        from scipy.special import betaincinv  # a third of a second that other runs do not spend

        table = betaincinv(alpha, alpha, np.linspace(0, 1, KNOTS + 1))
        self._table = torch.from_numpy(np.asarray(table, np.float32)).to(device)

    def __call__(self, uniform: Tensor) -> Tensor:
        place = uniform * KNOTS
        low = place.long()
        return torch.lerp(self._table[low], self._table[low + 1], place - low)
