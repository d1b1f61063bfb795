"""Augmentation of whole batches, vectorised, on the training device: flips, crops, policies.

Each takes images uint8 [B, H, W, 3] and one amount per image, float32 [B] on the same device, and
returns uint8 of that shape; `tests/test_operations.py` holds it to torchvision's kernels.

AutoAugment: Cubuk et al., 2018; RandAugment: Cubuk et al., 2019; TrivialAugment (wide): Mueller,
Hutter, 2021; colour jitter. Operations, ranges and strengths are torchvision's; pixels between
pixels are bilinear, where its default is nearest.

Random resized crops of images larger than the network's input are cut out of the original pixels
while they are read (`loader.RandomResizedCrop`), before everything here; those of small images are
cut here.

Every image's random numbers come from (seed, epoch, image), so neither the number of processes nor
that of workers changes what the network sees.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from distcls.imaging import Color, Preprocess
from distcls.training.config import POLICIES, AugmentConfig, chosen
from distcls.training.hooks import BatchTransform

GREY = (0.2989, 0.587, 0.114)
"""Luminance of red, green and blue (ITU-R BT.601), with torchvision's digits."""


def warp(images: Tensor, theta: Tensor) -> Tensor:
    """Sample at affine positions, bilinearly; the outside is black.

    Theta float32 [B, 2, 3] maps an output pixel's position (x, y, 1), in pixels from the centre, to
    the input's (x, y).
    """
    height, width = images.shape[1:3]
    x = torch.linspace((1 - width) / 2, (width - 1) / 2, width, device=images.device)
    y = torch.linspace((1 - height) / 2, (height - 1) / 2, height, device=images.device)[:, None]
    # written out: a matrix product may run in TF32, which is too coarse for positions
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


def invert(images: Tensor, _: Tensor) -> Tensor:
    """The negative."""
    return 255 - images


def hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn each pixel's hue by a fraction of the colour circle, -0.5 to 0.5; HSV's value and
    saturation stay."""
    pixels = images.float()
    red, green, blue = pixels.unbind(-1)
    value, chroma = pixels.amax(-1), pixels.amax(-1) - pixels.amin(-1)
    divisor = chroma.clamp(min=1)  # of a grey pixel any hue will do
    sector = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sector = sector + 6 * turn[:, None, None]
    # HSV to RGB without cases: all channels are one function of the hue, at other places of it
    places = (sector[..., None] + torch.arange(5, 0, -2, device=images.device)) % 6
    missing = torch.minimum(places, 4 - places).clamp(0, 1)
    turned = value[..., None] - chroma[..., None] * missing
    return (turned * (255.999 / 255)).to(torch.uint8)  # torchvision's rounding, from 0..1


def _grey(images: Tensor) -> Tensor:
    """Luminance in whole numbers, float32 [B, H, W, 1]."""
    red, green, blue = images.float().unbind(-1)
    return (red * GREY[0] + green * GREY[1] + blue * GREY[2]).floor()[..., None]


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor * images + (1 - factor) * other, cut to 0..255 and to whole numbers."""
    factor = factor[:, None, None, None]
    mixed = images.float() * factor + other * (1 - factor)
    return mixed.clamp(0, 255).to(torch.uint8)


NAMES = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
"""Operations that RandAugment and TrivialAugment choose from."""
NUMBERS = {name: number for number, name in enumerate((*NAMES, "invert", "hue"))}
GEOMETRIC = range(1, 6)
"""Operations that are one affine map, which all their images are sampled by at once."""
SIGNED = range(1, 10)
LEVELS = 30
"""Strengths go from 0 to this."""
COLOURS: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    6: brightness,
    7: saturation,
    8: contrast,
    9: sharpness,
    10: posterize,
    11: solarize,
    12: autocontrast,
    13: equalize,
    14: invert,
    15: hue,
}


