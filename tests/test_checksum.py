"""An exported file that was changed on its way is noticed before it answers."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from distcls.errors import UsageError
from distcls.export.graph import write
from distcls.predictor import load_model
from distcls.runtime.onnx_file import KEY, check_checksum, checksum, outputs
from tests import tiny_onnx


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "m.onnx", tiny_onnx.proto(), tiny_onnx.card())
    return tmp_path / "m.onnx"


def test_a_whole_file_passes(path: Path) -> None:
    check_checksum(path)
    assert load_model(path).card.classes == tiny_onnx.COLOURS
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata[KEY]) == checksum(path.read_bytes())


@pytest.mark.parametrize("place", range(5))
def test_a_changed_weight_is_refused(path: Path, place: int) -> None:
    model = onnx.load(path)
    weights = next(t for t in model.graph.initializer if t.name == "weights")
    data = bytearray(weights.raw_data)
    data[place * 7] ^= 1
    weights.raw_data = bytes(data)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match="wrong checksum") as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_a_changed_graph_is_refused(path: Path) -> None:
    model = onnx.load(path)
    model.graph.node[-1].attribute[0].i = 0
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UsageError, match="wrong checksum"):
        check_checksum(path)


def test_other_metadata_does_not_count(path: Path) -> None:
    model = onnx.load(path)
    model.metadata_props.add(key="note", value="copied on a Monday")
    path.write_bytes(model.SerializeToString())
    check_checksum(path)


def test_files_without_one_pass(tmp_path: Path) -> None:
    check_checksum(tiny_onnx.write(tmp_path / "older.onnx"))
    (tmp_path / "x.onnx").write_text("not an ONNX file")
    with pytest.raises(UsageError, match="not an ONNX file"):
        check_checksum(tmp_path / "x.onnx")


def test_names_of_the_outputs(path: Path) -> None:
    assert outputs(path) == ["logits", "probabilities"]
