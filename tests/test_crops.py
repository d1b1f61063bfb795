"""Random resized crops: torchvision's distribution, cut out of the original pixels."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop as Theirs

from distcls.data.dataset import Dataset, Split
from distcls.errors import BadImage
from distcls.imaging import Preprocess
from distcls.imaging.preprocess import Box
from distcls.training.augment import Augment
from distcls.training.config import AugmentConfig, InputConfig
from distcls.training.loader import CROP_DRAWS, Loader, RandomResizedCrop, make_crops
from distcls.training.preview import preview
from distcls.training.sampler import Indices, uniforms
from tests import tiny_dataset
from tests.pictures import Pixels, encode, smooth
from tests.test_preview import config, trained_on

SIZE = (48, 48)
PROCESS = Preprocess(size=SIZE)
CROPS = RandomResizedCrop(area=(0.1, 1.0), size=SIZE, seed=3)
LABELS = [index % 3 for index in range(12)]
ON = AugmentConfig(resized_crop=(0.1, 1.0))


def fine(height: int, width: int, seed: int) -> Pixels:
    """A picture with detail in every pixel."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3), dtype=np.uint8)
    return np.asarray(cv2.addWeighted(smooth(height, width, seed), 0.7, noise, 1.0, 0), np.uint8)


def large() -> list[Pixels]:
    """Pictures of many sizes, all larger than the input."""
    return [fine(60 + 9 * index, 200 - 11 * index, index) for index in range(12)]


def open_split(folder: Path, images: list[Pixels], *, packed: bool) -> Split:
    names = ("train",) * len(images)
    tiny_dataset.write(
        folder,
        images,
        LABELS[: len(images)],
        ("a", "b", "c"),
        splits=names,
        packed=packed,
        files=not packed,
    )
    return Dataset.open(folder).split("train")


def jpegs(folder: Path, images: list[Pixels], **options: Any) -> Split:
    split = open_split(folder, images, packed=False)
    for index, image in enumerate(images):
        file = folder / "files" / f"image {index:04d}.png"  # the content decides, not the name
        file.write_bytes(encode(image, "JPEG", quality=95, **options))
    return split


def read(
    split: Split, order: list[Indices], *, epoch: int = 0, workers: int = 2, **changes: Any
) -> dict[int, Pixels]:
    """The crops of images by their index."""
    crops = dataclasses.replace(CROPS, **changes)
    loader = Loader(split, PROCESS, workers=workers, prefetch=2, crops=crops)
    return {
        int(index): image
        for batch in loader.batches(order, epoch)
        for index, image in zip(batch.indices, batch.images.numpy(), strict=True)
    }


def box_of(index: int, shape: tuple[int, ...], epoch: int = 0) -> Box:
    return CROPS.box(CROPS.draws(epoch, np.array([index]))[0].tolist(), *shape[:2])


SHAPES = [(375, 500), (640, 480), (224, 224), (100, 700), (900, 130), (31, 45)]


@pytest.mark.parametrize(
    ("shape", "area"),
    [*((shape, (0.08, 1.0)) for shape in SHAPES), *((shape, (0.35, 1.0)) for shape in SHAPES[::3])],
)
def test_the_distribution_is_torchvisions(
    shape: tuple[int, int], area: tuple[float, float]
) -> None:
    crops, count = RandomResizedCrop(area=area, size=(224, 224), seed=0), 2000
    ours = np.array([crops.box(row, *shape) for row in crops.draws(0, np.arange(count)).tolist()])
    torch.manual_seed(0)
    image, scale, ratio = torch.empty(3, *shape), list(area), [3 / 4, 4 / 3]
    theirs = np.array([Theirs.get_params(image, scale, ratio) for _ in range(count)])
    for one, other in zip(features(ours, shape), features(theirs, shape), strict=True):
        assert ks_2samp(one, other, method="asymp").pvalue > 1e-3
        assert abs(one.mean() - other.mean()) < 0.02
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= shape).all()
    if len(np.unique(theirs, axis=0)) > 1:  # not always the central one
        assert len(np.unique(ours, axis=0)) > count * 0.1


def features(boxes: NDArray[np.int64], shape: tuple[int, int]) -> list[NDArray[np.float64]]:
    """Fraction of the area, logarithm of the aspect ratio, and the centre's place."""
    top, left, height, width = boxes.T.astype(float)
    down, right = (top + height / 2) / shape[0], (left + width / 2) / shape[1]
    return [height * width / (shape[0] * shape[1]), np.log(width / height), down, right]