class Policy(Protocol):
    """An augmentation policy; a registered one is a function of the config that makes it."""

    @property
    def draws(self) -> int:
        """Random numbers that one image needs."""

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Change images [B, H, W, 3] in 0..255 by draws [B, `draws`] in [0, 1); returns uint8.

        A pure function of both, image by image. The draws lie on the CPU.
        """


def make_policy(config: AugmentConfig) -> Policy | None:
    """The configured policy, if any."""
    if config.policy is None:
        return None
    made: Policy = POLICIES.find(config.policy).value(POLICIES.filled(config))
    return made


@POLICIES.register("autoaugment")
def autoaugment(config: AugmentConfig) -> AutoAugment:
    """Cubuk et al.: AutoAugment, 2018; the policy found on ImageNet."""
    del config
    return AutoAugment()


@POLICIES.register("randaugment", randaugment_ops=2, randaugment_magnitude=9)
def randaugment(config: AugmentConfig) -> RandomOperations:
    """Cubuk et al.: RandAugment, 2019."""
    return RandomOperations(config.randaugment_ops or 0, config.randaugment_magnitude)


@POLICIES.register("trivialaugment")
def trivialaugment(config: AugmentConfig) -> RandomOperations:
    """Mueller, Hutter: TrivialAugment, 2021; the wide space."""
    return RandomOperations(1, None)


class RandomOperations:
    """Applies `layers` random operations to each image, one after the other, all of one magnitude,
    or of a random one out of a wider space where it is None."""

    def __init__(self, layers: int, magnitude: int | None) -> None:
        self.layers = layers
        self._wide = magnitude is None
        self._level = magnitude or 0

    @property
    def draws(self) -> int:
        """Random numbers that one image needs: operation, sign and strength of each layer."""
        return 3 * self.layers

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Change images [B, H, W, 3] in 0..255 by draws [B, `draws`] in [0, 1); returns uint8.

        The draws should lie on the CPU, wherever the images are: which operation an image gets
        decides which kernels are launched, and reading that back would make a GPU wait.
        """
        images = _whole(images)
        for layer in draws.cpu().reshape(-1, self.layers, 3).unbind(1):
            ops = (layer[:, 0] * len(NAMES)).long()
            amounts = self._amounts(ops, layer, *images.shape[1:3])
            images = _apply(images, ops, amounts)
        return images

    def _amounts(self, ops: Tensor, layer: Tensor, height: int, width: int) -> Tensor:
        """The argument of each image's operation, float32 [B]."""
        level = torch.full_like(layer[:, 2], self._level)
        if self._wide:
            level = (layer[:, 2] * (LEVELS + 1)).floor()
        reach = WIDE_REACH if self._wide else _reach(height, width)
        return _amounts(ops, level, layer[:, 1] < 0.5, reach)


class AutoAugment:
    """Applies one of 25 pairs of operations to each image, either with its own probability."""

    draws = 5
    """Random numbers that one image needs: the pair, and whether and with which sign each of its
    operations is applied."""

    def __init__(self) -> None:
        rows = [
            [(NUMBERS[name], probability, magnitude) for name, probability, magnitude in pair]
            for pair in IMAGENET_POLICY
        ]
        self._pairs = torch.tensor(rows)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """See `Policy`."""
        images, draws = _whole(images), draws.cpu()
        pairs = self._pairs[(draws[:, 0] * len(self._pairs)).long()]
        chances = draws[:, 1:].reshape(-1, 2, 2)
        for drawn, chance in zip(pairs.unbind(1), chances.unbind(1), strict=True):
            numbers, probability, magnitude = drawn.unbind(1)
            ops = torch.where(chance[:, 0] < probability, numbers, 0).long()
            levels = magnitude * LEVELS / 9  # the paper's magnitudes go from 0 to 9
            reach = _reach(*images.shape[1:3])
            images = _apply(images, ops, _amounts(ops, levels, chance[:, 1] < 0.5, reach))
        return images


IMAGENET_POLICY = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
    (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 0)),
    (("color", 0.4, 0), ("equalize", 0.6, 0)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
)
"""Pairs of (operation, probability, magnitude from 0 to 9); the paper's table 9."""


class ColorJitter:
    """Brightness, contrast, saturation and hue by random factors, in random order.

    As torchvision's: factors are uniform in [max(0, 1 - strength), 1 + strength], the hue turns by
    up to its strength either way.
    """

    draws = 5
    """Random numbers that one image needs: the order, and the four factors."""

    def __init__(self, strengths: Sequence[float]) -> None:
        """Strengths of brightness, contrast, saturation and hue; 0 leaves one out."""
        names = ("brightness", "contrast", "color", "hue")
        used = zip(names, strengths, strict=True)
        self._ops = torch.tensor(
            [NUMBERS[name if strength else "identity"] for name, strength in used]
        )
        *around_one, hue_strength = strengths
        self._low = torch.tensor([*(max(0.0, 1 - each) for each in around_one), -hue_strength])
        self._high = torch.tensor([*(1 + each for each in around_one), hue_strength])
        self._orders = torch.tensor(list(itertools.permutations(range(4))))

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """See `Policy`."""
        images, draws = _whole(images), draws.cpu()
        orders = self._orders[(draws[:, 0] * len(self._orders)).long()]
        factors = self._low + draws[:, 1:] * (self._high - self._low)
        for place in orders.unbind(1):
            images = _apply(images, self._ops[place], factors.gather(1, place[:, None])[:, 0])
        return images


