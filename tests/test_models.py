"""Networks: their head, stem, normalisation and size, against torchvision's own figures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.transforms.functional import normalize

from distcls.errors import BadValue, UsageError
from distcls.imaging import Preprocess
from distcls.models.classifier import Classifier, count_macs, count_parameters
from distcls.models.config import ModelConfig
from distcls.models.factory import build

IMAGENET = Preprocess(size=(224, 224))


def feature_sides(model: Classifier, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Height and width after each convolution, one pass over an image of `size`."""
    seen: list[tuple[int, int]] = []

    def note(_: nn.Module, __: object, output: Tensor) -> None:
        seen.append((output.shape[2], output.shape[3]))

    features = model.backbone.features
    hooks = [layer.register_forward_hook(note) for layer in features]
    with torch.no_grad():
        model.eval()(torch.zeros(1, *size, 3, dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", ["mobilenet_v3_large", "mobilenet_v3_small", "mobilenet_v2"])
def test_parameters_and_macs_are_the_published_ones(name: str) -> None:
    meta = get_model_weights(name).DEFAULT.meta
    model = build(ModelConfig(name=name), 1000, IMAGENET)
    assert count_parameters(model) == meta["num_params"]
    assert count_macs(model, (224, 224)) / 1e9 == pytest.approx(meta["_ops"], abs=6e-4)


def test_macs_are_those_of_the_convolutions_and_linear_layers() -> None:
    model = build(ModelConfig(), 10, Preprocess(size=(32, 48)))
    model.train()
    counted = 0

    def note(layer: nn.Module, _: object, output: Tensor) -> None:
        nonlocal counted
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        counted += output.numel() * layer.weight[0].numel()

    macs = count_macs(model, (32, 48))
    assert model.training
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(note)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 32, 48, 3))
    assert macs == counted


@pytest.mark.parametrize(
    ("stem_stride", "size", "first", "last"),
    [
        ("auto", (28, 28), (28, 28), (2, 2)),
        ("auto", (64, 32), (64, 32), (4, 2)),
        ("auto", (65, 32), (33, 16), (3, 1)),
        (1, (96, 96), (96, 96), (6, 6)),
        (2, (32, 32), (16, 16), (1, 1)),
    ],
)
def test_the_stems_stride_follows_the_input(
    stem_stride: object, size: tuple[int, int], first: tuple[int, int], last: tuple[int, int]
) -> None:
    config = ModelConfig(stem_stride=stem_stride)  # type: ignore[arg-type]
    sides = feature_sides(build(config, 3, Preprocess(size=size)), size)
    assert sides[0] == first
    assert sides[-1] == last


@pytest.mark.parametrize("classes", [2, 37])
def test_any_number_of_classes(classes: int) -> None:
    model = build(ModelConfig(), classes, Preprocess(size=(32, 32))).eval()
    with torch.no_grad():
        logits = model(torch.zeros(3, 32, 32, 3, dtype=torch.uint8))
    assert logits.shape == (3, classes)
    assert logits.dtype == torch.float32


def test_dropout_and_batch_norm_momentum_reach_the_network() -> None:
    model = build(ModelConfig(dropout=0.35, batch_norm_momentum=0.07), 5, IMAGENET)
    drops = [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)]
    norms = [layer.momentum for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert drops == [0.35]
    assert len(norms) > 30
    assert set(norms) == {0.07}


def test_the_momentum_reaches_timms_norms_with_activation() -> None:
    config = ModelConfig(name="adv-efficientnet-b0", batch_norm_momentum=0.07)
    model = build(config, 5, Preprocess(size=(64, 64)))
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert any(type(layer) is not nn.BatchNorm2d for layer in norms)
    assert {layer.momentum for layer in norms} == {0.07}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^model\.name: unknown model 'mobilenet_v3_smal"):
        build(ModelConfig(name="mobilenet_v3_smal"), 5, IMAGENET)


@pytest.mark.parametrize(("field", "value"), [("dropout", 1.0), ("batch_norm_momentum", 0.0)])
def test_bad_values(field: str, value: float) -> None:
    with pytest.raises(BadValue, match=field):
        ModelConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalisation_equals_torchvisions(dtype: torch.dtype) -> None:
    process = Preprocess(size=(5, 7), mean=(0.1, 0.5, 0.7), std=(0.2, 0.3, 0.9))
    model = Classifier(nn.Identity(), process)
    pixels = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8).to(dtype)
    expected = normalize(pixels.permute(0, 3, 1, 2).float() / 255, process.mean, process.std)
    torch.testing.assert_close(model(pixels), expected, atol=1e-5, rtol=1e-5)


def test_the_network_is_torchvisions_behind_its_normalisation() -> None:
    torch.manual_seed(1)
    ours = build(ModelConfig(stem_stride=2, batch_norm_momentum=1.0), 4, IMAGENET)
    with torch.no_grad():  # fresh statistics would let every image's logits vanish
        ours.train()(torch.randint(0, 256, (8, 64, 96, 3), dtype=torch.uint8))
    ours.eval()
    theirs = get_model("mobilenet_v3_small", num_classes=4).eval()
    theirs.load_state_dict(ours.backbone.state_dict())
    pixels = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    normal = normalize(pixels.permute(0, 3, 1, 2).float() / 255, IMAGENET.mean, IMAGENET.std)
    with torch.no_grad():
        logits = ours(pixels)
        torch.testing.assert_close(logits, theirs(normal), atol=1e-4, rtol=1e-4)
    assert logits.std() > 1e-2


def test_the_card_and_not_the_weights_carry_the_normalisation() -> None:
    names = build(ModelConfig(), 2, IMAGENET).state_dict()
    assert all(name.startswith("backbone.") for name in names)