@pytest.mark.parametrize("shape", [(100, 700), (900, 130), (1, 500), (500, 1), (1, 1)])
def test_what_never_fits_is_torchvisions_central_crop(shape: tuple[int, int]) -> None:
    crops = RandomResizedCrop(area=(1.0, 1.0), size=(224, 224), seed=0)
    found = crops.box(crops.draws(0, np.arange(1))[0].tolist(), *shape)
    expected = Theirs.get_params(torch.empty(3, *shape), [1.0, 1.0], [3 / 4, 4 / 3])
    assert tuple(found) == tuple(expected)


def test_the_aspect_ratio_is_that_of_the_input() -> None:
    """Lines of text stay lines of text: an input four times as wide takes crops about as wide."""
    crops = RandomResizedCrop(area=(0.2, 0.5), size=(32, 128), seed=0)
    boxes = [crops.box(row, 200, 800) for row in crops.draws(0, np.arange(500)).tolist()]
    ratios = np.array([box.width / box.height for box in boxes])
    assert 2.9 < ratios.min() < 3.2
    assert 5.0 < ratios.max() < 5.5


def test_more_draws_come_from_the_same_sequence() -> None:
    whole = uniforms(5, 2, np.arange(9), 8)
    assert np.array_equal(uniforms(5, 2, np.arange(9), 5, first=3), whole[:, 3:])
    draws = CROPS.draws(1, np.arange(9))
    assert draws.shape == (9, CROP_DRAWS)
    assert not np.isin(draws, uniforms(3, 1, np.arange(9), 100)).any()


@pytest.mark.parametrize("packed", [True, False])
def test_crops_are_resized_from_the_original_pixels(tmp_path: Path, packed: bool) -> None:
    images = large()
    split = open_split(tmp_path / "d", images, packed=packed)
    found = read(split, [np.arange(12)], epoch=1)
    for index, image in enumerate(images):
        top, left, height, width = box_of(index, image.shape, epoch=1)
        part = image[top : top + height, left : left + width].copy()
        assert np.array_equal(found[index], cv2.resize(part, SIZE, interpolation=cv2.INTER_AREA))


def test_small_crops_are_no_mush(tmp_path: Path) -> None:
    """A crop of about the input's size keeps the detail between neighbouring pixels."""
    images, names = [fine(480, 480, index) for index in range(4)], ["train"] * 3 + ["val"]
    folder = tiny_dataset.write(tmp_path / "d", images, [0, 1, 2, 0], ("a", "b", "c"), splits=names)
    augment, size = AugmentConfig(resized_crop=(0.01, 0.012)), InputConfig(size=SIZE)
    found = preview(config(folder, augment=augment, input=size), epoch=0, count=3).pixels()
    detail = np.abs(np.diff(found.astype(int), axis=2)).mean()
    original = np.abs(np.diff(images[0].astype(int), axis=1)).mean()
    assert detail > 0.5 * original


@pytest.mark.parametrize("packed", [True, False])
def test_an_image_is_cropped_the_same_wherever_it_is_read(tmp_path: Path, packed: bool) -> None:
    split = open_split(tmp_path / "d", large(), packed=packed)
    first = read(split, [np.arange(12)], epoch=2, workers=1)
    order = np.random.default_rng(1).permutation(12)
    again = read(split, np.array_split(order, 5), epoch=2, workers=4)
    half = read(split, [order[::2]], epoch=2)
    for index in range(12):
        assert np.array_equal(first[index], again[index])
    assert all(np.array_equal(first[index], image) for index, image in half.items())
    other_epoch = read(split, [np.arange(12)], epoch=3)
    other_seed = read(split, [np.arange(12)], epoch=2, seed=4)
    for other in (other_epoch, other_seed):
        assert all(not np.array_equal(first[index], other[index]) for index in range(12))


def test_a_pack_and_png_files_give_equal_crops(tmp_path: Path) -> None:
    packed = read(open_split(tmp_path / "pack", large(), packed=True), [np.arange(12)])
    files = read(open_split(tmp_path / "files", large(), packed=False), [np.arange(12)])
    assert all(np.array_equal(packed[index], files[index]) for index in range(12))


