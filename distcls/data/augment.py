"""Augmentation of whole batches, vectorised, on the training device.

Every image's random numbers come from (seed, epoch, image), so neither the number of processes nor
that of workers changes what the network sees.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distcls.data.config import AugmentConfig
from distcls.data.policies import Policy
from distcls.imaging import Preprocess

CANVAS = 1.15
"""Random resized crops are cut from an image this much larger than the input, so that most of them
shrink rather than enlarge (the 256 to 224 of common practice)."""

ASPECT = math.log(4 / 3)
ERASE_AREA, ERASE_ASPECT = (0.02, 0.33), math.log(3.3)
DRAWS = 14
"""Random numbers that one image needs, besides those of a policy."""


class Augment:
    """Turns uint8 batches of canvas size into batches of the input's size."""

    def __init__(self, config: AugmentConfig, size: tuple[int, int]) -> None:
        self.config = config
        self.size = size
        self._policy = Policy(config) if config.policy is not None else None

    @property
    def draws(self) -> int:
        """Random numbers that one image needs."""
        return DRAWS + (0 if self._policy is None else self._policy.draws)

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width that images have to come in."""
        if self.config.resized_crop is None:
            return self.size
        return (round(self.size[0] * CANVAS), round(self.size[1] * CANVAS))

    def reading(self, preprocess: Preprocess) -> Preprocess:
        """How training images are read: `preprocess`, whose size is the input's, on the canvas."""
        if self.canvas == preprocess.size:
            return preprocess
        return dataclasses.replace(preprocess, size=self.canvas, crop_fraction=1.0)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augment images uint8 [B, *canvas, 3] by draws [B, `draws`] in [0, 1), best on the CPU.

        Returns [B, *size, 3] in 0..255, uint8 unless it had to interpolate (then float32).
        """
        config, host = self.config, draws
        draws = draws.to(images.device)
        if config.resized_crop is not None or config.rotate:
            images = self._warp(images, draws)
        elif config.crop_padding or config.flip:
            images = self._shift_and_flip(images, draws)
        if self._policy is not None:
            images = self._policy(images, host[:, DRAWS : self.draws])
        if config.erase:
            images = self._erase(images, draws)
        return images

    def _shift_and_flip(self, images: Tensor, draws: Tensor) -> Tensor:
        height, width = self.size
        padding = self.config.crop_padding
        padded = F.pad(images, (0, 0, padding, padding, padding, padding))
        offsets = (draws[:, 1:3] * (2 * padding + 1)).long()
        rows = offsets[:, :1] + torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device).expand(len(images), width)
        mirrored = draws[:, :1] < self.config.flip
        columns = offsets[:, 1:] + torch.where(mirrored, width - 1 - columns, columns)
        batch = torch.arange(len(images), device=images.device)
        return padded[batch[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _warp(self, images: Tensor, draws: Tensor) -> Tensor:
        """Crop, flip and rotation as one affine map, sampled bilinearly."""
        height, width = images.shape[1:3]
        box_h, box_w, centre_y, centre_x = self._boxes(draws, height, width)
        sign = torch.where(draws[:, 0] < self.config.flip, -1.0, 1.0)
        angle = (draws[:, 3] * 2 - 1) * math.radians(self.config.rotate)
        cos, sin = torch.cos(angle), torch.sin(angle)
        # rows map output coordinates in [-1, 1] to input ones; lengths in between are in pixels
        row_x = [cos * box_w * sign / width, -sin * box_h / width, 2 * centre_x / width - 1]
        row_y = [sin * box_w * sign / height, cos * box_h / height, 2 * centre_y / height - 1]
        theta = torch.stack([torch.stack(row_x, 1), torch.stack(row_y, 1)], 1)
        grid = F.affine_grid(theta, [len(images), 3, *self.size], align_corners=False)
        pixels = images.permute(0, 3, 1, 2).float()
        # a plain crop never leaves the image, but interpolation at its rim would mix black in
        outside = "zeros" if self.config.rotate or self.config.crop_padding else "border"
        warped = F.grid_sample(
            pixels, grid, mode="bilinear", padding_mode=outside, align_corners=False
        )
        return warped.permute(0, 2, 3, 1)

    def _boxes(self, draws: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
        """Height, width and centre (y, x) of each image's crop, in pixels, each [B]."""
        if self.config.resized_crop is None:
            whole = torch.ones_like(draws[:, 0])
            shift = (draws[:, 1:3] * 2 - 1) * self.config.crop_padding
            centre_y, centre_x = height / 2 + shift[:, 0], width / 2 + shift[:, 1]
            return height * whole, width * whole, centre_y, centre_x
        low, high = self.config.resized_crop
        area = low + draws[:, 4] * (high - low)
        aspect = torch.exp((draws[:, 5] * 2 - 1) * ASPECT)
        box_h = (torch.sqrt(area / aspect)).clamp(max=1) * height
        box_w = (torch.sqrt(area * aspect)).clamp(max=1) * width
        centre_y = box_h / 2 + draws[:, 1] * (height - box_h)
        centre_x = box_w / 2 + draws[:, 2] * (width - box_w)
        return box_h, box_w, centre_y, centre_x

    def _erase(self, images: Tensor, draws: Tensor) -> Tensor:
        height, width = self.size
        low, high = ERASE_AREA
        area = (low + draws[:, 7] * (high - low)) * height * width
        aspect = torch.exp((draws[:, 8] * 2 - 1) * ERASE_ASPECT)
        # whole pixels before it is placed: the box would lose one at the far rim otherwise
        box_h = torch.sqrt(area * aspect).round().clamp(1, height)
        box_w = torch.sqrt(area / aspect).round().clamp(1, width)
        rows = _inside(draws[:, 9], box_h, height)
        columns = _inside(draws[:, 10], box_w, width)
        chosen = draws[:, 6] < self.config.erase
        mask = rows[:, :, None] & columns[:, None, :] & chosen[:, None, None]
        colour = (draws[:, 11:14] * 256).floor().to(images.dtype)
        return torch.where(mask[..., None], colour[:, None, None, :], images)


def _inside(place: Tensor, length: Tensor, side: int) -> Tensor:
    """Which of `side` pixels lie in `length` ones from the drawn place on, bool [B, side]."""
    start = (place * (side - length + 1)).floor()
    pixel = torch.arange(side, device=place.device)
    return (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
