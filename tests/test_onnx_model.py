"""An exported model computes what NumPy does; any other file is refused with a reason."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from distcls.data.source import FunctionSource
from distcls.errors import DistclsError, UsageError
from distcls.files import digest
from distcls.runtime.model import OnnxModel
from distcls.runtime.onnx_file import OnnxFile
from distcls.runtime.pipeline import stream
from distcls.runtime.providers import ExecutionConfig
from distcls.task import softmax
from tests import tiny_onnx
from tests.e2e.commands import ROOT
from tests.test_onnx_file import with_external_weights


def images(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        OnnxModel(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def save(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("count", [0, 1, 7, 32])
def test_logits_equal_numpy_at_any_batch(tmp_path: Path, count: int) -> None:
    model = OnnxModel(tiny_onnx.write(tmp_path / "m.onnx"), ExecutionConfig(threads=1))
    batch = images(count)
    logits = model.logits(batch)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, tiny_onnx.expected_logits(batch), rtol=1e-5)


def test_a_view_with_gaps_is_taken(tmp_path: Path) -> None:
    model = OnnxModel(tiny_onnx.write(tmp_path / "m.onnx"))
    batch = images(9)[::2, ::-1]
    np.testing.assert_allclose(
        model.logits(batch), tiny_onnx.expected_logits(np.ascontiguousarray(batch)), rtol=1e-5
    )


def test_card_and_provider(tmp_path: Path) -> None:
    card = tiny_onnx.card(("ä", "漢字", 'quo"te'), (5, 7))
    model = OnnxModel(tiny_onnx.write(tmp_path / "m.onnx", card))
    assert model.card == card
    assert model.provider.endswith("ExecutionProvider")


def test_threads_share_a_model(tmp_path: Path) -> None:
    model = OnnxModel(tiny_onnx.write(tmp_path / "m.onnx"))
    batches = [images(count) for count in range(1, 40)]
    with ThreadPoolExecutor(4) as pool:
        for batch, logits in zip(batches, pool.map(model.logits, batches), strict=True):
            np.testing.assert_allclose(logits, tiny_onnx.expected_logits(batch), rtol=1e-5)


def test_probabilities_are_those_of_the_graph(tmp_path: Path) -> None:
    model = OnnxModel(tiny_onnx.write(tmp_path / "m.onnx"))
    batch = images(5)
    expected = model._session.run(["probabilities"], {"images": batch})[0]
    np.testing.assert_allclose(softmax(model.logits(batch)), expected, rtol=1e-5)


@pytest.mark.parametrize("content", [b"", b"not an ONNX file at all", b"\x00" * 100, b"PK\x03\x04"])
def test_what_is_no_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    refused(path)


def test_missing_file_and_truncated_file(tmp_path: Path) -> None:
    assert "no such model" in refused(tmp_path / "m.onnx")
    whole = tiny_onnx.write(tmp_path / "whole.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) * 2 // 3])
    assert "not an ONNX file" in refused(tmp_path / "cut.onnx")


def test_a_third_party_model_is_refused(tmp_path: Path) -> None:
    assert "no distcls metadata" in refused(save(tmp_path / "m.onnx", tiny_onnx.proto()))


def test_damaged_metadata(tmp_path: Path) -> None:
    model = tiny_onnx.proto(tiny_onnx.card())
    for entry in model.metadata_props:
        if entry.key == "distcls.classes":
            entry.value = '["red", '
    assert "damaged" in refused(save(tmp_path / "m.onnx", model))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_name": "pixels"}, "pixels tensor(uint8), expected images uint8"),
        ({"kind": TensorProto.FLOAT}, "tensor(float)"),
        ({"outputs": ("logits",)}, "'probabilities' is missing"),
        ({"outputs": ("probabilities",)}, "'logits' is missing"),
    ],
)
def test_wrong_interfaces(tmp_path: Path, wrong: dict[str, object], message: str) -> None:
    model = tiny_onnx.proto(tiny_onnx.card(), **wrong)  # type: ignore[arg-type]
    assert message in refused(save(tmp_path / "m.onnx", model))


def test_shape_and_classes_have_to_fit_the_card(tmp_path: Path) -> None:
    model = tiny_onnx.proto(tiny_onnx.card(size=(8, 8)))
    onnx.helper.set_model_props(model, tiny_onnx.card(size=(8, 9)).to_metadata())
    assert "expected [N, 8, 9, 3]" in refused(save(tmp_path / "shape.onnx", model))
    onnx.helper.set_model_props(model, tiny_onnx.card(("a", "b")).to_metadata())
    assert "3 logits for 2 class names" in refused(save(tmp_path / "classes.onnx", model))
    fixed = tiny_onnx.proto(tiny_onnx.card())
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    assert "shape" in refused(save(tmp_path / "fixed.onnx", fixed))


def test_logits_of_another_rank_are_refused(tmp_path: Path) -> None:
    model = tiny_onnx.proto(tiny_onnx.card())
    next(node for node in model.graph.node if node.op_type == "MatMul").output[0] = "matrix"
    model.graph.initializer.append(onnx.helper.make_tensor("first", TensorProto.INT64, [1], [0]))
    deeper = onnx.helper.make_node("Unsqueeze", ["matrix", "first"], ["logits"])
    model.graph.node.insert(3, deeper)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    message = refused(save(tmp_path / "m.onnx", model))
    assert "its logits have shape [1, 'N', 3], expected [N, classes]" in message


def test_a_damaged_name_is_refused(tmp_path: Path) -> None:
    content = tiny_onnx.write(tmp_path / "m.onnx").read_bytes()
    assert content.count(b"\x12\x01N") == 3  # the batch dimension of the input and two outputs
    (tmp_path / "m.onnx").write_bytes(content.replace(b"\x12\x01N", b"\x12\x01\xff"))
    assert "cannot open it: 'utf-8' codec" in refused(tmp_path / "m.onnx")


def test_external_weights_are_used(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(tiny_onnx.weights(3).tobytes())
    batch = images(3)
    logits = OnnxModel(with_external_weights(tmp_path, "weights.bin")).logits(batch)
    np.testing.assert_allclose(logits, tiny_onnx.expected_logits(batch), rtol=1e-5)


def test_the_session_does_not_hold_the_file(tmp_path: Path) -> None:
    file = OnnxFile(tiny_onnx.write(tmp_path / "m.onnx"))
    before = sys.getrefcount(file.content)
    model = OnnxModel(file)
    after = sys.getrefcount(file.content)  # `assert` itself would hold it
    assert after == before
    assert model.sha256 == file.sha256 == digest(file.path)


@pytest.mark.parametrize("count", [2, 5])
def test_another_number_of_rows_than_images_is_an_error(tmp_path: Path, count: int) -> None:
    """The mean over the batch too: one row, which NumPy would give to each of the images."""
    model = tiny_onnx.proto(tiny_onnx.card())
    axes = next(t for t in model.graph.initializer if t.name == "axes")
    axes.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 1, 2], np.int64), "axes"))
    mean = next(node for node in model.graph.node if node.op_type == "ReduceMean")
    mean.output[0] = "row"
    row = onnx.helper.make_tensor("shape of a row", TensorProto.INT64, [2], [1, 3])
    model.graph.initializer.append(row)
    reshape = onnx.helper.make_node("Reshape", ["row", row.name], ["means"])
    model.graph.node.insert(2, reshape)
    averaged = OnnxModel(save(tmp_path / "m.onnx", model))
    assert averaged.logits(images(1)).shape == (1, 3)
    expected = rf"m\.onnx: its output 'logits' for {count} images has the shape \[1, 3\], "
    with pytest.raises(DistclsError, match=expected + rf"expected \[{count}, 3\]"):
        averaged.logits(images(count))
    source = FunctionSource(["a", "b"], lambda index: images(2)[index])
    with pytest.raises(DistclsError, match="expected \\[2, 3\\]"):
        list(stream(source, averaged))


def test_another_number_of_logits_than_classes_is_an_error(tmp_path: Path) -> None:
    model = tiny_onnx.proto(tiny_onnx.card())
    product = next(node for node in model.graph.node if node.op_type == "MatMul")
    product.output[0] = "all logits"
    chosen = onnx.helper.make_tensor("chosen", TensorProto.BOOL, [3], [True, True, False])
    model.graph.initializer.append(chosen)
    compress = onnx.helper.make_node("Compress", ["all logits", "chosen"], ["logits"], axis=1)
    model.graph.node.insert(3, compress)  # its width is not known before it is computed
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[1].dim_param = "K"
    opened = OnnxModel(save(tmp_path / "m.onnx", model))
    with pytest.raises(DistclsError, match=r"has the shape \[2, 2\], expected \[2, 3\]"):
        opened.logits(images(2))


def test_the_runtime_reports_to_nobody(tmp_path: Path) -> None:
    """ONNX Runtime 1.32 keeps a number of the device where its telemetry is on."""
    model = ROOT / "tests" / "fixtures" / "v076daf9" / "whole" / "best.onnx"
    program = (
        f"import pathlib, distcls.runtime.model as m; m.OnnxModel(pathlib.Path({str(model)!r}))"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=environment)
    assert list(tmp_path.iterdir()) == []
