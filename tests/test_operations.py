"""Batched operations against torchvision's kernels, image by image, on photographs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms.v2 import functional as reference

from distcls.training import augment

Kernel = Callable[[Tensor, float], Tensor]


@functools.cache
def photographs() -> Tensor:
    """Two photographs in eight pieces, uint8 [8, 90, 120, 3], the last ones flat, dark and grey."""
    china, flower = (torch.from_numpy(image.copy()) for image in load_sample_images().images)
    pieces = [china[150:240, 200:320], flower[100:190, 250:370], china[:90, :120]]
    pieces += [flower[300:390, 300:420], flower[::4, ::5][:90, :120], china[::4, ::5][:90, :120]]
    flat = torch.full_like(pieces[0], 77)
    grey = (pieces[0].float().mean(2, keepdim=True) / 4).to(torch.uint8).expand(90, 120, 3)
    return torch.stack([*pieces, flat, grey])


def one_by_one(kernel: Kernel, amounts: list[float]) -> Tensor:
    images = photographs().permute(0, 3, 1, 2)
    done = [kernel(image, amount) for image, amount in zip(images, amounts, strict=True)]
    return torch.stack(done).permute(0, 2, 3, 1)


def difference(found: Tensor, expected: Tensor) -> int:
    assert found.shape == expected.shape
    assert found.dtype == torch.uint8
    return int((found.int() - expected.int()).abs().max())


FACTORS = [0.1, 0.37, 0.7, 1.0, 1.3, 1.6, 1.99, 0.01]


@pytest.mark.parametrize(
    ("function", "kernel", "amounts"),
    [
        (augment.brightness, reference.adjust_brightness, FACTORS),
        (augment.saturation, reference.adjust_saturation, FACTORS),
        (augment.contrast, reference.adjust_contrast, FACTORS),
        (augment.sharpness, reference.adjust_sharpness, FACTORS),
    ],
)
def test_enhancements(
    function: Callable[[Tensor, Tensor], Tensor], kernel: Kernel, amounts: list[float]
) -> None:
    before = photographs().clone()
    found = function(photographs(), torch.tensor(amounts))
    assert difference(found, one_by_one(kernel, amounts)) <= 1
    assert torch.equal(photographs(), before)


TURNS = [0.1, -0.37, 0.5, 0.0, -0.5, 0.25, 0.3, -0.2]


def test_hue() -> None:
    before = photographs().clone()
    found = augment.hue(photographs(), torch.tensor(TURNS))
    assert difference(found, one_by_one(reference.adjust_hue, TURNS)) <= 1
    assert difference(found, before) > 100
    assert torch.equal(photographs(), before)


def test_invert() -> None:
    found = augment.invert(photographs(), torch.zeros(8))
    assert torch.equal(found, one_by_one(lambda image, _: reference.invert(image), [0.0] * 8))


def test_posterize() -> None:
    bits = [1, 2, 3, 4, 5, 6, 7, 8]
    found = augment.posterize(photographs(), torch.tensor(bits, dtype=torch.float32))
    expected = one_by_one(lambda image, bit: reference.posterize(image, int(bit)), list(bits))
    assert torch.equal(found, expected)


def test_solarize() -> None:
    thresholds = [0.0, 25.5, 77.0, 128.0, 178.5, 200.25, 255.0, 76.9]
    found = augment.solarize(photographs(), torch.tensor(thresholds))
    assert torch.equal(found, one_by_one(reference.solarize, thresholds))


@pytest.mark.parametrize(
    ("function", "kernel"),
    [
        (augment.autocontrast, reference.autocontrast),
        (augment.equalize, reference.equalize),
    ],
)
def test_histograms(
    function: Callable[[Tensor, Tensor], Tensor], kernel: Callable[[Tensor], Tensor]
) -> None:
    found = function(photographs(), torch.zeros(8))
    expected = one_by_one(lambda image, _: kernel(image), [0.0] * 8)
    assert difference(found, expected) == 0
    assert difference(found, photographs()) > 20  # it does something


def test_identity_of_the_warp() -> None:
    theta = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(8, 2, 3)
    assert torch.equal(augment.warp(photographs(), theta), photographs())


def test_images_too_small_to_sharpen_stay() -> None:
    tiny = photographs()[:, :2]
    assert torch.equal(augment.sharpness(tiny, torch.full((8,), 1.9)), tiny)