WIDE_REACH = [0.0, 0.99, 0.99, 32.0, 32.0, 135.0, *[0.99] * 4, 6.0, *[0.0] * 5]
"""As `_reach`, of TrivialAugment's wide space."""


def _reach(height: int, width: int) -> list[float]:
    """The greatest amount of each operation: slopes, pixels, degrees, fractions, bits lost."""
    geometric = [0.3, 0.3, 150 / 331 * width, 150 / 331 * height, 30.0]
    return [0.0, *geometric, *[0.9] * 4, 4.0, *[0.0] * 5]


def _amounts(ops: Tensor, level: Tensor, negative: Tensor, reach: Sequence[float]) -> Tensor:
    """The argument of each image's operation of this level (0 to LEVELS), float32 [B]."""
    amounts = level * torch.tensor(reach)[ops] / LEVELS
    signed = (ops >= SIGNED.start) & (ops < SIGNED.stop)
    amounts = torch.where(signed & negative, -amounts, amounts)
    amounts = torch.where((ops == 3) | (ops == 4), amounts.trunc(), amounts)
    amounts = torch.where((ops >= 6) & (ops <= 9), 1 + amounts, amounts)
    amounts = torch.where(ops == 10, (8 - amounts).round(), amounts)
    return torch.where(ops == 11, 255 * (LEVELS - level) / LEVELS, amounts)


def _whole(images: Tensor) -> Tensor:
    """Images in 0..255 as uint8."""
    if not images.is_floating_point():
        return images
    return images.round().clamp(0, 255).to(torch.uint8)


def _apply(images: Tensor, ops: Tensor, amounts: Tensor) -> Tensor:
    """One layer: each operation over the images that drew it."""
    result = images.clone()
    device = images.device
    moved = (ops >= GEOMETRIC.start) & (ops < GEOMETRIC.stop)
    if moved.any():
        places = moved.nonzero().flatten()
        theta = _theta(ops[places], amounts[places], *images.shape[1:3]).to(device)
        places = places.to(device)
        result[places] = warp(images[places], theta)
    for op, function in COLOURS.items():
        places = (ops == op).nonzero().flatten()
        if len(places):
            amount, places = amounts[places].to(device), places.to(device)
            result[places] = function(images[places], amount)
    return result


def _theta(ops: Tensor, amounts: Tensor, height: int, width: int) -> Tensor:
    """Affine maps from output to input positions, in pixels from the centre, [B, 2, 3].

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


BLACK: Color = (0, 0, 0)
CANVAS = 1.15
"""Random resized crops of small images are cut from an image this much larger than the input, so
that the largest of them shrink rather than enlarge."""

ASPECT = math.log(4 / 3)
ERASE_AREA, ERASE_ASPECT = (0.02, 0.33), math.log(3.3)
DRAWS = 14
"""Random numbers that one image needs, besides those of a policy, of colour jitter and of the
user's transform, which come after them in this order: an option that is switched on changes no
other's draws."""


