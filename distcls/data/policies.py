"""RandAugment and TrivialAugment: random operations of random strength for each image of a batch.

RandAugment: Cubuk et al., 2019; TrivialAugment (wide): Mueller, Hutter, 2021. Operations, ranges
and strengths are torchvision's; pixels between pixels are bilinear, where its default is nearest.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distcls.data import operations
from distcls.data.config import AugmentConfig

NAMES = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
GEOMETRIC = range(1, 6)
"""Operations that are one affine map, which all their images are sampled by at once."""
SIGNED = range(1, 10)
LEVELS = 30
"""Strengths go from 0 to this."""
COLOURS: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    6: operations.brightness,
    7: operations.saturation,
    8: operations.contrast,
    9: operations.sharpness,
    10: operations.posterize,
    11: operations.solarize,
    12: operations.autocontrast,
    13: operations.equalize,
}


class Policy:
    """Applies `layers` random operations to each image, one after the other."""

    def __init__(self, config: AugmentConfig) -> None:
        self._wide = config.policy == "trivialaugment"
        ops, magnitude = config.randaugment_ops, config.randaugment_magnitude
        self.layers = 1 if self._wide else 2 if ops is None else ops
        self._level = 9 if magnitude is None else magnitude

    @property
    def draws(self) -> int:
        """Random numbers that one image needs: operation, sign and strength of each layer."""
        return 3 * self.layers

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Change images [B, H, W, 3] in 0..255 by draws [B, `draws`] in [0, 1); returns uint8.

        The draws should lie on the CPU, wherever the images are: which operation an image gets
        decides what is launched, and reading that back would make a GPU wait.
        """
        if images.is_floating_point():
            images = images.round().clamp(0, 255).to(torch.uint8)
        for layer in draws.cpu().reshape(-1, self.layers, 3).unbind(1):
            ops = (layer[:, 0] * len(NAMES)).long()
            amounts = self._amounts(ops, layer, *images.shape[1:3])
            images = _apply(images, ops, amounts)
        return images

    def _amounts(self, ops: Tensor, layer: Tensor, height: int, width: int) -> Tensor:
        """What each image's operation is to be told, float32 [B]."""
        level = torch.full_like(layer[:, 2], self._level)
        if self._wide:
            level = (layer[:, 2] * (LEVELS + 1)).floor()
        sign = torch.where(layer[:, 1] < 0.5, -1.0, 1.0)
        amounts = level * torch.tensor(self._reach(height, width))[ops] / LEVELS
        amounts = torch.where((ops >= SIGNED.start) & (ops < SIGNED.stop), sign * amounts, amounts)
        amounts = torch.where((ops == 3) | (ops == 4), amounts.trunc(), amounts)
        amounts = torch.where((ops >= 6) & (ops <= 9), 1 + amounts, amounts)
        amounts = torch.where(ops == 10, (8 - amounts).round(), amounts)
        return torch.where(ops == 11, 255 * (LEVELS - level) / LEVELS, amounts)

    def _reach(self, height: int, width: int) -> list[float]:
        """The greatest amount of each operation: slopes, pixels, degrees, shares, bits lost."""
        if self._wide:
            geometric = [0.99, 0.99, 32.0, 32.0, 135.0]
            return [0.0, *geometric, 0.99, 0.99, 0.99, 0.99, 6.0, 0.0, 0.0, 0.0]
        geometric = [0.3, 0.3, 150 / 331 * width, 150 / 331 * height, 30.0]
        return [0.0, *geometric, 0.9, 0.9, 0.9, 0.9, 4.0, 0.0, 0.0, 0.0]


def _apply(images: Tensor, ops: Tensor, amounts: Tensor) -> Tensor:
    """One layer: each operation over the images that drew it."""
    result = images.clone()
    device = images.device
    moved = (ops >= GEOMETRIC.start) & (ops < GEOMETRIC.stop)
    if moved.any():
        places = moved.nonzero().flatten()
        theta = _theta(ops[places], amounts[places], *images.shape[1:3]).to(device)
        places = places.to(device)
        result[places] = operations.warp(images[places], theta)
    for op, function in COLOURS.items():
        places = (ops == op).nonzero().flatten()
        if len(places):
            amount, places = amounts[places].to(device), places.to(device)
            result[places] = function(images[places], amount)
    return result


def _theta(ops: Tensor, amounts: Tensor, height: int, width: int) -> Tensor:
    """Affine maps from output to input places, in pixels from the centre, [B, 2, 3].

    Shearing keeps the corner above left where it is, rotation the centre.
    """
    zero = torch.zeros_like(amounts)
    shear_x, shear_y, right, down, degrees = (
        torch.where(ops == op, amounts, zero) for op in GEOMETRIC
    )
    angle = degrees * (math.pi / 180)
    cos, sin = torch.cos(angle), torch.sin(angle)
    row_x = [cos, shear_x - sin, shear_x * (height / 2) - right]
    row_y = [shear_y + sin, cos, shear_y * (width / 2) - down]
    return torch.stack([torch.stack(row_x, 1), torch.stack(row_y, 1)], 1)
