"""What prediction and evaluation ask of a model, be it a checkpoint or an ONNX file."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distcls.bundle import ModelCard


class Model(Protocol):
    """A model ready to answer."""

    @property
    def card(self) -> ModelCard:
        """Its classes and preprocessing."""

    @property
    def provider(self) -> str:
        """What computes, for people: an execution provider or a torch device."""

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Preprocessed images, uint8 RGB [N, H, W, 3], to logits, float32 [N, K]."""


def answer_width(model: Model) -> int:
    """Numbers of an answer: a logit a class, unless the model says that it gives more."""
    width = getattr(model, "answer_width", None)
    return width if isinstance(width, int) else len(model.card.classes)