@pytest.mark.parametrize("orientation", [None, 6])
def test_jpegs_are_decoded_no_larger_than_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: int | None
) -> None:
    """At the largest reduction at which the crop keeps the input's size; turned photos, too."""
    images = [smooth(700, 1003, index) for index in range(12)]
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    split = jpegs(tmp_path / "d", images, exif=exif)
    decoded: list[Pixels] = []
    usual = Split.image

    def recording(self: Split, index: int, downscale: Any = None) -> Pixels:
        decoded.append(usual(self, index, downscale))
        return decoded[-1]

    monkeypatch.setattr(Split, "image", recording)
    found = read(split, [np.arange(12)], workers=1)
    factors = set()
    for index, image in enumerate(images):
        upright = np.rot90(image, -1) if orientation else image
        box = box_of(index, upright.shape)
        factor = round(upright.shape[0] / decoded[index].shape[0])
        factors.add(factor)
        assert min(box.height, box.width) / factor >= 48
        assert factor == 8 or min(box.height, box.width) / (2 * factor) < 48
        part = upright[box.top : box.top + box.height, box.left : box.left + box.width]
        expected = cv2.resize(part.copy(), SIZE, interpolation=cv2.INTER_AREA)
        # the place is rounded to whole pixels of the reduced image
        assert np.abs(found[index].astype(int) - expected).mean() < 5
    assert len(factors) > 1


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    split = jpegs(tmp_path / "d", large())
    bad = tmp_path / "d" / "files" / "image 0007.png"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(BadImage, match=r"image 0007\.png: "):
        read(split, [np.arange(12)])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("images", "size", "cropped"),
    [
        ([smooth(28, 28)], (28, 28), False),
        ([smooth(8, 8)], (28, 28), False),
        ([smooth(12, 30), smooth(20, 18)], (32, 32), False),
        ([smooth(28, 28), smooth(28, 29)], (28, 28), True),
        ([smooth(64, 64)], (32, 32), True),
        ([smooth(64, 64)], (96, 96), True),
    ],
)
def test_small_images_are_cropped_on_the_device(
    tmp_path: Path, images: list[Pixels], size: tuple[int, int], cropped: bool, packed: bool
) -> None:
    """Wherever they are read from: `loader.pack` does not change the result."""
    split = open_split(tmp_path / "d", images, packed=packed)
    assert (make_crops(ON, split, size, 0) is not None) == cropped
    assert make_crops(AugmentConfig(flip=0.5), split, size, 0) is None


@pytest.mark.parametrize("rotate", [0.0, 20.0])
def test_what_is_cropped_already_is_flipped_and_turned_only(rotate: float) -> None:
    images = torch.from_numpy(np.stack([smooth(*SIZE, seed=seed) for seed in range(8)]))
    with_crops = AugmentConfig(resized_crop=(0.3, 1.0), flip=0.5, rotate=rotate)
    maker = Augment(with_crops, SIZE, cropped=True)
    plain = Augment(dataclasses.replace(with_crops, resized_crop=None), SIZE)
    assert maker.canvas == SIZE
    assert maker.reading(PROCESS) is PROCESS
    draws = torch.from_numpy(uniforms(0, 0, np.arange(8), maker.draws))
    assert torch.equal(maker(images, draws), plain(images, draws))


@pytest.mark.parametrize("epoch", [0, 2])
def test_the_training_loop_and_show_get_the_same_crops(tmp_path: Path, epoch: int) -> None:
    images = [fine(40 + index % 30, 50 + index % 23, index) for index in range(230)]
    splits = ["train"] * 220 + ["val"] * 10
    labels = [index % 3 for index in range(230)]
    folder = tiny_dataset.write(tmp_path / "d", images, labels, ("a", "b", "c"), splits=splits)
    changes: dict[str, Any] = {
        "input": InputConfig(size=(28, 28)),
        "augment": AugmentConfig(resized_crop=(0.2, 1.0), flip=0.5),
        "seed": 1,
    }
    seen = torch.cat([examples.images for examples in trained_on(folder, epoch, **changes)])
    found = preview(config(folder, **changes), epoch=epoch, count=100).images
    assert found.dtype == torch.uint8
    assert torch.equal(found, seen[:100])
    other = preview(config(folder, **changes), epoch=epoch + 1, count=100).images
    assert not torch.equal(found, other)


def test_one_pixel_is_enough(tmp_path: Path) -> None:
    """Images smaller than the input, down to one pixel, beside large ones."""
    images = [np.full((1, 1, 3), 9, np.uint8), fine(1, 300, 1), fine(300, 2, 2), fine(90, 90, 3)]
    split = open_split(tmp_path / "d", images, packed=False)
    found = read(split, [np.arange(4)])
    assert {image.shape for image in found.values()} == {(48, 48, 3)}
    assert (found[0] == 9).all()


def test_a_batch_can_be_read_by_hand(tmp_path: Path) -> None:
    split = open_split(tmp_path / "d", large(), packed=True)
    loader = Loader(split, PROCESS, workers=1, prefetch=1, crops=CROPS)
    with ThreadPoolExecutor(2) as pool:
        batch = loader.load(np.array([3, 1]), 4, pool)
    again = read(split, [np.arange(12)], epoch=4)
    assert np.array_equal(batch.images.numpy(), np.stack([again[3], again[1]]))
