"""The model card: the same from a checkpoint and from ONNX metadata, and refused if it is none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from distcls.errors import UsageError
from distcls.imaging import Preprocess
from distcls.model_card import ModelCard
from distcls.task import Task

CARD = ModelCard(
    architecture={"name": "mobilenet_v3_small", "stem_stride": 1, "dropout": 0.2},
    task=Task(classes=("Zoë's cat", "犬", "a, b\n")),
    preprocess=Preprocess(size=(28, 40), resize="pad", interpolation="cubic"),
    training={"epoch": 3, "top1": 0.5},
    certificate={"images": 10, "largest_difference": 1e-6},
)


def test_json_round_trip() -> None:
    values = json.loads(json.dumps(CARD.to_json()))
    assert ModelCard.from_json(values, "here") == CARD
    assert values["version"]


def test_metadata_round_trip_passes_over_keys_of_others() -> None:
    metadata = CARD.to_metadata()
    assert all(key.startswith("distcls.") for key in metadata)
    assert all(isinstance(value, str) for value in metadata.values())
    assert ModelCard.from_metadata({**metadata, "author": "me"}, "here") == CARD


def test_a_card_without_certificate() -> None:
    plain = ModelCard(
        architecture={}, task=Task(classes=("a",)), preprocess=Preprocess(size=(1, 1))
    )
    assert ModelCard.from_metadata(plain.to_metadata(), "here") == plain
    assert plain.certificate is None


def test_a_newer_format_is_named() -> None:
    with pytest.raises(UsageError, match=r"^m.onnx: model format 99 is not known.*newer"):
        ModelCard.from_json({**CARD.to_json(), "format": 99}, "m.onnx")


@pytest.mark.parametrize("key", ["format", "architecture", "classes", "preprocess", "training"])
def test_a_missing_key(key: str) -> None:
    values = CARD.to_json()
    del values[key]
    with pytest.raises(UsageError, match=rf"^m.onnx: not a model written by distcls.*{key}"):
        ModelCard.from_json(values, "m.onnx")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", "resnet"),
        ("architecture", None),
        ("classes", 3),
        ("preprocess", None),
        ("preprocess", {"size": [0, 3]}),
        ("preprocess", {"size": [3, 3], "resize": "stretch"}),
        ("preprocess", {"size": [3, 3], "colour": "grey"}),
        ("training", 7),
    ],
)
def test_a_value_of_the_wrong_kind(key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"^m.onnx: not a model written by distcls"):
        ModelCard.from_json({**CARD.to_json(), key: value}, "m.onnx")


@pytest.mark.parametrize("values", [None, [], "card", 3])
def test_something_else_entirely(values: Any) -> None:
    with pytest.raises(UsageError, match=r"^m.onnx: not a model"):
        ModelCard.from_json(values, "m.onnx")


def test_metadata_of_others_and_damaged_metadata() -> None:
    with pytest.raises(UsageError, match=r"^m.onnx: carries no distcls metadata"):
        ModelCard.from_metadata({"author": "me"}, "m.onnx")
    with pytest.raises(UsageError, match=r"^m.onnx: its distcls metadata is damaged"):
        ModelCard.from_metadata({**CARD.to_metadata(), "distcls.classes": "[1,"}, "m.onnx")
