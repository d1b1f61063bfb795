"""Published weights: where they come from, and the preprocessing that belongs to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.models import get_model, get_model_weights

from distcls.errors import DistclsError, UsageError
from distcls.files import digest
from distcls.imaging import Preprocess
from distcls.imaging.preprocess import INTERPOLATIONS
from distcls.models import pretrained
from distcls.models.config import ModelConfig
from distcls.models.factory import build
from distcls.models.matching import apply_weights
from distcls.models.pretrained import find_weights, library_preprocess
from distcls.models.registry import resolve

ADV = "tf_efficientnet_b0.ap_in1k"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hugging Face hub, and no network beside it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def publish(hub: Path, name: str) -> dict[str, Tensor]:
    """Put weights into the cache as if they had been downloaded."""
    torch.manual_seed(4)
    tensors = timm.create_model(name, pretrained=False).state_dict()
    folder = hub / f"models--timm--{name}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    save_file(tensors, snapshot / "model.safetensors")
    return dict(tensors)


@pytest.mark.parametrize("value", ["timm", "library"])
def test_timms_weights_from_its_cache(offline: Path, value: str) -> None:
    tensors = publish(offline, ADV)
    weights = find_weights(ModelConfig(name="adv-efficientnet-b0", pretrained=value))
    assert weights is not None
    assert weights.source == f"timm's {ADV}"
    process = weights.preprocess
    assert process is not None
    assert (process.mean, process.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # AdvProp's own
    assert (process.size, process.crop_fraction) == ((224, 224), 0.875)
    model = build(ModelConfig(name="adv-efficientnet-b0"), 5, process)
    report = apply_weights(model, weights)
    own = model.backbone.state_dict()
    assert all(torch.equal(own[name], tensors[name]) for name in report.loaded)
    assert [name.split()[0] for name in report.skipped] == ["classifier.weight", "classifier.bias"]
    assert report.missing == {}


def test_offline_timm_fails_with_one_line(offline: Path) -> None:
    with pytest.raises(DistclsError) as caught:
        find_weights(ModelConfig(name="adv-efficientnet-b0", pretrained="library"))
    text = str(caught.value)
    assert text.startswith(f"model.pretrained: cannot download https://huggingface.co/timm/{ADV} (")
    assert "give the file's path" in text
    assert "\n" not in text
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("simple_cnn", "library", "distcls publishes no weights for simple_cnn"),
        ("timm:mnasnet_050", "library", "timm publishes no weights for mnasnet_050"),
        ("resnet18", "timm", "timm has no resnet18, which is of torchvision; `library`"),
        ("xception", "torchvision", "torchvision has no xception, which is of timm"),
    ],
)
def test_weights_that_nobody_publishes(name: str, value: str, text: str) -> None:
    with pytest.raises(UsageError, match=rf"^model\.pretrained: {text}"):
        find_weights(ModelConfig(name=name, pretrained=value))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_normalisation_is_what_the_network_itself_makes_of_torchvisions(name: str) -> None:
    """With published weights these renormalise: here that is part of the preprocessing."""
    process = library_preprocess(resolve(name))
    assert process is not None
    transform = get_model_weights(name).DEFAULT.transforms()
    pixels = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (transform.mean, transform.std))
    network = get_model(name, weights=None, transform_input=True, init_weights=False, num_classes=2)
    expected = network._transform_input((pixels - mean) / std)
    own_mean, own_std = (torch.tensor(v).view(1, 3, 1, 1) for v in (process.mean, process.std))
    torch.testing.assert_close((pixels - own_mean) / own_std, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "file", "mean", "size"),
    [
        ("timm:tf_efficientnet_b2", "tf_efficientnet_b2_ap-2f8e7636.pth", 0.5, (260, 260)),
        ("resnet18", "resnet18-f37072fd.pth", 0.485, (224, 224)),
    ],
)
def test_a_file_under_its_published_name_is_known(
    tmp_path: Path, name: str, file: str, mean: float, size: tuple[int, int]
) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / file)
    weights = find_weights(ModelConfig(name=name, pretrained=str(tmp_path / file)))
    assert weights is not None
    assert weights.preprocess is not None
    assert (weights.preprocess.mean[0], weights.preprocess.size) == (mean, size)
    torch.save({"w": torch.zeros(1)}, tmp_path / "mine.pth")
    other = find_weights(ModelConfig(name=name, pretrained=str(tmp_path / "mine.pth")))
    assert other is not None
    assert other.preprocess is None


def test_a_name_with_a_tag_names_the_weights(tmp_path: Path) -> None:
    """The hub calls every file model.safetensors, whatever normalisation it was trained with."""
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    config = ModelConfig(name="adv-efficientnet-b2", pretrained=str(tmp_path / "model.safetensors"))
    weights = find_weights(config)
    assert weights is not None
    assert weights.preprocess is not None
    assert (weights.preprocess.mean, weights.preprocess.size) == ((0.5,) * 3, (260, 260))


@pytest.mark.parametrize(
    ("name", "crop"), [("swin_t", 224 / 232), ("timm:vit_tiny_patch16_224", 0.9)]
)
def test_the_crop_is_the_weights_own(name: str, crop: float) -> None:
    process = library_preprocess(resolve(name))
    assert process is not None
    assert process.crop_fraction == pytest.approx(crop)
    assert process.resize == "crop"


@pytest.mark.parametrize(
    ("filter_", "theirs"),
    [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)],
)
@pytest.mark.parametrize("picture", ["china.jpg", "flower.jpg"])
def test_interpolation_is_the_nearest_to_the_librarys(
    filter_: str, theirs: Image.Resampling, picture: str
) -> None:
    """Photographs of 427x640, cut to 427 square and shrunk to 256, as by the libraries' Pillow."""
    photo = np.ascontiguousarray(load_sample_image(picture)[:, :427])
    expected = np.asarray(Image.fromarray(photo).resize((256, 256), theirs), np.float64)
    errors = {}
    for name in INTERPOLATIONS:
        ours = Preprocess(size=(256, 256), resize="squash", interpolation=name)(photo)
        errors[name] = float(np.abs(ours - expected).mean())
    best = min(errors, key=lambda name: errors[name])
    assert best == pretrained.INTERPOLATIONS[filter_], errors


