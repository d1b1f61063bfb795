"""The loader: the batches it was told, in that order, and nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from distcls.data.dataset import Dataset, Split
from distcls.errors import BadImage
from distcls.imaging import Preprocess
from distcls.training.loader import Batch, Loader
from distcls.training.sampler import Indices
from tests import tiny_dataset
from tests.pictures import Pixels, smooth

SAME = Preprocess(size=(12, 18))
LABELS = [index % 3 for index in range(20)]


def pictures(*, uniform: bool) -> list[Pixels]:
    return [smooth(12, 18 if uniform else 12 + index, seed=index) for index in range(20)]


def open_split(folder: Path, images: list[Pixels], *, packed: bool = True) -> Split:
    tiny_dataset.write(folder, images, LABELS, ("a", "b", "c"), packed=packed, files=not packed)
    return Dataset.open(folder).split("test")


def read(split: Split, index_batches: list[Indices], process: Preprocess = SAME) -> list[Batch]:
    return list(Loader(split, process, workers=2, prefetch=2).batches(index_batches))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "distcls" in thread.name]


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    assert threads() == []


def split_indices(*sizes: int) -> list[Indices]:
    order = np.random.default_rng(0).permutation(20)
    return np.split(order, np.cumsum(sizes)[:-1])


def test_batches_come_in_the_given_order(tmp_path: Path) -> None:
    images = pictures(uniform=True)
    told = split_indices(7, 1, 7, 5)
    batches = read(open_split(tmp_path / "d", images), told)
    assert len(batches) == 4
    for batch, indices in zip(batches, told, strict=True):
        assert np.array_equal(batch.indices, indices)
        assert batch.images.numpy().dtype == np.uint8
        assert np.array_equal(batch.images.numpy(), np.stack([images[i] for i in indices]))
        assert batch.labels.tolist() == [LABELS[i] for i in indices]


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("size", [(12, 18), (8, 8)])
def test_pack_and_files_give_equal_pixels(
    tmp_path: Path, uniform: bool, size: tuple[int, int]
) -> None:
    images = pictures(uniform=uniform)
    process = Preprocess(size=size)
    packed = open_split(tmp_path / "pack", images)
    assert (packed.uniform is not None) == uniform
    files = open_split(tmp_path / "files", images, packed=False)
    assert files.uniform is None
    for one, other in zip(
        read(packed, split_indices(9, 11), process),
        read(files, split_indices(9, 11), process),
        strict=True,
    ):
        assert np.array_equal(one.images.numpy(), other.images.numpy())
        expected = np.stack([process(images[i]) for i in one.indices])
        assert np.array_equal(one.images.numpy(), expected)


def test_grey_packs_become_rgb(tmp_path: Path) -> None:
    grey = [image[..., :1] for image in pictures(uniform=True)]
    (batch,) = read(open_split(tmp_path / "d", grey), [np.array([4, 2])])
    assert np.array_equal(batch.images.numpy(), np.repeat(np.stack([grey[4], grey[2]]), 3, axis=3))


def test_no_batches(tmp_path: Path) -> None:
    assert read(open_split(tmp_path / "d", pictures(uniform=True)), []) == []


def test_a_bad_image_surfaces_at_its_batch_and_is_named(tmp_path: Path) -> None:
    split = open_split(tmp_path / "d", pictures(uniform=True), packed=False)
    bad = tmp_path / "d" / "files" / "image 0013.png"
    bad.write_bytes(bad.read_bytes()[:100])
    batches = Loader(split, SAME, workers=2, prefetch=3).batches(np.split(np.arange(20), 5))
    assert [next(batches).indices[0] for _ in range(3)] == [0, 4, 8]
    with pytest.raises(BadImage, match=r"image 0013\.png: "):
        next(batches)


def test_an_error_of_the_index_batches_surfaces_too(tmp_path: Path) -> None:
    def broken() -> Iterator[Indices]:
        yield np.array([1])
        raise ValueError("no more")

    split = open_split(tmp_path / "d", pictures(uniform=True))
    batches = Loader(split, SAME, workers=1, prefetch=1).batches(broken())
    assert next(batches).indices.tolist() == [1]
    with pytest.raises(ValueError, match="no more"):
        next(batches)


@pytest.mark.parametrize("taken", [1, 3])
def test_closing_early_ends_the_threads(tmp_path: Path, taken: int) -> None:
    split = open_split(tmp_path / "d", pictures(uniform=False), packed=False)
    batches = Loader(split, SAME, workers=2, prefetch=2).batches(split_indices(*[2] * 10))
    for _ in range(taken):
        next(batches)
    assert "distcls-loader" in threads()
    start = time.perf_counter()
    batches.close()
    assert time.perf_counter() - start < 2
    assert threads() == []


def test_it_reads_no_further_ahead_than_told(tmp_path: Path) -> None:
    asked = []

    def told() -> Iterator[Indices]:
        for index in range(20):
            asked.append(index)
            yield np.array([index])

    split = open_split(tmp_path / "d", pictures(uniform=True))
    batches = Loader(split, SAME, workers=1, prefetch=2).batches(told())
    next(batches)
    time.sleep(0.4)
    # one with the consumer, two in the queue, one waiting for room
    assert len(asked) == 4
    batches.close()


def test_waiting_for_a_slow_source_is_counted(tmp_path: Path) -> None:
    def slow() -> Iterator[Indices]:
        for index in range(3):
            time.sleep(0.1)
            yield np.array([index])

    split = open_split(tmp_path / "d", pictures(uniform=True))
    loader = Loader(split, SAME, workers=1, prefetch=2)
    assert loader.waited == 0
    assert len(list(loader.batches(slow()))) == 3
    assert 0.25 < loader.waited < 3
    before = loader.waited
    for _ in loader.batches([np.array([index]) for index in range(5)]):
        time.sleep(0.1)  # a slow consumer does not wait
    assert loader.waited - before < 0.3
