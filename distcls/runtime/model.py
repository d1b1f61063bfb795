"""An exported model, `best.onnx`, in ONNX Runtime.

A stream carries one array an image, so a model with features answers with both in one row.
"""

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
from distcls.runtime.onnx_file import check_external_data, outputs
from distcls.runtime.providers import EXECUTION, ExecutionConfig, use


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
    def plan(self) -> ExecutionConfig:
        """The model's own."""
        return self._model.plan

    def logits(self, images: NDArray[np.uint8]) -> Floats:
        """Logits and features side by side, float32 [N, K + D]."""
        if not len(images):
            return np.zeros((0, self.answer_width), np.float32)
        return np.concatenate(self._model.run([LOGITS, FEATURES], images), axis=1)


INPUT, LOGITS, PROBABILITIES = "images", "logits", "probabilities"


class OnnxModel:
    """A `best.onnx` ready to answer; safe to call from several threads."""

    def __init__(self, path: Path, plan: ExecutionConfig | None = None) -> None:
        """Open `path` as `plan` says; unset, on the CPU with a thread a core.

        Raises UsageError if it is no ONNX file, was not exported by distcls, names weights outside
        its folder, or if the plan's provider does not work here.
        """
        self.path = Path(path)
        self.plan = plan or ExecutionConfig()
        if not self.path.is_file():
            raise UsageError(f"{path}: no such model file")
        check_external_data(self.path)
        self._session = open_session(self.path, self.plan)
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

    def replanned(self, plan: ExecutionConfig) -> OnnxModel | None:
        """The same model under another plan, sharing the session; None if the session differs."""
        if self.plan.session != plan.session:
            return None
        same = copy.copy(self)
        same.plan = plan
        return same

    def outputs(self) -> list[tuple[str, int]]:
        """Names of the outputs [N, width] and their widths; 0 for one that the file leaves open."""
        shapes = [(tensor.name, tensor.shape[-1]) for tensor in self._session.get_outputs()]
        return [(name, width if isinstance(width, int) else 0) for name, width in shapes]

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Preprocessed images, uint8 RGB [N, H, W, 3], to logits, float32 [N, K]."""
        if not len(images):
            return np.zeros((0, len(self._card.classes)), np.float32)
        return self.run([LOGITS], images)[0]

    def run(self, outputs: Sequence[str], images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """The outputs of these names, float32, for preprocessed images, uint8 RGB [N, H, W, 3].

        Raises DistclsError if the runtime cannot compute them.
        """
        batch = np.ascontiguousarray(images)
        try:
            found = self._session.run(list(outputs), {INPUT: batch})
        except Exception as error:  # see `open_session`
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DistclsError(f"{self.path}: a batch of {len(images)} failed: {reason}") from error
        return [np.asarray(values, np.float32) for values in found]

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


def open_session(path: Path, plan: ExecutionConfig) -> Any:
    """An `onnxruntime.InferenceSession` as `plan` says, of which any number of threads may ask.

    Raises UsageError if the file cannot be opened, or if the plan's provider does not work here.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # the runtime writes to standard error by itself; we tell, once
    # Threads that spin between operators take the cores from the threads that decode images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = use(plan, options)
    try:
        # without its fallback, which prints and goes on with another provider than was asked for
        session = onnxruntime.InferenceSession(
            str(path), options, providers=providers, enable_fallback=0
        )
    except Exception as error:  # the runtime has a dozen types without a common parent
        reason = (str(error) or type(error).__name__).splitlines()[0]
        where = "" if plan.provider == "cpu" else f" with {plan.provider}"
        raise UsageError(f"{path}: ONNX Runtime cannot open it{where}: {reason}") from error
    if EXECUTION[plan.provider] not in session.get_providers():
        raise UsageError(
            f"provider: {plan.provider} is installed but does not start on this machine "
            "(its driver or its libraries are missing)"
        )
    return session
