"""Static int8 quantisation, calibrated on real images, with the layers that suffer left in float.

The layers where the time goes (convolutions and matrix products) get 8-bit weights, a scale for
each output channel, and 8-bit inputs; the logits stay float. Weights use 7 of the 8 bits, since
CPUs without VNNI would overflow with all of them: then accuracy would hang on the machine
(onnxruntime.ai, "Quantize ONNX models", reduce_range).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls import log
from export.graph import hushed
from export.half import name_nodes

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
