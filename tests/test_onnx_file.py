"""An `.onnx` file is read once, and verified before it is run."""

from __future__ import annotations

import builtins
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from distcls.commands.predict import main
from distcls.errors import UsageError
from distcls.export.graph import write
from distcls.predictor import load_model
from distcls.runtime import model as model_module
from distcls.runtime.autotune import MIN_IMAGES
from distcls.runtime.model import OnnxModel
from distcls.runtime.onnx_file import KEY, OnnxFile, checksum
from distcls.runtime.providers import ExecutionRequest
from tests import tiny_dataset, tiny_onnx


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "m.onnx", tiny_onnx.proto(), tiny_onnx.card())
    return tmp_path / "m.onnx"


def changed(path: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def save(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def test_what_a_file_says(path: Path) -> None:
    file = OnnxFile(path)
    model = onnx.load(path)
    assert file.content == path.read_bytes()
    assert file.metadata == {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(file.metadata[KEY]) == checksum(file.content)
    assert file.output_names == ("logits", "probabilities")
    assert file.external_data == ()


def test_output_names_are_those_of_the_main_graph(tmp_path: Path) -> None:
    inner = onnx.helper.make_tensor_value_info("inner", TensorProto.FLOAT, [1])
    outer = onnx.helper.make_tensor_value_info("outer", TensorProto.FLOAT, [1])
    branch = onnx.helper.make_graph([], "branch", [], [inner])
    node = onnx.helper.make_node("If", ["x"], ["outer"], then_branch=branch, else_branch=branch)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [outer]))
    assert OnnxFile(save(tmp_path / "m.onnx", model)).output_names == ("outer",)


@pytest.mark.parametrize("place", range(5))
def test_a_changed_weight_is_refused(path: Path, place: int) -> None:
    def flip_a_bit(model: onnx.ModelProto) -> None:
        weights = next(t for t in model.graph.initializer if t.name == "weights")
        data = bytearray(weights.raw_data)
        data[place * 7] ^= 1
        weights.raw_data = bytes(data)

    changed(path, flip_a_bit)
    for opens in (OnnxFile, OnnxModel, load_model):
        with pytest.raises(UsageError, match="wrong checksum") as caught:
            opens(path)
        assert str(path) in str(caught.value)


def test_a_changed_graph_is_refused(path: Path) -> None:
    def keep_dimensions(model: onnx.ModelProto) -> None:
        model.graph.node[-1].attribute[0].i = 0

    with pytest.raises(UsageError, match="wrong checksum"):
        OnnxFile(changed(path, keep_dimensions))


def test_other_metadata_does_not_count(path: Path) -> None:
    changed(path, lambda model: model.metadata_props.add(key="note", value="copied on a Monday"))
    assert OnnxFile(path).metadata["note"] == "copied on a Monday"


def test_files_without_a_checksum_pass(tmp_path: Path) -> None:
    assert KEY not in OnnxFile(tiny_onnx.write(tmp_path / "older.onnx")).metadata


@pytest.mark.parametrize("content", [b"not an ONNX file", b"PK\x03\x04", b"\x72\x03\x0a\x01\xff"])
def test_what_is_no_message_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(UsageError, match=r"x\.onnx is not an ONNX file"):
        OnnxFile(tmp_path / "x.onnx")


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing\.onnx: no such model file"):
        OnnxFile(tmp_path / "missing.onnx")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        OnnxFile(tmp_path)


def with_external_weights(folder: Path, location: str) -> Path:
    model = tiny_onnx.proto(tiny_onnx.card())
    tensor = next(t for t in model.graph.initializer if t.name == "weights")
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    return save(folder / "m.onnx", model)


def test_external_data_inside_the_folder_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(tiny_onnx.weights(3).tobytes())
    file = OnnxFile(with_external_weights(tmp_path, "weights.bin"))
    assert file.external_data == ("weights.bin",)


@pytest.mark.parametrize("location", ["../secret.bin", "sub/../../secret.bin", "ABSOLUTE", "link"])
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "models"
    (folder / "sub").mkdir(parents=True)
    secret = tmp_path / "secret.bin"
    secret.write_bytes(tiny_onnx.weights(3).tobytes())
    if location == "link":
        (folder / "link").symlink_to(os.path.relpath(secret, folder))
    path = with_external_weights(folder, str(secret) if location == "ABSOLUTE" else location)
    for opens in (OnnxFile, OnnxModel):
        with pytest.raises(UsageError, match="outside its folder"):
            opens(path)


def test_external_data_in_a_subgraph_is_found(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor("hidden", TensorProto.FLOAT, [1], [0.0])
    value.data_location = TensorProto.EXTERNAL
    value.external_data.add(key="location", value="../../etc/passwd")
    constant = onnx.helper.make_node("Constant", [], ["c"], value=value)
    branch = onnx.helper.make_graph([constant], "branch", [], [])
    node = onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
    with pytest.raises(UsageError, match="outside its folder"):
        OnnxFile(save(tmp_path / "m.onnx", model))


class Reads:
    """Counts how often a file is opened, in Python or as the path of a session."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        session, plain, low = onnxruntime.InferenceSession, io.open, os.open

        def counted(file: Any, *args: Any, **kwargs: Any) -> Any:
            self.count += isinstance(file, str | os.PathLike) and Path(file) == path
            return plain(file, *args, **kwargs)

        def counted_low(file: Any, *args: Any, **kwargs: Any) -> Any:
            self.count += isinstance(file, str | os.PathLike) and Path(file) == path
            return low(file, *args, **kwargs)

        def counted_session(source: Any, *args: Any, **kwargs: Any) -> Any:
            self.count += isinstance(source, str | os.PathLike)
            return session(source, *args, **kwargs)

        patch.setattr(io, "open", counted)  # what pathlib calls
        patch.setattr(builtins, "open", counted)
        patch.setattr(os, "open", counted_low)
        patch.setattr(model_module.onnxruntime, "InferenceSession", counted_session)


@pytest.mark.parametrize("images", [1, MIN_IMAGES])
def test_opening_reads_once(path: Path, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(path, monkeypatch)
    path.read_bytes()
    assert reads.count == 1  # it does count
    for attempt in range(2):  # the second finds the cached choice, where there is one
        load_model(path, "auto", ExecutionRequest(images=images))
        assert reads.count == 2 + attempt


@pytest.mark.parametrize("more", [[], ["--tta", "flip"], ["--provider", "cpu"]])
def test_predict_reads_once(
    path: Path, tmp_path: Path, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = tiny_dataset.write_images(tmp_path / "in", tiny_dataset.coloured(3)[0])
    reads = Reads(path, monkeypatch)
    main([str(pictures), "--model", str(path), "--out", str(tmp_path / "pre.csv"), *more])
    assert reads.count == 1
