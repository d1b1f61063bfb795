"""Model files of others, and damaged ones: refused in one line, or without effect."""

from __future__ import annotations

import io
import json
import os
import pickle
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from distcls.errors import DistclsError, UsageError
from distcls.export.graph import write
from distcls.model_card import ModelCard
from distcls.models.checkpoint import (
    TorchModel,
    content_digest,
    load_tensors,
    open_checkpoint,
    read_checkpoint,
    save_checkpoint,
    save_tensors,
)
from distcls.runtime.model import OnnxModel
from distcls.runtime.onnx_file import METADATA_KEY, OnnxFile, checksum, metadata_checksum
from tests import flipping, tiny_onnx
from tests.test_compatibility import FIXTURES

OLD = FIXTURES / "whole"
SUBSET = 16 * flipping.STRIDE
"""Of the flips that `make test` tries; `make test-slow` tries them all."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A best.pth as it is written now."""
    card, tensors = read_checkpoint(OLD / "best.pth")
    save_checkpoint(tmp_path / "best.pth", tensors, card)
    return tmp_path / "best.pth"


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A best.onnx as it is written now."""
    model = onnx.load(OLD / "best.onnx")
    card = OnnxModel(OLD / "best.onnx").card
    write(tmp_path / "best.onnx", model, card)
    return tmp_path / "best.onnx"


def refused(path: Path, reader: Callable[[Path], Any]) -> str:
    with pytest.raises(UsageError) as caught:
        reader(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 700
    return text


# --- damage


def read_all(path: Path) -> Any:
    card, tensors = read_checkpoint(path)
    return card, list(tensors), content_digest(tensors)


@pytest.mark.row(46)
@pytest.mark.parametrize("stride", [SUBSET, pytest.param(flipping.STRIDE, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_a_checkpoint(checkpoint: Path, stride: int) -> None:
    found = flipping.flip(checkpoint, lambda: read_all(checkpoint), stride=stride, first=64)
    assert found.refused > found.tried // 2
    print(f"best.pth: {found}")


@pytest.mark.row(46)
@pytest.mark.parametrize("stride", [SUBSET, pytest.param(flipping.STRIDE, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_an_old_checkpoint(tmp_path: Path, stride: int) -> None:
    """It has no SHA-256, but the archive's CRC-32."""
    old = tmp_path / "old.pth"
    old.write_bytes((OLD / "best.pth").read_bytes())
    found = flipping.flip(old, lambda: read_all(old), stride=stride)
    assert found.refused > found.tried // 2
    print(f"best.pth of 0.1.0: {found}")


@pytest.mark.row(46)
@pytest.mark.parametrize("stride", [SUBSET, pytest.param(flipping.STRIDE, marks=pytest.mark.slow)])
def test_a_flipped_bit_in_an_exported_file(exported: Path, stride: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), np.uint8)

    def read() -> Any:
        model = OnnxModel(exported)
        return model.card, model.output_names, model.logits(images).tobytes()

    found = flipping.flip(exported, read, stride=stride)
    assert found.refused > found.tried // 2
    print(f"best.onnx: {found}")


@pytest.mark.row(46)
def test_every_bit_of_the_metadata_counts(exported: Path) -> None:
    data = exported.read_bytes()
    start = data.index(b"distcls.classes")
    for number, place in enumerate(range(start, start + 80)):
        exported.write_bytes(flipping.flipped(data, place, number % 8))
        refused(exported, OnnxModel)


@pytest.mark.row(46)
def test_damage_in_a_weight_is_said_as_such(checkpoint: Path) -> None:
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(flipping.flipped(data, len(data) // 2, 6))
    assert "damaged, the checksum of its part" in refused(checkpoint, open_checkpoint)


@pytest.mark.row(47)
def test_a_changed_weight_or_card_under_a_right_archive(checkpoint: Path) -> None:
    """As another program would write it, with the CRC-32 of what it has changed."""
    content = load_tensors(checkpoint)
    name = next(iter(content["model"]))
    content["model"][name][0] += 1
    save_tensors(checkpoint, content)
    assert "wrong checksum, its weights or its card" in refused(checkpoint, open_checkpoint)
    content["model"][name][0] -= 1
    content["card"]["classes"][0] = "seven"
    save_tensors(checkpoint, content)
    assert "wrong checksum, its weights or its card" in refused(checkpoint, open_checkpoint)


@pytest.mark.row(47)
def test_the_checksum_does_not_depend_on_how_tensors_lie() -> None:
    weight = torch.arange(24.0).reshape(2, 3, 2, 2)
    last = weight.to(memory_format=torch.channels_last)
    assert content_digest({"w": weight}) == content_digest({"w": last})
    assert content_digest({"w": weight}) != content_digest({"w": weight.reshape(3, 2, 2, 2)})
    assert content_digest([1, "a"]) != content_digest(["1", "a"]) != content_digest([["1"], "a"])


@pytest.mark.row(47)
def test_old_files_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_checkpoint(OLD / "best.pth")
    assert capsys.readouterr().err == ""  # its archive has checksums
    OnnxModel(OLD / "best.onnx")
    assert "before metadata had a checksum" in capsys.readouterr().err
    torch.serialization.set_crc32_options(False)
    try:
        save_tensors(tmp_path / "w.pth", {"w": torch.ones(3), "v": torch.zeros(2)})
    finally:
        torch.serialization.set_crc32_options(True)
    load_tensors(tmp_path / "w.pth")
    assert "whether it is damaged cannot be known" in capsys.readouterr().err


@pytest.mark.row(47)
def test_the_checksum_of_the_metadata_cannot_be_taken_away_alone(exported: Path) -> None:
    model = onnx.load(exported)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**entries, "distcls.sha256": ""})
    exported.write_bytes(model.SerializeToString())
    assert "wrong checksum" in refused(exported, OnnxModel)
    del entries["distcls.sha256"]
    onnx.helper.set_model_props(model, entries)
    exported.write_bytes(model.SerializeToString())
    assert "wrong checksum" in refused(exported, OnnxModel)


