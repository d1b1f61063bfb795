"""The operations of RandAugment and TrivialAugment on whole batches, as torchvision has them.

Each takes images uint8 [B, H, W, 3] and one amount an image, float32 [B] on the same device, and
returns uint8 of that shape; `tests/test_operations.py` holds it to torchvision's kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GREY = (0.2989, 0.587, 0.114)
"""Luminance of red, green and blue (ITU-R BT.601), with torchvision's digits."""


def warp(images: Tensor, theta: Tensor) -> Tensor:
    """Sample at affine places, bilinearly; black comes in from outside.

    Theta float32 [B, 2, 3] maps an output pixel's place (x, y, 1), in pixels from the centre, to
    the input's (x, y).
    """
    height, width = images.shape[1:3]
    x = torch.linspace((1 - width) / 2, (width - 1) / 2, width, device=images.device)
    y = torch.linspace((1 - height) / 2, (height - 1) / 2, height, device=images.device)[:, None]
    # spelt out: a matrix product may run in TF32, which is too coarse for places
    rows = theta[:, :, :, None, None].unbind(1)
    places = [(r[:, 0] * x + r[:, 1] * y + r[:, 2]) * 2 for r in rows]
    grid = torch.stack([places[0] / width, places[1] / height], dim=-1)
    pixels = images.permute(0, 3, 1, 2).float()
    warped = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return warped.round().to(torch.uint8).permute(0, 2, 3, 1)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Towards black (below 1) or away from it."""
    return _blend(images, torch.zeros(1, device=images.device), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Towards each pixel's grey (below 1) or away from it."""
    return _blend(images, _grey(images), factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Towards the image's mean grey (below 1) or away from it."""
    return _blend(images, _grey(images).mean((1, 2), keepdim=True), factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Towards a blurred image (below 1) or away from it; the outermost pixels stay."""
    height, width = images.shape[1:3]
    if min(height, width) <= 2:
        return images
    inner = images[:, 1:-1, 1:-1].float()
    pixels = images.permute(0, 3, 1, 2).float()
    sums = F.avg_pool2d(pixels, 3, stride=1, divisor_override=1).permute(0, 2, 3, 1)
    blurred = ((sums + 4 * inner) / 13).round()  # ones around a five
    result = images.clone()
    result[:, 1:-1, 1:-1] = _blend(inner, blurred, factor)
    return result


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest `bits` of each value."""
    mask = 256 - 2 ** (8 - bits.long())
    return images & mask.to(torch.uint8)[:, None, None, None]


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert values from the threshold (0 to 255) on."""
    return torch.where(images >= threshold[:, None, None, None], 255 - images, images)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel from its darkest and brightest value to 0 and 255."""
    pixels = images.float()
    low, high = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
    flat = high == low
    scale = torch.where(flat, 1.0, (high - low) * (1 / 255))
    stretched = (pixels - torch.where(flat, 0.0, low)) / scale
    return stretched.clamp(0, 255).to(torch.uint8)


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Make each channel's values about equally frequent, by Pillow's rule."""
    batch, height, width, channels = images.shape
    values = images.permute(0, 3, 1, 2).reshape(batch, channels, height * width).long()
    histogram = torch.zeros(batch, channels, 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, values, torch.ones_like(values))
    brightest = histogram.gather(2, values.amax(2, keepdim=True))
    step = (height * width - brightest) // 255
    below = histogram.cumsum(2) - histogram
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    spread = torch.where(step > 0, table.gather(2, values), values)
    shape = (batch, channels, height, width)
    return spread.to(torch.uint8).reshape(shape).permute(0, 2, 3, 1)


def _grey(images: Tensor) -> Tensor:
    """Luminance in whole numbers, float32 [B, H, W, 1]."""
    red, green, blue = images.float().unbind(-1)
    return (red * GREY[0] + green * GREY[1] + blue * GREY[2]).floor()[..., None]


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor * images + (1 - factor) * other, cut to 0..255 and to whole numbers."""
    factor = factor[:, None, None, None]
    mixed = images.float() * factor + other * (1 - factor)
    return mixed.clamp(0, 255).to(torch.uint8)
