"""ONNX files are opened when they are ours, and refused with a reason when they are not."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from distcls.errors import UsageError
from distcls.runtime.model import OnnxModel
from distcls.runtime.onnx_file import check_external_data
from distcls.runtime.providers import ExecutionConfig
from distcls.task import softmax
from tests import tiny_onnx


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


def test_several_threads_may_ask(tmp_path: Path) -> None:
    model = OnnxModel(tiny_onnx.write(tmp_path / "m.onnx"))
    batches = [images(count) for count in range(1, 40)]
    with ThreadPoolExecutor(4) as pool:
        for batch, logits in zip(batches, pool.map(model.logits, batches), strict=True):
            np.testing.assert_allclose(logits, tiny_onnx.expected_logits(batch), rtol=1e-5)


def test_softmax_is_the_graph_s(tmp_path: Path) -> None:
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


def test_a_foreign_model_is_told_so(tmp_path: Path) -> None:
    assert "no distcls metadata" in refused(save(tmp_path / "m.onnx", tiny_onnx.proto()))


def test_damaged_metadata(tmp_path: Path) -> None:
    model = tiny_onnx.proto(tiny_onnx.card())
    for entry in model.metadata_props:
        if entry.key == "distcls.classes":
            entry.value = '["red", '
    assert "damaged" in refused(save(tmp_path / "m.onnx", model))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"input_name": "pixels"}, "pixels tensor(uint8), expected images uint8"),
        ({"kind": TensorProto.FLOAT}, "tensor(float)"),
        ({"outputs": ("logits",)}, "'probabilities' is missing"),
        ({"outputs": ("probabilities",)}, "'logits' is missing"),
    ],
)
def test_wrong_interfaces(tmp_path: Path, wrong: dict[str, object], told: str) -> None:
    model = tiny_onnx.proto(tiny_onnx.card(), **wrong)  # type: ignore[arg-type]
    assert told in refused(save(tmp_path / "m.onnx", model))


def test_shape_and_classes_have_to_fit_the_card(tmp_path: Path) -> None:
    model = tiny_onnx.proto(tiny_onnx.card(size=(8, 8)))
    onnx.helper.set_model_props(model, tiny_onnx.card(size=(8, 9)).to_metadata())
    assert "expected [N, 8, 9, 3]" in refused(save(tmp_path / "shape.onnx", model))
    onnx.helper.set_model_props(model, tiny_onnx.card(("a", "b")).to_metadata())
    assert "3 logits for 2 class names" in refused(save(tmp_path / "classes.onnx", model))
    fixed = tiny_onnx.proto(tiny_onnx.card())
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    assert "shape" in refused(save(tmp_path / "fixed.onnx", fixed))


def outside(folder: Path, location: str) -> Path:
    """A model whose weights lie in the file `location`."""
    model = tiny_onnx.proto(tiny_onnx.card())
    tensor = next(t for t in model.graph.initializer if t.name == "weights")
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    return save(folder / "m.onnx", model)


def test_external_data_inside_the_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(tiny_onnx.weights(3).tobytes())
    batch = images(3)
    logits = OnnxModel(outside(tmp_path, "weights.bin")).logits(batch)
    np.testing.assert_allclose(logits, tiny_onnx.expected_logits(batch), rtol=1e-5)


@pytest.mark.parametrize("location", ["../secret.bin", "sub/../../secret.bin", "ABSOLUTE", "link"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "models"
    (folder / "sub").mkdir(parents=True)
    secret = tmp_path / "secret.bin"
    secret.write_bytes(tiny_onnx.weights(3).tobytes())
    if location == "link":
        (folder / "link").symlink_to(os.path.relpath(secret, folder))
    path = outside(folder, str(secret) if location == "ABSOLUTE" else location)
    with pytest.raises(UsageError, match="outside its folder"):
        check_external_data(path)
    assert "outside its folder" in refused(path)


def test_external_data_in_a_subgraph_is_found(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor("hidden", TensorProto.FLOAT, [1], [0.0])
    value.data_location = TensorProto.EXTERNAL
    value.external_data.add(key="location", value="../../etc/passwd")
    constant = onnx.helper.make_node("Constant", [], ["c"], value=value)
    branch = onnx.helper.make_graph([constant], "branch", [], [])
    node = onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
    with pytest.raises(UsageError, match="outside its folder"):
        check_external_data(save(tmp_path / "m.onnx", model))
