"""The 1,797 handwritten digits (8x8) that scikit-learn bundles: real data without a download."""

from __future__ import annotations

import numpy as np

from distcls.data.sources.source import Record, Source
from distcls.errors import UsageError


def read_digits() -> Source:
    """The digits, without splits. Raises UsageError if scikit-learn is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError(
            "digits come with scikit-learn, which is not installed; pip install 'distcls[train]'"
        ) from error
    bunch = load_digits()
    # the values are counts from 0 to 16
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    records = [
        Record(image_id=f"digits/{index:04d}", label=int(label), pixels=image)
        for index, (image, label) in enumerate(zip(images, bunch.target, strict=True))
    ]
    classes = tuple(str(name) for name in bunch.target_names)
    return Source(kind="digits", location="digits", root=None, classes=classes, records=records)
