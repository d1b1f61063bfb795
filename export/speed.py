"""How fast two models are on this machine, side by side."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from distcls.inference.model import Model

BATCH = 32
"""Images at a time."""
TIMED = 96
"""Images over which a speed is measured, at most."""

Images = NDArray[np.uint8]


def measure_speeds(models: tuple[Model, Model], images: Images) -> tuple[float, float]:
    """Images per second of two models that take turns, so that neither has the quieter moment."""
    batches = [images[start : start + BATCH] for start in range(0, min(len(images), TIMED), BATCH)]
    for model in models:
        model.logits(batches[0])  # the first time is slower
    spent = [0.0, 0.0]
    for batch in batches:
        for place, model in enumerate(models):
            began = time.perf_counter()
            model.logits(batch)
            spent[place] += time.perf_counter() - began
    count = sum(map(len, batches))
    return count / max(spent[0], 1e-9), count / max(spent[1], 1e-9)
