"""Third-party ONNX models: files that distcls did not export, described by the user.

Supported is a network with one input, images as float32 [N, 3, H, W] or [N, H, W, 3] (or uint8),
and an output [N, K] of logits or probabilities. Normalisation happens here, in NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls.data.source import read_class_names
from distcls.errors import UsageError
from distcls.imaging import Preprocess
from distcls.model_card import PREFIX, ModelCard
from distcls.runtime.model import Floats, Images, batch_failed, open_session
from distcls.runtime.onnx_file import OnnxFile
from distcls.runtime.providers import AUTO, REFERENCE, ExecutionConfig, ExecutionRequest
from distcls.task import Task

_INPUT_TYPES = ("tensor(float)", "tensor(uint8)")
_SUM_TOLERANCE = 1e-3
"""How far from 1 the sum of an image's probabilities may be."""


class GenericOnnxModel:
    """A third-party ONNX model ready to classify; thread-safe."""

    def __init__(
        self,
        path: Path,
        classes: tuple[str, ...],
        request: ExecutionRequest,
        *,
        size: tuple[int, int] | None = None,
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        std: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:
        """Open a file with its class names, in the order of its outputs.

        `size` is height and width of its input in pixels, if the file leaves them open; `mean` and
        `std` normalise the RGB channels of values scaled to 0..1. The provider `auto` is the CPU.
        Raises UsageError if it is no ONNX file, was exported by distcls, or is not supported.
        """
        file = OnnxFile(path)
        if any(key.startswith(PREFIX) for key in file.metadata):
            raise UsageError(f"classes: {path} was exported by distcls and carries its own")
        self.path = path
        self.sha256 = file.sha256
        """Of the file, hexadecimal."""
        self.execution = ExecutionConfig(
            provider=REFERENCE if request.provider == AUTO else request.provider,
            batch_size=request.batch_size or ExecutionConfig.batch_size,
        )
        self._session = open_session(file, self.execution)
        self._input, size = self._find_input(size)
        self._output = self._find_output(len(classes))
        preprocess = Preprocess(size=size, mean=mean, std=std)
        self.card = ModelCard(
            architecture={"name": path.stem}, task=Task(classes=classes), preprocess=preprocess
        )
        self._scale = 1 / (255 * np.array(preprocess.std, np.float32))
        self._shift = np.array(preprocess.mean, np.float32) / np.array(preprocess.std, np.float32)
        self._returns_probabilities = self._detect_probabilities()

    @property
    def provider(self) -> str:
        """The execution provider in use."""
        return str(self._session.get_providers()[0])

    @property
    def output_width(self) -> int:
        """See `Model`: one logit per class."""
        return len(self.card.classes)

    def logits(self, images: Images) -> Floats:
        """See `Model`; of a network that returns probabilities, their logarithms."""
        outputs = self._compute(images)
        if not self._returns_probabilities:
            return outputs
        return np.asarray(np.log(np.maximum(outputs, np.finfo(np.float32).tiny)), np.float32)

    def _compute(self, images: Images) -> Floats:
        """The network's output [N, K]; a fixed batch size is filled up with black images."""
        fixed = self._input.shape[0]
        step = fixed if isinstance(fixed, int) and fixed > 0 else max(1, len(images))
        outputs = [np.zeros((0, self.output_width), np.float32)]
        for start in range(0, len(images), step):
            batch = images[start : start + step]
            missing = step - len(batch)
            full = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), np.uint8)])
            outputs.append(self._run(full if missing else batch)[: len(batch)])
        return np.concatenate(outputs)

    def _run(self, batch: Images) -> Floats:
        values: NDArray[Any] = batch
        if self._input.type == "tensor(float)":
            values = batch.astype(np.float32) * self._scale - self._shift
        if self._channels_first(self._input.shape):
            values = values.transpose(0, 3, 1, 2)
        try:
            inputs = {self._input.name: np.ascontiguousarray(values)}
            (outputs,) = self._session.run([self._output], inputs)
        except Exception as error:  # the runtime has a dozen types without a common parent
            raise batch_failed(self.path, len(batch), error) from error
        if outputs.shape != (len(batch), self.output_width):
            raise UsageError(
                f"{self.path}: its output for {len(batch)} images has the shape "
                f"{list(outputs.shape)}, expected [{len(batch)}, {self.output_width}] for the "
                "class names of --classes"
            )
        return np.asarray(outputs, np.float32)

    def _detect_probabilities(self) -> bool:
        """Whether outputs are probabilities; those of noise are, by chance, in no other case."""
        noise = np.random.default_rng(0).integers(
            0, 256, (4, *self.card.preprocess.size, 3), np.uint8
        )
        outputs = self._compute(noise)
        off = np.abs(outputs.sum(axis=1) - 1).max()
        return bool(outputs.min() >= 0 and off < _SUM_TOLERANCE)

    def _find_input(self, size: tuple[int, int] | None) -> tuple[Any, tuple[int, int]]:
        inputs = self._session.get_inputs()
        found = ", ".join(f"{tensor.name} {tensor.type} {tensor.shape}" for tensor in inputs)
        if len(inputs) != 1 or inputs[0].type not in _INPUT_TYPES or len(inputs[0].shape) != 4:
            raise UsageError(
                f"{self.path}: its input is {found}, expected one, float32 or uint8 [N, 3, H, W] "
                "or [N, H, W, 3]"
            )
        shape = inputs[0].shape
        own = shape[2:] if self._channels_first(shape) else shape[1:3]
        if 3 not in (shape[1], shape[3]) and not isinstance(shape[1], str):
            raise UsageError(f"{self.path}: its input has shape {shape}, expected 3 channels")
        if size is None and not all(isinstance(side, int) for side in own):
            raise UsageError(f"size: {self.path} takes any size; give --size HEIGHT,WIDTH")
        given = size or (int(own[0]), int(own[1]))
        if any(isinstance(a, int) and a != b for a, b in zip(own, given, strict=True)):
            raise UsageError(f"size: {given[0]},{given[1]} does not fit, {self.path} takes {own}")
        return inputs[0], given

    @staticmethod
    def _channels_first(shape: Sequence[Any]) -> bool:
        return bool(shape[1] == 3 or shape[3] != 3)

    def _find_output(self, classes: int) -> str:
        outputs = self._session.get_outputs()
        for tensor in outputs:
            if len(tensor.shape) == 2 and (isinstance(tensor.shape[1], str) or not tensor.shape[1]):
                return str(tensor.name)
            if len(tensor.shape) == 2 and tensor.shape[1] == classes:
                return str(tensor.name)
        found = ", ".join(f"{tensor.name} {tensor.shape}" for tensor in outputs)
        raise UsageError(
            f"{self.path}: its outputs are {found}, expected one [N, {classes}] for the "
            f"{classes} class names of --classes"
        )


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names of a file, as `read_class_names` reads them; UsageError for fewer than two."""
    classes = read_class_names(path)
    if len(classes) < 2:
        raise UsageError(f"classes: {path}: expected two or more names, each once")
    return classes
