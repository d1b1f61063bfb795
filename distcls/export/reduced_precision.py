"""Exports in reduced precision: fp16, and int8 calibrated on real images.

fp16 halves the file; it is faster on GPUs, slower on CPUs, which convert it back to float32.

int8 quantises convolutions and matrix products: 8-bit weights with a scale for each output channel,
and 8-bit inputs; the logits stay float. Weights use 7 of the 8 bits, since CPUs without VNNI would
overflow with all of them: then accuracy would depend on the machine (onnxruntime.ai, "Quantize ONNX
models", reduce_range).
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distcls import log
from distcls.data.dataset import Split
from distcls.errors import DistclsError
from distcls.export.certificate import (
    AccuracyCertificate,
    certify_accuracy,
    measure_speeds,
    reference_outputs,
)
from distcls.export.graph import after_logits, before_first, hushed, write
from distcls.model_card import ModelCard
from distcls.runtime.model import Model, OnnxModel

OPERATORS = ("Conv", "Gemm", "MatMul")
"""Operators that are quantised. Before the first of them pixels are normalised, in float32."""
BATCH = 16
"""Images at a time while ranges are collected."""
PROBES = 64
"""Images on which the layers' sensitivity is measured."""

Images = NDArray[np.uint8]
Logits = NDArray[np.float32]
Precision = Literal["fp32", "fp16", "int8"]
Check = Callable[[Path, tuple[str, ...]], bool]
"""Whether a quantised file, with these layers left in float, is accurate enough."""


def to_fp16(model: Any) -> Any:
    """A ModelProto of `to_onnx` in float16; its inputs and outputs keep their types."""
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    half = onnx.ModelProto()
    half.CopyFrom(model)
    name_nodes(half)
    # the softmax is removed and put back, so that it takes the float32 logits that are the output
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
            node_block_list=[node.name for node in before_first(half, set(OPERATORS))],
        )
    half.graph.node.extend(kept)
    half.graph.output.extend(kept_outputs)
    del half.graph.value_info[:]  # some types in it are no longer right
    _sort(half)
    return half


def name_nodes(model: Any) -> None:
    """Give every node a unique name, by which it can be selected."""
    used: set[str] = set()
    for place, node in enumerate(model.graph.node):
        if not node.name or node.name in used:
            node.name = f"{node.op_type}_{place}"
        used.add(node.name)


def _sort(model: Any) -> None:
    """Sort the nodes topologically."""
    waiting = list(model.graph.node)
    known = {tensor.name for tensor in (*model.graph.input, *model.graph.initializer)} | {""}
    ordered = []
    while waiting:
        ready = [node for node in waiting if known.issuperset(node.input)]
        assert ready, "an acyclic graph has a node whose inputs are known"
        ordered += ready
        known.update(name for node in ready for name in node.output)
        waiting = [node for node in waiting if not known.issuperset(node.output)]
    ordered = [type(node).FromString(node.SerializeToString()) for node in ordered]
    del model.graph.node[:]
    model.graph.node.extend(ordered)


class Quantizer:
    """Makes int8 files of one graph."""

    def __init__(self, model: Any, images: Images, folder: Path) -> None:
        """`model` is a ModelProto of `to_onnx`; `images`, uint8 [N, H, W, 3], calibrate it."""
        import onnx
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self._images = images
        self._folder = folder
        self._prepared = folder / "prepared.onnx"
        source = folder / "fp32.onnx"  # by its path: a ModelProto would be emptied
        source.write_bytes(model.SerializeToString())
        with hushed():  # batch norm is folded into the convolutions before it
            quant_pre_process(str(source), str(self._prepared), skip_symbolic_shape=True)
        graph = onnx.load(str(self._prepared))
        name_nodes(graph)
        onnx.save(graph, str(self._prepared))
        self.layers = tuple(node.name for node in graph.graph.node if node.op_type in OPERATORS)
        """Names of the layers that can be quantised, from the input on."""

    def write(self, path: Path, layers: Sequence[str]) -> None:
        """Write the graph with these layers in int8."""
        from onnxruntime.quantization import QuantType, quantize_static

        # the ranges are the same for any choice of layers; older releases cannot keep them
        cache = {"calibration_cache_path": str(self._folder / "ranges.json")}
        cached = cache if "calibration_cache_path" in signature(quantize_static).parameters else {}
        with hushed():
            quantize_static(
                str(self._prepared),
                str(path),
                _Reader(self._images),
                op_types_to_quantize=list(OPERATORS),
                nodes_to_quantize=list(layers),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                # 256 different logits would make many classes equal
                extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
                **cached,
            )

    def by_sensitivity(self) -> list[str]:
        """The layers, first the one whose quantisation alone changes the logits most."""
        probes = self._images[:PROBES]
        expected = _logits(self._prepared, probes)
        change: dict[str, float] = {}
        for layer in self.layers:
            path = self._folder / "one.onnx"
            self.write(path, [layer])
            difference = _logits(path, probes) - expected
            change[layer] = float(np.square(difference, dtype=np.float64).mean())
        return sorted(self.layers, key=lambda layer: -change[layer])


