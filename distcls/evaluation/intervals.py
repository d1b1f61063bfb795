"""How far a figure may be off: 95 % intervals, and tests of differences. NumPy alone.

Every figure is the mean of a number for each image (see `distcls.evaluation.scores`), so one
bootstrap over the images serves them all, and the difference of two models is one of such means.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Pair = tuple[float, float]

LEVEL = 0.95
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
REPLICATES, GROUP = 1000, 8
"""Resampled sets of images, and how many are computed together."""
SEED = 0
"""Of all resampling: the same predictions have the same interval."""
LEAST_P = 1 / (REPLICATES + 1)
"""No smaller p-value is found by resampling."""


def wilson(hits: float, count: int) -> Pair:
    """Interval of a fraction of independent images (Wilson 1927)."""
    if not count:
        return (0.0, 1.0)
    share, square = hits / count, Z * Z / count
    center = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return (max(0.0, center - half), min(1.0, center + half))


def resampled_means(values: Floats) -> Floats:
    """Means of [N, M] over resampled images, [REPLICATES, M].

    Images are drawn with replacement by a fixed seed, the same ones for all columns. Memory is a
    few times that of one column, whatever the number of replicates.
    """
    count = len(values)
    rng = np.random.default_rng(SEED)
    means = np.empty((REPLICATES, values.shape[1]))
    group = np.empty((GROUP, count))
    for start in range(0, REPLICATES, GROUP):
        for row in group:
            row[:] = np.bincount(rng.integers(0, count, count), minlength=count)
        means[start : start + GROUP] = group @ values
    return means / count


def percentiles(means: Floats) -> list[Pair | None]:
    """Percentile interval (Efron 1979) of each column of resampled means, [REPLICATES, M].

    None where all are equal: then nothing was seen to vary, such as the loss of one image.
    """
    low, high = np.quantile(means, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2], axis=0)
    pairs = zip(low.tolist(), high.tolist(), strict=True)
    return [(a, b) if b - a > 1e-12 * max(1, abs(a)) else None for a, b in pairs]


def bootstrap_p(means: Floats) -> Floats:
    """Two-sided p-value of each column of resampled mean differences, [M]: twice the smaller part
    on one side of 0."""
    below = (means <= 0).sum(axis=0) + 1
    above = (means >= 0).sum(axis=0) + 1
    return np.asarray(np.minimum(1.0, 2 * np.minimum(below, above) / (len(means) + 1)))


def mcnemar(one: int, other: int) -> float:
    """Exact p-value that two models are equally often right, from the images that only `one` or
    only the `other` gets right (McNemar 1947; the binomial test)."""
    total, smaller = one + other, min(one, other)
    if one == other:
        return 1.0
    terms = [
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
        for k in range(smaller + 1)
    ]
    peak = max(terms)
    summed = peak + math.log(sum(math.exp(term - peak) for term in terms))
    return min(1.0, 2 * math.exp(summed - total * math.log(2)))


def paired_difference(one: int, other: int, count: int) -> Pair:
    """Interval of the accuracy of a model minus that of another on the same `count` images, of
    which only the first gets `one` right and only the second `other`.

    Wald's with half an image added to each cell of the table (Agresti, Min: Simple improved
    confidence intervals for comparing matched proportions, 2005).
    """
    first, second, total = one + 0.5, other + 0.5, count + 2
    difference = (first - second) / total
    half = Z * math.sqrt(first + second - (first - second) ** 2 / total) / total
    return (max(-1.0, difference - half), min(1.0, difference + half))


def student_p(t: float, freedom: float) -> float:
    """Two-sided p-value of Student's t."""
    if freedom > NORMAL:
        return 2 * NormalDist().cdf(-abs(t))
    angles, beyond = _student(freedom)
    return float(np.interp(math.atan(abs(t) / math.sqrt(freedom)), angles, beyond))


def student_quantile(freedom: float) -> float:
    """The t beyond which, on both sides, 5 % of Student's distribution lie."""
    if freedom > NORMAL:
        return Z
    angles, beyond = _student(freedom)
    angle = float(np.interp(LEVEL - 1, -beyond, angles))
    return math.sqrt(freedom) * math.tan(angle)


NORMAL = 2000
"""Degrees of freedom from which Student's distribution is taken to be normal."""


def _student(freedom: float) -> tuple[Floats, Floats]:
    """Angles from 0 to pi/2, and the part of Student's distribution beyond each on both sides.

    With t = sqrt(freedom) tan(angle) the density is that of cos(angle) ** (freedom - 1).
    """
    angles = np.linspace(0, math.pi / 2, 8001)
    density = np.cos((angles[:-1] + angles[1:]) / 2) ** (freedom - 1)
    beyond = np.concatenate([np.cumsum(density[::-1])[::-1], [0.0]])
    return angles, beyond / beyond[0]
