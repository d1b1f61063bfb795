"""A real ONNX model small enough for a test: logits are weighted means of the colour channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from distcls.imaging import Preprocess
from distcls.model_card import ModelCard
from distcls.runtime.providers import ExecutionConfig
from distcls.task import Task

COLOURS = ("red", "green", "blue")


class FakeModel:
    """What a `Model` has besides its logits; a test's own model adds `card` and `logits`."""

    card: ModelCard
    provider = "test"
    execution = ExecutionConfig()

    @property
    def output_width(self) -> int:
        """One logit per class."""
        return len(self.card.classes)


def card(classes: tuple[str, ...] = COLOURS, size: tuple[int, int] = (8, 8)) -> ModelCard:
    """A card for `classes`; squash, so that an image's mean colour stays what it is."""
    preprocess = Preprocess(size=size, resize="squash")
    return ModelCard(
        architecture={"name": "tiny"}, task=Task(classes=classes), preprocess=preprocess
    )


def weights(num_classes: int) -> NDArray[np.float32]:
    """[3, K]: the first three classes are red, green and blue; the others are mixtures."""
    mixtures = np.random.default_rng(0).uniform(0, 0.5, (3, max(0, num_classes - 3)))
    return np.concatenate([np.eye(3), mixtures], axis=1)[:, :num_classes].astype(np.float32) / 16


def expected_logits(images: NDArray[np.uint8], num_classes: int = 3) -> NDArray[np.float32]:
    """What the model returns, in NumPy."""
    return images.astype(np.float32).mean(axis=(1, 2)) @ weights(num_classes)


def proto(
    model_card: ModelCard | None = None,
    *,
    input_name: str = "images",
    kind: int = TensorProto.UINT8,
    outputs: tuple[str, ...] = ("logits", "probabilities"),
) -> onnx.ModelProto:
    """The model; arguments make it wrong in one way each. Without a card: no metadata."""
    known = model_card or card()
    height, width = known.preprocess.size
    number = len(known.classes)
    nodes = [
        helper.make_node("Cast", [input_name], ["values"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["values", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
    ]
    constants = [
        numpy_helper.from_array(np.array([1, 2], np.int64), "axes"),
        numpy_helper.from_array(weights(number), "weights"),
    ]
    image = helper.make_tensor_value_info(input_name, kind, ["N", height, width, 3])
    results = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", number]) for name in outputs
    ]
    graph = helper.make_graph(nodes, "tiny", [image], results, constants)
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    if model_card is not None:
        helper.set_model_props(model, model_card.to_metadata())
    onnx.checker.check_model(model)
    return model


def write(path: Path, model_card: ModelCard | None = None) -> Path:
    """Write a right model, by default for the three colours at 8 by 8."""
    path.write_bytes(proto(model_card or card()).SerializeToString())
    return path
