"""Third-party ONNX models: any layout, batch size and kind of output, described by flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from distcls.commands.predict import main
from distcls.errors import UsageError
from distcls.runtime.generic_onnx import read_classes
from tests import tiny_dataset, tiny_onnx
from tests.test_writers import read

COUNT = 11
IMAGES = tiny_dataset.coloured(COUNT)[0]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)


def third_party(
    path: Path,
    *,
    first: bool = True,
    batch: int | str = "N",
    sides: tuple[int | str, int | str] = (8, 8),
    probabilities: bool = False,
    classes: int = 3,
) -> Path:
    """Channel means to logits: input float32, channels first or last."""
    axes = [2, 3] if first else [1, 2]
    weights = 5 * np.eye(3, classes, dtype=np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "w"], ["scores"]),
    ]
    if probabilities:
        nodes.append(helper.make_node("Softmax", ["scores"], ["y"], axis=-1))
    else:
        nodes.append(helper.make_node("Identity", ["scores"], ["y"]))
    constants = [
        numpy_helper.from_array(np.array(axes, np.int64), "axes"),
        numpy_helper.from_array(weights, "w"),
    ]
    shape = [batch, 3, *sides] if first else [batch, *sides, 3]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, classes])
    graph = helper.make_graph(nodes, "g", [image], [result], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for index, image in enumerate(IMAGES):
        assert cv2.imwrite(str(tmp_path / "in" / f"{index:03d}.png"), image[..., ::-1])
    (tmp_path / "classes.txt").write_text("red\ngreen\n\nblue\n")
    return tmp_path / "in"


def run(folder: Path, model: Path, *more: str) -> list[dict[str, Any]]:
    out = folder.parent / "pre.csv"
    flags = ["--classes", str(folder.parent / "classes.txt"), "--overwrite", *more]
    main([str(folder), "--model", str(model), "--out", str(out), "--quiet", *flags])
    return read(out)


def expected(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    values = (IMAGES.astype(np.float64).mean(axis=(1, 2)) / 255 - mean) / std
    exact = np.exp(5 * values)
    return np.asarray(exact / exact.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("batch", ["N", 1, 4])
@pytest.mark.parametrize("probabilities", [True, False])
def test_layouts_batches_and_outputs(
    folder: Path, tmp_path: Path, first: bool, batch: int | str, probabilities: bool
) -> None:
    model = third_party(tmp_path / "f.onnx", first=first, batch=batch, probabilities=probabilities)
    rows = run(folder, model, "--mean", "0.4,0.5,0.6", "--std", "0.2,0.25,0.5", "--probabilities")
    found = [[float(row[f"p:{name}"]) for name in tiny_onnx.COLOURS] for row in rows]
    np.testing.assert_allclose(found, expected(MEAN, STD), rtol=1e-3, atol=1e-6)
    rows = run(folder, model)
    likeliest = [float(row["probability"]) for row in rows]
    plain = expected((0, 0, 0), (1, 1, 1)).max(axis=1)
    np.testing.assert_allclose(likeliest, plain, rtol=1e-3)


def test_any_size_has_to_be_given(folder: Path, tmp_path: Path) -> None:
    model = third_party(tmp_path / "f.onnx", sides=("h", "w"))
    with pytest.raises(UsageError, match="takes any size; give --size"):
        run(folder, model)
    assert len(run(folder, model, "--size", "8,8")) == COUNT
    with pytest.raises(UsageError, match="9,8 does not fit"):
        run(folder, third_party(tmp_path / "g.onnx"), "--size", "9,8")


def test_unsupported_models_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected one \[N, 3\] for the 3 class names"):
        run(folder, third_party(tmp_path / "f.onnx", classes=4))
    with pytest.raises(UsageError, match="was exported by distcls and carries its own"):
        run(folder, tiny_onnx.write(tmp_path / "own.onnx"))
    (tmp_path / "m.pth").write_bytes(b"")
    with pytest.raises(UsageError, match="is not an ONNX file"):
        run(folder, tmp_path / "m.pth")
    out = ["--out", str(tmp_path / "x.csv")]
    model = third_party(tmp_path / "f.onnx")
    with pytest.raises(UsageError, match="or describe it to distcls predict with --classes"):
        main([str(folder), "--model", str(model), *out])
    with pytest.raises(UsageError, match=r"mean: \(0\.5, .* no value without --classes"):
        main([str(folder), "--model", str(model), *out, "--mean", "0.5"])


def test_files_of_class_names(tmp_path: Path) -> None:
    path = tmp_path / "classes"
    path.write_text(json.dumps(["a b", "ü"]))
    assert read_classes(path) == ("a b", "ü")
    path.write_text("a b\n\n ü \n")
    assert read_classes(path) == ("a b", "ü")
    for text, message in [
        ("a\na\n", "each once"),
        ("a", "two or more"),
        ("[1, 2]", "expected names"),
    ]:
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_classes(path)
    path.write_text("[")
    with pytest.raises(UsageError, match="classes: "):
        read_classes(path)
    with pytest.raises(UsageError, match="No such file"):
        read_classes(tmp_path / "missing")