def quantize(model: Any, images: Images, check: Check) -> tuple[Any, tuple[str, ...]] | None:
    """An int8 ModelProto that passes `check`, and its layers left in float; None if none passes.

    All layers are quantised first; then the 1, 2, 4, ... most sensitive ones stay in float, up to
    half of them, beyond which nothing would be gained.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix="distcls-int8-") as name:
        quantizer = Quantizer(model, images, Path(name))
        path = Path(name) / "int8.onnx"
        for float_layers in _float_layers(quantizer):
            rest = [layer for layer in quantizer.layers if layer not in float_layers]
            quantizer.write(path, rest)
            if check(path, float_layers):
                return onnx.load(str(path)), float_layers
    return None


def _float_layers(quantizer: Quantizer) -> Iterator[tuple[str, ...]]:
    """What to leave in float, in the order in which it is tried."""
    yield ()
    log.say(f"int8: measuring the sensitivity of {len(quantizer.layers)} layers")
    ranked, most = quantizer.by_sensitivity(), len(quantizer.layers) // 2
    numbers = [2**power for power in range(most.bit_length()) if 2**power < most]
    for number in [*numbers, most] if most else []:
        yield tuple(ranked[:number])


class _Reader:
    """Calibration images as onnxruntime's quantiser takes them, a batch at a time."""

    def __init__(self, images: Images) -> None:
        self._batches = iter(
            [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
        )

    def get_next(self) -> dict[str, Images] | None:
        """The next batch; None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


def _logits(path: Path, images: Images) -> Logits:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    starts = range(0, len(images), BATCH)
    found = [session.run(["logits"], {"images": images[s : s + BATCH]})[0] for s in starts]
    return np.concatenate(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reduction:
    """The model to export in reduced precision, and its allowed losses."""

    precision: Precision
    reference: Model
    """The checkpoint."""
    graph: Any
    """Its ModelProto in fp32."""
    split: Split
    """The images on which accuracy is measured."""
    images: NDArray[np.uint8]
    """Some of them, preprocessed, [N, H, W, 3]: they calibrate int8 and time the model."""
    max_accuracy_drop: float
    """Top-1 that may be lost, in percentage points."""
    min_agreement: float
    """Percent of images that have to keep their prediction."""

    @property
    def card(self) -> ModelCard:
        """The checkpoint's model card, without a certificate."""
        return self.reference.card


def reduce_precision(reduction: Reduction, path: Path) -> AccuracyCertificate:
    """Write the export to `path`, with its certificate in it.

    Raises DistclsError, naming the loss, if it is more than allowed.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix="distcls-export-") as name:
        attempts = _Attempts(reduction, path, Path(name))
        if reduction.precision == "int8":
            quantize(
                reduction.graph,
                reduction.images,
                lambda file, float_layers: attempts.write(onnx.load(file), float_layers),
            )
        else:
            attempts.write(to_fp16(reduction.graph), ())
    if not attempts.made[-1].holds:
        best = max(attempts.made, key=lambda certificate: certificate.top1_agreement)
        raise DistclsError(
            f"{reduction.precision} loses too much: {_loss(best)} on {best.images:,} images of "
            f"{best.split}; --max-accuracy-drop {reduction.max_accuracy_drop:g} and "
            f"--min-agreement {reduction.min_agreement:g} do not allow that"
        )
    return attempts.made[-1]


def _loss(certificate: AccuracyCertificate) -> str:
    head = certificate.worst
    more = f" ({head.drop:.2f} of {head.name!r})" if head is not None else ""
    return (
        f"{certificate.drop:.2f} points of top-1{more}, and "
        f"{100 * certificate.top1_agreement:.2f} % keep their prediction"
    )


class _Attempts:
    """Exports that were tried; the last one is in the file."""

    def __init__(self, reduction: Reduction, path: Path, folder: Path) -> None:
        self.made: list[AccuracyCertificate] = []
        self._reduction = reduction
        self._path = path
        self._expected = reference_outputs(reduction.reference, reduction.split)
        fp32 = folder / "fp32.onnx"
        write(fp32, reduction.graph, reduction.card)
        self._fp32 = OnnxModel(fp32)

    def write(self, graph: Any, float_layers: tuple[str, ...]) -> bool:
        """Write a graph with its certificate; whether that allows it."""
        reduction = self._reduction
        write(self._path, graph, reduction.card)
        exported = OnnxModel(self._path)
        certificate = certify_accuracy(
            exported,
            reduction.split,
            self._expected,
            precision=reduction.precision,
            max_accuracy_drop=reduction.max_accuracy_drop,
            min_agreement=reduction.min_agreement,
            float_layers=float_layers,
            speeds=measure_speeds((exported, self._fp32), reduction.images),
        )
        card = dataclasses.replace(reduction.card, certificate=certificate.to_json())
        write(self._path, graph, card)
        self.made.append(certificate)
        if not certificate.holds and reduction.precision == "int8":
            left = f" with {len(float_layers)} layers in float" if float_layers else ""
            log.say(f"int8{left} loses {_loss(certificate)}")
        return certificate.holds
