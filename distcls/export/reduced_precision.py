"""Variants of an export in lower precision: fp16, int8 calibrated on real images.

Half the size; faster on GPUs, slower on CPUs, which turn it back into float32.

The layers where the time goes (convolutions and matrix products) get 8-bit weights, a scale for
each output channel, and 8-bit inputs; the logits stay float. Weights use 7 of the 8 bits, since
CPUs without VNNI would overflow with all of them: then accuracy would hang on the machine
(onnxruntime.ai, "Quantize ONNX models", reduce_range).
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
from distcls.export.certificate import VariantCertificate, certify_variant, expect, measure_speeds
from distcls.export.graph import after_logits, before_first, hushed, write
from distcls.model_card import ModelCard
from distcls.runtime.model import Model, OnnxModel

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


KINDS = ("Conv", "Gemm", "MatMul")
"""Operators that are quantised."""
BATCH = 16
"""Images at a time while ranges are collected."""
PROBES = 64
"""Images on which the layers' sensitivity is measured."""

Images = NDArray[np.uint8]
Logits = NDArray[np.float32]
Judge = Callable[[Path, tuple[str, ...]], bool]
"""Whether a quantised file, with these layers left in float, is good enough."""


class Quantizer:
    """Makes int8 files of one graph."""

    def __init__(self, model: Any, images: Images, folder: Path) -> None:
        """`model` is a ModelProto of `export.onnx`, `images` uint8 [N, H, W, 3] calibrate it."""
        import onnx
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self._images = images
        self._folder = folder
        self._prepared = folder / "prepared.onnx"
        given = folder / "fp32.onnx"  # by its path: a ModelProto would be emptied
        given.write_bytes(model.SerializeToString())
        with hushed():  # batch norm is folded into the convolutions before it
            quant_pre_process(str(given), str(self._prepared), skip_symbolic_shape=True)
        graph = onnx.load(str(self._prepared))
        name_nodes(graph)
        onnx.save(graph, str(self._prepared))
        self.layers = tuple(node.name for node in graph.graph.node if node.op_type in KINDS)
        """Names of what is quantised, from the input on."""

    def write(self, path: Path, layers: Sequence[str]) -> None:
        """Write the graph with these layers in int8."""
        from onnxruntime.quantization import QuantType, quantize_static

        # the ranges are the same for any choice of layers; older releases cannot keep them
        cache = {"calibration_cache_path": str(self._folder / "ranges.json")}
        kept = cache if "calibration_cache_path" in signature(quantize_static).parameters else {}
        with hushed():
            quantize_static(
                str(self._prepared),
                str(path),
                _Reader(self._images),
                op_types_to_quantize=list(KINDS),
                nodes_to_quantize=list(layers),
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                # 256 different logits would make many classes equal
                extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
                **kept,
            )

    def by_sensitivity(self) -> list[str]:
        """The layers, the one first that moves the logits most when it alone is quantised."""
        probes = self._images[:PROBES]
        expected = _logits(self._prepared, probes)
        moved: dict[str, float] = {}
        for layer in self.layers:
            path = self._folder / "one.onnx"
            self.write(path, [layer])
            difference = _logits(path, probes) - expected
            moved[layer] = float(np.square(difference, dtype=np.float64).mean())
        return sorted(self.layers, key=lambda layer: -moved[layer])


def quantize(model: Any, images: Images, good: Judge) -> tuple[Any, tuple[str, ...]] | None:
    """An int8 ModelProto that is `good`, and its layers left in float; None if there is none.

    All layers are tried first; then 1, 2, 4, ... of those that suffer most stay in float, up to
    half of them, beyond which nothing would be gained.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix="distcls-int8-") as name:
        quantizer = Quantizer(model, images, Path(name))
        path = Path(name) / "int8.onnx"
        for left in _choices(quantizer):
            rest = [layer for layer in quantizer.layers if layer not in left]
            quantizer.write(path, rest)
            if good(path, left):
                return onnx.load(str(path)), left
    return None


def _choices(quantizer: Quantizer) -> Iterator[tuple[str, ...]]:
    """What to leave in float, in the order in which it is tried."""
    yield ()
    log.say(f"int8: measuring how much each of {len(quantizer.layers)} layers loses")
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


Precision = Literal["fp32", "fp16", "int8"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a variant is made from."""

    precision: Precision
    reference: Model
    """The checkpoint."""
    graph: Any
    """Its ModelProto in fp32."""
    split: Split
    """The images that decide."""
    images: NDArray[np.uint8]
    """Some of them, preprocessed, [N, H, W, 3]: they calibrate int8, and speeds are measured."""
    max_accuracy_drop: float
    """Points of top-1 that may be lost."""
    min_agreement: float
    """Percent of images that have to keep their answer."""

    @property
    def card(self) -> ModelCard:
        """The checkpoint's, until there is a certificate."""
        return self.reference.card


def make_variant(recipe: Recipe, part: Path) -> VariantCertificate:
    """Write the variant to `part`, with its certificate in it.

    Raises DistclsError, saying how much is lost, if that is more than may be.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix="distcls-variant-") as name:
        trials = _Trials(recipe, part, Path(name))
        if recipe.precision == "int8":
            quantize(recipe.graph, recipe.images, lambda p, left: trials.good(onnx.load(p), left))
        else:
            trials.good(to_half(recipe.graph), ())
    if not trials.tried[-1].holds:
        best = max(trials.tried, key=lambda certificate: certificate.top1_agreement)
        raise DistclsError(
            f"{recipe.precision} loses too much: {_outcome(best)} on {best.images:,} images of "
            f"{best.split}; --max-accuracy-drop {recipe.max_accuracy_drop:g} and --min-agreement "
            f"{recipe.min_agreement:g} do not allow it"
        )
    return trials.tried[-1]


def _outcome(certificate: VariantCertificate) -> str:
    part = certificate.worst
    more = f" ({part.drop:.2f} of {part.name!r})" if part is not None else ""
    return (
        f"{certificate.drop:.2f} points of top-1{more}, and "
        f"{100 * certificate.top1_agreement:.2f} % keep their answer"
    )


class _Trials:
    """Variants that were tried; the last one is in the file."""

    def __init__(self, recipe: Recipe, part: Path, folder: Path) -> None:
        self.tried: list[VariantCertificate] = []
        self._recipe = recipe
        self._part = part
        self._expected = expect(recipe.reference, recipe.split)
        fp32 = folder / "fp32.onnx"
        write(fp32, recipe.graph, recipe.card)
        self._fp32 = OnnxModel(fp32)

    def good(self, graph: Any, float_layers: tuple[str, ...]) -> bool:
        """Write a variant with its certificate, and tell whether it is good enough."""
        recipe = self._recipe
        write(self._part, graph, recipe.card)
        variant = OnnxModel(self._part)
        certificate = certify_variant(
            variant,
            recipe.split,
            self._expected,
            precision=recipe.precision,
            max_accuracy_drop=recipe.max_accuracy_drop,
            min_agreement=recipe.min_agreement,
            float_layers=float_layers,
            speeds=measure_speeds((variant, self._fp32), recipe.images),
        )
        card = dataclasses.replace(recipe.card, certificate=certificate.to_json())
        write(self._part, graph, card)
        self.tried.append(certificate)
        if not certificate.holds and recipe.precision == "int8":
            kept = f" with {len(float_layers)} layers in float" if float_layers else ""
            log.say(f"int8{kept} loses {_outcome(certificate)}")
        return certificate.holds