@pytest.mark.row(47)
@pytest.mark.parametrize("key", ["distcls.classes", "distcls.sha256", METADATA_KEY])
def test_a_key_twice_is_refused(exported: Path, key: str) -> None:
    model = onnx.load(exported)
    value = next(entry.value for entry in model.metadata_props if entry.key == key)
    model.metadata_props.add(key=key, value=value)
    exported.write_bytes(model.SerializeToString())
    assert f"its metadata has {key!r} twice" in refused(exported, OnnxModel)


# --- forgery: the checksums are right


def nested(levels: int = 40) -> list[Any]:
    """A list of lists of the same list: small in memory, without end when it is printed."""
    value: list[Any] = ["x"]
    for _ in range(levels):
        value = [value] * 10
    return value


def endless() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["again"] = value
    return value


BAD_CARDS: list[tuple[str, Any]] = [
    ("architecture", {"name": 7}),
    ("architecture", {"name": "x" * 5000}),
    ("architecture", {}),
    ("architecture", {"name": "resnet9999"}),
    ("architecture", {"name": "simple_cnn", "norm_momentum": 0.1, "batch_norm_momentum": 0.1}),
    ("architecture", [1]),
    ("classes", "abc"),
    ("classes", ["a", "a"]),
    ("classes", ["a", None]),
    ("classes", ["a", 7]),
    ("classes", ["a", "\ud800"]),
    ("preprocess", None),
    *(
        ("preprocess", change)
        for change in (
            {"size": [28.0, 28.0]},
            {"size": [28]},
            {"size": [28, True]},
            {"size": [28, 10**9]},
            {"resize": "fill"},
            {"interpolation": 3},
            {"crop_fraction": 1e-6},
            {"crop_fraction": float("nan")},
            {"mean": [0.1, 0.2]},
            {"mean": ["a", "b", "c"]},
            {"mean": [float("inf")] * 3},
            {"std": [0, 1, 1]},
            {"background": [1, 2, 999]},
            {"sharpen": True},
        )
    ),
    ("training", [1]),
    ("training", {"dataset": 3}),
    ("certificate", "x"),
    ("certificate", {"tolerance": "x"}),
    ("certificate", {"tolerance": -1}),
    ("certificate", {"tolerance": float("nan")}),
    ("targets", {"kind": "heads"}),
    ("targets", {"kind": "x", "classes": []}),
    ("targets", {"kind": "multi_label", "classes": list("0123456789"), "thresholds": [2]}),
    ("format", "1"),
    ("invented", 1),
]