class Augment:
    """Turns uint8 batches of canvas size into batches of the input's size.

    In this order: crop (unless the loader did), flip and rotation; colour jitter; policy; a
    transform of the user's; erasing.
    """

    def __init__(
        self,
        config: AugmentConfig,
        size: tuple[int, int],
        *,
        cropped: bool = False,
        fill: Color | None = None,
        transform: BatchTransform | None = None,
    ) -> None:
        """`cropped`: images come as random resized crops already, of the input's size. A rotation
        then turns the crop, about its centre, and `fill` moves into its corners (default: black);
        into the rim of shifted images as well. `transform` is one of the user's."""
        config = config.without_auto()
        self.config = config
        self.size = size
        self._flip, self._padding = chosen(config.flip), chosen(config.crop_padding)
        self._area = None if cropped else chosen(config.resized_crop)
        self._fill = fill or BLACK
        self._policy = make_policy(config)
        self._jitter = None if config.color_jitter is None else ColorJitter(config.color_jitter)
        self._transform = transform

    @property
    def draws(self) -> int:
        """Random numbers that one image needs."""
        return self._before_transform + (0 if self._transform is None else self._transform.draws)

    @property
    def _before_transform(self) -> int:
        return self._before_jitter + (0 if self._jitter is None else self._jitter.draws)

    @property
    def _before_jitter(self) -> int:
        return DRAWS + (0 if self._policy is None else self._policy.draws)

    def try_transform(self, device: torch.device) -> None:
        """Have the user's transform of a batch show its mistakes before the first step."""
        if self._transform is not None:
            self._transform.try_on(self.size, device)

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width that images have to come in."""
        if self._area is None:
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
        if self._area is not None or config.rotate:
            images = self._warp(images, draws)
        elif self._padding or self._flip:
            images = self._shift_and_flip(images, draws)
        if self._jitter is not None:
            images = self._jitter(images, host[:, self._before_jitter : self._before_transform])
        if self._policy is not None:
            images = self._policy(images, host[:, DRAWS : self._before_jitter])
        if self._transform is not None:
            images = self._transform(_whole(images), draws[:, self._before_transform : self.draws])
        if config.erase:
            images = self._erase(images, draws)
        return images

    def _shift_and_flip(self, images: Tensor, draws: Tensor) -> Tensor:
        height, width = self.size
        padding = self._padding
        around = (0, 0, padding, padding, padding, padding)
        fill = torch.tensor(self._fill, dtype=images.dtype, device=images.device)
        # relative to the colour, modulo 256, so that the zeros of the rim are that colour
        padded = (
            F.pad(images, around) if self._fill == BLACK else F.pad(images - fill, around) + fill
        )
        offsets = (draws[:, 1:3] * (2 * padding + 1)).long()
        rows = offsets[:, :1] + torch.arange(height, device=images.device)
        columns = torch.arange(width, device=images.device).expand(len(images), width)
        mirrored = draws[:, :1] < self._flip
        columns = offsets[:, 1:] + torch.where(mirrored, width - 1 - columns, columns)
        batch = torch.arange(len(images), device=images.device)
        return padded[batch[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _warp(self, images: Tensor, draws: Tensor) -> Tensor:
        """Crop, flip and rotation as one affine map, sampled bilinearly."""
        height, width = images.shape[1:3]
        box_h, box_w, centre_y, centre_x = self._boxes(draws, height, width)
        sign = torch.where(draws[:, 0] < self._flip, -1.0, 1.0)
        angle = (draws[:, 3] * 2 - 1) * math.radians(self.config.rotate)
        cos, sin = torch.cos(angle), torch.sin(angle)
        # rows map output coordinates in [-1, 1] to input ones; lengths in between are in pixels
        row_x = [cos * box_w * sign / width, -sin * box_h / width, 2 * centre_x / width - 1]
        row_y = [sin * box_w * sign / height, cos * box_h / height, 2 * centre_y / height - 1]
        theta = torch.stack([torch.stack(row_x, 1), torch.stack(row_y, 1)], 1)
        grid = F.affine_grid(theta, [len(images), 3, *self.size], align_corners=False)
        fill = torch.tensor(self._fill, dtype=torch.float32, device=images.device)
        pixels = (images - fill if self._fill != BLACK else images).permute(0, 3, 1, 2).float()
        # a plain crop never leaves the image, but interpolation at its rim would mix black in
        outside = "zeros" if self.config.rotate or self._padding else "border"
        warped = F.grid_sample(
            pixels, grid, mode="bilinear", padding_mode=outside, align_corners=False
        )
        warped = warped.permute(0, 2, 3, 1)
        return warped if self._fill == BLACK else warped + fill

    def _boxes(self, draws: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
        """Height, width and centre (y, x) of each image's crop, in pixels, each [B]."""
        if self._area is None:
            whole = torch.ones_like(draws[:, 0])
            shift = (draws[:, 1:3] * 2 - 1) * self._padding
            centre_y, centre_x = height / 2 + shift[:, 0], width / 2 + shift[:, 1]
            return height * whole, width * whole, centre_y, centre_x
        low, high = self._area
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
    """Mask of `length` of `side` pixels from the drawn position on, bool [B, side]."""
    start = (place * (side - length + 1)).floor()
    pixel = torch.arange(side, device=place.device)
    return (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
