"""fp16 and int8: certified on the whole split, sensitive layers in float, refused if they lose."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from distcls.data.dataset import Dataset
from distcls.errors import BadValue, DistclsError, UsageError
from distcls.export import onnx as exporting
from distcls.export.certificate import ReferenceOutputs, certify_accuracy, load_images
from distcls.export.graph import add_features, after_logits, before_first
from distcls.export.onnx import ExportOptions
from distcls.export.reduced_precision import (
    OPERATORS,
    Quantizer,
    Reduction,
    quantize,
    reduce_precision,
    to_fp16,
)
from distcls.models.checkpoint import open_checkpoint
from distcls.runtime.model import OnnxModel
from tests import tiny_dataset, tiny_onnx
from tests.small_networks import untrained

LAYERS = ("one", "two", "three", "four", "last")


def convolutions(outlier: float = 1.0) -> onnx.ModelProto:
    """Four convolutions and a matrix product; one channel between the second and the third is
    `outlier` times as large.

    The third makes up for it, so that in float the outlier changes nothing.
    """
    rng = np.random.default_rng(0)
    sizes = (3, 8, 8, 8, 8)
    weights = {
        name: rng.normal(0, (2 / (9 * before)) ** 0.5, (after, before, 3, 3)).astype(np.float32)
        for name, before, after in zip(LAYERS[:4], sizes[:-1], sizes[1:], strict=True)
    }
    weights["two"][-1] *= outlier
    weights["three"][:, -1] /= outlier
    weights["last"] = rng.normal(0, 0.5, (8, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["values"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["values", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["in one"], perm=[0, 3, 1, 2]),
    ]
    for name, after in zip(LAYERS[:4], ("two", "three", "four", "pool"), strict=True):
        nodes += [
            helper.make_node("Conv", [f"in {name}", name], [name + "!"], name=name, pads=[1] * 4),
            helper.make_node("Relu", [name + "!"], [f"in {after}"]),
        ]
    nodes += [
        helper.make_node("GlobalAveragePool", ["in pool"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "last"], ["logits"], name="last"),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
    ]
    image = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 8, 8, 3])
    results = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3])
        for name in ("logits", "probabilities")
    ]
    constants = {"scale": np.array(1 / 255, np.float32), **weights}
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [image], results, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def answers(model: onnx.ModelProto, images: np.ndarray, *names: str) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return list(session.run(list(names) or ["logits"], {"images": images}))


def images(count: int = 64) -> np.ndarray:
    return tiny_dataset.coloured(count)[0]


def test_features_are_what_the_last_layer_is_given() -> None:
    model = convolutions()
    add_features(model)
    onnx.checker.check_model(model, full_check=True)
    features, logits = answers(model, images(), "features", "logits")
    weights = {tensor.name: tensor for tensor in model.graph.initializer}["last"]
    assert features.shape == (64, 8)
    np.testing.assert_allclose(features @ numpy_helper.to_array(weights), logits, rtol=1e-4)
    again = tiny_onnx.proto(tiny_onnx.card())  # its last layer is a MatMul
    add_features(again)
    expected = images().astype(np.float32).mean(axis=(1, 2))
    np.testing.assert_allclose(answers(again, images(), "features")[0], expected, rtol=1e-5)


def test_what_comes_before_and_after_the_network() -> None:
    model = convolutions()
    assert [node.op_type for node in before_first(model, set(OPERATORS))] == [
        "Cast",
        "Mul",
        "Transpose",
    ]
    assert [node.op_type for node in after_logits(model)] == ["Softmax"]


def test_fp16_keeps_the_inputs_and_outputs() -> None:
    model = convolutions()
    add_features(model)
    fp16 = to_fp16(model)
    onnx.checker.check_model(fp16, full_check=True)
    kinds = {tensor.data_type for tensor in fp16.graph.initializer if len(tensor.dims) > 1}
    assert kinds == {TensorProto.FLOAT16}
    names = ("logits", "probabilities", "features")
    found, expected = (answers(each, images(), *names) for each in (fp16, model))
    for own, given in zip(found, expected, strict=True):
        assert own.dtype == np.float32
        np.testing.assert_allclose(own, given, atol=5e-3)
    logits, probabilities, _ = answers(fp16, images(), *names)
    exact = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, exact, rtol=1e-5)  # of the logits that are given


def close(model: onnx.ModelProto, allowed: float) -> Any:
    expected = answers(model, images())[0]
    tried: list[tuple[str, ...]] = []

    def check(path: Path, left: tuple[str, ...]) -> bool:
        tried.append(left)
        found = answers(onnx.load(path), images())[0]
        return bool(np.abs(found - expected).max() < allowed * np.abs(expected).max())

    return check, tried


def quantised(model: onnx.ModelProto) -> set[str]:
    """Names of the layers whose weights are stored in int8."""
    small = {t.name for t in model.graph.initializer if t.data_type == TensorProto.INT8}
    producers = {name: node for node in model.graph.node for name in node.output}
    found = set()
    for node in model.graph.node:
        if node.op_type in OPERATORS and node.input[1] in producers:
            before = producers[node.input[1]]
            if before.op_type == "DequantizeLinear" and before.input[0] in small:
                found.add(node.name)
    return found


def test_all_layers_are_quantised_where_that_is_accurate_enough() -> None:
    check, tried = close(convolutions(), 0.2)
    made = quantize(convolutions(), images(), check)
    assert made is not None
    assert made[1] == ()
    assert tried == [()]
    assert quantised(made[0]) == set(LAYERS)
    logits = answers(made[0], images())[0]
    assert len(np.unique(logits)) > 100  # the logits themselves are not of 256 steps


def test_sensitive_layers_are_left_in_float() -> None:
    model = convolutions(outlier=1000)
    check, tried = close(model, 0.2)
    made = quantize(model, images(), check)
    assert made is not None
    assert set(made[1]) == {"two", "three"}
    assert [len(left) for left in tried] == [0, 1, 2]
    assert quantised(made[0]) == {"one", "four", "last"}


def test_nothing_that_passes_is_none() -> None:
    check, tried = close(convolutions(), -1.0)
    assert quantize(convolutions(), images(), check) is None
    assert [len(left) for left in tried] == [0, 1, 2]  # more than half in float gains nothing


def test_scales_are_per_channel(tmp_path: Path) -> None:
    quantizer = Quantizer(convolutions(), images(), tmp_path)
    assert quantizer.layers == LAYERS
    quantizer.write(tmp_path / "q.onnx", ["two"])
    model = onnx.load(tmp_path / "q.onnx")
    assert quantised(model) == {"two"}
    scales = [tensor for tensor in model.graph.initializer if tensor.name == "two_scale"]
    assert [list(tensor.dims) for tensor in scales] == [[8]]


def test_the_certificate_counts(tmp_path: Path) -> None:
    pictures, labels = tiny_dataset.coloured(40)
    labels[:4] = [(label + 1) % 3 for label in labels[:4]]
    data = tiny_dataset.write(tmp_path / "d", list(pictures), labels, tiny_onnx.COLOURS)
    split = Dataset.open(data).split("test")
    model = OnnxModel(tiny_onnx.write(tmp_path / "m.onnx"))
    logits = tiny_onnx.expected_logits(pictures)
    right = logits.argmax(axis=1) == np.array(labels)
    expected = ReferenceOutputs(
        logits=logits[:, [1, 0, 2]],
        labels=split.labels,
        task=model.card.task,
        provider="x",
    )
    certificate = certify_accuracy(
        model,
        split,
        expected,
        precision="int8",
        max_accuracy_drop=1.0,
        min_agreement=20.0,
        speeds=(2.0, 1.0),
    )
    assert certificate.top1 == right.mean()
    assert certificate.top1_reference == (expected.logits.argmax(1) == np.array(labels)).mean()
    same = (logits.argmax(1) == expected.logits.argmax(1)).mean()
    assert certificate.top1_agreement == pytest.approx(same)
    difference = np.abs(logits - expected.logits).max()
    assert certificate.max_logit_difference == pytest.approx(difference, rel=1e-4)
    assert certificate.to_json()["tolerance"] == certificate.max_logit_difference
    assert certificate.heads == ()
    assert certificate.drop < 0  # the one it is compared with knows less
    assert certificate.holds == (same >= 0.2)
    assert dataclasses.replace(certificate, min_agreement=100 * same).holds
    assert not dataclasses.replace(certificate, min_agreement=100 * same + 0.1).holds
    assert not dataclasses.replace(certificate, max_accuracy_drop=certificate.drop - 0.1).holds
    json.dumps(certificate.to_json(), allow_nan=False)


@pytest.fixture(scope="module")
def checkpoint(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("run") / "best.pth", digits, (16, 16))


@pytest.fixture(scope="module")
def reduction(checkpoint: Path, digits: Path) -> Reduction:
    """A real network in fp32, which takes seconds to export, and what reducing it needs."""
    reference = open_checkpoint(checkpoint, device="cpu")
    split = Dataset.open(digits).split("val")
    return Reduction(
        precision="fp16",
        reference=reference,
        graph=exporting.to_onnx(reference.model, reference.card, 18),
        split=split,
        images=load_images(split, reference.card.preprocess, 64),
        max_accuracy_drop=100,
        min_agreement=0,
    )


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_real_network(reduction: Reduction, tmp_path: Path, precision: Any) -> None:
    before = reduction.graph.graph.SerializeToString()
    out = tmp_path / "model.onnx"
    certificate = reduce_precision(dataclasses.replace(reduction, precision=precision), out)
    assert reduction.graph.graph.SerializeToString() == before  # not emptied, not changed
    assert certificate.holds
    assert certificate.images == 179  # the whole split, not 64
    model = OnnxModel(out)
    for text in (str(tmp_path), "distcls-int8", ".py", "stack_trace"):
        assert text.encode() not in out.read_bytes(), text
    assert model.card.certificate == certificate.to_json()
    assert model.card.certificate["precision"] == precision
    assert out.stat().st_size < (0.6 if precision == "fp16" else 0.4) * len(before)
    exact = reduction.reference.logits(reduction.images)
    spread = np.abs(exact).max()
    allowed = 0.02 if precision == "fp16" else 0.5
    assert np.abs(model.logits(reduction.images) - exact).max() < allowed * spread
    (features,) = model.run(["features"], reduction.images)
    assert features.shape == (64, 1024)


def test_too_much_loss_is_no_file(
    reduction: Reduction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "distcls.export.certificate.ReferenceOutputs.top1", property(lambda self: 0.99)
    )
    strict = dataclasses.replace(reduction, max_accuracy_drop=0.2)
    told = r"fp16 loses too much: .* points of top-1, .* on 179 images of val; --max-acc.* 0\.2"
    with pytest.raises(DistclsError, match=told):
        reduce_precision(strict, tmp_path / "part")


def test_options(checkpoint: Path, tmp_path: Path) -> None:
    assert ExportOptions(ckpt=checkpoint).target.name == "best.onnx"
    assert ExportOptions(ckpt=checkpoint, precision="int8").target.name == "best.int8.onnx"
    with pytest.raises(BadValue, match="max_accuracy_drop: -1"):
        ExportOptions(ckpt=checkpoint, max_accuracy_drop=-1)
    other = tiny_dataset.write(
        tmp_path / "d", list(images(3)), [0, 1, 2], tiny_onnx.COLOURS, splits=["val"] * 3
    )
    with pytest.raises(UsageError, match="no image of val has a class of the model"):
        exporting.export(ExportOptions(ckpt=checkpoint, out=tmp_path / "m.onnx", data=other))
