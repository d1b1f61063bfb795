"""How much each class and each image counts in the loss; the training images 1 on average.

So the loss of a step stays the mean over the images of its global batch: what a batch's images
weigh together does not enter, and the result depends on neither processes nor accumulation.
(PyTorch's weighted mean divides by the batch's sum of weights instead.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distcls.data.dataset import Split
from distcls.data.order import Indices
from distcls.errors import UsageError, did_you_mean
from distcls.training.losses.config import LossConfig

Weights = NDArray[np.float64]


def find_weights(
    config: LossConfig, classes: Sequence[str], split: Split, used: Indices
) -> tuple[Weights | None, Weights | None]:
    """Weights of the classes [classes] and of the split's images [N], None where all are 1.

    `used` are the images trained on: over them, class weight times image weight is 1 on average.
    Raises UsageError for classes that are not there and for weights that are all 0.
    """
    by_image = _by_image(config, split, used)
    by_class = _by_class(config, classes, split.labels[used])
    if by_class is not None:
        weighed = by_class[split.labels[used]]
        if by_image is not None:
            weighed = weighed * by_image[used]
        if not weighed.any():
            raise UsageError("loss.class_weights: with these every training image weighs 0")
        by_class = by_class / weighed.mean()
    return by_class, by_image


def _by_class(config: LossConfig, classes: Sequence[str], labels: Indices) -> Weights | None:
    given = config.class_weights
    if given is None:
        return None
    if given == "balanced":
        return balanced(labels, len(classes))
    if isinstance(given, dict):
        for name in given:
            if name not in classes:
                hint = did_you_mean(name, classes)
                raise UsageError(f"loss.class_weights: the dataset has no class {name!r}{hint}")
        return np.array([given.get(name, 1.0) for name in classes])
    if len(given) != len(classes):
        raise UsageError(
            f"loss.class_weights: {len(given)} numbers for {len(classes)} classes "
            f"({', '.join(classes[:3])}, ...); give one for each, in label order"
        )
    return np.array([float(weight) for weight in given])


def balanced(labels: Indices, classes: int) -> Weights:
    """images / (classes * images of the class), as scikit-learn's `compute_class_weight`.

    Classes without images are not counted, and weigh 1.
    """
    counts = np.bincount(labels, minlength=classes)
    present = counts > 0
    return np.where(present, len(labels) / (present.sum() * np.maximum(counts, 1)), 1.0)


def _by_image(config: LossConfig, split: Split, used: Indices) -> Weights | None:
    weights = None if config.sample_weights == "off" else split.weights
    if weights is None:
        if config.sample_weights == "on":
            raise UsageError(
                f"loss.sample_weights: {split.folder} has no weights; prepare it from a manifest "
                "with a weight column"
            )
        return None
    mean = float(weights[used].mean())
    if mean == 0:
        raise UsageError(
            f"loss.sample_weights: all training images of {split.folder} weigh 0; "
            "--loss.sample-weights off leaves the weights aside"
        )
    return weights / mean
