"""Names of networks: what each resolves to, and the error of an unknown one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torchvision

from distcls.errors import UsageError
from distcls.models.registry import (
    ALIASES,
    Origin,
    catalogue,
    import_settings,
    known,
    listed,
    matching,
    resolve,
)


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
    assert list(matching(None)) == list(listed())
    assert matching("simple_?nn") == {"simple_cnn": "distcls"}
    found = matching("resnext50_32x4d")
    assert {"resnext50_32x4d", "se_resnext50_32x4d", "timm:resnext50_32x4d"} <= set(found)
    assert all("resnext50_32x4d" in name for name in found)
    assert matching("torchvision:resnet1*") == dict.fromkeys(
        ("resnet101", "resnet152", "resnet18"), "torchvision"
    )
    vits = matching("timm:*vit*")
    assert set(vits.values()) == {"timm"}
    assert {"vit_base_patch16_224", "mobilevit_s"} <= set(vits)
    assert set(matching("timm:vit")) == set(vits)
    assert set(matching("timm:resnet50")) > {"timm:resnet50", "resnet50_gn"}
    with pytest.raises(UsageError, match=r"no model matches 'resnext51_32x4d'.*'resnext50_32x4d'"):
        matching("resnext51_32x4d")


def test_other_names_are_of_networks_that_exist() -> None:
    for name in ALIASES:
        assert resolve(name).library == "timm"
        assert name in listed()


def test_the_names_are_those_of_the_libraries_though_none_is_loaded() -> None:
    program = (
        "import json, sys\n"
        "from distcls.models.registry import catalogue, listed\n"
        "found = list(catalogue().items()), listed()\n"
        "assert not {'torch', 'torchvision', 'timm'} & set(sys.modules)\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    found, short = json.loads(done.stdout)
    assert dict(found) == {name: resolve(name).library for name in known()} == catalogue()
    assert [name for name, _ in found] == list(known())
    assert tuple(short) == listed()


def test_the_settings_that_import_a_users_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", ".")])
    assert import_settings("own_hooks_here").startswith("PYTHONPATH=FOLDER DISTCLS_IMPORT=own_")
    (tmp_path / "own_hooks_here.py").write_text("raise ValueError('imported')")
    assert import_settings("own_hooks_here") == "PYTHONPATH=. DISTCLS_IMPORT=own_hooks_here"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", ".")
    assert import_settings("own_hooks_here") == "DISTCLS_IMPORT=own_hooks_here"
    again = import_settings("own_hooks_here", path_stays=False)
    assert again == "PYTHONPATH=. DISTCLS_IMPORT=own_hooks_here"
