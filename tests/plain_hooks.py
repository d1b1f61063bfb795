"""A module of a user's that registers nothing; see `tests.own_hooks`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGE = 20.0


def noise(image: Any, rng: np.random.Generator) -> Any:
    """A transform of one image."""
    return np.clip(image + rng.normal(0, LARGE, image.shape), 0, 255).astype(np.uint8)


class Shade:
    """A transform of a batch."""

    draws = 1

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        return (images * draws[:, :1, None, None]).to(torch.uint8)


def ending(run: Any, metrics: dict[str, float]) -> bool:
    return True
