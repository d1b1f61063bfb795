"""Names of networks: what each resolves to, and the error of an unknown one."""

from __future__ import annotations

import pytest
import timm
import torchvision

from distcls.errors import UsageError
from distcls.models.registry import ALIASES, Origin, known, listed, matching, resolve


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("simple_cnn", Origin("distcls", "simple_cnn")),
        ("resnet50", Origin("torchvision", "resnet50")),
        ("torchvision:resnet50", Origin("torchvision", "resnet50")),
        ("timm:resnet50", Origin("timm", "resnet50")),
        ("timm:resnet50.a1_in1k", Origin("timm", "resnet50.a1_in1k")),
        ("seresnext50_32x4d", Origin("timm", "seresnext50_32x4d")),
        ("se_resnext50_32x4d", Origin("timm", "seresnext50_32x4d")),
        ("adv-efficientnet-b2", Origin("timm", "tf_efficientnet_b2.ap_in1k")),
        ("xception", Origin("timm", "legacy_xception")),
        ("tf_efficientnet_b2_ap", Origin("timm", "tf_efficientnet_b2.ap_in1k")),  # outdated in timm
    ],
)
def test_what_a_name_stands_for(name: str, origin: Origin) -> None:
    assert resolve(name) == origin


def test_every_name_of_both_libraries_is_known() -> None:
    theirs = torchvision.models.list_models(module=torchvision.models)
    assert len(theirs) > 70
    for name in theirs:
        assert resolve(name) == ("torchvision", name)
    for name in timm.list_models():
        assert resolve(f"timm:{name}") == ("timm", name)
    assert {resolve(name).library for name in known()} == {"distcls", "torchvision", "timm"}
    assert len(set(known())) == len(known()) > len(theirs) + len(timm.list_models())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mobilenet_v3_smal", "did you mean 'mobilenet_v3_small'"),
        ("adv-efficientnet-b9", "did you mean 'adv-efficientnet-b"),
        ("simple_ccn", "did you mean 'simple_cnn'"),
        ("timm:resnt50", "did you mean 'timm:resnet50'"),
        ("torchvision:swin_tt", "did you mean 'torchvision:swin_t'"),
        ("torchvision:seresnext50_32x4d", "did you mean 'torchvision:resnext50_32x4d'"),
        ("qqqqqq", "choices: simple_cnn, simple_nn, mobilenet_v2"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=r"^model\.name: unknown model ") as caught:
        resolve(name)
    text = str(caught.value)
    assert repr(name) in text
    assert hint in text
    assert "\n" not in text


def test_detectors_and_quantized_networks_are_none_of_them() -> None:
    for name in ("fasterrcnn_resnet50_fpn", "quantized_mobilenet_v2", "r3d_18"):
        with pytest.raises(UsageError, match="unknown model"):
            resolve(f"torchvision:{name}")


def test_an_unknown_library_and_an_unknown_tag() -> None:
    with pytest.raises(UsageError, match=r"unknown library 'hf-hub' .*torchvision, timm"):
        resolve("hf-hub:timm/resnet18")
    with pytest.raises(
        UsageError, match=r"no weights 'a9_in1k'.*did you mean 'resnet50\.\w+_in1k'"
    ):
        resolve("resnet50.a9_in1k")


def test_patterns() -> None:
    assert matching(None) == list(listed())
    assert matching("simple_?nn") == ["simple_cnn"]
    found = matching("resnext50_32x4d")
    assert {"resnext50_32x4d", "se_resnext50_32x4d", "timm:resnext50_32x4d"} <= set(found)
    assert all("resnext50_32x4d" in name for name in found)
    with pytest.raises(UsageError, match=r"no model matches 'resnext51_32x4d'.*'resnext50_32x4d'"):
        matching("resnext51_32x4d")


def test_other_names_are_of_networks_that_exist() -> None:
    for name in ALIASES:
        assert resolve(name).library == "timm"
        assert name in listed()
