"""Small networks and their weights, for the tests that load one into the other."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from distcls.imaging import Preprocess
from distcls.model_card import ModelCard
from distcls.models.checkpoint import save_checkpoint
from distcls.models.classifier import Classifier
from distcls.models.config import ModelConfig
from distcls.models.factory import build
from distcls.models.matching import LoadReport, apply_weights
from distcls.models.pretrained import find_weights
from distcls.task import Task

PROCESS = Preprocess(size=(32, 32), mean=(0.5, 0.4, 0.3))


def network(classes: int = 5, seed: int = 0, name: str = "mobilenet_v3_small") -> Classifier:
    torch.manual_seed(seed)
    return build(ModelConfig(name=name), classes, PROCESS)


def plain(classes: int = 5) -> dict[str, Tensor]:
    return dict(network(classes, seed=1).backbone.state_dict())


def load(source: str | Path, model: Classifier, name: str = "mobilenet_v3_small") -> LoadReport:
    weights = find_weights(ModelConfig(name=name, pretrained=str(source)))
    assert weights is not None
    return apply_weights(model, weights)


def assert_taken(model: Classifier, tensors: dict[str, Tensor], report: LoadReport) -> None:
    own = model.backbone.state_dict()
    assert report.loaded
    for name in report.loaded:
        assert torch.equal(own[name], tensors[name]), name


def untrained(
    path: Path,
    digits: Path,
    size: tuple[int, int],
    name: str = "mobilenet_v3_small",
    scale: float = 1.0,
) -> Path:
    """A checkpoint with fresh weights, as if trained on the digits at this size.

    `scale` is that of all weights. `simple_cnn` is exported in a sixth of the time.
    """
    preprocess = Preprocess(size=size, resize="squash")
    torch.manual_seed(0)
    card = ModelCard(
        architecture={"name": name},
        task=Task(classes=tuple("0123456789")),
        preprocess=preprocess,
        training={"dataset": str(digits)},
    )
    model = build(ModelConfig(name=name), 10, preprocess)
    with torch.no_grad():
        for weight in model.backbone.parameters():
            weight.mul_(scale)
    save_checkpoint(path, model, card)
    return path
