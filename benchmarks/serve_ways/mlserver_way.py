"""A runtime of MLServer; images come as base64 in JSON, as its server takes no binary input."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from classifier import Classifier
from mlserver import MLModel
from mlserver.codecs import Base64Codec, NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Runtime(MLModel):
    """The model of one worker process."""

    async def load(self) -> bool:
        """Called in each worker."""
        self._classifier = Classifier(str(self.settings.parameters.uri))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """The answers to a batch."""
        images = Base64Codec.decode_input(payload.inputs[0])
        answers = await asyncio.to_thread(self._classify, images)
        seconds = np.array([list(each["seconds"].values()) for each in answers], np.float32)
        outputs = [
            StringCodec.encode_output("label", [each["label"] for each in answers]),
            NumpyCodec.encode_output("seconds", seconds),
        ]
        return InferenceResponse(model_name=self.name, outputs=outputs)

    def _classify(self, images: list[bytes]) -> list[dict[str, Any]]:
        return self._classifier.classify([self._classifier.decode(image) for image in images])
