"""Editing and writing exported graphs: extra outputs, no debug information, a checksum."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distcls.model_card import ModelCard
from distcls.runtime.model import FEATURES, LOGITS, PROBABILITIES
from distcls.runtime.onnx_file import KEY, METADATA_KEY, checksum, metadata_checksum
from distcls.task import Head, Task


def add_features(model: Any) -> None:
    """Add the output `features`, float32 [N, D], to a ModelProto: the input of its last layer.

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


SCALED, SCALES = "calibrated logits", "inverse temperatures"
"""Names in a calibrated graph: the logits times a constant [1, classes], and that constant."""


def set_temperatures(model: Any, task: Task) -> None:
    """Have the probabilities of a ModelProto be those of the logits divided by the temperatures of
    a task, or of the plain logits without them; the output `logits` stays as it is.

    Raises ValueError for a graph whose probabilities are not computed from its logits.
    """
    import onnx

    graph = model.graph
    if task.scales is None and not any(SCALED in node.output for node in graph.node):
        return
    for tensor in [tensor for tensor in graph.initializer if tensor.name == SCALES]:
        graph.initializer.remove(tensor)
    for node in [node for node in graph.node if SCALED in node.output]:
        graph.node.remove(node)
    users = [node for node in graph.node if {LOGITS, SCALED} & set(node.input)]
    if not users:
        raise ValueError("its probabilities are not computed from its logits")
    source = LOGITS if task.scales is None else SCALED
    for node in users:
        for place, name in enumerate(node.input):
            if name in (LOGITS, SCALED):
                node.input[place] = source
    if task.scales is not None:
        graph.initializer.append(onnx.numpy_helper.from_array(task.scales[None], SCALES))
        scale = onnx.helper.make_node("Mul", [LOGITS, SCALES], [SCALED], name=SCALED)
        graph.node.insert(list(graph.node).index(users[0]), scale)


def output_of(head: Head) -> str:
    """Name of the output of one head."""
    return f"{PROBABILITIES}:{head.name}"


def after_logits(model: Any) -> list[Any]:
    """The nodes that depend on the logits, such as the softmax, in graph order."""
    known, found = {LOGITS}, []
    for node in model.graph.node:
        if known & set(node.input):
            known |= set(node.output)
            found.append(node)
    return found


def before_first(model: Any, operators: set[str]) -> list[Any]:
    """The nodes between the input and the first of these operators: normalisation."""
    known = {tensor.name for tensor in model.graph.input}
    found = []
    for node in model.graph.node:
        if known & set(node.input) and node.op_type not in operators:
            known |= set(node.output)
            found.append(node)
        elif known & set(node.input):
            break
    return found


def strip_debug_information(message: Any) -> None:
    """Clear the doc strings and the metadata of a ModelProto and of all that is inside it.

    torch's exporter records there, for every node, a stack trace with the source paths of the
    machine that exported: nothing that a model should publish, and 10 to 20 % of a small file.
    """
    for field, value in message.ListFields():
        if field.name in ("doc_string", "metadata_props"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for child in [value] if hasattr(value, "ListFields") else value:
                strip_debug_information(child)


def write(path: Path, model: Any, card: ModelCard, more: Mapping[str, str] | None = None) -> None:
    """Check a ModelProto, give it the temperatures of the card's task, its metadata (the card,
    `more`) and its checksums, write it."""
    import onnx

    set_temperatures(model, card.task)
    used = {node.domain for node in model.graph.node} | {""}
    for entry in [entry for entry in model.opset_import if entry.domain not in used]:
        model.opset_import.remove(entry)  # optimisers leave a dozen that no node uses
    onnx.checker.check_model(model, full_check=True)
    metadata = card.to_metadata() | dict(more or {})
    onnx.helper.set_model_props(model, metadata)
    metadata[KEY] = json.dumps(checksum(model.SerializeToString()))
    metadata[METADATA_KEY] = json.dumps(metadata_checksum(metadata))
    onnx.helper.set_model_props(model, metadata)
    path.write_bytes(model.SerializeToString())


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Silence exporters, which report on internals by printing, warnings and logging."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
