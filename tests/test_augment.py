"""Augmentation against plain loops and OpenCV, on sizes that are not square."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from distcls.training.augment import CANVAS, DRAWS, ERASE_AREA, Augment
from distcls.training.config import AugmentConfig
from distcls.training.sampler import uniforms
from tests.pictures import smooth

SIZE = (24, 36)
FLIP, DOWN, RIGHT, ANGLE, AREA, ASPECT = range(6)
ERASE, ERASE_PLACE = 6, (9, 10)


def augment(size: tuple[int, int] = SIZE, **options: Any) -> Augment:
    return Augment(AugmentConfig(**options), size)


def batch(count: int, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.from_numpy(np.stack([smooth(*size, seed=seed) for seed in range(count)]))


def drawn(count: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(uniforms(seed, 0, np.arange(count), DRAWS))


def middle(values: dict[int, float] | None = None) -> Tensor:
    """Draws for one image that change nothing but what `values` says."""
    draws = torch.full((1, DRAWS), 0.5)
    draws[0, FLIP], draws[0, ERASE] = 0.999, 0.999
    for index, value in (values or {}).items():
        draws[0, index] = value
    return draws


def test_nothing_is_nothing() -> None:
    images = batch(3)
    assert augment()(images, drawn(3)) is images
    assert augment().canvas == SIZE


def test_a_flip_is_the_exact_mirror_image() -> None:
    images, draws = batch(40), drawn(40)
    result = augment(flip=0.3)(images, draws)
    mirrored = draws[:, FLIP] < 0.3
    assert 3 < int(mirrored.sum()) < 25
    expected = torch.where(mirrored[:, None, None, None], images.flip(2), images)
    assert result.dtype == torch.uint8
    assert torch.equal(result, expected)


def test_probabilities_of_nought_and_one() -> None:
    images, draws = batch(10), drawn(10)
    assert torch.equal(augment(flip=1.0)(images, draws), images.flip(2))
    assert torch.equal(augment(flip=0.0, crop_padding=0)(images, draws), images)


def test_crop_padding_equals_plain_loops() -> None:
    padding, (height, width) = 3, SIZE
    images, draws = batch(30), drawn(30)
    result = augment(crop_padding=padding, flip=0.5)(images, draws)
    offsets = set()
    for index, image in enumerate(images.numpy()):
        down = int(draws[index, DOWN] * (2 * padding + 1)) - padding
        right = int(draws[index, RIGHT] * (2 * padding + 1)) - padding
        offsets |= {("down", down), ("right", right)}
        expected = np.zeros_like(image)
        for y in range(height):
            for x in range(width):
                if 0 <= y + down < height and 0 <= x + right < width:
                    expected[y, x] = image[y + down, x + right]
        if draws[index, FLIP] < 0.5:
            expected = expected[:, ::-1]
        assert np.array_equal(result[index].numpy(), expected)
    assert len(offsets) == 2 * (2 * padding + 1)  # every shift occurs, either way
    assert result.dtype == torch.uint8


def test_a_whole_crop_at_canvas_size_is_a_plain_resize() -> None:
    maker = augment(resized_crop=(1.0, 1.0))
    assert maker.canvas == (round(24 * CANVAS), round(36 * CANVAS)) == (28, 41)
    image = batch(1, maker.canvas)
    result = maker(image, middle())
    assert result.shape == (1, *SIZE, 3)
    assert result.dtype == torch.float32
    expected = cv2.resize(image[0].numpy(), (36, 24), interpolation=cv2.INTER_LINEAR)
    assert np.abs(result[0].numpy() - expected).max() < 1.5


@pytest.mark.parametrize("flip", [False, True])
def test_resized_crop_is_the_box_that_was_drawn(flip: bool) -> None:
    maker = augment(resized_crop=(0.25, 0.25), flip=0.5)
    height, width = maker.canvas
    image = batch(1, maker.canvas)
    values = {DOWN: 0.25, RIGHT: 0.75, ASPECT: 0.8, FLIP: 0.1 if flip else 0.9}
    result = maker(image, middle(values))[0].numpy()
    aspect = (4 / 3) ** 0.6  # 0.8 lies at 0.6 of the way from -1 to 1
    box_h, box_w = math.sqrt(0.25 / aspect) * height, math.sqrt(0.25 * aspect) * width
    top, left = 0.25 * (height - box_h), 0.75 * (width - box_w)
    rows = top + (np.arange(24) + 0.5) * box_h / 24 - 0.5
    columns = left + (np.arange(36) + 0.5) * box_w / 36 - 0.5
    grid_x, grid_y = np.meshgrid(columns.astype(np.float32), rows.astype(np.float32))
    expected = cv2.remap(image[0].numpy().astype(np.float32), grid_x, grid_y, cv2.INTER_LINEAR)
    if flip:
        expected = expected[:, ::-1]
    assert np.abs(result - expected).max() < 2  # OpenCV rounds places to 1/32 pixel


def test_resized_crops_stay_inside_and_have_the_area_asked_for() -> None:
    maker = augment(resized_crop=(0.3, 0.9))
    height, width = maker.canvas
    box_h, box_w, centre_y, centre_x = maker._boxes(drawn(2000), height, width)
    for side, box, centre in ((height, box_h, centre_y), (width, box_w, centre_x)):
        assert (centre - box / 2 >= -1e-3).all()
        assert (centre + box / 2 <= side + 1e-3).all()
    area = box_h * box_w / (height * width)
    assert area.max() <= 0.9 + 1e-5
    assert area.min() < 0.32
    assert abs(area.mean() - 0.6) < 0.03  # the widest boxes are cut at the canvas
    white = torch.full((50, height, width, 3), 255, dtype=torch.uint8)
    assert maker(white, drawn(50)).min() > 254.9  # no black from outside


def turned(image: np.ndarray, degrees: float) -> np.ndarray:
    """The picture turned about its centre by OpenCV (positive is anticlockwise)."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1)
    return np.asarray(cv2.warpAffine(image.astype(np.float32), matrix, (width, height)))


