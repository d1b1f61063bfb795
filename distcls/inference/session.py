"""An exported model, `best.onnx`, in ONNX Runtime."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from distcls.bundle import ModelCard
from distcls.errors import DistclsError, UsageError
from distcls.inference.external_data import check_external_data
from distcls.inference.providers.installed import EXECUTION, use
from distcls.inference.providers.plan import Plan

INPUT, LOGITS, PROBABILITIES = "images", "logits", "probabilities"


class OnnxModel:
    """A `best.onnx` ready to answer; safe to call from several threads."""

    def __init__(self, path: Path, plan: Plan | None = None) -> None:
        """Open `path` as `plan` says; unset, on the CPU with a thread a core.

        Raises UsageError if it is no ONNX file, was not exported by distcls, names weights outside
        its folder, or if the plan's provider does not work here.
        """
        self.path = Path(path)
        self.plan = plan or Plan()
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

    def replanned(self, plan: Plan) -> OnnxModel | None:
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


def open_session(path: Path, plan: Plan) -> Any:
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
