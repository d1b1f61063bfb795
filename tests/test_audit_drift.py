"""Two-sample tests of what is measured on each image: what differs is told, and little else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ks_2samp

from distcls.audit.drift import (
    drift_findings,
    holm,
    kolmogorov_smirnov,
    measure_tests,
    measures_of,
    two_sample_test,
)
from distcls.audit.scan import scan
from distcls.data.image_dataset import open_dataset, opened
from tests.sources import put
from tests.test_audit import kinds, look, photo


@pytest.mark.parametrize(
    ("first", "second", "shift"), [(40, 25, 0.3), (900, 300, 0.1), (15, 800, 0)]
)
def test_kolmogorov_and_smirnov_as_scipy_has_it(first: int, second: int, shift: float) -> None:
    rng = np.random.default_rng(first)
    one, other = rng.normal(size=first), rng.normal(size=second) + shift
    expected = ks_2samp(one, other, method="exact")
    distance, p = kolmogorov_smirnov(one, other)
    assert distance == pytest.approx(expected.statistic)
    assert p == pytest.approx(expected.pvalue, abs=0.03)
    assert kolmogorov_smirnov(one, one) == (0, 1)
    assert kolmogorov_smirnov(one, one + 9) == (1, pytest.approx(0, abs=1e-6))


def test_holms_correction() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1, 1]
    assert holm([]) == []


def test_few_random_divisions_seem_to_differ() -> None:
    """Of 200 random divisions of one set, at 0.01: at most 2 are expected."""
    data = opened(open_dataset("digits"))
    measures = measures_of(scan(data, None))
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(200):
        splits = rng.choice(["train", "val", "test"], len(data.records), p=[0.7, 0.1, 0.2])
        alarms += any(each.differs for each in measure_tests(measures, splits.tolist()))
    assert alarms <= 6


def test_what_differs_is_told(tmp_path: Path) -> None:
    for number in range(120):
        split = ("train", "train", "val", "test")[number % 4]
        picture = photo(number, *((60, 80), (66, 88))[number // 4 % 2])
        brighter = 35 if split == "test" else 0
        put(tmp_path / split / "ab"[number // 4 % 2] / f"{number}.png", picture + brighter)
    found = look(tmp_path)
    [bright] = [each for each in found.findings if each.kind == "drift"]
    assert (bright.split, bright.related) == ("test", "train")
    assert "of test are not drawn as those of train are: brightness, median 0.6" in bright.text
    assert bright.value is not None
    assert bright.value < 1e-4
    lines = found.to_text().splitlines()
    same = "contrast, sharpness, aspect ratio and size"
    assert f"drift: val shows no marked difference from train in brightness, {same}" in lines
    assert f"drift: test shows no marked difference from train in {same}" in lines
    assert found.to_json()["measures"]["test"]["brightness"]["distance"] > 0.5


def test_a_difference_that_does_not_matter_is_none() -> None:
    """Of 100,000 images a tenth of a standard deviation is no chance, and no harm."""
    values = np.random.default_rng(0).normal(size=100_000)
    values[50_000:] += 0.08
    [test] = measure_tests({"size": values}, ["train"] * 50_000 + ["test"] * 50_000)
    assert test.p < 1e-9
    assert not test.differs
    assert not list(drift_findings([test], {}))


def test_features_that_are_all_alike_do_not_differ() -> None:
    rows = np.tile(np.random.default_rng(0).normal(size=64).astype(np.float32), (90, 1))
    assert two_sample_test(rows[:60], rows[60:]) == (pytest.approx(0, abs=1e-12), 1.0)


def test_broken_images_and_few_images_are_not_compared(tmp_path: Path) -> None:
    for number in range(24):
        put(tmp_path / ("train", "test")[number % 2] / "a" / f"{number}.png", photo(number))
    for number in range(3):
        (tmp_path / "test/a" / f"{2 * number + 1}.png").write_bytes(b"nothing")
    found = look(tmp_path)
    assert not found.measured
    assert "drift: not tested, for want of 10 images" in found.to_text()
    assert {kind for kind, _ in kinds(found)} == {"broken"}
