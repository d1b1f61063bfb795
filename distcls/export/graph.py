"""What is done to an exported graph besides exporting it: features, heads, a checksum."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distcls.model_card import ModelCard
from distcls.runtime.model import FEATURES, LOGITS, PROBABILITIES
from distcls.runtime.onnx_file import KEY, checksum
from distcls.task import Head


def add_features(model: Any) -> None:
    """Add the output `features`, float32 [N, D], to a ModelProto: what its last layer is given.

    A network whose last layer is no matrix product gets none.
    """
    import onnx

    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    last = producers.get(LOGITS)
    if last is not None and last.op_type == "Add":  # a product and a bias
        last = next((producers[name] for name in last.input if name in producers), None)
    if last is None or last.op_type not in ("Gemm", "MatMul") or FEATURES in producers:
        return
    weights = {tensor.name: tensor for tensor in graph.initializer}.get(last.input[1])
    if weights is None:
        return
    transposed = any(item.name == "transB" and item.i for item in last.attribute)
    width = weights.dims[1 if transposed else 0]
    logits = next(output for output in graph.output if output.name == LOGITS)
    batch = logits.type.tensor_type.shape.dim[0].dim_param or "batch"
    kind = onnx.TensorProto.FLOAT
    graph.node.append(onnx.helper.make_node("Identity", [last.input[0]], [FEATURES], name=FEATURES))
    graph.output.append(onnx.helper.make_tensor_value_info(FEATURES, kind, [batch, width]))


def add_heads(model: Any, heads: Sequence[Head]) -> None:
    """Add an output to a ModelProto for each head: `probabilities:HEAD`, float32 [N, classes]."""
    import onnx

    graph, kind = model.graph, onnx.TensorProto.FLOAT
    whole = next(output for output in graph.output if output.name == PROBABILITIES)
    batch = whole.type.tensor_type.shape.dim[0].dim_param or "batch"
    names, sizes = [output_of(head) for head in heads], [len(head.classes) for head in heads]
    split = onnx.helper.make_tensor("sizes of heads", onnx.TensorProto.INT64, [len(sizes)], sizes)
    graph.initializer.append(split)
    graph.node.append(
        onnx.helper.make_node("Split", [PROBABILITIES, split.name], names, name="heads", axis=1)
    )
    for name, size in zip(names, sizes, strict=True):
        graph.output.append(onnx.helper.make_tensor_value_info(name, kind, [batch, size]))


def output_of(head: Head) -> str:
    """The output of a head by itself."""
    return f"{PROBABILITIES}:{head.name}"


def after_logits(model: Any) -> list[Any]:
    """The nodes that follow from the logits, such as the softmax, in their order."""
    known, found = {LOGITS}, []
    for node in model.graph.node:
        if known & set(node.input):
            known |= set(node.output)
            found.append(node)
    return found


def before_first(model: Any, kinds: set[str]) -> list[Any]:
    """The nodes on the way from the input to the first of one of these kinds: normalisation."""
    known = {tensor.name for tensor in model.graph.input}
    found = []
    for node in model.graph.node:
        if known & set(node.input) and node.op_type not in kinds:
            known |= set(node.output)
            found.append(node)
        elif known & set(node.input):
            break
    return found


def write(path: Path, model: Any, card: ModelCard) -> None:
    """Check a ModelProto, give it its metadata and its checksum, and write it."""
    import onnx

    used = {node.domain for node in model.graph.node} | {""}
    for entry in [entry for entry in model.opset_import if entry.domain not in used]:
        model.opset_import.remove(entry)  # optimisers leave a dozen that no node is of
    onnx.checker.check_model(model, full_check=True)
    metadata = card.to_metadata()
    onnx.helper.set_model_props(model, metadata)
    metadata[KEY] = json.dumps(checksum(model.SerializeToString()))
    onnx.helper.set_model_props(model, metadata)
    path.write_bytes(model.SerializeToString())


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Exporters talk of their own internals on standard output, by warnings and by logging."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
