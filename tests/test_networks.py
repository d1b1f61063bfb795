"""Every named network: built at a small size it answers; exported it answers the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distcls import log
from distcls.data.dataset import Dataset
from distcls.export.certificate import load_images
from distcls.export.onnx import ExportOptions, export
from distcls.imaging import Preprocess
from distcls.model_card import ModelCard
from distcls.models.checkpoint import open_checkpoint, save_checkpoint
from distcls.models.classifier import count_parameters
from distcls.models.config import ModelConfig
from distcls.models.factory import build
from distcls.models.registry import listed
from distcls.runtime.model import OnnxModel
from distcls.task import Task
from tests.pictures import smooth

SMALL = Preprocess(size=(64, 64), resize="squash")
CHEAP = ("simple_cnn", "simple_nn")
EXPORTED = [
    name if name in CHEAP else pytest.param(name, marks=pytest.mark.slow) for name in listed()
]


@pytest.mark.parametrize("name", listed())
def test_two_images_pass_at_64_pixels(name: str) -> None:
    torch.manual_seed(0)
    model = build(ModelConfig(name=name), 7, SMALL)
    assert model.training
    assert count_parameters(model) > 100_000
    images = torch.from_numpy(np.stack([smooth(64, 64, seed=seed) for seed in (1, 2)]))
    model.train()(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        logits = model.eval()(images)
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_it_answers_as_its_checkpoint(name: str, digits: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(ModelConfig(name=name, batch_norm_momentum=1.0), 10, SMALL)
    images = load_images(Dataset.open(digits).split("train"), SMALL, 32)
    with torch.no_grad():  # fresh statistics would let every image's logits vanish
        model.train()(torch.from_numpy(images))
    card = ModelCard(
        architecture={"name": name},
        task=Task(classes=tuple("0123456789")),
        preprocess=SMALL,
        training={"dataset": str(digits)},
    )
    save_checkpoint(tmp_path / "best.pth", model, card)
    expected = open_checkpoint(tmp_path / "best.pth", "cpu").logits(images)
    assert np.ptp(expected, axis=0).max() > 1e-4  # the images do differ to it
    # untrained networks may have logits in the tens, with an error in proportion
    tolerance = 1e-3 * max(1.0, float(np.abs(expected).max()))
    options = ExportOptions(ckpt=tmp_path / "best.pth", limit=64, tolerance=tolerance)
    assert export(options).holds
    found = OnnxModel(tmp_path / "best.onnx").logits(images)
    np.testing.assert_allclose(found, expected, atol=tolerance)


def test_sizes_of_small_networks_are_told_in_thousands() -> None:
    assert [log.amount(number, 2) for number in (286, 1506, 42_000, 4_204_594)] == [
        *("286", "1.5 k", "0.04 M", "4.20 M")
    ]
    assert log.amount(48_600, 1) == "48.6 k"
    assert [log.counted(1, "error"), log.counted(0, "error")] == ["1 error", "0 errors"]
    assert log.counted(2, "process", "processes") == "2 processes"
