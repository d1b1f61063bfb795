"""Heads and depths of networks, and the learning rates and weight decay that follow from them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distcls.imaging import Preprocess
from distcls.models.classifier import Classifier, depths, head_parameters
from distcls.training.config import OptimizerConfig
from distcls.training.optim import learning_rate_scales, parameter_groups


def classifier(backbone: nn.Module) -> Classifier:
    return Classifier(backbone, Preprocess(size=(32, 32)))


def from_torchvision(name: str) -> Classifier:
    from torchvision.models import get_model

    # RegNets compute their widths with tensors
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        return classifier(get_model(name, weights=None, num_classes=7))


def from_timm(name: str) -> Classifier:
    import timm

    with torch.device("meta"):
        return classifier(timm.create_model(name, num_classes=7))


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("mobilenet_v3_small", "classifier.3"),
        ("mobilenet_v2", "classifier.1"),
        ("shufflenet_v2_x1_0", "fc"),
        ("efficientnet_b0", "classifier.1"),
        ("resnet18", "fc"),
        ("regnet_y_400mf", "fc"),
        ("densenet121", "classifier"),
        ("convnext_tiny", "classifier.2"),
        ("swin_t", "head"),
        ("vit_b_16", "heads.head"),
        ("squeezenet1_1", "classifier.1"),
    ],
)
def test_heads_of_torchvision(name: str, head: str) -> None:
    model = from_torchvision(name)
    assert head_parameters(model) == {f"backbone.{head}.weight", f"backbone.{head}.bias"}
    shapes = dict(model.named_parameters())
    assert all(shapes[parameter].shape[0] == 7 for parameter in head_parameters(model))


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("mobilenetv3_small_050", ["classifier"]),
        ("seresnext50_32x4d", ["fc"]),
        ("xception41", ["head.fc"]),
        ("convnext_atto", ["head.fc"]),
        ("deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
    ],
)
def test_heads_of_timm(name: str, heads: list[str]) -> None:
    expected = {f"backbone.{head}.{kind}" for head in heads for kind in ("weight", "bias")}
    assert head_parameters(from_timm(name)) == expected


def test_heads_beside_the_backbone() -> None:
    model = classifier(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6)))
    model.heads = nn.ModuleDict({"first": nn.Linear(6, 2), "second": nn.Linear(6, 3)})
    heads = {f"heads.{name}.{kind}" for name in ("first", "second") for kind in ("weight", "bias")}
    assert head_parameters(model) == heads
    found = depths(model)
    assert {found[name] for name in heads} == {2}
    assert (found["backbone.0.weight"], found["backbone.1.bias"]) == (0, 1)


def test_a_network_of_one_layer() -> None:
    model = classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    assert depths(model) == {"backbone.1.weight": 0, "backbone.1.bias": 0}
    assert head_parameters(model) == set(depths(model))
    assert head_parameters(nn.Linear(4, 2)) == {"weight", "bias"}


def test_depths_follow_the_order_of_the_layers() -> None:
    found = depths(from_torchvision("resnet18"))
    # a norm belongs to the convolution before it; each block of a stage is a layer
    names = ["conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer1.1.bn2.bias"]
    names += ["layer4.1.conv2.weight", "fc.weight"]
    assert [found[f"backbone.{name}"] for name in names] == [0, 0, 1, 2, 8, 9]
    found = depths(from_torchvision("mobilenet_v3_small"))
    names = [f"features.{place}" for place in range(13)] + ["classifier.0", "classifier.3"]
    layers = [{layer for key, layer in found.items() if f"{name}." in key} for name in names]
    assert layers == [{place} for place in range(15)]


def test_a_transformers_encoder_is_opened() -> None:
    found = depths(from_torchvision("vit_b_16"))
    blocks = [found[f"backbone.encoder.layers.encoder_layer_{i}.mlp.0.weight"] for i in range(12)]
    assert blocks == list(range(1, 13))
    assert found["backbone.class_token"] == found["backbone.encoder.pos_embedding"] == 0
    assert found["backbone.encoder.ln.weight"] == 12
    assert found["backbone.heads.head.weight"] == 13


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_rates_and_decay_of_timms_models_are_timms(name: str) -> None:
    from timm.optim import param_groups_layer_decay

    model = from_timm(name)
    exempt = model.backbone.no_weight_decay() if hasattr(model.backbone, "no_weight_decay") else ()
    expected = {
        id(parameter): (group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(
            model.backbone, weight_decay=0.05, layer_decay=0.7, no_weight_decay_list=exempt
        )
        for parameter in group["params"]
    }
    groups = parameter_groups(OptimizerConfig(layer_decay=0.7, weight_decay=0.05), model)
    found = {
        id(parameter): (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    assert found.keys() == expected.keys()
    for key, (scale, decay) in found.items():
        assert (scale, decay) == pytest.approx(expected[key])
    assert len({scale for scale, _ in found.values()}) > 5


def test_rates_by_depth() -> None:
    config = OptimizerConfig(layer_decay=0.5, head_lr_scale=4.0)
    model = from_torchvision("resnet18")
    scales = learning_rate_scales(config, model)
    names = ["conv1.weight", "layer1.0.conv1.weight", "layer4.1.bn2.bias", "fc.weight", "fc.bias"]
    assert [scales[f"backbone.{name}"] for name in names] == [0.5**9, 0.5**8, 0.5, 4.0, 4.0]


def test_without_options_there_are_two_groups() -> None:
    model = from_torchvision("mobilenet_v3_small")
    groups = parameter_groups(OptimizerConfig(), model)
    assert [(group["lr_scale"], group["weight_decay"]) for group in groups] == [(1, 0.05), (1, 0)]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert all(p.ndim > 1 for p in groups[0]["params"])
    assert all(p.ndim == 1 for p in groups[1]["params"])


def test_a_rate_for_the_head_alone() -> None:
    groups = parameter_groups(OptimizerConfig(head_lr_scale=10.0), from_torchvision("resnet18"))
    sizes = {(g["lr_scale"], g["weight_decay"]): len(g["params"]) for g in groups}
    assert sizes[10.0, 0.05] == sizes[10.0, 0.0] == 1
    assert len(sizes) == 4
