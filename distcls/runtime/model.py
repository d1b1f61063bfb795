"""A model ready to classify, and the exported `best.onnx` as one, in ONNX Runtime."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from distcls.errors import DistclsError, UsageError
from distcls.model_card import ModelCard
from distcls.runtime.onnx_file import OnnxFile
from distcls.runtime.providers import PROVIDERS, ExecutionConfig, configure, first_line

Images = NDArray[np.uint8]
Floats = NDArray[np.float32]

INPUT, LOGITS, PROBABILITIES = "images", "logits", "probabilities"
FEATURES = "features"
"""Names in an exported graph; `features`, float32 [N, D], is an output that it may lack."""


class Model(Protocol):
    """A model ready to classify; any number of threads may call it at the same time."""

    @property
    def card(self) -> ModelCard:
        """Its task and preprocessing."""

    @property
    def provider(self) -> str:
        """The backend that computes, for display: an execution provider or a torch device."""

    @property
    def execution(self) -> ExecutionConfig:
        """How it is run: threads, and images per batch."""

    @property
    def output_width(self) -> int:
        """Numbers per image that `logits` returns: one per class, unless features follow them."""

    def logits(self, images: Images) -> Floats:
        """Preprocessed images, uint8 RGB [N, H, W, 3], to logits, float32 [N, output_width].

        Raises DistclsError if they cannot be computed.
        """


class OnnxModel:
    """A `best.onnx` ready to classify; thread-safe."""

    def __init__(self, file: Path | OnnxFile, execution: ExecutionConfig | None = None) -> None:
        """Open a file with the config `execution`; default: on the CPU with one thread per core.

        Raises UsageError if it is no ONNX file, was not exported by distcls, was changed since,
        names weights outside its folder, or if the execution provider does not work here.
        """
        file = file if isinstance(file, OnnxFile) else OnnxFile(file)
        self.path = file.path
        self.sha256 = file.sha256
        """Of the file, hexadecimal."""
        self.output_names = file.output_names
        self.metadata = file.metadata
        """As embedded in the file, card and checksums included."""
        self.execution = execution or ExecutionConfig()
        self._session = open_session(file, self.execution)
        self._card = ModelCard.from_metadata(file.metadata, str(file.path))
        self._check_interface()

    @property
    def card(self) -> ModelCard:
        """Task, preprocessing and certificate, as embedded in the file."""
        return self._card

    @property
    def provider(self) -> str:
        """The execution provider in use."""
        return str(self._session.get_providers()[0])

    @property
    def output_width(self) -> int:
        """See `Model`: one logit per class."""
        return len(self._card.classes)

    def with_execution(self, execution: ExecutionConfig) -> OnnxModel | None:
        """The same model run in another way by the same session; None if it needs another one."""
        if self.execution.session != execution.session:
            return None
        same = copy.copy(self)
        same.execution = execution
        return same

    def logits(self, images: Images) -> Floats:
        """See `Model`."""
        if not len(images):
            return np.zeros((0, self.output_width), np.float32)
        return self.run([LOGITS], images)[0]

    def run(self, outputs: Sequence[str], images: Images) -> list[Floats]:
        """The outputs of these names, float32 [N, K or D] each, for preprocessed images.

        Raises DistclsError if the runtime cannot compute them, or returns another shape.
        """
        batch = np.ascontiguousarray(images)
        try:
            found = self._session.run(list(outputs), {INPUT: batch})
        except Exception as error:  # the runtime has a dozen types without a common parent
            raise batch_failed(self.path, len(images), error) from error
        return [
            self._checked(name, np.asarray(values, np.float32), len(images))
            for name, values in zip(outputs, found, strict=True)
        ]

    def _checked(self, name: str, values: Floats, images: int) -> Floats:
        """The values of an output unless their shape is wrong, which NumPy might broadcast."""
        width: int | str = self.output_width if name in (LOGITS, PROBABILITIES) else "D"
        if values.ndim != 2 or len(values) != images or width not in (values.shape[1], "D"):
            raise DistclsError(
                f"{self.path}: its output {name!r} for {images} images has the shape "
                f"{list(values.shape)}, expected [{images}, {width}]"
            )
        return values

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
        shape = outputs[LOGITS].shape
        if len(shape) != 2:
            raise UsageError(f"{self.path}: its logits have shape {shape}, expected [N, classes]")
        if isinstance(shape[1], int) and shape[1] != self.output_width:
            raise UsageError(f"{self.path}: {shape[1]} logits for {self.output_width} class names")


class WithFeatures:
    """An exported model whose logits have its features behind them in the same row, [N, K + D].

    Pipelines carry one array per image, so both go through them side by side.
    """

    def __init__(self, model: Model) -> None:
        """Raises UsageError if the model is no exported file, or one without features."""
        if not isinstance(model, OnnxModel):
            raise UsageError("features: only an exported .onnx has them; export the checkpoint")
        if FEATURES not in model.output_names:
            raise UsageError(
                f"features: {model.path} was exported without them; export its checkpoint again"
            )
        self.model = model
        blank = np.zeros((1, *model.card.preprocess.size, 3), np.uint8)
        self.width: int = model.run([FEATURES], blank)[0].shape[1]
        """D."""

    @property
    def card(self) -> ModelCard:
        """The model's own."""
        return self.model.card

    @property
    def provider(self) -> str:
        """The model's own."""
        return self.model.provider

    @property
    def execution(self) -> ExecutionConfig:
        """The model's own."""
        return self.model.execution

    @property
    def output_width(self) -> int:
        """K + D."""
        return self.model.output_width + self.width

    def logits(self, images: Images) -> Floats:
        """Logits and features side by side, float32 [N, K + D]."""
        if not len(images):
            return np.zeros((0, self.output_width), np.float32)
        return np.concatenate(self.model.run([LOGITS, FEATURES], images), axis=1)


def open_session(file: OnnxFile, execution: ExecutionConfig) -> Any:
    """An `onnxruntime.InferenceSession`, which any number of threads may call.

    Raises UsageError if the file cannot be opened, or if the execution provider does not work here.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised; the runtime would print them as well
    # Threads that spin between operators take the cores from the threads that decode images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = configure(execution, options)
    # From the verified bytes, so that nothing else is run than what was verified, unless there are
    # weights beside them. MobileNetV3-Large, 22 MB, 2 cores, best of 25: 33 to 37 ms from bytes, 31
    # from the path; resident afterwards 59 MB (53), and 80 if the wrapper goes on holding them.
    source = str(file.path) if file.external_data else file.content
    try:
        # without its fallback, which prints and continues with another provider than requested
        session = onnxruntime.InferenceSession(
            source, options, providers=providers, enable_fallback=0
        )
        tensors = (*session.get_inputs(), *session.get_outputs())
        _ = [tensor.shape for tensor in tensors]  # raises for a name that is not UTF-8
    except Exception as error:  # the runtime has a dozen types without a common parent
        where = "" if execution.provider == "cpu" else f" with {execution.provider}"
        raise UsageError(
            f"{file.path}: ONNX Runtime cannot open it{where}: {first_line(error)}"
        ) from error
    session._model_bytes = None  # read by the fallback alone
    if PROVIDERS[execution.provider].execution_provider not in session.get_providers():
        raise UsageError(
            f"provider: {execution.provider} is installed but does not start on this machine "
            "(its driver or its libraries are missing)"
        )
    return session


def batch_failed(path: Path, images: int, error: Exception) -> DistclsError:
    """The error of a model that cannot compute a batch of this many images."""
    return DistclsError(f"{path}: a batch of {images} failed: {first_line(error)}")
