"""Scaled decoding: what it gives, when it is refused, and that answers stay."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from distcls.batch.job import predict
from distcls.batch.loading import COMPARED, check_scaled_decoding, scale_decoding
from distcls.batch.options import PredictOptions
from distcls.data.formats.detect import open_source
from distcls.data.source import FunctionSource
from distcls.errors import UsageError
from distcls.imaging import Preprocess, decode
from distcls.model_card import ModelCard
from distcls.task import Task
from tests import tiny_onnx
from tests.test_writers import read

CLASSES = ("red", "green", "blue")
SMALL = Preprocess(size=(32, 32), resize="squash")


class Brightest(tiny_onnx.FakeModel):
    """Answers with the channel that is brightest on the whole."""

    def __init__(self, preprocess: Preprocess = SMALL) -> None:
        self.card = ModelCard(architecture={}, task=Task(classes=CLASSES), preprocess=preprocess)

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        return images.mean(axis=(1, 2), dtype=np.float64).astype(np.float32)


class Precise(Brightest):
    """Answers by the lowest bits of the pixels, which any other way of decoding changes."""

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        total = images.reshape(len(images), -1).sum(axis=1, dtype=np.int64)
        return np.eye(3, dtype=np.float32)[total % 3]


def photo(seed: int, size: tuple[int, int] = (600, 800)) -> NDArray[np.uint8]:
    rough = np.random.default_rng(seed).integers(0, 120, (12, 16, 3), dtype=np.uint8)
    rough[..., seed % 3] += 100
    return cv2.resize(rough, (size[1], size[0]), interpolation=cv2.INTER_CUBIC)


def jpeg(image: NDArray[np.uint8]) -> bytes:
    return cv2.imencode(".jpg", image[..., ::-1])[1].tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "in"
    place.mkdir()
    for index in range(12):
        (place / f"{index:02d}.jpg").write_bytes(jpeg(photo(index)))
    (place / "12.jpg").write_bytes(b"no image")
    return place


@pytest.mark.parametrize(
    ("factor", "size"),
    [(1.9, (600, 800)), (2, (300, 400)), (7.9, (150, 200)), (8, (75, 100)), (100, (75, 100))],
)
def test_a_jpeg_is_reduced_by_powers_of_two(factor: float, size: tuple[int, int]) -> None:
    data = jpeg(photo(0))
    whole = decode(data)
    found = decode(data, downscale=lambda height, width: factor)
    assert found.shape == (*size, 3)
    smaller = cv2.resize(whole, (size[1], size[0]), interpolation=cv2.INTER_AREA)
    assert np.abs(found.astype(int) - smaller).mean() < 2  # red stays red, too


def test_other_formats_are_decoded_whole() -> None:
    image = photo(1)
    png = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
    assert np.array_equal(decode(png, downscale=lambda height, width: 8), image)


@pytest.mark.parametrize(
    ("resize", "fraction", "factor"),
    [("squash", 1, 4), ("crop", 1, 4), ("crop", 0.5, 2), ("pad", 1, 10)],
)
def test_no_more_is_thrown_away_than_preprocessing_would(
    resize: str, fraction: float, factor: float
) -> None:
    preprocess = Preprocess(size=(100, 100), resize=resize, crop_fraction=fraction)  # type: ignore[arg-type]
    assert preprocess.downscale(400, 1000) == factor
    assert preprocess.downscale(50, 100) < 2


def test_a_photo_on_its_side_keeps_enough_of_both_sides() -> None:
    """Which side is the height is known after the EXIF orientation only."""
    preprocess = Preprocess(size=(100, 400), resize="squash")
    found = decode(jpeg(photo(2, (1600, 800))), downscale=preprocess.downscale)
    assert found.shape == (800, 400, 3)  # by 2 as it is; by 4 if it were turned


def test_the_answers_stay(folder: Path, tmp_path: Path) -> None:
    model, source = Brightest(), open_source(str(folder))
    fast = scale_decoding(source, model)
    check_scaled_decoding(source, fast, model)
    assert fast.image(0).shape == (75, 100, 3)
    path, tables = tmp_path / "m.onnx", []
    path.write_bytes(b"")  # only its digest is asked for
    for name, images in (("usual", source), ("fast", fast)):
        out = tmp_path / f"{name}.csv"
        predict(model, images, PredictOptions(input=str(folder), model=str(path), out=out))
        tables.append([(row["image_id"], row["label"], row["error"]) for row in read(out)])
    assert tables[0] == tables[1]
    assert tables[0][12][2]


def test_changed_answers_are_refused(folder: Path) -> None:
    source, model = open_source(str(folder)), Precise()
    with pytest.raises(UsageError, match=r"scaled_decode: the label of \d+ of 12 images changes"):
        check_scaled_decoding(source, scale_decoding(source, model), model)


def test_the_images_that_are_checked_are_of_the_whole_input() -> None:
    data = jpeg(photo(0))
    source = FunctionSource([""] * (COMPARED + 60), read=lambda index: data)
    seen: list[int] = []

    def load(index: int) -> NDArray[np.uint8]:
        seen.append(index)
        return decode(data)

    check_scaled_decoding(source, FunctionSource(source.image_ids, load), Brightest())
    assert len(seen) <= COMPARED
    assert max(seen) >= COMPARED + 50


def test_without_files_there_is_nothing_to_scale() -> None:
    source = FunctionSource(["a"], photo)
    with pytest.raises(UsageError, match="scaled_decode: this input is decoded already"):
        scale_decoding(source, Brightest())
