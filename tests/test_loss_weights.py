"""Weights of classes and images: scikit-learn's balance, a mean of 1, and whoever is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.utils.class_weight import compute_class_weight

from distcls.data.dataset import MANIFEST, Dataset, Split
from distcls.errors import UsageError
from distcls.training.config import LossConfig
from distcls.training.losses import Weights, balanced, find_weights
from tests import tiny_dataset

CLASSES = ("ape", "bee", "cow")
LABELS = [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


def open_split(folder: Path, weights: list[float | None] | None = None) -> Split:
    images = np.zeros((len(LABELS), 4, 4, 3), np.uint8)
    tiny_dataset.write(folder, list(images), LABELS, CLASSES)
    if weights is not None:
        table = pq.read_table(folder / MANIFEST)
        column = pa.array(weights, pa.float64())
        pq.write_table(table.append_column("weight", column), folder / MANIFEST)
        tiny_dataset.sign(folder)
    return Dataset.open(folder).split("test")


def find(split: Split, used: Any = None, **options: Any) -> tuple[Weights | None, Weights | None]:
    chosen = np.arange(len(split)) if used is None else np.asarray(used)
    return find_weights(LossConfig(**options), CLASSES, split, chosen)


def test_balanced_is_scikit_learns(tmp_path: Path) -> None:
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    np.testing.assert_allclose(balanced(np.array(LABELS), 3), expected, rtol=1e-12)
    by_class, by_image = find(open_split(tmp_path / "d"), class_weights="balanced")
    np.testing.assert_allclose(by_class, expected, rtol=1e-12)
    assert by_image is None


def test_balance_counts_the_images_trained_on(tmp_path: Path) -> None:
    used = [0, 5, 6, 7]
    by_class, _ = find(open_split(tmp_path / "d"), used, class_weights="balanced")
    expected = compute_class_weight("balanced", classes=np.arange(2), y=np.array(LABELS)[used])
    np.testing.assert_allclose(by_class, [*expected, 1], rtol=1e-12)


@pytest.mark.parametrize("given", [(4.0, 1.0, 1.0), {"ape": 4.0}, {"ape": 8.0, "bee": 2, "cow": 2}])
def test_given_weights_keep_their_ratios_and_weigh_one_on_average(
    tmp_path: Path, given: Any
) -> None:
    by_class, _ = find(open_split(tmp_path / "d"), class_weights=given)
    assert by_class is not None
    assert by_class[LABELS].mean() == pytest.approx(1)
    np.testing.assert_allclose(by_class / by_class[2], [4, 1, 1])


def test_images_and_classes_weigh_one_together(tmp_path: Path) -> None:
    weights = [float(index) for index in range(12)]
    split = open_split(tmp_path / "d", list(weights))
    by_class, by_image = find(split, class_weights={"bee": 3.0})
    assert by_class is not None
    assert by_image is not None
    assert (by_class[LABELS] * by_image).mean() == pytest.approx(1)
    np.testing.assert_allclose(by_image, np.array(weights) / 5.5)
    np.testing.assert_allclose(by_class / by_class[0], [1, 3, 1])


def test_sample_weights_where_there_are_some(tmp_path: Path) -> None:
    plain = open_split(tmp_path / "plain")
    weighted = open_split(tmp_path / "weighted", [0.0, 3.0] * 6)
    assert find(plain) == (None, None)
    assert find(weighted, sample_weights="off") == (None, None)
    np.testing.assert_allclose(find(weighted)[1], [0, 2] * 6)
    # only those trained on count for the mean
    np.testing.assert_allclose(find(weighted, [1, 3, 5])[1], [0, 1] * 6)
    with pytest.raises(UsageError, match=r"^loss\.sample_weights: .* has no weights; prepare it"):
        find(plain, sample_weights="on")
    with pytest.raises(
        UsageError, match=r"^loss\.sample_weights: all training images .* have weight 0"
    ):
        find(weighted, [0, 2])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bees": 2.0}, "has no class 'bees'; did you mean 'bee'"),
        ((1.0, 2.0), r"2 numbers for 3 classes \(ape, bee, cow"),
        ({"ape": 0.0, "bee": 0.0, "cow": 0.0}, "every training image has weight 0"),
    ],
)
def test_weights_that_fit_no_classes(tmp_path: Path, given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=r"^loss\.class_weights: .*" + message):
        find(open_split(tmp_path / "d"), class_weights=given)


@pytest.mark.parametrize("bad", [-1.0, None, float("inf")])
def test_a_bad_weight_in_the_manifest_is_named(tmp_path: Path, bad: float | None) -> None:
    weights: list[float | None] = [1.0] * 12
    weights[7] = bad
    with pytest.raises(UsageError, match=r"'image 0007' has the weight"):
        find(open_split(tmp_path / "d", weights))
