"""Columns of the last feature map kept apart, against the features and the plain mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distcls.data.dataset import Dataset
from distcls.errors import UsageError
from distcls.export.certificate import load_images
from distcls.export.onnx import ExportOptions, export
from distcls.imaging import Preprocess
from distcls.model_card import ModelCard
from distcls.models.checkpoint import open_checkpoint, save_checkpoint
from distcls.models.classifier import Classifier
from distcls.models.config import ModelConfig
from distcls.models.factory import DroppedLinear, build
from distcls.runtime.model import OnnxModel
from distcls.task import Task
from tests.pictures import smooth

WIDE = Preprocess(size=(32, 96))
"""After five halvings 1x3."""


def pictures(count: int = 3, size: tuple[int, int] = (32, 96)) -> Tensor:
    return torch.from_numpy(np.stack([smooth(*size, seed=seed) for seed in range(count)]))


def with_statistics(model: Classifier) -> Classifier:
    """Fresh statistics of batch norm would let every image's logits vanish."""
    with torch.no_grad():
        model.train()(pictures(8, tuple(WIDE.size)))
    return model.eval()


def first_linear(model: Classifier) -> nn.Linear:
    """Of the classifier: MobileNetV3's has two, the others' one."""
    layers = [layer for layer in model.backbone.modules() if isinstance(layer, nn.Linear)]
    return layers[-2] if len(layers) == 2 else layers[-1]


def test_the_layer_sees_the_mean_of_each_column() -> None:
    torch.manual_seed(0)
    config = ModelConfig(name="resnet18", pool="columns", batch_norm_momentum=1.0)
    model = with_statistics(build(config, 5, WIDE))
    *below, _, layer = model.backbone.children()
    with torch.no_grad():
        normal = (pictures().permute(0, 3, 1, 2) - model.mean) * model.inverse_std
        features = nn.Sequential(*below)(normal)
        assert features.shape[2:] == (1, 3)
        expected = layer.bias.expand(3, 5).clone()
        for channel in range(features.shape[1]):
            for column in range(3):
                weight = layer.weight[:, channel * 3 + column]
                expected += features[:, channel, :, column].mean(1)[:, None] * weight
        found = model(pictures())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert found.std(0).max() > 1e-3


@pytest.mark.parametrize(
    "name",
    [
        *("mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf", "swin_t"),
        *("timm:resnet18", "adv-efficientnet-b0"),
    ],
)
def test_of_equal_columns_it_is_the_mean_over_all(name: str) -> None:
    torch.manual_seed(0)
    plain = with_statistics(build(ModelConfig(name=name, batch_norm_momentum=1.0), 5, WIDE))
    model = build(ModelConfig(name=name, pool="columns"), 5, WIDE).eval()
    layer, other = first_linear(model), first_linear(plain)
    columns, rest = divmod(layer.in_features, other.in_features)
    assert rest == 0
    assert columns > 1
    weights = plain.state_dict()
    [grown] = [k for k, v in model.state_dict().items() if v.shape != weights[k].shape]
    weights[grown] = weights[grown].repeat_interleave(columns, 1) / columns
    model.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(model(pictures()), plain(pictures()), atol=1e-4, rtol=1e-3)


def test_it_is_drawn_anew_and_keeps_its_dropout() -> None:
    torch.manual_seed(0)
    config = ModelConfig(name="resnet18", pool="columns", dropout=0.3, init="he")
    layer = build(config, 50, WIDE).backbone.fc
    assert isinstance(layer, DroppedLinear)
    assert layer.dropout == 0.3
    assert layer.weight.requires_grad
    assert layer.weight.shape == (50, 512 * 3)
    assert float(layer.weight.detach().var()) == pytest.approx(2 / (512 * 3), rel=0.02)


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "densenet121", "squeezenet1_1", "simple_cnn", "convnext_atto"]
)
def test_a_network_without_such_a_layer_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"^model\.pool: columns given, but this network has no"):
        build(ModelConfig(name=name, pool="columns"), 5, WIDE)


def test_the_norm_of_convnext_takes_each_column() -> None:
    torch.manual_seed(0)
    model = build(ModelConfig(name="convnext_tiny", pool="columns"), 5, WIDE).eval()
    assert first_linear(model).in_features == 768 * 3
    with torch.no_grad():
        assert model(pictures()).shape == (3, 5)


def test_one_column_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^model\.pool: .* of 96x16 pixels .* one column wide"):
        build(ModelConfig(pool="columns"), 5, Preprocess(size=(96, 16)))


def test_it_is_rebuilt_and_exported(digits: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    process = Preprocess(size=(24, 40), resize="squash")
    config = ModelConfig(name="resnet18", pool="columns", batch_norm_momentum=1.0)
    model = build(config, 10, process)
    images = load_images(Dataset.open(digits).split("train"), process, 32)
    with torch.no_grad():  # fresh statistics would let every image's logits vanish
        model.train()(torch.from_numpy(images))
        expected = model.eval()(torch.from_numpy(images)).numpy()
    card = ModelCard(
        architecture={"name": "resnet18", "pool": "columns"},
        task=Task(classes=tuple("0123456789")),
        preprocess=process,
        training={"dataset": str(digits)},
    )
    path = tmp_path / "best.pth"
    save_checkpoint(path, model, card)
    np.testing.assert_allclose(open_checkpoint(path, "cpu").logits(images), expected, atol=1e-4)
    assert export(ExportOptions(ckpt=path, limit=30, quiet=True)).holds
    exported = OnnxModel(tmp_path / "best.onnx")
    np.testing.assert_allclose(exported.logits(images), expected, atol=1e-3)
