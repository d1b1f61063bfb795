"""What a model's features say of the images: turned and mirrored copies, and drift of splits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distcls import log
from distcls.audit.findings import Finding
from distcls.audit.near import PAIRS, Pair, Thumbs, candidates, compare
from distcls.data.image_dataset import Opened
from distcls.data.source import SPLITS, ImageSource
from distcls.errors import UsageError
from distcls.model_card import BEST_ONNX, best_model
from distcls.predictor import load_model
from distcls.runtime.model import WithFeatures
from distcls.runtime.pipeline import stream
from distcls.runtime.providers import ExecutionRequest

Floats = NDArray[np.float32]

COMPARED = 1000
"""Images of each split in a two-sample test."""
LEAST = 10
"""Of each split, without which there is no test."""
PERMUTATIONS = 1999
SIGNIFICANT = 0.01
"""p-value below which two splits are said to differ."""
SURE = 2.6
"""Score from which a turned or mirrored picture is the same one."""


def open_features(model: Path) -> WithFeatures:
    """A model file that returns features. Raises UsageError for any other."""
    found = best_model(model)
    if found.is_file() and found.suffix.lower() != ".onnx":
        raise UsageError(
            f"model: {found} has no features, an exported model has; distcls export --ckpt {model} "
            f"writes {BEST_ONNX}"
        )
    return WithFeatures(load_model(found, "auto", ExecutionRequest()))


def features_of(opened: WithFeatures, inside: Opened) -> Floats:
    """The features of every image, float32 [N, D]; NaN where an image is broken."""
    found = np.full((len(inside.records), opened.width), np.nan, np.float32)
    by_source: dict[int, tuple[ImageSource, dict[int, int]]] = {}
    for at, record in enumerate(inside.records):
        source = inside.source_of(record.split)
        by_source.setdefault(id(source), (source, {}))[1][record.index] = at
    with log.Progress("features of", len(found)) as progress:
        for source, places in by_source.values():
            with contextlib.closing(stream(source, opened)) as chunks:
                for chunk in chunks:
                    assert chunk.features is not None
                    for index, row in zip(chunk.indices, chunk.features, strict=True):
                        if index in places:
                            found[places[index]] = row
                    progress.update(len(chunk.indices))
    return found


def turned_pairs(thumbs: Thumbs, features: Floats) -> list[tuple[Pair, str]]:
    """Pairs of images with near features that are one picture turned or mirrored, and how."""
    good = np.flatnonzero(np.isfinite(features).all(1))
    if len(good) < 2:
        return []
    vectors = features[good] - features[good].mean(0)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    first, second = (good[places] for places in candidates(vectors.astype(np.float32)))
    found: dict[tuple[int, int], tuple[Pair, str]] = {}
    for start in range(0, len(first), PAIRS):
        one, other = first[start : start + PAIRS], second[start : start + PAIRS]
        left, right = thumbs[one], thumbs[other]
        for turns, mirrored in (
            (0, True),
            (1, False),
            (2, False),
            (3, False),
            (1, True),
            (3, True),
        ):
            turned = np.rot90(right, turns, (1, 2))
            scores = compare(left, np.ascontiguousarray(turned[:, :, ::-1] if mirrored else turned))
            for at in np.flatnonzero(scores >= SURE).tolist():
                key = int(one[at]), int(other[at])
                pair = Pair(*key, round(float(scores[at]), 2))
                if key not in found or found[key][0].score < pair.score:
                    found[key] = pair, _how(turns, mirrored)
    return list(found.values())


def _how(turns: int, mirrored: bool) -> str:
    return " and ".join(
        [*["mirrored"] * mirrored, *[f"turned by {90 * turns} degrees"] * bool(turns)]
    )


def drift_tests(features: Floats, splits: Sequence[str | None]) -> dict[str, tuple[float, float]]:
    """Of each other split with enough images against the training images: the squared maximum mean
    discrepancy, and its p-value."""
    names = np.array([split or "" for split in splits])
    good = np.isfinite(features).all(1)
    rng = np.random.default_rng(0)
    found = {}
    for split in SPLITS[1:]:
        parts = [features[good & (names == name)] for name in ("train", split)]
        if min(map(len, parts)) >= LEAST:
            found[split] = two_sample_test(*(p[rng.permutation(len(p))[:COMPARED]] for p in parts))
    return found


def drift(tests: Mapping[str, tuple[float, float]]) -> Iterator[Finding]:
    """A finding for each split whose images differ from the training images."""
    for split, (value, p) in tests.items():
        if p < SIGNIFICANT:
            text = (
                f"the images of {split} are not drawn as those of train are: MMD {value:.4f}, "
                f"p {'<' if p <= 1 / PERMUTATIONS else '='} {max(p, 1 / PERMUTATIONS):.4f}, "
                "by the model's features"
            )
            yield Finding(
                kind="drift", severity="warning", split=split, related="train", value=p, text=text
            )


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
    p = (1 + (values[1:] >= values[0]).sum()) / (PERMUTATIONS + 1)
    return float(values[0]), float(p)
