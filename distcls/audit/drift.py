"""Whether the images of val and test are drawn as those of train are: two-sample tests, of what
can be measured on each image, and of a model's features."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls.audit.findings import Finding
from distcls.audit.model import Features
from distcls.audit.scan import Scan
from distcls.data.source import SPLITS
from distcls.errors import UsageError

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

LEAST = 10
"""Images of each split, without which there is no test."""
SIGNIFICANT = 0.01
"""p-value below which two splits are said to differ."""
COMPARED = 1000
"""Images of each split in a test of features."""
ROUNDING = 1e-10
"""Of squared distances, relative to the largest square, and of discrepancies: equal pictures are
told as different by less."""
PERMUTATIONS = 1999
APART = 0.05
"""Distance of two distributions below which a difference is too small to be told of, whatever its
p-value: among very many images no difference is chance."""
DIGITS = {"brightness": 2, "contrast": 2, "sharpness": 3, "aspect ratio": 2, "size": 0}
"""What is compared of every image, and the decimals that it is printed with: mean and standard
deviation of the grey values (0 to 1), sharpness as of `scan`, width by height, and the square root
of their product, in pixels."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MeasureTest:
    """A two-sample test of one measure, of the images of a split against the training images."""

    split: str
    measure: str
    """One of `DIGITS`."""
    distance: float
    """Of Kolmogorov and Smirnov: the largest difference of the two distribution functions."""
    p: float
    """Corrected for the number of tests."""
    medians: tuple[float, float]
    """Of train, and of the split."""

    @property
    def differs(self) -> bool:
        """Whether there is more than chance, and enough of it to matter."""
        return self.p < SIGNIFICANT and self.distance >= APART

    def to_json(self) -> dict[str, float]:
        """The numbers."""
        train, other = (round(value, 6) for value in self.medians)
        distance = round(self.distance, 6)
        return {"distance": distance, "p": self.p, "median_train": train, "median": other}


def measures_of(scanned: Scan) -> dict[str, Doubles]:
    """The values of each of `DIGITS`, float64 [N]; NaN where an image is broken."""
    rows = scanned.table
    height, width = rows["height"].astype(np.float64), rows["width"].astype(np.float64)
    values = {
        "brightness": rows["brightness"].astype(np.float64),
        "contrast": rows["spread"].astype(np.float64),
        "sharpness": rows["sharpness"].astype(np.float64),
        "aspect ratio": width / np.maximum(height, 1),
        "size": np.sqrt(width * height),
    }
    for each in values.values():
        each[list(scanned.broken)] = np.nan
    return values


def measure_tests(
    measures: Mapping[str, Doubles], splits: Sequence[str | None]
) -> list[MeasureTest]:
    """Of each other split with enough images, and each measure, against the training images.

    The p-values are those of Kolmogorov and Smirnov, corrected for all of these tests by Holm's
    method: where no split differs in anything, one test or more is below 0.01 in at most 1 % of
    cases (Holm: A Simple Sequentially Rejective Multiple Test Procedure, 1979).
    """
    found = []
    for split, train, other in _against_train(splits, np.isfinite(measures["size"])):
        for name, values in measures.items():
            distance, p = kolmogorov_smirnov(values[train], values[other])
            medians = float(np.median(values[train])), float(np.median(values[other]))
            found.append(
                MeasureTest(split=split, measure=name, distance=distance, p=p, medians=medians)
            )
    corrected = holm([each.p for each in found])
    return [dataclasses.replace(each, p=p) for each, p in zip(found, corrected, strict=True)]


def _against_train(
    splits: Sequence[str | None], good: NDArray[np.bool_]
) -> Iterator[tuple[str, NDArray[np.int64], NDArray[np.int64]]]:
    """Each other split with enough good images, the positions of train's and of its own."""
    numbers = {name: at for at, name in enumerate(SPLITS)}
    codes = np.fromiter((numbers.get(str(each), -1) for each in splits), np.int8, len(splits))
    parts = {name: np.flatnonzero(good & (codes == at)) for name, at in numbers.items()}
    for split in SPLITS[1:]:
        if min(len(parts["train"]), len(parts[split])) >= LEAST:
            yield split, parts["train"], parts[split]


