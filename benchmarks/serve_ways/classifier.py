"""The model as the contestants' servers run it: OpenCV, NumPy and one ONNX Runtime session.

The files in this folder run in virtual environments of their own, in which there is no distcls.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Classifier:
    """A model file with its own preprocessing, one thread of computing a call."""

    def __init__(self, path: str | Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        facts = self.session.get_modelmeta().custom_metadata_map
        self.classes: list[str] = json.loads(facts["distcls.classes"])
        preprocess = json.loads(facts["distcls.preprocess"])
        self._side: int = preprocess["size"][0]
        self._inner: float = preprocess["crop_fraction"]

    def decode(self, data: bytes) -> tuple[Pixels, float]:
        """An image file as uint8 [side, side, 3], and the seconds that took."""
        import cv2

        cv2.setNumThreads(1)
        began = time.perf_counter()
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        if image is None:
            raise ValueError("no image")
        height, width = image.shape[:2]
        scale = self._side / min(height, width) / self._inner
        size = round(width * scale), round(height * scale)
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        left, top = ((length - self._side) // 2 for length in size)
        cut = image[top : top + self._side, left : left + self._side]
        return np.ascontiguousarray(cut), time.perf_counter() - began

    def classify(self, batch: Sequence[tuple[Pixels, float]]) -> list[dict[str, Any]]:
        """The answers to decoded images."""
        began = time.perf_counter()
        images = np.stack([pixels for pixels, _ in batch])
        (found,) = self.session.run(["probabilities"], {"images": images})
        spent = time.perf_counter() - began
        return [
            {
                "label": self.classes[int(row.argmax())],
                "probability": float(row.max()),
                "seconds": {"decode": decode, "infer": spent},
            }
            for row, (_, decode) in zip(found, batch, strict=True)
        ]
