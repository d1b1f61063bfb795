"""Export: parity on real images or no file."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, load

import distcls
from distcls.commands.export import main
from distcls.errors import DistclsError, UsageError
from distcls.export import onnx
from distcls.export.certificate import certify
from distcls.export.graph import strip_debug_information, write
from distcls.export.onnx import ExportOptions, export
from distcls.imaging import Preprocess
from distcls.model_card import ModelCard
from distcls.models.checkpoint import TorchModel, open_checkpoint
from distcls.models.classifier import Classifier
from distcls.runtime import golden
from distcls.runtime.model import OnnxModel
from distcls.runtime.onnx_file import KEY, OnnxFile
from distcls.task import Task
from tests import tiny_onnx
from tests.e2e.commands import ROOT
from tests.small_networks import untrained


@pytest.fixture(scope="module")
def checkpoint(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with fresh weights of a non-square model, as if trained on the digits."""
    return untrained(tmp_path_factory.mktemp("run") / "best.pth", digits, (28, 36))


@pytest.fixture(scope="module")
def result(checkpoint: Path) -> distcls.ExportResult:
    """The checkpoint, exported from Python."""
    return distcls.export_onnx(checkpoint, checkpoint.with_name("model.onnx"), limit=70, quiet=True)


@pytest.fixture
def exported(result: distcls.ExportResult) -> tuple[Path, Any]:
    """The checkpoint's exported file, and its certificate."""
    return result.path, result.certificate


def test_exported_file_agrees_and_says_so(exported: tuple[Path, Any]) -> None:
    out, certificate = exported
    assert certificate.holds
    assert certificate.images == 70
    card = OnnxModel(out).card
    assert card.certificate == certificate.to_json()
    assert card.classes == tuple("0123456789")
    assert card.preprocess.size == (28, 36)


def test_no_path_of_this_machine_is_in_the_file(
    checkpoint: Path, exported: tuple[Path, Any]
) -> None:
    out, _ = exported
    content = out.read_bytes()
    folders = [checkpoint.parent, Path(torch.__file__).parents[1], Path(onnx.__file__).parents[2]]
    for text in (*map(str, folders), "stack_trace", ".py"):
        assert text.encode() not in content, text
    model = load(out)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert KEY in OnnxFile(out).metadata  # which verifies it
    trained_on = open_checkpoint(checkpoint).card.training["dataset"]
    assert Path(trained_on).is_absolute()
    assert OnnxModel(out).card.training["dataset"] == Path(trained_on).name


def test_debug_information_is_stripped_at_every_depth() -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1], doc_string="where")
    inner = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"], doc_string="/home/me/net.py")],
        *("inner", [], [value]),
    )
    outer = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    outer.metadata_props.add(key="stack_trace", value="/home/me/net.py")
    model = helper.make_model(helper.make_graph([outer], "outer", [], [value]), doc_string="me")
    assert model.SerializeToString().count(b"/home/me") == 3
    size = model.ByteSize()
    strip_debug_information(model)
    assert b"/home/me" not in model.SerializeToString()
    assert b"where" not in model.SerializeToString()
    assert model.graph.node[0].attribute[0].g.node[0].op_type == "Identity"
    assert model.ByteSize() < size


