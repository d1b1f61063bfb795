"""mixup and CutMix against the stated mix, pixel by pixel, and on any number of processes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from distcls.errors import BadValue
from distcls.training.config import AugmentConfig
from distcls.training.mixup import MIX_DRAWS, Mixed, Mixing
from distcls.training.sampler import shard, uniforms
from tests.pictures import smooth

SIZE = (24, 36)
WHETHER, WHICH, SHARE, DOWN, RIGHT = range(5)


def make(**options: Any) -> Mixing:
    return Mixing(AugmentConfig(**options), torch.device("cpu"))


def batch(count: int) -> Tensor:
    return torch.from_numpy(np.stack([smooth(*SIZE, seed=seed) for seed in range(count)]))


def drawn(count: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(uniforms(seed, 0, np.arange(count), MIX_DRAWS))


def neighbours(count: int) -> list[int]:
    """1 and 0, 3 and 2, ...; the last of an odd number has none but itself."""
    return [index ^ 1 if index ^ 1 < count else index for index in range(count)]


def test_mixup_is_the_stated_mean_of_two() -> None:
    count = 31
    images = batch(count)
    mixed = make(mixup=0.4)(images, drawn(count))
    assert mixed.partner.tolist() == neighbours(count)
    assert mixed.images.dtype == torch.float32
    for index, other in enumerate(neighbours(count)):
        own = float(mixed.own[index])
        expected = own * images[index].double() + (1 - own) * images[other].double()
        assert torch.allclose(mixed.images[index].double(), expected, atol=1e-4)
    assert mixed.own[-1] == 1
    assert torch.equal(mixed.images[-1], images[-1].float())
    assert len(set(mixed.own.tolist())) == count


def reference_box(own: float, down: float, right: float) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of the box as the paper's code has it (its rand_bbox)."""
    height, width = SIZE
    ratio = math.sqrt(1 - own)
    half_h, half_w = int(height * ratio) // 2, int(width * ratio) // 2
    y, x = int(down * height), int(right * width)
    top, bottom = max(0, y - half_h), min(height, y + half_h)
    return top, bottom, max(0, x - half_w), min(width, x + half_w)


def test_cutmix_pastes_the_box_and_the_label_follows_its_area() -> None:
    count = 41
    images, draws = batch(count), drawn(count)
    mixed = make(cutmix=1.0)(images, draws)
    assert mixed.images.dtype == torch.uint8
    cut = set()
    for index, other in enumerate(neighbours(count)[:-1]):
        own, down, right = (float(draws[index, column]) for column in (SHARE, DOWN, RIGHT))
        top, bottom, left, far = reference_box(own, down, right)  # with alpha 1, uniform
        expected = images[index].clone()
        expected[top:bottom, left:far] = images[other][top:bottom, left:far]
        assert torch.equal(mixed.images[index], expected)
        area = (bottom - top) * (far - left)
        assert mixed.own[index].item() == pytest.approx(1 - area / (SIZE[0] * SIZE[1]), abs=1e-7)
        cut.add(area)
    assert len(cut) > 20
    assert torch.equal(mixed.images[-1], images[-1])
    assert mixed.own[-1] == 1


def test_labels_sum_to_one_and_hold_the_shares() -> None:
    labels = torch.tensor([2, 0, 1, 1, 3])
    mixed = make(mixup=1.0)(batch(5), drawn(5))
    targets = mixed.targets(labels, 4)
    assert targets.shape == (5, 4)
    torch.testing.assert_close(targets.sum(1), torch.ones(5))
    own = mixed.own
    torch.testing.assert_close(targets[0, 2], own[0])
    torch.testing.assert_close(targets[0, 0], 1 - own[0])
    torch.testing.assert_close(targets[1, 0], own[1])
    torch.testing.assert_close(targets[2], torch.tensor([0.0, 1, 0, 0]))  # two of one class
    assert targets[4].tolist() == [0, 0, 0, 1]


