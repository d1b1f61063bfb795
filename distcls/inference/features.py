"""Features beside the logits: what the last layer of the network is given, for search and more.

A stream carries one array an image, so a model with features answers with both in one row.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from distcls.bundle import ModelCard
from distcls.errors import UsageError
from distcls.inference.checksum import outputs
from distcls.inference.model import Model
from distcls.inference.pipeline import Chunk
from distcls.inference.providers.plan import Plan
from distcls.inference.session import LOGITS, OnnxModel

FEATURES = "features"
"""The output of an exported file, float32 [N, D]."""

Floats = NDArray[np.float32]


class WithFeatures:
    """An exported model whose answers are its logits with its features behind them, [N, K + D]."""

    def __init__(self, model: Model) -> None:
        """Raises UsageError if the model is no exported file, or one without features."""
        if not isinstance(model, OnnxModel):
            raise UsageError("features: only one exported .onnx has them; export the checkpoint")
        if FEATURES not in outputs(model.path):
            raise UsageError(
                f"features: {model.path} was exported without them; export its checkpoint again"
            )
        self._model = model
        blank = np.zeros((1, *model.card.preprocess.size, 3), np.uint8)
        self.width: int = model.run([FEATURES], blank)[0].shape[1]
        """D."""

    @property
    def card(self) -> ModelCard:
        """The model's own."""
        return self._model.card

    @property
    def answer_width(self) -> int:
        """K + D."""
        return len(self.card.classes) + self.width

    @property
    def provider(self) -> str:
        """The model's own."""
        return self._model.provider

    @property
    def plan(self) -> Plan:
        """The model's own."""
        return self._model.plan

    def logits(self, images: NDArray[np.uint8]) -> Floats:
        """Logits and features side by side, float32 [N, K + D]."""
        if not len(images):
            return np.zeros((0, self.answer_width), np.float32)
        return np.concatenate(self._model.run([LOGITS, FEATURES], images), axis=1)


def split_features(chunk: Chunk, width: int) -> tuple[Chunk, Floats]:
    """A chunk of such answers as a plain chunk and the features, [n, width]; NaN for bad images."""
    classes = chunk.logits.shape[1] - width
    plain = dataclasses.replace(chunk, logits=chunk.logits[:, :classes])
    return plain, chunk.logits[:, classes:]
