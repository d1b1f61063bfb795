"""Half precision: weights and arithmetic in float16, inputs, outputs and normalisation as before.

Half the size; faster on GPUs, slower on CPUs, which turn it back into float32.
"""

from __future__ import annotations

from typing import Any

from export.graph import after_logits, before_first, hushed

FIRST = {"Conv", "Gemm", "MatMul"}
"""What the first layer of a network is; before it, pixels are normalised, in float32."""


def to_half(model: Any) -> Any:
    """A ModelProto of `export.onnx` in float16; its inputs and outputs keep their types."""
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    half = onnx.ModelProto()
    half.CopyFrom(model)
    name_nodes(half)
    # the softmax is taken apart and put back, so that it is of the float32 logits that are given
    tail = after_logits(half)
    names = {name for node in tail for name in node.output}
    outputs = [output for output in half.graph.output if output.name in names]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in tail]
    kept_outputs = [onnx.ValueInfoProto.FromString(o.SerializeToString()) for o in outputs]
    for node in tail:
        half.graph.node.remove(node)
    for output in outputs:
        half.graph.output.remove(output)
    with hushed():
        half = convert_float_to_float16(
            half,
            keep_io_types=True,
            op_block_list=DEFAULT_OP_BLOCK_LIST,
            node_block_list=[node.name for node in before_first(half, FIRST)],
        )
    half.graph.node.extend(kept)
    half.graph.output.extend(kept_outputs)
    del half.graph.value_info[:]  # of some it says now what they no longer are
    _sort(half)
    return half


def name_nodes(model: Any) -> None:
    """Give every node a name of its own, by which it can be chosen."""
    used: set[str] = set()
    for place, node in enumerate(model.graph.node):
        if not node.name or node.name in used:
            node.name = f"{node.op_type}_{place}"
        used.add(node.name)


def _sort(model: Any) -> None:
    """Put the nodes into an order in which each comes after those it needs."""
    waiting = list(model.graph.node)
    known = {tensor.name for tensor in (*model.graph.input, *model.graph.initializer)} | {""}
    ordered = []
    while waiting:
        ready = [node for node in waiting if known.issuperset(node.input)]
        assert ready, "a graph without a circle has a node that is ready"
        ordered += ready
        known.update(name for node in ready for name in node.output)
        waiting = [node for node in waiting if not known.issuperset(node.output)]
    ordered = [type(node).FromString(node.SerializeToString()) for node in ordered]
    del model.graph.node[:]
    model.graph.node.extend(ordered)