@pytest.mark.parametrize(("rotate", "draw"), [(30.0, 0.9), (30.0, 0.1), (90.0, 1.0), (10.0, 0.75)])
def test_rotation_equals_opencv_on_a_size_that_is_not_square(rotate: float, draw: float) -> None:
    image = batch(1)
    result = augment(rotate=rotate)(image, middle({ANGLE: draw}))[0].numpy()
    expected = turned(image[0].numpy(), rotate * (draw * 2 - 1))
    inside = turned(np.full((*SIZE, 3), 255), rotate * (draw * 2 - 1)) > 254
    assert inside.mean() > 0.3
    assert np.abs(result - expected)[inside].max() < 3
    outside = cv2.dilate(inside.astype(np.uint8), np.ones((5, 5))) == 0
    assert (result[outside] == 0).all()


def test_rotation_by_nothing_keeps_the_picture() -> None:
    images = batch(2)
    result = augment(rotate=30.0)(images, middle().expand(2, DRAWS))
    assert torch.allclose(result, images.float(), atol=0.01)


def test_rotation_with_flip_mirrors_the_output_side() -> None:
    image = batch(1)
    values = {ANGLE: 0.8, FLIP: 0.0}
    plain = augment(rotate=20.0)(image, middle(values))
    mirrored = augment(rotate=20.0, flip=1.0)(image, middle(values))
    assert torch.allclose(mirrored, plain.flip(2), atol=0.05)


def test_rotation_with_padding_also_shifts() -> None:
    image = batch(1)
    result = augment(rotate=1e-6, crop_padding=4)(image, middle({DOWN: 1.0, RIGHT: 0.0}))
    # the window moves 4 down and 4 to the left
    expected = torch.zeros(1, *SIZE, 3)
    expected[:, :-4, 4:] = image[:, 4:, :-4].float()
    assert torch.allclose(result, expected, atol=0.05)


def erased(before: Tensor, after: Tensor) -> list[tuple[int, int, int, int]]:
    """Top, left, height and width of each changed image's rectangle, which has one colour."""
    boxes = []
    for old, new in zip(before, after, strict=True):
        rows, columns = torch.nonzero((old != new).any(2), as_tuple=True)
        if len(rows) == 0:
            continue
        top, left = int(rows.min()), int(columns.min())
        bottom, right = int(rows.max()) + 1, int(columns.max()) + 1
        inside = new[top:bottom, left:right].reshape(-1, 3)
        assert (inside == inside[0]).all()
        boxes.append((top, left, bottom - top, right - left))
    return boxes


def test_erasing_replaces_a_rectangle_by_one_colour() -> None:
    size = (40, 60)
    images = torch.full((600, *size, 3), 128, dtype=torch.uint8)
    result = augment(size, erase=0.4)(images, drawn(600))
    assert result.dtype == torch.uint8
    boxes = erased(images, result)
    assert abs(len(boxes) / 600 - 0.4) < 0.08
    shares = np.array([h * w / (size[0] * size[1]) for _, _, h, w in boxes])
    assert shares.min() > ERASE_AREA[0] * 0.7  # whole pixels, cut at the border
    assert shares.max() < ERASE_AREA[1] * 1.1
    assert abs(shares.mean() - sum(ERASE_AREA) / 2) < 0.03
    ratios = np.array([h / w for _, _, h, w in boxes])
    assert ratios.min() > 1 / 4.5
    assert ratios.max() < 4.5
    assert 0.6 < np.median(ratios) < 1.6
    assert_spread([top + h / 2 for top, _, h, _ in boxes], size[0])
    assert_spread([left + w / 2 for _, left, _, w in boxes], size[1])
    colours = {tuple(image[mask].tolist()) for image, mask in chosen(images, result)}
    assert len(colours) == len(boxes)
    assert (images == 128).all()  # the batch that came in is as it was