def forged(card: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    if key == "preprocess" and isinstance(value, dict):
        value = {**card[key], **value}
    return {**card, key: value}


SHARED: dict[str, Callable[[], tuple[str, Any]]] = {
    "endless architecture": lambda: ("architecture", endless()),
    "nested name": lambda: ("architecture", {"name": nested()}),
    "nested classes": lambda: ("classes", nested()),
    "nested size": lambda: ("preprocess", {"size": nested()}),
    "nested resize": lambda: ("preprocess", {"resize": nested()}),
    "endless training": lambda: ("training", endless()),
    "nested format": lambda: ("format", nested()),
}
"""What a pickle can hold and JSON cannot."""


def refused_in_a_checkpoint(path: Path, key: str, value: Any) -> None:
    content = torch.load(OLD / "best.pth", weights_only=True)
    content["card"] = forged(content["card"], key, value)
    torch.save(content, path)
    began = time.monotonic()
    refused(path, open_checkpoint)
    assert time.monotonic() - began < 5


@pytest.mark.row(47)
@pytest.mark.parametrize(("key", "value"), BAD_CARDS)
def test_a_card_that_is_none_is_one_line(exported: Path, key: str, value: Any) -> None:
    refused_in_a_checkpoint(exported.with_name("forged.pth"), key, value)
    if key == "architecture" and not isinstance(value, list):
        return  # a network that nobody builds from an exported file
    card = forged(OnnxModel(exported).card.to_json(), key, value)
    resigned(exported, {f"distcls.{name}": json.dumps(each) for name, each in card.items()})
    refused(exported, OnnxModel)


@pytest.mark.row(47)
@pytest.mark.parametrize("name", SHARED)
def test_a_card_without_end_is_one_line(tmp_path: Path, name: str) -> None:
    refused_in_a_checkpoint(tmp_path / "forged.pth", *SHARED[name]())


@pytest.mark.row(47)
@pytest.mark.parametrize("text", ["[" * 100_000, "{", "1e999999x", '{"a": 1, "a": 2}', "9" * 5000])
def test_metadata_that_is_no_json_is_one_line(exported: Path, text: str) -> None:
    card = OnnxModel(exported).card.to_metadata()
    resigned(exported, {**card, "distcls.training": text})
    refused(exported, OnnxModel)


def resigned(path: Path, metadata: dict[str, str]) -> None:
    model = onnx.load(path)
    signed = {**metadata, "distcls.sha256": json.dumps(checksum(model.SerializeToString()))}
    signed[METADATA_KEY] = json.dumps(metadata_checksum(signed))
    onnx.helper.set_model_props(model, signed)
    path.write_bytes(model.SerializeToString())


@pytest.mark.row(47)
def test_compressed_parts_are_refused_unread(tmp_path: Path) -> None:
    """Three megabytes would be three gigabytes."""
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    assert "compressed, which torch.save never does" in refused(path, load_tensors)


@pytest.mark.row(47)
@pytest.mark.filterwarnings("error")
def test_of_a_refused_pickle_torch_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    for protocol in (2, 3, 4, 5):
        path.write_bytes(pickle.dumps({"a": print}, protocol))
        assert "none of it was executed" in refused(path, open_checkpoint)


@pytest.mark.row(47)
def test_tensors_that_repeat_their_memory_are_refused(tmp_path: Path) -> None:
    card, _ = read_checkpoint(OLD / "best.pth")
    huge = torch.zeros(1).expand(1 << 40)
    path = tmp_path / "bomb.pth"
    save_tensors(path, {"card": card.to_json(), "model": {"w": huge}, "sha256": "0" * 64})
    assert "repeat their memory" in refused(path, read_checkpoint)
    many = {str(number): torch.zeros(1).expand(1 << 20) for number in range(64)}
    save_tensors(path, {"card": card.to_json(), "model": many, "sha256": "0" * 64})
    assert "repeat their memory" in refused(path, read_checkpoint)


@pytest.mark.row(47)
@pytest.mark.parametrize("weights", [None, [1], {7: torch.ones(1)}, {"w": 3}, {}])
def test_weights_that_are_none_are_one_line(tmp_path: Path, weights: Any) -> None:
    card, _ = read_checkpoint(OLD / "best.pth")
    path = tmp_path / "forged.pth"
    save_tensors(path, {"card": card.to_json(), "model": weights})
    assert "do not fit" in refused(path, open_checkpoint)


@pytest.mark.row(47)
@pytest.mark.parametrize("reader", [OnnxFile, load_tensors])
def test_what_has_no_end_is_not_opened(tmp_path: Path, reader: Callable[[Path], Any]) -> None:
    pipe = tmp_path / "model"
    os.mkfifo(pipe)
    assert "not a regular file" in refused(pipe, reader)
    pipe.unlink()
    pipe.symlink_to("/dev/zero")
    assert "not a regular file" in refused(pipe, reader)


@pytest.mark.row(47)
def test_zeros_are_no_onnx_file(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(bytes(1 << 24))
    began = time.monotonic()
    refused(tmp_path / "m.onnx", OnnxFile)
    assert time.monotonic() - began < 1


@pytest.mark.row(47)
def test_one_answer_for_a_batch_is_no_answer_for_each_image(tmp_path: Path) -> None:
    model = tiny_onnx.proto(tiny_onnx.card())
    graph = model.graph
    graph.node[2].output[0] = "each"
    axes = onnx.numpy_helper.from_array(np.array([0], np.int64), "first")
    graph.initializer.append(axes)
    node = onnx.helper.make_node("ReduceMean", ["each", "first"], ["logits"], keepdims=1)
    graph.node.insert(3, node)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    opened = OnnxModel(tmp_path / "m.onnx")
    with pytest.raises(DistclsError, match=r"for 5 images has the shape \[1, 3\]"):
        opened.logits(np.zeros((5, 8, 8, 3), np.uint8))


@pytest.mark.row(47)
def test_nor_is_it_of_a_network_of_ones_own() -> None:
    opened: TorchModel = open_checkpoint(OLD / "best.pth", device="cpu")
    forward = opened.model.forward
    opened.model.forward = lambda images: forward(images).mean(0, keepdim=True)  # type: ignore[method-assign]
    with pytest.raises(DistclsError, match=r"for 5 images has the shape \[1, 10\]"):
        opened.logits(np.zeros((5, 28, 28, 3), np.uint8))


@pytest.mark.row(47)
def test_a_card_survives_its_own_schema() -> None:
    for run in ("whole", "run_heads", "run_labels"):
        card, _ = read_checkpoint(FIXTURES / run / "best.pth")
        assert ModelCard.from_json(card.to_json(), "here") == card
        stream = io.BytesIO()
        torch.save(card.to_json(), stream)  # as plain values
        assert ModelCard.from_metadata(card.to_metadata(), "here") == card
