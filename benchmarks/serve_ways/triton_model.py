"""A model of Triton's Python backend: preprocessed images in, labels out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

sys.path.insert(0, str(Path(__file__).parent))
from classifier import Classifier


class TritonPythonModel:
    """What the backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Called in each instance."""
        self.classifier = Classifier(Path(__file__).with_name("model.onnx"))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Those that the server has batched, each with a batch of its own."""
        inputs = [triton.get_input_tensor_by_name(each, "images").as_numpy() for each in requests]
        answers = iter(self.classifier.classify([(row, 0.0) for part in inputs for row in part]))
        responses = []
        for part in inputs:
            own = [next(answers) for _ in part]
            labels = np.array([[each["label"].encode()] for each in own], np.object_)
            seconds = np.array([list(each["seconds"].values()) for each in own], np.float32)
            tensors = [triton.Tensor("label", labels), triton.Tensor("seconds", seconds)]
            responses.append(triton.InferenceResponse(tensors))
        return responses
