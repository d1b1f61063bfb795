"""Building a network: dropout, stem stride, size, initialisation; and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from distcls.errors import UsageError
from distcls.imaging import Preprocess
from distcls.models.config import ModelConfig
from distcls.models.factory import DroppedLinear, build, drop_before_last, stem_stride
from distcls.models.simple import SimpleCnn, SimpleNn


@pytest.mark.parametrize(
    ("name", "own"),
    [
        *[("mobilenet_v2", {0.2}), ("efficientnet_b2", {0.3}), ("resnet18", set())],
        *[("simple_cnn", {0.5}), ("swin_t", {0.0})],
    ],
)
def test_unset_the_dropout_is_the_architectures_own(name: str, own: set[float]) -> None:
    model = build(ModelConfig(name=name), 5, Preprocess(size=(64, 64)))
    assert {layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)} == own
    assert not any(isinstance(layer, DroppedLinear) for layer in model.modules())


@pytest.mark.parametrize(
    "name",
    [
        *("simple_cnn", "simple_nn", "mobilenet_v2", "shufflenet_v2_x0_5", "resnet18"),
        *("timm:resnet18", "adv-efficientnet-b0"),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_alone_makes_training_random(name: str, dropout: float) -> None:
    torch.manual_seed(0)
    process = Preprocess(size=(32, 32))
    model = build(ModelConfig(name=name, dropout=dropout), 5, process)
    plain = build(ModelConfig(name=name), 5, process)
    assert model.state_dict().keys() == plain.state_dict().keys()
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():  # batch norm takes the batch's own statistics, the same ones twice
        first, second = model.train()(images), model(images)
        assert torch.equal(first, second) == (dropout == 0)
        assert torch.equal(model.eval()(images), model(images))


def test_a_dropped_layer_keeps_the_mean_of_its_features() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(1000, 1)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    dropped = DroppedLinear.of(layer, 0.9)
    assert dropped.weight is layer.weight
    sums = dropped(torch.ones(200, 1000)).detach()
    # of 1,000 features 100 stay, each 10 times as strong; a binomial's spread is sqrt(n p q)
    assert float(sums.mean()) == pytest.approx(1000, rel=0.02)
    assert float(sums.std()) == pytest.approx(10 * (1000 * 0.1 * 0.9) ** 0.5, rel=0.2)
    assert torch.equal(dropped.eval()(torch.ones(1, 1000)), torch.full((1, 1), 1000.0))


def test_transformers_drop_before_the_last_layer_and_not_in_their_blocks() -> None:
    backbone = build(ModelConfig(name="swin_t", dropout=0.3), 5, Preprocess(size=(64, 64))).backbone
    assert isinstance(backbone.head, DroppedLinear)
    assert backbone.head.dropout == 0.3
    assert {layer.p for layer in backbone.modules() if isinstance(layer, nn.Dropout)} == {0.0}


def test_dropout_without_a_linear_last_layer_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^model\.dropout: 0\.5 given.*no linear last layer"):
        drop_before_last(nn.Sequential(nn.Linear(8, 9), nn.Conv2d(3, 5, 1)), 5, 0.5)


@pytest.mark.parametrize(
    ("name", "stride"),
    [
        *[("resnet18", 1), ("shufflenet_v2_x0_5", 1), ("adv-efficientnet-b0", 1)],
        *[("swin_t", 4), ("convnext_tiny", 4), ("simple_cnn", 1), ("simple_nn", None)],
    ],
)
def test_auto_lets_patches_and_small_networks_be(name: str, stride: int | None) -> None:
    model = build(ModelConfig(name=name), 3, Preprocess(size=(64, 64)))
    assert stem_stride(model.backbone) == stride
    if stride == 1 and name != "simple_cnn":
        larger = build(ModelConfig(name=name), 3, Preprocess(size=(65, 64)))
        assert stem_stride(larger.backbone) == 2


@pytest.mark.parametrize(
    ("name", "stride", "reason"),
    [
        ("swin_t", 2, "has stride 4 by design"),
        ("convnext_tiny", 1, "has stride 4 by design"),
        ("simple_cnn", 2, "has stride 1 by design"),
        ("simple_nn", 1, "has no convolution over the image"),
    ],
)
def test_a_stride_that_cannot_be_is_refused(name: str, stride: object, reason: str) -> None:
    config = ModelConfig(name=name, stem_stride=stride)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=rf"^model\.stem_stride: {stride} given, .*{reason}"):
        build(config, 3, Preprocess(size=(64, 64)))


def test_auto_leaves_a_hybrid_whose_attention_knows_one_resolution() -> None:
    model = build(ModelConfig(name="levit_128s"), 3, Preprocess(size=(64, 64)))
    assert stem_stride(model.backbone) == 2


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_networks_of_one_size_are_built_for_that_of_the_input(name: str) -> None:
    model = build(ModelConfig(name=name), 3, Preprocess(size=(64, 96))).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 64, 96, 3, dtype=torch.uint8)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("vit_b_32", (64, 96), "square"),
        ("simple_cnn", (9, 64), "10 pixels"),
        ("maxvit_t", (64, 64), "partition size"),
        ("inception_v3", (24, 24), "too small|Kernel size"),
    ],
)
def test_a_size_that_a_network_cannot_take_is_refused(
    name: str, size: tuple[int, int], reason: str
) -> None:
    with pytest.raises(
        UsageError, match=rf"^model\.name: {name} cannot .*(?:{reason}).*input\.size"
    ):
        build(ModelConfig(name=name), 3, Preprocess(size=size))


def test_heads_that_only_help_training_are_left_out() -> None:
    model = build(ModelConfig(name="googlenet"), 3, Preprocess(size=(64, 64)))
    assert not [name for name in model.state_dict() if "aux" in name]
    logits = model.train()(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))
    assert logits.shape == (2, 3)


def test_the_tutorials_networks_have_the_published_sizes() -> None:
    # Keras: 34,826 for one channel and 10 classes; PyTorch: 669,706; two more channels each here
    cnn = sum(p.numel() for p in SimpleCnn(10, (28, 28)).parameters())
    assert cnn == 34_826 + 2 * 9 * 32
    linear = sum(p.numel() for p in SimpleNn(10, (28, 28)).parameters())
    assert linear == 669_706 + 2 * 28 * 28 * 512


@pytest.mark.parametrize("how", ["xavier", "he"])
def test_weights_are_drawn_as_the_papers_say(how: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(name="simple_nn", init=how)  # type: ignore[arg-type]
    layer = build(config, 10, Preprocess(size=(16, 16))).backbone.layers[3]  # type: ignore[index]
    fan_in, fan_out = 512, 512
    weight, bias = layer.weight.detach(), layer.bias.detach()
    variance = 2 / (fan_in + fan_out) if how == "xavier" else 2 / fan_in
    assert float(weight.var()) == pytest.approx(variance, rel=0.02)
    assert float(weight.mean()) == pytest.approx(0, abs=1e-3)
    bound = (6 / (fan_in + fan_out)) ** 0.5
    # a uniform distribution ends at its bound; a normal one has 8 % of its values beyond
    beyond = float((weight.abs() > (3 * variance) ** 0.5).float().mean())
    assert beyond == (0 if how == "xavier" else pytest.approx(0.083, abs=0.005))
    if how == "xavier":
        assert float(weight.abs().max()) == pytest.approx(bound, rel=1e-3)
    assert not bias.any()


def test_the_librarys_own_weights_stay() -> None:
    torch.manual_seed(0)
    ours = build(ModelConfig(name="resnet18"), 10, Preprocess(size=(32, 32)))
    torch.manual_seed(0)
    theirs = get_model("resnet18", num_classes=10)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.backbone.state_dict()[name], tensor), name


def strided(classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)
    )


def test_auto_leaves_a_network_of_the_users_own_alone() -> None:
    model = build(ModelConfig(name=f"{__name__}:strided"), 5, Preprocess(size=(32, 32)))
    assert stem_stride(model.backbone) == 2
    config = ModelConfig(name=f"{__name__}:strided", stem_stride=1)
    assert stem_stride(build(config, 5, Preprocess(size=(32, 32))).backbone) == 1