def test_every_published_preprocess_can_be_told() -> None:
    for name in [*timm.list_models("*resnet*"), "vit_base_patch16_siglip_224"]:
        assert library_preprocess(resolve(f"timm:{name}")) is not None


LAYOUT = {
    "architecture": "resnet10t",
    "num_classes": 7,
    "pretrained_cfg": {
        **{"input_size": [3, 176, 176], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
        **{"interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"},
    },
}


def folder_of(path: Path, config: Any = LAYOUT, name: str = "resnet10t") -> dict[str, Tensor]:
    """A folder as timm and the Hugging Face Hub lay one out."""
    path.mkdir()
    torch.manual_seed(4)
    tensors = timm.create_model(name, num_classes=7).state_dict()
    save_file(tensors, path / "model.safetensors")
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (path / "config.json").write_text(text)
    return dict(tensors)


def test_a_folder_with_its_config(tmp_path: Path) -> None:
    tensors = folder_of(tmp_path / "hub")
    config = ModelConfig(name="timm:resnet10t", pretrained=str(tmp_path / "hub"))
    weights = find_weights(config)
    assert weights is not None
    assert weights.preprocess == Preprocess(
        size=(176, 176), crop_fraction=0.9, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
    )
    assert weights.notes == ()
    assert (weights.name, weights.sha256) == (
        str(tmp_path / "hub"),
        digest(tmp_path / "hub" / "model.safetensors"),
    )
    model = build(config, 5, weights.preprocess)
    report = apply_weights(model, weights)
    own = model.backbone.state_dict()
    assert all(torch.equal(own[name], tensors[name]) for name in report.loaded)
    assert {name.split()[0] for name in report.skipped} == {"fc.weight", "fc.bias"}


def test_a_folder_with_a_pickle_and_an_old_config(tmp_path: Path) -> None:
    """timm's layout before pretrained_cfg, and a network of the same names elsewhere."""
    flat = {"architecture": "resnet18", **LAYOUT["pretrained_cfg"]}  # type: ignore[dict-item]
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text(json.dumps(flat))
    torch.save(
        get_model("resnet18", num_classes=5).state_dict(), tmp_path / "hub/pytorch_model.bin"
    )
    weights = find_weights(ModelConfig(name="resnet18", pretrained=str(tmp_path / "hub")))
    assert weights is not None
    assert weights.preprocess is not None
    report = apply_weights(build(ModelConfig(name="resnet18"), 5, weights.preprocess), weights)
    assert report.lines()[1] == (
        "  its config.json names timm's resnet18 (--model.name timm:resnet18), "
        "model.name is torchvision's resnet18"
    )
    assert report.missing == {}


def test_a_folder_of_another_network_names_it(tmp_path: Path) -> None:
    folder_of(tmp_path / "hub")
    weights = find_weights(ModelConfig(pretrained=str(tmp_path / "hub")))
    assert weights is not None
    model = build(ModelConfig(), 5, Preprocess(size=(64, 64)))
    with pytest.raises(
        UsageError, match=r"config\.json names timm's resnet10t \(--model\.name timm:"
    ):
        apply_weights(model, weights)


def changed(**values: Any) -> dict[str, Any]:
    return {**LAYOUT, "pretrained_cfg": {**LAYOUT["pretrained_cfg"], **values}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("{", r"config\.json: cannot be read as JSON"),
        ("[" * 100_000, r"config\.json: cannot be read as JSON"),
        ("[]", "expected a JSON object"),
        (" " * (2**20 + 1), "larger than 1 MiB"),
        (changed(input_size=[1, 28, 28]), "takes 1 channels, images here have 3"),
        (changed(input_size=[3, 0, 28]), "input_size: .* is not valid"),
        (changed(input_size=[3, 1e9, 28]), "input_size: .* is not valid"),
        (changed(mean="red"), "mean: 'red' is not valid"),
        (changed(std=[0, 1, 1]), "std: .* is not valid"),
        (changed(crop_pct=[1]), "crop_pct: .* is not valid"),
        (changed(crop_mode={}), "crop_mode: .* is not one of center"),
    ],
)
def test_a_folders_config_is_checked(tmp_path: Path, config: Any, text: str) -> None:
    folder_of(tmp_path / "hub", config)
    with pytest.raises(UsageError, match=text) as caught:
        find_weights(ModelConfig(name="timm:resnet10t", pretrained=str(tmp_path / "hub")))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_folder_without_config_or_weights(tmp_path: Path) -> None:
    folder_of(tmp_path / "hub", None)
    weights = find_weights(ModelConfig(name="timm:resnet10t", pretrained=str(tmp_path / "hub")))
    assert weights is not None
    assert weights.preprocess is None
    assert weights.notes == ("no config.json beside it: its preprocessing is not known",)
    (tmp_path / "empty").mkdir()
    refusal = r"empty is a folder without weights, expected one of model\.safetensors"
    with pytest.raises(UsageError, match=refusal):
        find_weights(ModelConfig(pretrained=str(tmp_path / "empty")))


def test_published_weights_by_their_own_name(offline: Path) -> None:
    publish(offline, "resnet50.a2_in1k")
    weights = find_weights(ModelConfig(name="timm:resnet50", pretrained="timm:a2_in1k"))
    assert weights is not None
    assert weights.name == "timm:a2_in1k"
    assert weights.source == "timm's resnet50.a2_in1k"
    assert weights.sha256 is not None
    with pytest.raises(UsageError, match=r"timm's resnet50 has no weights 'a7_in1k'; did you mean"):
        find_weights(ModelConfig(name="timm:resnet50", pretrained="timm:a7_in1k"))
    with pytest.raises(
        UsageError, match=r"torchvision's resnet50 has no weights 'V3'.*IMAGENET1K_V1"
    ):
        find_weights(ModelConfig(name="resnet50", pretrained="torchvision:V3"))
    with pytest.raises(UsageError, match="has no resnet50, which is of torchvision"):
        find_weights(ModelConfig(name="resnet50", pretrained="timm:a1_in1k"))
