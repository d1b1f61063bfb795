"""The policies and colour jitter against torchvision's own, told the same operations."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from distcls.errors import BadValue
from distcls.training.augment import (
    DRAWS,
    IMAGENET_POLICY,
    NAMES,
    NUMBERS,
    Augment,
    ColorJitter,
    make_policy,
)
from distcls.training.config import POLICIES, AugmentConfig
from distcls.training.sampler import uniforms
from tests.test_operations import photographs

BILINEAR = v2.InterpolationMode.BILINEAR
THEIRS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness"),
    *("Posterize", "Solarize", "AutoContrast", "Equalize"),
)


def layer(op: int, sign: float, level: float = 0.0) -> list[float]:
    """Draws that choose an operation, its sign and (for TrivialAugment) its strength's bin."""
    return [(op + 0.5) / len(NAMES), 0.9 if sign > 0 else 0.1, level]


def by_torchvision(kind: Any, name: str, level: int, sign: float) -> Tensor:
    """The first photograph, changed as torchvision would with these draws."""
    space, signed = kind._AUGMENTATION_SPACE[name]
    image = photographs()[0].permute(2, 0, 1)
    magnitudes = space(31, *image.shape[1:])
    magnitude = 0.0 if magnitudes is None else float(magnitudes[level])
    magnitude *= sign if signed else 1
    done = kind._apply_image_or_video_transform(image, name, magnitude, BILINEAR, kind._fill)
    return done.permute(1, 2, 0)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.uint8
    assert (found.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("level", [3, 9, 30])
def test_randaugment_of_one_operation(name: str, level: int, sign: float) -> None:
    config = AugmentConfig(policy="randaugment", randaugment_ops=1, randaugment_magnitude=level)
    draws = torch.tensor([layer(THEIRS.index(name), sign)])
    found = make_policy(config)(photographs()[:1], draws)[0]
    assert_same(found, by_torchvision(v2.RandAugment(), name, level, sign))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("level", [0, 7, 17, 30])
def test_trivialaugment(name: str, level: int, sign: float) -> None:
    draws = torch.tensor([layer(THEIRS.index(name), sign, (level + 0.5) / 31)])
    policy = make_policy(AugmentConfig(policy="trivialaugment"))
    assert policy.layers == 1
    found = policy(photographs()[:1], draws)[0]
    assert_same(found, by_torchvision(v2.TrivialAugmentWide(), name, level, sign))


def test_layers_come_one_after_the_other() -> None:
    two = make_policy(AugmentConfig(policy="randaugment"))
    assert (two.layers, two.draws) == (2, 6)
    one = make_policy(AugmentConfig(policy="randaugment", randaugment_ops=1))
    first, second = torch.tensor([layer(5, 1)]), torch.tensor([layer(11, 1)])
    image = photographs()[:1]
    assert torch.equal(two(image, torch.cat([first, second], 1)), one(one(image, first), second))


AUTO = v2.AutoAugment()


def pair_by_torchvision(image: Tensor, row: int, applied: list[bool], sign: float) -> Tensor:
    """An image changed by the applied ones of a pair of torchvision's ImageNet policy."""
    done = image.permute(2, 0, 1)
    for (name, _, level), chosen in zip(AUTO._policies[row], applied, strict=True):
        space, signed = AUTO._AUGMENTATION_SPACE[name]
        magnitudes = space(10, *done.shape[1:])
        magnitude = 0.0 if magnitudes is None else float(magnitudes[level])
        magnitude *= sign if signed else 1
        if chosen:
            transform = AUTO._apply_image_or_video_transform
            done = transform(done, name, magnitude, BILINEAR, AUTO._fill)
    return done.permute(1, 2, 0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("row", range(25))
def test_autoaugment(row: int, sign: float) -> None:
    policy = make_policy(AugmentConfig(policy="autoaugment"))
    side = 0.9 if sign > 0 else 0.1
    chances = [pair[1] for pair in IMAGENET_POLICY[row]]
    for given in itertools.product([0.05, 0.99], repeat=2):
        applied = [drawn < chance for drawn, chance in zip(given, chances, strict=True)]
        draws = torch.tensor([[(row + 0.5) / 25, given[0], side, given[1], side]])
        found = policy(photographs()[:1], draws)[0]
        expected = pair_by_torchvision(photographs()[0], row, applied, sign)
        if sum(applied) < 2:
            assert_same(found, expected)
        else:  # a difference of 1 after the first operation may grow in the second
            assert ((found.int() - expected.int()).abs() > 4).float().mean() < 0.01


def test_the_pairs_are_torchvisions() -> None:
    names = dict(zip(("Invert", *THEIRS), ("invert", *NAMES), strict=True))
    theirs = [
        tuple((names[name], chance, level or 0) for name, chance, level in pair)
        for pair in AUTO._policies
    ]
    assert theirs == list(IMAGENET_POLICY)


ORDERS = list(itertools.permutations(range(4)))
ADJUST = (
    *(functional.adjust_brightness, functional.adjust_contrast),
    *(functional.adjust_saturation, functional.adjust_hue),
)


@pytest.mark.parametrize("order", range(24))
def test_colour_jitter(order: int) -> None:
    """The factors that torchvision's own draws its from, in each order."""
    strengths = (0.4, 0.5, 1.5, 0.2)
    theirs = v2.ColorJitter(*strengths)
    ranges = [theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue]
    draws = torch.from_numpy(uniforms(order, 0, np.arange(8), 5))
    draws[:, 0] = (order + 0.5) / 24
    found = ColorJitter(strengths)(photographs(), draws)
    for image, given, drawn in zip(found, photographs(), draws[:, 1:].tolist(), strict=True):
        expected = given.permute(2, 0, 1)
        for place in ORDERS[order]:
            low, high = ranges[place]
            expected = ADJUST[place](expected, low + drawn[place] * (high - low))
        apart = (image.int() - expected.permute(1, 2, 0).int()).abs()
        assert (apart > 2).float().mean() < 0.01  # rounding differs, and adds up
    assert (found != photographs()).any()


def test_colour_jitter_of_one_kind_is_that_operation() -> None:
    for place, name in enumerate(("brightness", "contrast", "color", "hue")):
        strengths = [0.0] * 4
        strengths[place] = 0.3
        jitter = ColorJitter(strengths)
        assert sorted(jitter._ops.tolist()) == [0, 0, 0, NUMBERS[name]]
        draws = torch.tensor([[0.3, 0.5, 0.5, 0.5, 0.5]])
        changed = jitter(photographs()[:1], draws)  # factor 1, no turn
        assert_same(changed[0], photographs()[0])


def test_colour_jitter_comes_before_the_policy_and_moves_no_draws() -> None:
    strengths = (0.4, 0.4, 0.4, 0.1)
    both = Augment(AugmentConfig(policy="randaugment", color_jitter=strengths, flip=0.5), (90, 120))
    flips = Augment(AugmentConfig(flip=0.5), (90, 120))
    assert both.draws == DRAWS + 6 + 5
    draws = torch.from_numpy(uniforms(0, 0, np.arange(8), both.draws))
    flipped = flips(photographs(), draws)
    jittered = ColorJitter(strengths)(flipped, draws[:, DRAWS + 6 :])
    policy = make_policy(AugmentConfig(policy="randaugment"))
    assert policy is not None
    assert torch.equal(both(photographs(), draws), policy(jittered, draws[:, DRAWS : DRAWS + 6]))


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment", "autoaugment"])
def test_each_image_has_its_own_and_depends_on_no_other(policy: Any) -> None:
    chosen = make_policy(AugmentConfig(policy=policy))
    images = photographs().repeat(5, 1, 1, 1)
    before = images.clone()
    draws = torch.from_numpy(uniforms(0, 0, np.arange(40), chosen.draws))
    whole = chosen(images, draws)
    assert torch.equal(images, before)
    order = torch.tensor([17, 3, 39, 20])
    assert torch.equal(chosen(images[order], draws[order]), whole[order])
    alone = torch.cat([chosen(images[i : i + 1], draws[i : i + 1]) for i in range(40)])
    assert torch.equal(alone, whole)
    changed = (whole != images).flatten(1).any(1)
    assert changed.float().mean() > 0.5


def test_every_operation_is_as_likely() -> None:
    draws = uniforms(0, 0, np.arange(14_000), 1)[:, 0]
    counts = np.bincount((draws * len(NAMES)).astype(int), minlength=14)
    assert len(counts) == len(NAMES) == len(THEIRS) == 14
    assert np.abs(counts - 1000).max() < 5 * 30.5


def test_within_the_augmentation() -> None:
    plain = Augment(AugmentConfig(flip=0.5), (90, 120))
    whole = Augment(AugmentConfig(flip=0.5, policy="randaugment"), (90, 120))
    assert (plain.draws, whole.draws) == (DRAWS, DRAWS + 6)
    draws = torch.from_numpy(uniforms(0, 0, np.arange(8), whole.draws))
    flipped = plain(photographs(), draws[:, :DRAWS])
    expected = make_policy(whole.config)(flipped, draws[:, DRAWS:])
    assert torch.equal(whole(photographs(), draws), expected)
    # after a warp, which leaves fractions
    turned = Augment(AugmentConfig(rotate=10, policy="trivialaugment", erase=1.0), (90, 120))
    result = turned(photographs(), draws)
    assert (result.dtype, result.shape) == (torch.uint8, photographs().shape)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"policy": "randaugment", "randaugment_magnitude": 31}, "randaugment_magnitude"),
        ({"policy": "randaugment", "randaugment_ops": 0}, "randaugment_ops"),
        ({"color_jitter": (0.4, 0.4, -0.4, 0.1)}, "color_jitter"),
        ({"color_jitter": (0.4, 0.4, 0.4, 0.6)}, "color_jitter"),
        ({"color_jitter": (float("inf"), 0.4, 0.4, 0.1)}, "color_jitter"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(BadValue, match=f"^{key}: "):
        AugmentConfig(**options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            {"randaugment_ops": 2},
            "randaugment_ops: 2 is not valid, expected null without augment.policy",
        ),
        (
            {"policy": "trivialaugment", "randaugment_magnitude": 9},
            "trivialaugment does not read it",
        ),
        (
            {"policy": "randaument"},
            "policy: 'randaument' is not valid, .*did you mean 'randaugment'",
        ),
    ],
)
def test_what_a_policy_does_not_read_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(BadValue, match=f"{why}"):
        POLICIES.check(AugmentConfig(**options))
