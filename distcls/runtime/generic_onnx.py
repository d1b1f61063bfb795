"""ONNX files that distcls has not exported, used by what the user says of them.

Taken is a network with one input, images in float32 [N, 3, H, W] or [N, H, W, 3] (or uint8), and an
output [N, K] of logits or probabilities. Normalisation is done here, in NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls.errors import DistclsError, UsageError
from distcls.imaging import Preprocess
from distcls.model_card import PREFIX, ModelCard
from distcls.runtime.model import open_session
from distcls.runtime.onnx_file import check_external_data
from distcls.runtime.providers import ExecutionConfig, ExecutionRequest
from distcls.task import Task

_KINDS = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
_SURE = 1e-3
"""How far from 1 a sum of probabilities may be."""

Floats = NDArray[np.float32]
Images = NDArray[np.uint8]


class GenericOnnxModel:
    """Such a file, ready to answer; safe to call from several threads."""

    def __init__(
        self,
        path: Path,
        classes: tuple[str, ...],
        asked: ExecutionRequest,
        *,
        size: tuple[int, int] | None = None,
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        std: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:
        """Raises UsageError if the file is none, is one of ours, or is not as described above."""
        self.path = path
        provider = "cpu" if asked.provider == "auto" else asked.provider
        self.plan = ExecutionConfig(
            provider=provider, batch_size=asked.batch_size or ExecutionConfig.batch_size
        )
        check_external_data(path)
        self._session = open_session(path, self.plan)
        if any(key.startswith(PREFIX) for key in self._metadata()):
            raise UsageError(f"classes: {path} was exported by distcls and carries its own")
        self._input, size = self._find_input(size)
        self._output = self._find_output(len(classes))
        preprocess = Preprocess(size=size, mean=mean, std=std)
        self.card = ModelCard(
            architecture={"name": path.stem}, task=Task(classes=classes), preprocess=preprocess
        )
        self._scale = 1 / (255 * np.array(preprocess.std, np.float32))
        self._shift = np.array(preprocess.mean, np.float32) / np.array(preprocess.std, np.float32)
        self._probabilities = self._gives_probabilities()

    @property
    def provider(self) -> str:
        """The execution provider in use."""
        return str(self._session.get_providers()[0])

    def logits(self, images: Images) -> Floats:
        """Preprocessed images, uint8 RGB [N, H, W, 3], to logits, float32 [N, K]."""
        found = self._answers(images)
        if not self._probabilities:
            return found
        return np.asarray(np.log(np.maximum(found, np.finfo(np.float32).tiny)), np.float32)

    def _answers(self, images: Images) -> Floats:
        """What the network gives; a fixed size of batches is filled up with black images."""
        fixed = self._input.shape[0]
        step = fixed if isinstance(fixed, int) else max(1, len(images))
        found = [np.zeros((0, len(self.card.classes)), np.float32)]
        for start in range(0, len(images), step):
            batch = images[start : start + step]
            missing = step - len(batch)
            full = np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), np.uint8)])
            found.append(self._run(full if missing else batch)[: len(batch)])
        return np.concatenate(found)

    def _run(self, batch: Images) -> Floats:
        values: NDArray[Any] = batch
        if self._input.type == "tensor(float)":
            values = batch.astype(np.float32) * self._scale - self._shift
        if self._channels_first(self._input.shape):
            values = values.transpose(0, 3, 1, 2)
        try:
            feed = {self._input.name: np.ascontiguousarray(values)}
            (answers,) = self._session.run([self._output], feed)
        except Exception as error:  # the runtime has a dozen types without a common parent
            reason = str(error).splitlines()[0]
            raise DistclsError(f"{self.path}: a batch of {len(batch)} failed: {reason}") from error
        if answers.shape != (len(batch), len(self.card.classes)):
            raise UsageError(
                f"{self.path}: answers {list(answers.shape)} to {len(batch)} images, expected "
                f"[{len(batch)}, {len(self.card.classes)}] for the class names of --classes"
            )
        return np.asarray(answers, np.float32)

    def _gives_probabilities(self) -> bool:
        """Whether answers are shares of one already; asked with noise, which tells nothing else."""
        noise = np.random.default_rng(0).integers(
            0, 256, (4, *self.card.preprocess.size, 3), np.uint8
        )
        found = self._answers(noise)
        return bool(found.min() >= 0 and np.abs(found.sum(axis=1) - 1).max() < _SURE)

    def _find_input(self, size: tuple[int, int] | None) -> tuple[Any, tuple[int, int]]:
        inputs = self._session.get_inputs()
        found = ", ".join(f"{tensor.name} {tensor.type} {tensor.shape}" for tensor in inputs)
        if len(inputs) != 1 or inputs[0].type not in _KINDS or len(inputs[0].shape) != 4:
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

    def _metadata(self) -> dict[str, str]:
        return dict(self._session.get_modelmeta().custom_metadata_map)


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names of a file: a JSON list, or one a line. Raises UsageError for anything else."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"classes: {path}: {reason}") from error
    if any(not isinstance(name, str) for name in names):
        raise UsageError(f"classes: {path}: expected names, a JSON list of text or one a line")
    classes = tuple(name.strip() for name in names if name.strip())
    if len(classes) < 2 or len(set(classes)) != len(classes):
        raise UsageError(f"classes: {path}: expected two or more names, each once")
    return classes