def test_numbers_of_the_images_mix_as_their_labels_do() -> None:
    mixed = Mixed(torch.zeros(2), torch.tensor([0.75, 0.5]), torch.tensor([1, 0]))
    assert mixed.blend(torch.tensor([4.0, 8.0])).tolist() == [5.0, 6.0]


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_follow_the_beta_distribution(alpha: float) -> None:
    images = torch.zeros(20_000, 1, 1, 3, dtype=torch.uint8)
    own = make(mixup=alpha)(images, drawn(20_000)).own.double().numpy()
    # within, not at the ends: in float32 shares nearer to 1 than 6e-8 are 1
    places = np.linspace(0.001, 0.999, 999)
    found = (own[:, None] <= places).mean(0)
    expected = scipy.stats.beta(alpha, alpha).cdf(places)
    # Kolmogorov-Smirnov: exceeded once in a hundred times by true samples of this size
    assert np.abs(found - expected).max() < 0.0115


def test_probability_and_the_choice_between_the_two() -> None:
    count = 4000
    images = torch.arange(count)[:, None, None, None].expand(count, 8, 8, 3) % 251
    draws = drawn(count)
    mixed = make(mixup=1.0, cutmix=1.0, mix_probability=0.6, cutmix_probability=0.25)(images, draws)
    chosen = draws[:, WHETHER] < 0.6
    cut = chosen & (draws[:, WHICH] < 0.25)
    assert abs(chosen.float().mean() - 0.6) < 0.03
    assert abs(cut.float().mean() - 0.15) < 0.02
    assert torch.equal(mixed.images[~chosen], images[~chosen].float())
    assert (mixed.own[~chosen] == 1).all()
    kinds = [len(set(image.flatten().tolist())) for image in mixed.images[cut]]
    assert max(kinds) == 2  # pasted: pixels of one image or of the other
    blended = chosen & ~cut
    assert {len(set(image.flatten().tolist())) for image in mixed.images[blended]} == {1}
    torch.testing.assert_close(mixed.own[blended], draws[blended, SHARE], atol=1e-6, rtol=0)


def test_both_halve_by_default() -> None:
    assert AugmentConfig(mixup=1, cutmix=1).resolved_cutmix_probability == 0.5
    assert AugmentConfig(mixup=1).resolved_cutmix_probability == 0
    assert AugmentConfig(cutmix=1).resolved_cutmix_probability == 1


@pytest.mark.parametrize("count", [16, 17, 30])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_number_of_processes_changes_no_mix(count: int, world: int) -> None:
    """Each process mixes its own images; together they have what one process has."""
    mixing = make(mixup=0.8, cutmix=1.0)
    part = np.random.default_rng(0).permutation(100)[:count]
    draws = torch.from_numpy(uniforms(5, 2, part, MIX_DRAWS))
    whole = mixing(batch(100)[part], draws)
    targets = whole.targets(torch.from_numpy(part % 7), 7)
    seen = []
    for rank in range(world):
        places = shard(np.arange(count), rank, world, group_size=2)
        mine = shard(part, rank, world, group_size=2)
        assert np.array_equal(part[places], mine)
        own_draws = torch.from_numpy(uniforms(5, 2, mine, MIX_DRAWS))
        mixed = mixing(batch(100)[mine], own_draws)
        torch.testing.assert_close(mixed.images, whole.images[places], atol=1e-4, rtol=0)
        own_targets = mixed.targets(torch.from_numpy(mine % 7), 7)
        torch.testing.assert_close(own_targets, targets[places])
        seen += places.tolist()
    assert sorted(seen) == list(range(count))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"mixup": -0.1}, "mixup"),
        ({"cutmix": math.inf}, "cutmix"),
        ({"mixup": math.nan}, "mixup"),
        ({"mixup": 1, "mix_probability": 0}, "mix_probability"),
        ({"mix_probability": 0.5}, "mix_probability"),
        ({"mixup": 1, "cutmix_probability": 0.5}, "cutmix_probability"),
        ({"mixup": 1, "cutmix": 1, "cutmix_probability": 1.5}, "cutmix_probability"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(BadValue, match=f"^{key}: "):
        AugmentConfig(**options)
