"""A model's features of the images, and the turned and mirrored copies that they tell of."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distcls import log
from distcls.audit.near import BLOCK, PAIRS, Pair, candidates, compare, unit
from distcls.audit.scan import Rows
from distcls.data.image_dataset import Opened
from distcls.data.source import ImageSource
from distcls.errors import UsageError
from distcls.model_card import BEST_ONNX, best_model
from distcls.predictor import load_model
from distcls.runtime.model import WithFeatures
from distcls.runtime.pipeline import stream
from distcls.runtime.providers import ExecutionRequest

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

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


class Features(NamedTuple):
    """What a model makes of the images."""

    rows: Rows
    """The features, float32 [n, D], in the order in which they came."""
    places: Integers
    """Of each image of the dataset, its row; -1 where it is broken, [N]."""


def features_of(opened: WithFeatures, inside: Opened) -> Features:
    """The features of every image, in a temporary file: they may be many times its thumbnail."""
    rows = Rows((opened.width,), np.float32)
    places = np.full(len(inside.records), -1, np.int64)
    by_source: dict[int, tuple[ImageSource, Integers]] = {}
    for at, record in enumerate(inside.records):
        source = inside.source_of(record.split)
        _, positions = by_source.setdefault(
            id(source), (source, np.full(len(source), -1, np.int64))
        )
        positions[record.index] = at
    with log.Progress("features of", len(places)) as progress:
        for source, positions in by_source.values():
            with contextlib.closing(stream(source, opened)) as chunks:
                for chunk in chunks:
                    assert chunk.features is not None
                    own = positions[np.asarray(chunk.indices, np.int64)]
                    places[own[own >= 0]] = len(rows) + np.arange((own >= 0).sum())
                    rows.extend(chunk.features[own >= 0])
                    progress.update(len(own))
    return Features(rows, places)


class _Centred:
    """Rows of features less their mean, each of length 1."""

    def __init__(self, rows: Rows, chosen: Integers) -> None:
        self._rows, self._chosen = rows, chosen
        parts = np.split(chosen, range(BLOCK, len(chosen), BLOCK))
        total = sum(rows[part].sum(0, dtype=np.float64) for part in parts)
        self._mean = (total / len(chosen)).astype(np.float32)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, chosen: Integers) -> Floats:
        return unit(self._rows[self._chosen[chosen]] - self._mean)


def turned_pairs(thumbs: Rows, features: Features) -> list[tuple[Pair, str]]:
    """Pairs of images with near features that are one picture turned or mirrored, and how."""
    good = np.flatnonzero(features.places >= 0)
    if len(good) < 2:
        return []
    vectors = _Centred(features.rows, features.places[good])
    first, second = (good[places] for places in candidates(vectors))
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