def test_a_graph_that_disagrees_is_not_written(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    checkpoint = untrained(tmp_path / "run" / "best.pth", digits, (28, 36), "simple_cnn")
    right = onnx.to_onnx

    def wrong(model: Classifier, card: ModelCard, opset: int) -> object:
        with torch.no_grad():
            next(iter(model.backbone.parameters()))[0] += 1.0  # what a faulty exporter might do
            graph = right(model, card, opset)
            next(iter(model.backbone.parameters()))[0] -= 1.0
        return graph

    monkeypatch.setattr(onnx, "to_onnx", wrong)
    out = tmp_path / "out" / "model.onnx"
    out.parent.mkdir()
    with pytest.raises(DistclsError, match="beyond the tolerance") as caught:
        export(ExportOptions(ckpt=checkpoint, out=out, limit=40))
    assert caught.value.exit_code == 1
    assert list(out.parent.iterdir()) == []


def test_the_result(result: distcls.ExportResult) -> None:
    assert (result.images, result.agreement) == (70, 1.0)
    assert 0 < result.max_logit_difference < 1e-3
    with result.load(provider="cpu") as predictor:
        assert predictor.path == result.path
    assert repr(result).startswith(f"ExportResult('{result.path}', agreement=100.00% of 70 images,")


@pytest.mark.slow
def test_it_is_the_command(
    checkpoint: Path,
    result: distcls.ExportResult,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--out", str(tmp_path / "own.onnx"), "--limit", "70", "--quiet", "--json"]
    main(["--ckpt", str(checkpoint), *flags])
    said = json.loads(capsys.readouterr().out)
    assert {**said, "out": str(result.path)} == json.loads(json.dumps(result.to_json()))
    assert (tmp_path / "own.onnx").read_bytes() == result.path.read_bytes()


def test_its_options_are_those_of_the_command() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(ExportOptions)}
    ours = inspect.signature(distcls.export_onnx).parameters
    assert ours.keys() == fields.keys() - {"json"}
    for name in ours.keys() - {"ckpt"}:
        assert ours[name].default == fields[name], name


def test_what_cannot_be_exported(checkpoint: Path, exported: tuple[Path, Any]) -> None:
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (None, {}, "ckpt: None is not a path"),
        (checkpoint.parent / "none", {}, "none"),
        (exported[0], {"out": "m.onnx"}, r"model\.onnx"),
        (checkpoint, {"out": exported[0]}, "exists already"),
        (checkpoint, {"precision": "fp8"}, "precision: 'fp8' is not valid, expected one of fp32"),
        (checkpoint, {"limit": 0}, "limit: 0 is not valid"),
        (checkpoint, {"data": 3.5, "out": "m.onnx"}, r"3\.5: no such dataset directory"),
    ]
    for ckpt, options, told in wrong:
        with pytest.raises(UsageError, match=told):
            distcls.export_onnx(ckpt, **options)


def test_an_existing_file_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    out.write_text("precious")
    with pytest.raises(UsageError, match="--overwrite"):
        export(ExportOptions(ckpt=checkpoint, out=out))
    assert out.read_text() == "precious"


class Answers(tiny_onnx.FakeModel):
    """A model with given logits, which proves that it was asked in batches of the right size."""

    def __init__(self, card: ModelCard, table: NDArray[np.float32], allowed: set[int]) -> None:
        self.card = card
        self.table = table
        self.allowed = allowed

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Each image carries its row of the table in its first pixel."""
        assert len(images) in self.allowed
        return self.table[images[:, 0, 0, 0]]


def certificate_for(difference: float, *, tolerance: float = 1e-3) -> tuple[bool, list[float]]:
    """Certify two tables of logits that differ by `difference` in one place."""
    card = ModelCard(
        architecture={}, task=Task(classes=("a", "b")), preprocess=Preprocess(size=(1, 1))
    )
    table = np.tile(np.array([[1.0, 0.0]], np.float32), (10, 1))
    other = table.copy()
    other[9, 1] += difference
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    certificate = certify(
        Answers(card, table, {7, 3}),
        Answers(card, other, {1, 7, 3}),
        images,
        split="val",
        tolerance=tolerance,
        batch_sizes=(1, 7),
    )
    return certificate.holds, [result.top1_agreement for result in certificate.results]


def test_certificate_counts_every_image() -> None:
    assert certificate_for(0.0) == (True, [1.0, 1.0])
    assert certificate_for(0.5) == (False, [1.0, 1.0])
    assert certificate_for(2.0, tolerance=9.0) == (False, [0.9, 0.9])
    assert certificate_for(float("nan")) == (False, [0.9, 0.9])


def test_torch_model_answers_in_plain_numbers(checkpoint: Path) -> None:
    model = open_checkpoint(checkpoint)
    assert isinstance(model, TorchModel)
    logits = model.logits(np.zeros((2, 28, 36, 3), np.uint8))
    assert logits.dtype == np.float32
    assert logits.shape == (2, 10)


def test_golden_samples_are_compared_where_the_file_is_served(
    exported: tuple[Path, Any], tmp_path: Path
) -> None:
    path, _ = exported
    model = OnnxModel(path)
    assert golden.check_golden(model, model.metadata) is True  # to the bit, in a batch and alone
    assert golden.check_golden(model, {}) is None
    logits = json.loads(model.metadata[golden.KEY])
    logits[2][1] += 0.01
    with pytest.raises(DistclsError, match=r"golden samples differ by 1\.0e-02, allowed 1e-03"):
        golden.check_golden(model, {golden.KEY: json.dumps(logits)})
    with pytest.raises(DistclsError, match="damaged"):
        golden.check_golden(model, {golden.KEY: json.dumps(logits[:3])})
    other = tmp_path / "other.onnx"
    write(other, load(str(path)), model.card, {golden.KEY: json.dumps(logits)})
    call = [
        sys.executable,
        "-m",
        "distcls",
        "serve",
        "--model",
        str(other),
        "--check",
        "--port",
        "0",
    ]
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, "golden samples differ" in done.stderr) == (1, True), done.stderr
