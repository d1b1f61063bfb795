"""An exported model, `best.onnx`, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from distcls.bundle import ModelCard
from distcls.errors import DistclsError, UsageError
from distcls.inference.external_data import check_external_data

INPUT, LOGITS, PROBABILITIES = "images", "logits", "probabilities"
PREFERRED = ("CUDAExecutionProvider", "CPUExecutionProvider")
"""Execution providers, best first; the first that this machine has is used."""


class OnnxModel:
    """A `best.onnx` ready to answer; safe to call from several threads."""

    def __init__(
        self, path: Path, *, threads: int = 0, providers: tuple[str, ...] | None = None
    ) -> None:
        """Open `path` with `threads` threads in an operator (0: one a core).

        Raises UsageError if it is no ONNX file, was not exported by distcls, or names weights
        outside its folder.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise UsageError(f"{path}: no such model file")
        check_external_data(self.path)
        self._session = _open(self.path, threads, providers)
        metadata = self._session.get_modelmeta().custom_metadata_map
        self._card = ModelCard.from_metadata(dict(metadata), str(path))
        self._check_interface()

    @property
    def card(self) -> ModelCard:
        """Classes, preprocessing and certificate, as embedded in the file."""
        return self._card

    @property
    def provider(self) -> str:
        """The execution provider in use."""
        return str(self._session.get_providers()[0])

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Preprocessed images, uint8 RGB [N, H, W, 3], to logits, float32 [N, K]."""
        if not len(images):
            return np.zeros((0, len(self._card.classes)), np.float32)
        batch = np.ascontiguousarray(images)
        try:
            (logits,) = self._session.run([LOGITS], {INPUT: batch})
        except (RuntimeError, MemoryError) as error:
            reason = str(error).splitlines()[0]
            raise DistclsError(f"{self.path}: a batch of {len(images)} failed: {reason}") from error
        return np.asarray(logits, np.float32)

    def _check_interface(self) -> None:
        inputs = {tensor.name: tensor for tensor in self._session.get_inputs()}
        outputs = {tensor.name: tensor for tensor in self._session.get_outputs()}
        height, width = self._card.preprocess.size
        if list(inputs) != [INPUT] or inputs[INPUT].type != "tensor(uint8)":
            found = ", ".join(f"{name} {tensor.type}" for name, tensor in inputs.items())
            raise UsageError(
                f"{self.path}: its input is {found or 'missing'}, expected images uint8"
            )
        shape = list(inputs[INPUT].shape)
        if len(shape) != 4 or isinstance(shape[0], int) or shape[1:] != [height, width, 3]:
            expected = f"[N, {height}, {width}, 3]"
            raise UsageError(f"{self.path}: its input has shape {shape}, expected {expected}")
        for name in (LOGITS, PROBABILITIES):
            if name not in outputs:
                raise UsageError(f"{self.path}: output {name!r} is missing")
        classes, width = len(self._card.classes), outputs[LOGITS].shape[-1]
        if isinstance(width, int) and width != classes:
            raise UsageError(f"{self.path}: {width} logits for {classes} class names")


def _open(path: Path, threads: int, providers: tuple[str, ...] | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only: its warnings are about graphs, not for users
    # Threads that spin between operators take the cores from the threads that decode images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    available = onnxruntime.get_available_providers()
    chosen = providers or tuple(name for name in PREFERRED if name in available)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(chosen))
    except Exception as error:  # the runtime has a dozen types without a common parent
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path}: ONNX Runtime cannot open it: {reason}") from error