def kolmogorov_smirnov(first: Doubles, second: Doubles) -> tuple[float, float]:
    """The largest difference of the distribution functions of two samples [n] and [m], and the
    probability of one as large by chance.

    By the asymptotic distribution in Stephens' form (Use of the Kolmogorov-Smirnov, Cramer-Von
    Mises and Related Statistics Without Extensive Tables, 1970); too large where values are equal.
    """
    one, other = np.sort(first), np.sort(second)
    both = np.concatenate([one, other])
    below = [np.searchsorted(each, both, side="right") / len(each) for each in (one, other)]
    distance = float(np.abs(below[0] - below[1]).max())
    root = math.sqrt(len(one) * len(other) / len(both))
    scaled = (root + 0.12 + 0.11 / root) * distance
    if scaled < 0.3:  # the series does not converge there
        return distance, 1.0
    terms = np.arange(1, 101)
    series = (-1.0) ** (terms - 1) * np.exp(-2 * (terms * scaled) ** 2)
    return distance, float(min(1.0, 2 * series.sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, corrected by Holm's method for their number."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    stepped = np.maximum.accumulate(np.asarray(p_values, np.float64)[order] * factors)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(stepped, 1)
    return corrected.tolist()


def feature_tests(
    features: Features, splits: Sequence[str | None]
) -> dict[str, tuple[float, float]]:
    """Of each other split with enough images against the training images: the squared maximum mean
    discrepancy, and its p-value."""
    rng = np.random.default_rng(0)
    found = {}
    for split, *parts in _against_train(splits, features.places >= 0):
        chosen = [part[rng.permutation(len(part))[:COMPARED]] for part in parts]
        first, second = (features.rows[features.places[part]] for part in chosen)
        found[split] = two_sample_test(first, second)
    return found


def drift_findings(
    measured: Sequence[MeasureTest], tested: Mapping[str, tuple[float, float]]
) -> Iterator[Finding]:
    """A finding for each split and measure, and each split by its features, with a difference."""
    common: dict[str, Any] = {"kind": "drift", "severity": "warning", "related": "train"}
    for each in measured:
        if each.differs:
            train, other = (f"{value:.{DIGITS[each.measure]}f}" for value in each.medians)
            text = (
                f"the images of {each.split} are not drawn as those of train are: "
                f"{each.measure}, median {other} against {train}, distributions "
                f"{each.distance:.2f} apart (Kolmogorov-Smirnov), p {_told(each.p, 1e-4)}"
            )
            yield Finding(**common, split=each.split, value=each.p, text=text)
    for split, (value, p) in tested.items():
        if p < SIGNIFICANT:
            text = (
                f"the images of {split} are not drawn as those of train are: MMD {value:.4f}, "
                f"p {_told(p, 1 / PERMUTATIONS)}, by the model's features"
            )
            yield Finding(**common, split=split, value=p, text=text)


def _told(p: float, least: float) -> str:
    return f"{'<' if p <= least else '='} {max(p, least):.4f}"


def two_sample_test(first: Floats, second: Floats, seed: int = 0) -> tuple[float, float]:
    """Whether two samples [n, D] and [m, D] come from one distribution: the squared maximum mean
    discrepancy, and its p-value by permutation.

    With a Gaussian kernel whose width is the median distance (Gretton et al.: A Kernel Two-Sample
    Test, 2012). Raises UsageError for samples of fewer than two.
    """
    if min(len(first), len(second)) < 2:
        raise UsageError("a two-sample test needs two images of each")
    both = np.concatenate([first, second]).astype(np.float64)
    squares = (both * both).sum(1)
    distances = np.maximum(squares[:, None] + squares - 2 * both @ both.T, 0)
    distances[distances < ROUNDING * squares.max()] = 0
    width = np.median(distances[np.triu_indices(len(both), 1)])
    kernel = np.exp(-distances / max(float(width), 1e-12))
    rng = np.random.default_rng(seed)
    sides = np.zeros((PERMUTATIONS + 1, len(both)))
    sides[0, : len(first)] = 1
    for row in sides[1:]:
        row[rng.permutation(len(both))[: len(first)]] = 1
    n, m = len(first), len(second)
    weights = sides / n - (1 - sides) / m
    values = np.einsum("pi,pi->p", weights @ kernel, weights)
    p = (1 + (values[1:] >= values[0] - ROUNDING).sum()) / (PERMUTATIONS + 1)
    return float(values[0]), float(p)
