"""README's lines for onnxruntime alone answer as `distcls predict` does, on photographs."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from distcls.commands.predict import main
from distcls.imaging import Preprocess, decode_file
from tests import tiny_onnx

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SNIPPETS = [
    text for text in re.findall(r"```python\n(.*?)```", README, re.S) if "onnxruntime" in text
]
SHAPES = [(427, 640), (640, 427), (427, 427), (120, 640), (427, 100), (33, 47), (64, 96), (96, 64)]
"""Heights and widths of the regions that are cut out of both photographs."""


def model(folder: Path, **rule: Any) -> Path:
    card = dataclasses.replace(tiny_onnx.card(), preprocess=Preprocess(**rule))
    return tiny_onnx.write(folder / "best.onnx", card)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, photograph in enumerate(load_sample_images().images):
        for height, width in SHAPES:
            path = folder / f"{number}_{height}x{width}.jpg"
            assert cv2.imwrite(str(path), photograph[:height, -width:, ::-1])
    return folder


def answer(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the snippet's variables are for one photograph; it reads photo.jpg and best.onnx."""
    (path.parent.parent / "photo.jpg").write_bytes(path.read_bytes())
    monkeypatch.chdir(path.parent.parent)
    variables: dict[str, Any] = {}
    exec(SNIPPETS[0], variables)
    return variables


@pytest.mark.parametrize(
    "rule",
    [
        {"size": (64, 96)},
        {"size": (64, 64), "crop_fraction": 0.875},
        {"size": (224, 160), "interpolation": "linear", "crop_fraction": 0.9},
        {"size": (96, 64), "interpolation": "cubic"},
    ],
)
def test_the_same_pixels_and_probabilities(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any]
) -> None:
    path = model(tmp_path, **rule)
    out = tmp_path / "pre.csv"
    main([str(photographs), "--model", str(path), "--out", str(out), "--probabilities", "--quiet"])
    with out.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 2 * len(SHAPES)
    for row in rows:
        found = answer(photographs / row["image_id"], monkeypatch)
        pixels = Preprocess(**rule)(decode_file(photographs / row["image_id"]))
        np.testing.assert_array_equal(found["image"], pixels)
        given = [float(row[f"p:{name}"]) for name in tiny_onnx.COLOURS]
        np.testing.assert_allclose(found["probabilities"][0], given, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", [{"resize": "squash"}, {"resize": "pad"}])
def test_another_rule_is_refused_not_answered_otherwise(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: dict[str, Any]
) -> None:
    model(tmp_path, size=(64, 64), **rule)
    with pytest.raises(AssertionError):
        answer(photographs / "0_427x640.jpg", monkeypatch)


def test_an_unknown_interpolation_is_refused(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model(tmp_path, size=(64, 64), interpolation="lanczos")
    with pytest.raises(KeyError, match="lanczos"):
        answer(photographs / "0_427x640.jpg", monkeypatch)