def chosen(before: Tensor, after: Tensor) -> list[tuple[Tensor, tuple[int, int]]]:
    found = []
    for old, new in zip(before, after, strict=True):
        places = torch.nonzero((old != new).any(2))
        if len(places):
            found.append((new, (int(places[0, 0]), int(places[0, 1]))))
    return found


def assert_spread(centres: Sequence[float], side: int) -> None:
    assert abs(np.mean(centres) - side / 2) < side * 0.05
    assert min(centres) < side * 0.2
    assert max(centres) > side * 0.8


@pytest.mark.parametrize("down", [0.0, 0.9999])
@pytest.mark.parametrize("right", [0.0, 0.9999])
def test_erasing_reaches_every_border(down: float, right: float) -> None:
    images = torch.full((1, *SIZE, 3), 128, dtype=torch.uint8)
    values = {ERASE: 0.0, ERASE_PLACE[0]: down, ERASE_PLACE[1]: right, 11: 0.1}
    ((top, left, height, width),) = erased(images, augment(erase=1.0)(images, middle(values)))
    assert (top == 0, top + height == SIZE[0]) == (down == 0, down > 0)
    assert (left == 0, left + width == SIZE[1]) == (right == 0, right > 0)


def test_erased_boxes_are_whole_wherever_they_lie() -> None:
    """No box loses a row or a column at the far rims: its place does not change its size."""
    images, draws = torch.full((2000, *SIZE, 3), 128, dtype=torch.uint8), drawn(2000)
    draws[:, ERASE], draws[:, 11] = 0.0, 0.1
    sizes = []
    for place in (0.0, 0.99999994):  # the largest that is drawn
        draws[:, ERASE_PLACE[0]], draws[:, ERASE_PLACE[1]] = place, place
        boxes = erased(images, augment(erase=1.0)(images, draws))
        assert len(boxes) == 2000
        sizes.append([box[2:] for box in boxes])
    assert sizes[0] == sizes[1]


def test_erasing_after_a_warp_keeps_floats() -> None:
    images, draws = batch(20), drawn(20)
    warped = augment(rotate=5.0)(images, draws)
    both = augment(rotate=5.0, erase=1.0)(images, draws)
    assert both.dtype == torch.float32
    assert len(erased(warped, both)) == 20
    assert both.min() >= 0
    assert both.max() <= 255.001


RECIPES: list[dict[str, Any]] = [
    {"flip": 0.5, "crop_padding": 3},
    {"flip": 0.5, "crop_padding": 3, "erase": 0.5},
    {"flip": 0.5, "crop_padding": 2, "rotate": 15.0, "erase": 0.5},
    {"flip": 0.5, "resized_crop": (0.35, 1.0), "rotate": 5.0, "erase": 0.5},
]


@pytest.mark.parametrize("options", RECIPES)
def test_each_image_depends_on_its_own_draws_alone(options: dict[str, Any]) -> None:
    maker = augment(**options)
    images, draws = batch(12, maker.canvas), drawn(12)
    whole = maker(images, draws)
    order = torch.tensor([7, 0, 3])
    assert torch.allclose(maker(images[order], draws[order]), whole[order], atol=1e-3)
    alone = torch.cat([maker(images[i : i + 1], draws[i : i + 1]) for i in range(12)])
    assert torch.allclose(alone, whole, atol=1e-3)
    other = maker(images, drawn(12, seed=1))
    assert all(not torch.equal(one, two) for one, two in zip(other, whole, strict=True))


def test_the_background_of_transparent_images_moves_in() -> None:
    images = torch.full((4, 12, 12, 3), 90, dtype=torch.uint8)
    images[..., 2] = 250
    for options in ({"crop_padding": 4}, {"rotate": 40.0}):
        made = Augment(AugmentConfig(**options), (12, 12), fill=(255, 128, 3))
        draws = torch.rand(4, made.draws, generator=torch.Generator().manual_seed(3))
        found = made(images, draws).float()
        black = Augment(AugmentConfig(**options), (12, 12))(images, draws).float()
        assert not torch.equal(found, black)
        rim = (black == 0).all(-1)
        assert rim.any()
        assert torch.equal(found[rim], torch.tensor([255.0, 128.0, 3.0]).expand(int(rim.sum()), 3))
        inside = (black == torch.tensor([90.0, 90.0, 250.0])).all(-1)
        torch.testing.assert_close(found[inside], black[inside], atol=1e-3, rtol=0)
